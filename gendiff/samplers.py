r"""The samplers by name, and the driver that walks their tables (see :mod:`gendiff.tables`).

=============  ====================================================  ==========================
name            method                                                source
=============  ====================================================  ==========================
``ddpm``        ancestral, variance beta-tilde, beta or learned       Ho et al., 2020, eq. 6-7
``ddim``        eta = 0 the ODE, eta = 1 ancestral                    Song et al., 2021, eq. 12
``euler``       Euler in sigma / alpha, with churn                    Karras et al., 2022
``heun``        Heun in sigma / alpha, with churn                     Karras et al., 2022, alg. 2
``restart``     Heun or Euler, an interval walked several times       Xu et al., 2023
``pc``          ancestral with Langevin steps as correctors           Song et al., 2021, alg. 2-5
``dpm++2s``     exponential singlestep of order 2                     Lu et al., 2022, alg. 1
``dpm++2m``     exponential multistep of order 2                      Lu et al., 2022, alg. 2
``dpm++3m``     exponential multistep of order 3, exact               Lu et al., 2022
``unipc``       ``dpm++2m`` or ``3m``, corrected without calls        Zhao et al., 2023
``lms``         Adams-Bashforth in sigma / alpha, order 1 to 4        k-diffusion; rhoAB-DEIS
``deis``        the same with polynomials in t (tAB) or log(rho)      Zhang & Chen, 2023
``vab``         Adams-Bashforth on the velocity, in the flow's time   azula
``pndm``        the same with weights of equal steps (PLMS)           Liu et al., 2022
``dpm++2m_sde`` the reverse SDE, multistep of order 2                 Lu et al., 2022, sec. 4
``adaptive``    each sample's own steps, by their error (no table)    Ralston, 1962
=============  ====================================================  ==========================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gendiff.adaptive import Adaptive
from gendiff.denoiser import DenoiserFn
from gendiff.errors import SamplingError
from gendiff.grids import check_times
from gendiff.multistep import (
    DEIS,
    LMS,
    PNDM,
    VAB,
    DPMSolverPP2M,
    DPMSolverPP3M,
    SDEDPMSolverPP2M,
    UniPC,
)
from gendiff.noise import NoiseSource
from gendiff.schedules import Parts, Schedule
from gendiff.singlestep import (
    DDIM,
    DDPM,
    DPMSolverPP2S,
    Euler,
    Heun,
    PredictorCorrector,
    Restart,
    interpolate_variance,
)
from gendiff.spaces import Space
from gendiff.tables import Sampler, Stage, State, Step, Walker

SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "restart": Restart,
    "pc": PredictorCorrector,
    "dpm++2s": DPMSolverPP2S,
    "dpm++2m": DPMSolverPP2M,
    "dpm++3m": DPMSolverPP3M,
    "unipc": UniPC,
    "lms": LMS,
    "deis": DEIS,
    "vab": VAB,
    "pndm": PNDM,
    "dpm++2m_sde": SDEDPMSolverPP2M,
    "adaptive": Adaptive,
}


def network_calls(sampler: Sampler, schedule: Schedule, times: list[float]) -> int | None:
    """How often the denoiser is called; None where that is known afterwards only."""
    table = make_table(sampler, schedule, times)
    return None if table is None else sum(len(step.stages) for step in table)


def adds_noise(sampler: Sampler, schedule: Schedule, times: list[float]) -> bool:
    """Whether a sample depends on more noise than that of its start."""
    return any(
        step.renoise is not None or any(stage.c or stage.variance for stage in step.stages)
        for step in make_table(sampler, schedule, times) or ()
    )


def make_table(sampler: Sampler, schedule: Schedule, times: list[float]) -> list[Any] | None:
    """The sampler's table; under :class:`Parts`, every number becomes a tuple, one a part.

    None of a :class:`~gendiff.tables.Walker`.
    """
    check_times(times)
    if isinstance(sampler, Walker) or not isinstance(schedule, Parts):
        return sampler.table(schedule, times)
    return _zip([sampler.table(part, times) for part in schedule.schedules])


_CHURNED = (
    "this sampler moves the parts of a state to different times; use churn=0, or a sampler that "
    "calls the network at the grid's times only"
)
_DIFFERENT = (
    "the parts' schedules make steps of different kinds here; use a sampler whose rows do not "
    "depend on where a schedule has no signal, as ddim"
)


def _zip(tables: list[Any]) -> Any:
    """Merges tables of equal structure: numbers that differ between parts become tuples."""
    first = tables[0]
    if any(v is None for v in tables):
        if any(v is not None for v in tables):
            raise SamplingError(_DIFFERENT)
        return None
    if isinstance(first, (Step, Stage)):
        if any(table.t != first.t for table in tables):
            raise SamplingError(_CHURNED)
        numbers = {
            name: _zip([getattr(table, name) for table in tables])
            for name in first._fields
            if name not in ("t", "s")
        }
        return first._replace(**numbers)
    if isinstance(first, (list, tuple)):
        if len({len(v) for v in tables}) > 1:
            raise SamplingError(_DIFFERENT)
        return type(first)(_zip(list(v)) for v in zip(*tables, strict=True))
    return PartNumbers(tables)


class PartNumbers(tuple[float, ...]):
    """A coefficient for each part of a state."""


def _broadcast(space: Space, number: Any, x: Tensor) -> Any:
    """A coefficient as something that broadcasts against ``x``."""
    if not isinstance(number, PartNumbers):
        return number
    return space.expand(x.new_tensor([number]).expand(space.batch_size, -1))


def _combine(space: Space, terms: list[tuple[Any, Tensor]]) -> Tensor:
    """Sum of coefficient times tensor, with one pass over the memory for each term."""
    total: Tensor | None = None
    for number, tensor in terms:
        if isinstance(number, PartNumbers):
            tensor, number = _broadcast(space, number, tensor) * tensor, 1.0
        elif number == 0:
            continue
        total = tensor * number if total is None else total.add_(tensor, alpha=number)
    if total is None:
        raise SamplingError("a step without any term")
    return total


@torch.no_grad()
def states(
    denoiser: DenoiserFn,
    space: Space,
    schedule: Schedule,
    sampler: Sampler,
    times: list[float],
    noise: NoiseSource,
    x: Tensor | None = None,
) -> Iterator[State]:
    """Walks the times and yields each state, as the sampler's table or the sampler itself says.

    Args:
        denoiser: ``(x_t, t) -> x_hat``.
        space: The batch's space.
        schedule: The schedule to sample under.
        sampler: The method.
        times: Strictly falling, from a grid.
        noise: Where noise comes from: draw 0 is the start, draws 2i - 1 and 2i belong to step i.
        x: The state at ``times[0]``; pure noise of that level if None.

    Raises:
        SamplingError: The times do not fall, or the denoiser lacks what the sampler needs.
    """
    table = make_table(sampler, schedule, times)
    if x is None:
        x = start(space, schedule, times[0], noise)
    if isinstance(sampler, Walker):
        yield from sampler.walk(denoiser, space, schedule, times, x)
        return
    assert table is not None  # which a Walker alone has not
    history: list[Tensor] = []
    keep = max(len(b) for step in table for stage in step.stages for b in _reach(stage))
    anchor = x
    for index, step in enumerate(table):
        draw = 2 * index + 1
        if step.renoise is not None:
            scale, std = step.renoise
            x = _combine(space, [(scale, x), (std, space.noise(noise, draw + 1))])
        previous, anchor = anchor, x
        for stage in step.stages:
            if stage.variance is None:
                x_hat, v = denoiser(x, stage.t), None
            else:
                x_hat, v = _with_variance(denoiser, x, stage.t)
            kept = x_hat
            if stage.keep is not None:
                kept = _combine(space, [(stage.keep[0], x), (stage.keep[1], x_hat)])
            history = [kept, *history[: keep - 1]]
            if stage.correct is not None:
                a, b = stage.correct
                anchor = _combine(space, [(a, previous), *zip(b, history, strict=False)])
            terms = [(stage.a, anchor), *zip(stage.b, history, strict=False)]
            if stage.c:
                terms.append((stage.c, space.noise(noise, draw)))
            x = _combine(space, terms)
            if v is not None and stage.variance is not None:
                low, high = (_broadcast(space, number, x) for number in stage.variance)
                std = (interpolate_variance(low, high, v) / 2).exp()
                x = x + space.project(std * space.noise(noise, draw))
        yield State(index + 1, step.s, x, x_hat)


def _reach(stage: Any) -> list[tuple[Any, ...]]:
    """The coefficients of a stage that reach back in the history."""
    return [stage.b] if stage.correct is None else [stage.b, stage.correct[1]]


def start(
    space: Space, schedule: Schedule, t: float, noise: NoiseSource, x: Tensor | None = None
) -> Tensor:
    """A state at time t: pure noise, sigma_t z, or alpha_t x + sigma_t z from data x."""
    alpha, sigma = schedule(torch.full((space.batch_size,), t, dtype=torch.float64))
    z = space.noise(noise, 0)
    state: Tensor = space.expand(sigma.to(z)) * z
    return state if x is None else torch.addcmul(state, space.expand(alpha.to(z)), x)


def _with_variance(denoiser: DenoiserFn, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    method = getattr(denoiser, "with_variance", None)
    x_hat, v = method(x, t) if method is not None else (None, None)
    if x_hat is None or v is None:
        raise SamplingError(
            "variance='learned' needs a backbone with a variance head. Use variance=small or large"
        )
    return x_hat, v


def sample(
    denoiser: DenoiserFn,
    space: Space,
    schedule: Schedule,
    sampler: Sampler,
    times: list[float],
    noise: NoiseSource,
    x: Tensor | None = None,
) -> Tensor:
    """The last of :func:`states`: samples of the data."""
    state = None
    for state in states(denoiser, space, schedule, sampler, times, noise, x):
        pass
    assert state is not None  # a grid has at least one step
    return state.x
