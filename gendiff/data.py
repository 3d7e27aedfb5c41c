"""Endless, stateless data order.

Visit v of a data set of N items is item ``order(epoch)[v mod N]`` of epoch ``v // N``, whose
order is a function of (seed, epoch); whatever is random about the item is a function of
(seed, v). So the data of a training step are a function of its number: there is no position to
save, and neither workers nor prefetching can lose it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gendiff.noise import derive_seed, generator
from gendiff.spaces import Batch
from gendiff.world import ALONE, World

Key = tuple[int, int]  # index of an item, seed of its augmentation


class Items(Dataset[Any]):
    """A split whose items are at hand and have nothing random about them.

    Args:
        items: The items, in order.
    """

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> Any:
        return self.items[key[0]]


def content_of(parts: Iterable[Path | bytes | str]) -> str:
    """A name of what files, bytes and texts hold together, 32 characters.

    Where a file lies and when it was written are of no account; one that cannot be read, or is a
    pipe, counts as none.
    """
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        one = hashlib.blake2b()
        if not isinstance(part, Path):
            one.update(part if isinstance(part, bytes) else os.fsencode(part))
        elif part.is_file():
            with suppress(OSError), part.open("rb") as file:
                while piece := file.read(1 << 20):
                    one.update(piece)
        found.update(one.digest())
    return found.hexdigest()


class VisitOrder(Sampler[list[Key]]):
    """Batches of keys from a step on, for ever.

    Args:
        length: N.
        batch_size: Items of a batch.
        seed: The run's seed.
        first: Number of the first batch; batch k holds the visits k B to (k + 1) B - 1.
        world: Batches are dealt out to processes in turn: the k-th of this one's is batch
            ``k size + rank``.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, first: int = 0, world: World = ALONE
    ) -> None:
        self.length, self.batch_size, self.seed, self.first = length, batch_size, seed, first
        self.world = world
        self._epoch, self._permutation = -1, torch.empty(0)

    def key(self, visit: int) -> Key:
        """Item and seed of a visit."""
        epoch, position = divmod(visit, self.length)
        if epoch != self._epoch:
            gen = generator("order", self.seed, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.length, generator=gen)
        return int(self._permutation[position]), derive_seed("item", self.seed, visit)

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in count(self.first):
            visit = (batch * self.world.size + self.world.rank) * self.batch_size
            yield [self.key(v) for v in range(visit, visit + self.batch_size)]


class InOrder(Sampler[list[Key]]):
    """Each item once, in order, with seed 0: for held-out data."""

    def __init__(self, length: int, batch_size: int) -> None:
        self.length, self.batch_size = length, batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        for start in range(0, self.length, self.batch_size):
            yield [(i, 0) for i in range(start, min(start + self.batch_size, self.length))]


def loader(
    dataset: Dataset[Any],
    collate: Callable[[Sequence[Any]], Batch],
    order: Iterable[list[Key]],
    workers: int = 0,
) -> Iterator[Batch]:
    """Iterates over the batches of an order, with no more workers than there are cores."""
    workers = min(workers, os.cpu_count() or 1)
    return iter(
        DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=collate,  # type: ignore[arg-type]
            num_workers=workers,
            persistent_workers=workers > 0,
        )
    )
