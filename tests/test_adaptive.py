"""The adaptive sampler: against closed forms, and each sample by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES, SPACES, Counted, normal, streams
from torch import Tensor

from gendiff.adaptive import Adaptive
from gendiff.denoiser import PREDICTIONS, Denoiser
from gendiff.editing import Kept
from gendiff.errors import SamplingError
from gendiff.grids import FlowTime, UniformTime
from gendiff.noise import Streams
from gendiff.samplers import VAB, adds_noise, make_table, network_calls, sample, start, states
from gendiff.schedules import EDM, Cosine, Flow, Parts, Schedule, VPLinear
from gendiff.spaces import Dense, Space
from gendiff.tables import State
from gendiff.testing import ExactNetwork, Gaussian, Mixture, slope

pytestmark = pytest.mark.usefixtures("float64")
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def calls(walk: list[State]) -> Tensor:
    """How often each sample asked, (B,)."""
    return sum(~t.isnan() for state in walk for t in state.asked)  # type: ignore[return-value]


def walked(
    denoiser: Any, space: Space, schedule: Schedule, tolerance: float, times: list[float]
) -> list[State]:
    noise = streams(space)
    return list(states(denoiser, space, schedule, Adaptive(tolerance), times, noise))


@every_space
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_flow_of_a_gaussian(name: str, space: Space) -> None:
    """Into the data. The tolerance is of a step, the largest error of any element that of some."""
    schedule = SCHEDULES[name]
    law = Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), (0.5, 1.5))
    expected = law.flow(start(space, schedule, 1.0, streams(space)), 1.0, 0.0)
    errors = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        found = walked(law, space, schedule, tolerance, [1.0, 0.0])[-1].x
        errors.append((found - expected).abs().max().item())
        assert errors[-1] < 10 * tolerance
    assert errors[2] < errors[0] / 20


def test_order() -> None:
    """The error falls with the third power of the calls, once these are many."""
    schedule, space = EDM(10.0), SPACES["dense"]
    law = Gaussian(schedule, space, normal(*space.shape, seed=1), (0.5, 1.5))
    expected = law.flow(start(space, schedule, 1.0, streams(space)), 1.0, 0.0)
    errors, counts = [], []
    for tolerance in (1e-9, 1e-11):
        walk = walked(law, space, schedule, tolerance, [1.0, 0.0])
        errors.append((walk[-1].x - expected).square().mean().sqrt().item())
        counts.append(calls(walk).double().mean().item())
    assert abs(slope(errors, counts) - 3) < 0.3, (errors, counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_mixture_to_its_tolerance(name: str, prediction: str) -> None:
    """Data of three modes, by each prediction; a reference of 2000 steps under one schedule."""
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.2], [0.1, -1.1]])
    parts = means, torch.tensor([0.2, 0.3, 0.25]), torch.tensor([0.5, 0.2, 0.3])
    space, schedule = Dense((32, 2)), SCHEDULES[name]
    first = 5.0  # sigma / alpha, which every schedule reaches
    t = schedule.inverse(torch.tensor(first).log() * -2).item()
    level, flow = schedule.level(t), Flow()
    y = first * normal(32, 2, seed=3)
    times = FlowTime().times(flow, 2000, first / (1 + first))
    noise = Streams(0, tuple(range(32)))
    x = flow.level(times[0]).alpha * y
    expected = sample(Mixture(flow, *parts), space, flow, VAB(3), times, noise, x)
    net = ExactNetwork(prediction, schedule, Mixture(schedule, *parts), 1.0)
    denoiser = Denoiser(net, schedule, prediction).bind(space)
    for tolerance in (1e-2, 1e-3, 1e-4):
        found = sample(
            denoiser, space, schedule, Adaptive(tolerance), [t, 0.0], noise, level.alpha * y
        )
        error = space.mean((found - expected).square()).sqrt()
        assert error.square().mean().sqrt() < 2 * tolerance
        assert error.max() < 10 * tolerance


def test_one_trajectory_under_every_schedule() -> None:
    """Of the samples and of the calls: the steps are chosen in a time that they share."""
    space, ends, counts = SPACES["dense"], [], []
    for schedule in SCHEDULES.values():
        law = Gaussian(schedule, space, normal(*space.shape, seed=1), 0.3)
        times = schedule.inverse(-2 * torch.tensor([8.0, 0.1]).log()).tolist()
        x = 8 * schedule.level(times[0]).alpha * normal(*space.shape)
        walk = list(states(law, space, schedule, Adaptive(1e-4), times, streams(space), x))
        ends.append(walk[-1].x / schedule.level(times[-1]).alpha)
        counts.append(calls(walk))
    for end, count in zip(ends, counts, strict=True):
        near(end, ends[0], 1e-9)
        assert torch.equal(count, counts[0])


@pytest.mark.parametrize("name", ["image", "masked", "ragged"])
def test_a_sample_does_not_see_its_batch(name: str) -> None:
    """Nor do the others wait: each has its own number of calls."""
    whole, schedule, times = SPACES[name], EDM(10.0), [1.0, 0.5, 0.1, 0.0]
    scale = whole.expand(torch.tensor([1.0, 5.0, 25.0]))

    def law(scale: Tensor) -> Any:
        return lambda x, t: torch.tanh(scale * x)

    walk = walked(law(scale), whole, schedule, 1e-3, times)
    assert len(set(calls(walk).tolist())) > 1
    for i in range(3):
        _, factor = whole.select([i], scale.expand_as(walk[-1].x))
        alone, _ = whole.select([i], walk[-1].x)
        counted = Counted(law(factor))
        source = Streams(0, (i,), dtype=torch.float64)
        own = list(states(counted, alone, schedule, Adaptive(1e-3), times, source))
        for mine, ours in zip(own, walk, strict=True):
            near(mine.x, whole.select([i], ours.x)[1], 1e-12)
            near(mine.x_hat, whole.select([i], ours.x_hat)[1], 1e-11)
        assert calls(own).tolist() == [counted.calls] == [calls(walk)[i].item()]


@every_space
def test_the_grid_says_where_states_are_told_and_bounds_no_step(space: Space) -> None:
    schedule = Cosine()
    law = Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), (0.5, 1.5))
    times = UniformTime().times(schedule, 40)
    walk = walked(law, space, schedule, 1e-4, times)
    (alone,) = walked(law, space, schedule, 1e-4, [times[0], times[-1]])
    assert torch.equal(walk[-1].x, alone.x)
    assert torch.equal(calls(walk), calls([alone]))
    assert [(state.number, state.t) for state in walk] == list(enumerate(times))[1:]
    x = start(space, schedule, 1.0, streams(space))
    for state in walk:
        exact = law.flow(x, 1.0, state.t)
        near(state.x, exact, 5e-3)
        x_hat = exact if state.t == 0 else law(exact, state.t)
        near(state.x_hat, x_hat, 2e-2)
    assert len({float(state.x.sum()) for state in walk}) == 40


@every_space
def test_what_is_kept_stays(space: Space) -> None:
    """Inpainting: every sample's estimates stand at its own time."""
    schedule = VPLinear()
    law = Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), (0.5, 1.5))
    known = space.project(normal(*space.shape, seed=5))
    mask = torch.zeros(space.shape, dtype=torch.bool)
    mask[:, :3] = True
    kept = Kept(law, space, schedule, known, mask)
    tight, fine = (walked(kept, space, schedule, e, [1.0, 0.0])[-1].x for e in (1e-3, 1e-6))
    near(space.part(tight, mask), space.part(known, mask), 1e-2)
    near(tight, fine, 1e-2)
    near(space.part(fine, mask), space.part(known, mask), 1e-5)


def test_what_is_known_beforehand() -> None:
    assert make_table(Adaptive(), VPLinear(), [1.0, 0.0]) is None
    assert network_calls(Adaptive(), VPLinear(), [1.0, 0.0]) is None
    assert not adds_noise(Adaptive(), VPLinear(), [1.0, 0.0])
    with pytest.raises(SamplingError, match="no common time"):
        network_calls(Adaptive(), Parts((VPLinear(), Cosine())), [1.0, 0.0])


def test_numbers_that_are_not_finite_harm_one_sample_alone() -> None:
    space, schedule = SPACES["dense"], VPLinear()
    wrong = space.expand(torch.tensor([0.0, torch.nan, 0.0]))
    found = walked(lambda x, t: torch.tanh(x) + wrong, space, schedule, 1e-3, [1.0, 0.0])[-1].x
    right = walked(lambda x, t: torch.tanh(x), space, schedule, 1e-3, [1.0, 0.0])[-1].x
    assert found[1].isnan().all()
    assert torch.equal(found[::2], right[::2])


def test_refusals() -> None:
    space = SPACES["dense"]
    for schedule, sampler, match in (
        (VPLinear(), Adaptive(1e-9, 5), "5 steps did not reach"),
        (Parts((VPLinear(), Cosine())), Adaptive(), "no common time"),
    ):
        with pytest.raises(SamplingError, match=match):
            sample(
                lambda x, t: torch.sin(9 * x), space, schedule, sampler, [0.9, 0.1], streams(space)
            )
    for options in ({"tolerance": 0.0}, {"tolerance": float("nan")}, {"max_steps": 0}):
        with pytest.raises(ValueError, match="positive tolerance"):
            Adaptive(**options)  # type: ignore[arg-type]
