"""Columns that hold a one-hot code: estimate, loss and samples against Bayes' rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff import config, runs
from gendiff.denoiser import Denoiser
from gendiff.grids import UniformTime
from gendiff.modality import DataReport
from gendiff.noise import StepNoise, Streams
from gendiff.objective import EDMWeight, Objective, Uniform
from gendiff.samplers import DDIM, DDPM, DPMSolverPP2M, Euler, Sampler, sample
from gendiff.schedules import EDM, Cosine, Flow, Parts, Schedule
from gendiff.spaces import Batch, Categories, Dense, Masked, Ragged, Space
from gendiff.testing.toy import CLASSES, WIDTH, ToyConfig, ToyModality
from gendiff.train import Trainer

PRIOR = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
CODE = Categories(1, 3, 0.7)  # column 0 is a number, columns 1 to 3 the code
SPACES = {
    "dense": Dense((6, 4)),
    "masked": Masked(torch.tensor([1, 3, 2]), 4, 3),
    "ragged": Ragged(torch.tensor([2, 1, 3]), 4, 1),
}


def knows_the_prior(x: Tensor, noise: Tensor, cond: Any, space: Space) -> Tensor:
    """A network that says nothing of the number, and the code's prior in every row."""
    out = torch.zeros_like(x)
    shape = (1, 3, 1) if x.ndim == 3 else (1, 3)
    CODE.of(out).copy_(PRIOR.log().reshape(shape))
    return out


def exact(x_t: Tensor, alpha: float, sigma: float) -> Tensor:
    """E[code | x_t] from the normal densities around the three codes; x_t is (..., 3)."""
    codes = CODE.scale * torch.eye(3, dtype=torch.float64)
    density = (-(x_t[..., None, :] - alpha * codes).square().sum(-1) / (2 * sigma**2)).exp()
    posterior = density * PRIOR
    return posterior / posterior.sum(-1, keepdim=True) @ codes


def rows(space: Space, x: Tensor) -> Tensor:
    """The code's columns of the live rows, (rows, 3)."""
    part = CODE.of(x)
    if isinstance(space, Masked):
        return part.transpose(1, 2)[space.mask[:, 0]]
    return part


@pytest.mark.parametrize("schedule", [EDM(20), Cosine(), Flow()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("kind", list(SPACES))
def test_the_estimate_is_the_posterior_mean(kind: str, schedule: Schedule, float64: None) -> None:
    space = SPACES[kind]
    bound = Denoiser(knows_the_prior, schedule, "v", 1.0, categories=(CODE,)).bind(space)
    x_t = space.project(torch.randn(space.shape, generator=torch.Generator().manual_seed(1)))
    for t in (0.9, 0.5, 0.1):
        level = schedule.level(t)
        want = exact(rows(space, x_t), level.alpha, level.sigma)
        found = bound(x_t, t)
        torch.testing.assert_close(rows(space, found), want, rtol=1e-9, atol=1e-12)
        per_sample = bound(x_t, torch.full((space.batch_size,), t))
        torch.testing.assert_close(per_sample, found, rtol=1e-9, atol=1e-12)


def test_both_ends_are_finite(float64: None) -> None:
    space = Dense((3, 4))
    x = torch.zeros(3, 4)
    CODE.of(x).copy_(CODE.scale * torch.eye(3))
    bound = Denoiser(knows_the_prior, Flow(), "v", 1.0, categories=(CODE,)).bind(space)
    torch.testing.assert_close(CODE.of(bound(x, 1.0)), (CODE.scale * PRIOR).expand(3, 3))
    near = bound(x.float(), 1e-6)  # where the density is a point, in the usual precision
    torch.testing.assert_close(CODE.of(near), CODE.of(x).float())


def test_parts_of_a_state_may_follow_schedules_of_their_own(float64: None) -> None:
    schedule = Parts((Cosine(), EDM(3)))
    space = Dense((5, 4), parts=(1, 3))
    x_t = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    found = Denoiser(knows_the_prior, schedule, "v", 1.0, categories=(CODE,)).bind(space)(x_t, 0.4)
    level = EDM(3).level(0.4)
    torch.testing.assert_close(CODE.of(found), exact(CODE.of(x_t), level.alpha, level.sigma))


@pytest.mark.parametrize("kind", list(SPACES))
def test_the_loss_is_the_cross_entropy_of_that_posterior(kind: str, float64: None) -> None:
    space, schedule = SPACES[kind], EDM(20)
    x = torch.zeros(space.shape)
    index = torch.arange(x.numel() // 4) % 3
    code = torch.nn.functional.one_hot(index, 3) * CODE.scale
    shape = (space.shape[0], space.shape[2], 3) if kind == "masked" else (-1, 3)
    code = code.reshape(shape).to(x)
    CODE.of(x).copy_(code.transpose(1, 2) if kind == "masked" else code)
    x = space.project(x)
    noise = space.noise(StepNoise(3, dtype=torch.float64), 0)
    t = torch.full((space.batch_size,), 0.03)
    sigma = schedule.level(0.03).sigma
    weight = 0.25
    objective = Objective(Uniform(), EDMWeight(), category_weight=weight)
    denoiser = Denoiser(knows_the_prior, schedule, "edm", 1.0, categories=(CODE,))
    loss = objective.at(denoiser, Batch(x, space), t, noise).per_sample
    posterior = exact(rows(space, x + sigma * noise), 1.0, sigma) / CODE.scale
    nats = -posterior.log().gather(1, rows(space, x).argmax(1, keepdim=True))[:, 0]
    owner = torch.arange(space.batch_size).repeat_interleave(
        getattr(space, "sizes", getattr(space, "lengths", torch.ones(space.batch_size).long()))
    )
    total = torch.zeros(space.batch_size).index_add(0, owner, weight * nats)
    # The number is 0, so what EDM's network is to put out there is -noise / sqrt(1 + sigma^2).
    first = space.project(noise)
    keep = torch.zeros(4)
    keep[0] = 1
    first = first * (keep[None, :, None] if kind == "masked" else keep)
    squares = space.mean(first.square()) / (1 + sigma**2)
    live = space.mean(torch.ones(space.shape)) * 0 + torch.bincount(owner) * 4
    torch.testing.assert_close(loss, squares + total / live)


@pytest.mark.parametrize(
    "sampler", [DDIM(), DPMSolverPP2M(), DDPM(), Euler(churn=20)], ids=lambda s: type(s).__name__
)
def test_samples_are_codes_in_the_prior_s_proportions(sampler: Sampler) -> None:
    count, schedule = 4000, Cosine()
    space = Dense((count, 4))
    bound = Denoiser(knows_the_prior, schedule, "v", 1.0, categories=(CODE,)).bind(space)
    times = UniformTime().times(schedule, 60)
    x = sample(bound, space, schedule, sampler, times, Streams(0, tuple(range(count))))
    code = CODE.of(x)
    assert ((code - CODE.scale).abs().min(1).values < 0.02).float().mean() > 0.99
    share = torch.bincount(code.argmax(1), minlength=3) / count
    # Four standard errors of the rarest share, and what 60 steps leave of the method's own error.
    assert (share - PRIOR).abs().max() < 4 * (0.3 * 0.7 / count) ** 0.5 + 0.02


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_the_toy_modality_learns_its_codes(kind: str, tmp_path: Path) -> None:
    toy = ToyModality()
    overrides = [f"toy.kind={kind}", "toy.types=true", "train.steps=300", f"out={tmp_path}"]
    resolved = config.resolve(toy, overrides=[*overrides, "sample.steps=20"])
    section: ToyConfig = resolved.toy  # type: ignore[attr-defined]
    report: DataReport = toy.prepare(section)
    trainer = Trainer(runs.start(toy, resolved, report.facts))
    for _ in trainer.steps():
        pass
    batch = trainer.model().sample(32, seed=1)
    assert batch.cond is not None
    (part,) = toy.categories(section, report.facts)
    assert (part.start, part.count) == (WIDTH, CLASSES)
    space = batch.space
    label = space.expand(batch.cond["label"].float()) * torch.ones(space.shape)
    found = part.of(batch.x).argmax(1)
    if isinstance(space, Masked):
        live = space.mask[:, 0]
        assert (found[live] == label[:, 0][live]).float().mean() > 0.95
    else:
        assert (found == label[:, 0]).float().mean() > 0.95
