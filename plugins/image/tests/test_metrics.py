"""The metrics: closed forms, hand-made sets, and that they tell good samples from bad ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gendiff import evaluate, runs
from gendiff.config import resolve
from gendiff.generate import Model
from gendiff.metrics import Reals, verdicts
from gendiff.modality import Measure
from gendiff.runs import Run
from gendiff.spaces import Batch, Cond, Dense, Space
from gendiff.testing import ExactNetwork, Mixture
from gendiff.train import Trainer
from gendiff_image import ImageConfig, ImageModality
from gendiff_image import metrics as module
from gendiff_image.data import reference
from gendiff_image.metrics import features, measure
from gendiff_image.sets import Data, Split

image = ImageModality()
Figures = dict[str, Measure]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config = ImageConfig()
    facts = image.prepare(config).facts
    data = reference(config, facts)
    cache = tmp_path_factory.mktemp("cache")

    run = Run(cache, image, resolve(image), facts)
    real = evaluate.reals(run, cache, 0)

    def judge(x: Tensor, labels: Tensor | None = None) -> Figures:
        cond = None if labels is None else Cond({"label": labels})
        batch = Batch(x, Dense(tuple(x.shape)), cond)
        found = image.metrics(config, facts, batch, cache, 0)
        made = image.features(config, facts, [batch], cache, 0)
        return {m.name: m for m in found + real.measures(made.values)}

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
    assert "700 samples against 360 held-out items" in distance.note
    assert all("FID" not in m.name.upper() for m in found.values())


def said(found: Figures, count: int) -> list[str]:
    return [verdict.name for verdict in verdicts(list(found.values()), count)]


def test_held_out_digits_are_the_reference(digits: Any) -> None:
    judge, data, _ = digits
    found = judge(data.test.tensor(360)[0])
    assert found["frechet_distance"].value == pytest.approx(0, abs=1e-3)  # 8-bit rounding
    assert found["precision"].value == found["recall"].value == 1
    assert "label_accuracy" not in found  # nothing was asked for
    assert found["training_copies"].value == pytest.approx(0.05, abs=0.005)
    assert said(found, 360) == []


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
    assert "untrained" in said(noise, 700)
    assert "collapsed" in said(collapsed, 700)
    assert "collapsed" in said(one_class, 70)
    assert said(rough, 700) == []  # worse, but of the kind
    assert said(floor, 700) == ["memorised"]  # these are training images
    swapped = judge(x, (labels + 1) % 10)
    assert swapped["label_accuracy"].value < 0.05
    assert swapped["frechet_distance"].value == floor["frechet_distance"].value


class Knowing(torch.nn.Module):
    """The network that has learnt some images by heart: the exact denoiser of these points."""

    def __init__(self, model: Model, images: Tensor) -> None:
        super().__init__()
        self.diffusion = model.run.config.diffusion
        self.images = images.double().flatten(1)

    def forward(self, x: Tensor, noise: Tensor, cond: Any, space: Space) -> Tensor:
        d, count = self.diffusion, len(self.images)
        points = Mixture(d.schedule, self.images, torch.zeros(count), torch.ones(count) / count)

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return points(x_t.flatten(1), t).reshape(x_t.shape)

        net = ExactNetwork(d.prediction, d.schedule, denoise, d.data_std)
        return net(x.double(), noise.double(), cond, space)


@pytest.mark.parametrize(
    ("split", "count", "verdict"),
    [
        (None, 0, ["untrained"]),
        ("train", 1437, ["memorised"]),
        ("test", 1, ["collapsed"]),
        ("test", 360, []),  # held-out data itself is at the floor
    ],
)
def test_evaluate_calls_bad_models_out(
    digits: Any, tmp_path: Path, split: str | None, count: int, verdict: list[str]
) -> None:
    _, data, cache = digits
    resolved = resolve(
        image, overrides=[f"out={tmp_path}", "image.channels=16", "image.head_channels=16"]
    )
    facts = image.prepare(resolved.image).facts  # type: ignore[attr-defined]
    model = Trainer(runs.start(image, resolved, facts)).model()
    if split is not None:
        known = Knowing(model, getattr(data, split).tensor(count)[0])
        model = replace(model, network=known)
    result = evaluate.evaluate(model, model.settings(steps=10), 200, 0, cache)
    assert [found["name"] for found in result["verdicts"]] == verdict
    if count == 360:
        assert all(
            m["floor"] is None or abs(m["value"] - m["floor"]) <= 0.35 * abs(m["floor"]) + 0.1
            for m in result["measures"]
            if m["name"] in ("precision", "recall", "density", "coverage", "pairwise_distance")
        ), result["measures"]


def test_networks_are_cached_and_deterministic(digits: Any, tmp_path: Path) -> None:
    _, data, cache = digits
    x, _ = data.train.tensor(200)
    parts = [Batch(part, Dense(tuple(part.shape))) for part in (x, x[:70], x[70:])]
    assert len(list(cache.glob("features-*.pt"))) <= 1
    first = features(data, parts[:1], cache, 0).values
    assert torch.allclose(features(data, parts[1:], cache, 0).values, first, atol=1e-4)
    assert len(list(cache.iterdir())) == 1
    state = torch.random.get_rng_state()
    again = features(data, parts[:1], tmp_path, 0).values  # trained anew
    assert torch.allclose(again, first, atol=1e-3)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 20, 12), (4, 32, 32)])
def test_any_shape_without_labels(
    shape: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlabelled data: the features learn rotations, and nothing is said of classes."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, shape[1])[:, None]  # tells up from down
    pixels = (ramp + rng.integers(0, 56, (80, *shape))).astype(np.uint8)
    data = Data(Split(pixels[:60], None), Split(pixels[60:], None), None, "")
    train = module._train

    def briefly(network: Any, x: Any, labels: Any, gen: Any) -> None:
        train(network, x, labels, gen, steps=30)

    monkeypatch.setattr(module, "_train", briefly)
    real, _ = data.train.tensor(40)
    assert measure(data, real, None, tmp_path, 0) == []  # nothing but what the engine measures

    def seen(x: Tensor) -> Tensor:
        found = features(data, [Batch(x, Dense(tuple(x.shape)))], tmp_path, 0)
        assert "rotation" in found.about
        return found.values

    every = Reals(seen(data.test.tensor(20)[0]), seen(data.train.tensor(60)[0]), "", 0)
    good, upside_down = (
        {m.name: m for m in every.measures(seen(x))} for x in (real, real.flip(2))
    )
    assert upside_down["frechet_distance"].value > 3 * good["frechet_distance"].value
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
    judge, data, cache = digits
    x, labels = data.train.tensor(100)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = judge(x, labels)
    assert "fid" not in found
    told = features(data, [Batch(x, Dense(tuple(x.shape)))], cache, 0).about
    assert "not FID" in told
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
