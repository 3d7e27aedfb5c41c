"""The adaptive ODE: against closed forms, and each sample by itself."""

from __future__ import annotations

import math

import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES, SPACES, Counted, normal, streams

from gendiff.adaptive import solve
from gendiff.errors import SamplingError
from gendiff.schedules import EDM, Cosine, Flow, Parts, VPLinear
from gendiff.spaces import Space
from gendiff.testing import Gaussian, slope

pytestmark = pytest.mark.usefixtures("float64")
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def errors_and_calls(
    name: str, space: Space, tolerances: tuple[float, ...]
) -> tuple[list[float], list[int]]:
    schedule = SCHEDULES[name]
    law = Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), (0.5, 1.5))
    t, s = schedule.inverse(-2 * torch.tensor([20.0, 0.05]).log()).tolist()
    x = schedule.level(t).sigma * space.noise(streams(space), 0)
    errors, counts = [], []
    for tolerance in tolerances:
        counted = Counted(law)
        found = solve(counted, space, schedule, x, t, s, tolerance)
        errors.append((found.x - law.flow(x, t, s)).abs().max().item())
        counts.append(counted.calls)
        assert found.calls.max() == counted.calls
    return errors, counts


@every_space
@pytest.mark.parametrize("name", ["edm", "flow"])
def test_the_flow_of_a_gaussian(name: str, space: Space) -> None:
    """The tolerance is of a step: the way's largest error is that of some such steps."""
    errors, _ = errors_and_calls(name, space, (1e-3, 1e-4))
    assert errors[0] < 20 * 1e-3
    assert errors[1] < min(20 * 1e-4, errors[0] / 3)


def test_order() -> None:
    """The error falls with the third power of the calls, once these are many."""
    errors, counts = errors_and_calls("edm", SPACES["dense"], (1e-7, 1e-8))
    assert abs(slope(errors, counts) - 3) < 0.3, (errors, counts)


@pytest.mark.parametrize("name", ["image", "masked", "ragged"])
def test_a_sample_does_not_see_its_batch(name: str) -> None:
    """Nor do the others wait: each has its own number of calls."""
    whole, schedule = SPACES[name], EDM(10.0)
    x = 10 * whole.noise(streams(whole), 0)
    scale = whole.expand(torch.tensor([1.0, 5.0, 25.0]))

    def law(scale: torch.Tensor) -> object:
        return lambda x, t: torch.tanh(scale * x)

    found = solve(law(scale), whole, schedule, x, 1.0, 0.01)  # type: ignore[arg-type]
    assert len(set(found.calls.tolist())) > 1
    for i in range(3):
        alone, own = whole.select([i], x)
        _, expected = whole.select([i], found.x)
        _, factor = whole.select([i], scale.expand_as(x))
        single = solve(law(factor), alone, schedule, own, 1.0, 0.01)  # type: ignore[arg-type]
        near(single.x, expected, 1e-12)
        assert single.calls.tolist() == [found.calls[i].item()]


def test_one_trajectory_under_every_schedule() -> None:
    space, ends = SPACES["dense"], []
    for schedule in SCHEDULES.values():
        law = Gaussian(schedule, space, normal(*space.shape, seed=1), 0.3)
        t, s = schedule.inverse(-2 * torch.tensor([20.0, 0.1]).log()).tolist()
        x = 20 * schedule.level(t).alpha * normal(*space.shape)
        ends.append(solve(law, space, schedule, x, t, s).x / schedule.level(s).alpha)
    for end in ends[1:]:
        near(end, ends[0], 1e-9)


def test_refusals() -> None:
    space = SPACES["dense"]
    x, law = normal(*space.shape), lambda x, t: torch.sin(9 * x)
    for schedule, t, s, options, match in (
        (Flow(), 1.0, 0.1, {}, "no signal"),
        (VPLinear(), 0.5, 0.5, {}, "t > s"),
        (VPLinear(), 0.5, 0.0, {}, "t > s"),
        (VPLinear(), 0.5, 0.1, {"tolerance": math.nan}, "positive tolerance"),
        (VPLinear(), 0.9, 0.1, {"tolerance": 1e-9, "max_steps": 5}, "Raise either"),
        (Parts((VPLinear(), Cosine())), 0.5, 0.1, {}, "parts"),
    ):
        with pytest.raises(SamplingError, match=match):
            solve(law, space, schedule, x, t, s, **options)  # type: ignore[arg-type]
