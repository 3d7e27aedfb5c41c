r"""Exponential moving averages of a network's parameters.

.. math:: \bar\theta \leftarrow \bar\theta + (1 - d)(\theta - \bar\theta), \qquad
          d = 2^{-1 / \min(h,\, r k)}

with half-life h in steps, and warm-up: at step k the half-life is at most the share r of the
training so far, so that early averages are of use (Karras et al., 2022, appendix F). Buffers are
copied, not averaged.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class EMA:
    """The average of one network with one half-life.

    Args:
        module: The network in training.
        half_life_steps: h; 0 copies the parameters.
        warmup: r.
    """

    def __init__(self, module: nn.Module, half_life_steps: float, warmup: float = 0.05) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life_steps = half_life_steps
        self.warmup = warmup
        self._pairs(module)

    def _pairs(self, module: nn.Module) -> None:
        self._averages: list[Tensor] = list(self.module.parameters())
        self._sources = list(module.parameters())
        self._buffers = list(zip(self.module.buffers(), module.buffers(), strict=True))

    def decay(self, step: int) -> float:
        """D at step ``step``, counted from 1."""
        half_life = min(self.half_life_steps, self.warmup * step)
        return 0.5 ** (1 / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after step ``step``."""
        sources = [p.detach() for p in self._sources]
        torch._foreach_lerp_(self._averages, sources, 1 - self.decay(step))
        for average, source in self._buffers:
            average.copy_(source)
