"""Samples: the same at any batch size, and what the settings say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gendiff
from gendiff import config, runs
from gendiff.errors import CheckpointError, ConfigError, RunError, SamplingError
from gendiff.generate import Model, Wish, mean_calls, said_calls
from gendiff.testing import ToyModality
from gendiff.train import Trainer


@pytest.fixture(params=["dense", "masked", "ragged"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"toy.kind={request.param}", f"out={tmp_path}"])
    facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    return Trainer(runs.start(modality, resolved, facts)).model()


ADAPTIVE = {"name": "adaptive", "tolerance": 0.01}


@pytest.mark.parametrize("together", [16, 3, 1])
@pytest.mark.parametrize("sampler", ["dpm++2m", "ddpm", {"name": "heun", "churn": 4}, ADAPTIVE])
def test_a_sample_is_the_same_bits_at_any_batch_size_and_in_any_company(
    model: Model, sampler: object, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.run.modality, "together", lambda *_: together)
    reference = model.sample(64, sampler=sampler, batch_size=64, seed=3)
    for size in (1, 7):
        again = model.sample(64, sampler=sampler, batch_size=size, seed=3)
        assert torch.equal(again.x, reference.x)
    some = model.sample(ids=[2, 17, 63], sampler=sampler, batch_size=7, seed=3)
    assert torch.equal(some.x, reference.select([2, 17, 63]).x)
    sizes = {b.space.batch_size for b in model.batches(range(16 * together), model.settings())}
    assert sizes == {together}


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


def test_a_clip_limits_samples_and_costs_no_calls(model: Model) -> None:
    plain = model.sample(8)
    assert torch.equal(model.sample(8, clip="none").x, plain.x)
    wide = model.sample(8, clip={"name": "static", "limit": 1e3})
    torch.testing.assert_close(wide.x, plain.x, rtol=1e-5, atol=1e-5)  # centred once more
    narrow = model.sample(8, clip={"name": "static", "limit": 0.1})
    assert narrow.x.abs().max() < 0.2 < plain.x.abs().max()  # centred after the clip
    assert model.calls(model.settings(steps=5, clip="dynamic")) == 5


@pytest.mark.parametrize("sampler", ["dpm++2m", "heun"])
@pytest.mark.parametrize(
    "guidance", [2.0, {"scale": 2, "interval": [0.2, 3]}, {"scale": 2, "interval": [200, 300]}]
)
def test_the_calls_reported_are_those_made(model: Model, sampler: str, guidance: object) -> None:
    settings = model.settings(steps=6, sampler=sampler, guidance=guidance)
    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1

    handle = model.network.register_forward_hook(count)
    list(model.batches(range(3), settings))  # one block
    handle.remove()
    assert made == model.calls(settings)
    calls = model.calls(model.settings(steps=6, sampler=sampler))
    if guidance == 2.0:
        assert made == 2 * calls
    elif settings.guidance.interval[0] > 80:  # beyond the schedule: no guidance, bit for bit
        assert made == calls
        plain = model.sample(3, steps=6, sampler=sampler).x
        assert torch.equal(plain, model.sample(3, steps=6, sampler=sampler, guidance=guidance).x)
    else:
        assert calls < made < 2 * calls


@pytest.mark.parametrize("guidance", [1.0, 2.0, {"scale": 2, "interval": [0.2, 3]}])
def test_calls_that_are_known_afterwards_are_counted(model: Model, guidance: object) -> None:
    """Each sample's own, whatever its batch waits for; with all that a call costs."""
    settings = model.settings(steps=3, sampler=ADAPTIVE, guidance=guidance)
    assert model.calls(settings) is None
    counts: list[int] = []
    block = model.block
    list(model.batches([*range(1, block), 2 * block], settings, counts=counts))
    schedule, low, high = model.denoiser.schedule, 0.2, 3.0
    expected = []
    for ids, rows in ((range(block), range(1, block)), (range(2 * block, 3 * block), [0])):
        walk = [state for _, state in model.trajectories(ids, settings, 0, Wish())]
        assert [state.number for state in walk] == [1, 2, 3]
        for row in rows:
            times = torch.stack([t[row] for state in walk for t in state.asked])
            noise = (-schedule.log_snr(times[~times.isnan()]) / 2).exp()
            twice = int(((noise > low) & (noise <= high)).sum())
            extra = 0 if guidance == 1.0 else len(noise) if guidance == 2.0 else twice
            expected.append(len(noise) + extra)
    assert counts == expected
    assert len(set(expected)) > 1
    assert mean_calls(None, counts) == round(sum(expected) / block, 1)


def test_calls_in_words() -> None:
    assert mean_calls(9, [1, 2]) == 9
    assert mean_calls(None, []) is None
    assert said_calls(mean_calls(1, [])) == "1 network call"
    assert said_calls(20) == "20 network calls"
    assert said_calls(41.0) == "41 network calls"
    assert said_calls(41.3) == "on average 41.3 network calls"
    assert said_calls(None) == "as many network calls as the tolerance takes"


def test_a_weaker_model_guides(model: Model, tmp_path: Path) -> None:
    other = ["toy.hidden=8", "name=small", f"toy.kind={model.run.section.kind}"]
    resolved = config.resolve(model.run.modality, overrides=[*other, f"out={tmp_path}"])
    small = Trainer(runs.start(model.run.modality, resolved, model.run.facts)).model()
    guided = model.guided_by(small)
    plain = model.sample(4, guidance=1.0).x
    assert torch.equal(guided.sample(4, guidance=1.0).x, plain)  # the guide is not asked
    assert not torch.equal(guided.sample(4, guidance=2.0).x, model.sample(4, guidance=2.0).x)
    assert torch.equal(guided.sample(4, guidance=0.0).x, small.sample(4).x)
    itself = model.guided_by(model).sample(4, guidance=3.0).x
    torch.testing.assert_close(itself, plain, rtol=1e-5, atol=1e-5)
    calls = guided.calls(guided.settings(steps=5, guidance=2.0))
    assert calls == 10
    with pytest.raises(SamplingError, match="its data differ"):
        model.guided_by(replace(small, run=replace(small.run, facts={"classes": 4})))


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
