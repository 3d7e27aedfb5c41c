from __future__ import annotations

import math

import exactness
import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES, SPACES, normal, parts_of, streams
from torch import Tensor

from gendiff.denoiser import PREDICTIONS, Denoiser
from gendiff.noise import StepNoise
from gendiff.objective import (
    WEIGHTS,
    Eps,
    LogitNormal,
    LogNormal,
    LossSecondMoment,
    Objective,
    Times,
    Uniform,
    V,
    X,
)
from gendiff.schedules import EDM, Cosine, Flow, Parts, Schedule, VPLinear
from gendiff.singlestep import posterior
from gendiff.spaces import Batch, Cond, Dense, Masked, Ragged, Space
from gendiff.testing import ExactNetwork, Gaussian, Mixture

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(
    "check",
    [exactness.weights, exactness.densities, exactness.resampler, exactness.variance_bound],
)
def test_formulas(check: object) -> None:
    check(exactness.engine())  # type: ignore[operator]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("space", ["image", "masked", "ragged"])
def test_one_loss_from_every_prediction(weight: str, schedule: Schedule, space: str) -> None:
    """Networks that say the same have the same loss: w |x_hat - x|^2, whatever they put out."""
    layout, std = SPACES[space], 0.6
    law = Gaussian(schedule, layout, layout.project(normal(*layout.shape)), 0.3)
    x, eps = (layout.noise(streams(layout, seed), 0) for seed in (1, 2))
    t = torch.tensor([0.2, 0.5, 0.85])
    alpha, sigma = (layout.expand(v) for v in schedule(t))
    log_w = WEIGHTS[weight]()(schedule.log_snr(t), std)
    if WEIGHTS[weight].integral:
        log_w = log_w - Uniform().log_snr_density(t, schedule)
    expected = log_w.exp() * layout.mean((law(alpha * x + sigma * eps, t) - x).square())
    for prediction in PREDICTIONS:
        denoiser = Denoiser(
            ExactNetwork(prediction, schedule, law, std), schedule, prediction, std
        )
        loss = Objective(Uniform(), WEIGHTS[weight]()).at(denoiser, Batch(x, layout), t, eps)
        near(loss.per_sample / expected, torch.ones(3), 1e-9)  # eps at alpha^2 = 1e-4
        near(loss.mean, expected.mean(), 1e-9 * expected.max().item())
        near(loss.log_snr, schedule.log_snr(t), 0)


@pytest.mark.parametrize("schedule", [VPLinear(), EDM(20.0), Flow()])
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_exact_denoiser_reaches_the_posterior_variance(schedule: Schedule, t: float) -> None:
    """v sigma^2 / (alpha^2 v + sigma^2); the error is normal, so n errors know their mean square
    to sqrt(2 / n) of itself, and five of these are allowed."""
    v, n = 0.3, 40_000
    space = Dense((n // 10, 10))
    law = Gaussian(schedule, space, torch.full(space.shape, 0.7), v)
    x = 0.7 + math.sqrt(v) * normal(*space.shape, seed=1)
    denoiser = Denoiser(ExactNetwork("v", schedule, law, 1.0), schedule, "v")
    times = torch.full((space.batch_size,), t)
    loss = Objective(Uniform(), X()).at(
        denoiser, Batch(x, space), times, normal(*space.shape, seed=2)
    )
    alpha, sigma, _ = schedule.level(t)
    expected = v * sigma**2 / (alpha**2 * v + sigma**2)
    assert abs(loss.mean / expected - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("times", [Uniform(), LogitNormal(-3.0, 3.0), LogNormal(-1.0, 2.0)])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_bound_s_weight_gives_the_bound(schedule: Schedule, times: Times) -> None:
    r"""The loss, and with the prior's and the decoder's terms the entropy of Gaussian data.

    The error of the exact denoiser is :math:`A x + B \epsilon`: over the signs of
    :math:`x = \pm \sqrt v`, :math:`\epsilon = \pm 1` its mean square has no spread. The mean over
    times is a quadrature over u, from where the log-SNR is 9 on; above, the decoder stands.
    """
    v, n = 0.3, 20_000
    grid = (torch.arange(n) + 0.5) / n
    uniform = isinstance(times, Uniform)
    u = torch.exp(18 * (grid - 1)) if uniform else grid  # finer near the data, du = 18 u
    t = times(u, schedule)
    inside = (schedule.log_snr(t) < 9) & (t < 1)
    t, du = t[inside], (18 * u if uniform else torch.ones(n))[inside] / n
    x = math.sqrt(v) * torch.tensor([1.0, 1.0]).expand(len(t), 2)
    eps = torch.tensor([1.0, -1.0]).expand(len(t), 2)
    space = Dense((len(t), 2))
    law = Gaussian(schedule, space, torch.zeros(space.shape), v)
    denoiser = Denoiser(ExactNetwork("v", schedule, law, 1.0), schedule, "v")
    loss = Objective(times, WEIGHTS["vlb"]()).at(denoiser, Batch(x, space), t, eps)
    integral = (du * loss.per_sample).sum().item()
    first, last = math.exp(9), math.exp(schedule.level(1.0).log_snr)  # snr v / (1 + snr v) / 2
    near(integral, (math.log1p(v * first) - math.log1p(v * last)) / 2, 3e-3)
    decoder = (math.log(2 * math.pi / first) + v * first / (1 + v * first)) / 2
    entropy = (1 + math.log(2 * math.pi * v)) / 2
    near(decoder + integral + v * last / 2, entropy, 3e-3)


def test_no_signal_adds_nothing_to_the_bound() -> None:
    schedule, space = Flow(), Dense((2, 3))
    denoiser = Denoiser(lambda x, *_: torch.sin(x), schedule, "v")
    batch, t = Batch(normal(2, 3, seed=1), space), torch.tensor([0.5, 1.0])
    loss = Objective(Uniform(2), WEIGHTS["vlb"]()).at(denoiser, batch, t, normal(2, 3, seed=2))
    assert loss.per_sample[0] > 0
    assert loss.per_sample[1] == 0


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_score_is_minus_eps_over_sigma(schedule: Schedule) -> None:
    """Of a mixture, by automatic differentiation of its density (Vincent, 2011; Song et al.,
    2021): the exact denoiser's eps_hat, as each prediction gives it."""
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.2], [0.1, -0.9]])
    stds, weights = torch.tensor([0.3, 0.4, 0.2]), torch.tensor([0.5, 0.3, 0.2])
    law = Mixture(schedule, means, stds, weights)
    space = Dense((6, 2))
    for t in (0.1, 0.5, 0.9):
        alpha, sigma, _ = schedule.level(t)
        x_t = (alpha * normal(6, 2, seed=1) + sigma * normal(6, 2, seed=2)).requires_grad_()
        variance = alpha**2 * stds**2 + sigma**2
        square = (x_t[:, None] - alpha * means).square().sum(-1)
        log_p = (weights.log() - variance.log() - square / (2 * variance)).logsumexp(1)
        (score,) = torch.autograd.grad(log_p.sum(), x_t)
        for prediction in PREDICTIONS:
            net = ExactNetwork(prediction, schedule, law, 0.6)
            x_hat = Denoiser(net, schedule, prediction, 0.6).bind(space)(x_t.detach(), t)
            eps_hat = (x_t.detach() - alpha * x_hat) / sigma
            near(score, -eps_hat / sigma, 1e-8)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_parts_have_noise_levels_of_their_own(space: Space) -> None:
    """The loss is the mean over columns of what each part would have alone."""
    schedules = (VPLinear(), Cosine())
    x, eps = (space.noise(streams(space, seed), 0) for seed in (1, 2))
    t = torch.tensor([0.2, 0.5, 0.85])
    objective = Objective(Uniform(), Eps())
    whole = objective.at(
        Denoiser(lambda x, *_: torch.sin(x), Parts(schedules), "v"), Batch(x, space), t, eps
    )
    expected = torch.zeros(3)
    for schedule, (part, first, last) in zip(schedules, parts_of(space), strict=True):
        alone = Batch(x[:, first:last], part)
        denoiser = Denoiser(lambda x, *_: torch.sin(x), schedule, "v")
        loss = objective.at(denoiser, alone, t, eps[:, first:last])
        expected += (last - first) / 5 * loss.per_sample
    near(whole.per_sample, expected, 1e-12)
    near(whole.log_snr, schedules[0].log_snr(t), 0)


# --- times -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "slots"), [(8, 1), (5, 4), (1, 7)])
def test_stratified(count: int, slots: int) -> None:
    """One number in each stratum, over all slots together; another step, other numbers."""
    objective = Objective(Uniform(), X())
    draws = [objective.draw(count, 0, 3, slot, slots) for slot in range(slots)]
    strata = (torch.cat(draws) * count * slots).floor().sort().values
    near(strata, torch.arange(count * slots), 0)
    assert torch.equal(draws[0], objective.draw(count, 0, 3, 0, slots))
    for other in (objective.draw(count, 1, 3, 0, slots), objective.draw(count, 0, 4, 0, slots)):
        assert not torch.equal(draws[0], other)


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_uniform(stratified: bool) -> None:
    """Mean and variance of 4000 steps of 8; five standard errors of independent numbers."""
    objective = Objective(Uniform(), X(), stratified=stratified)
    u = torch.stack([objective.draw(8, 0, step) for step in range(4000)])
    n = u.numel()
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs((u - 0.5).square().mean() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    ratio = u.mean(1).var() / (1 / 12 / 8)  # variance of a batch's mean, stratified: 1 / 8^2
    expected = 1 / 64 if stratified else 1
    assert abs(ratio / expected - 1) < 5 * math.sqrt(2 / 4000)


def test_slots_are_of_one_draw_when_not_stratified() -> None:
    objective = Objective(Uniform(), X(), stratified=False)
    draws = [objective.draw(3, 0, 0, slot, 4) for slot in range(4)]
    assert len(torch.cat(draws).unique()) == 12


MIDPOINTS = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_log_normal(schedule: Schedule) -> None:
    """log(sigma / alpha) has the moments of N(-1.2, 1.2^2): quadrature over 20 000 quantiles."""
    t = LogNormal(-1.2, 1.2)(MIDPOINTS, schedule)
    assert (t.diff() > 0).all()
    log_sigma = schedule.log_snr(t) / -2
    near(log_sigma.mean(), -1.2, 1e-4)
    near(log_sigma.std(), 1.2, 1e-3)
    near(((log_sigma + 1.2) / 1.2).pow(4).mean(), 3.0, 2e-2)


def test_log_normal_ends_with_the_schedule() -> None:
    t = LogNormal(3.0, 2.0)(MIDPOINTS, EDM(math.exp(3)))
    near((t == 1).double().mean(), 0.5, 1e-3)
    assert t.max() == 1


def test_logit_normal() -> None:
    t = LogitNormal(0.5, 1.4)(MIDPOINTS, Flow())
    near(torch.logit(t).mean(), 0.5, 1e-4)
    near(torch.logit(t).std(), 1.4, 1e-3)
    near(t.median(), torch.sigmoid(torch.tensor(0.5)), 1e-4)


def test_uniform_on_the_chain() -> None:
    t = Uniform(10)(MIDPOINTS, Flow())
    values, counts = t.unique(return_counts=True)
    near(values, torch.arange(1, 11) / 10, 1e-16)
    assert counts.tolist() == [2000] * 10
    assert torch.equal(Uniform()(MIDPOINTS, Flow()), MIDPOINTS)


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_the_resampler_keeps_the_expectation_and_takes_the_variance(kind: str) -> None:
    """For data of variance 1 the posterior variance is t^2 / (t^2 + (1 - t)^2), its mean over the
    times 1/2. Over the signs of x and eps the squared error has no spread, as for the bound."""
    schedule, times, n = Flow(), LossSecondMoment(bins=40), 4000
    sizes = 1 + torch.arange(n) % 2
    space = {
        "dense": Dense((n, 2)), "masked": Masked(sizes, 2, 2), "ragged": Ragged(sizes, 2)
    }[kind]  # fmt: skip
    signs = torch.tensor([1.0, -1.0])
    signs = signs[:, None] if kind == "masked" else signs
    x, eps = (space.project(sign.expand(space.shape)) for sign in (0 * signs + 1, signs))
    law = Gaussian(schedule, space, torch.zeros(space.shape), 1.0)
    denoiser = Denoiser(ExactNetwork("v", schedule, law, 1.0), schedule, "v")
    u = (torch.arange(n) + 0.5) / n
    history, losses = times.start(), []
    for _ in range(2):  # the first is uniform
        t, importance = times.draw(u, schedule, history)
        loss = Objective(times, X()).at(denoiser, Batch(x, space), t, eps, importance)
        near(loss.per_sample, t**2 / (t**2 + (1 - t) ** 2), 1e-9)
        near(loss.mean, 0.5, 1e-4)  # the midpoints' own error, where p jumps
        losses.append(importance * loss.per_sample)
        history = times.record(history, t, loss.per_sample)
    assert losses[1].var() < 0.05 * losses[0].var()


def test_the_resampler_is_uniform_until_it_knows() -> None:
    times, u = LossSecondMoment(bins=4), MIDPOINTS[::100].clone()
    history = times.record(times.start(), (torch.arange(39) % 4 + 1) / 4, torch.arange(39.0))
    for known in (history, torch.zeros(4, 10)):  # the last bin has 9; nowhere is any loss
        t, importance = times.draw(u, Flow(), known)
        near(t, u, 1e-15)
        near(importance, torch.ones(200), 1e-15)
    odd = torch.tensor([math.nan, math.inf])
    assert times.record(history, torch.ones(2), odd).isnan().sum() == 1
    full = times.record(history, torch.ones(1), torch.ones(1))
    assert times.draw(u, Flow(), full)[1].std() > 0


def test_the_resampler_on_the_chain() -> None:
    """Every step of a bin is drawn as often as the others, and belongs to its bin."""
    times = LossSecondMoment(steps=12, bins=4)
    history = (1 + torch.arange(4.0))[:, None].square().expand(4, 10)
    t, importance = times.draw(MIDPOINTS, Flow(), history)
    values, counts = t.unique(return_counts=True)
    near(values, torch.arange(1, 13) / 12, 1e-16)
    p = 0.999 * (1 + torch.arange(4.0)) / 10 + 0.001 / 4
    near(counts / 20_000, p.repeat_interleave(3) / 3, 1e-4)
    near(importance, 1 / (4 * p[(t * 12 - 1 + 1e-9).div(3, rounding_mode="floor").long()]), 1e-12)
    again = times.record(times.start(), t, t)
    near(again.sqrt().max(1).values, torch.arange(1, 5) / 4, 1e-15)
    for wrong in ({"bins": 0}, {"steps": 10, "bins": 4}):
        with pytest.raises(ValueError, match="is needed"):
            LossSecondMoment(**wrong)


# --- the call ----------------------------------------------------------------------------------


def test_call_is_at_of_its_draws() -> None:
    space = SPACES["ragged"]
    batch = Batch(space.noise(streams(space), 0), space)
    denoiser = Denoiser(lambda x, noise, cond, s: torch.sin(x), VPLinear(), "v")
    objective, noise = Objective(Uniform(), V()), StepNoise(4, dtype=torch.float64)
    loss = objective(denoiser, batch, noise, seed=2, step=7, slot=1, slots=3)
    t = objective.draw(3, 2, 7, 1, 3)
    near(loss.per_sample, objective.at(denoiser, batch, t, space.noise(noise, 7)).per_sample, 0)
    near(loss.log_snr, VPLinear().log_snr(t), 0)
    again = objective(denoiser, batch, noise, seed=2, step=8, slot=1, slots=3)
    assert not torch.equal(loss.per_sample, again.per_sample)


def test_call_draws_by_the_history() -> None:
    space, times = SPACES["ragged"], LossSecondMoment(bins=4)
    batch = Batch(space.noise(streams(space), 0), space)
    denoiser = Denoiser(lambda x, noise, cond, s: torch.sin(x), VPLinear(), "v")
    objective, noise = Objective(times, V()), StepNoise(4, dtype=torch.float64)
    history = (1 + torch.arange(4.0))[:, None].square().expand(4, 10)
    loss = objective(denoiser, batch, noise, history=history, seed=2, step=7)
    t, importance = times.draw(objective.draw(3, 2, 7), VPLinear(), history)
    near(loss.t, t, 0)
    near(loss.mean, (importance * loss.per_sample).mean(), 1e-15)
    near(loss.per_sample, objective.at(denoiser, batch, t, space.noise(noise, 7)).per_sample, 0)
    first = objective(denoiser, batch, noise, seed=2, step=7)
    near(first.t, objective.draw(3, 2, 7), 1e-15)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7, 1.0])
def test_cond_dropout_rate(rate: float) -> None:
    """Of 10 000 samples; five standard deviations of the binomial."""
    hidden = []

    def net(x: Tensor, noise: Tensor, cond: Cond, space: Space) -> Tensor:
        hidden.append(torch.zeros(250) if cond.dropped is None else cond.dropped.double())
        return x

    batch = Batch(normal(250, 1), Dense((250, 1)), Cond({"label": torch.arange(250)}))
    objective = Objective(Uniform(), X(), cond_dropout=rate)
    noise = StepNoise(0, dtype=torch.float64)
    for step in range(40):
        objective(Denoiser(net, VPLinear(), "v"), batch, noise, seed=0, step=step)
    found = torch.stack(hidden)
    assert abs(found.mean() - rate) <= 5 * math.sqrt(rate * (1 - rate) / found.numel())
    if 0 < rate < 1:
        assert len(found.unique(dim=0)) == 40


def test_gradient_of_the_loss() -> None:
    """Of L_simple with eps prediction: 2 (F - eps) / n for each element of F."""
    out = normal(3, 4, seed=1).requires_grad_()
    eps = normal(3, 4, seed=2)
    denoiser = Denoiser(lambda *_: out, VPLinear(), "eps")
    batch = Batch(normal(3, 4, seed=3), Dense((3, 4)))
    loss = Objective(Uniform(), Eps()).at(denoiser, batch, torch.tensor([0.1, 0.5, 0.9]), eps)
    (gradient,) = torch.autograd.grad(loss.mean, out)
    near(gradient, 2 * (out - eps) / 12, 1e-12)
    assert not loss.per_sample.requires_grad


# --- learned variance --------------------------------------------------------------------------


def test_the_bound_trains_the_variance_only() -> None:
    mean = normal(2, 3, seed=1).requires_grad_()
    v = normal(2, 3, seed=2).requires_grad_()
    denoiser = Denoiser(lambda *_: torch.cat([mean, v], 1), VPLinear(), "eps")
    batch, t = Batch(normal(2, 3, seed=3), Dense((2, 3))), torch.tensor([0.3, 0.8])

    def gradients(weight: float) -> tuple[Tensor, ...]:
        objective = Objective(Uniform(1000), Eps(), vlb_weight=weight)
        loss = objective.at(denoiser, batch, t, normal(2, 3, seed=4)).mean
        return torch.autograd.grad(loss, (mean, v))

    (mean_off, v_off), (mean_on, v_on) = gradients(0.0), gradients(0.01)
    near(mean_on, mean_off, 0)
    near(v_off, torch.zeros(2, 3), 0)
    assert (v_on != 0).all()


@pytest.mark.parametrize("k", [2, 10, 60])
def test_the_bound_finds_the_true_variance(k: int) -> None:
    """Minimised over one number v, for Gaussian data, the bound gives var(x_s | x_t)."""
    steps, variance, n = 100, 0.5, 20_000
    schedule = VPLinear(2e-3, 0.2, steps)
    space = Dense((n, 1))
    law = Gaussian(schedule, space, torch.zeros(n, 1), variance)
    v = torch.zeros((), requires_grad=True)

    def net(x: Tensor, noise: Tensor, cond: None, space: Space) -> Tensor:
        return torch.cat([law(x, k / steps), v + 0 * x], 1)  # c_in is 1

    t = torch.full((n,), k / steps)
    batch = Batch(math.sqrt(variance) * normal(n, 1, seed=1), space)
    objective = Objective(Uniform(steps), X(), vlb_weight=1.0, vlb_steps=steps)
    eps = normal(n, 1, seed=2)
    for _ in range(6):  # Newton's method
        loss = objective.at(Denoiser(net, schedule, "x"), batch, t, eps).mean
        (slope,) = torch.autograd.grad(loss, v, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, v)
        with torch.no_grad():
            v -= slope / curvature
    s = torch.tensor([(k - 1) / steps])
    low, high, _ = posterior(schedule, t[:1], s)
    found = ((v.detach() + 1) / 2 * high + (1 - v.detach()) / 2 * low).exp().item()
    (alpha_t, sigma_t, _), (alpha_s, sigma_s, _) = (
        schedule.level(time) for time in (k / steps, (k - 1) / steps)
    )
    var_s, var_t = (a**2 * variance + b**2 for a, b in ((alpha_s, sigma_s), (alpha_t, sigma_t)))
    exact = var_s - (alpha_t / alpha_s * var_s) ** 2 / var_t
    low_share = low.exp().item() / exact  # this part of the variance has no sampling error
    assert abs(found / exact - 1) < 5 * (1 - low_share) * math.sqrt(2 / n)
