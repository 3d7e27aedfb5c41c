from __future__ import annotations

import math

import exactness
import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES, SPACES, normal, streams
from torch import Tensor

from gendiff.denoiser import PREDICTIONS, Denoiser
from gendiff.errors import SamplingError
from gendiff.grids import UniformTime
from gendiff.samplers import DDPM, DPMSolverPP2M, Heun, Sampler, states
from gendiff.schedules import Cosine, Flow, Parts, Schedule, VPLinear
from gendiff.spaces import Dense, Masked, Ragged, Space
from gendiff.testing import ExactNetwork, Gaussian

pytestmark = pytest.mark.usefixtures("float64")
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


@pytest.mark.parametrize(
    "check", [exactness.predictions, exactness.edm_table, exactness.bound_denoiser]
)
def test_formulas(check: object) -> None:
    check(exactness.engine())  # type: ignore[operator]


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("space", ["image", "masked", "ragged"])
def test_one_estimate_from_every_prediction(
    prediction: str, schedule: Schedule, space: str
) -> None:
    """The exact network of each prediction gives E[x | x_t], at a float or a tensor of times."""
    layout, std = SPACES[space], 0.6
    law = Gaussian(schedule, layout, layout.project(normal(*layout.shape)), std**2)
    bound = Denoiser(ExactNetwork(prediction, schedule, law, std), schedule, prediction, std).bind(
        layout
    )
    for t in (0.05, 0.4, 0.9):
        x_t = sum(s * layout.noise(streams(layout), 0) for s in schedule(torch.tensor(t)))
        fast, slow = bound(x_t, t), bound(x_t, torch.full((layout.batch_size,), t))
        alpha, sigma, _ = schedule.level(t)
        loss = max(1.0, sigma / alpha)  # eps_hat / alpha magnifies roundings
        near(fast, slow, 1e-14 * loss)
        near(fast, law(x_t, t), 1e-12 * loss)
    times = torch.linspace(0.2, 0.8, layout.batch_size)
    near(bound(x_t, times), law(x_t, times), 1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_input_is_a_function_of_the_log_snr(prediction: str) -> None:
    """A state of one SNR under any schedule: the same input, noise number and estimate."""
    space, std = Dense((3, 5)), 0.5
    x, eps = std * normal(3, 5, seed=1), normal(3, 5, seed=2)
    seen, estimates = [], []

    def net(x_in: Tensor, noise: Tensor, cond: None, space: Space) -> Tensor:
        seen.append((x_in, noise))
        return torch.sin(3 * x_in) + noise[:, None]

    log_snr = torch.tensor([4.0, 0.5, -3.0])
    for schedule in SCHEDULES.values():
        t = schedule.inverse(log_snr)
        alpha, sigma = (v[:, None] for v in schedule(t))
        bound = Denoiser(net, schedule, prediction, std).bind(space)
        estimates.append(bound(alpha * x + sigma * eps, t))
    for (x_in, noise), x_hat in zip(seen, estimates, strict=True):
        near(x_in, seen[0][0], 1e-12)
        near(noise, log_snr / -8, 1e-13)
        if prediction not in ("v", "flow"):  # whose targets depend on alpha and sigma apart
            near(x_hat, estimates[0], 1e-11)
    near((seen[0][0] ** 2).mean(), 1.0, 0.5)  # of unit size, for unit noise and data of size std


def test_time_as_the_noise_input() -> None:
    seen = []

    def net(x: Tensor, noise: Tensor, cond: None, space: Space) -> Tensor:
        seen.append(noise)
        return x

    bound = Denoiser(net, VPLinear(), "x", noise_input="time").bind(Dense((2, 3)))
    bound(normal(2, 3), 0.25)
    bound(normal(2, 3), torch.tensor([0.25, 1.0]))
    near(seen[0], [250.0, 250.0], 0)
    near(seen[1], [250.0, 1000.0], 1e-13)


@pytest.mark.parametrize("schedule", [Flow(), Cosine(min_log_snr=-math.inf)])
def test_noise_number_is_finite_at_the_ends(schedule: Schedule) -> None:
    """e^40 either way: beyond it float32 holds the data alone, or the noise alone."""
    seen = []

    def net(x: Tensor, noise: Tensor, cond: None, space: Space) -> Tensor:
        seen.append(noise)
        return x

    bound = Denoiser(net, schedule, "x").bind(Dense((1, 3)))
    for t in (1.0, torch.ones(1), 1e-30):
        bound(normal(1, 3), t)
    near(torch.cat(seen), [5.0, 5.0, -5.0], 0)


@pytest.mark.parametrize(
    "schedule",
    [Flow(), Cosine(min_log_snr=-math.inf), Parts((VPLinear(), Flow()))],
    ids=["flow", "cosine", "parts"],
)
def test_eps_without_signal(schedule: Schedule) -> None:
    bound = Denoiser(lambda x, *_: x, schedule, "eps").bind(Dense((2, 5), parts=(3, 2)))
    with pytest.raises(SamplingError, match=r"'eps' prediction says nothing of x at t=1"):
        bound(normal(2, 5), 1.0)
    assert torch.isfinite(bound(normal(2, 5), 0.999)).all()


@pytest.mark.parametrize("prediction", ["x", "v", "flow"])
@pytest.mark.parametrize("schedule", [Flow(), Cosine(min_log_snr=-math.inf)])
def test_other_predictions_without_signal(prediction: str, schedule: Schedule) -> None:
    """x from v = -x and from eps - x, where x_t = eps; the network's output is 0.7."""
    bound = Denoiser(lambda x, *_: 0 * x + 0.7, schedule, prediction).bind(Dense((2, 5)))
    x_t = normal(2, 5)
    expected = {"x": 0.7 + 0 * x_t, "v": -0.7 + 0 * x_t, "flow": x_t - 0.7}[prediction]
    near(bound(x_t, 1.0), expected, 1e-15)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_parts_have_scalings_of_their_own(prediction: str) -> None:
    space, schedules = Dense((2, 5), parts=(3, 2)), (VPLinear(), Cosine())
    x_t = normal(2, 5)
    parts = Denoiser(lambda x, *_: torch.cos(x), Parts(schedules), prediction).bind(space)
    for t in (0.3, torch.tensor([0.3, 0.8])):
        whole = parts(x_t, t)
        for schedule, columns in zip(schedules, (slice(0, 3), slice(3, 5)), strict=True):
            alone = Denoiser(lambda x, *_: torch.cos(x), schedule, prediction)
            piece = x_t[:, columns]
            near(whole[:, columns], alone.bind(Dense(tuple(piece.shape)))(piece, t), 1e-13)


def test_learned_variance_is_split() -> None:
    space = Dense((2, 3, 4))
    mean, variance = normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    bound = Denoiser(lambda *_: torch.cat([mean, variance], 1), VPLinear(), "x").bind(space)
    x_hat, v = bound.with_variance(normal(2, 3, 4), 0.5)
    near(x_hat, mean, 1e-15)
    assert torch.equal(v, variance)
    bound = Denoiser(lambda *_: mean, VPLinear(), "x").bind(space)
    assert bound.with_variance(normal(2, 3, 4), 0.5)[1] is None


@pytest.mark.parametrize("shape", [(2, 4), (2, 9), (3, 3), (2, 3, 1), (4, 3)])
def test_wrong_output(shape: tuple[int, ...]) -> None:
    bound = Denoiser(lambda *_: torch.zeros(shape), VPLinear(), "x").bind(Dense((2, 3)))
    with pytest.raises(ValueError, match="the backbone returned"):
        bound(normal(2, 3), 0.5)


@pytest.mark.parametrize("sampler", [DDPM(), DPMSolverPP2M(), Heun(churn=10.0)])
@pytest.mark.parametrize("space", ["masked", "ragged"])
def test_states_stay_valid_whatever_the_network_does(sampler: Sampler, space: str) -> None:
    """A backbone that writes into the padding and pushes all atoms along: 12 steps of rounding."""
    layout = SPACES[space]
    bound = Denoiser(lambda x, *_: torch.sin(x) + 3, VPLinear(), "v").bind(layout)
    times = UniformTime().times(VPLinear(), 12)
    for state in states(bound, layout, VPLinear(), sampler, times, streams(layout)):
        for x in (state.x, state.x_hat):
            if isinstance(layout, Masked):
                assert (x.masked_select(~layout.mask) == 0).all()
                assert (x.masked_select(layout.mask) != 0).all()
            elif isinstance(layout, Ragged):
                for piece in x.split(layout.sizes.tolist()):
                    assert piece[:, :3].mean(0).abs().max() < 1e-14


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_caller_keeps_its_tensors(prediction: str) -> None:
    """Neither the state nor the network's output is written to."""
    out = normal(2, 3, seed=1)
    x_t = normal(2, 3, seed=2)
    before = out.clone(), x_t.clone()
    bound = Denoiser(lambda *_: out, VPLinear(), prediction).bind(Dense((2, 3)))
    bound(x_t, 0.5)
    bound(x_t, torch.full((2,), 0.5))
    assert torch.equal(out, before[0])
    assert torch.equal(x_t, before[1])


def test_unknown_prediction() -> None:
    with pytest.raises(ValueError, match="choose from"):
        Denoiser(lambda x, *_: x, VPLinear(), "epsilon")
