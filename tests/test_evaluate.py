"""The likelihood of held-out items of a run, against what is known of the toy data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from gendiff import config, runs
from gendiff.evaluate import evaluate, heldout_likelihood, heldout_loss, show
from gendiff.generate import Model
from gendiff.spaces import Cond, Space
from gendiff.testing import ExactNetwork, Gaussian, ToyModality
from gendiff.testing.toy import VARIANCE, mean
from gendiff.train import Trainer

ITEMS = 128


class Binned(ToyModality):
    """The toy, said to be discrete."""

    def bin_width(self, config: Any, facts: Mapping[str, Any]) -> float:
        return 0.02


class Exact(nn.Module):
    """The network that knows the law of the toy data."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.diffusion = model.run.config.diffusion

    def forward(self, x: Tensor, noise: Tensor, cond: Cond, space: Space) -> Tensor:
        d = self.diffusion
        law = Gaussian(d.schedule, space, mean(space, cond["label"]), VARIANCE)
        net = ExactNetwork(d.prediction, d.schedule, law, d.data_std)
        return net(x.double(), noise.double(), cond, space)


def trainer(modality: ToyModality, tmp_path: Path, *overrides: str) -> Trainer:
    resolved = config.resolve(modality, overrides=[f"out={tmp_path}", *overrides])
    facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    return Trainer(runs.start(modality, resolved, facts))


def closed_form(model: Model) -> float:
    """The log-density of the items themselves, in nats/dim."""
    run = model.run
    data: Any = run.modality.dataset(run.section, run.facts, "test")
    size = len(data)
    items = [data[i * size // ITEMS, 0] for i in range(ITEMS)]
    batch = run.modality.collate(run.section, run.facts, items)
    assert batch.cond is not None
    space, offset = batch.space, batch.x - mean(batch.space, batch.cond["label"])
    square = space.sum(offset.square()) / space.dof() / VARIANCE
    return -(square.mean().item() + math.log(2 * math.pi * VARIANCE)) / 2


def exact_model(model: Model) -> Model:
    return Model(model.run, Exact(model), model.device)


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_a_perfect_network_has_the_data_s_own_density(kind: str, tmp_path: Path) -> None:
    model = trainer(ToyModality(), tmp_path, f"toy.kind={kind}", "toy.items=300").model()
    found = heldout_likelihood(exact_model(model), ITEMS, 24, 0)
    assert found["items"] == ITEMS
    # the smoothing, the mean that the prior lacks, Runge-Kutta's error and float32's
    assert found["nats_per_dim"] == pytest.approx(closed_form(model), abs=1e-3)
    assert found["bits_per_dim"] is None


def test_discrete_data_are_told_in_bits(tmp_path: Path) -> None:
    """Narrow bins: the probability is the density times the width."""
    model = trainer(Binned(), tmp_path, "toy.items=300").model()
    found = heldout_likelihood(exact_model(model), ITEMS, 24, 0)
    expected = -(closed_form(model) + math.log(0.02)) / math.log(2)
    assert found["bits_per_dim"] == pytest.approx(expected, abs=0.02)


def test_a_trained_network_is_near_and_a_broken_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer(
        ToyModality(), tmp_path, "toy.items=4096", "train.batch_size=64", "train.steps=300",
        "train.lr=2e-2", "train.lr_decay=cosine", "train.ema_half_life_steps=20",
    )  # fmt: skip
    untrained = heldout_likelihood(run.model(), ITEMS, 16, 0)
    for _ in run.steps():
        pass
    model = run.model()
    result = evaluate(model, model.settings(), 8, 0, tmp_path, ITEMS, 16)
    found, exact = result["heldout_likelihood"], closed_form(model)
    assert exact - 0.2 < found["nats_per_dim"] < exact  # what is lost is a divergence
    assert untrained["nats_per_dim"] < exact - 0.5
    assert json.loads((model.run.folder / "evaluation.json").read_text()) == result
    show(result)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{found['nats_per_dim']:.4f} ± {found['standard_error']:.4f} nats/dim" in printed
    assert "density of the state" in printed
    assert "200 resamples" in printed
    assert "verdict: none of fewer than 20 samples" in printed
    names = [m["name"] for m in result["measures"]]
    assert names[0] == "frechet_distance"  # the headline
    assert {"mean_square_offset", "coverage", "training_copies"} <= set(names)


def test_verdicts_are_written_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trainer(ToyModality(), tmp_path, "toy.items=200").model()
    bad = evaluate(model, model.settings(), 40, 0, tmp_path)
    assert bad["verdicts"][0]["name"] == "untrained"
    show(bad)
    assert "verdict: untrained: the samples are not like the data: density" in " ".join(
        capsys.readouterr().out.split()
    )
    good = evaluate(exact_model(model), model.settings(steps=20), 40, 0, tmp_path)
    assert good["verdicts"] == []
    show(good)
    printed = capsys.readouterr().out
    assert "verdict: neither untrained, nor collapsed, nor memorised" in printed
    assert "40 samples against 200 held-out items" in " ".join(printed.split())


def test_the_seed_names_the_probes(tmp_path: Path) -> None:
    model = trainer(ToyModality(), tmp_path, "toy.kind=ragged").model()
    found = [heldout_likelihood(model, 8, 2, seed)["nats_per_dim"] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_a_modality_s_own_distance_is_trained_and_told(kind: str, tmp_path: Path) -> None:
    """Of Gaussian data: sqrt(2 / pi) of the posterior's deviation, which the network knows."""
    options = [f"toy.kind={kind}", "toy.centred=0", "toy.items=2048", "diffusion.weight=x"]
    losses = []
    for weight in (0, 3):
        more = ["toy.distance=true", f"diffusion.distance_weight={weight}"]
        model = trainer(ToyModality(), tmp_path / str(weight), *options, *more).model()
        losses.append(heldout_loss(exact_model(model)))
    for level in (-4, 0, 4):
        deviation = (VARIANCE / (1 + VARIANCE * math.exp(level))) ** 0.5
        square, both = (found[str(level)] for found in losses)
        assert square == pytest.approx(deviation**2, rel=0.05)  # 2048 items of some numbers
        assert both - square == pytest.approx(3 * (2 / math.pi) ** 0.5 * deviation, rel=0.03)


def test_a_distance_changes_the_steps(tmp_path: Path) -> None:
    weights = []
    for weight in (0, 3):
        options = ["toy.distance=true", f"diffusion.distance_weight={weight}"]
        steps = trainer(ToyModality(), tmp_path / str(weight), *options)
        steps.advance([next(steps.batches())])
        weights.append(steps.network.last.weight.detach().clone())
    assert not weights[0].equal(weights[1])
