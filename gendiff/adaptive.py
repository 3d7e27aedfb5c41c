r"""The probability-flow ODE with steps that each sample chooses for itself.

In the time of rectified flow, :math:`\tau = \sigma / (\alpha + \sigma)`, the state
:math:`z = x / (\alpha + \sigma)` of every schedule is finite at both ends and moves with

.. math:: \frac{dz}{d\tau} = v = \hat\epsilon - \hat x = \frac{z - \hat x}{\tau} .

A step of width h is Ralston's of order 3 (1962, https://doi.org/10.2307/2003063), and the midpoint
rule, which its first two calls make, tells its error:

.. math:: k_1 = v(z, \tau), \quad k_2 = v(z + \tfrac h2 k_1, \tau + \tfrac h2), \quad
          k_3 = v(z + \tfrac{3h}4 k_2, \tau + \tfrac{3h}4),

.. math:: z' = z + \tfrac h9 (2 k_1 + 3 k_2 + 4 k_3), \quad e = z' - (z + h k_2) .

No call stands at the step's end, where the data are and v is 0 / 0: so the last step is one like
the others. A step costs three calls, and one that is refused two, as k_1 stays.

Each sample has a time of its own, so that none depends on its company. The grid's times between
its ends are where states are told, by the parabola through k_1, k_2 and k_3; they bound no step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.errors import SamplingError
from gendiff.schedules import Parts, Schedule
from gendiff.spaces import Space
from gendiff.tables import State, Walker


class Path(NamedTuple):
    """Where samples went in one step: from z at tau, (B,), to the time ``to``, with slopes k."""

    tau: Tensor
    to: Tensor
    z: Tensor
    k: tuple[Tensor, Tensor, Tensor]

    def at(self, stop: float, space: Space) -> tuple[Tensor, Tensor, Tensor]:
        """State and velocity at a time, of the samples, (B,), that passed it in this step."""
        passed = (self.to <= stop) & (stop < self.tau)
        h = self.to - self.tau
        c = torch.where(passed, (stop - self.tau) / h, 0)
        # The parabola's coefficients at c of the step, and their integrals from 0 to c.
        at = (1 - c * (10 / 3 - 8 / 3 * c), c * (6 - 8 * c), c * (16 / 3 * c - 8 / 3))
        to = (c - c**2 * (5 / 3 - 8 / 9 * c), c**2 * (3 - 8 / 3 * c), c**2 * (16 / 9 * c - 4 / 3))
        z = _add(space, self.z, *((h * w, k) for w, k in zip(to, self.k, strict=True)))
        v = _add(space, torch.zeros_like(z), *zip(at, self.k, strict=True))
        return z, v, passed


def _add(space: Space, z: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    """``z`` and numbers, (B,), times tensors of the batch's shape."""
    for number, k in terms:
        z = torch.addcmul(z, space.expand(number.to(z)), k)
    return z


@dataclass(frozen=True)
class Adaptive(Walker):
    r"""Each sample's own steps, by their error; the grid's times are where a film stops, no more.

    A step is taken where the root mean square of its error e is at most
    :math:`tolerance\, (1 + rms(z))`, over the sample's live elements: in the data's units, where
    these are of size one. How many calls that takes is known afterwards only.

    Args:
        tolerance: Of each step, relative and absolute.
        max_steps: Of tried steps, before it is an error.
    """

    tolerance: float = 1e-3
    max_steps: int = 1000
    order: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < math.inf or self.max_steps < 1:
            raise ValueError(
                f"tolerance={self.tolerance:g}, max_steps={self.max_steps}: a positive tolerance "
                "and at least one step are needed"
            )

    def table(self, schedule: Schedule, times: list[float]) -> None:
        if isinstance(schedule, Parts):
            raise SamplingError(
                "the parts of this model's states have schedules of their own, and no common time "
                "to choose. Use another sampler than adaptive, as heun"
            )

    def walk(
        self, denoiser: DenoiserFn, space: Space, schedule: Schedule, times: list[float], x: Tensor
    ) -> Iterator[State]:
        levels = [schedule.level(t) for t in times]
        scales = [level.alpha + level.sigma for level in levels]
        stops = [level.sigma / scale for level, scale in zip(levels, scales, strict=True)]
        first, last = stops[0], stops[-1]
        asked: list[Tensor] = []

        def velocity(z: Tensor, tau: Tensor, live: Tensor) -> Tensor:
            t = schedule.inverse(2 * (torch.log1p(-tau) - tau.log()))
            t = torch.where(tau == first, times[0], t)  # inverse need not be defined at infinity
            asked.append(torch.where(live, t, math.nan))
            alpha, sigma = schedule(t)
            x_hat = denoiser(space.expand((alpha + sigma).to(z)) * z, t)
            return (z - x_hat) / space.expand(tau.to(z))

        z = x / scales[0]
        # On the CPU and in float64, whatever the state is.
        tau = torch.full((space.batch_size,), first, dtype=torch.float64)
        h, told, paths = -tau / 10, 1, list[Path]()
        fresh = torch.ones_like(tau, dtype=torch.bool)
        k1 = torch.zeros_like(z)
        for _ in range(self.max_steps):
            active = tau > last
            h = torch.where(active, torch.maximum(h, last - tau), 0.0)
            now = torch.where(active, tau, first)  # those that have arrived are asked for nothing
            fresh &= active
            if fresh.any():
                new = velocity(z, now, fresh)
                k1 = torch.where(space.expand(fresh.to(z.device)), new, k1)
            k2 = velocity(_add(space, z, (h / 2, k1)), now + h / 2, active)
            k3 = velocity(_add(space, z, (3 * h / 4, k2)), now + 3 * h / 4, active)
            change = _add(
                space, torch.zeros_like(z), (2 * h / 9, k1), (h / 3, k2), (4 * h / 9, k3)
            )
            error = space.mean(_add(space, change, (-h, k2)).square()).sqrt()
            size = error / (self.tolerance * (1 + space.mean(z.square()).sqrt()))
            size = size.cpu().double().nan_to_num(0)  # what is not a number gets no better
            fresh = active & (size <= 1)
            to = torch.where(h == last - tau, last, torch.clamp(tau + h, min=last))
            path = Path(tau, torch.where(fresh, to, tau), z, (k1, k2, k3))
            z = torch.where(space.expand(fresh.to(z.device)), z + change, z)
            tau = path.to
            h = h * (0.9 * size.clamp(min=1e-9) ** (-1 / 3)).clamp(0.2, 5.0)
            paths = [p for p in (*paths, path) if _passes(p, stops[told:])]
            while (tau <= stops[told]).all():
                state, x_hat = _told(paths, stops[told], space)
                yield State(told, times[told], scales[told] * state, x_hat, tuple(asked))
                asked.clear()
                told += 1
                if told == len(stops):
                    return
        raise SamplingError(
            f"sampler 'adaptive': {self.max_steps} steps did not reach the end at "
            f"tolerance={self.tolerance:g}. Raise either"
        )


def _passes(path: Path, stops: list[float]) -> bool:
    """Whether a sample passed one of these times in a step."""
    at = torch.tensor(stops, dtype=torch.float64)[:, None]
    return bool(((path.to <= at) & (at < path.tau)).any())


def _told(paths: list[Path], stop: float, space: Space) -> tuple[Tensor, Tensor]:
    """Every sample's state z and estimate of the data at a time that all have passed."""
    z = v = torch.zeros_like(paths[0].z)
    for path in paths:
        here, slope, passed = path.at(stop, space)
        rows = space.expand(passed.to(z.device))
        z, v = torch.where(rows, here, z), torch.where(rows, slope, v)
    return z, z - stop * v
