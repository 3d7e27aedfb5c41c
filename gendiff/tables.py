r"""What a sampler is: a table of numbers.

With :math:`\lambda = \log(\alpha / \sigma)` every affine Gaussian process has one and the same
probability-flow ODE, whatever the schedule and the prediction:

.. math:: x_s = \frac{\sigma_s}{\sigma_t} x_t
          + \alpha_s \int_{\lambda_t}^{\lambda_s} e^{l - \lambda_s}\, \hat x(l)\, dl .

A step of a sampler therefore is a linear combination
:math:`x_s = a\, x_t + \sum_j b_j\, \hat x_j + c\, z` of the state, of past and present estimates
and of unit noise z, and a sampler on a grid is a table of such numbers. The table is made in
float64 before the first network call (:meth:`Sampler.table`); one driver
(:func:`gendiff.samplers.states`) walks it and keeps the history, so a sampler is a frozen value
without state that can go stale. A sampler that chooses its steps by what the network says has no
table and walks by itself: a :class:`Walker`.

Both ends may be infinite in lambda. At s = 0 every method on the estimates of the data gives x_hat
itself; a step from a state without signal is of order 1, and such a state leaves the history.
Methods on the noise or the velocity have other variables, finite at the data, and say so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.schedules import Level, Schedule
from gendiff.spaces import Space


class State(NamedTuple):
    """A state on the way: after step ``number``, at time ``t``, with the newest estimate.

    A :class:`Walker` says when it ``asked`` the denoiser since the state before: for each call the
    samples' times, (B,), NaN for a sample that did not need it.
    """

    number: int
    t: float
    x: Tensor
    x_hat: Tensor
    asked: tuple[Tensor, ...] = ()


class Stage(NamedTuple):
    """One network call and what follows: x = a anchor + sum_j b_j e_j + c z.

    ``t`` is the time of the call on the present state; ``b`` goes from the newest estimate e_j
    back; the anchor is the state at the step's start (after ``renoise``).

    ``variance`` holds the two log-variances between which a learned one lies, in place of c.
    ``keep`` = (p, q) makes e_j = p x + q x_hat, and None x_hat itself: an estimate of the noise,
    say. ``correct`` = (a, b) replaces the anchor by a (the last step's anchor) + sum_j b_j e_j,
    for the network has now seen where that step led.
    """

    t: float
    a: float
    b: tuple[float, ...]
    c: float = 0.0
    variance: tuple[float, float] | None = None
    keep: tuple[float, float] | None = None
    correct: tuple[float, tuple[float, ...]] | None = None


class Step(NamedTuple):
    """From time t to s: optionally scale and noise (``renoise`` = (scale, std)), then stages.

    Noise may carry the state above t, so that the times of a table need not fall.
    """

    t: float
    s: float
    stages: tuple[Stage, ...]
    renoise: tuple[float, float] | None = None


class Sampler(ABC):
    """A frozen value that turns a schedule and times into a table."""

    @property
    @abstractmethod
    def order(self) -> int:
        """Of convergence, of the deterministic method."""

    @abstractmethod
    def table(self, schedule: Schedule, times: list[float]) -> list[Step] | None:
        """The steps over ``times``, which fall strictly; None of a :class:`Walker`."""


class Walker(Sampler):
    """A sampler that chooses its steps on the way, so that its calls are known afterwards only.

    It adds no noise of its own.
    """

    @abstractmethod
    def table(self, schedule: Schedule, times: list[float]) -> None:
        """Nothing, but an error where the schedule or the times will not do."""

    @abstractmethod
    def walk(
        self, denoiser: DenoiserFn, space: Space, schedule: Schedule, times: list[float], x: Tensor
    ) -> Iterator[State]:
        """The states at ``times[1:]``, from ``x`` at ``times[0]``; see :class:`State`."""


def lam(level: Level) -> float:
    """Half the log-SNR."""
    return level.log_snr / 2


def first_order(t: float, now: Level, end: Level) -> Stage:
    """The exact step for a constant estimate: DDIM, and most methods' way into the data."""
    return Stage(t, end.sigma / now.sigma, (end.alpha * -math.expm1(lam(now) - lam(end)),))


def forward_noise(now: Level, new: Level) -> tuple[float, float]:
    """Scale and standard deviation of q(x_new | x_now), for a noisier level: a ``renoise``."""
    scale = new.alpha / now.alpha
    return scale, math.sqrt(max(new.sigma**2 - (scale * now.sigma) ** 2, 0))


def noise_scale(level: Level) -> float:
    """sigma / alpha, and a number near 1e304 where there is no signal."""
    return math.exp(min(-lam(level), 700))
