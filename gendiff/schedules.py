r"""Noise schedules: ``t -> (alpha_t, sigma_t)``.

A schedule says how signal and noise are mixed at time t, from data (t = 0) to noise (t = 1):

.. math:: q(x_t | x) = \mathcal N(\alpha_t x, \sigma_t^2 I), \qquad
          x_t = \alpha_t x + \sigma_t \epsilon.

Its only intrinsic quantity is the signal-to-noise ratio :math:`snr = \alpha_t^2 / \sigma_t^2`,
which falls from infinity (all schedules here have :math:`\sigma_0 = 0`) with t: what a network
must remove depends on ``log_snr`` alone, and every sampler works in it. So each schedule also
gives ``log_snr(t)`` and its inverse. All are differentiable in t and accurate in float64.

================== =============================================== =============================
name                alpha, sigma                                    source
================== =============================================== =============================
``vp_linear``       :math:`\prod (1 - \beta_i)` at t = k/T          Ho et al., 2020
``cosine``          :math:`\cos, \sin`                              Nichol & Dhariwal, 2021
``polynomial``      :math:`\alpha \approx 1 - t^p`                  Hoogeboom et al., 2022
``ve``              :math:`1, \sigma_{min}\sqrt{r^{2t} - 1}`        Song et al., 2021
``edm``             :math:`1, \sigma_{max} t`                       Karras et al., 2022
``flow``            :math:`1 - t, t`                                Lipman et al.; Liu et al., 2023
================== =============================================== =============================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Level(NamedTuple):
    """A noise level, in Python floats."""

    alpha: float
    sigma: float
    log_snr: float


class Schedule(ABC):
    """A function of time; instances are frozen values."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at times in [0, 1], of the shape and dtype of ``t``."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), strictly falling; +inf at t = 0, may be -inf at t = 1."""

    @abstractmethod
    def inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which ``log_snr(t)`` has the given value."""

    def level(self, t: float) -> Level:
        """The noise level at one time, computed once in float64."""
        return _level(self, t)


@lru_cache(maxsize=8192)
def _level(schedule: Schedule, t: float) -> Level:
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule(time)
    return Level(alpha.item(), sigma.item(), schedule.log_snr(time).item())


# Gauss-Legendre nodes on [0, 1]; 12 integrate log(1 - beta(u)) of any published betas to 1e-15.
_NODES, _WEIGHTS = (torch.from_numpy(v) / 2 for v in np.polynomial.legendre.leggauss(12))
_NODES = _NODES + 0.5


@dataclass(frozen=True)
class VPLinear(Schedule):
    r"""The variance-preserving chain of DDPM, exact at t = k/T and smooth between.

    .. math:: \log \bar\alpha(k / T) = \sum_{i=1}^{k} \log(1 - \beta_i), \quad
              \beta_i = \beta_1 + \tfrac{i - 1}{T - 1} (\beta_T - \beta_1)

    (Ho et al., 2020, https://arxiv.org/abs/2006.11239, section 2). The sum is continued to real
    k = u by the Euler-Maclaurin formula, :math:`\int_0^u f - \tfrac12 [f]_0^u + \tfrac1{12}
    [f']_0^u - \tfrac1{720} [f''']_0^u`, whose remainder is below float64's rounding for
    :math:`T \ge 100`.

    Args:
        beta_start, beta_end: The first and the last beta, in (0, 1).
        steps: T.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.beta_start <= self.beta_end < 1 and self.steps >= 2):
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end}, steps={self.steps}: "
                "0 < beta_start <= beta_end < 1 and steps >= 2 are needed"
            )
        rise = (self.beta_end - self.beta_start) / (self.steps - 1)
        if 2 * self.beta_start <= rise:  # the continuation's beta at t = 0 is beta_1 - rise / 2
            raise ValueError(
                f"beta_start={self.beta_start}: more than half the step between betas, "
                f"{rise / 2:g}, is needed, or alpha would exceed 1 near t = 0. Raise "
                "steps"
            )

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log(alpha_t^2), 0 at t = 0."""
        slope = (self.beta_end - self.beta_start) / (self.steps - 1)
        u = t.double() * self.steps
        nodes, weights = _NODES.to(u.device), _WEIGHTS.to(u.device)
        integral = u * (torch.log1p(-self.beta_start - slope * u[..., None] * nodes) @ weights)
        p, p0 = 1 - self.beta_start - slope * u, 1 - self.beta_start
        rise = slope * u / p0  # every difference below as a multiple of u: no cancellation
        ends = torch.log1p(-rise) / 2
        first = -slope * rise / p / 12
        third = -(slope**3) * rise * (p * p + p * p0 + p0 * p0) / (p**3 * p0**2) / 360
        return integral - ends + first - third

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self.log_alpha_bar(t)
        alpha, variance = torch.exp(log_alpha_bar / 2), -torch.expm1(log_alpha_bar)
        return alpha.to(t), _sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        target = -torch.nn.functional.softplus(-log_snr.double())  # log(alpha^2)
        # Newton on log_alpha_bar, from the solution for the integral of beta alone.
        b, c = self.beta_start * self.steps, (self.beta_end - self.beta_start) * self.steps
        t = -2 * target / (b + (b * b - 2 * c * target).sqrt())
        slope = (self.beta_end - self.beta_start) / (self.steps - 1)
        for _ in range(12):
            rate = self.steps * torch.log1p(-self.beta_start - slope * (t * self.steps - 0.5))
            t = t - (self.log_alpha_bar(t) - target) / rate
        return t.to(log_snr)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Cosine schedule, :math:`\bar\alpha(t) \propto \cos^2(\frac\pi2 \frac{t + s}{1 + s})`.

    Nichol & Dhariwal, 2021 (https://arxiv.org/abs/2102.09672, eq. 17), normalised to 1 at t = 0.
    Their clip of the last beta keeps the chain off zero signal; here time is stretched so that it
    ends at ``min_log_snr``. With ``-inf`` the formula is exact to the end (zero terminal SNR),
    where ``eps`` prediction is undefined.

    Args:
        offset: s.
        min_log_snr: log-SNR at t = 1.
    """

    offset: float = 0.008
    min_log_snr: float = -20.0

    def __post_init__(self) -> None:
        if not (0 < self.offset < 1 and self.min_log_snr <= 0):
            raise ValueError(
                f"offset={self.offset}, min_log_snr={self.min_log_snr}: "
                "0 < offset < 1 and min_log_snr <= 0 are needed"
            )

    @property
    def _first(self) -> float:
        return math.pi / 2 * self.offset / (1 + self.offset)

    def _alpha_bar_to_angle(self, alpha_bar: Tensor) -> Tensor:
        return torch.acos(alpha_bar.sqrt() * math.cos(self._first))

    @property
    def _span(self) -> float:
        end = torch.tensor(self.min_log_snr, dtype=torch.float64).sigmoid()
        return float(self._alpha_bar_to_angle(end)) - self._first

    def _alpha_bar(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha^2 and sigma^2; the latter as a product of sines, exact where it is small."""
        step = t.double() * self._span
        norm = math.cos(self._first) ** 2
        alpha_bar = torch.cos(self._first + step) ** 2 / norm
        variance = torch.sin(step) * torch.sin(step + 2 * self._first) / norm
        if math.isinf(self.min_log_snr):  # cos(pi / 2) is 6e-17 in floating point
            alpha_bar = torch.where(t.double() == 1, 0.0, alpha_bar)
        return alpha_bar, variance

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar, variance = self._alpha_bar(t)
        return _sqrt(alpha_bar).to(t), _sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        alpha_bar, variance = self._alpha_bar(t)
        return (torch.log(alpha_bar) - torch.log(variance)).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        value = log_snr.double()
        # From sigma^2 = sin(step) sin(step + 2a) / cos(a)^2, with a the first angle: the cosine
        # of the angle near noise, its sine near data, each where it loses no digits.
        near_noise = self._alpha_bar_to_angle(value.sigmoid()) - self._first
        variance = (-value).sigmoid() * math.cos(self._first) ** 2
        sine = _sqrt(variance + math.sin(self._first) ** 2)
        near_data = 2 * torch.asin(
            (
                variance
                / (sine + math.sin(self._first))
                / 2
                / torch.cos((torch.asin(sine.clamp(max=1)) + self._first) / 2)
            ).clamp(max=1)
        )
        return (torch.where(value < 0, near_noise, near_data) / self._span).to(log_snr)


@dataclass(frozen=True)
class Polynomial(Schedule):
    r"""Variance preserving with :math:`\alpha^2 = s + (1 - s)(1 - t^p)^2`.

    Hoogeboom et al., 2022 (https://arxiv.org/abs/2203.17003, appendix B), who take
    :math:`(1 - 2s)(1 - t^p)^2 + s`: the same at t = 1, and the data themselves at t = 0.

    Args:
        power: p.
        floor: s, alpha^2 at t = 1.
    """

    power: float = 2.0
    floor: float = 1e-5

    def __post_init__(self) -> None:
        if not (self.power > 0 and 0 < self.floor < 1):
            raise ValueError(
                f"power={self.power}, floor={self.floor}: power > 0 and 0 < floor < 1 are needed"
            )

    def _alpha_bar(self, t: Tensor) -> tuple[Tensor, Tensor]:
        u = t.double() ** self.power
        return self.floor + (1 - self.floor) * (1 - u) ** 2, (1 - self.floor) * u * (2 - u)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar, variance = self._alpha_bar(t)
        return alpha_bar.sqrt().to(t), _sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        alpha_bar, variance = self._alpha_bar(t)
        return (alpha_bar.log() - variance.log()).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        share = (-log_snr.double()).sigmoid() / (1 - self.floor)  # u (2 - u)
        rest = (log_snr.double().sigmoid() - self.floor) / (1 - self.floor)  # (1 - u)^2
        u = torch.where(share < 0.5, share / (1 + _sqrt(1 - share)), 1 - _sqrt(rest))
        return (u ** (1 / self.power)).to(log_snr)


@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding, :math:`\sigma_t = \sigma_{min} \sqrt{r^{2t} - 1}`, r the ratio.

    The transition kernel of the VE SDE (Song et al., 2021, https://arxiv.org/abs/2011.13456,
    eq. 29 and 31); often quoted without the -1, which matters near the data only.

    Args:
        sigma_min, sigma_max: The SDE's noise scales; r = sigma_max / sigma_min.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: "
                "0 < sigma_min < sigma_max is needed"
            )

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.sigma_min * _sqrt(torch.expm1(self._rate * t.double()))
        return torch.ones_like(t), sigma.to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_variance = torch.log(torch.expm1(self._rate * t.double()))
        return (-2 * math.log(self.sigma_min) - log_variance).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        ratio = torch.exp(-log_snr.double()) / self.sigma_min**2
        return (torch.log1p(ratio) / self._rate).to(log_snr)


@dataclass(frozen=True)
class EDM(Schedule):
    r""":math:`\alpha_t = 1`, :math:`\sigma_t = \sigma_{max} t` (Karras et al., 2022).

    https://arxiv.org/abs/2206.00364, section 3: the noise scale itself is the time.

    Args:
        sigma_max: Noise scale at t = 1, in units of the data.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not self.sigma_max > 0:
            raise ValueError(f"sigma_max={self.sigma_max}: a positive number is needed")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(self.sigma_max * t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr / 2) / self.sigma_max


@dataclass(frozen=True)
class Flow(Schedule):
    r"""Rectified flow / flow matching: :math:`\alpha_t = 1 - t`, :math:`\sigma_t = t`.

    Liu et al., 2023 (https://arxiv.org/abs/2209.03003); Lipman et al., 2023, with t reversed.
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class Parts(Schedule):
    """A schedule for each part of the state: values of shape (B, P) for times (B,).

    Args:
        schedules: One for each of the space's ``parts``.
    """

    schedules: tuple[Schedule, ...]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alphas, sigmas = zip(*(schedule(t) for schedule in self.schedules), strict=True)
        return torch.stack(alphas, -1), torch.stack(sigmas, -1)

    def log_snr(self, t: Tensor) -> Tensor:
        return torch.stack([schedule.log_snr(t) for schedule in self.schedules], -1)

    def inverse(self, log_snr: Tensor) -> Tensor:
        raise ValueError("parts reach one log-SNR at different times; use a grid uniform in time")


def _sqrt(value: Tensor) -> Tensor:
    """Square root of a number that rounding may have made slightly negative."""
    return value.clamp(min=0).sqrt()


SCHEDULES: dict[str, type[Schedule]] = {
    "vp_linear": VPLinear,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
}
