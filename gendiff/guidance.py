r"""Guidance: denoisers made of two denoisers.

A better estimate is moved away from a worse one,

.. math:: \hat x = \hat x_- + w\, (\hat x_+ - \hat x_-), \qquad w \ge 1 .

In classifier-free guidance (Ho & Salimans, 2022, https://arxiv.org/abs/2207.12598) the worse one
is that of the same network with its condition hidden; w = 1 is the conditional model (in the
paper's own count, 1 + w). In autoguidance (Karras et al., 2024, https://arxiv.org/abs/2406.02507)
it is that of a smaller or less trained network with the same condition.

What is added to :math:`\hat x_+` may be kept in bounds, and each bound is off by default:

============== =================================================================================
``interval``    only where low < sigma / alpha <= high; elsewhere :math:`\hat x_+` itself, one call
                (Kynkäänniemi et al., 2024, https://arxiv.org/abs/2404.07724)
``threshold``   the difference's root mean square is at most this
``parallel``    so much is kept of the difference's part along :math:`\hat x_+`, which makes
                samples too strong; with the threshold, APG (Sadat et al., 2024,
                https://arxiv.org/abs/2410.02416)
``rescale``     so far from the guided estimate's standard deviation to that of :math:`\hat x_+`
                (Lin et al., 2023, https://arxiv.org/abs/2305.08891, eq. 15 and 16: phi)
============== =================================================================================

Means, products and deviations are each sample's own, over its live elements. APG's momentum, a sum
of earlier differences, is left out: a denoiser would depend on what it was asked before.

The estimate itself, guided or not, may be kept in the data's range by a clip (Saharia et al.,
2022, https://arxiv.org/abs/2205.11487, section 2.3):

============ ===================================================================================
``none``      it is left as it is
``static``    :math:`\hat x` limited to :math:`[-l, l]`
``dynamic``   limited to :math:`[-s, s]` and multiplied by :math:`l / s`, where s is the larger of
              l and a quantile of a sample's :math:`|\hat x|`
============ ===================================================================================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gendiff.denoiser import BoundDenoiser, Denoiser
from gendiff.errors import SamplingError
from gendiff.schedules import Parts, Schedule
from gendiff.spaces import Space

EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True)
class Guidance:
    """How far, where and how to move from the worse estimate; see the module.

    Args:
        scale: w; 1 changes nothing and makes one call only, 0 is the worse model.
        interval: Of sigma / alpha, from (exclusive) and to: there is guidance inside alone.
        rescale: phi in [0, 1]: how far the result is scaled to the better one's deviation.
        parallel: APG's eta, usually in [0, 1]; 1 keeps all.
        threshold: APG's r, over the square root of the number of elements: in the data's units.
    """

    scale: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    rescale: float = 0.0
    parallel: float = 1.0
    threshold: float = math.inf

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high:
            raise ValueError(f"interval=[{low:g}, {high:g}]: 0 <= low < high is needed")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale={self.rescale:g}: a number in [0, 1] is needed")
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold:g}: a positive number is needed")
        if not (math.isfinite(self.scale) and math.isfinite(self.parallel)):
            raise ValueError(
                f"scale={self.scale:g}, parallel={self.parallel:g}: finite numbers are needed"
            )

    def inside(self, schedule: Schedule, t: Any) -> Any:
        """Whether there is guidance at a time (a bool), or at a time for each sample, (B,)."""
        if self.scale == 1 or self.interval == EVERYWHERE:
            return self.scale != 1
        low, high = self.interval  # in log-SNR, as sigma / alpha may be infinite
        least, most = -2 * math.log(high), math.inf if low == 0 else -2 * math.log(low)
        if isinstance(t, Tensor):
            log_snr = schedule.log_snr(t.double())
            return (least <= log_snr) & (log_snr < most)
        return least <= schedule.level(t).log_snr < most

    def calls(self, schedule: Schedule, t: Any) -> Any:
        """Network calls of one call at a time (an int), or at a time for each sample, (B,)."""
        return 1 + self.inside(schedule, t)

    def combine(self, better: Tensor, worse: Tensor, space: Space) -> Tensor:
        """The guided estimate."""
        if self.parallel == 1 and self.threshold == math.inf:
            x_hat = torch.lerp(worse, better, self.scale)
        else:
            change = better - worse
            shrink = (self.threshold / _rms(change, space)).clamp(max=1)
            change = space.expand(shrink) * change
            along = space.mean(change * better) / _rms(better, space).square()
            change = change - (1 - self.parallel) * space.expand(along) * better
            x_hat = better + (self.scale - 1) * change
        if self.rescale:
            ratio = _std(better, space) / _std(x_hat, space)
            x_hat = space.expand(1 + self.rescale * (ratio - 1)) * x_hat
        return x_hat


def _rms(value: Tensor, space: Space) -> Tensor:
    return space.mean(value.square()).clamp(min=1e-30).sqrt()  # divided by, and differentiated


def _std(value: Tensor, space: Space) -> Tensor:
    return _rms(value - space.expand(space.mean(value)), space)


@dataclass(frozen=True)
class Guided:
    """The denoiser of two; two network calls where there is guidance, else one.

    Args:
        better: What is moved; its schedule is that of the samples, its variance is kept.
        worse: What it is moved away from, under the same schedule.
        guidance: How.

    Raises:
        SamplingError: An interval of noise, and parts that reach a noise at different times.
    """

    better: BoundDenoiser
    worse: BoundDenoiser
    guidance: Guidance

    def __post_init__(self) -> None:
        if self.guidance.interval != EVERYWHERE and isinstance(self._schedule, Parts):
            raise SamplingError("parts reach a noise at different times: guide without interval")

    @property
    def _schedule(self) -> Schedule:
        return self.better.denoiser.schedule

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The guided estimate."""
        return self.with_variance(x_t, t)[0]

    def with_variance(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """The guided estimate, and the better model's learned variance."""
        x_hat, variance = self.better.with_variance(x_t, t)
        inside, space = self.guidance.inside(self._schedule, t), self.better.space
        if isinstance(inside, Tensor):
            guided = self.guidance.combine(x_hat, self.worse(x_t, t), space)
            return torch.where(space.expand(inside.to(x_t.device)), guided, x_hat), variance
        if not inside:
            return x_hat, variance
        return self.guidance.combine(x_hat, self.worse(x_t, t), space), variance


def classifier_free(conditional: BoundDenoiser, guidance: Guidance) -> Guided:
    """Guidance by the same network with its condition hidden.

    Raises:
        SamplingError: There is no condition.
    """
    cond = conditional.cond
    if cond is None:
        raise SamplingError("guidance needs a condition, and this model has none. Use scale 1")
    device = next(iter(cond.values.values())).device
    hidden = torch.ones(conditional.space.batch_size, dtype=torch.bool, device=device)
    return Guided(conditional, replace(conditional, cond=cond.drop(hidden)), guidance)


def autoguidance(better: BoundDenoiser, weaker: Denoiser, guidance: Guidance) -> Guided:
    """Guidance by a weaker network, bound to the same samples and under the same schedule.

    Raises:
        SamplingError: The weaker network knows noise levels only as times of another schedule.
    """
    schedule = better.denoiser.schedule
    if weaker.schedule != schedule and not weaker.uses_log_snr:
        raise SamplingError(
            "the guide's network embeds the time of another schedule. Use a guide that was "
            "trained with noise_input=log_snr, or under the same schedule"
        )
    return Guided(
        better, replace(weaker, schedule=schedule).bind(better.space, better.cond), guidance
    )


class Clip(ABC):
    """A rule that keeps estimates in the data's range; instances are frozen values."""

    @abstractmethod
    def __call__(self, x_hat: Tensor, space: Space) -> Tensor:
        """The estimate in range, of the shape of ``x_hat``; itself where it is in range."""


@dataclass(frozen=True)
class NoClip(Clip):
    """No limit."""

    def __call__(self, x_hat: Tensor, space: Space) -> Tensor:
        return x_hat


@dataclass(frozen=True)
class StaticClip(Clip):
    """Static thresholding: every element limited to [-limit, limit].

    Args:
        limit: The data's largest absolute value, in the data's units.
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def __call__(self, x_hat: Tensor, space: Space) -> Tensor:
        return x_hat.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class DynamicClip(Clip):
    """Dynamic thresholding: what is out of range moves in with the whole sample.

    Args:
        quantile: Of a sample's absolute values, over all its live elements, in [0, 1].
        limit: The data's largest absolute value, in the data's units.
    """

    quantile: float = 0.995
    limit: float = 1.0

    def __post_init__(self) -> None:
        _check_limit(self.limit)
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile={self.quantile:g}: a number in [0, 1] is needed")

    def __call__(self, x_hat: Tensor, space: Space) -> Tensor:
        size = space.quantile(x_hat.abs(), self.quantile).clamp(min=self.limit)
        shrunk = space.expand(self.limit / size) * x_hat
        return shrunk.clamp(-self.limit, self.limit)


def _check_limit(limit: float) -> None:
    if not 0 < limit < math.inf:
        raise ValueError(f"limit={limit:g}: a positive number is needed")


CLIPS: dict[str, type[Clip]] = {"none": NoClip, "static": StaticClip, "dynamic": DynamicClip}


@dataclass(frozen=True)
class Clipped:
    """A denoiser whose estimates are kept in the data's range.

    What is clipped is projected again: a point set's columns stay centred, and may leave the
    range by what their mean moved.

    Args:
        denoiser: The model, guided or not; its variance is kept.
        space: The batch's space.
        clip: How.
    """

    denoiser: BoundDenoiser | Guided
    space: Space
    clip: Clip

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The clipped estimate."""
        return self.with_variance(x_t, t)[0]

    def with_variance(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """The clipped estimate, and the model's learned variance."""
        x_hat, variance = self.denoiser.with_variance(x_t, t)
        return self.space.project(self.clip(x_hat, self.space)), variance
