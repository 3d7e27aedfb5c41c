"""Against diffusers where it is right; where it is not, our value is the closed form's.

The peer's DDIM, DDPM and PNDM take float64 tables; its sigma-based schedulers compute in float32,
but for those that take noise scales of float64 in the place of their own (``at_scales``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from exactness import alpha_bars, near
from oracle_tools import normal
from torch import Tensor

from gendiff.denoiser import Denoiser
from gendiff.grids import Karras, UniformTime
from gendiff.samplers import (
    DDIM,
    DDPM,
    DEIS,
    LMS,
    PNDM,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    Euler,
    Heun,
    Sampler,
    UniPC,
    states,
)
from gendiff.schedules import EDM, VPLinear
from gendiff.spaces import Dense, Space
from gendiff.tables import noise_scale
from gendiff.testing import Mixture

diffusers = pytest.importorskip("diffusers", reason="parity needs the package diffusers")
pytestmark = pytest.mark.usefixtures("float64")
SCHEDULE, SPACE, STEPS = VPLinear(), Dense((16, 2)), 20


class Draws:
    """Draw d of a run: torch.randn from a generator seeded with d."""

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        return torch.randn(len(rows), *width, generator=torch.Generator().manual_seed(draw))


def law() -> Mixture:
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.2], [0.1, -1.1]])
    return Mixture(SCHEDULE, means, torch.full((3,), 0.4), torch.tensor([0.5, 0.3, 0.2]))


def peer(name: str, **options: Any) -> Any:
    """A scheduler of theirs for the eps network, with alpha-bar in float64."""
    scheduler = getattr(diffusers, name)(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        **options,
    )
    beta, bar = alpha_bars()
    scheduler.betas, scheduler.alphas = beta[1:], 1 - beta[1:]
    scheduler.alphas_cumprod = bar[1:]
    return scheduler


def eps_hat(x_t: Tensor, t: float) -> Tensor:
    alpha, sigma, _ = SCHEDULE.level(t)
    return (x_t - alpha * law()(x_t, t)) / sigma


def theirs(
    scheduler: Any, x: Tensor, steps: int, **options: Any
) -> tuple[list[Tensor], list[Any]]:
    """Their states and times; index i of their chain is our t = (i + 1) / T."""
    scheduler.set_timesteps(steps)
    path = []
    for k, i in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, i)
        extra = {
            name: torch.Generator().manual_seed(2 * k + 1) if name == "generator" else value
            for name, value in options.items()
        }
        x = scheduler.step(
            eps_hat(x_in.double(), (i.item() + 1) / 1000), i, x, **extra
        ).prev_sample
        path.append(x.double())
    times = [(i.item() + 1) / 1000 for i in scheduler.timesteps]
    return path, [*dict.fromkeys(times), 0.0]


def at_scales(scheduler: Any, x: Tensor, times: list[float]) -> list[Tensor]:
    """Their states from x at the first of these times on, with noise scales in float64."""
    scheduler.set_timesteps(len(times) - 1)
    scales = [noise_scale(SCHEDULE.level(t)) if t else 0.0 for t in times]
    scheduler.sigmas = torch.tensor(scales)
    scheduler.set_begin_index(0)
    path = []
    for t, i in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(eps_hat(x, t), i, x).prev_sample
        path.append(x)
    return path


def ours(sampler: Sampler, times: list[float], x: Tensor) -> list[Tensor]:
    return [s.x for s in states(law(), SPACE, SCHEDULE, sampler, times, Draws(), x)]


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim(spacing: str, eta: float) -> None:
    scheduler = peer("DDIMScheduler", clip_sample=False, timestep_spacing=spacing)
    x = normal(16, 2)
    path, times = theirs(scheduler, x, STEPS, eta=eta, generator=None)
    if spacing == "trailing":
        near(times, UniformTime().times(SCHEDULE, STEPS), 1e-15)
    near(torch.stack(ours(DDIM(eta), times, x)), torch.stack(path), 1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance: str) -> None:
    scheduler = peer(
        "DDPMScheduler",
        clip_sample=False,
        timestep_spacing="trailing",
        variance_type=f"fixed_{variance}",
    )
    x = normal(16, 2)
    path, times = theirs(scheduler, x, STEPS, generator=None)
    found = ours(DDPM(variance), times, x)
    # Into the data they add noise unless the chain's last index is 0, and 1e-20 of variance.
    near(torch.stack(found[:-1]), torch.stack(path[:-1]), 1e-9)
    if variance == "small":
        near(found[-1], path[-1], 1e-8)


@pytest.mark.parametrize("rule", ["midpoint", "exact"])
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver(rule: str, steps: int) -> None:
    scheduler = peer(
        "DPMSolverMultistepScheduler",
        timestep_spacing="trailing",
        solver_type={"midpoint": "midpoint", "exact": "heun"}[rule],
    )
    x = normal(16, 2)
    path, times = theirs(scheduler, x, steps)
    near(torch.stack(ours(DPMSolverPP2M(rule), times, x)), torch.stack(path), 2e-4)


@pytest.mark.parametrize("p", [2, 3])
@pytest.mark.parametrize("steps", [8, 20])
def test_unipc(p: int, steps: int) -> None:
    """States before they are corrected, as theirs are; in float32, or theirs stops."""
    x = normal(16, 2)
    torch.set_default_dtype(torch.float32)
    scheduler = peer("UniPCMultistepScheduler", timestep_spacing="trailing", solver_order=p)
    path, times = theirs(scheduler, x, steps)
    torch.set_default_dtype(torch.float64)
    found = torch.stack(ours(UniPC(p), times, x))
    near(found, torch.stack(path), 2e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms(order: int) -> None:
    """Their state is x / alpha, and their integrals are good to 1e-4."""
    x = normal(16, 2)
    scheduler = peer("LMSDiscreteScheduler", timestep_spacing="trailing")
    path, times = theirs(scheduler, x / SCHEDULE.level(1.0).alpha, STEPS, order=order)
    near(ours(LMS(order), times, x)[-1], path[-1], 2e-4)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order: int) -> None:
    """Theirs is that of polynomials in log(rho), and cannot end at 0."""
    times, x = [*UniformTime().times(SCHEDULE, STEPS)[:-1], 0.01], normal(16, 2)
    path = at_scales(peer("DEISMultistepScheduler", solver_order=order), x, times)
    near(torch.stack(ours(DEIS(order, "log_rho"), times, x)), torch.stack(path), 1e-9)


def test_pndm() -> None:
    """The rows are the same to the last step; their first is Heun's in DDIM's, of two calls."""
    options = {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "trailing"}
    x = normal(16, 2)
    path, times = theirs(peer("PNDMScheduler", **options), x, STEPS)
    (first,), *rest = (step.stages for step in PNDM().table(SCHEDULE, times))
    eps = [eps_hat(x, times[0])]
    guess = first.a * x + first.b[0] * eps[0]
    near(guess, path[0], 1e-9)
    x = first.a * x + first.b[0] * (eps[0] + eps_hat(guess, times[1])) / 2
    near(x, path[1], 1e-9)
    for t, (row,), expected in zip(times[1:], rest, path[2:], strict=False):
        eps = [eps_hat(x, t), *eps]
        x = row.a * x + sum(b * e for b, e in zip(row.b, eps, strict=False))
        near(x, expected, 1e-9)


@pytest.mark.parametrize(("rule", "kind"), [("midpoint", "midpoint"), ("exact", "heun")])
def test_singlestep(rule: str, kind: str) -> None:
    """An odd number of calls; with an even one theirs is of order 1 in the last two, not first."""
    times, x = UniformTime().times(SCHEDULE, 9), normal(16, 2)
    scheduler = peer("DPMSolverSinglestepScheduler", solver_order=2, solver_type=kind)
    path = at_scales(scheduler, x, times)
    found = ours(DPMSolverPP2S(rule), times, x)
    near(torch.stack(found), torch.stack([*path[1::2], path[-1]]), 1e-9)


def test_third_order() -> None:
    """Theirs has half the curvature, and its states pass through float32.

    Ours by default has all of it: the closed form is in ``exactness.solver_rows``.
    """
    times, x = UniformTime().times(SCHEDULE, STEPS), normal(16, 2)
    path = at_scales(peer("DPMSolverMultistepScheduler", solver_order=3), x, times)
    near(torch.stack(ours(DPMSolverPP3M("half"), times, x)), torch.stack(path), 1e-5)
    assert (ours(DPMSolverPP3M(), times, x)[-1] - path[-1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "sampler"), [("EulerDiscreteScheduler", Euler()), ("HeunDiscreteScheduler", Heun())]
)
def test_euler_and_heun(name: str, sampler: Sampler) -> None:
    """Their state is x / alpha; Heun's has two entries a step, but for the last."""
    x = normal(16, 2)
    scheduler = peer(name, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    path, times = theirs(scheduler, x / SCHEDULE.level(1.0).alpha, STEPS)
    near(ours(sampler, times, x)[-1], path[-1], 2e-4)


def test_edm() -> None:
    """Preconditioning, noise number, grid and Euler's steps, around one network."""

    def network(x: Tensor, noise: Tensor) -> Tensor:
        return torch.sin(2 * x) + torch.cos(noise)

    def backbone(x: Tensor, noise: Tensor, cond: None, space: Space) -> Tensor:
        return network(x, noise[:, None])

    schedule = EDM(80.0)
    scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(STEPS)
    x = 80 * normal(16, 2)
    denoiser = Denoiser(backbone, schedule, "edm", 0.5).bind(SPACE)
    times = Karras().times(schedule, STEPS)
    near(80 * torch.tensor(times), scheduler.sigmas, 1e-5)
    found = [s.x for s in states(denoiser, SPACE, schedule, Euler(), times, Draws(), x)]
    for k, i in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, i).double(), i.double())
        x = scheduler.step(output, i, x).prev_sample
        near(found[k], x, 2e-4)


# --- known differences: the closed form is right -------------------------------------------------


def test_ddim_linspace() -> None:
    """Their step goes to i - T/N whatever the next index is; eq. 12 goes to the next index."""
    scheduler = peer("DDIMScheduler", clip_sample=False, timestep_spacing="linspace")
    x = normal(16, 2)
    path, times = theirs(scheduler, x, STEPS)
    found = ours(DDIM(), times, x)[-1]
    _, bar = alpha_bars()
    index = [round(1000 * t) for t in times]
    for k, j in zip(index, index[1:], strict=False):
        eps = eps_hat(x, k / 1000)
        x_hat = (x - (1 - bar[k]).sqrt() * eps) / bar[k].sqrt()
        x = bar[j].sqrt() * x_hat + (1 - bar[j]).sqrt() * eps
    near(found, x, 1e-9)
    assert (path[-1] - x).abs().max() > 1e-3


def test_ddpm_large_log() -> None:
    """Their ``fixed_large_log`` takes the square root of a log-variance; ours is sqrt(beta)."""
    scheduler = peer("DDPMScheduler", clip_sample=False, variance_type="fixed_large_log")
    path, times = theirs(scheduler, normal(16, 2), STEPS)
    assert path[-1].isnan().any()
    _, bar = alpha_bars()
    table = DDPM("large").table(SCHEDULE, times)
    for step in table[:-1]:
        k, j = round(1000 * step.t), round(1000 * step.s)
        near(step.stages[0].c, math.sqrt(1 - bar[k] / bar[j]), 1e-10)
