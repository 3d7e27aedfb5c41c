"""The bound and the ODE's likelihood against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_tools import SCHEDULES, SPACES, normal, slope, streams

from gendiff.errors import SamplingError
from gendiff.grids import LogSNR, UniformTime
from gendiff.likelihood import Bins, _decoder, ode_log_likelihood, variational_bound
from gendiff.schedules import Cosine, Schedule
from gendiff.spaces import Batch, Dense, Masked, Ragged, Space
from gendiff.testing import Gaussian, Mixture

VARIANCE = 0.3
ENTROPY = (1 + math.log(2 * math.pi * VARIANCE)) / 2  # nats/dim


def oracle(schedule: Schedule, space: Space) -> tuple[Gaussian, Batch]:
    mean = space.project(0.4 * normal(*space.shape, seed=1))
    x = mean + VARIANCE**0.5 * space.noise(streams(space, 2), 0)
    return Gaussian(schedule, space, mean, VARIANCE), Batch(x, space)


def log_density(model: Gaussian, batch: Batch, smoothed: float) -> torch.Tensor:
    variance, dof = VARIANCE + smoothed**2, batch.space.dof()
    square = batch.space.total((batch.x - model.mean).square()) / variance
    return -(square + dof * math.log(2 * math.pi * variance)) / 2


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ode_gives_the_log_density_of_a_gaussian(schedule: Schedule, name: str) -> None:
    """Of the model: the exact flow carries x to the schedule's end, where the prior stands."""
    space = SPACES[name]
    model, batch = oracle(schedule, space)
    dof = space.dof()
    found = ode_log_likelihood(model, batch, schedule, steps=24)
    first = schedule.inverse(torch.tensor(-2 * math.log(0.002), dtype=torch.float64)).item()
    (alpha, _, _), (end_alpha, end_sigma, _) = schedule.level(first), schedule.level(1.0)
    end = model.flow(alpha * batch.x, first, 1.0)
    growth = (end_alpha**2 * VARIANCE + end_sigma**2) / (alpha**2 * (VARIANCE + 0.002**2))
    prior = space.total(end.square()) / end_sigma**2 + dof * math.log(2 * math.pi * end_sigma**2)
    exact = -prior / 2 + dof * (math.log(growth) / 2 + math.log(alpha))
    assert ((found - exact) / dof).abs().max() < 3e-4
    # and of the data, but for what the prior neglects: the mean that is left at the end
    data = log_density(model, batch, 0.002)
    left = math.exp(schedule.level(1.0).log_snr / 2)
    assert ((found - data) / dof).abs().max() < 3e-4 + 0.5 * left


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_ode_gives_the_log_density_of_a_mixture(schedule: Schedule) -> None:
    means = torch.tensor([[-1.0, 0.5], [0.8, 0.2], [0.1, -0.9]], dtype=torch.float64)
    stds, weights = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.4, 0.2], [0.5, 0.3, 0.2])
    )
    model = Mixture(schedule, means, stds, weights)
    x, _ = model.draw(16, torch.Generator().manual_seed(0))
    found = ode_log_likelihood(model, Batch(x, Dense((16, 2))), schedule, steps=80)
    left = math.exp(schedule.level(1.0).log_snr / 2)  # the mean that the prior neglects
    variance = stds**2 + 0.002**2
    parts = weights.log() - (2 * math.pi * variance).log()
    parts = parts - (x[:, None] - means).square().sum(-1) / (2 * variance)
    assert (found - parts.logsumexp(1)).abs().max() / 2 < 1e-3 + 0.5 * left


def test_ode_is_of_order_four_at_least() -> None:
    schedule = Cosine()
    model, batch = oracle(schedule, SPACES["dense"])
    truth = ode_log_likelihood(model, batch, schedule, steps=192)
    counts = [16, 32, 48]
    errors = [
        (ode_log_likelihood(model, batch, schedule, steps=n) - truth).abs().max().item()
        for n in counts
    ]
    assert slope(errors, counts) > 3.8, errors


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_in_the_subspace(kind: str) -> None:
    schedule, space = Cosine(), SPACES["ragged"]
    model, batch = oracle(schedule, space)
    exact = ode_log_likelihood(model, batch, schedule, steps=6)
    found = ode_log_likelihood(
        model, batch, schedule, steps=6, probes=kind, noise=streams(space, 5), count=200
    )
    assert ((found - exact) / space.dof()).abs().max() < 0.4
    again = ode_log_likelihood(
        model, batch, schedule, steps=6, probes=kind, noise=streams(space, 5), count=200
    )
    assert torch.equal(found, again)


def test_padding_changes_nothing() -> None:
    short = SPACES["masked"]
    assert isinstance(short, Masked)
    model, batch = oracle(Cosine(), short)
    long = Masked(short.lengths, short.channels, short.frames + 3)

    def pad(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 3))

    wide = Gaussian(Cosine(), long, pad(model.mean), VARIANCE)
    for steps in (4, 16):
        a = ode_log_likelihood(model, batch, Cosine(), steps=steps)
        b = ode_log_likelihood(wide, Batch(pad(batch.x), long), Cosine(), steps=steps)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    times = UniformTime().times(Cosine(), 8)
    a = variational_bound(model, batch, Cosine(), times, streams(short)).nats
    b = variational_bound(wide, Batch(pad(batch.x), long), Cosine(), times, streams(long)).nats
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_the_bound_falls_to_the_entropy(schedule: Schedule, kind: str, variance: str) -> None:
    n = 4000
    space: Space = {
        "dense": Dense((1, 5, n)),
        "masked": Masked(torch.tensor([n]), 5, n + 2),
        "ragged": Ragged(torch.tensor([n]), 5, centred=3),
    }[kind]
    model, batch = oracle(schedule, space)
    exact = -log_density(model, batch, 0).item() / space.dof().item()
    gaps, counts = [], [16, 64, 256]
    for steps in counts:
        times = LogSNR(sigma_min=0.01, sigma_max=1000.0).times(schedule, steps)
        bound = variational_bound(model, batch, schedule, times, streams(space, 3), variance)
        assert bound.steps.shape == (steps - 1, 1)
        gaps.append(bound.nats.item() / space.dof().item() - exact)
    assert min(gaps) > -0.03  # three standard errors of 20000 elements
    assert gaps[0] > gaps[1] > gaps[2], gaps
    if variance == "small":  # beta is near optimal here: its gap drowns in the standard error
        assert 0.8 < slope(gaps[1:], counts[1:]) < 1.4, gaps  # the gap falls as 1 / T
    assert gaps[2] < 0.25


def test_bins_are_probabilities() -> None:
    values = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None]
    space = Dense((17, 1))
    for x_hat, std in ((0.13, 0.2), (0.9, 0.01), (-1.4, 0.7)):
        std_rows = torch.full_like(values, std)
        found = _decoder(space, values, torch.full_like(values, x_hat), std_rows, Bins(1 / 8))
        assert found.isfinite().all()
        assert (-found).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_what_is_refused() -> None:
    model, batch = oracle(Cosine(), SPACES["ragged"])
    noise = streams(batch.space)
    with pytest.raises(SamplingError, match="down to 0"):
        variational_bound(model, batch, Cosine(), [1.0, 0.5], noise)
    with pytest.raises(SamplingError, match="centred"):
        variational_bound(model, batch, Cosine(), [1.0, 0.5, 0.0], noise, bins=Bins(0.1))
    with pytest.raises(SamplingError, match="noise source"):
        ode_log_likelihood(model, batch, Cosine(), probes="gaussian")
