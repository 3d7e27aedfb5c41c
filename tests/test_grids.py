from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES

from gendiff.errors import SamplingError
from gendiff.grids import (
    GRIDS,
    Explicit,
    Karras,
    Leading,
    Linspace,
    LogNormalQuantiles,
    LogSNR,
    Quadratic,
    UniformTime,
    check_times,
)
from gendiff.schedules import EDM, Cosine, Flow, Schedule, VPLinear

every_schedule = pytest.mark.parametrize(
    "schedule",
    [*SCHEDULES.values(), Cosine(min_log_snr=-math.inf)],
    ids=[*SCHEDULES, "cosine_to_noise"],
)


@every_schedule
@pytest.mark.parametrize("name", sorted(set(GRIDS) - {"explicit"}))
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_falls_between_exact_ends(name: str, schedule: Schedule, steps: int, start: float) -> None:
    times = GRIDS[name]().times(schedule, steps, start)
    assert len(times) == steps + 1
    assert times[0] == start or (name, start) == ("leading", 1.0)
    assert times[-1] == 0.0
    assert all(t > s for t, s in zip(times, times[1:], strict=False))
    assert all(isinstance(t, float) for t in times)


def test_karras_formula() -> None:
    """Karras et al., 2022, eq. 5."""
    steps, rho = 18, 7
    i = torch.arange(steps, dtype=torch.float64)
    first, last = 80 ** (1 / rho), 0.002 ** (1 / rho)
    sigma = (first + i / (steps - 1) * (last - first)) ** rho
    times = torch.tensor(Karras().times(EDM(80.0), steps), dtype=torch.float64)
    near(80 * times, torch.cat([sigma, torch.zeros(1)]), 1e-12)


@pytest.mark.parametrize("schedule", [VPLinear(), Cosine(), Flow()])
def test_karras_in_other_schedules(schedule: Schedule) -> None:
    """Uniform in (sigma / alpha)^(1 / rho), whatever the schedule; the first is the start's."""
    times = torch.tensor(Karras(rho=3.0).times(schedule, 12, 0.9), dtype=torch.float64)
    alpha, sigma = schedule(times)
    value = (sigma / alpha)[:-1] ** (1 / 3)
    near(value.diff(), value.diff().mean().expand(11), 1e-12)
    near(value[-1] ** 3, 0.002, 1e-12)


def test_log_snr_is_uniform() -> None:
    times = torch.tensor(LogSNR(sigma_min=0.01).times(VPLinear(), 30), dtype=torch.float64)
    log_snr = VPLinear().log_snr(times)[:-1]
    near(log_snr.diff(), log_snr.diff().mean().expand(29), 1e-11)
    near(log_snr[-1], -2 * math.log(0.01), 1e-12)


@pytest.mark.parametrize("schedule", [EDM(5.0), Flow(), VPLinear()])
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_log_normal_places_equal_shares_of_the_density(schedule: Schedule, start: float) -> None:
    mean, std, steps = -1.8, 0.9, 40
    times = torch.tensor(
        LogNormalQuantiles(mean, std).times(schedule, steps, start), dtype=torch.float64
    )
    alpha, sigma = schedule(times)
    below = torch.special.ndtr(((sigma / alpha).log() - mean) / std)  # 0 at the data
    # The inverse of the cumulative loses digits where that is near 1, at the first times.
    near(below.diff(), (-below[0] / steps).expand(steps), 2e-9)


def test_log_normal_needs_a_spread() -> None:
    with pytest.raises(ValueError, match="needed"):
        LogNormalQuantiles(std=0.0)


@pytest.mark.parametrize("grid", [Karras(sigma_max=30.0), LogSNR(sigma_max=30.0)])
def test_second_time_when_the_start_has_no_signal(grid: Karras | LogSNR) -> None:
    """The first scale is infinite; the rule is applied from sigma_max, pinned to the start."""
    finite = type(grid)(sigma_min=grid.sigma_min).times(EDM(30.0), 9)
    infinite = grid.times(Flow(), 9)
    scale = [t / (1 - t) for t in infinite[1:]]
    near(scale, [30 * t for t in finite[1:]], 1e-11)


@pytest.mark.parametrize("steps", [10, 1000])
def test_uniform_time_is_the_chain(steps: int) -> None:
    times = UniformTime().times(VPLinear(), steps)
    near(times, [k / steps for k in range(steps, -1, -1)], 2e-16)


@pytest.mark.parametrize("steps", [1, 7, 10, 50])
def test_spacings_of_diffusers(steps: int) -> None:
    """As written there; index i of their chain is our t = (i + 1) / T."""
    schedule, chain = VPLinear(), 1000
    leading = (np.arange(0, steps) * (chain // steps)).round()[::-1]
    near(Leading().times(schedule, steps), [*((leading + 1) / chain), 0.0], 1e-15)
    trailing = np.round(np.arange(chain, 0, -chain / steps)) - 1
    # "time" is not rounded to the chain
    near(UniformTime().times(schedule, steps)[:-1], (trailing + 1) / chain, 0.5001 / chain)
    if steps > 1:  # with one step theirs stands at 1/T and makes no sample
        linspace = np.linspace(0, chain - 1, steps).round()[::-1]
        near(Linspace().times(schedule, steps), [*((linspace + 1) / chain), 0.0], 1e-15)


def test_flaws_of_the_spacings() -> None:
    assert Leading().times(VPLinear(), 10)[0] == 0.901  # a tenth of the noise is never removed
    assert Linspace().times(VPLinear(), 10)[-2] == 0.001
    assert Leading().times(VPLinear(), 10, 0.5)[0] == 0.5  # part-way, the start is kept
    with pytest.raises(SamplingError, match="20 steps only"):
        Leading(20).times(VPLinear(), 21)
    with pytest.raises(SamplingError, match="fall strictly"):
        Linspace(20).times(VPLinear(), 30)


def test_explicit() -> None:
    grid = Explicit((0.9, 0.5, 0.1, 0.0))
    assert grid.times(Flow(), 3) == [0.9, 0.5, 0.1, 0.0]
    assert grid.times(Flow(), 3, 0.9) == [0.9, 0.5, 0.1, 0.0]
    with pytest.raises(SamplingError, match="Use --steps 3"):
        grid.times(Flow(), 4)
    with pytest.raises(SamplingError, match="cannot start at t=0.7"):
        grid.times(Flow(), 3, 0.7)


@pytest.mark.parametrize(
    "at", [(), (0.0,), (0.5, 0.1), (1.1, 0.0), (0.5, 0.5, 0.0), (math.nan, 0)]
)
def test_explicit_refuses(at: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="at="):
        Explicit(at)


def test_quadratic_and_flow() -> None:
    near(Quadratic().times(VPLinear(), 4), [1, 9 / 16, 1 / 4, 1 / 16, 0], 1e-15)
    schedule = VPLinear()
    times = torch.tensor(GRIDS["flow"]().times(schedule, 6), dtype=torch.float64)
    alpha, sigma = schedule(times)
    near((sigma / (alpha + sigma)).diff(2), torch.zeros(5), 1e-14)
    near(GRIDS["flow"]().times(Flow(), 8), [k / 8 for k in range(8, -1, -1)], 1e-15)


@pytest.mark.parametrize("steps", [0, -3])
def test_needs_a_step(steps: int) -> None:
    with pytest.raises(SamplingError, match="at least 1 step"):
        UniformTime().times(Flow(), steps)


@pytest.mark.parametrize("start", [0.0, -0.1, 1.01, math.nan])
def test_needs_a_start(start: float) -> None:
    with pytest.raises(SamplingError, match=r"\(0, 1\]"):
        UniformTime().times(Flow(), 4, start)


@pytest.mark.parametrize("grid", [Karras(sigma_min=100.0), LogSNR(sigma_min=80.0)])
def test_sigma_min_above_the_start(grid: Karras | LogSNR) -> None:
    with pytest.raises(SamplingError, match="sigma_min"):
        grid.times(EDM(80.0), 5)


@pytest.mark.parametrize("grid", [Karras(sigma_min=90.0), LogSNR(sigma_min=90.0)])
def test_sigma_min_above_sigma_max(grid: Karras | LogSNR) -> None:
    """Where the schedule starts without signal and the grid takes its own sigma_max, 80."""
    with pytest.raises(SamplingError, match="sigma_min"):
        grid.times(Flow(), 2)


@pytest.mark.parametrize(
    "times", [[0.5, 0.5, 0.0], [0.2, 0.4], [1.1, 0.0], [0.5, -0.1], [1.0, math.nan, 0.0]]
)
def test_check_times(times: list[float]) -> None:
    with pytest.raises(SamplingError, match="fall strictly"):
        check_times(times)
