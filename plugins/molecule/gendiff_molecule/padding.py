"""A batch of sets as a few dense padded tensors.

Networks that look at all pairs of a set's rows are fastest on dense tensors (b, n, n, D), but a
batch padded to its largest set computes mostly padding: the cost goes with the square. So the
samples are sorted by size and cut into a few groups, each padded to its own largest set, at the
cuts that leave the fewest pairs.

    parts = [network(gather(x, group), group.mask) for group in groups(space, 4)]
    out = scatter(parts, all_groups, len(x))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gendiff.spaces import Ragged

GROUP_COST = 256  # pairs that cost about as much as one more group does (its calls of kernels)


class Group(NamedTuple):
    """Some samples of a batch, padded to n rows each.

    Args:
        samples: Which samples of the batch, (b,), int64.
        rows: Rows of the batch's tensor, (b, n), int64; padding repeats a sample's last row.
        mask: True where a row is live, (b, n).
    """

    samples: Tensor
    rows: Tensor
    mask: Tensor


def groups(space: Ragged, count: int, multiple: int = 1) -> list[Group]:
    """The batch's samples in at most ``count`` groups of similar size, smallest first.

    Args:
        space: The batch's space.
        count: Number of groups, at least 1. Fewer are made where more would not pay.
        multiple: Groups are padded to a multiple of this many rows.
    """
    if count < 1:
        raise ValueError(f"count: {count} groups cannot hold a batch. Use at least 1")
    sizes = space.sizes
    cuts, widths = _cuts(sizes.cpu().numpy(), count, multiple)
    order = sizes.argsort(stable=True)
    starts = (sizes.cumsum(0) - sizes)[order, None]
    ends = sizes[order, None]
    steps = torch.arange(max(widths), device=sizes.device)
    mask = steps < ends
    rows = starts + torch.minimum(steps, ends - 1)
    return [
        Group(order[a:b], rows[a:b, :n], mask[a:b, :n])
        for a, b, n in zip(cuts[:-1], cuts[1:], widths, strict=True)
    ]


def gather(x: Tensor, group: Group) -> Tensor:
    """The group's part of x (R, D), (b, n, D); padding repeats a sample's last row."""
    # Not x[rows]: on the CPU, index_select's backward is several times faster.
    return x.index_select(0, group.rows.flatten()).unflatten(0, group.rows.shape)


def scatter(parts: Sequence[Tensor], groups: Sequence[Group], rows: int) -> Tensor:
    """What :func:`gather` undoes: parts (b, n, D) of all the groups to (R, D)."""
    live = torch.cat([group.rows.where(group.mask, rows).flatten() for group in groups])
    values = torch.cat([part.flatten(0, 1) for part in parts])
    # Padding goes to a row of its own, which is cut off: boolean indexing would wait for a GPU.
    out = values.new_zeros(rows + 1, values.shape[1]).index_copy(0, live, values)
    return out[:rows]


def _cuts(sizes: NDArray[np.int64], count: int, multiple: int) -> tuple[list[int], list[int]]:
    """Cuts [0, …, B] of the sorted sizes and each group's padded size, at the least cost.

    Dynamic programming over the distinct sizes: with g groups, the sizes up to the j-th cost
    best_g(j) = min_i best_{g-1}(i - 1) + cost(i, j), the last group being the sizes i to j.
    """
    distinct, counts = np.unique(sizes, return_counts=True)
    padded = -(-distinct // multiple) * multiple
    total = np.concatenate([[0], counts.cumsum()])
    members = (total[None, 1:] - total[:-1, None]).astype(np.float64)
    cost = np.where(members > 0, members * padded**2.0 + GROUP_COST, np.inf)  # [first, last]
    best, choices = cost[0], [np.zeros(len(distinct), np.int64)]
    for _ in range(min(count, len(distinct)) - 1):
        options = np.concatenate([cost[:1], best[:-1, None] + cost[1:]])
        choices.append(options.argmin(0))
        best = options.min(0)
    last, cuts, widths = len(distinct) - 1, [len(sizes)], []
    for choice in reversed(choices):
        first = int(choice[last])
        widths.append(int(padded[last]))
        cuts.append(int(total[first]))
        if first == 0:
            break
        last = first - 1
    return cuts[::-1], widths[::-1]
