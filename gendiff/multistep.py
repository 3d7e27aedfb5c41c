"""Samplers that learn from the estimates of earlier steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gendiff.schedules import Schedule
from gendiff.tables import Sampler, Stage, Step, first_order, lam

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
    points = (edges[:-1, None] + width * _NODES).ravel()
    weight = np.tile(width * _WEIGHTS, len(edges) - 1) * np.exp(points - end)
    result = []
    for j, node in enumerate(nodes):
        others = [other for i, other in enumerate(nodes) if i != j]
        basis = np.prod([(points - other) / (node - other) for other in others], axis=0)
        result.append(float(weight @ basis))
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
                    h, step = lam(end) - lam(now), lam(now) - before
                    total, slope = -math.expm1(-h), h / (2 * step)
                    weights = [total * (1 + slope), -total * slope]
                stage = stage._replace(b=tuple(end.alpha * w for w in weights))
            steps.append(Step(t, s, (stage,)))
            before = lam(now) if now.alpha > 0 else None
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
            stage = first_order(t, now, end)
            nodes = [lam(now), *nodes] if now.alpha > 0 else []
            count = min(3, len(nodes), len(times) - 1 - i if into_data else 3)
            if count > 1:
                weights = exponential_weights(nodes[:count], lam(now), lam(end))
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
