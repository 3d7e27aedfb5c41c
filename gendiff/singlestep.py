"""Samplers whose steps know nothing of the steps before.

Ancestral and DDIM, Euler and Heun, DPM-Solver++(2S); and two that take such steps more often:
Restart, and Langevin steps as correctors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gendiff.multistep import exponential_weights, midpoint_weights
from gendiff.schedules import Level, Schedule
from gendiff.tables import Sampler, Stage, Step, first_order, forward_noise, lam, noise_scale


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
            stage = first_order(t, now, end)
            if self.eta and end.sigma > 0:
                share = -math.expm1(now.log_snr - end.log_snr)
                c = self.eta * end.sigma * math.sqrt(share)
                a = end.sigma * math.sqrt(1 - self.eta**2 * share) / now.sigma
                stage = Stage(t, a, (end.alpha - a * now.alpha,), c)
            steps.append(Step(t, s, (stage,)))
        return steps


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
            sigma = noise_scale(schedule.level(t))
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
        scale, added = forward_noise(level, schedule.level(start))
        return start, (scale, self.churn_noise * added)

    def stages(self, t: float, s: float, now: Level, end: Level) -> tuple[Stage, ...]:
        """The network calls of one step."""
        return (first_order(t, now, end),)


@dataclass(frozen=True)
class Heun(Euler):
    """Heun's method in sigma / alpha with churn (Karras et al., 2022, algorithm 2).

    Two network calls a step, one on the step into the data: N steps take 2 N - 1 calls (one less
    if the first state has no signal: that step is Euler's). Arguments as for :class:`Euler`.
    """

    order: ClassVar[int] = 2

    def stages(self, t: float, s: float, now: Level, end: Level) -> tuple[Stage, ...]:
        euler = first_order(t, now, end)
        if end.sigma == 0 or now.alpha == 0:
            return (euler,)
        first, last = now.sigma / now.alpha, end.sigma / end.alpha
        half = (last - first) / 2
        newest = -half / last
        oldest = half * ((1 - last / first) / last - 1 / first)
        return euler, Stage(s, euler.a, (end.alpha * newest, end.alpha * oldest))


@dataclass(frozen=True)
class DPMSolverPP2S(Sampler):
    r"""DPM-Solver++(2S) (Lu et al., 2022, https://arxiv.org/abs/2211.01095, algorithm 1).

    A step covers two intervals of the grid, from t past u to s: DDIM to u, then with
    :math:`r = (\lambda_u - \lambda_t) / h`, :math:`h = \lambda_s - \lambda_t`,

    .. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t + \alpha_s (1 - e^{-h})
              \Big(\hat x_t + \frac{1}{2 r} (\hat x_u - \hat x_t)\Big).

    So N steps of the grid are N network calls. The interval into the data and one that starts
    without signal are infinite in lambda: these are steps of their own, of order 1. So is one that
    is left over: the first, where such a step errs least, or the last of a grid that stops early.

    Args:
        rule: ``"midpoint"`` is the paper's, as above; ``"exact"`` integrates the line through the
            two estimates exactly (called "heun" in the authors' code).
    """

    rule: str = "exact"
    order: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.rule not in ("exact", "midpoint"):
            raise ValueError(f"rule={self.rule!r}: choose exact or midpoint")

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        levels = [schedule.level(t) for t in times]
        steps, i = list[Step](), 0
        for size in self._sizes(levels):
            t, u, s = times[i], times[i + 1], times[i + size]
            now, middle, end = levels[i], levels[i + 1], levels[i + size]
            stages: tuple[Stage, ...] = (first_order(t, now, middle),)
            if size == 2:
                nodes = [lam(middle), lam(now)]
                if self.rule == "exact":
                    weights = exponential_weights(nodes, lam(now), lam(end))
                else:
                    weights = midpoint_weights(lam(now), lam(middle), lam(end))[::-1]
                b = tuple(end.alpha * w for w in weights)
                stages = (*stages, first_order(u, now, end)._replace(b=b))
            steps.append(Step(t, s, stages))
            i += size
        return steps

    def _sizes(self, levels: list[Level]) -> list[int]:
        """How many intervals each step covers."""
        count = len(levels) - 1
        first = int(levels[0].alpha == 0)
        last = int(levels[-1].sigma == 0 and count > first)
        pairs, rest = divmod(count - first - last, 2)
        if last:
            return [1] * (first + rest) + [2] * pairs + [1]
        return [1] * first + [2] * pairs + [1] * rest


@dataclass(frozen=True)
class Restart(Sampler):
    r"""Restart sampling (Xu et al., 2023, https://arxiv.org/abs/2306.14878, one interval).

    The ODE is followed through an interval of the grid, :math:`t_i > \ldots > t_j`; then noise
    carries the state back,

    .. math:: x_{t_i} = \frac{\alpha_{t_i}}{\alpha_{t_j}} x_{t_j} + \Big(\sigma_{t_i}^2
              - \frac{\alpha_{t_i}^2}{\alpha_{t_j}^2} \sigma_{t_j}^2\Big)^{1/2} z,

    as q says, and the interval is walked again: errors of the way down are forgotten in part. The
    steps in the interval are the grid's, which must have two times in it or nothing is repeated.

    Args:
        inner: The method of each step, ``"heun"`` or ``"euler"``.
        restarts: How often the interval is walked again.
        sigma_min, sigma_max: The interval of sigma / alpha.
    """

    inner: str = "heun"
    restarts: int = 2
    sigma_min: float = 0.06
    sigma_max: float = 0.3

    def __post_init__(self) -> None:
        if self.inner not in ("heun", "euler"):
            raise ValueError(f"inner={self.inner!r}: choose heun or euler")
        if self.restarts < 1 or not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"restarts={self.restarts}, sigma_min={self.sigma_min}, sigma_max="
                f"{self.sigma_max}: restarts >= 1 and 0 < sigma_min < sigma_max are needed"
            )

    @property
    def order(self) -> int:
        return self._inner.order

    @property
    def _inner(self) -> Euler:
        return Heun() if self.inner == "heun" else Euler()

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = self._inner.table(schedule, times)
        levels = [schedule.level(t) for t in times]
        inside = [
            i
            for i, level in enumerate(levels)
            if self.sigma_min <= noise_scale(level) <= self.sigma_max
        ]
        if len(inside) < 2:
            return steps
        first, last = inside[0], inside[-1]
        renoise = forward_noise(levels[last], levels[first])
        again = steps[first:last]
        again[0] = again[0]._replace(t=times[last], renoise=renoise)
        return [*steps[:last], *(again * self.restarts), *steps[last:]]


@dataclass(frozen=True)
class PredictorCorrector(Sampler):
    r"""Ancestral steps, each followed by Langevin's (Song et al., 2021, algorithms 2 to 5).

    .. math:: x \leftarrow x + \epsilon \nabla \log p_s(x) + \sqrt{2 \epsilon}\, z
              = (1 - 2 r^2) x + 2 r^2 \alpha_s \hat x + 2 r \sigma_s z, \quad
              \epsilon = 2 r^2 \sigma_s^2

    (https://arxiv.org/abs/2011.13456). The paper has :math:`|z|^2 / |\nabla \log p|^2`
    in the place of sigma squared, over the whole batch: for noised data that is its mean, and with
    the constant a sample does not depend on its company. Langevin's steps of finite size keep not
    the variance V of a normal p_s, but :math:`V / (1 - r^2 \sigma_s^2 / V)`. Each is a network
    call; the step into the data has none.

    Args:
        r: The paper's "signal-to-noise ratio" of a step, in (0, 1).
        corrections: Langevin steps at each time.
    """

    r: float = 0.16
    corrections: int = 1
    order: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.r < 1 or self.corrections < 1:
            raise ValueError(
                f"r={self.r}, corrections={self.corrections}: 0 < r < 1 and corrections >= 1 "
                "are needed"
            )

    def table(self, schedule: Schedule, times: list[float]) -> list[Step]:
        steps = []
        for step in DDPM().table(schedule, times):
            alpha, sigma, _ = schedule.level(step.s)
            gain = 2 * self.r**2
            stage = Stage(step.s, 1 - gain, (gain * alpha,), 2 * self.r * sigma)
            count = self.corrections if sigma > 0 else 0
            steps += [step, *[Step(step.s, step.s, (stage,))] * count]
        return steps
