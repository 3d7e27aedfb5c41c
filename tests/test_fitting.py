"""A fitted grid: better than every standard one, on noise that the fit has not seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exactness import near
from oracle_tools import SPACES, normal, streams

from gendiff import config, runs
from gendiff.errors import SamplingError
from gendiff.fitting import distance, fit, fit_model, standard_grids
from gendiff.grids import GRIDS, FlowTime, UniformTime
from gendiff.noise import Streams
from gendiff.samplers import DDIM, DPMSolverPP2M, sample
from gendiff.schedules import EDM, Flow, Schedule, VPLinear
from gendiff.spaces import Batch, Dense
from gendiff.testing import Gaussian, Mixture, ToyModality
from gendiff.train import Trainer

pytestmark = pytest.mark.usefixtures("float64")
SPACE = Dense((128, 4))


class Samples:
    """Errors of grids on a mixture, from the noise of one seed, against 150 steps."""

    def __init__(self, schedule: Schedule, seed: int) -> None:
        means, spread = 0.7 * normal(6, 4, seed=3), torch.linspace(0.1, 0.3, 6)
        self.schedule = schedule
        self.law = Mixture(schedule, means, spread, torch.full((6,), 1 / 6))
        self.noise = Streams(seed, tuple(range(128)), dtype=torch.float64)
        self.truth = self.draw(FlowTime().times(schedule, 150))

    def draw(self, times: list[float]) -> torch.Tensor:
        return sample(self.law, SPACE, self.schedule, DPMSolverPP2M(), times, self.noise)

    def error(self, times: list[float]) -> float:
        return distance(Batch(self.draw(times), SPACE), self.truth)


@pytest.mark.parametrize(
    ("schedule", "steps"), [(EDM(), 6), (EDM(), 10), (VPLinear(), 8), (Flow(), 10)]
)
def test_beats_every_standard_grid_on_other_noise(schedule: Schedule, steps: int) -> None:
    seen, unseen = Samples(schedule, 1), Samples(schedule, 2)
    fitted = fit(seen.error, schedule, steps, 100)
    grids = standard_grids(schedule, steps)
    assert set(grids) >= {"time", "quadratic", "karras", "log_snr", "flow", "log_normal"}
    near(fitted.standard_error, min(seen.error(times) for times in grids.values()), 0)
    near(fitted.error, seen.error(fitted.times), 0)
    assert len(fitted.times) == steps + 1
    best = min(unseen.error(times) for times in grids.values())
    assert unseen.error(fitted.times) < 0.9 * best


def test_never_worse_than_the_best_it_began_with() -> None:
    seen = Samples(EDM(), 1)
    few = fit(seen.error, EDM(), 5, evaluations=0)
    assert few.times == standard_grids(EDM(), 5)[few.standard]
    assert few.error == few.standard_error


def test_distance_is_each_sample_s_own() -> None:
    """Over live elements: neither padding nor a sample's size counts."""
    for space in SPACES.values():
        x = space.noise(streams(space), 0)
        far = Batch(x + space.project(torch.ones_like(x)), space)
        each = [distance(far.select([i]), Batch(x, space).select([i]).x) for i in range(3)]
        near(distance(far, x), sum(each) / 3, 1e-14)


def test_of_a_model(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)  # the fixture puts the default back
    modality = ToyModality()
    overrides = ["toy.kind=masked", f"out={tmp_path}", "sample.sampler=ddim"]
    resolved = config.resolve(modality, overrides=overrides)
    model = Trainer(runs.start(modality, resolved, {"classes": 3})).model()
    settings = model.settings(steps=4, guidance=2.0)
    fitted = fit_model(model, settings, 16, 5, evaluations=25)
    assert fitted.error <= fitted.standard_error
    again = model.sample(16, steps=4, guidance=2.0, seed=5,
                         grid={"name": "explicit", "at": fitted.times})  # fmt: skip
    truth = model.sample(16, steps=128, guidance=2.0, seed=5, grid="flow", sampler="dpm++2m")
    near(distance(again, truth.x), fitted.error, 0)
    with pytest.raises(SamplingError, match="adds no noise"):
        fit_model(model, model.settings(sampler="ddpm"), 16, 5)


def test_grids_that_do_not_fit_the_schedule_are_left_out() -> None:
    grids = standard_grids(EDM(0.001), 4)  # below karras's smallest noise
    assert "time" in grids
    assert "karras" not in grids
    assert "explicit" not in grids
    assert set(standard_grids(VPLinear(), 4)) == set(GRIDS) - {"explicit"}


def test_a_gaussian_s_error_is_known() -> None:
    """One step of DDIM ends at the mean; the truth is sqrt(v / (v + sigma^2)) of the way out."""
    space, schedule = Dense((5, 3)), EDM(10.0)
    law = Gaussian(schedule, space, torch.zeros(5, 3), 0.25)
    noise = streams(space)
    x = 10 * space.noise(noise, 0)
    exact = law.flow(x, 1.0, 0.0)

    def error(times: list[float]) -> float:
        found = sample(law, space, schedule, DDIM(), times, noise)
        return distance(Batch(found, space), exact)

    gain = 0.25 / (0.25 + 100) - (0.25 / (0.25 + 100)) ** 0.5
    near(error([1.0, 0.0]), x.square().mean(1).sqrt().mean() * abs(gain), 1e-12)
    assert fit(error, schedule, 3, 60).error < error(UniformTime().times(schedule, 3))
