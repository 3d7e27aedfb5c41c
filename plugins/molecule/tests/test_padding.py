from __future__ import annotations

from itertools import combinations

import pytest
import torch

from gendiff.spaces import Ragged
from gendiff_molecule.padding import GROUP_COST, gather, groups, scatter


def random_sizes(seed: int, samples: int, largest: int = 40) -> torch.Tensor:
    return torch.randint(1, largest + 1, (samples,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("samples", [1, 2, 64])
@pytest.mark.parametrize(("count", "multiple"), [(1, 1), (4, 1), (4, 4), (100, 8)])
def test_groups_hold_each_row_once(seed: int, samples: int, count: int, multiple: int) -> None:
    space = Ragged(random_sizes(seed, samples), 5)
    cut = groups(space, count, multiple)
    assert 1 <= len(cut) <= count
    assert torch.cat([g.samples for g in cut]).sort().values.equal(torch.arange(samples))
    live = torch.cat([g.rows[g.mask] for g in cut])
    assert live.sort().values.equal(torch.arange(len(space.index)))
    smallest = 0
    for group in cut:
        sizes = space.sizes[group.samples]
        assert group.mask.sum(1).equal(sizes)
        assert space.index[group.rows].equal(group.samples[:, None].expand_as(group.rows))
        assert group.rows.shape[1] == -(-int(sizes.max()) // multiple) * multiple
        assert sizes.min() > smallest  # sorted, and samples of one size stay together
        smallest = int(sizes.max())
        # Rows in order, then the last row again.
        steps = torch.arange(group.rows.shape[1])
        expected = group.rows[:, :1] + torch.minimum(steps, sizes[:, None] - 1)
        assert group.rows.equal(expected)


@pytest.mark.parametrize("seed", range(8))
def test_cuts_are_the_cheapest(seed: int) -> None:
    sizes, count = random_sizes(seed, 60, 12 if seed % 2 else 40), 3
    distinct = sorted(set(sizes.tolist()))[:12]
    sizes = sizes[sizes <= distinct[-1]]

    def cost(lasts: tuple[int, ...]) -> int:
        total, before = 0, 0
        for last in (*lasts, distinct[-1]):
            members = int(((sizes > before) & (sizes <= last)).sum())
            total, before = total + members * last**2 + GROUP_COST, last
        return total

    best = min(cost(cuts) for g in range(count) for cuts in combinations(distinct[:-1], g))
    cut = groups(Ragged(sizes, 3), count)
    assert sum(g.mask[0].numel() * g.mask.numel() + GROUP_COST for g in cut) == best


@pytest.mark.parametrize("count", [1, 3, 8])
def test_scatter_undoes_gather(count: int) -> None:
    space = Ragged(random_sizes(0, 20), 5)
    x = torch.randn(len(space.index), 5, requires_grad=True)
    cut = groups(space, count)
    out = scatter([gather(x, group) for group in cut], cut, len(x))
    assert out.equal(x)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(weight)  # nothing flows through the padding


def test_scatter_ignores_what_padding_holds() -> None:
    space = Ragged(torch.tensor([1, 3, 2]), 2)
    x = torch.randn(6, 2)
    cut = groups(space, 1)
    part = gather(x, cut[0]).masked_fill(~cut[0].mask[..., None], torch.nan)
    assert scatter([part], cut, 6).equal(x)


def test_equal_sizes_make_one_group() -> None:
    assert len(groups(Ragged(torch.full((7,), 9), 3), 4)) == 1


def test_no_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="count: 0"):
        groups(Ragged(torch.tensor([1]), 3), 0)
