"""Samples: the same at any batch size, and what the settings say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gendiff
from gendiff import config, runs
from gendiff.errors import CheckpointError, ConfigError, RunError
from gendiff.generate import BLOCK, Model
from gendiff.testing import ToyModality
from gendiff.train import Trainer


@pytest.fixture(params=["dense", "masked", "ragged"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"toy.kind={request.param}", f"out={tmp_path}"])
    facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    return Trainer(runs.start(modality, resolved, facts)).model()


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", {"name": "heun", "churn": 4}])
def test_a_sample_is_the_same_bits_at_any_batch_size_and_in_any_company(
    model: Model, sampler: object
) -> None:
    reference = model.sample(64, sampler=sampler, batch_size=64, seed=3)
    for size in (1, 7):
        again = model.sample(64, sampler=sampler, batch_size=size, seed=3)
        assert torch.equal(again.x, reference.x)
    some = model.sample(ids=[2, BLOCK + 1, 63], sampler=sampler, batch_size=7, seed=3)
    assert torch.equal(some.x, reference.select([2, BLOCK + 1, 63]).x)


def test_another_seed_gives_other_samples(model: Model) -> None:
    a, b = model.sample(4, seed=0), model.sample(4, seed=1)
    assert a.x.shape != b.x.shape or not torch.equal(a.x, b.x)


def test_guidance_of_one_is_no_guidance_and_costs_no_calls(model: Model) -> None:
    plain, guided = model.sample(8), model.sample(8, guidance=1.0)
    assert torch.equal(plain.x, guided.x)
    assert not torch.equal(plain.x, model.sample(8, guidance=3.0).x)
    assert model.calls(model.settings(steps=5)) == 5
    assert model.calls(model.settings(steps=5, guidance=3.0)) == 10
    assert model.calls(model.settings(steps=5, sampler="heun")) == 9


def test_what_is_asked_for_reaches_the_network(model: Model) -> None:
    batch = model.sample(5, cond={"label": 2})
    assert batch.cond is not None
    assert batch.cond["label"].tolist() == [2] * 5


def test_wrong_settings_are_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="no sampler 'hein'. Did you mean 'heun'"):
        model.sample(1, sampler="hein")
    with pytest.raises(ConfigError, match=r"sample\.steps"):
        model.sample(1, steps=0)
    with pytest.raises(ConfigError, match="at least 1 sample"):
        model.sample(0)


def test_load_says_what_a_folder_lacks(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run"):
        gendiff.load(tmp_path)
    modality = ToyModality()
    gendiff.register(modality)
    resolved = config.resolve(modality, overrides=[f"out={tmp_path}"])
    run = runs.start(modality, resolved, {"classes": 3})
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        gendiff.load(run.folder)


def test_cache_folder_moves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert runs.cache_folder() != tmp_path
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path))
    assert runs.cache_folder() == tmp_path
    monkeypatch.delenv("GENDIFF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert runs.cache_folder() == tmp_path / "gendiff"
