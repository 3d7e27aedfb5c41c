"""Denoisers known in closed form: the truth that samplers, losses and guidance are held against.

Each is a callable ``(x_t, t) -> x_hat`` for data of a known law, to be used wherever a bound
:class:`gendiff.Denoiser` is.
"""

from __future__ import annotations

from dataclasses import dataclass

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
