"""What a schedule is; the schedules themselves are in :mod:`gendiff.schedules`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """A noise level, in Python floats."""

    alpha: float
    sigma: float
    log_snr: float


class Schedule(ABC):
    """A function of time; instances are frozen values."""

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at times in [0, 1], of the shape and dtype of ``t``."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), strictly falling; +inf at t = 0, may be -inf at t = 1."""

    @abstractmethod
    def inverse(self, log_snr: Tensor) -> Tensor:
        """The time at which ``log_snr(t)`` has the given value."""

    def scales(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of this schedule's kind at a log-SNR, which it need not reach itself.

        The kind is what does not change in time: alpha^2 + sigma^2 = 1 unless a schedule says
        otherwise. Wrappers that move the log-SNR keep the kind by it.
        """
        value = log_snr.double()
        return value.sigmoid().sqrt().to(log_snr), (-value).sigmoid().sqrt().to(log_snr)

    def level(self, t: float) -> Level:
        """The noise level at one time, computed once in float64."""
        return _level(self, t)


@lru_cache(maxsize=8192)
def _level(schedule: Schedule, t: float) -> Level:
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = schedule(time)
    return Level(alpha.item(), sigma.item(), schedule.log_snr(time).item())


def sqrt(value: Tensor) -> Tensor:
    """Square root of a number that rounding may have made slightly negative."""
    return value.clamp(min=0).sqrt()
