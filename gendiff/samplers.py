r"""Samplers as tables of numbers.

With :math:`\lambda = \log(\alpha / \sigma)` every affine Gaussian process has one and the same
probability-flow ODE, whatever the schedule and the prediction:

.. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t
          + \alpha_s \int_{\lambda_t}^{\lambda_s} e^{l - \lambda_s}\, \hat x(l)\, dl .

A step of a sampler therefore is a linear combination
:math:`x_s = a\, x_t + \sum_j b_j\, \hat x_j + c\, z` of the state, of past and present estimates
and of unit noise z, and a sampler on a grid is a table of such numbers. The table is made in
float64 before the first network call (:meth:`Sampler.table`); one driver (:func:`states`) walks
it and keeps the history, so a sampler is a frozen value without state that can go stale.

=============  ====================================================  ==========================
name            method                                                source
=============  ====================================================  ==========================
``ddpm``        ancestral, variance beta-tilde, beta or learned       Ho et al., 2020, eq. 6-7
``ddim``        eta = 0 the ODE, eta = 1 ancestral                    Song et al., 2021, eq. 12
``euler``       Euler in sigma / alpha, with churn                    Karras et al., 2022
``heun``        Heun in sigma / alpha, with churn                     Karras et al., 2022, alg. 2
``dpm++2s``     exponential singlestep of order 2, two calls          Lu et al., 2022, alg. 1
``dpm++2m``     exponential multistep of order 2                      Lu et al., 2022, alg. 2
``dpm++3m``     exponential multistep of order 3, exact               Lu et al., 2022
``dpm++2m_sde`` the reverse SDE, multistep of order 2                 Lu et al., 2022, sec. 4
=============  ====================================================  ==========================

Both ends may be infinite in lambda. At s = 0 every method gives x_hat itself; a step from a state
without signal is of order 1, and such a state leaves the history.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.errors import SamplingError
from gendiff.grids import check_times
from gendiff.noise import NoiseSource
from gendiff.schedules import Level, Parts, Schedule
from gendiff.spaces import Space


class Stage(NamedTuple):
    """One network call and what follows: x = a anchor + sum_j b_j x_hat_j + c z.

    ``t`` is the time of the call on the present state; ``b`` goes from the newest estimate back;
    the anchor is the state at the step's start (after ``renoise``). ``variance`` holds the two
    log-variances between which a learned one lies, in place of c.
    """

    t: float
    a: float
    b: tuple[float, ...]
    c: float = 0.0
    variance: tuple[float, float] | None = None


class Step(NamedTuple):
    """From time t to s: optionally scale and noise (``renoise`` = (scale, std)), then stages."""

    t: float
    s: float
    stages: tuple[Stage, ...]
    renoise: tuple[float, float] | None = None


class Sampler(ABC):
    """A frozen value that turns a schedule and times into a table."""

    order: ClassVar[int]  # of convergence, of the deterministic method

    @abstractmethod
    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        """The steps over ``times``, which fall strictly."""


# --- integrals ---------------------------------------------------------------------------------

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2


def exponential_weights(nodes: list[float], start: float, end: float) -> list[float]:
    r""":math:`\int_{start}^{end} e^{l - end} L_j(l)\, dl`, L_j the Lagrange polynomials of nodes.

    Exact up to float64's rounding (Gauss-Legendre, 16 points on each unit of the interval) for
    estimates that are polynomials in lambda of degree below ``len(nodes)``. The interval may be
    infinite for one node only.
    """
    if len(nodes) == 1:
        return [-math.expm1(start - end)]
    edges = np.linspace(start, end, math.ceil(end - start) + 1)
    width = edges[1] - edges[0]
    lam = (edges[:-1, None] + width * _NODES).ravel()
    weight = np.tile(width * _WEIGHTS, len(edges) - 1) * np.exp(lam - end)
    result = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        basis = np.prod([(lam - other) / (node - other) for other in others], axis=0)
        result.append(float(weight @ basis))
    return result


def _lam(level: Level) -> float:
    return level.log_snr / 2


def _first_order(t: float, now: Level, end: Level) -> Stage:
    """The exact step for a constant estimate: DDIM, and every method's way into the data."""
    return Stage(t, end.sigma / now.sigma, (end.alpha * -math.expm1(_lam(now) - _lam(end)),))


# --- stochastic: ancestral steps ---------------------------------------------------------------


def posterior(schedule: Schedule, t: Any, s: Any) -> tuple[Tensor, Tensor, Tensor]:
    r"""Of q(x_s | x_t, x): its log-variance, the log of beta, and the gain of x in its mean.

    With :math:`\beta = \sigma_t^2 - (\alpha_t / \alpha_s)^2 \sigma_s^2` the variance is
    :math:`\tilde\beta = \beta \sigma_s^2 / \sigma_t^2` and the gain
    :math:`\alpha_s \beta / \sigma_t^2` (Ho et al., 2020, eq. 7, for any schedule).

    Args:
        schedule: The schedule.
        t, s: float64 times of one shape, s < t.
    """
    (alpha_s, sigma_s), (_, sigma_t) = schedule(s), schedule(t)
    # beta / sigma_t^2 = 1 - snr_t / snr_s, without the cancellation.
    share = -torch.expm1(schedule.log_snr(t) - schedule.log_snr(s))
    beta = share * sigma_t**2
    return (share * sigma_s**2).log(), beta.log(), alpha_s * share


def interpolate_variance(low: Any, high: Any, v: Tensor) -> Tensor:
    """Log-variance at the network's v: -1 for ``low`` and 1 for ``high`` (iDDPM, eq. 15)."""
    return (v + 1) / 2 * high + (1 - v) / 2 * low


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling of the discrete chain (Ho et al., 2020, algorithm 2).

    Args:
        variance: ``"small"``, the posterior's beta-tilde; ``"large"``, beta; ``"learned"``, the
            network's own between the two (Nichol & Dhariwal, 2021, eq. 15). The step into the
            data adds no noise.
    """

    variance: str = "small"
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise ValueError(f"variance={self.variance!r}: choose small, large or learned")

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = []
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            share = -math.expm1(now.log_snr - end.log_snr)
            a = now.alpha / end.alpha * (end.sigma / now.sigma) ** 2
            small, large = share * end.sigma**2, share * now.sigma**2
            c, bounds = 0.0, None
            if end.sigma > 0 and self.variance == "learned":
                bounds = (math.log(small), math.log(large))
            elif end.sigma > 0:
                c = math.sqrt(small if self.variance == "small" else large)
            steps.append(Step(t, s, (Stage(t, a, (end.alpha * share,), c, bounds),)))
        return steps


@dataclass(frozen=True)
class DDIM(Sampler):
    r"""Song et al., 2021 (https://arxiv.org/abs/2010.02502, eq. 12).

    .. math:: x_s = \alpha_s \hat x + \sqrt{\sigma_s^2 - \tau^2}\, \hat\epsilon + \tau z, \quad
              \tau = \eta\, \sigma_s \sqrt{1 - (\alpha_t \sigma_s / \alpha_s \sigma_t)^2}

    k-diffusion's ``sample_euler_ancestral`` is this method at the same eta: its sigma_up is
    tau / alpha_s and its step in x / alpha is eq. 12. So it has no name of its own here.

    Args:
        eta: Scale of the *standard deviation* of the noise: 0 the ODE, 1 ancestral sampling.
    """

    eta: float = 0.0
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: a number in [0, 1] is needed")

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = []
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            stage = _first_order(t, now, end)
            if self.eta and end.sigma > 0:
                share = -math.expm1(now.log_snr - end.log_snr)
                c = self.eta * end.sigma * math.sqrt(share)
                a = end.sigma * math.sqrt(1 - self.eta**2 * share) / now.sigma
                stage = Stage(t, a, (end.alpha - a * now.alpha,), c)
            steps.append(Step(t, s, (stage,)))
        return steps


# --- Euler and Heun ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method in sigma / alpha with churn (Karras et al., 2022, algorithm 2, order 1).

    Without churn this is DDIM. Churn moves a state to a higher noise level before its step.
    The level never leaves the schedule, so the first step has no churn.

    Args:
        churn: S_churn, spread over the steps; 0 for none.
        churn_min, churn_max: The range of sigma / alpha in which there is churn.
        churn_noise: S_noise, scale of the noise's standard deviation.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.churn < 0 or self.churn_noise < 0 or self.churn_min > self.churn_max:
            raise ValueError(
                f"churn={self.churn}, churn_min={self.churn_min}, churn_max={self.churn_max}, "
                f"churn_noise={self.churn_noise}: none may be negative, nor the range empty"
            )

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        gamma = min(self.churn / (len(times) - 1), math.sqrt(2) - 1)
        steps = []
        for t, s in zip(times, times[1:], strict=False):
            start, renoise = t, None
            sigma = math.exp(min(-_lam(schedule.level(t)), 700))
            if gamma > 0 and self.churn_min <= sigma <= self.churn_max:
                start, renoise = self._churn(schedule, t, gamma)
            now, end = schedule.level(start), schedule.level(s)
            steps.append(Step(t, s, self.stages(start, s, now, end), renoise))
        return steps

    def _churn(
        self, schedule: Schedule, t: float, gamma: float
    ) -> tuple[float, tuple[float, float] | None]:
        level = schedule.level(t)
        target = torch.tensor(level.log_snr - 2 * math.log1p(gamma), dtype=torch.float64)
        start = min(schedule.inverse(target).item(), 1.0)
        if start <= t:
            return t, None
        new = schedule.level(start)
        scale = new.alpha / level.alpha
        added = math.sqrt(max(new.sigma**2 - (scale * level.sigma) ** 2, 0))
        return start, (scale, self.churn_noise * added)

    def stages(self, t: float, s: float, now: Level, end: Level) -> tuple[Stage, ...]:
        """The network calls of one step."""
        return (_first_order(t, now, end),)


@dataclass(frozen=True)
class Heun(Euler):
    """Heun's method in sigma / alpha with churn (Karras et al., 2022, algorithm 2).

    Two network calls a step, one on the step into the data: N steps take 2 N - 1 calls (one less
    if the first state has no signal: that step is Euler's). Arguments as for :class:`Euler`.
    """

    order: ClassVar[int] = 2

    def stages(self, t: float, s: float, now: Level, end: Level) -> tuple[Stage, ...]:
        euler = _first_order(t, now, end)
        if end.sigma == 0 or now.alpha == 0:
            return (euler,)
        first, last = now.sigma / now.alpha, end.sigma / end.alpha
        half = (last - first) / 2
        newest = -half / last
        oldest = half * ((1 - last / first) / last - 1 / first)
        return euler, Stage(s, euler.a, (end.alpha * newest, end.alpha * oldest))


# --- multistep ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M) (Lu et al., 2022, https://arxiv.org/abs/2211.01095, algorithm 2).

    The step into the data is of order 1 ("lower order final"): its interval is infinite.

    Args:
        rule: ``"midpoint"`` is the paper's, which extrapolates to the interval's middle;
            ``"exact"`` integrates the line through two estimates exactly (called "heun" in the
            authors' code).
    """

    rule: str = "exact"
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.rule not in ("exact", "midpoint"):
            raise ValueError(f"rule={self.rule!r}: choose exact or midpoint")

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = []
        before: float | None = None  # lambda of the previous estimate
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            stage = _first_order(t, now, end)
            if before is not None and end.sigma > 0:
                nodes = [_lam(now), before]
                if self.rule == "exact":
                    weights = exponential_weights(nodes, _lam(now), _lam(end))
                else:
                    h, step = _lam(end) - _lam(now), _lam(now) - before
                    total, slope = -math.expm1(-h), h / (2 * step)
                    weights = [total * (1 + slope), -total * slope]
                stage = stage._replace(b=tuple(end.alpha * w for w in weights))
            steps.append(Step(t, s, (stage,)))
            before = _lam(now) if now.alpha > 0 else None
        return steps


@dataclass(frozen=True)
class DPMSolverPP2S(Sampler):
    r"""DPM-Solver++(2S) (Lu et al., 2022, https://arxiv.org/abs/2211.01095, algorithm 1, r = 1/2).

    One step of DDIM to the middle u of the interval in lambda, then
    :math:`x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h}) \hat x_u`. Two network
    calls a step, one where either end is infinite in lambda.
    """

    order: ClassVar[int] = 2

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = []
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            whole = _first_order(t, now, end)
            stages: tuple[Stage, ...] = (whole,)
            if now.alpha > 0 and end.sigma > 0:
                middle = torch.tensor((now.log_snr + end.log_snr) / 2, dtype=torch.float64)
                u = schedule.inverse(middle).item()
                stages = (_first_order(t, now, schedule.level(u)), whole._replace(t=u))
            steps.append(Step(t, s, stages))
        return steps


@dataclass(frozen=True)
class DPMSolverPP3M(Sampler):
    """DPM-Solver++(3M) (Lu et al., 2022), the parabola through three estimates integrated exactly.

    The order rises as estimates come and falls to 2 and 1 on the last two steps into the data.
    """

    order: ClassVar[int] = 3

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps, nodes = [], list[float]()
        into_data = schedule.level(times[-1]).sigma == 0
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            now, end = schedule.level(t), schedule.level(s)
            stage = _first_order(t, now, end)
            nodes = [_lam(now), *nodes] if now.alpha > 0 else []
            count = min(3, len(nodes), len(times) - 1 - i if into_data else 3)
            if count > 1:
                weights = exponential_weights(nodes[:count], _lam(now), _lam(end))
                stage = stage._replace(b=tuple(end.alpha * w for w in weights))
            steps.append(Step(t, s, (stage,)))
        return steps


@dataclass(frozen=True)
class SDEDPMSolverPP2M(Sampler):
    r"""SDE-DPM-Solver++(2M) (Lu et al., 2022, section 4), with k-diffusion's eta.

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} e^{-\eta h} x_t
              + \alpha_s \int_{\lambda_t}^{\lambda_s} (1 + \eta) e^{(1 + \eta)(l - \lambda_s)}
              \hat x(l)\, dl + \sigma_s \sqrt{1 - e^{-2 \eta h}}\, z

    for the line through two estimates. Exact in mean and variance for a constant estimate.

    Args:
        eta: Rate of the noise: 0 is DPM-Solver++(2M), 1 the reverse SDE. Between these it is not
            DDIM's eta, which scales a standard deviation.
    """

    eta: float = 1.0
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 <= self.eta < math.inf:
            raise ValueError(f"eta={self.eta}: a finite number of at least 0 is needed")

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = []
        past: float | None = None
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            stage = _first_order(t, now, end)
            rate, h = 1 + self.eta, _lam(end) - _lam(now)
            if end.sigma > 0:
                decay = math.exp(-self.eta * h) if self.eta else 1.0
                nodes = [_lam(now)] if past is None else [_lam(now), past]
                weights = exponential_weights(
                    [rate * node for node in nodes], rate * _lam(now), rate * _lam(end)
                )
                c = end.sigma * math.sqrt(1 - decay**2)
                stage = Stage(t, stage.a * decay, tuple(end.alpha * w for w in weights), c)
            steps.append(Step(t, s, (stage,)))
            past = _lam(now) if now.alpha > 0 else None
        return steps


SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpm++2s": DPMSolverPP2S,
    "dpm++2m": DPMSolverPP2M,
    "dpm++3m": DPMSolverPP3M,
    "dpm++2m_sde": SDEDPMSolverPP2M,
}


# --- the driver --------------------------------------------------------------------------------


class State(NamedTuple):
    """A state on the way: after step ``number``, at time ``t``, with the newest estimate."""

    number: int
    t: float
    x: Tensor
    x_hat: Tensor


def network_calls(sampler: Sampler, schedule: Schedule, times: list[float]) -> int:
    """How often the denoiser is called."""
    return sum(len(step.stages) for step in make_table(sampler, schedule, times))


def make_table(sampler: Sampler, schedule: Schedule, times: list[float]) -> list[Any]:
    """The sampler's table; under :class:`Parts`, every number becomes a tuple, one a part."""
    check_times(times)
    if not isinstance(schedule, Parts):
        return sampler.table(schedule, times)
    return _zip([sampler.table(part, times) for part in schedule.schedules])


_CHURNED = (
    "this sampler moves the parts of a state to different times; use churn=0, or a sampler that "
    "calls the network at the grid's times only"
)


def _zip(tables: list[Any]) -> Any:
    """Merges tables of equal structure: numbers that differ between parts become tuples."""
    first = tables[0]
    if any(v is None for v in tables):
        if any(v is not None for v in tables):
            raise SamplingError(_CHURNED)
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
            raise SamplingError("the parts' schedules make steps of different kinds here")
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
    """Walks the times and yields each state.

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
    history: list[Tensor] = []
    keep = max(len(stage.b) for step in table for stage in step.stages)
    for index, step in enumerate(table):
        draw = 2 * index + 1
        if step.renoise is not None:
            scale, std = step.renoise
            x = _combine(space, [(scale, x), (std, space.noise(noise, draw + 1))])
        anchor = x
        for stage in step.stages:
            if stage.variance is None:
                x_hat, v = denoiser(x, stage.t), None
            else:
                x_hat, v = _with_variance(denoiser, x, stage.t)
            history = [x_hat, *history[: keep - 1]]
            terms = [(stage.a, anchor), *zip(stage.b, history, strict=False)]
            if stage.c:
                terms.append((stage.c, space.noise(noise, draw)))
            x = _combine(space, terms)
            if v is not None and stage.variance is not None:
                low, high = (_broadcast(space, number, x) for number in stage.variance)
                std = (interpolate_variance(low, high, v) / 2).exp()
                x = x + space.project(std * space.noise(noise, draw))
        yield State(index + 1, step.s, x, history[0])


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
