r"""Variance-preserving chains, given by their betas at the steps k = 1 … T.

.. math:: q(x_k | x_{k-1}) = \mathcal N(\sqrt{1 - \beta_k}\, x_{k-1}, \beta_k I), \quad
          \log \bar\alpha_k = \sum_{i=1}^k \log(1 - \beta_i), \quad
          \alpha^2 = \bar\alpha_k, \; \sigma^2 = 1 - \bar\alpha_k \text{ at } t = k / T.

With :math:`f(j) = \log(1 - \beta_{j+1})` the Euler-Maclaurin formula continues the sum to real
k = u, without a step between the steps,

.. math:: \log \bar\alpha(u) = \int_0^u f - \tfrac12 f' + \tfrac1{12} f''
          - \tfrac1{720} f^{(4)},

up to a remainder below float64's rounding for the published chains (:math:`f^{(6)} / 30240` in
the integral): exact at every k, and with one and the same beta(u) from u - 1 to u.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from gendiff.levels import Schedule, sqrt

# Gauss-Legendre nodes on [0, 1]; 40 integrate a logistic curve over 12 units to 1e-15.
_NODES, _WEIGHTS = (torch.from_numpy(v) / 2 for v in np.polynomial.legendre.leggauss(40))
_NODES = _NODES + 0.5


class Chain(Schedule):
    """A chain of ``steps`` steps; see the module."""

    steps: int

    @abstractmethod
    def _rate(self, u: Tensor) -> Tensor:
        """The derivative of log(alpha-bar) by u: the integrand of the module's formula."""

    @abstractmethod
    def _guess(self, target: Tensor) -> Tensor:
        """About the time at which log(alpha-bar) is ``target``."""

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log(alpha_t^2), 0 at t = 0."""
        u = t.double() * self.steps
        nodes, weights = _NODES.to(u.device), _WEIGHTS.to(u.device)
        return u * (self._rate(u[..., None] * nodes) @ weights)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_alpha_bar = self.log_alpha_bar(t)
        alpha, variance = torch.exp(log_alpha_bar / 2), -torch.expm1(log_alpha_bar)
        return alpha.to(t), sqrt(variance).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))).to(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        target = -softplus(-log_snr.double())  # log(alpha^2)
        t = self._guess(target)
        for _ in range(8):  # Newton, on a concave function
            t = t - (self.log_alpha_bar(t) - target) / (self.steps * self._rate(t * self.steps))
        return t.to(log_snr)


@dataclass(frozen=True)
class VPLinear(Chain):
    r"""The chain of DDPM (Ho et al., 2020, https://arxiv.org/abs/2006.11239, section 2).

    .. math:: \beta_i = \beta_1 + \tfrac{i - 1}{T - 1} (\beta_T - \beta_1)

    Args:
        beta_start, beta_end: The first and the last beta, in (0, 1).
        steps: T, for exactness to rounding at least 100.
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
        if 2 * self.beta_start <= self._rise:  # the continuation's beta at t = 0
            raise ValueError(
                f"beta_start={self.beta_start}: more than half the step between betas, "
                f"{self._rise / 2:g}, is needed, or alpha would exceed 1 near t = 0. Raise "
                "steps"
            )

    @property
    def _rise(self) -> float:
        return (self.beta_end - self.beta_start) / (self.steps - 1)

    def _rate(self, u: Tensor) -> Tensor:
        beta = self.beta_start + self._rise * u
        q = self._rise / (1 - beta)
        return torch.log1p(-beta) + q / 2 - q**2 / 12 + q**4 / 120

    def _guess(self, target: Tensor) -> Tensor:
        # The solution for the integral of beta alone.
        b, c = self.beta_start * self.steps, (self.beta_end - self.beta_start) * self.steps
        return -2 * target / (b + (b * b - 2 * c * target).sqrt())


@dataclass(frozen=True)
class SigmoidBetas(Chain):
    r"""The chain of GeoDiff (Xu et al., 2022, https://arxiv.org/abs/2203.02923, appendix).

    .. math:: \beta_i = \beta_{start} + (\beta_{end} - \beta_{start})\, \mathrm{sigmoid}(x_i),
              \quad x_i = -6 + 12 \tfrac{i - 1}{T - 1}

    Args:
        beta_start, beta_end: What the betas would reach if x went on for ever; in (0, 1).
        steps: T, for exactness to rounding at least 1000.
    """

    beta_start: float = 1e-7
    beta_end: float = 2e-3
    steps: int = 5000

    def __post_init__(self) -> None:
        if not (0 < self.beta_start < self.beta_end < 1 and self.steps >= 10):
            raise ValueError(
                f"beta_start={self.beta_start}, beta_end={self.beta_end}, steps={self.steps}: "
                "0 < beta_start < beta_end < 1 and steps >= 10 are needed"
            )

    def _rate(self, u: Tensor) -> Tensor:
        h, span = 12 / (self.steps - 1), self.beta_end - self.beta_start
        x = h * u - 6
        # f = log(1 - beta_start) + softplus(x + log r) - softplus(x), whose derivatives are
        # differences of the logistic function's: s, d = s (1 - s), and the third, d (1 - 6 d).
        log_r = np.log1p(-self.beta_end) - np.log1p(-self.beta_start)
        a, b = torch.sigmoid(x + log_r), torch.sigmoid(x)
        da, db = a * (1 - a), b * (1 - b)
        fourth = da * (1 - 6 * da) - db * (1 - 6 * db)
        return (
            torch.log1p(-self.beta_start - span * b)
            - h * (a - b) / 2
            + h**2 * (da - db) / 12
            - h**4 * fourth / 720
        )

    def _guess(self, target: Tensor) -> Tensor:
        # The integral of each of beta's two terms alone is less than the target.
        h, span = 12 / (self.steps - 1), self.beta_end - self.beta_start
        area = softplus(torch.tensor(-6.0).double()) - target * h / span
        x = area + torch.log(-torch.expm1(-area))  # the inverse of softplus
        return torch.minimum((x + 6) / h, -target / self.beta_start) / self.steps


@dataclass(frozen=True)
class SohlDickstein(Schedule):
    r"""The original: :math:`\beta_k = 1 / (T - k + 1)`, :math:`\bar\alpha = 1 - t`.

    Sohl-Dickstein et al., 2015 (https://arxiv.org/abs/1503.03585, section 2.4.1, for binomial
    data): each step erases the share 1 / T of the first signal (here, of its power), for the
    product of :math:`1 - \beta_i = (T - i) / (T - i + 1)` is :math:`1 - k / T`. That is one
    function of t = k / T whatever T is, so a chain of more steps visits more points of the same
    curve, and between the steps there is no choice. The last beta is 1: no signal is left at
    t = 1, where ``eps`` prediction is undefined.
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return sqrt(1 - t), sqrt(t)

    def log_snr(self, t: Tensor) -> Tensor:
        return torch.log1p(-t) - torch.log(t)

    def inverse(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr)
