from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from exactness import near
from oracle_tools import SPACES, normal, streams
from torch import Tensor

from gendiff.spaces import Batch, Cond, Dense, Masked, Ragged, Space, join

pytestmark = pytest.mark.usefixtures("float64")
every = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())


def owner(space: Space) -> Tensor:
    """The sample that owns each element."""
    return space.expand(torch.arange(space.batch_size)) + torch.zeros(space.shape).long()


def projection(space: Space) -> Tensor:
    """The projection as a matrix over the flattened state."""
    n = math.prod(space.shape)
    columns = [space.project(e.reshape(space.shape)).flatten() for e in torch.eye(n)]
    return torch.stack(columns, 1)


@dataclass(frozen=True)
class Basis:
    """In place of random numbers, the unit vector of one of them."""

    index: int

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        x = torch.zeros(sum(rows) * math.prod(width))
        if self.index < len(x):
            x[self.index] = 1
        return x.reshape(-1, *width)


@every
def test_projection_is_orthogonal(space: Space) -> None:
    matrix = projection(space)
    near(matrix @ matrix, matrix, 1e-15)
    near(matrix, matrix.T, 1e-15)
    assert space.dof().dtype == torch.int64
    diagonal = matrix.diagonal()
    for i, dof in enumerate(space.dof().tolist()):  # trace = rank = degrees of freedom
        near(diagonal[owner(space).flatten() == i].sum(), dof, 1e-14)


@every
def test_noise_covariance_is_the_projection(space: Space) -> None:
    """Noise is linear in the normal numbers it is made of, so its covariance is exact."""
    n = math.prod(space.shape)
    columns = [space.noise(Basis(i), 0).flatten() for i in range(n)]
    matrix = torch.stack(columns, 1)
    near(matrix @ matrix.T, projection(space), 1e-15)


@every
def test_noise_belongs_to_the_samples(space: Space) -> None:
    """Sample i's noise depends on stream i alone, whatever stands beside it."""
    whole = space.noise(streams(space, 3), 1)
    assert whole.shape == space.shape
    for i in range(space.batch_size):
        one, expected = space.select([i], whole)
        source = streams(space, 3)
        alone = one.noise(type(source)(3, (i,), dtype=torch.float64), 1)
        near(alone, expected, 1e-15)


@pytest.mark.parametrize("sizes", [[1, 2, 3], [30, 7], [500]])
def test_ragged_is_centred(sizes: list[int]) -> None:
    space = Ragged(torch.tensor(sizes), 4, centred=3)
    x = space.noise(streams(space), 0)
    for piece in x.split(sizes):
        assert piece[:, :3].mean(0).abs().max() < 1e-15
    free = space.project(x + torch.tensor([5.0, -3.0, 100.0, 2.0]))
    near(free[:, :3], x[:, :3], 1e-13)  # roundings of 100
    near(free[:, 3], x[:, 3] + 2, 1e-15)


@every
def test_expand(space: Space) -> None:
    value = torch.tensor([1.0, 20.0, 300.0])
    near(space.expand(value) * torch.ones(space.shape), value[owner(space)], 0)
    parts = torch.tensor([[1.0, 2.0], [30.0, 40.0], [500.0, 600.0]])
    columns = torch.tensor([0, 0, 0, 1, 1]).reshape(1, 5, *(1,) * (len(space.shape) - 2))
    expected = parts[owner(space), columns.expand(space.shape)]
    near(space.expand(parts) * torch.ones(space.shape), expected, 0)


@every
def test_mean(space: Space) -> None:
    value = space.project(normal(*space.shape)) + 1
    live = torch.ones(space.shape, dtype=torch.bool)
    if isinstance(space, Masked):
        live = torch.arange(space.frames) < space.lengths[:, None, None].expand(
            *space.shape[:2], 1
        )
        value = torch.where(live, value, torch.nan)  # padding may hold anything
    expected = [value[live & (owner(space) == i)].mean() for i in range(space.batch_size)]
    near(space.mean(value), torch.stack(expected), 1e-14)


def test_padding_never_leaks() -> None:
    space = SPACES["masked"]
    assert isinstance(space, Masked)
    x = torch.full(space.shape, torch.nan)
    x[1, :, 0] = 2.0
    projected = space.project(x)
    near(projected[1], torch.tensor([[2.0, 0, 0, 0, 0, 0]]).expand(5, 6), 0)


@every
@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 0], [1], [1, 1, 0, 2]])
def test_select_and_join(space: Space, ids: list[int]) -> None:
    cond = Cond({"label": torch.tensor([5, 6, 7])}, torch.tensor([True, False, False]))
    batch = Batch(space.noise(streams(space), 0), space, cond)
    singles = [batch.select([i]) for i in ids]
    at_once, joined = batch.select(ids), join(singles)
    for result in (at_once, joined):
        assert result.space.batch_size == len(ids)
        assert result.space.parts == space.parts
        assert result.x.shape == result.space.shape
        assert result.space.dof().tolist() == space.dof()[ids].tolist()
        assert result.cond is not None
        assert result.cond["label"].tolist() == [5 + i for i in ids]
        assert result.cond.dropped.tolist() == [i == 0 for i in ids]
    assert torch.equal(at_once.x, joined.x)
    for row, single in enumerate(singles):
        back = at_once.select([row])
        assert torch.equal(back.x, single.x)
    near(at_once.space.project(at_once.x), at_once.x, 1e-15)


def test_join_pads_to_the_longest() -> None:
    short = Masked(torch.tensor([1, 2]), 1, 2)
    long = Masked(torch.tensor([4]), 1, 4)
    result = join([Batch(torch.ones(2, 1, 2), short), Batch(torch.ones(1, 1, 4), long)])
    assert result.x.shape == result.space.shape == (3, 1, 4)
    assert result.space.mean(result.x + 0).tolist()[1:] == [1, 1]
    assert result.cond is None


def test_join_pads_conditions_that_are_sequences() -> None:
    one = Batch(torch.ones(1, 1), Dense((1, 1)), Cond({"tokens": torch.tensor([[5]])}))
    two = Batch(torch.ones(2, 1), Dense((2, 1)), Cond({"tokens": torch.tensor([[1, 2], [3, 4]])}))
    cond = join([one, two]).cond
    assert cond is not None
    assert cond["tokens"].tolist() == [[5, 0], [1, 2], [3, 4]]


def test_join_when_only_some_conditions_are_hidden() -> None:
    """A batch without ``dropped`` counts as seen."""
    space = Dense((1, 2))
    seen = Batch(torch.zeros(1, 2), space, Cond({"label": torch.tensor([1])}))
    hidden = Batch(
        torch.zeros(1, 2), space, Cond({"label": torch.tensor([2])}).drop(torch.tensor([True]))
    )
    cond = join([seen, hidden]).cond
    assert cond is not None
    assert cond.dropped is not None
    assert cond.dropped.tolist() == [False, True]


@every
def test_to(space: Space) -> None:
    batch = Batch(normal(*space.shape), space, Cond({"label": torch.arange(3)}))
    moved = batch.to("cpu")
    assert torch.equal(moved.x, batch.x)
    assert moved.space.shape == space.shape
    assert moved.space.parts == space.parts
    near(moved.space.project(moved.x), space.project(batch.x), 0)
    near(moved.space.mean(moved.x), space.mean(batch.x), 0)


def test_cond_drop_adds_up() -> None:
    cond = Cond({"label": torch.arange(3)}).drop(torch.tensor([True, False, False]))
    both = cond.drop(torch.tensor([False, True, False]))
    assert both.dropped.tolist() == [True, True, False]
    assert cond.dropped.tolist() == [True, False, False]


def test_parts_must_fit() -> None:
    for parts in ((), (2, 2)):
        with pytest.raises(ValueError, match="add to 5"):
            Dense((3, 5), parts=parts).expand(torch.ones(3, 2))
