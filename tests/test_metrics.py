"""The figures of samples beside data: closed forms, hand-made sets, and verdicts on the toy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gendiff import config, runs
from gendiff.evaluate import Judge, reals
from gendiff.metrics import (
    Reals,
    density_coverage,
    frechet_distance,
    nearest_distance,
    plain_features,
    precision_recall,
    verdicts,
)
from gendiff.modality import Measure
from gendiff.noise import Streams, generator
from gendiff.runs import Run
from gendiff.spaces import Batch, Dense, Masked, Ragged, join
from gendiff.testing import ToyModality
from gendiff.train import Trainer


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


def test_an_outlier_among_real_points_does_not_fool_density() -> None:
    """The case for density and coverage (Naeem et al., 2020, section 3.2 and figure 2)."""
    gen = torch.Generator().manual_seed(0)
    real = torch.randn(200, 2, generator=gen)
    real[0] = 50.0  # its ball reaches over all data and far to the other side
    fake = 10 + 3 * torch.randn(200, 2, generator=gen)
    precision, _ = precision_recall(real, fake)
    density, coverage = density_coverage(real, fake)
    assert precision > 0.9
    assert density < 0.25  # only the outlier's ball holds them: 1 / k
    assert coverage < 0.05


def test_density_and_coverage_of_the_same_law_are_one_and_nearly_one() -> None:
    """Density 1 in expectation, coverage 1 - (N - 1)…(N - k) / ((2N - 1)…(2N - k)), eq. 6 to 9."""
    gen = torch.Generator().manual_seed(1)
    n, k = 1000, 5
    density, coverage = density_coverage(*torch.randn(2, n, 4, generator=gen), k=k)
    wanted = 1.0
    for i in range(1, k + 1):
        wanted *= (n - i) / (2 * n - i)
    assert density == pytest.approx(1, abs=0.05)
    assert coverage == pytest.approx(1 - wanted, abs=0.02)


def gaussian(count: int, *names: int | str) -> Tensor:
    return torch.randn(count, 6, generator=generator(*names))


def test_standard_errors_are_the_spread_over_sets_of_samples() -> None:
    """Sets of the law that 200 samples are from: the errors of one set foretell their spread.

    The Fréchet distance, whose least value is near, is resampled upwards and too widely.
    """
    real = Reals(gaussian(300, "held-out"), gaussian(600, "train"), "", 0)
    floors = real.floors(200)
    sets = [1.2 * gaussian(200, "fake", i) + 0.1 for i in range(25)]
    found = {m.name: m for m in real.measures(sets[0], floors)}
    every: dict[str, list[float]] = {}
    for fake in sets:
        values = real._figures(fake, real._parts(fake))
        for name, value in values.items():
            every.setdefault(name, []).append(value)
    for name, values_ in every.items():
        spread = float(torch.tensor(values_).std())
        error = found[name].error
        assert error is not None
        assert 0.5 < error / spread < 2, name


def test_figures_are_a_function_of_data_and_seed() -> None:
    real = Reals(gaussian(100, 0), gaussian(100, 1), "", 3)
    fake = gaussian(50, 2)
    first = real.measures(fake)
    assert first == real.measures(fake)
    again = {m.name: m for m in replace(real, seed=4).measures(fake)}
    for m in first:
        assert again[m.name].value == m.value  # the seed names the floors and errors
    assert any(again[m.name].error != m.error for m in first)
    assert real.measures(fake[:1]) == []
    assert Reals(gaussian(1, 0), gaussian(9, 1), "", 0).measures(fake) == []


def test_many_points_are_thinned_and_diverged_ones_count_as_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Reals(gaussian(100, 0), gaussian(100, 1), "f", 0)
    fake = gaussian(90, 2)
    fake[::2] = torch.nan
    fake[1] = torch.inf
    whole = {m.name: m for m in real.measures(fake)}
    assert all(np.isfinite(m.value) for m in whole.values())
    monkeypatch.setattr("gendiff.metrics.MANIFOLD", 50)
    thinned = {m.name: m for m in real.measures(gaussian(90, 2))}
    assert "manifolds: 50 of each at most" in thinned["density"].note
    assert thinned["density"].value == pytest.approx(1, abs=0.4)


# --- features ------------------------------------------------------------------------------------


def test_plain_features_see_no_padding_and_no_neighbours() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 7, generator=gen)
    alone = plain_features(Batch(x, Masked(torch.tensor([7]), 5, 7)))
    more = torch.full((2, 5, 12), 9.0)
    more[0, :, :7] = x
    wider = plain_features(Batch(more, Masked(torch.tensor([7, 12]), 5, 12)))
    assert torch.allclose(wider[:1], alone, atol=1e-5)
    assert torch.allclose(alone[0, :10:2], x[0].mean(1), atol=1e-5)
    assert torch.allclose(alone[0, 1:10:2], x[0].std(1, correction=0), atol=1e-5)
    rows = torch.randn(9, 4, generator=gen)
    sizes = torch.tensor([2, 7])
    both = plain_features(Batch(rows, Ragged(sizes, 4, 0)))
    one = plain_features(Batch(rows[2:], Ragged(sizes[1:], 4, 0)))
    assert torch.allclose(both[1:], one, atol=1e-6)


def test_wide_states_are_projected_and_keep_their_distances() -> None:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, 16, 16, generator=gen)
    found = plain_features(Batch(x, Dense(tuple(x.shape))))
    assert found.shape == (40, 64)
    true = torch.pdist(x.flatten(1))
    assert (torch.pdist(found) / true).sub(1).abs().mean() < 0.15  # 1 / sqrt(2 * 64) = 0.09


# --- verdicts ------------------------------------------------------------------------------------


def toy(tmp_path: Path, kind: str) -> tuple[Trainer, Run]:
    overrides = [f"out={tmp_path}", f"toy.kind={kind}", "toy.items=300"]
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=overrides)
    facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    run = runs.start(modality, resolved, facts)
    return Trainer(run), run


def items(run: Run, split: str, numbers: Any) -> Batch:
    data: Any = run.modality.dataset(run.section, run.facts, split)
    return run.modality.collate(run.section, run.facts, [data[i, 0] for i in numbers])


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_bad_models_are_called_out_and_real_data_is_not(kind: str, tmp_path: Path) -> None:
    trainer, run = toy(tmp_path, kind)

    real = reals(run, tmp_path, 0)
    floors = real.floors(150)

    def found(samples: Batch) -> dict[str, str]:
        measures = real.measures(plain_features(samples), floors)
        return {v.name: v.text for v in verdicts(measures, samples.space.batch_size)}

    assert found(items(run, "test", range(150))) == {}
    untrained = trainer.model().sample(150)
    assert "untrained" in found(untrained)
    copies = found(items(run, "train", range(150)))
    assert list(copies) == ["memorised"]
    assert "training_copies 1 is above 0.25" in copies["memorised"]
    # a held-out item again and again, in one mode, and half copies of training items
    assert list(found(items(run, "test", [4] * 150))) == ["collapsed"]
    assert list(found(items(run, "test", range(1, 300, 3)))) == ["collapsed"]
    half = [items(run, "train", range(60)), items(run, "test", range(60, 120))]
    assert list(found(join(half))) == ["memorised"]
    assert found(items(run, "train", range(19))) == {}  # too few to say


def test_noise_over_the_data_worsens_every_figure_of_fidelity(tmp_path: Path) -> None:
    _, run = toy(tmp_path, "dense")
    real = reals(run, tmp_path, 0)
    assert nearest_distance(real.held_out, real.held_out).max() == 0
    batch = items(run, "test", range(200))
    judge = Judge(run, tmp_path, 0)
    before = {m.name: m.value for m in judge.measures(batch)}
    noise = batch.space.noise(Streams(0, tuple(range(200))), 0)
    worse = Batch(batch.x + 0.5 * noise, batch.space, batch.cond)
    after = {m.name: m.value for m in judge.measures(worse)}
    for name in ("precision", "density", "coverage"):
        assert after[name] < before[name] - 0.1
    assert after["frechet_distance"] > before["frechet_distance"] + 0.1
    assert after["training_copies"] < before["training_copies"]


def test_who_wants_one_figure_does_not_wait_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = toy(tmp_path, "dense")

    def lazily(*_: object) -> Iterator[Measure]:
        yield Measure("first", 1.0, "higher", None, "")
        yield Measure("second", 2.0, "higher", None, "")
        raise AssertionError("this takes long")

    monkeypatch.setattr(run.modality, "metrics", lazily)
    judge, batch = Judge(run, tmp_path, 0), items(run, "test", range(30))
    names = [m.name for m in judge.measures(batch, {"second", "frechet_distance"})]
    assert names[0] == "frechet_distance"
    assert {"first", "second", "precision"} < set(names)
    assert "first" not in {m.name for m in judge.measures(batch, {"frechet_distance"})}
    with pytest.raises(AssertionError, match="takes long"):
        judge.measures(batch, {"third"})
