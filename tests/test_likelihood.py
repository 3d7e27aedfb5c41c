"""The bound and the ODE's likelihood against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import exactness
import pytest
import torch
from oracle_tools import SCHEDULES, SPACES, Columns, normal, parts_of, streams
from torch import Tensor

from gendiff.denoiser import Denoiser
from gendiff.errors import SamplingError
from gendiff.grids import LogSNR, UniformTime
from gendiff.likelihood import Bins, _probes, ode_log_likelihood, variational_bound
from gendiff.modality import Request
from gendiff.noise import Streams
from gendiff.samplers import sample
from gendiff.schedules import EDM, Cosine, Parts, Schedule
from gendiff.singlestep import DDIM
from gendiff.spaces import Batch, Dense, Masked, Ragged, Space
from gendiff.testing import Gaussian, Mixture, ToyModality, slope

VARIANCE = 0.3
ENTROPY = (1 + math.log(2 * math.pi * VARIANCE)) / 2  # nats/dim


def oracle(schedule: Schedule, space: Space) -> tuple[Gaussian, Batch]:
    mean = space.project(0.4 * normal(*space.shape, seed=1))
    x = mean + VARIANCE**0.5 * space.noise(streams(space, 2), 0)
    return Gaussian(schedule, space, mean, VARIANCE), Batch(x, space)


@pytest.mark.parametrize(
    "check", [exactness.bound_terms, exactness.bins, exactness.trace, exactness.ode]
)
def test_formulas(check: Callable[[object], None]) -> None:
    check(exactness.engine())


# --- the ODE -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "name"),
    [*((s, "dense") for s in SCHEDULES), *(("cosine", s) for s in SPACES if s != "dense")],
)
def test_ode_gives_the_log_density_of_a_gaussian(schedule: str, name: str) -> None:
    """Of the model: the exact flow carries x to the schedule's end, where the prior stands."""
    space, chosen = SPACES[name], SCHEDULES[schedule]
    model, batch = oracle(chosen, space)
    dof = space.dof()
    found = ode_log_likelihood(model, batch, chosen, steps=24)
    first = chosen.inverse(torch.tensor(-2 * math.log(0.002), dtype=torch.float64)).item()
    (alpha, _, _), (end_alpha, end_sigma, _) = chosen.level(first), chosen.level(1.0)
    end = model.flow(alpha * batch.x, first, 1.0)
    smooth = VARIANCE + 0.002**2
    growth = (end_alpha**2 * VARIANCE + end_sigma**2) / (alpha**2 * smooth)
    prior = space.sum(end.square()) / end_sigma**2 + dof * math.log(2 * math.pi * end_sigma**2)
    exact = -prior / 2 + dof * (math.log(growth) / 2 + math.log(alpha))
    assert ((found - exact) / dof).abs().max() < 3e-4
    # and of the data, but for what the prior neglects: the mean that is left at the end
    square = space.sum((batch.x - model.mean).square()) / smooth
    data = -(square + dof * math.log(2 * math.pi * smooth)) / 2
    left = math.exp(chosen.level(1.0).log_snr / 2)
    assert ((found - data) / dof).abs().max() < 3e-4 + 0.5 * left


@dataclass(frozen=True)
class Rows:
    """A mixture for each row (pair of elements) of a state, on any space."""

    mixture: Mixture
    space: Space

    def rows(self, x: Tensor) -> Tensor:
        """The live rows, (R, 2)."""
        if isinstance(self.space, Masked):
            return x.transpose(1, 2)[self.space.mask[:, 0]]
        return x

    def state(self, rows: Tensor) -> Tensor:
        if not isinstance(self.space, Masked):
            return rows
        x = rows.new_zeros(self.space.batch_size, self.space.frames, 2)
        x[self.space.mask[:, 0]] = rows
        return x.transpose(1, 2)

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        return self.state(self.mixture(self.rows(x_t), t))


@pytest.mark.parametrize(
    ("schedule", "name"),
    [*((s, "dense") for s in SCHEDULES), ("edm", "masked"), ("edm", "ragged")],
)
def test_ode_gives_the_log_density_of_a_mixture(schedule: str, name: str) -> None:
    """Rows of two elements, each from a mixture of three components."""
    space: Space = {
        "dense": Dense((8, 2)),
        "masked": Masked(torch.tensor([3, 1, 4]), 2, 5),
        "ragged": Ragged(torch.tensor([3, 1, 4]), 2),
    }[name]
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.2], [0.1, -0.9]], dtype=torch.float64)
    stds, weights = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.4, 0.2], [0.5, 0.3, 0.2])
    )
    chosen = SCHEDULES[schedule]
    mixture = Mixture(chosen, means, stds, weights)
    model = Rows(mixture, space)
    rows, _ = mixture.draw(8, torch.Generator().manual_seed(0))
    found = ode_log_likelihood(model, Batch(model.state(rows), space), chosen, steps=40)
    left = math.exp(chosen.level(1.0).log_snr / 2)  # the mean that the prior neglects
    variance = stds**2 + 0.002**2
    parts = weights.log() - (2 * math.pi * variance).log()
    parts = parts - (rows[:, None] - means).square().sum(-1) / (2 * variance)
    exact = model.state((parts.logsumexp(1) / 2)[:, None].expand(-1, 2))
    assert ((found - space.sum(exact)) / space.dof()).abs().max() < 2e-3 + 0.5 * left


def test_ode_is_of_order_four() -> None:
    schedule = Cosine()
    model, batch = oracle(schedule, Dense((3, 2)))
    counts = [16, 32, 48]
    truth, *found = (ode_log_likelihood(model, batch, schedule, steps=n) for n in [160, *counts])
    errors = [(value - truth).abs().max().item() for value in found]
    assert 3.8 < slope(errors, counts) < 5, errors


@dataclass(frozen=True)
class From:
    """Another source's noise from draw ``first`` on."""

    source: exactness.Source
    first: int

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        return self.source.normal(rows, width, draw + self.first)


@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
def test_hutchinson_is_unbiased_in_the_subspace(kind: str) -> None:
    """E[v v^T] is the projection, within five standard errors; then a run with several probes is
    the mean over runs with one."""
    space, n = Ragged(torch.tensor([3]), 2, centred=1), 4000
    probes = torch.stack(
        [
            v.flatten()
            for v in _probes(torch.zeros(3, 2).double(), space, streams(space, 5), kind, n)
        ]
    )
    found = probes.T @ probes / n
    basis = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
    projection = torch.stack([space.project(row).flatten() for row in basis])
    error = (probes[:, :, None] * probes[:, None]).std(0) / math.sqrt(n)
    assert ((found - projection).abs() <= 5 * error + 1e-12).all()

    schedule, wide = EDM(), SPACES["ragged"]
    model, batch = oracle(schedule, wide)
    noise = streams(wide, 6)

    def run(count: int, first: int) -> Tensor:
        return ode_log_likelihood(
            model, batch, schedule, steps=4, probes=kind, noise=From(noise, first), count=count
        )

    mean = torch.stack([run(1, k) for k in range(3)]).mean(0)
    torch.testing.assert_close(run(3, 0), mean, rtol=1e-12, atol=1e-12)
    if kind == "sphere":  # this denoiser only scales
        exact = ode_log_likelihood(model, batch, schedule, steps=4)
        torch.testing.assert_close(run(1, 0), exact, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing() -> None:
    short = SPACES["masked"]
    assert isinstance(short, Masked)
    model, batch = oracle(Cosine(), short)
    long = Masked(short.lengths, short.channels, short.frames + 3)

    def pad(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 3))

    wide = Gaussian(Cosine(), long, pad(model.mean), VARIANCE)
    a = ode_log_likelihood(model, batch, Cosine(), steps=4)
    b = ode_log_likelihood(wide, Batch(pad(batch.x), long), Cosine(), steps=4)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    times = UniformTime().times(Cosine(), 8)
    a = variational_bound(model, batch, Cosine(), times, streams(short)).nats
    b = variational_bound(wide, Batch(pad(batch.x), long), Cosine(), times, streams(long)).nats
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing_of_a_network() -> None:
    """The toy modality's: its samples and their likelihood, in other company and more padding."""
    modality = ToyModality()
    section = modality.Config(kind="masked")  # type: ignore[call-arg]
    torch.manual_seed(0)
    network = modality.backbone(section, {}).double()
    request = Request(range(5), 3)
    space, cond = modality.templates(section, {}, request)
    assert isinstance(space, Masked)
    assert cond is not None
    schedule = EDM(sigma_max=5)
    times = UniformTime().times(schedule, 6)
    found = []
    for ids, more in ((range(5), 0), (range(5), 9), ([3, 1], 2)):
        rows = list(ids)
        part = Masked(space.lengths[rows], space.channels, int(space.lengths.max()) + more)
        told = cond.select(rows)
        model = Denoiser(network, schedule, "edm", 1.0, "log_snr", ()).bind(part, told)
        noise = Streams(3, tuple(rows), dtype=torch.float64)
        x = sample(model, part, schedule, DDIM(1.0), times, noise)
        with_probes = ode_log_likelihood(
            model, Batch(x, part, told), schedule, steps=3, probes="sphere", noise=noise
        )
        exact = ode_log_likelihood(model, Batch(x, part, told), schedule, steps=3)
        assert x.shape[2] == part.frames
        found.append(
            [(part.select([i], x)[1], with_probes[i], exact[i]) for i in range(len(rows))]
        )
    whole, padded, few = found
    for one, other in [*zip(whole, padded, strict=True), (whole[3], few[0]), (whole[1], few[1])]:
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert abs(whole[0][2] - whole[1][2]) > 0.1


# --- the bound ---------------------------------------------------------------------------------


def expected_bound(
    schedule: Schedule, times: list[float], variance: str
) -> tuple[Tensor, Tensor, float]:
    """For centred Gaussian data and its denoiser: each step's expectation and the part of it that
    is random, in nats/dim, and the decoder's expectation. x - x_hat has the posterior's variance.
    """
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = schedule(t)
    error = VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2)
    beta = sigma[:-1] ** 2 - (alpha[:-1] / alpha[1:] * sigma[1:]) ** 2
    tilde = (beta * sigma[1:] ** 2 / sigma[:-1] ** 2)[:-1]
    chosen = tilde if variance == "small" else beta[:-1]
    gain = (alpha[1:] * beta / sigma[:-1] ** 2)[:-1]
    random = gain**2 * error[:-2] / chosen / 2
    steps = random + (chosen / tilde).log() / 2 + (tilde / chosen - 1) / 2
    last = (sigma[-2] / alpha[-2]) ** 2
    decoder = ((2 * math.pi * last).log() + error[-2] / last) / 2
    return steps, random, decoder.item()


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    ("schedule", "name"),
    [*((s, "dense") for s in SCHEDULES), ("cosine", "masked"), ("edm", "ragged")],
)
def test_each_term_of_the_bound(schedule: str, name: str, variance: str) -> None:
    """Within five standard errors: the random part of a term is a sum of n squares of normals."""
    space: Space = {
        "dense": Dense((1, 5, 400)),
        "masked": Masked(torch.tensor([400]), 5, 410),
        "ragged": Ragged(torch.tensor([400]), 5, centred=3),
    }[name]
    chosen = SCHEDULES[schedule]
    model, batch = oracle(chosen, space)
    times = LogSNR(sigma_min=0.01, sigma_max=1000.0).times(chosen, 12)
    bound = variational_bound(model, batch, chosen, times, streams(space, 3), variance)
    n = space.dof().item()
    steps, random, decoder = expected_bound(chosen, times, variance)
    allowed = 5 * math.sqrt(2 / n)
    assert bound.steps.shape == (11, 1)
    assert ((bound.steps[:, 0] / n - steps).abs() < allowed * random + 1e-9).all()
    assert abs(bound.decoder.item() / n - decoder) < allowed / 2
    alpha, sigma, _ = chosen.level(times[0])
    prior = space.sum(batch.x.square()) * (alpha / sigma) ** 2 / 2
    torch.testing.assert_close(bound.prior, prior)
    torch.testing.assert_close(bound.nats, bound.prior + bound.steps.sum(0) + bound.decoder)
    torch.testing.assert_close(bound.bits_per_dim, bound.nats / n / math.log(2))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_bound_falls_to_the_entropy(schedule: Schedule, variance: str) -> None:
    r"""In closed form, of the terms that the test above holds the code to: the gap is 1 / T.

    Where the data's variance rules, the true reverse variance is beta, and a step of
    :math:`\delta` in log-SNR with beta-tilde in its place loses :math:`\delta^2 / 4`.
    """
    gaps, counts = [], [128, 256, 512, 1024]
    for count in counts:
        times = LogSNR(sigma_min=0.001, sigma_max=1000.0).times(schedule, count)
        steps, _, decoder = expected_bound(schedule, times, variance)
        prior = VARIANCE * math.exp(schedule.level(times[0]).log_snr) / 2
        gaps.append(steps.sum().item() + decoder + prior - ENTROPY)
    assert min(gaps) > 0
    assert 0.95 < slope(gaps, counts) < 1.05, gaps
    delta = schedule.level(times[2]).log_snr - schedule.level(times[1]).log_snr
    ruled = -2 * math.log(0.001) + math.log(VARIANCE)  # the range of log-SNR where it rules
    if variance == "small":
        assert 0.9 < gaps[-1] / (ruled * delta / 4) < 1
    else:
        assert gaps[-1] < 0.05


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("name", SPACES)
def test_parts_of_the_bound(name: str, variance: str) -> None:
    """Parts under schedules of their own: the sum of what each part has alone."""
    space, schedules, times = SPACES[name], (Cosine(), EDM()), [1.0, 0.6, 0.2, 0.05, 0.0]
    noise = streams(space, 3)
    x = space.noise(streams(space, 2), 0)
    whole = variational_bound(
        lambda x_t, t: space.project(torch.sin(x_t)),
        Batch(x, space), Parts(schedules), times, noise, variance,
    )  # fmt: skip
    alone = [
        variational_bound(
            lambda x_t, t, part=part: part.project(torch.sin(x_t)),
            Batch(x[:, a:b], part), schedule, times, Columns(noise, a, b, 5), variance,
        )
        for schedule, (part, a, b) in zip(schedules, parts_of(space), strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(whole.prior, sum(bound.prior for bound in alone))
    torch.testing.assert_close(whole.steps, sum(bound.steps for bound in alone))
    torch.testing.assert_close(whole.decoder, sum(bound.decoder for bound in alone))


@dataclass(frozen=True)
class Headed:
    """A denoiser with a variance head that says one number."""

    denoiser: Gaussian
    v: float

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        return self.denoiser(x_t, t)

    def with_variance(self, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        return self(x_t, t), torch.full_like(x_t, self.v)


@pytest.mark.parametrize("name", ["image", "masked", "ragged_free"])
def test_a_learned_variance_lies_between_the_two(name: str) -> None:
    """v = -1 is beta-tilde, v = 1 is beta; between, the bound is convex in v."""
    schedule, space = Cosine(), SPACES[name]
    model, batch = oracle(schedule, space)
    times, noise = UniformTime().times(schedule, 10), streams(space, 4)

    def bound(variance: str, v: float = 0.0) -> Tensor:
        return variational_bound(Headed(model, v), batch, schedule, times, noise, variance).nats

    torch.testing.assert_close(bound("learned", -1.0), bound("small"), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(bound("learned", 1.0), bound("large"), rtol=1e-12, atol=1e-12)
    assert (bound("learned", 0.0) < (bound("small") + bound("large")) / 2).all()


def test_what_is_refused() -> None:
    model, batch = oracle(Cosine(), SPACES["ragged"])
    noise, times = streams(batch.space), [1.0, 0.5, 0.0]
    with pytest.raises(SamplingError, match="down to 0"):
        variational_bound(model, batch, Cosine(), [1.0, 0.5], noise)
    with pytest.raises(SamplingError, match="choose small"):
        variational_bound(model, batch, Cosine(), times, noise, "tiny")
    with pytest.raises(SamplingError, match="centred"):
        variational_bound(model, batch, Cosine(), times, noise, bins=Bins(0.1))
    free, free_batch = oracle(Cosine(), SPACES["ragged_free"])
    with pytest.raises(SamplingError, match="variance head"):
        variational_bound(free, free_batch, Cosine(), times, noise, "learned")
    with pytest.raises(SamplingError, match="noise source"):
        ode_log_likelihood(model, batch, Cosine(), probes="sphere")
    with pytest.raises(SamplingError, match="at least 1"):
        ode_log_likelihood(model, batch, Cosine(), steps=0)
    with pytest.raises(SamplingError, match="one schedule"):
        ode_log_likelihood(model, batch, Parts((Cosine(), EDM())))
    with pytest.raises(SamplingError, match="not below"):
        ode_log_likelihood(model, batch, Cosine(), sigma_min=1e6)
