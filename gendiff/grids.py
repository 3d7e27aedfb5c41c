r"""Time grids: the times t_0 > t_1 > … > t_N at which a sampler stands.

A grid is data for a sampler: any grid goes with any sampler and any schedule. ``steps`` N is the
number of steps; t_0 is the start (pure noise, or part-way for editing) and t_N = 0, the data.

================ ==================================================== =========================
name              uniform in                                           source
================ ==================================================== =========================
``time``          t; for N = T the DDPM chain itself ("trailing")      Ho et al., 2020
``leading``       t = k/T, from below: never reaches t = 1             Ho et al., code
``linspace``      t = k/T, from 1 to 1/T: its last step does nothing   Nichol & Dhariwal, code
``quadratic``     :math:`\sqrt t`                                      Song et al., 2021 (DDIM)
``karras``        :math:`\tilde\sigma^{1/\rho}`                        Karras et al., 2022, eq. 5
``log_snr``       :math:`\log snr`                                     Lu et al., 2022
``flow``          :math:`\sigma / (\alpha + \sigma)`                   time of rectified flow
``log_normal``    quantiles of a normal :math:`\log\tilde\sigma`        as the training density
``explicit``      nothing: the times themselves                        ``gendiff fit-grid``
================ ==================================================== =========================

with :math:`\tilde\sigma = \sigma / \alpha`. The log-SNR is infinite at the data, so ``karras``
and ``log_snr`` place N times down to ``sigma_min`` and end with one step to t = 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gendiff.errors import SamplingError
from gendiff.schedules import Schedule


class Grid(ABC):
    """A rule that places N + 1 times."""

    def times(self, schedule: Schedule, steps: int, start: float = 1.0) -> list[float]:
        """The times t_0 = start > … > t_N = 0, as floats.

        Raises:
            SamplingError: ``steps`` is below 1 or the times are not strictly falling.
        """
        if steps < 1:
            raise SamplingError(f"steps={steps}: a sampler needs at least 1 step")
        if not 0 < start <= 1:
            raise SamplingError(f"start={start}: a time in (0, 1] is needed")
        # Python floats keep both ends exact; a round trip through the log-SNR would not.
        inner = self.place(schedule, steps, torch.tensor(start, dtype=torch.float64))
        return check_times([start, *inner[1:].tolist(), 0.0])

    @abstractmethod
    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        """The first N times, float64, (N,); the caller pins the first to ``start``."""


def check_times(times: list[float]) -> list[float]:
    """Returns the times if they fall strictly from at most 1 to at least 0.

    Raises:
        SamplingError: They do not.
    """
    for i, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        if not 1 >= t > s >= 0:
            raise SamplingError(
                f"times must fall strictly from 1 to 0; times {i} and {i + 1} are {t:g}, {s:g}. "
                "Use fewer steps or another grid"
            )
    return times


def _spread(first: Tensor | float, last: float, count: int) -> Tensor:
    """``count`` equidistant numbers from first to last, first alone if count is 1."""
    fraction = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    return first + (last - first) * fraction


@dataclass(frozen=True)
class UniformTime(Grid):
    """Uniform in t."""

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        return start * (steps - torch.arange(steps, dtype=torch.float64)) / steps


@dataclass(frozen=True)
class Leading(Grid):
    """Every so manieth step of a chain, t = (1 + k floor(T / N)) / T: diffusers' "leading".

    It begins about 1/N short of t = 1, where a sampler nevertheless starts from pure noise: the
    flaw that Lin et al., 2023 (https://arxiv.org/abs/2305.08891, section 3.3) describe. Here to
    reproduce others' results; ``time`` is the mended grid ("trailing").

    Args:
        chain: T.
    """

    chain: int = 1000

    def times(self, schedule: Schedule, steps: int, start: float = 1.0) -> list[float]:
        times = super().times(schedule, steps, start)
        if start == 1:
            times[0] = (1 + (steps - 1) * (self.chain // steps)) / self.chain
        return times

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        if steps > self.chain:
            raise SamplingError(f"steps={steps}: this grid's chain has {self.chain} steps only")
        k = steps - 1 - torch.arange(steps, dtype=torch.float64)
        return start * (1 + k * (self.chain // steps)) / self.chain


@dataclass(frozen=True)
class Linspace(Grid):
    """Both ends of a chain and N - 2 steps between, rounded to it: diffusers' "linspace".

    The last call stands at t = 1/T, where hardly any noise is left to remove, so it is close to
    wasted: N steps cover what ``time`` covers with N - 1. (The step there is to the data; in
    diffusers' DDIM every step goes back by T / N from wherever it is, its issue 11347.)

    Args:
        chain: T.
    """

    chain: int = 1000

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        return start * (1 + _spread(self.chain - 1, 0, steps).round()) / self.chain


@dataclass(frozen=True)
class Explicit(Grid):
    """The times themselves, as ``gendiff fit-grid`` prints them.

    Args:
        at: N + 1 times, falling strictly to 0.
    """

    at: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.at) < 2 or self.at[-1] != 0:
            raise ValueError(f"at={list(self.at)}: at least two times, the last of them 0")
        if any(not 1 >= t > s for t, s in zip(self.at, self.at[1:], strict=False)):
            raise ValueError(f"at={list(self.at)}: the times must fall strictly from at most 1")

    def times(self, schedule: Schedule, steps: int, start: float = 1.0) -> list[float]:
        """See :meth:`Grid.times`; the first time may be below 1.

        Raises:
            SamplingError: Another number of steps, or another start.
        """
        if steps != len(self.at) - 1:
            raise SamplingError(
                f"steps={steps}, but the explicit grid has {len(self.at) - 1}. "
                f"Use --steps {len(self.at) - 1}, or another grid"
            )
        if start not in (1.0, self.at[0]):
            raise SamplingError(f"an explicit grid cannot start at t={start:g}. Use another grid")
        return list(self.at)

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        return torch.tensor(self.at[:-1], dtype=torch.float64)


@dataclass(frozen=True)
class Quadratic(Grid):
    """Uniform in the square root of t: finer near the data."""

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        return start * ((steps - torch.arange(steps, dtype=torch.float64)) / steps) ** 2


@dataclass(frozen=True)
class FlowTime(Grid):
    """Uniform in sigma / (alpha + sigma)."""

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        first = torch.sigmoid(-schedule.log_snr(start) / 2)
        tau = first * (steps - torch.arange(steps, dtype=torch.float64)) / steps
        return schedule.inverse(-2 * torch.logit(tau))


@dataclass(frozen=True)
class Karras(Grid):
    """Uniform in (sigma / alpha)^(1 / rho), between two noise scales.

    Args:
        rho: 7 in the paper.
        sigma_min: The last scale before 0.
        sigma_max: The first scale where the schedule has none: if it starts without any signal.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        first = _first_sigma(schedule, start, self.sigma_max, self.sigma_min) ** (1 / self.rho)
        sigma = _spread(first, self.sigma_min ** (1 / self.rho), steps) ** self.rho
        return schedule.inverse(-2 * torch.log(sigma))


@dataclass(frozen=True)
class LogSNR(Grid):
    """Uniform in log-SNR, between two noise scales.

    Args:
        sigma_min: The last scale before 0.
        sigma_max: The first scale where the schedule has none: if it starts without any signal.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        first = _first_sigma(schedule, start, self.sigma_max, self.sigma_min)
        return schedule.inverse(-2 * _spread(math.log(first), math.log(self.sigma_min), steps))


@dataclass(frozen=True)
class LogNormalQuantiles(Grid):
    """At the quantiles 1 - i/N of a normal density of log(sigma / alpha), below the start.

    Puts the steps where a sample is decided, as the training density of the same name (Karras et
    al., 2022, table 1) puts the training there. With churn, which mends a step's errors at the
    noise levels that it visits, this can be worth several times as many steps of another grid.

    Args:
        mean, std: Of the logarithm, sigma in the data's units.
    """

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not self.std > 0:
            raise ValueError(f"std={self.std}: a positive number is needed")

    def place(self, schedule: Schedule, steps: int, start: Tensor) -> Tensor:
        # The density's part above the start is cut off, so that the times fall from there.
        log_first = -schedule.log_snr(start).item() / 2
        share = torch.special.ndtr(torch.tensor((log_first - self.mean) / self.std).double())
        u = share * (steps - torch.arange(steps, dtype=torch.float64)) / steps
        return schedule.inverse(-2 * (self.mean + self.std * torch.special.ndtri(u)))


def _first_sigma(schedule: Schedule, start: Tensor, largest: float, smallest: float) -> float:
    log_snr = schedule.log_snr(start).item()
    sigma = largest if log_snr == -math.inf else math.exp(-log_snr / 2)
    if sigma <= smallest:
        raise SamplingError(
            f"sigma_min={smallest:g} is not below the first noise scale {sigma:g}. Lower sigma_min"
        )
    return sigma


GRIDS: dict[str, type[Grid]] = {
    "time": UniformTime,
    "leading": Leading,
    "linspace": Linspace,
    "quadratic": Quadratic,
    "karras": Karras,
    "log_snr": LogSNR,
    "flow": FlowTime,
    "log_normal": LogNormalQuantiles,
    "explicit": Explicit,
}
