r"""From a network to an estimate of the data: ``(x_t, t) -> x_hat``.

Everything after this module (samplers, guidance, likelihood) sees a callable ``(x_t, t) -> x_hat``
and nothing else. What a network was trained to put out is a *prediction*: a target
:math:`p\,x + q\,\epsilon` with coefficients that depend on the noise level. With
:math:`x_t = \alpha x + \sigma \epsilon` these are two equations for the two unknowns, so one
formula serves every prediction:

.. math:: \hat x = \frac{q\, x_t - \sigma F}{q \alpha - \sigma p}
          = c_{skip}\, x_t + c_{out}\, F(c_{in}\, x_t).

=========  ==============================================  =====================================
name        target                                          source
=========  ==============================================  =====================================
``eps``     :math:`\epsilon`                                Ho et al., 2020
``x``       :math:`x`                                       Ho et al., 2020
``v``       :math:`(\alpha\epsilon - \sigma x) / r`         Salimans & Ho, 2022
``flow``    :math:`\epsilon - x`                            Lipman et al.; Liu et al., 2023
``edm``     :math:`(\sigma x / s - s \alpha\epsilon) / R`   Karras et al., 2022, table 1
=========  ==============================================  =====================================

with :math:`r^2 = \alpha^2 + \sigma^2`, s the data's standard deviation and
:math:`R^2 = s^2 \alpha^2 + \sigma^2`. The network's input is always scaled by
:math:`c_{in} = 1 / R` (1 for VP schedules and unit data), so that what it sees is a function of
the signal-to-noise ratio alone: a trained network may be sampled under another schedule.

Columns that hold a one-hot code e times c (:class:`gendiff.spaces.Categories`) have an estimate of
their own. Their noise is independent given the data, so by Bayes' rule

.. math:: p(k | x_t) \propto p(k | \text{other elements})\, \exp(c\,\alpha\,x_{t,k} / \sigma^2),

and :math:`\hat x = c\, softmax(F + c\,\alpha\,x_t / \sigma^2)`: the network's output F is a logit
of the first factor only, as the second is known. At sigma = 0 the state itself is the estimate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gendiff.errors import SamplingError
from gendiff.schedules import Parts, Schedule
from gendiff.spaces import Categories, Cond, Space


class DenoiserFn(Protocol):
    """What samplers see: bound to a batch's space and condition."""

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The estimate of the data, of the shape of ``x_t``.

        ``t`` is one time for the whole batch (a float), or one for each sample, (B,).
        """
        ...


def _eps(alpha: Any, sigma: Any, std: float) -> tuple[Any, Any]:
    return 0 * alpha, 0 * alpha + 1


def _x(alpha: Any, sigma: Any, std: float) -> tuple[Any, Any]:
    return 0 * alpha + 1, 0 * alpha


def _v(alpha: Any, sigma: Any, std: float) -> tuple[Any, Any]:
    r = (alpha**2 + sigma**2) ** 0.5
    return -sigma / r, alpha / r


def _flow(alpha: Any, sigma: Any, std: float) -> tuple[Any, Any]:
    return 0 * alpha - 1, 0 * alpha + 1


def _edm(alpha: Any, sigma: Any, std: float) -> tuple[Any, Any]:
    scale = ((std * alpha) ** 2 + sigma**2) ** 0.5
    return sigma / std / scale, -std * alpha / scale


# (alpha, sigma, std of the data) -> (p, q); floats or tensors alike.
PREDICTIONS: dict[str, Callable[[Any, Any, float], tuple[Any, Any]]] = {
    "eps": _eps,
    "x": _x,
    "v": _v,
    "flow": _flow,
    "edm": _edm,
}


class Scalings(NamedTuple):
    """c_in, c_skip and c_out at a noise level; floats, or tensors of shape (B,) or (B, P)."""

    c_in: Any
    c_skip: Any
    c_out: Any


@lru_cache(maxsize=8192)
def _scalings(prediction: str, std: float, alpha: Any, sigma: Any) -> Scalings:
    return scalings(prediction, std, alpha, sigma)


def scalings(prediction: str, std: float, alpha: Any, sigma: Any) -> Scalings:
    """The three scalings of a prediction at the level (alpha, sigma), floats or tensors."""
    p, q = PREDICTIONS[prediction](alpha, sigma, std)
    determinant = q * alpha - sigma * p
    return Scalings(
        1 / ((std * alpha) ** 2 + sigma**2) ** 0.5, q / determinant, -sigma / determinant
    )


# Beyond a signal-to-noise ratio of e^40 either way float32 holds one of the two only, and the
# number that the network embeds must stay finite at both ends of every schedule.
_LOG_SNR_RANGE = 40.0


def noise_number(log_snr: Any) -> Any:
    """What the network embeds: log(sigma / alpha) / 4, Karras et al.'s c_noise for alpha = 1."""
    if isinstance(log_snr, Tensor):
        return log_snr.clamp(-_LOG_SNR_RANGE, _LOG_SNR_RANGE) / -8
    return min(max(log_snr, -_LOG_SNR_RANGE), _LOG_SNR_RANGE) / -8


def _no_signal(prediction: str, t: float) -> SamplingError:
    return SamplingError(
        f"'{prediction}' prediction says nothing of x at t={t:g}, where this schedule has no "
        "signal. Start the grid below t=1 or train with 'v' or 'flow'"
    )


@dataclass(frozen=True)
class Denoiser:
    """A backbone, the schedule it works under, and what it predicts.

    Args:
        backbone: ``(x, noise, cond, space) -> F``, F like x or of twice its width on axis 1, the
            second half being the learned variance's interpolation (Nichol & Dhariwal, 2021).
        schedule: The noise schedule. Any schedule may replace the one of the training.
        prediction: A key of ``PREDICTIONS``.
        data_std: Standard deviation of the data, for c_in and the ``edm`` prediction.
        noise_input: ``"log_snr"``: the network embeds :func:`noise_number`, whatever the
            schedule. ``"time"``: it embeds 1000 t, as the DDPM family does.
        categories: The columns that hold one-hot codes.
    """

    backbone: nn.Module | Callable[..., Tensor]
    schedule: Schedule
    prediction: str = "edm"
    data_std: float = 1.0
    noise_input: str = "log_snr"
    categories: tuple[Categories, ...] = ()

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction={self.prediction!r}: choose from {list(PREDICTIONS)}")

    @property
    def uses_log_snr(self) -> bool:
        """Whether the network embeds the log-SNR."""
        return self.noise_input == "log_snr"

    def bind(self, space: Space, cond: Cond | None = None) -> BoundDenoiser:
        """The denoiser of one batch: a callable ``(x_t, t) -> x_hat``."""
        return BoundDenoiser(self, space, cond)

    def network(
        self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space
    ) -> tuple[Tensor, Tensor | None]:
        """Calls the backbone; returns F in the state's dtype and the second half, if any."""
        out = self.backbone(x, noise, cond, space).to(x.dtype)
        if out.shape == x.shape:
            return out, None
        if out.ndim == x.ndim and out.shape[1] == 2 * x.shape[1]:
            mean, variance = out.chunk(2, 1)
            return mean, variance
        raise ValueError(f"the backbone returned {tuple(out.shape)} for x {tuple(x.shape)}")


def category_logits(
    categories: Categories, out: Tensor, x_t: Tensor, space: Space, alpha: Any, sigma: Any
) -> Tensor:
    """The logits of x_hat's categories, of the shape of their columns.

    Args:
        categories: Which columns.
        out: The network's output.
        x_t: The noisy state.
        space: Their space.
        alpha, sigma: The noise level: floats, or tensors (B,) or (B, P).
    """
    gain = alpha / torch.as_tensor(sigma, dtype=torch.float64).square() * categories.scale
    # Beyond 1e6 the softmax is exact in float32, and infinity times zero would not be.
    gain = gain.clamp(max=1e6).to(x_t).reshape(-1, *gain.shape[1:])
    if gain.ndim == 1:
        gain = gain.expand(space.batch_size)
    rows = space.expand(gain)
    if gain.ndim == 2:
        rows = categories.of(rows)
    return categories.of(out) + rows * categories.of(x_t)


@dataclass(frozen=True)
class BoundDenoiser:
    """A :class:`Denoiser` with the space and the condition of one batch."""

    denoiser: Denoiser
    space: Space
    cond: Cond | None = None

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        """See :class:`DenoiserFn`."""
        return self.with_variance(x_t, t)[0]

    def with_variance(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor | None]:
        """x_hat, and the learned variance's interpolation where the backbone has one."""
        d, space = self.denoiser, self.space
        alpha: Any
        sigma: Any
        if isinstance(t, Tensor) or isinstance(d.schedule, Parts):
            time = torch.as_tensor(t, dtype=torch.float64, device="cpu").expand(space.batch_size)
            number = noise_number(d.schedule.log_snr(time)) if d.uses_log_snr else 1000 * time
            alpha, sigma = d.schedule(time)
            scales = scalings(d.prediction, d.data_std, alpha, sigma)
            if not scales.c_skip.isfinite().all():
                raise _no_signal(d.prediction, time.max().item())
            number = number.to(x_t)
            c_in, c_skip, c_out = (space.expand(c.to(x_t)) for c in scales)
        else:
            level = d.schedule.level(t)
            alpha, sigma = level[:2]
            value = noise_number(level.log_snr) if d.uses_log_snr else 1000 * t
            number = x_t.new_full((space.batch_size,), value)
            try:
                c_in, c_skip, c_out = _scalings(d.prediction, d.data_std, alpha, sigma)
            except ZeroDivisionError:
                raise _no_signal(d.prediction, t) from None
        out, variance = d.network(c_in * x_t, number, self.cond, space)
        x_hat = (
            torch.addcmul(out * c_out, x_t, c_skip)
            if isinstance(c_skip, Tensor)
            else ((out * c_out).add_(x_t, alpha=c_skip))
        )
        for part in d.categories:
            logits = category_logits(part, out, x_t, space, alpha, sigma)
            part.of(x_hat).copy_(part.scale * logits.softmax(1))
        return space.project(x_hat), variance
