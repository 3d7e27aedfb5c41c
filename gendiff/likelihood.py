r"""How probable data are under a model: the variational bound and the ODE's log-likelihood.

Both see a denoiser ``(x_t, t) -> x_hat`` only, and both count the degrees of freedom of the
space: densities of centred columns are densities on the subspace of zero mean. Columns that hold
a one-hot code (:class:`gendiff.spaces.Categories`) are continuous here, as everywhere in a state:
the result is then a density of the code, not a probability of the category.

**The bound** of the chain t_0 > … > t_N = 0 (Ho et al., 2020, eq. 5) has three parts,

.. math:: -\log p(x) \le \underbrace{KL(q(x_{t_0} | x)\, \|\, \mathcal N(0, \sigma^2 I))}_{prior}
          + \sum KL(q(x_s | x_t, x)\, \|\, p(x_s | x_t)) \underbrace{- \log p(x | x_{t_{N-1}})
          }_{decoder}.

The prior is centred. What a schedule leaves of the data at its end, :math:`\alpha x`, therefore
costs :math:`snr\, |x|^2 / 2` nats in the bound, and shifts the ODE's density by as much as the
mean that is left, in units of :math:`\sigma`. This is a property of VE and EDM (and, smaller, of
DDPM's chain), whose samplers start without that mean too: the model has it, no estimate does.

**The ODE** (Song et al., 2021, https://arxiv.org/abs/2011.13456, eq. 39) is integrated for
:math:`z = x_t / \sqrt{\alpha^2 + \sigma^2}` in :math:`l = \log(\sigma / \alpha)`, in which
neither end of any schedule is singular. With :math:`\cos\phi = \alpha / \sqrt{\alpha^2 +
\sigma^2}`,

.. math:: \frac{dz}{dl} = \cos^2\!\phi\, z - \cos\phi\, \hat x, \qquad
          \log p(z_a) = \log p(z_b) + \int_a^b \Big(\cos^2\!\phi\, dof
          - \alpha\, tr \frac{\partial \hat x}{\partial x_t}\Big)\, dl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gendiff.denoiser import DenoiserFn
from gendiff.errors import SamplingError
from gendiff.grids import check_times
from gendiff.noise import NoiseSource
from gendiff.schedules import Parts, Schedule
from gendiff.singlestep import interpolate_variance, posterior
from gendiff.spaces import Batch, Space

# --- the variational bound -----------------------------------------------------------------------


class Bound(NamedTuple):
    """An unbiased estimate of the bound on -log p(x), in nats a sample, term by term.

    ``prior`` and ``decoder`` are (B,), ``steps`` is (N - 1, B) from noise to data, ``dof`` (B,).
    With a discretised decoder this is a bound on a probability's logarithm, else on a density's.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor
    dof: Tensor

    @property
    def nats(self) -> Tensor:
        """The sum of all terms, (B,)."""
        return self.prior + self.steps.sum(0) + self.decoder

    @property
    def bits_per_dim(self) -> Tensor:
        """The sum in bits for each degree of freedom, (B,)."""
        return self.nats / self.dof / math.log(2)


@dataclass(frozen=True)
class Bins:
    """Data of equidistant values: ``width`` apart from ``low`` to ``high`` (Ho et al., eq. 13)."""

    width: float
    low: float = -1.0
    high: float = 1.0


@torch.no_grad()
def variational_bound(
    denoiser: DenoiserFn,
    batch: Batch,
    schedule: Schedule,
    times: list[float],
    noise: NoiseSource,
    variance: str = "small",
    bins: Bins | None = None,
) -> Bound:
    r"""The bound of the chain that :class:`gendiff.singlestep.DDPM` samples on the same times.

    Each term is estimated with one draw of :math:`x_t`, draw i for time i. The decoder is a
    normal density around x_hat of variance :math:`\sigma^2 / \alpha^2` at the last time above 0
    (:math:`\beta_1 / (1 - \beta_1)` in DDPM's chain), or its integral over the datum's bin.

    Args:
        denoiser: ``(x_t, t) -> x_hat``.
        batch: The data.
        schedule: The schedule.
        times: Strictly falling to 0, from a grid.
        noise: Source of eps.
        variance: As for :class:`gendiff.singlestep.DDPM`: small, large or learned.
        bins: The values of discrete data; None for a density.

    Raises:
        SamplingError: The times do not fall to 0, or ``variance`` or ``bins`` do not go with the
            denoiser or the space.
    """
    check_times(times)
    if times[-1] != 0:
        raise SamplingError(f"times end at {times[-1]:g}: the bound needs a chain down to 0")
    if variance not in ("small", "large", "learned"):
        raise SamplingError(f"variance={variance!r}: choose small, large or learned")
    x, space = batch.x, batch.space
    curved = bool((space.trace(torch.ones_like(x)) < space.sum(torch.ones_like(x))).any())
    if curved and (bins is not None or variance == "learned"):
        raise SamplingError(
            "centred columns need a density of fixed variance: use small or large, and no bins"
        )

    def rows(value: Tensor) -> Tensor:
        return space.expand(value.to(x))

    def level(t: float) -> tuple[Tensor, Tensor, Tensor]:
        time = torch.full((space.batch_size,), t, dtype=torch.float64)
        alpha, sigma = schedule(time)
        return time, rows(alpha), rows(sigma)

    _, alpha, sigma = level(times[0])
    prior = space.sum((alpha * x / sigma).square()).double() / 2
    steps = []
    for draw, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        (now, alpha, sigma), v = level(t), None
        x_t = alpha * x + sigma * space.noise(noise, draw)
        if variance == "learned" and s > 0:
            method = getattr(denoiser, "with_variance", None)
            x_hat, v = method(x_t, t) if method is not None else (x, None)
            if v is None:
                raise SamplingError(
                    "variance='learned' needs a backbone with a variance head. Use small or large"
                )
        else:
            x_hat = denoiser(x_t, t)
        if s == 0:
            decoder = _decoder(space, x, x_hat, (sigma / alpha).expand_as(x), bins)
            break
        low, high, gain = (
            rows(value) for value in posterior(schedule, now, torch.full_like(now, s))
        )
        log_variance = {"small": low, "large": high}.get(variance)
        if v is not None:
            log_variance = interpolate_variance(low, high, v)
        assert log_variance is not None
        spread = log_variance - low + torch.expm1(low - log_variance)
        offset = (gain * (x - x_hat)).square() * (-log_variance).exp()
        kl = space.trace(spread.expand_as(x).double()) + space.sum(offset).double()
        steps.append(kl / 2)
    inner = torch.stack(steps) if steps else prior.new_zeros(0, len(prior))
    return Bound(prior, inner, decoder, space.dof().to(x.device))


def _decoder(space: Space, x: Tensor, x_hat: Tensor, std: Tensor, bins: Bins | None) -> Tensor:
    x, x_hat, std = x.double(), x_hat.double(), std.double()
    if bins is None:
        log_norm = space.trace((2 * math.pi * std.square()).log())
        return (log_norm + space.sum(((x - x_hat) / std).square())) / 2
    half = bins.width / 2
    low = torch.where(x < bins.low + half, -math.inf, (x - half - x_hat) / std)
    high = torch.where(x > bins.high - half, math.inf, (x + half - x_hat) / std)
    # In the upper tail both cumulants round to 1: mirror the bin into the lower one.
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    top = torch.special.log_ndtr(high)
    return -space.sum(top + torch.log1p(-(torch.special.log_ndtr(low) - top).exp()))


# --- the probability-flow ODE --------------------------------------------------------------------

_LAST = 10.0  # log(sigma / alpha) where integration ends if a schedule goes on to zero signal


@dataclass(frozen=True)
class _Signs:
    """The signs of another source's noise: Rademacher probes."""

    source: NoiseSource

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        return torch.where(self.source.normal(rows, width, draw) < 0, -1.0, 1.0)


@dataclass(frozen=True)
class _Basis:
    """Draw k is unit vector k of each sample, 0 for a sample of fewer elements."""

    like: Tensor

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        size, out, begin = math.prod(width), [], 0
        flat = self.like.new_zeros(sum(rows) * size)
        for count in rows:
            if draw < count * size:
                out.append(begin + draw)
            begin += count * size
        flat[out] = 1
        return flat.reshape(sum(rows), *width)


def _probes(
    x: Tensor, space: Space, noise: NoiseSource | None, kind: str, count: int
) -> Iterator[Tensor]:
    if kind == "exact":
        live = int(space.sum(torch.ones_like(x)).max().round())
        return (space.noise(_Basis(x), k) for k in range(live))
    if kind not in ("rademacher", "sphere") or noise is None:
        raise SamplingError(
            f"probes={kind!r}: choose exact, or rademacher or sphere with a noise source"
        )
    if kind == "rademacher":
        return (space.noise(_Signs(noise), k).to(x) for k in range(count))
    return (_on_sphere(space, space.noise(noise, k).to(x)) for k in range(count))


def _on_sphere(space: Space, x: Tensor) -> Tensor:
    square = space.sum(x.square()).clamp(min=torch.finfo(x.dtype).tiny)
    return x * space.expand((space.dof().to(x) / square).sqrt())


def ode_log_likelihood(
    denoiser: DenoiserFn,
    batch: Batch,
    schedule: Schedule,
    *,
    steps: int = 64,
    sigma_min: float = 0.002,
    probes: str = "exact",
    noise: NoiseSource | None = None,
    count: int = 1,
) -> Tensor:
    r"""log p(x) in nats a sample, (B,), float64, by the probability-flow ODE.

    The density is that of the data smoothed by noise of standard deviation ``sigma_min``, taken at
    x itself: :math:`p(y)`, :math:`y = x_t / \alpha_t` where :math:`\sigma / \alpha` is
    ``sigma_min``. At the other end it is :math:`\mathcal N(0, \sigma^2 I)` on the subspace, at
    the schedule's end or, if there is no signal there, where :math:`\log(\sigma / \alpha) = 10`.
    The classical Runge-Kutta method (order 4) takes ``steps`` equal steps in
    :math:`\log(\sigma / \alpha)`, each of four network calls with their divergences.

    Args:
        denoiser: ``(x_t, t) -> x_hat``, differentiable.
        batch: The data.
        schedule: The schedule, one for the whole state.
        steps: Steps of the method.
        sigma_min: Smallest sigma / alpha.
        probes: ``"exact"`` divergence, a pass for each element; ``"rademacher"`` or ``"sphere"``:
            Hutchinson's unbiased estimate with the same probes on the whole way, of independent
            signs, or uniform on the sphere of squared radius dof. Where the denoiser only scales,
            as it nearly does close to the data, signs have no spread but in a subspace, and the
            sphere has none.
        noise: Source of the probes, draw k for probe k.
        count: How many probes.

    Raises:
        SamplingError: The state's parts have schedules of their own, an argument is out of range,
            or the probes are unknown.
    """
    if isinstance(schedule, Parts):
        raise SamplingError(
            "parts reach one log-SNR at different times; the ODE needs one schedule"
        )
    if steps < 1 or count < 1:
        raise SamplingError(f"steps={steps}, count={count}: at least 1 of each is needed")
    space, x = batch.space, batch.x
    first, last = math.log(sigma_min), min(-schedule.level(1.0).log_snr / 2, _LAST)
    if not first < last:
        raise SamplingError(
            f"sigma_min={sigma_min:g} is not below the schedule's last noise scale"
        )
    vectors = list(_probes(x, space, noise, probes, count))
    scale = 1.0 if probes == "exact" else 1 / count
    dof = space.dof().to(x.device).double()

    def field(z: Tensor, number: float) -> tuple[Tensor, Tensor]:
        log_snr = torch.tensor(-2 * number, dtype=torch.float64)
        t = min(schedule.inverse(log_snr).item(), 1.0)
        alpha, sigma, _ = schedule.level(t)
        norm = math.hypot(alpha, sigma)
        cos = alpha / norm
        with torch.enable_grad():
            x_t = (norm * z).detach().requires_grad_()
            x_hat = denoiser(x_t, t)
            trace = torch.zeros_like(dof)
            for index, vector in enumerate(vectors):
                more = index + 1 < len(vectors)
                (pull,) = torch.autograd.grad(x_hat, x_t, vector, retain_graph=more)
                trace += space.sum(pull * vector).double()
        return cos**2 * z - cos * x_hat.detach(), cos**2 * dof - alpha * scale * trace

    h = (last - first) / steps
    cos = 1 / math.hypot(1, sigma_min)
    z, gained = cos * x, torch.zeros_like(dof)
    for i in range(steps):
        l0 = first + i * h
        k1, d1 = field(z, l0)
        k2, d2 = field(z + h / 2 * k1, l0 + h / 2)
        k3, d3 = field(z + h / 2 * k2, l0 + h / 2)
        k4, d4 = field(z + h * k3, l0 + h)
        z = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        gained += h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    variance = 1 / (1 + math.exp(-2 * last))  # of z under the prior
    prior = -space.sum(z.square()).double() / variance / 2
    prior -= dof / 2 * math.log(2 * math.pi * variance)
    return prior + gained + dof * math.log(cos)
