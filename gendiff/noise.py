"""Random numbers as functions of what they are for, never of when they are drawn.

There is no generator state anywhere in gendiff. A stream is named by integers, a seed first, and
the noise that it gives depends on these names alone: sample 17 is the same sample at any batch
size, and a resumed training step draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def derive_seed(*names: int | str) -> int:
    """Hashes a sequence of integers and strings to a 63-bit seed (BLAKE2b)."""
    digest = hashlib.blake2b(digest_size=8)
    for name in names:
        data = name.encode() if isinstance(name, str) else struct.pack("<q", name)
        digest.update(struct.pack("<I", len(data)) + data)
    return int.from_bytes(digest.digest(), "little") >> 1


def generator(*names: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by ``derive_seed(*names)``."""
    return torch.Generator(device).manual_seed(derive_seed(*names))


class NoiseSource(Protocol):
    """Gives unit normal noise for the rows of a batch."""

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        """Noise of shape (sum of ``rows``, *width); ``rows[i]`` of them belong to sample i."""
        ...


@dataclass(frozen=True)
class Streams:
    """One stream per sample: the noise of a sample is a function of (seed, sample id, draw).

    Drawn on the CPU in float32, because seeded CUDA output depends on the card.

    Args:
        seed: The seed that the user chose.
        ids: Sample ids, one for each sample of the batch.
        device: Where the noise is needed.
        dtype: Its dtype.
    """

    seed: int
    ids: tuple[int, ...]
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        """See :class:`NoiseSource`. ``draw`` numbers the draws: 0 the start, then one a step."""
        if len(rows) != len(self.ids):
            raise ValueError(f"{len(self.ids)} streams for {len(rows)} samples")
        seeds = [derive_seed("sample", self.seed, sample, draw) for sample in self.ids]
        return _drawn(seeds, rows, width, torch.device("cpu"), self.dtype).to(self.device)


@dataclass(frozen=True)
class StepNoise:
    """One stream per sample of a training step: a function of (seed, step, position).

    The position is a sample's place in the step's whole batch, so the noise is the same however
    that batch is cut into parts and dealt out to processes. Drawn on the device: what a card draws
    need not be what another would.

    Args:
        seed: The run's seed; ``draw`` is the step.
        first: Position of this part's first sample in the whole batch.
        device: Where the noise is drawn and needed.
        dtype: Its dtype.
    """

    seed: int
    first: int = 0
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        """See :class:`NoiseSource`."""
        seeds = [derive_seed("train", self.seed, draw, self.first + i) for i in range(len(rows))]
        return _drawn(seeds, rows, width, torch.device(self.device), self.dtype)


def _drawn(
    seeds: Sequence[int],
    rows: Sequence[int],
    width: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """Normal numbers (sum of ``rows``, *width), those of each sample from a seed of its own."""
    out = torch.empty(sum(rows), *width, device=device, dtype=dtype)
    gen = torch.Generator(device)
    start = 0
    for seed, count in zip(seeds, rows, strict=True):
        part = out[start : start + count]
        torch.randn(part.shape, generator=gen.manual_seed(seed), out=part)
        start += count
    return out
