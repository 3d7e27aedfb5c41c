r"""The training objective: one path, with times and weights as data.

.. math:: L = \mathbb E_{t, x, \epsilon}\; w(\lambda_t)\, \lVert \hat x(x_t, t) - x \rVert^2,
          \qquad \lambda = \log snr.

The weight is stated once, on :math:`\hat x`, as a function of the log-SNR. Since
:math:`\hat x - x = c_{out} (F - target)`, the same loss in the network's own units has the weight
:math:`w\, c_{out}^2`, and that is how it is computed: no subtraction of large numbers, and the
same weight gives the same loss whatever is predicted. Some pairs are identities of the papers:

=========  ===========================================  =========================================
weight      w(snr)                                       mean squared error of
=========  ===========================================  =========================================
``eps``     snr                                          eps: DDPM's L_simple (eq. 14)
``x``       1                                            x
``v``       1 + snr                                      v, for VP schedules
``flow``    :math:`(1 + \sqrt{snr})^2`                   the velocity of rectified flow
``edm``     :math:`snr + 1 / s^2`                        F, with EDM's preconditioning (table 1)
``min_snr`` :math:`\min(snr, \gamma)`                    Hang et al., 2023, eq. 8
``p2``      :math:`snr / (k + snr)^\gamma`                Choi et al., 2022
``vlb``     :math:`snr / 2 p(\lambda)`                    the variational bound, below
``sigmoid`` ``vlb``'s times sigmoid(b - λ)                Kingma & Gao, 2023
=========  ===========================================  =========================================

The last two weigh an integral over the log-SNR, and so divide by the density :math:`p(\lambda)`
with which it is drawn: the times then say where the integral is sampled, not what it is. In the
limit of fine steps the divergences of the variational bound are

.. math:: \tfrac12 \int snr\, \lVert \hat x - x \rVert^2\, d\lambda
          = \mathbb E_t\, \frac{snr}{2\, p(t)}\, \Big(-\frac{d\lambda}{dt}\Big)
            \lVert \hat x - x \rVert^2

(Kingma et al., 2021, https://arxiv.org/abs/2107.00630, eq. 17), as :math:`snr_s - snr_t =
\int snr\, d\lambda` is twice a step's weight there. Near the data the integrand tends to a
constant in λ, so draw times whose λ has finite moments, such as ``log_normal``: with ``uniform``
ones few draws hold most of the loss.

Columns that hold a one-hot code have, in place of their squared error, the cross-entropy of
x_hat's distribution in nats, at one weight for all noise levels (as Dieleman et al., 2022,
https://arxiv.org/abs/2211.15089, section 3.2): it is bounded, so it needs no other.

A modality may add a distance of :math:`\hat x` from x of its own, such as one of features or of
spectra, at one weight for all noise levels, to the squared error:

.. math:: L = \mathbb E_{t, x, \epsilon}\; w(\lambda_t)\, \lVert \hat x - x \rVert^2
          + w_d\, d(\hat x, x).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from gendiff.denoiser import PREDICTIONS, Denoiser, category_logits, noise_number, scalings
from gendiff.noise import NoiseSource, generator
from gendiff.schedules import Schedule
from gendiff.singlestep import interpolate_variance, posterior
from gendiff.spaces import Batch


class Times(ABC):
    """A density over times, as the map from a uniform number to a time (its quantile function).

    One that follows the losses keeps them in a tensor, its history. The history is not in the
    density but with whoever trains, who saves it: see :meth:`start`, :meth:`draw`,
    :meth:`record`.
    """

    @abstractmethod
    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        """Times in (0, 1] for float64 numbers u in (0, 1), both of shape (B,)."""

    def start(self) -> Tensor:
        """The history before the first step; empty for a density that does not follow losses."""
        return torch.zeros(0)

    def draw(self, u: Tensor, schedule: Schedule, history: Tensor) -> tuple[Tensor, Tensor]:
        """Times, and the importance weights that undo where they were drawn, both (B,)."""
        return self(u, schedule), torch.ones_like(u)

    def record(self, history: Tensor, t: Tensor, loss: Tensor) -> Tensor:
        """The history after a step with these times and losses, both (B,); a new tensor."""
        return history

    def log_density(self, t: Tensor) -> Tensor:
        """The logarithm of the density of t, (B,)."""
        return torch.zeros_like(t)

    def log_snr_density(self, t: Tensor, schedule: Schedule) -> Tensor:
        """The logarithm of the density of the log-SNR, at times t, of the shape of the log-SNR."""
        with torch.enable_grad():
            t = t.detach().requires_grad_()
            log_snr = schedule.log_snr(t)
            columns = log_snr.reshape(len(t), -1).unbind(1)
            rates = [torch.autograd.grad(c.sum(), t, retain_graph=True)[0] for c in columns]
        log_rate = (-torch.stack(rates, 1)).log().reshape(log_snr.shape)
        density = self.log_density(t.detach())
        return density.reshape(-1, *[1] * (log_rate.ndim - 1)) - log_rate


@dataclass(frozen=True)
class Uniform(Times):
    """Uniform in t; on the grid k/T, k = 1…T, if ``steps`` T is given (DDPM).

    Args:
        steps: T, or None for all times.
    """

    steps: int | None = None

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return u if self.steps is None else torch.ceil(u * self.steps) / self.steps


@dataclass(frozen=True)
class LogitNormal(Times):
    """logit(t) is normal (Esser et al., 2024, https://arxiv.org/abs/2403.03206, section 3.1).

    Args:
        mean, std: Of the logit.
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))

    def log_density(self, t: Tensor) -> Tensor:
        """See :meth:`Times.log_density`."""
        logit = torch.logit(t)
        return _log_normal(logit, self.mean, self.std) - (t * (1 - t)).log()


@dataclass(frozen=True)
class LogNormal(Times):
    """log(sigma / alpha) is normal (Karras et al., 2022, table 1), sigma in the data's units.

    Times beyond the schedule's end are moved to the end.

    Args:
        mean, std: Of the logarithm.
    """

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        log_sigma = self.mean + self.std * torch.special.ndtri(u)
        return schedule.inverse(-2 * log_sigma).clamp(max=1)

    def log_snr_density(self, t: Tensor, schedule: Schedule) -> Tensor:
        """See :meth:`Times.log_snr_density`; without the times that were moved to the end."""
        log_sigma = schedule.log_snr(t) / -2
        return _log_normal(log_sigma, self.mean, self.std) - math.log(2)


@dataclass(frozen=True)
class LossSecondMoment(Uniform):
    r"""Uniform in t, drawn more often where the loss is large, at weights that undo it.

    .. math:: L = \mathbb E_{k \sim p}\, \frac{L_k}{K p_k},
              \qquad p_k \propto \sqrt{\mathbb E[L_k^2]}

    (Nichol & Dhariwal, 2021, https://arxiv.org/abs/2102.09672, section 3.3, eq. 18). The unit
    interval has K equal bins. A bin's mean is over its last 10 squared losses, as they were before
    the importance weight; until every bin has 10, all have the same p. As in the authors' code, a
    share of 0.001 stays uniform: a bin without loss is still seen, and no weight exceeds 1000.

    Args:
        steps: T of :class:`Uniform`'s grid, a multiple of K.
        bins: K.

    Raises:
        ValueError: K is not positive or does not divide T.
    """

    bins: int = 100
    kept: ClassVar[int] = 10
    uniform_share: ClassVar[float] = 0.001

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins={self.bins}: a number of at least 1 is needed")
        if self.steps is not None and self.steps % self.bins:
            raise ValueError(f"steps={self.steps}: a multiple of bins={self.bins} is needed")

    def start(self) -> Tensor:
        """Squared losses (K, 10), the oldest first, NaN where there is none yet; float64."""
        return torch.full((self.bins, self.kept), math.nan, dtype=torch.float64)

    def probabilities(self, history: Tensor) -> Tensor:
        """p_k, (K,)."""
        uniform = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        if history.isnan().any() or not history.any():
            return uniform
        root = history.mean(1).sqrt()
        return torch.lerp(root / root.sum(), uniform, self.uniform_share)

    def draw(self, u: Tensor, schedule: Schedule, history: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Times.draw`; the times are the quantiles of the piecewise constant p."""
        p = self.probabilities(history)
        ends = p.cumsum(0)
        k = torch.searchsorted(ends, u).clamp(max=self.bins - 1)
        inside = ((u - ends[k] + p[k]) / p[k]).clamp(0, 1)
        return self((k + inside) / self.bins, schedule), 1 / (self.bins * p[k])

    def record(self, history: Tensor, t: Tensor, loss: Tensor) -> Tensor:
        """See :meth:`Times.record`; losses that are not finite are left out."""
        history, square = history.clone(), loss.to(history).square()
        bins = torch.ceil(t * self.bins - 1e-9).long().clamp(min=1) - 1  # 7 / 100 * 100 > 7
        seen = square.isfinite()
        for k in bins[seen].unique().tolist():
            history[k] = torch.cat([history[k], square[seen & (bins == k)]])[-self.kept :]
        return history


@dataclass(frozen=True)
class UniformFlowTime(Times):
    """Uniform in sigma / (alpha + sigma), rectified flow's time, up to the schedule's end.

    A step of DDIM that leaps over a share of this time leaps over the same share of a straight
    line from noise to data, whichever the schedule.
    """

    def __call__(self, u: Tensor, schedule: Schedule) -> Tensor:
        return schedule.inverse(-2 * torch.logit(u * self._last(schedule))).clamp(max=1)

    def log_snr_density(self, t: Tensor, schedule: Schedule) -> Tensor:
        """See :meth:`Times.log_snr_density`: that of a logistic law, cut off at the end."""
        half = schedule.log_snr(t) / 2
        log_density = torch.nn.functional.logsigmoid
        whole = math.log(2) + self._last(schedule).log()
        return log_density(half) + log_density(-half) - whole

    def _last(self, schedule: Schedule) -> Tensor:
        end = torch.ones(1, dtype=torch.float64)
        return torch.sigmoid(-schedule.log_snr(end) / 2)


def _log_normal(x: Tensor, mean: float, std: float) -> Tensor:
    return -(((x - mean) / std) ** 2) / 2 - math.log(std * math.sqrt(2 * math.pi))


TIMES: dict[str, type[Times]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "log_normal": LogNormal,
    "flow": UniformFlowTime,
    "loss_second_moment": LossSecondMoment,
}


class Weight(ABC):
    """A weight on the squared error of x_hat, as the logarithm of w at a log-SNR.

    Where ``integral`` is true it weighs an integral over the log-SNR, else a mean over the times.
    """

    integral: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        """Log w, of the shape of ``log_snr``."""


@dataclass(frozen=True)
class Eps(Weight):
    """The squared error of eps, DDPM's L_simple."""

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return log_snr


@dataclass(frozen=True)
class X(Weight):
    """The squared error of x."""

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return torch.zeros_like(log_snr)


@dataclass(frozen=True)
class V(Weight):
    """The squared error of v."""

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return torch.nn.functional.softplus(log_snr)


@dataclass(frozen=True)
class FlowMatching(Weight):
    """The squared error of the velocity eps - x (conditional flow matching)."""

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return 2 * torch.nn.functional.softplus(log_snr / 2)


@dataclass(frozen=True)
class EDMWeight(Weight):
    """(sigma^2 + s^2) / (sigma s)^2, the weight that makes EDM's error uniform at the start."""

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return torch.logaddexp(log_snr, log_snr.new_tensor(-2 * math.log(data_std)))


@dataclass(frozen=True)
class MinSNR(Weight):
    """min(snr, gamma) (Hang et al., 2023, https://arxiv.org/abs/2303.09556).

    Args:
        gamma: The largest weight, 5 in the paper.
    """

    gamma: float = 5.0

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return log_snr.clamp(max=math.log(self.gamma))


@dataclass(frozen=True)
class P2(Weight):
    """snr / (k + snr)^gamma (Choi et al., 2022, https://arxiv.org/abs/2204.00227).

    Args:
        gamma: The larger, the less does little noise count; 0 for snr itself.
        k: The signal-to-noise ratio from which on there is less weight, positive.
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if not self.k > 0:
            raise ValueError(f"k={self.k}: a positive number is needed")

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        log_k = log_snr.new_tensor(math.log(self.k))
        return log_snr - self.gamma * torch.logaddexp(log_snr, log_k)


@dataclass(frozen=True)
class VLB(Weight):
    """The variational bound, in nats for each element; see the module."""

    integral: ClassVar[bool] = True

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        return log_snr - math.log(2)


@dataclass(frozen=True)
class Sigmoid(VLB):
    """The bound's integrand times sigmoid(b - log snr): it tends to a constant weight on x.

    Kingma & Gao, 2023 (https://arxiv.org/abs/2303.00848); Hoogeboom et al., 2024
    (https://arxiv.org/abs/2410.19324).

    Args:
        bias: b; the smaller, the less do fine details count.
    """

    bias: float = 2.0

    def __call__(self, log_snr: Tensor, data_std: float) -> Tensor:
        bound = super().__call__(log_snr, data_std)
        return bound + torch.nn.functional.logsigmoid(self.bias - log_snr)


WEIGHTS: dict[str, type[Weight]] = {
    "eps": Eps,
    "x": X,
    "v": V,
    "flow": FlowMatching,
    "edm": EDMWeight,
    "min_snr": MinSNR,
    "p2": P2,
    "vlb": VLB,
    "sigmoid": Sigmoid,
}


class Loss(NamedTuple):
    """The mean loss, at the importance weights if there are any, and each sample's.

    The samples' losses, which carry no importance weight, log-SNR and times have the shape (B,).
    """

    mean: Tensor
    per_sample: Tensor
    log_snr: Tensor
    t: Tensor


@dataclass(frozen=True)
class Objective:
    """Draws times and noise, calls the network, weighs the error.

    Args:
        times: The density of times.
        weight: The weight.
        stratified: Spread the batch's times evenly: the uniform numbers are (i + u_i) / B over all
            ranks and accumulation steps. Same mean, less variance.
        cond_dropout: Probability with which a sample's condition is hidden.
        vlb_weight: Weight of the variational bound, in bits/dim, that trains a learned variance
            (Nichol & Dhariwal, 2021, eq. 16: 0.001).
        vlb_steps: T of that bound's chain. The bound is exact for times on its grid,
            ``Uniform(steps=T)``.
        category_weight: Weight of the cross-entropy of columns that hold a one-hot code.
        distance: The modality's own distance of x_hat from a batch's data, (B,).
        distance_weight: Its weight w_d.
    """

    times: Times
    weight: Weight
    stratified: bool = True
    cond_dropout: float = 0.0
    vlb_weight: float = 0.001
    vlb_steps: int = 1000
    category_weight: float = 1.0
    distance: Callable[[Tensor, Batch], Tensor] | None = None
    distance_weight: float = 1.0

    def draw(self, count: int, seed: int, step: int, slot: int = 0, slots: int = 1) -> Tensor:
        """Uniform numbers (count,) in (0, 1), float64: part ``slot`` of ``slots`` of the step's.

        A slot is an accumulation step of a process. The slots' numbers together are stratified,
        and they are the same however the step's batch is cut into slots.
        """
        total = count * slots
        u = torch.rand(total, generator=generator("times", seed, step), dtype=torch.float64)
        if self.stratified:
            u = (torch.arange(total, dtype=torch.float64) + u) / total
        return u[slot * count :][:count].clamp(min=1e-12, max=1 - 1e-12)

    def log_weight(self, denoiser: Denoiser, t: Tensor) -> Tensor:
        """Log w on the squared error of x_hat at times (B,), of the shape of the log-SNR."""
        log_snr = denoiser.schedule.log_snr(t)
        log_w = self.weight(log_snr, denoiser.data_std)
        if self.weight.integral:
            log_w = log_w - self.times.log_snr_density(t, denoiser.schedule)
            log_w = log_w.masked_fill(log_snr == -math.inf, -math.inf)  # no signal, nothing to add
        return log_w

    def __call__(
        self,
        denoiser: Denoiser,
        batch: Batch,
        noise: NoiseSource,
        *,
        history: Tensor | None = None,
        seed: int,
        step: int,
        slot: int = 0,
        slots: int = 1,
    ) -> Loss:
        """The loss of one batch; random numbers are functions of the integers given.

        Args:
            denoiser: Network, schedule and prediction.
            batch: The data.
            noise: Source of eps, ``step`` is the draw; where the batch has an eps, that is taken.
            history: What :class:`Times` made of the steps before; None: there were none.
            seed, step: Name the random numbers of times and dropped conditions.
            slot, slots: See :meth:`draw`.
        """
        space, x = batch.space, batch.x
        u = self.draw(space.batch_size, seed, step, slot, slots)
        history = self.times.start() if history is None else history
        t, importance = self.times.draw(u, denoiser.schedule, history)
        cond = batch.cond
        if cond is not None and self.cond_dropout:
            count = space.batch_size
            chance = torch.rand(count * slots, generator=generator("dropout", seed, step))
            hidden = chance[slot * count :][:count] < self.cond_dropout
            cond = cond.drop(hidden.to(x.device))
        eps = space.noise(noise, step) if batch.eps is None else batch.eps
        return self.at(denoiser, Batch(x, space, cond), t, eps, importance)

    def at(
        self,
        denoiser: Denoiser,
        batch: Batch,
        t: Tensor,
        eps: Tensor,
        importance: Tensor | None = None,
    ) -> Loss:
        """The loss at given times (B,), float64 on the CPU, and noise, of the shape of x.

        The mean is over the samples' losses times ``importance``, (B,), if it is given.
        """
        space, x = batch.space, batch.x
        alpha, sigma = denoiser.schedule(t)
        log_snr = denoiser.schedule.log_snr(t)
        p, q = PREDICTIONS[denoiser.prediction](alpha, sigma, denoiser.data_std)
        scales = scalings(denoiser.prediction, denoiser.data_std, alpha, sigma)
        weight = self.log_weight(denoiser, t).exp() * scales.c_out**2

        def rows(value: Tensor) -> Tensor:
            return space.expand(value.to(x))

        x_t = rows(alpha) * x + rows(sigma) * eps
        number = (noise_number(log_snr) if denoiser.uses_log_snr else 1000 * t).to(x)
        out, variance = denoiser.network(rows(scales.c_in) * x_t, number, batch.cond, space)
        error = rows(weight) * (space.project(out) - (rows(p) * x + rows(q) * eps)).square()
        x_hat = rows(scales.c_skip) * x_t + rows(scales.c_out) * out
        for part in denoiser.categories:
            logits = category_logits(part, out, x_t, space, alpha, sigma)
            entropy = -part.of(x) / part.scale * logits.log_softmax(1)
            part.of(error).copy_(self.category_weight * entropy)
            part.of(x_hat).copy_(part.scale * logits.softmax(1))
        loss = space.mean(error)
        x_hat = space.project(x_hat)
        if self.distance is not None:
            loss = loss + self.distance_weight * self.distance(x_hat, batch)
        if variance is not None:
            bound = self._variance_bound(denoiser.schedule, batch, t, x_hat.detach(), variance)
            loss = loss + self.vlb_weight * bound
        mean = (loss if importance is None else importance.to(loss) * loss).mean()
        return Loss(mean, loss.detach(), log_snr if log_snr.ndim == 1 else log_snr[:, 0], t)

    def _variance_bound(
        self, schedule: Schedule, batch: Batch, t: Tensor, x_hat: Tensor, v: Tensor
    ) -> Tensor:
        r"""T times KL(q(x_s | x_t, x) || p(x_s | x_t)), s = t - 1/T, in bits/dim, (B,).

        The mean comes from x_hat with its gradient stopped, so that the bound trains the variance
        only (Nichol & Dhariwal, 2021, section 3.1). The chain's first step, a decoder, is left
        out: it has no variance to learn.
        """
        space, steps = batch.space, self.vlb_steps
        k = torch.round(t * steps)
        inner = (k >= 2).to(x_hat)
        k = k.clamp(min=2)
        low, high, gain = posterior(schedule, k / steps, (k - 1) / steps)
        low, high = (space.expand(value.to(x_hat)) for value in (low, high))
        log_variance = interpolate_variance(low, high, v)
        offset = space.expand(gain.to(x_hat)) * (batch.x - x_hat)
        kl = log_variance - low + (low - log_variance).exp() - 1
        kl = (kl + offset.square() * (-log_variance).exp()) / 2
        return steps * inner * space.mean(kl) / math.log(2)
