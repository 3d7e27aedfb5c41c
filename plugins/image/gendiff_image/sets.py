"""What a set of images is, whatever it was read from."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

Pixels = NDArray[np.uint8]


class Source(Protocol):
    """Images by number, uint8 (C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pixels: ...


@dataclass(frozen=True)
class Split:
    """One split: images, their classes (N,) if they have any, and the value that means white."""

    images: Source
    labels: NDArray[np.int64] | None
    peak: int = 255

    def tensor(self, limit: int) -> tuple[Tensor, Tensor | None]:
        """Up to ``limit`` images, evenly spread over the split: x (n, C, H, W), labels (n,)."""
        count = min(limit, len(self.images))
        chosen = np.arange(count) * len(self.images) // count
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            x = np.stack(list(pool.map(self.images.__getitem__, chosen.tolist())))
        labels = None if self.labels is None else torch.from_numpy(self.labels[chosen])
        return torch.from_numpy(to_unit(x, self.peak)), labels


@dataclass(frozen=True)
class Data:
    """A data set: both splits and what is known about them; ``content`` names what was read."""

    train: Split
    test: Split
    class_names: list[str] | None
    content: str
    levels: int = 256
    warnings: tuple[str, ...] = ()


def to_unit(pixels: Pixels, peak: int) -> NDArray[np.float32]:
    """0 … ``peak`` to [-1, 1], float32, any shape."""
    return np.multiply(pixels, np.float32(2 / peak), dtype=np.float32, order="C") - np.float32(1)


def fit(images: Pixels, size: tuple[int, int] | None, color: str | None) -> Pixels:
    """Converts the colour of images (N, C, H, W), resizes the shorter side, crops the centre."""
    x = torch.from_numpy(images)
    if color == "rgb" and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1)
    elif color == "grey" and x.shape[1] == 3:
        x = tvf.rgb_to_grayscale(x)
    if size is not None and tuple(x.shape[2:]) != size:
        scale = max(size[0] / x.shape[2], size[1] / x.shape[3])
        near = [max(s, round(n * scale)) for s, n in zip(size, x.shape[2:], strict=True)]
        chunks = [tvf.resize(part, near, antialias=True) for part in x.split(4096)]
        x = torch.cat([tvf.center_crop(part, list(size)) for part in chunks])
    return np.ascontiguousarray(x.numpy())
