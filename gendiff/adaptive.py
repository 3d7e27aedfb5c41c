r"""The probability-flow ODE with steps that each sample chooses for itself.

With :math:`y = x / \alpha` and :math:`\rho = \sigma / \alpha` every schedule's ODE is

.. math:: \frac{dy}{d\rho} = \hat\epsilon = \frac{y - \hat x(\alpha y, t(\rho))}{\rho} .

Bogacki & Shampine's pair of orders 3 and 2 (1989, https://doi.org/10.1016/0893-9659(89)90079-7)
takes a step and estimates its error with three calls, as the last of one step is the first of the
next. Each sample has a time of its own, so that none depends on its company. How many calls
there are is known afterwards only: therefore this is a function and not one of
:data:`gendiff.samplers.SAMPLERS`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.errors import SamplingError
from gendiff.schedules import Parts, Schedule
from gendiff.spaces import Space


class Solved(NamedTuple):
    """The samples, and the network calls that each of them needed, (B,), int64."""

    x: Tensor
    calls: Tensor


@torch.no_grad()
def solve(
    denoiser: DenoiserFn,
    space: Space,
    schedule: Schedule,
    x: Tensor,
    t: float,
    s: float,
    tolerance: float = 1e-3,
    max_steps: int = 1000,
) -> Solved:
    r"""Follows the ODE from t to s.

    A step is taken where the root mean square of its error over
    :math:`tolerance\, (1 + |y|)` is at most 1, which supposes data of size one.

    Args:
        denoiser: ``(x_t, t) -> x_hat``, called with times (B,).
        space: The batch's space.
        schedule: One schedule for the whole state, with signal at t.
        x: States at t, of the batch's shape.
        t, s: 1 >= t > s > 0. The step from s into the data is the estimate there.
        tolerance: Of each step, relative and absolute.
        max_steps: Of tried steps, before it is an error.

    Raises:
        SamplingError: A value is out of range, there is no signal at t, or too many steps.
    """
    if isinstance(schedule, Parts):
        raise SamplingError("parts with schedules of their own have no common time; use heun")
    if not 1 >= t > s > 0 or not tolerance > 0:
        raise SamplingError(
            f"t={t:g}, s={s:g}, tolerance={tolerance:g}: 1 >= t > s > 0 and a positive tolerance "
            "are needed"
        )
    if schedule.level(t).alpha == 0:
        raise SamplingError(f"t={t:g}: the state has no signal there. Start at a smaller t")

    def field(y: Tensor, rho: Tensor) -> Tensor:
        time = schedule.inverse(-2 * rho.log())
        alpha = space.expand(schedule(time)[0].to(y))
        return (y - denoiser(alpha * y, time)) / space.expand(rho.to(y))

    def combine(y: Tensor, h: Tensor, *terms: tuple[float, Tensor]) -> Tensor:
        slope = sum((b * k for b, k in terms), torch.zeros_like(y))
        return y + space.expand(h.to(y)) * slope

    (now, end), device = (schedule.level(t), schedule.level(s)), x.device
    y = x / now.alpha
    rho = torch.full((space.batch_size,), now.sigma / now.alpha, dtype=torch.float64).to(device)
    last = end.sigma / end.alpha
    h = -rho / 10
    calls = torch.ones_like(rho, dtype=torch.int64)
    k1 = field(y, rho)
    for _ in range(max_steps):
        active = rho > last
        if not active.any():
            return Solved(y * end.alpha, calls)
        h = torch.where(active, torch.maximum(h, last - rho), 0.0)
        k2 = field(combine(y, h / 2, (1, k1)), rho + h / 2)
        k3 = field(combine(y, 3 * h / 4, (1, k2)), rho + 3 * h / 4)
        new = combine(y, h, (2 / 9, k1), (1 / 3, k2), (4 / 9, k3))
        k4 = field(new, rho + h)
        error = combine(
            torch.zeros_like(y), h, (-5 / 72, k1), (1 / 12, k2), (1 / 9, k3), (-1 / 8, k4)
        )
        scaled = error / (tolerance * (1 + torch.maximum(y.abs(), new.abs())))
        size = space.mean(scaled.square()).sqrt().double()
        taken = active & (size <= 1)
        here = space.expand(taken)
        y, k1 = torch.where(here, new, y), torch.where(here, k4, k1)
        reached = torch.where(h == last - rho, last, rho + h)  # exactly, not to rounding
        rho = torch.where(taken, reached, rho)
        calls += 3 * active
        h = h * (0.9 * size.clamp(min=1e-9) ** (-1 / 3)).clamp(0.2, 5.0)
    raise SamplingError(
        f"{max_steps} steps did not reach s={s:g} at tolerance={tolerance:g}. Raise either"
    )
