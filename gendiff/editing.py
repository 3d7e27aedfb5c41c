r"""Editing: keep a part of something and make the rest, or set out from it part-way.

*Keep.* Let M pick the known elements and y be their values. Where x is known its estimate is x,
and what is known tells of the rest: with C the covariance of x given x_t (see
:mod:`gendiff.steering`),

.. math:: \hat x' = \hat x + C M^\top z, \qquad M C M^\top z = y - M \hat x =: r,

is E[x | x_t, y] if p(x | x_t) is normal (moment matching: Boys et al., 2023,
https://arxiv.org/abs/2310.06721). z is found by a few conjugate gradients, each one backward pass.
Without them this is plain replacement (Song et al., 2021, https://arxiv.org/abs/2011.13456,
appendix I.2), whose unknown part learns of the known one too late. The sampler carries the known
elements along :math:`\alpha_t x + \sigma_t z` as q(x_t | x) says, and churn resamples what was
decided too early (as Lugmayr et al., 2022, "RePaint", https://arxiv.org/abs/2201.09865).

*Vary.* Noise of a chosen level is added to x and taken away by the model (Meng et al., 2022,
"SDEdit", https://arxiv.org/abs/2108.01073): little noise keeps much, much noise keeps little.

*Translate.* Where the file's own condition is known as well as the one asked for, the model says
what the change of condition does, and that is done to x:

.. math:: \hat x' = \hat x(x_t \mid wanted) + x - \hat x(\alpha x + \sigma z \mid own),

with the one noise z that x was given at the start (Kulikov et al., 2024, "FlowEdit",
https://arxiv.org/abs/2412.08629, eq. 11 for every process, at one z for their mean over many).
What the model does not explain of x by its own condition is kept: unlike by variation, much noise
may be given, and a file that is translated to its own condition comes back as it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.errors import SamplingError
from gendiff.schedules import Parts, Schedule
from gendiff.spaces import Space
from gendiff.steering import Linearised


@dataclass(frozen=True)
class Kept:
    """A denoiser whose estimates agree with what is known; see the module.

    Args:
        denoiser: The model, guided or not.
        space: The batch's space.
        schedule: The schedule that the samples are drawn under.
        known: Data, of the batch's shape; what it holds elsewhere does not matter.
        mask: True where it is kept, of the batch's shape.
        iterations: Of conjugate gradients; 0 for replacement.
    """

    denoiser: DenoiserFn
    space: Space
    schedule: Schedule
    known: Tensor
    mask: Tensor
    iterations: int = 4

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The estimate, with what is known in it."""
        space = self.space
        linear = Linearised(self.denoiser, space, self.schedule, x_t, t)
        x_hat = linear.x_hat
        residual = space.part(space.hold(x_hat, self.known, self.mask) - x_hat, self.mask)
        told = self._told(linear, residual)
        # Where noise drowns the data a network's Jacobian is mostly error, and that times
        # sigma^2: what is known moves the rest by no more than it was itself wrong.
        rest = space.sum((told - space.part(told, self.mask)).square())
        told = told * space.expand(_ratio(space.sum(residual.square()), rest).sqrt().clamp(max=1))
        return space.hold(x_hat + told, self.known, self.mask)

    def _told(self, linear: Linearised, residual: Tensor) -> Tensor:
        """C M' z for the z that solves M C M' z = residual."""
        space = self.space
        direction, told = residual, torch.zeros_like(residual)
        norm = space.sum(residual.square())
        for _ in range(self.iterations):
            moved = linear.covariance(direction)
            step = _ratio(norm, linear.variance(direction, moved))
            told = told + space.expand(step) * moved
            residual = residual - space.expand(step) * space.part(moved, self.mask)
            last, norm = norm, space.sum(residual.square())
            direction = residual + space.expand(_ratio(norm, last)) * direction
        return told


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is: there is nothing left to solve, or no direction to solve it in."""
    return torch.where(b > 0, a / b, 0)


@dataclass(frozen=True)
class Translated:
    """A denoiser that changes what a change of condition changes; see the module.

    It belongs to samples that set out from ``alpha x + sigma z`` and get no other noise.

    Args:
        wanted: The model under the condition asked for, guided or not.
        own: The model under the condition that x has.
        space: The batch's space.
        schedule: The schedule that the samples are drawn under.
        x: Data, of the batch's shape.
        z: Unit noise, of the batch's shape.
    """

    wanted: DenoiserFn
    own: DenoiserFn
    space: Space
    schedule: Schedule
    x: Tensor
    z: Tensor

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The estimate, with the model's error on x taken off."""
        time = torch.as_tensor(t, dtype=torch.float64).expand(self.space.batch_size)
        alpha, sigma = (self.space.expand(v.to(self.x)) for v in self.schedule(time))
        error = self.own(alpha * self.x + sigma * self.z, t) - self.x
        return self.wanted(x_t, t) - error


def time_of_noise(schedule: Schedule, noise: float) -> float:
    """The time at which sigma / alpha is ``noise``.

    Args:
        schedule: One schedule for the whole state.
        noise: In the data's units, above 0.

    Raises:
        SamplingError: The schedule does not reach it, or has none such.
    """
    if isinstance(schedule, Parts):
        raise SamplingError(
            "noise: the parts of this model's states have noise levels of their own"
        )
    if not noise > 0:
        raise SamplingError(f"noise={noise:g}: a positive number is needed")
    t = schedule.inverse(torch.tensor(-2 * math.log(noise), dtype=torch.float64)).item()
    if not 0 < t <= 1:
        largest = math.exp(-schedule.level(1.0).log_snr / 2)
        raise SamplingError(f"noise={noise:g}: this model's noise goes up to {largest:g}")
    return t
