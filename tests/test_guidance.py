from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from exactness import near
from oracle_tools import SPACES, normal, streams
from torch import Tensor

from gendiff.denoiser import BoundDenoiser, Denoiser
from gendiff.errors import SamplingError
from gendiff.grids import UniformTime
from gendiff.guidance import (
    Clip,
    Clipped,
    DynamicClip,
    Guidance,
    Guided,
    NoClip,
    StaticClip,
    autoguidance,
    classifier_free,
)
from gendiff.samplers import DDIM, DPMSolverPP2M, sample
from gendiff.schedules import EDM, Cosine, Parts, Schedule
from gendiff.spaces import Cond, Dense, Masked, Space
from gendiff.testing import ExactNetwork, Gaussian, Mixture, slope

pytestmark = pytest.mark.usefixtures("float64")
SCHEDULE, VARIANCE = Cosine(), 0.3


class Two:
    """The exact eps network of two laws: one with the condition, one where it is hidden."""

    def __init__(self, seen: object, hidden: object) -> None:
        self.seen = ExactNetwork("eps", SCHEDULE, seen, 1.0)  # type: ignore[arg-type]
        self.hidden = ExactNetwork("eps", SCHEDULE, hidden, 1.0)  # type: ignore[arg-type]
        self.calls = 0

    def __call__(self, x: Tensor, noise: Tensor, cond: Cond, space: Space) -> Tensor:
        self.calls += 1
        dropped = (
            torch.zeros(len(noise), dtype=torch.bool) if cond.dropped is None else (cond.dropped)
        )
        mask = space.expand(dropped)
        both = (net(x, noise, cond, space) for net in (self.hidden, self.seen))
        return torch.where(mask, *both)


def gaussians(space: Space, means: tuple[Tensor, Tensor]) -> tuple[BoundDenoiser, Two]:
    net = Two(*(Gaussian(SCHEDULE, space, mean, VARIANCE) for mean in means))
    cond = Cond({"label": torch.arange(space.batch_size)})
    return Denoiser(net, SCHEDULE, "eps").bind(space, cond), net


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 1.0, 3.5])
def test_two_gaussians(space: Space, scale: float) -> None:
    """Of N(mu_1, v) away from N(mu_0, v): the estimate, and the samples, of mean
    mu_0 + w (mu_1 - mu_0)."""
    seen, hidden = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    bound, net = gaussians(space, (seen, hidden))
    guided = classifier_free(bound, Guidance(scale))
    law = Gaussian(SCHEDULE, space, hidden + scale * (seen - hidden), VARIANCE)
    x_t = space.noise(streams(space), 0)
    for t in (0.95, 0.5, 0.02):
        near(guided(x_t, t), law(x_t, t), 1e-9)  # eps_hat / alpha near the noise
    assert net.calls == (3 if scale == 1 else 6)
    times = UniformTime().times(SCHEDULE, 8)
    ours, theirs = (
        sample(d, space, SCHEDULE, DPMSolverPP2M(), times, streams(space)) for d in (guided, law)
    )
    near(ours, theirs, 1e-8)


def test_scale_one_is_the_model_itself() -> None:
    space = SPACES["ragged"]
    bound, net = gaussians(space, (torch.zeros(space.shape), torch.zeros(space.shape)))
    x_t = space.noise(streams(space), 0)
    assert torch.equal(classifier_free(bound, Guidance(1.0))(x_t, 0.3), bound(x_t, 0.3))
    assert net.calls == 2


def test_scale_zero_is_unconditional() -> None:
    """Bit for bit: the mixture that the classes add up to."""
    space = Dense((6, 2))
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.2]])
    whole = Mixture(SCHEDULE, means, torch.full((2,), 0.4), torch.tensor([0.3, 0.7]))
    one = Gaussian(SCHEDULE, space, means[:1].expand(6, 2), 0.16)
    bound = Denoiser(Two(one, whole), SCHEDULE, "eps").bind(
        space, Cond({"label": torch.zeros(6).long()})
    )
    guided = classifier_free(bound, Guidance(0.0))
    x_t = normal(6, 2)
    assert torch.equal(guided(x_t, 0.4), guided.worse(x_t, 0.4))
    near(guided(x_t, 0.4), whole(x_t, 0.4), 1e-12)


def test_two_times_at_once() -> None:
    space = SPACES["dense"]
    bound, _ = gaussians(space, (normal(3, 5, seed=1), normal(3, 5, seed=2)))
    guided, x_t = classifier_free(bound, Guidance(2.0)), normal(3, 5)
    t = torch.tensor([0.2, 0.5, 0.8])
    alone = torch.stack([guided(x_t, time)[i] for i, time in enumerate(t.tolist())])
    near(guided(x_t, t), alone, 1e-12)


def test_variance_is_the_conditional_models() -> None:
    def net(x: Tensor, noise: Tensor, cond: Cond, space: Space) -> Tensor:
        shift = 0.0 if cond.dropped is None else 9.0
        return torch.cat([x + shift, x - 1 + shift], 1)

    bound = Denoiser(net, SCHEDULE, "x").bind(Dense((2, 3)), Cond({"label": torch.zeros(2)}))
    x_t = normal(2, 3)
    x_hat, variance = classifier_free(bound, Guidance(2.0)).with_variance(x_t, 0.5)
    near(variance, x_t - 1, 1e-12)
    near(x_hat, x_t - 9, 1e-12)  # 2 x - (x + 9)


def test_no_condition() -> None:
    space = Dense((2, 3))
    with pytest.raises(SamplingError, match="needs a condition"):
        classifier_free(
            Denoiser(lambda *_: torch.zeros(2, 3), SCHEDULE).bind(space), Guidance(2.0)
        )


# --- the interval --------------------------------------------------------------------------------

every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
FROM, TO = 0.4, 3.0  # of sigma / alpha


def time_of(ratio: float, schedule: Schedule = SCHEDULE) -> float:
    return schedule.inverse(torch.tensor(-2 * math.log(ratio))).item()


def pair(space: Space) -> tuple[BoundDenoiser, Two, Gaussian, Gaussian]:
    """A conditional model, its network's count, its law, and the law that scale 3 guides to."""
    seen, hidden = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    bound, net = gaussians(space, (seen, hidden))
    alone = Gaussian(SCHEDULE, space, seen, VARIANCE)
    return bound, net, alone, replace(alone, mean=hidden + 3.0 * (seen - hidden))


@every_space
def test_guidance_in_an_interval(space: Space) -> None:
    bound, net, alone, far = pair(space)
    guided = classifier_free(bound, Guidance(3.0, (FROM, TO)))
    x_t = space.noise(streams(space), 0)
    for ratio, inside in ((TO * 1.001, False), (TO * 0.999, True), (1.0, True),
                          (FROM * 1.001, True), (FROM * 0.999, False)):  # fmt: skip
        t, net.calls = time_of(ratio), 0
        x_hat = guided(x_t, t)
        assert net.calls == (2 if inside else 1) == guided.guidance.calls(SCHEDULE, t)
        near(x_hat, (far if inside else alone)(x_t, t), 1e-9)
        assert inside or torch.equal(x_hat, bound(x_t, t))
    times = torch.tensor([time_of(4.0), time_of(1.0), time_of(0.1)])
    rows = [guided(x_t, t) for t in times.tolist()]
    mixed = guided(x_t, times)  # each sample by its own time
    index = space.expand(torch.arange(3.0)).expand(space.shape)
    near(mixed, sum((index == i) * row for i, row in enumerate(rows)), 1e-9)


def test_samples_of_an_interval() -> None:
    """The flow of one law, then of another, then of the first again; at the sampler's order."""
    space = SPACES["ragged"]
    bound, _, alone, far = pair(space)
    high, low = time_of(TO), time_of(FROM)
    x = start = space.noise(streams(space), 0)
    for law, t, s in ((alone, 0.98, high), (far, high, low), (alone, low, 0.05)):
        x = law.flow(x, t, s)
    errors, counts = [], (20, 40, 80)
    for n in counts:
        ends = torch.tensor([0.98, high, low, 0.05])
        # A step must not see the model on the other side of an edge.
        pieces = [
            a + (b - a) * torch.arange(n) / n for a, b in zip(ends[:-1], ends[1:], strict=True)
        ]
        times = [*torch.cat(pieces).tolist(), 0.05]
        guided = classifier_free(bound, Guidance(3.0, (FROM * (1 - 1e-12), TO * (1 + 1e-12))))
        found = sample(guided, space, SCHEDULE, DDIM(), times, streams(space), start)
        errors.append((found - x).abs().max().item())
    assert errors[-1] < 0.05
    assert abs(slope(errors, counts) - 1) < 0.1


def test_no_interval_where_there_is_no_signal() -> None:
    """sigma / alpha is infinite there: outside every interval with an end."""
    schedule = Cosine(min_log_snr=-math.inf)
    assert Guidance(2.0).calls(schedule, 1.0) == 2
    assert Guidance(2.0, (0.1, 1e9)).calls(schedule, 1.0) == 1
    assert Guidance(2.0, (0.1, math.inf)).calls(schedule, 1.0) == 2
    assert Guidance(1.0, (0.1, 9.0)).calls(schedule, 0.5) == 1


def test_an_interval_needs_one_noise_for_all_parts() -> None:
    bound, _ = gaussians(SPACES["dense"], (normal(3, 5, seed=1), normal(3, 5, seed=2)))
    parts = replace(bound.denoiser, schedule=Parts((SCHEDULE, EDM())))
    with pytest.raises(SamplingError, match="without interval"):
        classifier_free(replace(bound, denoiser=parts), Guidance(2.0, (0.1, 1.0)))


# --- rescale and APG -----------------------------------------------------------------------------


def deviations(space: Space, x: Tensor) -> Tensor:
    return torch.sqrt(space.mean(x**2) - space.mean(x) ** 2)


@every_space
def test_rescale(space: Space) -> None:
    """phi = 1 keeps each sample's standard deviation; between, the factor is interpolated."""
    better, worse = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    plain = Guidance(4.0).combine(better, worse, space)
    whole = Guidance(4.0, rescale=1.0).combine(better, worse, space)
    near(deviations(space, whole), deviations(space, better), 1e-12)
    assert (deviations(space, plain) > 1.5 * deviations(space, better)).all()
    part = Guidance(4.0, rescale=0.7).combine(better, worse, space)
    near(part, 0.7 * whole + 0.3 * plain, 1e-12)  # eq. 16
    near(space.project(whole), whole, 1e-14)


@every_space
def test_apg_is_the_paper_s(space: Space) -> None:
    """Sadat et al., 2024, algorithm 1 without momentum, sample by sample."""
    better, worse = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    limit, scale, eta = 0.6, 4.0, 0.2
    x_hat = Guidance(scale, parallel=eta, threshold=limit).combine(better, worse, space)
    for i in range(space.batch_size):
        (_, plus), (_, minus), (_, ours) = (space.select([i], v) for v in (better, worse, x_hat))
        diff = plus - minus
        r = limit * math.sqrt(plus.numel())  # one sample alone has no padding
        diff = diff * min(1.0, r / diff.norm().item())
        v1 = plus / plus.norm()
        parallel = (diff * v1).sum() * v1
        orthogonal = diff - parallel
        near(ours, plus + (scale - 1) * (orthogonal + eta * parallel), 1e-12)


@every_space
def test_apg_that_keeps_all_is_classifier_free_guidance(space: Space) -> None:
    better, worse = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    plain = Guidance(3.0).combine(better, worse, space)
    near(Guidance(3.0, threshold=1e9).combine(better, worse, space), plain, 1e-12)
    near(Guidance(3.0, parallel=1 - 1e-15).combine(better, worse, space), plain, 1e-12)
    change = Guidance(3.0, parallel=0.0).combine(better, worse, space) - better
    near(space.mean(change * better), torch.zeros(space.batch_size), 1e-13)


@pytest.mark.parametrize(
    "guidance", [Guidance(3.0, rescale=0.7), Guidance(3.0, parallel=0.0, threshold=0.3)]
)
def test_padding_changes_nothing(guidance: Guidance) -> None:
    tight, wide = Masked(torch.tensor([4, 2]), 3, 4), Masked(torch.tensor([4, 2]), 3, 9)
    pairs = [tight.project(normal(2, 3, 4, seed=i)) for i in (1, 2)]
    padded = [torch.nn.functional.pad(v, (0, 5), value=7.0) for v in pairs]
    found = guidance.combine(*(wide.project(v) for v in padded), wide)
    near(found[:, :, :4], guidance.combine(*pairs, tight), 1e-13)
    assert (found[:, :, 4:] == 0).all()


@pytest.mark.parametrize("equal", [True, False])
def test_bounded_guidance_has_a_gradient(equal: bool) -> None:
    """Steering differentiates it; two estimates may be the same."""
    space = Dense((2, 3))
    better = normal(2, 3).requires_grad_()
    worse = better * 1.0 if equal else better * 0.5
    guidance = Guidance(2.0, rescale=0.5, parallel=0.5, threshold=0.1)
    x_hat = guidance.combine(better, worse, space)
    (gradient,) = torch.autograd.grad(x_hat.sum(), better)
    assert gradient.isfinite().all()
    if equal:
        near(x_hat, better, 1e-14)


# --- autoguidance --------------------------------------------------------------------------------


@every_space
def test_autoguidance_of_gaussians(space: Space) -> None:
    """Away from a wider law of the same mean: the gain is that of both, and for a small variance
    the samples' variance is known."""
    mean = space.project(normal(*space.shape, seed=1))
    laws = [Gaussian(SCHEDULE, space, mean, v) for v in (VARIANCE, 3 * VARIANCE)]
    strong, weak = (Denoiser(ExactNetwork("eps", SCHEDULE, law, 1.0), SCHEDULE, "eps")
                    for law in laws)  # fmt: skip
    x_t = space.noise(streams(space), 0)
    guided = autoguidance(strong.bind(space), weak, Guidance(2.5))
    for t in (0.9, 0.5, 0.1):
        alpha, sigma, _ = SCHEDULE.level(t)
        gain = [alpha * v / (alpha**2 * v + sigma**2) for v in (VARIANCE, 3 * VARIANCE)]
        total = gain[1] + 2.5 * (gain[0] - gain[1])
        near(guided(x_t, t), mean + total * (x_t - alpha * mean), 1e-9)
    same = autoguidance(strong.bind(space), strong, Guidance(2.5))
    near(same(x_t, 0.4), laws[0](x_t, 0.4), 1e-12)


def test_a_guide_is_asked_under_the_schedule_of_the_samples() -> None:
    space, other = Dense((4, 3)), EDM()
    means = [normal(4, 3, seed=i) for i in (1, 2)]
    strong, weak = (
        Denoiser(ExactNetwork("x", s, Gaussian(s, space, m, VARIANCE), 1.0), s, "x")
        for s, m in zip((SCHEDULE, other), means, strict=True)
    )
    guided = autoguidance(strong.bind(space), weak, Guidance(2.0))
    x_t = normal(4, 3)
    law = Gaussian(SCHEDULE, space, 2 * means[0] - means[1], VARIANCE)
    near(guided(x_t, 0.4), law(x_t, 0.4), 1e-9)
    with pytest.raises(SamplingError, match="time of another schedule"):
        autoguidance(strong.bind(space), replace(weak, noise_input="time"), Guidance(2.0))


@pytest.mark.parametrize(
    "options",
    [
        {"interval": (2.0, 1.0)},
        {"interval": (-1.0, 1.0)},
        {"rescale": 1.2},
        {"threshold": 0.0},
        {"scale": math.nan},
        {"parallel": math.inf},
    ],
)
def test_refuses_what_is_no_guidance(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="needed"):
        Guidance(**options)  # type: ignore[arg-type]


def test_scale_one_makes_one_call_whatever_the_bounds() -> None:
    bound, net = gaussians(Dense((2, 3)), (normal(2, 3, seed=1), normal(2, 3, seed=2)))
    guided = Guided(bound, bound, Guidance(1.0, (0.1, 9.0), 0.7, 0.0, 0.1))
    x_t, t = normal(2, 3), torch.tensor([0.2, 0.6])
    for time in (0.5, t):
        before = net.calls
        assert torch.equal(guided(x_t, time), bound(x_t, time))
        assert net.calls == before + 2


# --- clips ---------------------------------------------------------------------------------------

CLIPS = [NoClip(), StaticClip(0.6), DynamicClip(0.9, 0.6)]


def clipped(space: Space, mean: Tensor, clip: Clip) -> tuple[Clipped, BoundDenoiser]:
    bound, _ = gaussians(space, (mean, mean))
    return Clipped(bound, space, clip), bound


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_a_clip_leaves_what_is_in_range(space: Space, clip: Clip) -> None:
    """To the bit, but where columns are centred once more; with the state's gradient."""
    model, bound = clipped(space, space.project(normal(*space.shape, seed=1)) * 0.1, clip)
    x_t = 0.05 * space.project(normal(*space.shape)).requires_grad_()
    assert bound(x_t, 0.1).abs().max() < 0.6
    near(model(x_t, 0.1), bound(x_t, 0.1), 1e-15 if getattr(space, "centred", 0) else 0.0)
    (grad,) = torch.autograd.grad(model(x_t, 0.1).sum(), x_t, allow_unused=True)
    assert grad.isfinite().all()


@pytest.mark.parametrize("clip", CLIPS[1:])
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_what_is_clipped_is_valid(space: Space, clip: Clip) -> None:
    """Padding stays 0 and columns centred; else every element is in range."""
    model, bound = clipped(space, space.project(normal(*space.shape, seed=1)) * 3, clip)
    x_t = space.project(normal(*space.shape))
    before, after = bound(x_t, 0.4), model(x_t, 0.4)
    assert before.abs().max() > 1
    near(after, space.project(after), 1e-14)
    if not getattr(space, "centred", 0):
        assert after.abs().max() <= 0.6
    else:
        near(after, space.project(clip(before, space)), 1e-14)


@pytest.mark.parametrize("clip", CLIPS[1:])
@pytest.mark.parametrize("name", ["image", "masked", "ragged"])
def test_a_clip_sees_one_sample(name: str, clip: Clip) -> None:
    space = SPACES[name]
    x = space.project(2 * normal(*space.shape))
    whole = clip(x, space)
    for i in range(space.batch_size):
        alone, own = space.select([i], x)
        assert torch.equal(clip(own, alone), space.select([i], whole)[1])


def test_dynamic_clip_keeps_proportions() -> None:
    """At the quantile 1 nothing is cut: the sample is scaled until its largest is the limit."""
    space, x = Dense((1, 5)), torch.tensor([[0.5, -3.0, 1.0, 0.0, 2.0]])
    near(DynamicClip(1.0, 1.5)(x, space), x / 2)
    near(DynamicClip(0.75, 1.0)(x, space), torch.tensor([[0.25, -1.0, 0.5, 0.0, 1.0]]))


def test_a_clip_keeps_the_learned_variance() -> None:
    def net(x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        return torch.cat([9 * x, torch.ones_like(x)], 1)

    space = Dense((2, 3))
    bound = Denoiser(net, SCHEDULE, "x").bind(space)
    x_hat, variance = Clipped(bound, space, StaticClip(0.5)).with_variance(normal(2, 3), 0.5)
    assert variance is not None
    assert torch.equal(variance, torch.ones(2, 3))
    assert x_hat.abs().max() == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: StaticClip(0.0),
        lambda: StaticClip(math.inf),
        lambda: DynamicClip(limit=-1.0),
        lambda: DynamicClip(1.5),
        lambda: DynamicClip(math.nan),
    ],
)
def test_refuses_what_is_no_clip(make: Callable[[], Clip]) -> None:
    with pytest.raises(ValueError, match="needed"):
        make()
