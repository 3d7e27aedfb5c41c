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
``sigmoid``         the same, other betas                           Xu et al., 2022 (GeoDiff)
``sohl_dickstein``  :math:`\sqrt{1 - t}, \sqrt t`                    Sohl-Dickstein et al., 2015
``cosine``          :math:`\cos, \sin`                              Nichol & Dhariwal, 2021
``polynomial``      :math:`\alpha \approx 1 - t^p`                  Hoogeboom et al., 2022
``ve``              :math:`1, \sigma_{min}\sqrt{r^{2t} - 1}`        Song et al., 2021
``edm``             :math:`1, \sigma_{max} t`                       Karras et al., 2022
``flow``            :math:`1 - t, t`                                Lipman et al.; Liu et al., 2023
``shifted``         of a schedule, its log-SNR moved                Hoogeboom et al., 2023
``zero_terminal``   of a schedule, its signal brought to 0          Lin et al., 2023
================== =============================================== =============================

The first three are chains and have a file of their own, :mod:`gendiff.chains`; the last two wrap
another schedule: ``{name: shifted, of: {name: cosine}, shift: -1.4}``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gendiff.chains import SigmoidBetas, SohlDickstein, VPLinear
from gendiff.levels import Level, Schedule, sqrt


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
        return sqrt(alpha_bar).to(t), sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        alpha_bar, variance = self._alpha_bar(t)
        return (torch.log(alpha_bar) - torch.log(variance)).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        value = log_snr.double()
        # From sigma^2 = sin(step) sin(step + 2a) / cos(a)^2, with a the first angle: the cosine
        # of the angle near noise, its sine near data, each where it loses no digits.
        near_noise = self._alpha_bar_to_angle(value.sigmoid()) - self._first
        variance = (-value).sigmoid() * math.cos(self._first) ** 2
        sine = sqrt(variance + math.sin(self._first) ** 2)
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
        return alpha_bar.sqrt().to(t), sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        alpha_bar, variance = self._alpha_bar(t)
        return (alpha_bar.log() - variance.log()).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        share = (-log_snr.double()).sigmoid() / (1 - self.floor)  # u (2 - u)
        rest = (log_snr.double().sigmoid() - self.floor) / (1 - self.floor)  # (1 - u)^2
        u = torch.where(share < 0.5, share / (1 + sqrt(1 - share)), 1 - sqrt(rest))
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
        sigma = self.sigma_min * sqrt(torch.expm1(self._rate * t.double()))
        return torch.ones_like(t), sigma.to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_variance = torch.log(torch.expm1(self._rate * t.double()))
        return (-2 * math.log(self.sigma_min) - log_variance).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        ratio = torch.exp(-log_snr.double()) / self.sigma_min**2
        return (torch.log1p(ratio) / self._rate).to(log_snr)

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), torch.exp(-log_snr / 2)


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

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), torch.exp(-log_snr / 2)


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

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(log_snr / 2), torch.sigmoid(-log_snr / 2)


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


@dataclass(frozen=True)
class Shifted(Schedule):
    r"""A schedule of the same kind with :math:`\log snr(t)` moved by a number.

    Hoogeboom et al., 2023 (simple diffusion, https://arxiv.org/abs/2301.11093, eq. 4): pictures
    of d pixels a side average noise away better than those of d' for which a schedule was
    found good, so they need the shift :math:`2 \log(d' / d)`, less than 0 for d > d'. Under
    ``flow`` this is the time shift of Stable Diffusion 3 (Esser et al., 2024,
    https://arxiv.org/abs/2403.03206, eq. 23), :math:`t' = m t / (1 + (m - 1) t)` with
    :math:`shift = -2 \log m`. The shift is part of the process: nothing else may shift again.

    Args:
        of: The schedule.
        shift: Added to the log-SNR; negative is more noise.
    """

    of: Schedule
    shift: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(f"shift={self.shift}: a finite number is needed")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.of.scales(self.log_snr(t))

    def log_snr(self, t: Tensor) -> Tensor:
        return self.of.log_snr(t) + self.shift

    def inverse(self, log_snr: Tensor) -> Tensor:
        return self.of.inverse(log_snr - self.shift)

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return self.of.scales(log_snr)


@dataclass(frozen=True)
class ZeroTerminal(Schedule):
    r"""A variance-preserving schedule whose signal is brought to exactly 0 at t = 1.

    .. math:: \alpha'_t = \frac{\alpha_t - \alpha_1}{1 - \alpha_1}, \quad
              \sigma'^2_t = 1 - \alpha'^2_t

    Lin et al., 2023 (https://arxiv.org/abs/2305.08891, algorithm 1). They keep alpha at the
    chain's first step; here it is kept at t = 0, the step before, as else alpha would exceed 1
    there. At t = 1 ``eps`` prediction is undefined.

    Args:
        of: The schedule.
    """

    of: Schedule

    def __post_init__(self) -> None:
        for t in (0.5, 1.0):
            alpha, sigma, _ = self.of.level(t)
            if abs(alpha**2 + sigma**2 - 1) > 1e-6:
                raise ValueError(
                    "of: a variance-preserving schedule (alpha^2 + sigma^2 = 1) is needed"
                )

    def _moved(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha' and sigma'^2; no difference of numbers that are near each other near the data."""
        end = self.of.level(1.0)
        alpha, sigma = self.of(t.double())
        rest = end.sigma**2 / (1 + end.alpha)  # 1 - alpha_1
        moved = ((alpha - end.alpha) / rest).clamp(min=0)
        moved = torch.where(t.double() == 1, 0.0, moved)  # alpha_1 may differ by a rounding
        return moved, sigma**2 / (1 + alpha) / rest * (1 + moved)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, variance = self._moved(t)
        return alpha.to(t), sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        alpha, variance = self._moved(t)
        return (2 * torch.log(alpha) - torch.log(variance)).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        end = self.of.level(1.0)
        rest = end.sigma**2 / (1 + end.alpha)
        moved, sigma = super().scales(log_snr.double())
        alpha = end.alpha + rest * moved
        variance = rest * sigma**2 / (1 + moved) * (1 + alpha)  # (1 - alpha) (1 + alpha)
        return self.of.inverse(2 * torch.log(alpha) - torch.log(variance)).to(log_snr)


SCHEDULES: dict[str, type[Schedule]] = {
    "vp_linear": VPLinear,
    "sigmoid": SigmoidBetas,
    "sohl_dickstein": SohlDickstein,
    "cosine": Cosine,
    "polynomial": Polynomial,
    "ve": VE,
    "edm": EDM,
    "flow": Flow,
    "shifted": Shifted,
    "zero_terminal": ZeroTerminal,
}

__all__ = [
    "EDM",
    "SCHEDULES",
    "VE",
    "Cosine",
    "Flow",
    "Level",
    "Parts",
    "Polynomial",
    "Schedule",
    "Shifted",
    "SigmoidBetas",
    "SohlDickstein",
    "VPLinear",
    "ZeroTerminal",
]
