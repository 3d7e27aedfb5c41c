r"""How the rows of a batch's tensor form samples, and where data and noise may live.

A batch is one tensor ``x`` and a :class:`Space`. The space answers the only questions that the
engine ever asks about a state, so the engine works alike for pictures, padded sequences and sets
of points:

=================== ============================================================================
``expand(v)``        a number per sample, (B,) or (B, P), to something that broadcasts against x
``mean(v)``          mean over each sample's live elements, (B,)
``sum(v)``           their sum, (B,)
``trace(v)``         trace of P diag(v) P, P the projection; their sum where P is the identity
``project(x)``       onto the subspace of valid states (a linear, orthogonal projection)
``hold(x, k, m)``    the state nearest to x that agrees with k where m is True
``part(x, m)``       what x and a state that it is held to differ by: x where m is True
``dof()``            degrees of freedom of each sample, (B,): the subspace's dimension
``noise(source, d)`` unit normal noise in the subspace
=================== ============================================================================

The feature axis of a state may be divided into P *parts* (``parts=(3, 5)``: three columns, then
five) that follow schedules of their own; a per-sample value is then of shape (B, P).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gendiff.noise import NoiseSource


class Space(ABC):
    """The layout of a batch's tensor; see the module's table."""

    parts: tuple[int, ...]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the batch's tensor."""

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of samples B."""

    @abstractmethod
    def expand(self, value: Tensor) -> Tensor:
        """Broadcasts a per-sample value, (B,) or (B, P), against the batch's tensor."""

    @abstractmethod
    def sum(self, value: Tensor) -> Tensor:
        """Sum of a tensor of the batch's shape over each sample's live elements, (B,)."""

    @abstractmethod
    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor of the batch's shape over each sample's live elements, (B,)."""

    @abstractmethod
    def rows(self, value: Tensor) -> Tensor:
        """Each sample's live elements in a row, (B, M), short rows filled up with infinity."""

    def quantile(self, value: Tensor, q: float) -> Tensor:
        """The q-quantile over each sample's live elements, (B,), on the line between two ranks."""
        ordered = self.rows(value).sort(1).values
        rank = q * (ordered.isfinite().sum(1, keepdim=True).double() - 1)
        low, high = (ordered.gather(1, r.long())[:, 0] for r in (rank.floor(), rank.ceil()))
        return torch.lerp(low, high, (rank - rank.floor())[:, 0].to(value))

    def trace(self, value: Tensor) -> Tensor:
        """Trace of P diag(value) P, P the projection, for a tensor of the batch's shape, (B,)."""
        return self.sum(value)

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Orthogonal projection onto the subspace of valid states."""

    def hold(self, x: Tensor, known: Tensor, mask: Tensor) -> Tensor:
        """The valid state nearest to ``x`` with the known elements where ``mask`` is True.

        Args:
            x: States, of the batch's shape.
            known: Data, of the batch's shape; what it holds elsewhere does not matter.
            mask: Bool, of the batch's shape.
        """
        return self.project(torch.where(mask, known, x))

    def part(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` where ``mask`` is True, else 0: an orthogonal projection.

        What :meth:`hold` does to x is ``x + part(known - x, mask)``, projected.
        """
        return x.masked_fill(~mask, 0)

    @abstractmethod
    def dof(self) -> Tensor:
        """Degrees of freedom of each sample, (B,), int64."""

    @abstractmethod
    def noise(self, source: NoiseSource, draw: int) -> Tensor:
        """Unit normal noise in the subspace, of the batch's shape."""

    @abstractmethod
    def select(self, ids: Sequence[int], x: Tensor) -> tuple[Space, Tensor]:
        """The samples ``ids`` of a batch: their space and their part of ``x``."""

    @abstractmethod
    def join(self, others: Sequence[tuple[Any, Tensor]], x: Tensor) -> tuple[Space, Tensor]:
        """Joins this space and ``x`` with others of the same kind."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Space:
        """The same space with its index tensors on ``device``."""

    def _columns(self, value: Tensor, width: int) -> Tensor:
        """(B, P) to (B, width): each part's value repeated over its columns."""
        if not self.parts or sum(self.parts) != width:
            raise ValueError(f"a value per part needs parts that add to {width}, got {self.parts}")
        counts = torch.tensor(self.parts, device=value.device)
        return value.repeat_interleave(counts, dim=1, output_size=width)


@dataclass(frozen=True)
class Dense(Space):
    r"""Samples of one shape: x is (B, C, \*), every element is live.

    Args:
        shape: Shape of the batch's tensor, (B, C, \*).
        parts: Widths of the parts along C, or empty.
    """

    shape: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def batch_size(self) -> int:
        return self.shape[0]

    def expand(self, value: Tensor) -> Tensor:
        tail = (1,) * (len(self.shape) - 2)
        if value.ndim == 2:
            return self._columns(value, self.shape[1]).reshape(-1, self.shape[1], *tail)
        return value.reshape(-1, 1, *tail) if len(self.shape) > 1 else value

    def sum(self, value: Tensor) -> Tensor:
        return value.flatten(1).sum(1)

    def mean(self, value: Tensor) -> Tensor:
        return value.flatten(1).mean(1)

    def rows(self, value: Tensor) -> Tensor:
        return value.flatten(1)

    def project(self, x: Tensor) -> Tensor:
        return x

    def dof(self) -> Tensor:
        return torch.full((self.shape[0],), torch.Size(self.shape[1:]).numel())

    def noise(self, source: NoiseSource, draw: int) -> Tensor:
        return source.normal([1] * self.shape[0], self.shape[1:], draw)

    def select(self, ids: Sequence[int], x: Tensor) -> tuple[Space, Tensor]:
        return replace(self, shape=(len(ids), *self.shape[1:])), x[list(ids)]

    def join(self, others: Sequence[tuple[Dense, Tensor]], x: Tensor) -> tuple[Space, Tensor]:
        x = torch.cat([x, *(other for _, other in others)])
        return replace(self, shape=tuple(x.shape)), x

    def to(self, device: torch.device | str) -> Dense:
        return self


@dataclass(frozen=True)
class Masked(Space):
    """Padded sequences: x is (B, C, T), sample i is live at its first ``lengths[i]`` frames.

    Args:
        lengths: Live frames of each sample, (B,), int64, at least 1.
        channels: C.
        frames: T, at least the longest length.
        parts: Widths of the parts along C, or empty.
    """

    lengths: Tensor
    channels: int
    frames: int
    parts: tuple[int, ...] = ()
    mask: Tensor = field(init=False, repr=False)  # (B, 1, T), bool

    def __post_init__(self) -> None:
        steps = torch.arange(self.frames, device=self.lengths.device)
        object.__setattr__(self, "mask", (steps < self.lengths[:, None])[:, None])

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.lengths), self.channels, self.frames)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def expand(self, value: Tensor) -> Tensor:
        if value.ndim == 2:
            return self._columns(value, self.channels)[..., None]
        return value[:, None, None]

    def sum(self, value: Tensor) -> Tensor:
        return self.project(value).sum((1, 2))

    def mean(self, value: Tensor) -> Tensor:
        return self.sum(value) / self.dof().to(value)

    def rows(self, value: Tensor) -> Tensor:
        return value.masked_fill(~self.mask, math.inf).flatten(1)

    def project(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self.mask, 0)  # not a product: 0 * nan would keep nan in the padding

    def dof(self) -> Tensor:
        return self.lengths * self.channels

    def noise(self, source: NoiseSource, draw: int) -> Tensor:
        live = source.normal(self.lengths.tolist(), (self.channels,), draw)
        x = live.new_zeros(len(self.lengths), self.frames, self.channels)
        x[self.mask[:, 0]] = live
        return x.transpose(1, 2).contiguous()

    def select(self, ids: Sequence[int], x: Tensor) -> tuple[Space, Tensor]:
        lengths = self.lengths[list(ids)]
        frames = int(lengths.max())
        return (Masked(lengths, self.channels, frames, self.parts), x[list(ids), :, :frames])

    def join(self, others: Sequence[tuple[Masked, Tensor]], x: Tensor) -> tuple[Space, Tensor]:
        frames = max(self.frames, *(space.frames for space, _ in others))
        tensors = [x, *(other for _, other in others)]
        lengths = torch.cat([self.lengths, *(space.lengths for space, _ in others)])
        padded = [torch.nn.functional.pad(v, (0, frames - v.shape[2])) for v in tensors]
        return Masked(lengths, self.channels, frames, self.parts), torch.cat(padded)

    def to(self, device: torch.device | str) -> Masked:
        return Masked(self.lengths.to(device), self.channels, self.frames, self.parts)


@dataclass(frozen=True)
class Ragged(Space):
    """Sets of rows: x is (R, D), sample i owns ``sizes[i]`` consecutive rows.

    The first ``centred`` columns (positions) live in the subspace of zero mean over each sample's
    rows, so that densities over point sets can be invariant to translation (Hoogeboom et al.,
    2022, https://arxiv.org/abs/2203.17003, section 3.1).

    Args:
        sizes: Rows of each sample, (B,), int64, at least 1.
        columns: D.
        centred: Number of leading columns without centre of mass.
        parts: Widths of the parts along D, or empty.
    """

    sizes: Tensor
    columns: int
    centred: int = 0
    parts: tuple[int, ...] = ()
    index: Tensor = field(init=False, repr=False)  # (R,), the sample that owns each row

    def __post_init__(self) -> None:
        samples = torch.arange(len(self.sizes), device=self.sizes.device)
        object.__setattr__(self, "index", samples.repeat_interleave(self.sizes))

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.index), self.columns)

    @property
    def batch_size(self) -> int:
        return len(self.sizes)

    def expand(self, value: Tensor) -> Tensor:
        if value.ndim == 2:
            return self._columns(value, self.columns)[self.index]
        return value[self.index, None]

    def _gather(self, rows: Tensor) -> Tensor:
        """Sum over each sample's rows: (R, *) to (B, *)."""
        total = rows.new_zeros(len(self.sizes), *rows.shape[1:])
        return total.index_add(0, self.index, rows)

    def sum(self, value: Tensor) -> Tensor:
        return self._gather(value.sum(1))

    def mean(self, value: Tensor) -> Tensor:
        return self._gather(value.mean(1)) / self.sizes

    def rows(self, value: Tensor) -> Tensor:
        first = self.sizes.cumsum(0) - self.sizes
        place = torch.arange(len(self.index), device=self.index.device) - first[self.index]
        most = int(self.sizes.max())
        filled = value.new_full((len(self.sizes), most, self.columns), math.inf)
        filled[self.index, place] = value
        return filled.flatten(1)

    def trace(self, value: Tensor) -> Tensor:
        return self.sum(value) - self.sum(value[:, : self.centred]) / self.sizes

    def project(self, x: Tensor) -> Tensor:
        if not self.centred:
            return x
        position = x[:, : self.centred]
        centre = self._gather(position) / self.sizes[:, None]
        return torch.cat([position - centre[self.index], x[:, self.centred :]], 1)

    def hold(self, x: Tensor, known: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`Space.hold`; centred columns are known up to a translation of each sample.

        A row's centred columns are known together: the first one's mask counts for all.
        """
        known = torch.where(mask, known, x)
        if self.centred:
            offset = self._centre_of((x - known)[:, : self.centred], mask)
            moved = torch.where(
                mask[:, :1], known[:, : self.centred] + offset, x[:, : self.centred]
            )
            known = torch.cat([moved, known[:, self.centred :]], 1)
        return self.project(known)

    def part(self, x: Tensor, mask: Tensor) -> Tensor:
        """See :meth:`Space.part`; centred columns also lose the kept rows' mean."""
        x = x.masked_fill(~mask, 0)
        if not self.centred:
            return x
        position = x[:, : self.centred]
        position = position - mask[:, :1] * self._centre_of(position, mask)
        return torch.cat([position, x[:, self.centred :]], 1)

    def _centre_of(self, position: Tensor, mask: Tensor) -> Tensor:
        """Mean over each sample's kept rows, at every row of the sample."""
        kept = mask[:, :1].to(position)
        centre = self._gather(kept * position) / self._gather(kept).clamp(min=1)
        return centre[self.index]

    def dof(self) -> Tensor:
        return self.sizes * self.columns - self.centred

    def noise(self, source: NoiseSource, draw: int) -> Tensor:
        return self.project(source.normal(self.sizes.tolist(), (self.columns,), draw))

    def select(self, ids: Sequence[int], x: Tensor) -> tuple[Space, Tensor]:
        pieces = x.split(self.sizes.tolist())
        space = Ragged(self.sizes[list(ids)], self.columns, self.centred, self.parts)
        return space, torch.cat([pieces[i] for i in ids])

    def join(self, others: Sequence[tuple[Ragged, Tensor]], x: Tensor) -> tuple[Space, Tensor]:
        sizes = torch.cat([self.sizes, *(space.sizes for space, _ in others)])
        space = Ragged(sizes, self.columns, self.centred, self.parts)
        return space, torch.cat([x, *(other for _, other in others)])

    def to(self, device: torch.device | str) -> Ragged:
        return Ragged(self.sizes.to(device), self.columns, self.centred, self.parts)


@dataclass(frozen=True)
class Categories:
    """Columns of a state, along axis 1, that hold a one-hot code times ``scale``.

    Such columns are noised like all others. What differs is the estimate, a softmax expectation,
    and the loss, a cross-entropy; see :mod:`gendiff.denoiser` and :mod:`gendiff.objective`.

    Args:
        start: The first column.
        count: How many categories.
        scale: The value of the column that is on. Smaller codes are decided later, at less noise.
    """

    start: int
    count: int
    scale: float = 1.0

    def of(self, x: Tensor) -> Tensor:
        """These columns of a tensor of the state's shape, a view."""
        return x.narrow(1, self.start, self.count)


@dataclass(frozen=True)
class Cond:
    """What a network sees besides the noisy state and its noise level.

    Args:
        values: Named tensors, the first axis of each counting samples.
        dropped: (B,) bool: where True the network must act as if it saw no condition. This is how
            one network learns both models of classifier-free guidance (Ho & Salimans, 2022).
    """

    values: dict[str, Tensor]
    dropped: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def drop(self, dropped: Tensor) -> Cond:
        """The same condition, hidden where ``dropped`` (B,) is True, as well as where it was."""
        if self.dropped is not None:
            dropped = dropped | self.dropped
        return Cond(self.values, dropped)

    def select(self, ids: Sequence[int]) -> Cond:
        """The conditions of the samples ``ids``."""
        dropped = None if self.dropped is None else self.dropped[list(ids)]
        return Cond({k: v[list(ids)] for k, v in self.values.items()}, dropped)

    def to(self, device: torch.device | str) -> Cond:
        """The same condition on ``device``."""
        dropped = None if self.dropped is None else self.dropped.to(device)
        return Cond({k: v.to(device) for k, v in self.values.items()}, dropped)


@dataclass(frozen=True)
class Batch:
    """Samples: one tensor, how its rows form samples, and what conditions them.

    Args:
        x: The state, of the space's shape.
        space: How its rows form samples.
        cond: What conditions them.
        eps: The noise that belongs to x, of its shape, where the two are coupled; else None.
    """

    x: Tensor
    space: Space
    cond: Cond | None = None
    eps: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        cond: Any = None if self.cond is None else self.cond.to(device)
        eps = None if self.eps is None else self.eps.to(device, non_blocking=True)
        return Batch(self.x.to(device, non_blocking=True), self.space.to(device), cond, eps)

    def select(self, ids: Sequence[int]) -> Batch:
        """The samples ``ids`` of this batch."""
        space, x = self.space.select(ids, self.x)
        cond = None if self.cond is None else self.cond.select(ids)
        eps = None if self.eps is None else self.space.select(ids, self.eps)[1]
        return Batch(x, space, cond, eps)


def _padded(values: Sequence[Tensor]) -> Tensor:
    """Joins along the first axis; where the second differs, the shorter are padded with zeros."""
    if values[0].ndim < 2 or len({v.shape[1] for v in values}) == 1:
        return torch.cat(list(values))
    longest = max(v.shape[1] for v in values)
    rows = [v.new_zeros(len(v), longest, *v.shape[2:]) for v in values]
    for row, value in zip(rows, values, strict=True):
        row[:, : value.shape[1]] = value
    return torch.cat(rows)


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all the samples, in order; all have a noise coupled to them, or none has.

    Conditions that are sequences, (B, L, *), may differ in L: they are padded with zeros.
    """
    first, rest = batches[0], batches[1:]
    if not rest:
        return first
    space, x = first.space.join([(b.space, b.x) for b in rest], first.x)
    eps = None
    if first.eps is not None:
        eps = first.space.join([(b.space, b.eps) for b in rest], first.eps)[1]  # type: ignore[misc]
    conds = [b.cond for b in batches if b.cond is not None]
    if not conds:
        return Batch(x, space, None, eps)
    values = {k: _padded([c[k] for c in conds]) for k in conds[0].values}
    if all(c.dropped is None for c in conds):
        return Batch(x, space, Cond(values), eps)
    hidden = [
        torch.zeros(b.space.batch_size, dtype=torch.bool, device=x.device)
        if c.dropped is None
        else c.dropped
        for b, c in zip(batches, conds, strict=True)
    ]
    return Batch(x, space, Cond(values, torch.cat(hidden)), eps)
