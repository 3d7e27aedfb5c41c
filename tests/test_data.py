from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
import torch

from gendiff.data import InOrder, VisitOrder, content_of, loader
from gendiff.spaces import Batch, Dense
from gendiff.world import World


@pytest.mark.parametrize(("length", "batch"), [(12, 4), (10, 3), (3, 7), (1, 2)])
def test_each_epoch_is_a_permutation(length: int, batch: int) -> None:
    batches = list(islice(VisitOrder(length, batch, seed=0), 6 * length))
    assert {len(b) for b in batches} == {batch}
    visits = [key[0] for b in batches for key in b]
    epochs = [visits[i : i + length] for i in range(0, len(visits) - length + 1, length)]
    assert len(epochs) >= 6
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length >= 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("first", [1, 3, 50])
def test_resuming_is_skipping(first: int) -> None:
    whole = list(islice(VisitOrder(10, 3, seed=5), first + 20))
    assert list(islice(VisitOrder(10, 3, 5, first), 20)) == whole[first:]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_the_visits_of_one(ranks: int) -> None:
    """Steps 2 to 5 of 12 visits each, in two parts each."""
    whole = [key for b in islice(VisitOrder(10, 12, seed=5, first=2), 4) for key in b]
    shares = [
        list(islice(VisitOrder(10, 6 // ranks, 5, 2 * 2, World(rank, ranks)), 4 * 2))
        for rank in range(ranks)
    ]
    dealt = [key for parts in zip(*shares, strict=True) for part in parts for key in part]
    assert dealt == whole


def test_order_depends_on_the_seed_alone() -> None:
    order = VisitOrder(50, 5, seed=1)
    jumps = [order.key(v) for v in (260, 3, 260, 120, 3)]  # back and forth between epochs
    assert jumps[0] == jumps[2]
    assert jumps[1] == jumps[4]
    assert jumps[3] == VisitOrder(50, 5, seed=1).key(120)
    other = [VisitOrder(50, 5, seed=2).key(v) for v in range(50)]
    assert [order.key(v)[0] for v in range(50)] != [key[0] for key in other]


def test_no_two_visits_share_a_seed() -> None:
    """An item comes back with another augmentation."""
    keys = [VisitOrder(7, 1, seed).key(v) for seed in range(3) for v in range(300)]
    assert len({seed for _, seed in keys}) == len(keys)


@pytest.mark.parametrize(("length", "sizes"), [(7, [3, 3, 1]), (6, [3, 3]), (2, [2])])
def test_in_order(length: int, sizes: list[int]) -> None:
    batches = list(InOrder(length, 3))
    assert [len(b) for b in batches] == sizes
    assert [key for b in batches for key in b] == [(i, 0) for i in range(length)]


class Items(torch.utils.data.Dataset):
    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order(workers: int) -> None:
    def collate(items: object) -> Batch:
        x = torch.tensor(items)
        return Batch(x, Dense(tuple(x.shape)))

    batches = loader(Items(), collate, VisitOrder(10, 4, seed=0, first=2), workers)
    expected = islice(VisitOrder(10, 4, seed=0, first=2), 6)
    for batch, keys in zip(islice(batches, 6), expected, strict=True):
        assert batch.x.tolist() == [list(key) for key in keys]


def test_content_is_of_what_is_read_and_not_of_where_or_when(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1_000_000)
    name = content_of(["x", path])
    moved = path.rename(tmp_path / "b")
    os.utime(moved, (1, 1))
    assert content_of(["x", moved]) == name
    moved.write_bytes(b"abc" * 999_999 + b"abd")
    assert content_of(["x", moved]) != name
    assert content_of(["ab", "c"]) != content_of(["a", "bc"])
    assert content_of(["a", "b"]) != content_of(["b", "a"])
    os.mkfifo(tmp_path / "pipe")  # not waited for
    assert content_of([tmp_path / "pipe"]) == content_of([tmp_path / "none"])
