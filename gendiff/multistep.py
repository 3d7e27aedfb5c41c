r"""Samplers that learn from the estimates of earlier steps.

They differ in what is taken for a polynomial, and in which variable: the estimates of the data in
lambda (DPM-Solver++, UniPC), or those of the noise,
:math:`\hat\epsilon = (x_t - \alpha \hat x) / \sigma`, in :math:`\rho = \sigma / \alpha` (LMS) or
in t (DEIS), for :math:`y = x / \alpha` obeys :math:`dy / d\rho = \hat\epsilon`, or the velocity in
the time of rectified flow (VAB). Lambda is infinite at the data, so the first kind ends with a
step of order 1; rho, t and the flow's time are finite there: the others keep their order.

Some are others:

- DEIS with polynomials in rho (rhoAB-DEIS) is LMS, and under EDM's schedule, where t is rho over
  its maximum, DEIS is too;
- PNDM is LMS wherever the grid is uniform in rho;
- UniPC without its corrector is DPM-Solver++, 2M by the midpoint rule (p = 2) or 3M (p = 3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from gendiff.schedules import Level, Schedule
from gendiff.tables import Sampler, Stage, Step, first_order, lam, noise_scale

Array = NDArray[np.float64]
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
    points, width = _points(start, end)
    return _integrate(nodes, points, width * np.exp(points - end))


def midpoint_weights(now: float, before: float, end: float) -> list[float]:
    """Of the estimates at the lambdas now and before: their line at the middle, for all of it."""
    h, step = end - now, now - before
    total, slope = -math.expm1(-h), h / (2 * step)
    return [total * (1 + slope), -total * slope]


def halved_curvature(nodes: list[float], weights: list[float]) -> list[float]:
    r"""The weights of a parabola's integral, less half of its quadratic term's.

    That term is :math:`x[l_0, l_1, l_2]\, (l - l_0)^2`, of the second divided difference; the
    weights integrate it as they do every parabola.
    """
    moment = sum(w * (node - nodes[0]) ** 2 for w, node in zip(weights, nodes, strict=True))
    gaps = [math.prod(n - other for other in nodes if other != n) for n in nodes]
    return [w - moment / 2 / gap for w, gap in zip(weights, gaps, strict=True)]


def _points(start: float, end: float) -> tuple[Array, Array]:
    """Where to evaluate for an integral from start to end, and the weights there."""
    edges = np.linspace(start, end, math.ceil(end - start) + 1)
    width = edges[1] - edges[0]
    points = (edges[:-1, None] + width * _NODES).ravel()
    return points, np.tile(width * _WEIGHTS, len(edges) - 1)


def _integrate(nodes: list[float], points: Array, weight: Array) -> list[float]:
    """Of the Lagrange polynomials of the nodes."""
    result = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        factors = [(points - other) / (node - other) for other in others]
        result.append(float(weight @ np.prod([np.ones_like(points), *factors], axis=0)))
    return result


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
            stage = first_order(t, now, end)
            if before is not None and end.sigma > 0:
                nodes = [lam(now), before]
                if self.rule == "exact":
                    weights = exponential_weights(nodes, lam(now), lam(end))
                else:
                    weights = midpoint_weights(lam(now), before, lam(end))
                stage = stage._replace(b=tuple(end.alpha * w for w in weights))
            steps.append(Step(t, s, (stage,)))
            before = lam(now) if now.alpha > 0 else None
        return steps


@dataclass(frozen=True)
class DPMSolverPP3M(Sampler):
    """DPM-Solver++(3M) (Lu et al., 2022): the parabola through the last three estimates.

    The order rises as estimates come and falls on the last steps into the data.

    Args:
        rule: ``"exact"`` integrates the parabola exactly; the last two steps are of order 2 and 1.
            ``"half"`` takes half of its curvature, as the authors' code, diffusers and k-diffusion
            do (their D2 lacks the factor 2 of Taylor's formula), and order 1 on the last step
            only. It is of order 2, but below some 30 steps often closer to the trajectory, since a
            parabola extrapolates too boldly over long steps.
    """

    rule: str = "exact"

    def __post_init__(self) -> None:
        if self.rule not in ("exact", "half"):
            raise ValueError(f"rule={self.rule!r}: choose exact or half")

    @property
    def order(self) -> int:
        return 3 if self.rule == "exact" else 2

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps, nodes = [], list[float]()
        last = len(times) - 1 if schedule.level(times[-1]).sigma == 0 else math.inf
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False), 1):
            now, end = schedule.level(t), schedule.level(s)
            stage = first_order(t, now, end)
            nodes = [lam(now), *nodes[:2]] if now.alpha > 0 else []
            if self.rule == "exact" and i == last - 1:
                nodes = nodes[:2]
            if len(nodes) > 1 and i < last:
                weights = exponential_weights(nodes, lam(now), lam(end))
                if self.rule == "half" and len(nodes) == 3:
                    weights = halved_curvature(nodes, weights)
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
            stage = first_order(t, now, end)
            rate, h = 1 + self.eta, lam(end) - lam(now)
            if end.sigma > 0:
                decay = math.exp(-self.eta * h) if self.eta else 1.0
                nodes = [lam(now)] if past is None else [lam(now), past]
                weights = exponential_weights(
                    [rate * node for node in nodes], rate * lam(now), rate * lam(end)
                )
                c = end.sigma * math.sqrt(1 - decay**2)
                stage = Stage(t, stage.a * decay, tuple(end.alpha * w for w in weights), c)
            steps.append(Step(t, s, (stage,)))
            past = lam(now) if now.alpha > 0 else None
        return steps


# --- polynomials through estimates of the noise --------------------------------------------------


def _noise_row(t: float, now: Level, end: Level, weights: list[float]) -> Stage:
    r""":math:`x_s = \frac{\alpha_s}{\alpha_t} x_t + \alpha_s \sum_j w_j \hat\epsilon_j`."""
    keep = (1 / now.sigma, -now.alpha / now.sigma)
    return Stage(t, end.alpha / now.alpha, tuple(end.alpha * w for w in weights), keep=keep)


@dataclass(frozen=True)
class LMS(Sampler):
    r"""Adams and Bashforth's linear multistep method in :math:`\rho = \sigma / \alpha`.

    .. math:: x_s = \frac{\alpha_s}{\alpha_t} x_t
              + \alpha_s \int_{\rho_t}^{\rho_s} p(\rho)\, d\rho,

    p the polynomial through the last estimates of the noise, integrated exactly for times of any
    distance, down to the data, where rho is 0. It is k-diffusion's ``lms`` and the rhoAB-DEIS of
    Zhang & Chen (2023). The first steps have fewer estimates.

    Args:
        order: How many estimates, 1 to 4; with 1 this is DDIM.
    """

    order: int = 4

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order={self.order}: a whole number from 1 to 4 is needed")

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps, past = [], list[float]()
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            stage = first_order(t, now, end)
            past = [t, *past[: self.order - 1]] if now.alpha > 0 else []
            if past:
                stage = _noise_row(t, now, end, self.weights(schedule, past, s))
            steps.append(Step(t, s, (stage,)))
        return steps

    def weights(self, schedule: Schedule, past: list[float], s: float) -> list[float]:
        """Of the estimates at the times ``past``, newest first, for the step to s."""
        rho = [noise_scale(schedule.level(t)) for t in past]
        width = noise_scale(schedule.level(s)) - rho[0]
        return _integrate(rho, rho[0] + width * _NODES, width * _WEIGHTS)


_FAR = 37.0  # exp(-37) is below float64's rounding


@dataclass(frozen=True)
class DEIS(LMS):
    r"""DEIS (Zhang & Chen, 2023, https://arxiv.org/abs/2204.13902): other polynomials than LMS's.

    As :class:`LMS` with :math:`\int p(u(\rho))\, d\rho`, exact to rounding for a smooth schedule.

    Args:
        order: How many estimates, 1 to 4: one more than the paper's r.
        variable: u. ``"time"``, t, is the paper's tAB-DEIS; ``"log_rho"``, the logarithm of rho,
            is diffusers' DEIS. The logarithm is infinite at the data: that step is LMS's.
    """

    variable: str = "time"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variable not in ("time", "log_rho"):
            raise ValueError(f"variable={self.variable!r}: choose time or log_rho")

    def weights(self, schedule: Schedule, past: list[float], s: float) -> list[float]:
        start, end = lam(schedule.level(past[0])), lam(schedule.level(s))
        if self.variable == "log_rho" and end == math.inf:
            return super().weights(schedule, past, s)
        points, width = _points(start, min(end, start + _FAR))
        if self.variable == "log_rho":
            nodes, at = [lam(schedule.level(t)) for t in past], points
        else:
            nodes, at = past, schedule.inverse(torch.from_numpy(2 * points)).numpy()
        return _integrate(nodes, at, -width * np.exp(-points))  # d rho = -exp(-lambda) d lambda


@dataclass(frozen=True)
class VAB(LMS):
    r"""Adams and Bashforth's method on the velocity, in the time of rectified flow.

    With :math:`\tau = \sigma / (\alpha + \sigma)` the state :math:`x / (\alpha + \sigma)` is that
    of rectified flow and moves with :math:`v = \hat\epsilon - \hat x`
    (:math:`= x_t / \sigma - (1 + \alpha / \sigma) \hat x`):

    .. math:: x_s = (\alpha_s + \sigma_s) \Big(\frac{x_t}{\alpha_t + \sigma_t}
              + \int_{\tau_t}^{\tau_s} p(\tau)\, d\tau\Big),

    p the polynomial through the last velocities. tau is finite at both ends, so here even a state
    without signal stays in the history. It is azula's ``vABSampler``.

    Args:
        order: How many velocities, 1 to 4; with 1 this is DDIM.
    """

    order: int = 2

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps, past = [], list[float]()
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            first, last = now.alpha + now.sigma, end.alpha + end.sigma
            past = [now.sigma / first, *past[: self.order - 1]]
            width = end.sigma / last - past[0]
            weights = _integrate(past, past[0] + width * _NODES, width * _WEIGHTS)
            keep = (1 / now.sigma, -(1 + now.alpha / now.sigma))
            b = tuple(last * w for w in weights)
            steps.append(Step(t, s, (Stage(t, last / first, b, keep=keep),)))
        return steps


# Adams and Bashforth's for equal steps, newest first.
_ADAMS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


@dataclass(frozen=True)
class PNDM(Sampler):
    r"""Pseudo linear multistep (Liu et al., 2022, https://arxiv.org/abs/2202.09778).

    DDIM's step with :math:`\frac{1}{24} (55 \hat\epsilon_t - 59 \hat\epsilon_{t_1}
    + 37 \hat\epsilon_{t_2} - 9 \hat\epsilon_{t_3})` for the noise, whatever the distances of the
    times: so it is of order 2 where these change smoothly, and of order 4 only on grids uniform
    in sigma / alpha, where it is :class:`LMS`. The first steps are those of fewer estimates, with
    one call each ("PLMS"), not the paper's Runge-Kutta steps with four.
    """

    order: ClassVar[int] = 2

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps, count = [], 0
        for t, s in zip(times, times[1:], strict=False):
            now, end = schedule.level(t), schedule.level(s)
            stage = first_order(t, now, end)
            count = min(count + 1, 4) if now.alpha > 0 else 0
            if count:
                width = noise_scale(end) - noise_scale(now)
                stage = _noise_row(t, now, end, [width * w for w in _ADAMS[count - 1]])
            steps.append(Step(t, s, (stage,)))
        return steps


# --- predictor and corrector ---------------------------------------------------------------------


@dataclass(frozen=True)
class UniPC(Sampler):
    r"""UniPC-p for estimates of the data, with B_2 (Zhao et al., 2023).

    See https://arxiv.org/abs/2302.04867. UniP-p takes a step with p estimates: DPM-Solver++(2M) by
    the midpoint rule for p = 2, as the paper sets :math:`a_1 = 1/2`, and (3M) for p = 3. UniC-p
    takes it again once the network has been called where it led, with the polynomial through
    p + 1 estimates; that call is the next step's own, so N steps are N calls. Of order p + 1. The
    last steps into the data have fewer estimates.

    Args:
        p: 2 or 3.
    """

    p: int = 2

    def __post_init__(self) -> None:
        if self.p not in (2, 3):
            raise ValueError(f"p={self.p}: choose 2 or 3")

    @property
    def order(self) -> int:
        return self.p + 1

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps, nodes, count = [], list[float](), 0
        into_data = schedule.level(times[-1]).sigma == 0
        last: Level | None = None
        for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
            now, end = schedule.level(t), schedule.level(s)
            nodes = [lam(now), *nodes] if now.alpha > 0 else []
            correct = None
            if last is not None and last.alpha > 0 and end.sigma > 0:
                correct = self._correct(last, now, nodes[: count + 1])
            count = min(self.p, len(nodes), len(times) - 1 - i if into_data else self.p)
            stage = first_order(t, now, end)
            if count == 2:
                weights = midpoint_weights(nodes[0], nodes[1], lam(end))
                stage = stage._replace(b=tuple(end.alpha * w for w in weights))
            elif count == 3:
                weights = exponential_weights(nodes[:3], nodes[0], lam(end))
                stage = stage._replace(b=tuple(end.alpha * w for w in weights))
            steps.append(Step(t, s, (stage._replace(correct=correct),)))
            last = now
        return steps

    def _correct(
        self, last: Level, now: Level, nodes: list[float]
    ) -> tuple[float, tuple[float, ...]]:
        """The step from ``last`` to ``now``, whose estimate is the newest."""
        if len(nodes) == 2:  # UniC-1 with B_2: the mean of both
            weights = [-math.expm1(nodes[1] - nodes[0]) / 2] * 2
        else:
            weights = exponential_weights(nodes, nodes[1], nodes[0])
        return now.sigma / last.sigma, tuple(now.alpha * w for w in weights)
