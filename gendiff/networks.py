"""A backbone for modalities that need no better: numbers in no order, told some classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.spaces import Cond, Space


class MLP(nn.Module):
    r"""Residual layers on the numbers of a sample, for :class:`gendiff.Dense` spaces.

    Args:
        shape: Of one sample, (C, \*).
        classes: How many classes each condition has.
        hidden: Width of the layers.
        layers: How many there are, beside the first and the last.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: Mapping[str, int] | None = None,
        hidden: int = 64,
        layers: int = 3,
    ) -> None:
        super().__init__()
        size = math.prod(shape)
        self.classes = nn.ModuleDict(  # the last row of each stands for "not told"
            {name: nn.Embedding(count + 1, hidden) for name, count in (classes or {}).items()}
        )
        self.noise = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.first, self.last = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        r"""See :meth:`gendiff.Modality.backbone`; x is (B, C, \*), noise (B,)."""
        known = self.noise(noise[:, None])
        for name, embedding in self.classes.items():
            assert cond is not None
            assert isinstance(embedding, nn.Embedding)
            told = cond[name]
            if cond.dropped is not None:
                told = told.masked_fill(cond.dropped, embedding.num_embeddings - 1)
            known = known + embedding(told)
        h = self.first(x.flatten(1))
        for layer in self.layers:
            h = h + F.silu(layer(h + known))
        out: Tensor = self.last(h)
        return out.reshape(x.shape)
