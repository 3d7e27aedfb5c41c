r"""Guidance: denoisers made of denoisers.

Classifier-free guidance (Ho & Salimans, 2022, https://arxiv.org/abs/2207.12598) moves the estimate
away from the unconditional one,

.. math:: \hat x = \hat x_\varnothing + w\, (\hat x_{cond} - \hat x_\varnothing),

with w = 1 the conditional model (in the paper's own count, 1 + w).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gendiff.denoiser import BoundDenoiser
from gendiff.errors import SamplingError


@dataclass(frozen=True)
class ClassifierFree:
    """Two network calls for each call: with and without the condition.

    Args:
        conditional: The denoiser bound to its condition.
        scale: w; 1 changes nothing and makes one call only, 0 is unconditional.
    """

    conditional: BoundDenoiser
    scale: float

    def __post_init__(self) -> None:
        if self.conditional.cond is None:
            raise SamplingError("guidance needs a condition, and this model has none. Use scale 1")

    @property
    def unconditional(self) -> BoundDenoiser:
        """The same network with its condition hidden."""
        cond = self.conditional.cond
        assert cond is not None
        hidden = torch.ones(self.conditional.space.batch_size, dtype=torch.bool)
        device = next(iter(cond.values.values())).device
        return replace(self.conditional, cond=cond.drop(hidden.to(device)))

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The guided estimate."""
        return self.with_variance(x_t, t)[0]

    def with_variance(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """The guided estimate, and the conditional model's learned variance."""
        x_hat, variance = self.conditional.with_variance(x_t, t)
        if self.scale == 1:
            return x_hat, variance
        return torch.lerp(self.unconditional(x_t, t), x_hat, self.scale), variance
