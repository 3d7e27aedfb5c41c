"""The data, the network and the measure: what needs torch."""

from __future__ import annotations

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.noise import derive_seed
from gendiff.spaces import Batch, Cond, Space

TRAINING = 1437  # of 1797; the same division as the image package's
INK = 8  # of a cell's 16 at most: what makes a point


class Data(torch.utils.data.Dataset[Any]):
    """Points where an 8x8 picture has ink, up to two a cell: (2, N) in [-1, 1]."""

    def __init__(self, split: str) -> None:
        pictures = load_digits()
        chosen = slice(TRAINING) if split == "train" else slice(TRAINING, None)
        self.digits = pictures.target[chosen].tolist()
        points = (torch.from_numpy(pictures.images[chosen]) / INK).round().long()
        self.cells = [  # (N, 2): row, column
            one.nonzero().repeat_interleave(one[one > 0], 0) for one in points
        ]

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        row, column = self.cells[index].T
        generator = torch.Generator().manual_seed(derive_seed("within", index, seed))
        within = 0.25 + 0.5 * torch.rand(2, len(row), generator=generator)
        points = torch.stack([column, 7 - row]) + within
        return points / 4 - 1, self.digits[index]


class Network(nn.Module):
    """A transformer on points; it has no positions, so their order means nothing."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.digit = nn.Embedding(11, width)  # the last: none is told
        self.noise = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Linear(2, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, F.gelu, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        live = space.project(torch.ones_like(x))[:, 0] > 0  # (B, N)
        digit = torch.full((len(x),), 10, device=x.device) if cond is None else cond["digit"]
        if cond is not None and cond.dropped is not None:
            digit = digit.masked_fill(cond.dropped, 10)
        known = (self.digit(digit) + self.noise(noise[:, None]))[:, None]
        h = self.first(x.transpose(1, 2)) + known
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=~live) + known
        return self.last(h).transpose(1, 2)


def separate(batch: Batch) -> list[Tensor]:
    """Each sample's points (2, N), without padding."""
    space: Any = batch.space
    return [x[:, :n] for x, n in zip(batch.x.cpu(), space.lengths.tolist(), strict=True)]


def pictures(batch: Batch) -> Tensor:
    """Points as blurred ink on a 12x12 grid, (B, 144), of unit length."""
    ticks = torch.linspace(-1, 1, 12)
    rows = []
    for points in separate(batch):
        near = (-((points[..., None] - ticks) / 0.2).square()).exp()  # (2, N, 12)
        rows.append(torch.einsum("ni,nj->ij", near[1], near[0]).flatten())
    return F.normalize(torch.stack(rows), dim=1)


def nearest_accuracy(samples: Batch, real: Batch) -> float:
    """The share of samples whose nearest real set is of their digit."""
    assert samples.cond is not None
    assert real.cond is not None
    nearest = (pictures(samples) @ pictures(real).T).argmax(1)
    return (real.cond["digit"][nearest] == samples.cond["digit"].cpu()).float().mean().item()
