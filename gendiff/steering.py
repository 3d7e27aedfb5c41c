r"""Steering samples by any differentiable function of the estimate: denoisers made of denoisers.

By Tweedie's formula the estimate :math:`\hat x = (x_t + \sigma^2 \nabla \log p(x_t)) / \alpha`
moves by :math:`(\sigma^2 / \alpha) \nabla_{x_t} \log p(y | x_t)` when something y is known of x.
And as :math:`\partial \hat x / \partial x_t = (\alpha / \sigma^2) C` with C the covariance of x
given x_t, one vector-Jacobian product through the network gives :math:`C g` for any gradient g of
a function f of the estimate: the direction in which f changes *and* the data may go. So

=============  ===================================  ==========================================
class           the data's law becomes               :math:`\hat x` moves by
=============  ===================================  ==========================================
``Tilted``      :math:`\propto p(x) \exp(-w f(x))`   :math:`-w\, C g`
``Matched``     p(x) given :math:`f(x) = y \pm \tau`  :math:`C g\, (y - f(\hat x)) /
                                                     (\tau^2 + g^\top C g)`
=============  ===================================  ==========================================

Both are exact for Gaussian data and linear f; else they replace p(x | x_t) by its first two
moments. ``Tilted`` is classifier or loss guidance (Dhariwal & Nichol, 2021,
https://arxiv.org/abs/2105.05233; Bansal et al., 2023, https://arxiv.org/abs/2302.07121);
``Matched`` is moment matching (Boys et al., 2023, https://arxiv.org/abs/2310.06721), which has no
scale to be tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.schedules import Schedule
from gendiff.spaces import Space

# A number for each sample, (B,), from states of the batch's shape; differentiable, and no
# sample's number may depend on another sample.
Function = Callable[[Tensor, Space], Tensor]


class Linearised:
    """A denoiser's estimate at one state, and products with the covariance of x given x_t.

    Args:
        denoiser: The model.
        space: The batch's space.
        schedule: The schedule that the samples are drawn under.
        x_t: The state.
        t: Its time, one or (B,).
    """

    def __init__(
        self,
        denoiser: DenoiserFn,
        space: Space,
        schedule: Schedule,
        x_t: Tensor,
        t: float | Tensor,
    ) -> None:
        with torch.enable_grad():
            self._x_t = x_t.detach().requires_grad_()
            self._x_hat = denoiser(self._x_t, t)
        self.space, self.x_hat = space, self._x_hat.detach()
        time = torch.as_tensor(t, dtype=torch.float64, device="cpu").expand(space.batch_size)
        alpha, sigma = schedule(time)
        # A state without signal says nothing of x, and what is known of x nothing of the state.
        factor = torch.where(alpha > 0, sigma**2 / alpha.clamp(min=1e-300), 0)
        self._factor = space.expand(factor.to(x_t))
        self._snr = space.expand((alpha / sigma).square().to(x_t))

    def covariance(self, vector: Tensor) -> Tensor:
        """C vector, (sigma^2 / alpha) (d x_hat / d x_t)' vector."""
        (pulled,) = torch.autograd.grad(self._x_hat, self._x_t, vector, retain_graph=True)
        return self.space.project(self._factor * pulled)

    def variance(self, vector: Tensor, moved: Tensor) -> Tensor:
        r"""vector' C vector, (B,), from ``moved`` = C vector.

        Noise alone spreads x by sigma^2 / alpha^2, and data of one mode by no more; then
        :math:`v^\top C v \ge |C v|^2 \alpha^2 / \sigma^2`. A network's Jacobian need not be a
        covariance: this least value keeps its errors from growing.
        """
        least = self.space.sum(self._snr * moved.square())
        return torch.maximum(self.space.sum(vector * moved), least)

    def gradient(self, function: Function) -> tuple[Tensor, Tensor]:
        """A function of the estimate, (B,), and its gradient."""
        with torch.enable_grad():
            x_hat = self.x_hat.clone().requires_grad_()
            value = function(x_hat, self.space)
            (gradient,) = torch.autograd.grad(value.sum(), x_hat)
        return value.detach(), gradient


@dataclass(frozen=True)
class Tilted:
    """Samples of p(x) exp(-scale * loss(x)), approximately; see the module.

    Args:
        denoiser: The model.
        space: The batch's space.
        schedule: The schedule that the samples are drawn under.
        loss: What is to be small, for each sample.
        scale: w.
    """

    denoiser: DenoiserFn
    space: Space
    schedule: Schedule
    loss: Function
    scale: float = 1.0

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The steered estimate."""
        linear = Linearised(self.denoiser, self.space, self.schedule, x_t, t)
        _, gradient = linear.gradient(self.loss)
        return linear.x_hat - self.scale * linear.covariance(gradient)


@dataclass(frozen=True)
class Matched:
    """Samples of p(x) given that function(x) is ``target``, approximately; see the module.

    Args:
        denoiser: The model.
        space: The batch's space.
        schedule: The schedule that the samples are drawn under.
        function: The property.
        target: y.
        tolerance: tau, a standard deviation in the property's unit: how well the function knows
            the property, or how near is near enough.
    """

    denoiser: DenoiserFn
    space: Space
    schedule: Schedule
    function: Function
    target: float
    tolerance: float

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The steered estimate."""
        linear = Linearised(self.denoiser, self.space, self.schedule, x_t, t)
        value, gradient = linear.gradient(self.function)
        moved = linear.covariance(gradient)
        variance = linear.variance(gradient, moved)
        pull = (self.target - value) / (self.tolerance**2 + variance)
        return linear.x_hat + self.space.expand(pull) * moved
