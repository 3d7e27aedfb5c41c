"""What several test files share: spaces, exact networks, moments propagated through tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gendiff.noise import Streams
from gendiff.schedules import EDM, VE, Cosine, Flow, Polynomial, Schedule, VPLinear
from gendiff.spaces import Dense, Masked, Ragged, Space

SCHEDULES: dict[str, Schedule] = {
    "vp_linear": VPLinear(),
    "cosine": Cosine(),
    "polynomial": Polynomial(),
    "ve": VE(),
    "edm": EDM(),
    "flow": Flow(),
}
SPACES: dict[str, Space] = {
    "dense": Dense((3, 5), parts=(3, 2)),
    "image": Dense((3, 5, 2, 3), parts=(3, 2)),
    "masked": Masked(torch.tensor([4, 1, 6]), 5, 6, parts=(3, 2)),
    "ragged": Ragged(torch.tensor([2, 1, 7]), 5, centred=3, parts=(3, 2)),
    "ragged_free": Ragged(torch.tensor([3, 4, 1]), 5, parts=(3, 2)),
}


def streams(space: Space, seed: int = 0) -> Streams:
    return Streams(seed, tuple(range(space.batch_size)), dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=gen, dtype=torch.float64)


@dataclass(frozen=True)
class Columns:
    """The columns first to last of the noise that another source gives to ``width`` columns."""

    source: Streams
    first: int
    last: int
    width: int

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        assert width[0] == self.last - self.first
        full = self.source.normal(rows, (self.width, *width[1:]), draw)
        return full[:, self.first : self.last]


def parts_of(space: Space) -> list[tuple[Space, int, int]]:
    """The space of each part alone, and its columns' range on axis 1."""
    ranges = [(0, 3), (3, 5)]
    if isinstance(space, Dense):
        return [(Dense((space.shape[0], b - a, *space.shape[2:])), a, b) for a, b in ranges]
    if isinstance(space, Masked):
        return [(Masked(space.lengths, b - a, space.frames), a, b) for a, b in ranges]
    assert isinstance(space, Ragged)
    centred = (space.centred, 0)
    return [
        (Ragged(space.sizes, b - a, c), a, b) for (a, b), c in zip(ranges, centred, strict=True)
    ]


class Counted:
    """A denoiser that counts its calls and keeps a copy of what went in and came out."""

    def __init__(self, denoiser: Callable[..., Tensor]) -> None:
        self.denoiser, self.calls = denoiser, 0
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, x_t: Tensor, t: Any) -> Tensor:
        self.calls += 1
        x_hat = self.denoiser(x_t, t)
        self.seen.append((x_t, x_t.clone(), x_hat, x_hat.clone()))
        return x_hat


def gaussian_moments(
    table: list[Any], schedule: Schedule, mean: float, variance: float, m: float, v: float
) -> list[tuple[float, float]]:
    """Exact mean and variance after each step of a table, for Gaussian data and its denoiser.

    A state is its mean and its coefficients on independent normals: the start, and two a step.
    """
    x = torch.zeros(2 + 2 * len(table), dtype=torch.float64)
    x[0], x[1] = m, math.sqrt(v)
    anchor, history, result = x, list[Tensor](), []
    for i, step in enumerate(table):
        if step.renoise is not None:
            scale, std = step.renoise
            x = scale * x
            x[2 + 2 * i] = std
        previous, anchor = anchor, x
        for stage in step.stages:
            alpha, sigma, _ = schedule.level(stage.t)
            gain = alpha * variance / (alpha**2 * variance + sigma**2)
            estimate = gain * x
            estimate[0] += (1 - gain * alpha) * mean
            p, q = stage.keep or (0.0, 1.0)
            history = [p * x + q * estimate, *history[:5]]
            if stage.correct is not None:
                a, b = stage.correct
                anchor = a * previous + sum(w * e for w, e in zip(b, history, strict=False))
            x = stage.a * anchor + sum(w * e for w, e in zip(stage.b, history, strict=False))
            x[3 + 2 * i] = stage.c
        result.append((x[0].item(), x[1:].square().sum().item()))
    return result


def exponential_moment(h: float, degree: int) -> float:
    r""":math:`\int_{-h}^0 e^u u^d du`: by its series for small h, by parts otherwise."""
    if h < 2:
        terms = (
            h ** (degree + k + 1) * (-1) ** (degree + k) / (math.factorial(k) * (degree + k + 1))
            for k in range(60)
        )
        return math.fsum(terms)
    value = -math.expm1(-h)
    for d in range(1, degree + 1):
        value = -((-h) ** d) * math.exp(-h) - d * value
    return value
