"""Steering reaches the closed form wherever there is one: Gaussian data, linear functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES, SPACES, normal, streams
from torch import Tensor

from gendiff.denoiser import Denoiser
from gendiff.grids import UniformTime
from gendiff.samplers import DPMSolverPP2M, sample
from gendiff.schedules import Cosine, Flow, Schedule
from gendiff.spaces import Dense, Space
from gendiff.steering import Linearised, Matched, Tilted
from gendiff.testing import ExactNetwork, Gaussian

pytestmark = pytest.mark.usefixtures("float64")
VARIANCE = 0.3


def linear(space: Space) -> tuple[Tensor, Any]:
    """A linear function of each sample, with its gradient."""
    weights = space.project(normal(*space.shape, seed=5))
    return weights, lambda x, s: s.sum(weights * x) + 0.7


def law(space: Space, schedule: Schedule) -> Gaussian:
    return Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), VARIANCE)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_covariance_of_a_gaussian(space: Space, schedule: Schedule) -> None:
    """C = v sigma^2 / (alpha^2 v + sigma^2), on the subspace."""
    x_t, vector = (space.project(normal(*space.shape, seed=i)) for i in (2, 3))
    for t in (0.9, 0.4, 0.01):
        alpha, sigma = schedule(torch.tensor(t))
        found = Linearised(law(space, schedule), space, schedule, x_t, t).covariance(vector)
        near(found, VARIANCE * sigma**2 / (alpha**2 * VARIANCE + sigma**2) * vector, 1e-9)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_tilted_gaussian(space: Space) -> None:
    """N(mu, v) times exp(-c w.x) is N(mu - c v w, v): every estimate, and the samples."""
    schedule, scale = Cosine(), 1.7
    weights, function = linear(space)
    data = law(space, schedule)
    steered = Tilted(data, space, schedule, function, scale)
    truth = Gaussian(schedule, space, data.mean - scale * VARIANCE * weights, VARIANCE)
    x_t = space.noise(streams(space), 0)
    for t in (0.95, 0.5, 0.02):
        near(steered(x_t, t), truth(x_t, t), 1e-9)
    times = UniformTime().times(schedule, 8)
    ours, theirs = (
        sample(d, space, schedule, DPMSolverPP2M(), times, streams(space))
        for d in (steered, truth)
    )
    near(ours, theirs, 1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_matched_gaussian(space: Space, schedule: Schedule) -> None:
    """E[x | x_t, w.x + b = y +- tau] solves (I / v + w w' / tau^2 + alpha^2 I / sigma^2) x =
    mu / v + w (y - b) / tau^2 + alpha x_t / sigma^2, sample by sample."""
    target, tolerance = 1.3, 0.2
    weights, function = linear(space)
    data = law(space, schedule)
    steered = Matched(data, space, schedule, function, target, tolerance)
    x_t = space.project(normal(*space.shape, seed=4))
    for t in (0.9, 0.5, 0.05):
        alpha, sigma = (float(v) for v in schedule(torch.tensor(t)))
        found = steered(x_t, t)
        for i in range(space.batch_size):
            w, mean, x, ours = (
                space.select([i], v)[1].flatten() for v in (weights, data.mean, x_t, found)
            )
            matrix = torch.outer(w, w) / tolerance**2
            matrix += (1 / VARIANCE + (alpha / sigma) ** 2) * torch.eye(len(w))
            right = mean / VARIANCE + w * (target - 0.7) / tolerance**2 + alpha * x / sigma**2
            near(ours, torch.linalg.solve(matrix, right), 1e-7)


@pytest.mark.parametrize("prediction", ["eps", "x", "v", "flow", "edm"])
def test_matched_samples_have_the_conditional_law(prediction: str) -> None:
    """Through a network: w.x is N(m, s) with the conjugate m and s; what is orthogonal to w
    keeps its law."""
    count, target, tolerance = 4000, 1.0, 0.4
    space = Dense((count, 2))
    schedule = Cosine(min_log_snr=-14)
    weights = torch.tensor([1.0, -0.5])
    data = Gaussian(schedule, space, torch.zeros(count, 2), VARIANCE)
    network = ExactNetwork(prediction, schedule, data, 1.0)
    bound = Denoiser(network, schedule, prediction).bind(space)
    steered = Matched(bound, space, schedule, lambda x, s: x @ weights, target, tolerance)
    times = UniformTime().times(schedule, 40)
    x = sample(steered, space, schedule, DPMSolverPP2M(), times, streams(space))
    prior = VARIANCE * float(weights @ weights)
    variance = 1 / (1 / prior + 1 / tolerance**2)
    mean = variance * target / tolerance**2
    value = x @ weights
    assert abs(float(value.mean()) - mean) < 5 * (variance / count) ** 0.5
    assert float(value.var()) == pytest.approx(variance, rel=5 * (2 / count) ** 0.5)
    other = x @ torch.tensor([0.5, 1.0])
    assert abs(float(other.mean())) < 5 * (prior / count) ** 0.5
    assert float(other.var()) == pytest.approx(prior, rel=5 * (2 / count) ** 0.5)


def test_a_state_without_signal_is_not_moved() -> None:
    space, schedule = SPACES["ragged"], Flow()
    data = law(space, schedule)
    x_t = space.noise(streams(space), 0)
    steered = Tilted(data, space, schedule, linear(space)[1])
    near(steered(x_t, 1.0), data.mean, 1e-12)


def test_no_sample_sees_another() -> None:
    space, schedule = Dense((3, 4)), Cosine()
    data = law(space, schedule)
    weights = normal(4, seed=7)
    x_t = normal(3, 4, seed=8)

    def at(rows: list[int], d: Gaussian) -> Tensor:
        part: Any = space.select(rows, x_t)
        function = lambda x, s: (x * weights).sum(1).tanh()  # noqa: E731
        return Matched(d, part[0], schedule, function, 0.2, 0.1)(part[1], 0.5)

    alone = Gaussian(schedule, Dense((1, 4)), data.mean[1:2], VARIANCE)
    near(at([1], alone), at([0, 1, 2], data)[1:2], 1e-14)
