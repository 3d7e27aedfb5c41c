"""Denoisers known in closed form: the truth that samplers, losses and guidance are held against.

Each is a callable ``(x_t, t) -> x_hat`` for data of a known law, to be used wherever a bound
:class:`gendiff.Denoiser` is. :class:`ExactNetwork` is the network that a denoiser would need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gendiff.schedules import Schedule
from gendiff.spaces import Space


def _times(t: float | Tensor, space: Space) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64).expand(space.batch_size)


@dataclass(frozen=True)
class Gaussian:
    r"""Data :math:`x \sim \mathcal N(\mu, v P)`, P the space's projection.

    .. math:: \hat x = \mu + \frac{\alpha v}{\alpha^2 v + \sigma^2} (x_t - \alpha \mu)

    Args:
        schedule: The schedule.
        space: Any space.
        mean: Of the batch's shape, inside the subspace.
        variance: v, one number, or (P,) for a number a part.
    """

    schedule: Schedule
    space: Space
    mean: Tensor
    variance: float | tuple[float, ...]

    def _rows(self, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.schedule(_times(t, self.space))
        v = torch.as_tensor(self.variance, dtype=torch.float64)
        if v.ndim and alpha.ndim == 1:
            alpha, sigma = alpha[:, None], sigma[:, None]
        alpha, sigma, v = torch.broadcast_tensors(alpha, sigma, v)
        return self.space.expand(alpha), self.space.expand(sigma), self.space.expand(v)

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """E[x | x_t]."""
        alpha, sigma, v = self._rows(t)
        gain = alpha * v / (alpha**2 * v + sigma**2)
        return self.mean + gain.to(x_t) * (x_t - alpha.to(x_t) * self.mean)

    def flow(self, x_t: Tensor, t: float, s: float) -> Tensor:
        """Where the probability-flow ODE carries ``x_t`` from t to s."""
        (alpha_t, sigma_t, v), (alpha_s, sigma_s, _) = self._rows(t), self._rows(s)
        growth = ((alpha_s**2 * v + sigma_s**2) / (alpha_t**2 * v + sigma_t**2)).sqrt()
        return alpha_s * self.mean + growth * (x_t - alpha_t * self.mean)


@dataclass(frozen=True)
class Mixture:
    r"""Data from a mixture of isotropic Gaussians in D dimensions; x is (B, D).

    With standard deviation 0 the data are points, as for an empirical data set.

    Args:
        schedule: The schedule.
        means: (K, D).
        stds: (K,).
        weights: (K,), adding to 1.
    """

    schedule: Schedule
    means: Tensor
    stds: Tensor
    weights: Tensor

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """E[x | x_t]."""
        time = torch.as_tensor(t, dtype=torch.float64).expand(len(x_t))
        alpha, sigma = (v.to(x_t)[:, None] for v in self.schedule(time))
        variance = alpha**2 * self.stds**2 + sigma**2  # (B, K)
        offset = x_t[:, None] - alpha[..., None] * self.means  # (B, K, D)
        log_p = -offset.square().sum(-1) / (2 * variance)
        log_p = log_p - x_t.shape[1] / 2 * variance.log() + self.weights.log()
        gain = alpha * self.stds**2 / variance
        posterior_means = self.means + gain[..., None] * offset
        return (log_p.softmax(1)[..., None] * posterior_means).sum(1)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of the data, (count, D), and their components, (count,)."""
        component = torch.multinomial(self.weights, count, True, generator=generator)
        z = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.stds[component, None] * z, component


class ExactNetwork:
    """The backbone of each prediction for a denoiser known in closed form.

    The targets are written as in the papers, for x = (x_t - sigma eps) / alpha known.

    Args:
        prediction: A key of :data:`gendiff.denoiser.PREDICTIONS`.
        schedule: The schedule.
        denoiser: ``(x_t, t) -> x_hat``.
        std: The data's standard deviation, as :class:`gendiff.Denoiser` has it.
    """

    def __init__(
        self, prediction: str, schedule: Schedule, denoiser: Callable[..., Tensor], std: float
    ) -> None:
        self.prediction, self.schedule = prediction, schedule
        self.denoiser, self.std = denoiser, std
        self.inputs: list[Tensor] = []

    def __call__(self, x: Tensor, noise: Tensor, cond: Any, space: Space) -> Tensor:
        """F of the prediction, for the scaled input; keeps the input."""
        self.inputs.append(x)
        t = self.schedule.inverse(-8 * noise)
        alpha, sigma = (space.expand(v) for v in self.schedule(t))
        x_t = x * torch.sqrt(self.std**2 * alpha**2 + sigma**2)
        x_hat = self.denoiser(x_t, t)
        if self.prediction == "x":
            return x_hat
        eps_hat = (x_t - alpha * x_hat) / sigma
        if self.prediction == "eps":
            return eps_hat
        if self.prediction == "flow":
            return eps_hat - x_hat
        if self.prediction == "v":  # of the angle phi = atan(sigma / alpha)
            phi = torch.atan2(sigma, alpha)
            return torch.cos(phi) * eps_hat - torch.sin(phi) * x_hat
        # EDM's table 1, for y = x_t / alpha at noise scale sigma / alpha
        y, scale, std = x_t / alpha, sigma / alpha, self.std
        c_skip = std**2 / (scale**2 + std**2)
        c_out = scale * std / torch.sqrt(scale**2 + std**2)
        return (x_hat - c_skip * y) / c_out


def slope(errors: Sequence[float], counts: Sequence[int]) -> float:
    """Order of convergence: minus the least-squares slope of log error over log count."""
    x, y = torch.tensor(counts).double().log(), torch.tensor(errors).double().log()
    x = x - x.mean()
    return -float((x @ y) / (x @ x))
