r"""A time grid fitted to a model and a sampler, for few network calls.

What a grid is worth depends on where the model's trajectories bend. Here that is measured: some
samples are drawn once with many steps, and the N times are moved until N steps from the same
noise end as near to them as can be, in the mean over samples of the root mean square difference.
That is the objective of LD3 (Tong et al., 2024, https://arxiv.org/abs/2405.15506), which follows
its gradient through the sampler; for the few numbers of a grid a search needs no gradient, so it
works with every sampler, guidance and modality. It begins with the best of the standard grids and
so never returns worse than that, on the samples that it sees.

The search: each time in turn is moved up or down by a share of its distance to the next one, in
:math:`\sigma / (\alpha + \sigma)`, whichever the schedule; a move that helps is kept; when none
does the share is halved. The first time may fall below the start: a call at nearly pure noise
says little, and the noise is drawn at the level where the grid begins.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gendiff.config import SampleConfig
from gendiff.errors import SamplingError
from gendiff.generate import Model
from gendiff.grids import GRIDS, Explicit, FlowTime
from gendiff.multistep import DPMSolverPP2M
from gendiff.samplers import adds_noise
from gendiff.schedules import Schedule
from gendiff.spaces import Batch, join
from gendiff.tables import Walker

REFERENCE_STEPS = 128
LEAST_GAP = 0.1  # of log-SNR, between two times
SHARES = (0.4, 0.2, 0.1, 0.05, 0.025)  # of the distance between two times, tried in this order


class Fitted(NamedTuple):
    """A grid, its error, and the best standard grid's name and error on the same samples."""

    times: list[float]
    error: float
    standard: str
    standard_error: float


def standard_grids(schedule: Schedule, steps: int) -> dict[str, list[float]]:
    """The times of every grid that needs no parameters."""
    found = {}
    for name, grid in GRIDS.items():
        if grid is not Explicit:
            try:
                found[name] = grid().times(schedule, steps)
            except SamplingError:  # its noise scales are not the schedule's
                continue
    return found


def fit(
    error: Callable[[list[float]], float], schedule: Schedule, steps: int, evaluations: int = 150
) -> Fitted:
    """Searches the times with the least error.

    Args:
        error: Of a grid's N + 1 times; a deterministic function.
        schedule: The schedule that they belong to.
        steps: N.
        evaluations: About how often ``error`` is called.
    """
    grids = standard_grids(schedule, steps)
    errors = {name: error(times) for name, times in grids.items()}
    name = min(errors, key=lambda key: errors[key])
    best, least = grids[name], errors[name]
    left = evaluations - len(errors)
    for share in SHARES:
        moved = True
        while moved and left > 0:
            moved = False
            for i, up in itertools.product(range(steps), (True, False)):
                trial = _move(schedule, best, i, share, up)
                if trial is None:
                    continue
                left -= 1
                found = error(trial)
                if found < least:
                    best, least, moved = trial, found, True
    return Fitted(best, least, name, errors[name])


def _move(
    schedule: Schedule, times: list[float], i: int, share: float, up: bool
) -> list[float] | None:
    """The times with time i a share of the way to its neighbour; None if that is too near."""
    above = times[i - 1] if i else 1.0
    ends = torch.tensor([times[i], above if up else times[i + 1]], dtype=torch.float64)
    levels = schedule.log_snr(ends)
    here, there = torch.sigmoid(-levels / 2)
    log_snr = -2 * torch.logit(here + share * (there - here))
    # A multistep sampler divides by the distance of its last two times: noise of the network's.
    if ends[0] == ends[1] or (levels[1] - log_snr).abs() < LEAST_GAP:
        return None
    return [*times[:i], schedule.inverse(log_snr).item(), *times[i + 1 :]]


def fit_model(
    model: Model, settings: SampleConfig, n: int, seed: int, evaluations: int = 150
) -> Fitted:
    """Fits a grid of ``settings.steps`` steps for a run's model and a sampler.

    Args:
        model: The model.
        settings: Its sampler, guidance and number of steps; its grid is of no account.
        n: Samples to look at.
        seed: Of their noise.
        evaluations: How many grids to try.

    Raises:
        SamplingError: The sampler has no use for a grid, or adds noise, so that its samples
            follow no trajectory.
    """
    schedule = model.denoiser.schedule
    _check_sampler(settings, schedule)
    reference = {"sampler": DPMSolverPP2M(), "grid": FlowTime(), "steps": REFERENCE_STEPS}
    truth = _draw(model, settings.model_copy(update=reference), n, seed)

    def error(times: list[float]) -> float:
        changed = settings.model_copy(update={"grid": Explicit(tuple(times))})
        return distance(_draw(model, changed, n, seed), truth.x)

    return fit(error, schedule, settings.steps, evaluations)


def distance(samples: Batch, truth: Tensor) -> float:
    """The mean over samples of the root mean square difference."""
    return samples.space.mean((samples.x - truth).square()).sqrt().mean().item()


def _draw(model: Model, settings: SampleConfig, n: int, seed: int) -> Batch:
    return join(list(model.batches(range(n), settings, seed)))


def _check_sampler(settings: SampleConfig, schedule: Schedule) -> None:
    if isinstance(settings.sampler, Walker):
        raise SamplingError(
            "this sampler chooses its times itself. Fit a grid to another, as --sampler dpm++2m"
        )
    if adds_noise(settings.sampler, schedule, FlowTime().times(schedule, settings.steps)):
        raise SamplingError(
            "a grid is fitted to a sampler that adds no noise. Try --sampler dpm++2m or heun"
        )
