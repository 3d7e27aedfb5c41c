"""Data and network: what needs torch."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gendiff


class Data(torch.utils.data.Dataset[Any]):
    """Waveforms x (1, length) of any phase, with the number of their shape."""

    def __init__(self, length: int, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        phase = torch.rand(count, 1, 1, generator=generator)
        turn = (phase + torch.linspace(0, 2, length + 1)[:-1]) % 1
        sine = (2 * math.pi * turn).sin()
        self.x = torch.stack([sine, sine.sign(), 2 * turn - 1])

    def __len__(self) -> int:
        return self.x.shape[1]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, int]]:
        index, shape = key[0], key[0] % 3
        return self.x[shape, index], {"shape": shape}


class Network(nn.Module):
    """Residual convolutions on a circle, told the noise level and the shape."""

    def __init__(self, hidden: int, shapes: int) -> None:
        super().__init__()
        self.shape = nn.Embedding(shapes + 1, hidden)  # the last stands for "not told"
        self.noise = nn.Sequential(nn.Linear(1, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.first, self.last = nn.Conv1d(1, hidden, 1), nn.Conv1d(hidden, 1, 1)
        self.convs = nn.ModuleList(
            nn.Conv1d(hidden, hidden, 3, 1, 2**i, 2**i, padding_mode="circular") for i in range(5)
        )

    def forward(self, x: Tensor, noise: Tensor, cond: Any, space: Any) -> Tensor:
        shape = cond["shape"]
        if cond.dropped is not None:  # now and then the engine hides the condition: guidance
            shape = shape.masked_fill(cond.dropped, self.shape.num_embeddings - 1)
        known = (self.shape(shape) + self.noise(noise[:, None]))[..., None]
        h = self.first(x)
        for conv in self.convs:
            h = h + F.silu(conv(h + known))
        return self.last(h)


def nearest_accuracy(samples: gendiff.Batch, real: gendiff.Batch) -> float:
    """The share of samples whose nearest real waveform has their shape."""
    assert samples.cond is not None
    assert real.cond is not None
    nearest = torch.cdist(samples.x.flatten(1), real.x.flatten(1)).argmin(1)
    return (real.cond["shape"][nearest] == samples.cond["shape"]).float().mean().item()
