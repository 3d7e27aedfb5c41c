"""The metrics: closed forms, hand-made sets, and that they tell good samples from bad ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gendiff.modality import Measure
from gendiff.spaces import Batch, Cond, Dense
from gendiff_image import ImageConfig, ImageModality
from gendiff_image import metrics as module
from gendiff_image.data import Data, Split, reference
from gendiff_image.metrics import frechet_distance, measure, precision_recall

image = ImageModality()
Figures = dict[str, Measure]


def with_moments(mean: Tensor, cov: Tensor, count: int, seed: int) -> Tensor:
    """Points whose sample mean and covariance are exactly these."""
    gen = torch.Generator().manual_seed(seed)
    z = torch.randn(count, len(mean), generator=gen, dtype=torch.float64)
    z = z - z.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T.cov()), z.T, upper=False).T
    values, vectors = torch.linalg.eigh(cov)
    return mean + white @ (vectors * values.clamp(min=0).sqrt()).T


def random_cov(dim: int, rank: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank, generator=gen, dtype=torch.float64)
    return factor @ factor.T


def test_frechet_distance_of_diagonal_gaussians() -> None:
    """Commuting covariances: |m1 - m2|^2 + sum (s1 - s2)^2."""
    mean = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    s1 = torch.tensor([1.0, 2.0, 0.1], dtype=torch.float64)
    s2 = torch.tensor([3.0, 0.5, 0.0], dtype=torch.float64)
    a = with_moments(mean, torch.diag(s1**2), 50, 0)
    b = with_moments(torch.zeros(3, dtype=torch.float64), torch.diag(s2**2), 40, 1)
    wanted = mean.square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(wanted), rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(float(wanted), rel=1e-10)


@pytest.mark.parametrize("rank", [6, 3])
def test_frechet_distance_of_general_gaussians(rank: int) -> None:
    """Against the eigenvalues of the product, which are real: tr (S1 S2)^(1/2)."""
    cov_a, cov_b = random_cov(6, rank, 0), random_cov(6, 6, 1)
    zero = torch.zeros(6, dtype=torch.float64)
    a, b = with_moments(zero, cov_a, 100, 2), with_moments(zero, cov_b, 100, 3)
    eigenvalues = np.linalg.eigvals((cov_a @ cov_b).numpy()).real.clip(0)
    wanted = float(cov_a.trace() + cov_b.trace()) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_frechet_distance_of_equal_sets_is_zero() -> None:
    a = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))  # singular covariance
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a[:, :1], a[:, :1] + 3) == pytest.approx(9, rel=1e-5)


def test_precision_and_recall_of_known_sets() -> None:
    real = torch.arange(10.0)[:, None]  # unit spacing: the ball of the third neighbour
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)
    # all samples in one real spot: they look real and cover nothing else
    assert precision_recall(real, torch.full((10, 1), 4.0)) == (1.0, 0.1)
    # half of the samples far away: precision 1/2; those near still cover their surroundings
    fake = torch.cat([real[:5], 100 + 10 * real[:5]])
    assert precision_recall(real, fake) == (0.5, 0.8)  # the ball of 4 reaches to 7


def test_precision_counts_neighbours_as_the_paper_does() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # k = 1: radii 1, 1, 2, 4
    fake = torch.tensor([[-1.0], [-1.1], [5.0], [11.0], [11.1]])
    assert precision_recall(real, fake, k=1)[0] == pytest.approx(3 / 5)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = ImageConfig()
    facts = image.prepare(config).facts
    data = reference(config, facts)
    cache = tmp_path_factory.mktemp("cache")

    def judge(x: Tensor, labels: Tensor | None = None) -> Figures:
        cond = None if labels is None else Cond({"label": labels})
        batch = Batch(x, Dense(tuple(x.shape)), cond)
        return {m.name: m for m in image.metrics(config, facts, batch, cache, 0)}

    return judge, data, cache


def test_real_digits_score_at_the_floor(digits: Any) -> None:
    judge, data, _ = digits
    x, labels = data.train.tensor(700)
    found = judge(x, labels)
    distance = found["frechet_distance"]
    assert distance.value < 2 * distance.floor
    for name in ("precision", "recall", "label_accuracy"):
        assert found[name].value > found[name].floor - 0.05
        assert found[name].better == "higher"
    assert found["label_accuracy"].floor > 0.96  # the judge has seen 360 other digits only
    assert found["classes_present"].value == found["classes_present"].floor == 10
    assert "700 samples against 360 held-out images" in distance.note
    assert all("FID" not in m.name.upper() for m in found.values())


def test_held_out_digits_are_the_reference(digits: Any) -> None:
    judge, data, _ = digits
    found = judge(data.test.tensor(360)[0])
    assert found["frechet_distance"].value == pytest.approx(0, abs=1e-3)  # 8-bit rounding
    assert found["precision"].value == found["recall"].value == 1
    assert "label_accuracy" not in found  # nothing was asked for


def test_bad_samples_are_called_out(digits: Any) -> None:
    judge, data, _ = digits
    x, labels = data.train.tensor(700)
    gen = torch.Generator().manual_seed(0)
    floor = judge(x, labels)
    noise = judge(torch.randn(x.shape, generator=gen), labels)
    collapsed = judge(x[:1].expand(700, -1, -1, -1), labels)
    one_class = judge(x[labels == 3], labels[labels == 3])
    rough = judge(x + 0.2 * torch.randn(x.shape, generator=gen), labels)
    for bad in (noise, collapsed, one_class, rough):
        assert bad["frechet_distance"].value > 3 * bad["frechet_distance"].floor
    assert noise["precision"].value < 0.6
    assert noise["label_accuracy"].value < 0.3
    assert collapsed["recall"].value < 0.02
    assert collapsed["classes_present"].value == 1
    assert one_class["recall"].value < 0.3
    swapped = judge(x, (labels + 1) % 10)
    assert swapped["label_accuracy"].value < 0.05
    assert swapped["frechet_distance"].value == floor["frechet_distance"].value


def test_networks_are_cached_and_deterministic(digits: Any, tmp_path: Path) -> None:
    judge, data, cache = digits
    x, labels = data.train.tensor(200)
    assert len(list(cache.glob("features-*.pt"))) <= 1
    first = [m.value for m in judge(x, labels).values()]
    assert [m.value for m in judge(x, labels).values()] == first
    assert len(list(cache.iterdir())) == 1
    state = torch.random.get_rng_state()
    again = [m.value for m in measure(data, x, labels, tmp_path, 0)]  # trained anew
    assert again == pytest.approx(first, rel=1e-3)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 12), (4, 32, 32)])
def test_any_shape_without_labels(
    shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlabelled data: the features learn rotations, and nothing is said of classes."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, shape[1])[:, None]  # tells up from down
    pixels = (ramp + rng.integers(0, 56, (80, *shape))).astype(np.uint8)
    data = Data(Split(pixels[:60], None), Split(pixels[60:], None), None)
    train = module._train

    def briefly(network: Any, x: Any, labels: Any, gen: Any) -> None:
        train(network, x, labels, gen, steps=30)

    monkeypatch.setattr(module, "_train", briefly)
    real, _ = data.train.tensor(40)
    found = {m.name: m for m in measure(data, real, None, tmp_path, 0)}
    assert set(found) == {"frechet_distance", "precision", "recall"}
    assert "rotation" in found["frechet_distance"].note
    upside_down = {m.name: m for m in measure(data, real.flip(2), None, tmp_path, 0)}
    name = "frechet_distance"
    assert upside_down[name].value > 3 * found[name].value
    assert measure(data, real[:1], None, tmp_path, 0) == []


def test_many_held_out_images_are_judged_by_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Any
) -> None:
    _, data, cache = digits
    monkeypatch.setattr(module, "_FEW", 100)
    x, labels = data.train.tensor(100)
    own = shutil.copytree(cache, tmp_path / "cache")  # saves training the features again
    found = {m.name: m for m in measure(data, x, labels, own, 0)}
    assert found["label_accuracy"].floor > 0.9
    assert "a small network trained on the 360" in found["label_accuracy"].note


def test_fid_is_offered_only_when_it_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Any
) -> None:
    judge, data, _ = digits
    x, labels = data.train.tensor(100)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = judge(x, labels)
    assert "fid" not in found
    assert "not FID" in found["frechet_distance"].note
    seen = []

    def stand_in(a: Tensor, b: Tensor) -> float:
        seen.append((len(a), len(b)))
        return 1.0

    monkeypatch.setattr(module, "_fid_ready", lambda: True)
    monkeypatch.setattr(module, "_torch_fidelity", stand_in)
    assert judge(x, labels)["fid"].note.startswith("torch-fidelity, Inception-v3; 100 samples")
    assert seen == [(100, 1437), (100, 1437)]
    pixels = module._Rgb(x)[0]
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), torch.uint8)
