from __future__ import annotations

import math
from functools import cache

import exactness
import numpy as np
import pytest
import torch
from exactness import alpha_bars, near
from oracle_tools import (
    SCHEDULES,
    SPACES,
    Columns,
    Counted,
    gaussian_moments,
    normal,
    parts_of,
    streams,
)
from scipy.integrate import solve_ivp
from torch import Tensor

from gendiff.adaptive import Adaptive
from gendiff.denoiser import Denoiser
from gendiff.errors import SamplingError
from gendiff.grids import Karras, Quadratic, UniformTime
from gendiff.noise import StepNoise
from gendiff.samplers import (
    DDIM,
    DDPM,
    DEIS,
    LMS,
    PNDM,
    SAMPLERS,
    VAB,
    DPMSolverPP2M,
    DPMSolverPP2S,
    DPMSolverPP3M,
    Euler,
    Heun,
    PredictorCorrector,
    Restart,
    Sampler,
    SDEDPMSolverPP2M,
    UniPC,
    make_table,
    network_calls,
    sample,
    start,
    states,
)
from gendiff.schedules import EDM, Cosine, Flow, Parts, Schedule, VPLinear
from gendiff.spaces import Dense, Space
from gendiff.tables import Step
from gendiff.testing import ExactNetwork, Gaussian, Mixture, slope

pytestmark = pytest.mark.usefixtures("float64")
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
DETERMINISTIC: dict[str, Sampler] = {
    "ddim": DDIM(),
    "euler": Euler(),
    "heun": Heun(),
    "dpm++2m": DPMSolverPP2M(),
    "dpm++2m_midpoint": DPMSolverPP2M("midpoint"),
    "dpm++2s": DPMSolverPP2S(),
    "dpm++2s_midpoint": DPMSolverPP2S("midpoint"),
    "dpm++3m": DPMSolverPP3M(),
    "dpm++3m_half": DPMSolverPP3M("half"),
    "unipc": UniPC(),
    "unipc_3": UniPC(3),
    "lms": LMS(),
    "lms_3": LMS(3),
    "lms_2": LMS(2),
    "deis": DEIS(3),
    "deis_4": DEIS(),
    "deis_log": DEIS(3, "log_rho"),
    "vab": VAB(),
    "vab_3": VAB(3),
    "pndm": PNDM(),
    "dpm++2m_sde_0": SDEDPMSolverPP2M(0.0),
}
ON_THE_NOISE = ("lms", "lms_3", "lms_2", "deis", "deis_4", "deis_log", "vab", "vab_3", "pndm")
STOCHASTIC: dict[str, Sampler] = {
    "ddpm": DDPM(),
    "ddpm_large": DDPM("large"),
    "ddim_1": DDIM(1.0),
    "dpm++2m_sde": SDEDPMSolverPP2M(),
    "restart": Restart(sigma_min=0.15, sigma_max=4.0),
    "restart_euler": Restart("euler", 3, 0.15, 4.0),
    "pc": PredictorCorrector(),
    "euler_churn": Euler(churn=8.0),
    "heun_churn": Heun(churn=8.0, churn_min=0.05, churn_max=30.0, churn_noise=1.003),
}
EVERY = {**DETERMINISTIC, **STOCHASTIC}


@pytest.mark.parametrize(
    "check",
    [
        exactness.ddpm_rows,
        exactness.ddim_rows,
        exactness.heun_rows,
        exactness.churn_rows,
        exactness.restart_rows,
        exactness.langevin_rows,
        exactness.multistep_weights,
        exactness.multistep_rows,
        exactness.solver_rows,
        exactness.noise_rows,
        exactness.unipc_rows,
        exactness.driver,
    ],
)
def test_formulas(check: object) -> None:
    check(exactness.engine())  # type: ignore[operator]


# --- order -------------------------------------------------------------------------------------

# y = x / alpha at noise scale sigma / alpha obeys dy / d log sigma = y - x_hat(y, sigma) in every
# schedule, so one reference, made without the engine, serves all.
MEANS = np.array([[0.9, 0.4], [-0.8, 0.6], [0.1, -1.0]])
STDS, WEIGHTS = np.array([0.5, 0.6, 0.7]), np.array([0.5, 0.2, 0.3])
FIRST, LAST, POINTS = 8.0, 0.15, 16


@cache
def reference() -> tuple[Tensor, Tensor]:
    """Where y starts and where it ends."""

    def field(log_sigma: float, flat: np.ndarray) -> np.ndarray:
        y = flat.reshape(POINTS, 1, 2)
        variance = STDS**2 + math.exp(2 * log_sigma)
        offset = y - MEANS
        p = WEIGHTS / variance * np.exp(-(offset**2).sum(-1) / (2 * variance))
        p /= p.sum(1, keepdims=True)
        x_hat = p[:, None] @ (MEANS + (STDS**2 / variance)[:, None] * offset)
        return (y - x_hat).ravel()

    first = FIRST * normal(POINTS, 2, seed=3)
    solution = solve_ivp(
        field, (math.log(FIRST), math.log(LAST)), first.numpy().ravel(), "DOP853",
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    return first, torch.from_numpy(solution.y[:, -1].reshape(POINTS, 2))


def errors_of(name: str, schedule: Schedule, grids: list[list[float]]) -> list[float]:
    """Root mean square distance from the reference, for grids from FIRST to LAST."""
    sampler, (first, last) = DETERMINISTIC[name], reference()
    law = Mixture(schedule, *(torch.from_numpy(v) for v in (MEANS, STDS, WEIGHTS)))
    space, errors = Dense((POINTS, 2)), []
    for times in grids:
        n, t = len(times) - 1, times[0]
        # The first steps, of order 1 and 2, leave h^2 and h^3 once: made n times shorter.
        times[1:1] = [t + k * (times[1] - t) / n for k in range(1, sampler.order - 1)]
        x = schedule.level(t).alpha * first
        x = sample(law, space, schedule, sampler, times, streams(space), x)
        error = x / schedule.level(times[-1]).alpha - last
        errors.append(error.square().mean().sqrt().item())
    return errors


@every_schedule
@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name not in ON_THE_NOISE])
def test_order(name: str, schedule: Schedule) -> None:
    """Slope over n = 40...320 within 0.25 of the declared order, on a grid uniform in nothing.

    The methods of order 1 need twice as many steps before their error is one power of n. Half the
    curvature leaves a small term of order 2 beside one of order 3: a slope between them.
    """
    t, s = schedule.inverse(-2 * torch.tensor([FIRST, LAST]).log()).tolist()
    log_t = torch.tensor([t, s]).log()
    counts, grids = [40, 80, 160, 320], []
    for n in counts:
        u = torch.linspace(0, 1, n + 1) ** 1.2
        times = ((log_t[0] + (log_t[1] - log_t[0]) * u).exp() * (1 - u)).add(s * u)
        grids.append([t, *times[1:-1].tolist(), s])
    errors = errors_of(name, schedule, grids)
    found, allowed = slope(errors, counts), 0.5 if name == "dpm++3m_half" else 0.25
    assert abs(found - DETERMINISTIC[name].order) < allowed, errors
    assert errors[-1] < 1e-2


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *(
            (n, s)
            for n in ("lms", "lms_3", "lms_2", "vab", "vab_3", "deis_log", "pndm")
            for s in ("cosine", "edm")
        ),
        *(("deis", s) for s in ("vp_linear", "cosine", "polynomial", "ve", "flow")),
        *(("deis_4", s) for s in ("cosine", "flow")),
    ],
)
def test_order_on_the_noise(name: str, schedule: str) -> None:
    """Slope over n = 40...160 within 0.25 of the declared order, on grids of Karras's form.

    On the other test's grid, coarse at first in sigma / alpha, it is reached beyond 320 steps.
    """
    counts, grids = [40, 80, 160], []
    for n in counts:
        u = torch.linspace(0, 1, n + 1)
        scale = (FIRST ** (1 / 3) + u * (LAST ** (1 / 3) - FIRST ** (1 / 3))) ** 3
        grids.append(SCHEDULES[schedule].inverse(-2 * scale.log()).tolist())
    errors = errors_of(name, SCHEDULES[schedule], grids)
    assert abs(slope(errors, counts) - DETERMINISTIC[name].order) < 0.25, errors
    assert errors[-1] < 1e-3


@every_space
@pytest.mark.parametrize("name", ["ddim", "heun", "dpm++2m"])
@pytest.mark.parametrize("schedule", ["vp_linear", "edm", "flow"])
def test_flow_of_a_gaussian(name: str, space: Space, schedule: str) -> None:
    """From noise to data along the exact trajectories, at the declared order (within 0.3)."""
    law = Gaussian(
        SCHEDULES[schedule], space, space.project(normal(*space.shape, seed=1)), (0.5, 1.5)
    )
    t = SCHEDULES[schedule].inverse(torch.tensor(-2 * math.log(20))).item()
    x = space.noise(streams(space), 0) * SCHEDULES[schedule].level(t).sigma + 0.0
    errors = []
    for n in (20, 40, 80):
        grid = Karras(rho=3.0, sigma_min=0.5 / n).times(SCHEDULES[schedule], n, t)
        found = sample(
            law, space, SCHEDULES[schedule], DETERMINISTIC[name], grid, streams(space), x
        )
        errors.append((found - law.flow(x, t, 0.0)).abs().max().item())
    assert abs(slope(errors, [20, 40, 80]) - DETERMINISTIC[name].order) < 0.3, errors


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(Flow(), "flow"), (Flow(), "v"), (Cosine(min_log_snr=-math.inf), "v")],
)
@pytest.mark.parametrize(
    "name", [n for n in DETERMINISTIC if n not in ("lms_2", "lms_3", "deis_4")]
)
def test_from_a_state_without_signal(name: str, schedule: Schedule, prediction: str) -> None:
    """The whole way, t = 1 to 0, both ends infinite in lambda: converges to the exact flow.

    At more than 3/4 of the order, for both ends delay the power law. The grid is quadratic for
    the cosine schedule: the step into the data is of order 1 and costs sigma^2, there of size t.
    """
    space = Dense((8, 3))
    law = Gaussian(schedule, space, normal(8, 3, seed=1), 0.4)
    network = ExactNetwork(prediction, schedule, law, 1.0)

    def net(x: Tensor, noise: Tensor, cond: None, space: Space) -> Tensor:
        if noise[0] < 5:
            return network(x, noise, cond, space)
        return x - law.mean if prediction == "flow" else -law.mean  # where alpha = 0

    denoiser = Denoiser(net, schedule, prediction).bind(space)
    grid = UniformTime() if isinstance(schedule, Flow) else Quadratic()
    x, errors, counts = normal(8, 3), [], [160, 320]
    for n in counts:
        times = grid.times(schedule, n)
        found = sample(denoiser, space, schedule, DETERMINISTIC[name], times, streams(space), x)
        errors.append((found - law.flow(x, 1.0, 0.0)).square().mean().sqrt().item())
    # The step into the data is of order 1 and costs sigma^2: no order above 2 shows here.
    assert slope(errors, counts) > 0.75 * min(DETERMINISTIC[name].order, 2), errors
    assert errors[-1] < (1e-2 if DETERMINISTIC[name].order == 1 else 2e-4)


# --- equivalences ------------------------------------------------------------------------------

TIMES = [1.0, 0.83, 0.5, 0.31, 0.05, 0.0]
CASES = {**SCHEDULES, "cosine_to_noise": Cosine(min_log_snr=-math.inf)}
every_case = pytest.mark.parametrize("schedule", CASES.values(), ids=CASES.keys())


@every_case
def test_ddim_is_euler(schedule: Schedule) -> None:
    assert DDIM(0.0).table(schedule, TIMES) == Euler().table(schedule, TIMES)


def test_ddim_is_euler_along_the_flow() -> None:
    """x_s = x_t + (s - t) (eps_hat - x_hat), literally."""
    law, space = lambda x, t: torch.sin(x) + t, Dense((4, 3))
    x = normal(4, 3)
    found = sample(law, space, Flow(), DDIM(), TIMES, streams(space), x)
    for t, s in zip(TIMES, TIMES[1:], strict=False):
        x_hat = law(x, t)
        x = x + (s - t) * ((x - (1 - t) * x_hat) / t - x_hat)
    near(found, x, 1e-14)


@every_case
def test_ddim_with_eta_one_is_ddpm(schedule: Schedule) -> None:
    for one, other in zip(
        DDIM(1.0).table(schedule, TIMES), DDPM().table(schedule, TIMES), strict=True
    ):
        (a,), (b,) = one.stages, other.stages
        near([a.a, *a.b, a.c], [b.a, *b.b, b.c], 1e-12)  # sqrt(1 - share), share near 1


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
@every_case
def test_sde_rows_are_exact_for_a_constant_estimate(schedule: Schedule, eta: float) -> None:
    """Mean a alpha_t + sum(b) = alpha_s and variance a^2 sigma_t^2 + c^2 = sigma_s^2."""
    for step in SDEDPMSolverPP2M(eta).table(schedule, TIMES):
        (stage,), now, end = step.stages, schedule.level(step.t), schedule.level(step.s)
        near(stage.a * now.alpha + sum(stage.b), end.alpha, 1e-12)
        near((stage.a * now.sigma) ** 2 + stage.c**2, end.sigma**2, 1e-12)


@every_case
def test_sde_of_order_one_is_ddpm(schedule: Schedule) -> None:
    for t, s in zip(TIMES, TIMES[1:], strict=False):
        (one,), (other,) = (
            sampler.table(schedule, [t, s])[0].stages for sampler in (SDEDPMSolverPP2M(), DDPM())
        )
        near([one.a, *one.b, one.c], [other.a, *other.b, other.c], 1e-12)


@every_case
def test_euler_ancestral_is_ddim(schedule: Schedule) -> None:
    """k-diffusion's sigma_up and sigma_down, for y = x / alpha."""
    for t, s in zip(TIMES[1:-1], TIMES[2:-1], strict=False):
        now, end = schedule.level(t), schedule.level(s)
        first, last = now.sigma / now.alpha, end.sigma / end.alpha
        up = 0.6 * last * math.sqrt(1 - (last / first) ** 2)
        down = math.sqrt(last**2 - up**2)
        (stage,) = DDIM(0.6).table(schedule, [t, s])[0].stages
        found = [stage.a * now.alpha / end.alpha, stage.b[0] / end.alpha, stage.c / end.alpha]
        near(found, [down / first, 1 - down / first, up], 1e-11)


def in_estimates(step: Step) -> list[float]:
    """a and b of a one-call step in terms of x and x_hat, where nothing older is used."""
    (stage,) = step.stages
    p, q = stage.keep or (0.0, 1.0)
    return [stage.a + stage.b[0] * p, stage.b[0] * q]


@every_case
def test_multistep_of_order_one_is_ddim(schedule: Schedule) -> None:
    plain = DDIM().table(schedule, TIMES)
    for sampler in (LMS(1), DEIS(1), DEIS(1, "log_rho"), VAB(1)):
        for one, other in zip(sampler.table(schedule, TIMES), plain, strict=True):
            near(in_estimates(one), in_estimates(other), 1e-11)
    for sampler in (PNDM(), UniPC(), UniPC(3), LMS(), DEIS()):
        near(in_estimates(sampler.table(schedule, TIMES)[0]), in_estimates(plain[0]), 1e-11)


def test_methods_of_two_names() -> None:
    """DEIS in rho is LMS; PNDM is LMS on equal steps of rho; UniP-2 and 3 are DPM-Solver++."""
    for one, other in (
        (DEIS().table(EDM(80.0), TIMES), LMS().table(EDM(80.0), TIMES)),
        (
            PNDM().table(EDM(80.0), even := UniformTime().times(EDM(80.0), 8)),
            LMS().table(EDM(80.0), even),
        ),
    ):
        for a, b in zip(one, other, strict=True):
            near(a.stages[0].b, b.stages[0].b, 1e-10)
    for p, sampler in ((2, DPMSolverPP2M("midpoint")), (3, DPMSolverPP3M())):
        for a, b in zip(
            UniPC(p).table(VPLinear(), TIMES), sampler.table(VPLinear(), TIMES), strict=True
        ):
            if p == 2 or len(b.stages[0].b) == 3:
                assert a.stages[0]._replace(correct=None) == b.stages[0]


@every_case
def test_last_step_is_the_estimate(schedule: Schedule) -> None:
    """So Heun's is Euler's; not with polynomials in variables that are finite at the data."""
    for name in EVERY.keys() - set(ON_THE_NOISE):
        last = make_table(EVERY[name], schedule, TIMES)[-1]
        (stage,) = last.stages
        assert (stage.a, stage.b, stage.c) == (0.0, (1.0,), 0.0)


@pytest.mark.parametrize("name", ["lms", "lms_2", "deis", "deis_4", "vab", "vab_3", "pndm"])
def test_the_order_holds_into_the_data(name: str) -> None:
    """The step to sigma = 0 from an exact history errs as h^(p + 1) with p estimates.

    For p velocities: the flow of a Gaussian is smooth in rho and in tau down to the data.
    """
    schedule, space, sampler = Flow(), Dense((8, 3)), DETERMINISTIC[name]
    law, first = Gaussian(schedule, space, normal(8, 3, seed=1), 0.8), normal(8, 3)
    errors = []
    for steps in (20, 40):
        times = torch.linspace(0.5, 0, steps + 1).tolist()
        table = sampler.table(schedule, times)
        (last,), found = table[-1].stages, 0.0
        for weight, step in zip(last.b, reversed(table), strict=False):
            x, (p, q) = law.flow(first, 0.5, step.t), step.stages[0].keep
            found = found + weight * (p * x + q * law(x, step.t))
        found = found + last.a * law.flow(first, 0.5, times[-2])
        errors.append((found - law.flow(first, 0.5, 0.0)).abs().max().item())
    count = 2 if name == "pndm" else len(last.b)
    assert errors[0] > 0.6 * 2 ** (count + 1) * errors[1], errors


@pytest.mark.parametrize("schedule", [VPLinear(), Flow()])
def test_singlestep_calls_stand_on_the_grid(schedule: Schedule) -> None:
    """Pairs of intervals, and steps of order 1 at both infinite ends and where one is left."""
    signal = isinstance(schedule, VPLinear)
    for n in range(1, 8):
        for times in (UniformTime().times(schedule, n), [*UniformTime().times(schedule, n)[:-1]]):
            if len(times) < 2:
                continue
            table = DPMSolverPP2S().table(schedule, times)
            assert [stage.t for step in table for stage in step.stages] == times[:-1]
            assert [step.t for step in table[1:]] == [step.s for step in table[:-1]]
            sizes = [len(step.stages) for step in table]
            assert sizes[-1] == 1 or times[-1] > 0
            assert sizes[0] == 1 or signal
            assert sizes.count(1) <= (not signal) + (times[-1] == 0) + 1


@pytest.mark.parametrize("kind", [Euler, Heun])
@every_case
def test_no_churn(kind: type[Euler], schedule: Schedule) -> None:
    plain = kind().table(schedule, TIMES)
    assert kind(churn=0.0, churn_noise=7.0).table(schedule, TIMES) == plain
    assert kind(churn=9.0, churn_min=1e9).table(schedule, TIMES) == plain
    assert all(step.renoise is None for step in plain)
    churned = kind(churn=9.0).table(schedule, TIMES)
    assert churned[0] == plain[0]  # the level never leaves the schedule
    assert all(step.renoise is not None for step in churned[1:])


@every_case
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_constant_estimate(name: str, schedule: Schedule) -> None:
    """All are DDIM, in one step or in many: x_s = alpha_s c + sigma_s eps."""
    space, c = Dense((4, 3)), normal(4, 3, seed=1)
    x, times = normal(4, 3), TIMES[:-1]
    found = sample(lambda *_: c, space, schedule, DETERMINISTIC[name], times, streams(space), x)
    (a_t, sigma_t, _), (a_s, sigma_s, _) = schedule.level(times[0]), schedule.level(times[-1])
    # Estimates of the noise lose digits where there is little else.
    tolerance = 1e-10 if name in ON_THE_NOISE else 1e-12
    near(found, a_s * c + sigma_s * (x - a_t * c) / sigma_t, tolerance)


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("ddpm_large", "deis", "deis_4")])
def test_one_trajectory_under_every_schedule(name: str) -> None:
    """On one grid of noise scales x / alpha takes one path, noise included.

    Not with the large variance, for beta depends on alpha, nor with polynomials in t.
    """
    log_snr = -2 * torch.tensor([20.0, 8.0, 3.0, 1.0, 0.2]).log()
    space, ends = Dense((6, 2)), []
    for schedule in SCHEDULES.values():
        law = Mixture(schedule, *(torch.from_numpy(v) for v in (MEANS, STDS, WEIGHTS)))
        times = schedule.inverse(log_snr).tolist()
        x = 20 * schedule.level(times[0]).alpha * normal(6, 2)
        end = sample(law, space, schedule, EVERY[name], times, streams(space), x)
        ends.append(end / schedule.level(times[-1]).alpha)
    for end in ends[1:]:
        near(end, ends[0], 1e-11)


# --- moments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_ddpm_variance_on_unit_gaussian_data(steps: int) -> None:
    """x_hat = alpha x, so the mean is rho x_t, rho = alpha_t / alpha_s, and the variance follows
    V_s = rho^2 V_t + c^2. The small c loses variance; the large keeps 1 - rho^2 + rho^2 = 1."""
    _, bar = alpha_bars()
    kept = bar[torch.arange(1000, -1, -1000 // steps)]
    times = UniformTime().times(VPLinear(), steps)
    value = 1.0
    for a_t, a_s in zip(kept.tolist(), kept.tolist()[1:], strict=False):
        value = a_t / a_s * value + (1 - a_t / a_s) * (1 - a_s) / (1 - a_t)
    small = gaussian_moments(DDPM().table(VPLinear(), times), VPLinear(), 0, 1, 0, 1)
    near(small[-1][1], value, 1e-10)
    documented = {10: 0.548, 100: 0.922, 1000: 0.991}  # the limit is 1
    assert round(value, 3) == documented[steps]
    large = gaussian_moments(DDPM("large").table(VPLinear(), times), VPLinear(), 0, 1, 0, 1)
    near([v for _, v in large[:-1]], [1.0] * (steps - 1), 1e-10)
    near(large[-1][1], kept[-2], 1e-10)  # the step into the data adds no noise


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *((n, s) for n in ("ddpm", "ddpm_large", "ddim_1", "ddim_half") for s in SCHEDULES),
        *((n, s) for n in ("euler_churn", "heun_churn") for s in ("cosine", "edm", "flow")),
        *((n, s) for n in ("dpm++2m_sde", "sde_half") for s in ("vp_linear", "edm", "flow")),
        *((n, s) for n in ("restart", "pc") for s in ("cosine", "edm", "flow")),
    ],
)
def test_moments_converge(name: str, schedule: str) -> None:
    """Mean and variance of N(0.7, 0.3), propagated without sampling: right as n grows.

    At least as fast as 1 / n^0.8, and within 4 % at 640 steps.
    """
    samplers = {**STOCHASTIC, "ddim_half": DDIM(0.5), "heun_churn": Heun(churn=8.0)}
    samplers["sde_half"] = SDEDPMSolverPP2M(0.5)
    process = SCHEDULES[schedule]
    t = process.inverse(torch.tensor(-2 * math.log(40))).item()
    alpha, sigma, _ = process.level(t)
    errors, counts = [], [40, 160, 640]
    for n in counts:
        times = Karras(sigma_min=0.16 / n).times(process, n, t)
        table = samplers[name].table(process, times)
        m, v = gaussian_moments(table, process, 0.7, 0.3, 0.7 * alpha, 0.3 * alpha**2 + sigma**2)[
            -1
        ]
        near(m, 0.7, 1e-10 if name != "heun_churn" else 1e-3)
        errors.append(abs(v / 0.3 - 1))
    assert errors[-1] < 4e-2
    assert slope(errors, counts) > 0.8, errors


@pytest.mark.parametrize("variance", [0.0, 0.3])
@every_schedule
def test_langevin_settles(schedule: Schedule, variance: float) -> None:
    """Many corrections at one time: on mean alpha x and variance V / (1 - r^2 sigma^2 / V)."""
    t, s = schedule.inverse(-2 * torch.tensor([2.0, 0.5]).log()).tolist()
    alpha, sigma, _ = schedule.level(s)
    table = PredictorCorrector(r=0.3, corrections=400).table(schedule, [t, s])
    (*_, (m, v)) = gaussian_moments(table, schedule, 0.7, variance, 3.0, 5.0)
    settled = alpha**2 * variance + sigma**2
    near([m, v], [0.7 * alpha, settled / (1 - 0.3**2 * sigma**2 / settled)], 1e-9)


def test_ddim_keeps_the_marginals_of_a_point() -> None:
    """Data at one point, eta anything: variance sigma_s^2, mean alpha_s x after every step."""
    schedule = VPLinear()
    for eta in (0.0, 0.4, 1.0):
        table = DDIM(eta).table(schedule, TIMES)
        alpha, sigma, _ = schedule.level(1.0)
        moments = gaussian_moments(table, schedule, 1.5, 0.0, 1.5 * alpha, sigma**2)
        for step, (m, v) in zip(table, moments, strict=True):
            near([m, v], [1.5 * schedule.level(step.s).alpha, schedule.level(step.s).sigma ** 2])


class LearnedGaussian:
    """The exact denoiser of N(mean, v) and the exact variance of x_s given x_t, as a network
    that learned both perfectly would give them for one grid."""

    def __init__(self, law: Gaussian, v: float, times: list[float]) -> None:
        self.law, self.v, self.next = law, v, dict(zip(times, times[1:], strict=False))

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        return self.law(x_t, t)

    def with_variance(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
        a_t, sigma_t, _ = self.law.schedule.level(t)
        a_s, sigma_s, _ = self.law.schedule.level(self.next[t])
        v_t, v_s = a_t**2 * self.v + sigma_t**2, a_s**2 * self.v + sigma_s**2
        exact = v_s - (a_t / a_s * v_s) ** 2 / v_t
        beta = sigma_t**2 - (a_t / a_s * sigma_s) ** 2
        low, high = math.log(beta * sigma_s**2 / sigma_t**2), math.log(beta)
        share = (math.log(exact) - low) / (high - low)
        return self.law(x_t, t), torch.full_like(x_t, 2 * share - 1)


@every_space
def test_learned_variance_is_exact_in_few_steps(space: Space) -> None:
    """Ancestral steps with the true mean and variance are the exact reverse chain: with z given,
    x_s = E[x_s | x_t] + std z, step by step."""
    schedule, times = VPLinear(), [1.0, 0.7, 0.4, 0.2, 0.1]
    law = Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), 0.3)
    source = streams(space)
    x = start(space, schedule, 1.0, source)
    table_walk = states(
        LearnedGaussian(law, 0.3, times), space, schedule, DDPM("learned"), times, source
    )
    for state, t, s in zip(table_walk, times, times[1:], strict=False):
        (a_t, sigma_t, _), (a_s, sigma_s, _) = schedule.level(t), schedule.level(s)
        v_t, v_s = a_t**2 * 0.3 + sigma_t**2, a_s**2 * 0.3 + sigma_s**2
        slope_ = a_t / a_s * v_s / v_t
        std = math.sqrt(v_s - slope_**2 * v_t)
        z = space.noise(source, 2 * state.number - 1)
        x = a_s * law.mean + slope_ * (x - a_t * law.mean) + std * z
        near(state.x, x, 1e-11)


def test_learned_variance_needs_a_head() -> None:
    space = Dense((2, 3))
    times = [1.0, 0.5, 0.0]
    for denoiser in (lambda x, t: x, Denoiser(lambda x, *_: x, VPLinear(), "x").bind(space)):
        with pytest.raises(SamplingError, match="variance head"):
            sample(denoiser, space, VPLinear(), DDPM("learned"), times, streams(space))


@pytest.mark.parametrize(
    ("sampler", "schedule", "steps"),
    [
        (DDPM(), VPLinear(), 1000),
        (Heun(churn=20.0), EDM(80.0), 60),
        (DDIM(0.5), Cosine(), 300),
        (SDEDPMSolverPP2M(), EDM(80.0), 60),
        (SDEDPMSolverPP2M(0.5), EDM(80.0), 60),
        (Restart(sigma_min=0.2, sigma_max=2.0), EDM(80.0), 40),
    ],
    ids=["ddpm", "heun_churn", "ddim_half", "dpm++2m_sde", "dpm++2m_sde_half", "restart"],
)
def test_mixture_moments(sampler: Sampler, schedule: Schedule, steps: int) -> None:
    """Mean and covariance of a mixture, from 2000 samples: five standard errors, which are
    sqrt(var(x) / n) and sqrt(var(x x') / n) with the sample's own variance of the products."""
    n = 2000
    means, stds, weights = (torch.from_numpy(v) for v in (2 * MEANS, STDS / 2, WEIGHTS))
    law, space = Mixture(schedule, means, stds, weights), Dense((n, 2))
    grid = Karras() if isinstance(schedule, EDM) else UniformTime()
    noise = StepNoise(11, dtype=torch.float64)
    x = sample(law, space, schedule, sampler, grid.times(schedule, steps), noise)
    mean = weights @ means
    centred = means - mean
    covariance = torch.diag((weights @ stds**2).expand(2)) + (centred.T * weights) @ centred
    found = x - mean
    assert (found.mean(0).abs() < 5 * (covariance.diagonal() / n).sqrt()).all()
    products = found[:, :, None] * found[:, None]
    assert ((products.mean(0) - covariance).abs() < 5 * products.std(0) / math.sqrt(n)).all()


# --- the driver --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("schedule", [VPLinear(), Flow()])
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_network_calls(name: str, schedule: Schedule, steps: int) -> None:
    space = Dense((2, 3))
    denoiser = Counted(lambda x, t: x / 2)
    times = UniformTime().times(schedule, steps)
    sample(denoiser, space, schedule, EVERY[name], times, streams(space))
    expected = steps
    if isinstance(EVERY[name], Restart):
        expected = network_calls(EVERY[name], schedule, times)
        assert (expected > 2 * steps - 1) == (steps == 9)
    elif isinstance(EVERY[name], (Heun, PredictorCorrector)):
        expected = 2 * steps - 1
        if isinstance(schedule, Flow) and steps > 1 and name != "pc":
            expected -= 1  # Euler's step from a state without signal
    assert denoiser.calls == network_calls(EVERY[name], schedule, times) == expected


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_written_to(name: str) -> None:
    """Neither the start, nor the estimates, nor states that were given out; and a sampler, which
    has no state, gives the same again."""
    space, x = SPACES["ragged"], SPACES["ragged"].noise(streams(SPACES["ragged"], 1), 0)
    before = x.clone()
    denoiser = Counted(lambda x, t: torch.tanh(x))
    times = UniformTime().times(VPLinear(), 6)
    walk = [
        (state, state.x.clone(), state.x_hat.clone())
        for state in states(denoiser, space, VPLinear(), EVERY[name], times, streams(space), x)
    ]
    assert torch.equal(x, before)
    for x_t, x_t_then, x_hat, x_hat_then in denoiser.seen:
        assert torch.equal(x_t, x_t_then)
        assert torch.equal(x_hat, x_hat_then)
    for state, x_then, x_hat_then in walk:
        assert torch.equal(state.x, x_then)
        assert torch.equal(state.x_hat, x_hat_then)
    table = make_table(EVERY[name], VPLinear(), times)
    assert [state.number for state, *_ in walk] == list(range(1, len(table) + 1))
    assert [state.t for state, *_ in walk] == [step.s for step in table]
    if name not in ("restart", "restart_euler", "pc", "dpm++2s", "dpm++2s_midpoint"):
        assert [state.t for state, *_ in walk] == times[1:]
    again = sample(
        lambda x, t: torch.tanh(x), space, VPLinear(), EVERY[name], times, streams(space), x
    )
    assert torch.equal(again, walk[-1][0].x)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("space", ["image", "masked", "ragged"])
def test_a_sample_does_not_see_its_batch(name: str, space: str) -> None:
    whole = SPACES[space]
    law = lambda x, t: torch.tanh(x)  # noqa: E731
    times = UniformTime().times(Cosine(), 5)
    x = sample(law, whole, Cosine(), EVERY[name], times, streams(whole))
    for i in range(3):
        alone, expected = whole.select([i], x)
        source = type(streams(whole))(0, (i,), dtype=torch.float64)
        found = sample(law, alone, Cosine(), EVERY[name], times, source)
        near(found, expected, 1e-14)  # sums over atoms in another order


@pytest.mark.parametrize(
    "name",
    ["ddpm", "ddpm_large", "ddim_1", "ddim", "heun", "dpm++2m", "dpm++2s", "unipc", "lms", "vab"],
)
@every_space
def test_parts(name: str, space: Space) -> None:
    """A state of two parts, each under its schedule, is two states sampled apart."""
    schedules, times = (VPLinear(), Cosine()), UniformTime().times(Cosine(), 7)
    source = streams(space)
    found = sample(lambda x, t: torch.tanh(x), space, Parts(schedules), EVERY[name], times, source)
    for schedule, (part, first, last) in zip(schedules, parts_of(space), strict=True):
        noise = Columns(source, first, last, 5)
        expected = sample(lambda x, t: torch.tanh(x), part, schedule, EVERY[name], times, noise)
        near(found[:, first:last], expected, 1e-13)


def test_parts_of_a_gaussian_with_learned_variance() -> None:
    """The interpolation between each part's own bounds."""
    space, schedules, times = SPACES["dense"], (VPLinear(), Cosine()), [1.0, 0.6, 0.3, 0.0]

    class Learned:
        def __call__(self, x: Tensor, t: float) -> Tensor:
            return torch.tanh(x)

        def with_variance(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            return torch.tanh(x), torch.sin(5 * x)

    learned, source = Learned(), streams(space)
    found = sample(learned, space, Parts(schedules), DDPM("learned"), times, source)
    for schedule, (part, first, last) in zip(schedules, parts_of(space), strict=True):
        noise = Columns(source, first, last, 5)
        expected = sample(learned, part, schedule, DDPM("learned"), times, noise)
        near(found[:, first:last], expected, 1e-13)


@pytest.mark.parametrize(
    ("schedules", "sampler"),
    [
        ((VPLinear(), Flow()), Heun()),
        ((VPLinear(), Cosine()), Heun(churn=5.0)),
        ((VPLinear(), Cosine()), Euler(churn=5.0)),
        ((Flow(), EDM(0.01)), Euler(churn=5.0, churn_min=0.1)),
        ((EDM(0.01), Flow()), Euler(churn=5.0, churn_min=0.1)),
    ],
)
def test_parts_that_cannot_go_together(
    schedules: tuple[Schedule, Schedule], sampler: Sampler
) -> None:
    """Steps of different kinds, or calls at different times."""
    space = SPACES["dense"]
    with pytest.raises(SamplingError, match="parts"):
        sample(
            lambda x, t: x, space, Parts(schedules), sampler, [1.0, 0.5, 0.1, 0.0], streams(space)
        )


def test_start() -> None:
    space = SPACES["dense"]
    z = space.noise(streams(space), 0)
    near(start(space, EDM(80.0), 0.5, streams(space)), 40 * z, 1e-15)
    parts = start(space, Parts((EDM(80.0), Flow())), 0.5, streams(space))
    near(parts, torch.cat([40 * z[:, :3], 0.5 * z[:, 3:]], 1), 1e-15)


def test_every_published_name() -> None:
    tested = {type(sampler) for sampler in EVERY.values()}
    assert tested | {Adaptive} == set(SAMPLERS.values())  # that in test_adaptive.py


@pytest.mark.parametrize(
    "make",
    [
        lambda: DDPM("fixed"),
        lambda: DDIM(1.5),
        lambda: DDIM(-0.1),
        lambda: Euler(churn=-1.0),
        lambda: Heun(churn_noise=-1.0),
        lambda: Restart("dpm++2m"),
        lambda: Restart(restarts=0),
        lambda: Restart(sigma_min=2.0, sigma_max=1.0),
        lambda: PredictorCorrector(r=1.0),
        lambda: PredictorCorrector(corrections=0),
        lambda: Heun(churn_min=2.0, churn_max=1.0),
        lambda: DPMSolverPP2M("heun"),
        lambda: DPMSolverPP2S("heun"),
        lambda: DPMSolverPP3M("third"),
        lambda: DEIS(3, "lambda"),
        lambda: VAB(0),
        lambda: SDEDPMSolverPP2M(-0.1),
        lambda: LMS(5),
        lambda: DEIS(0),
        lambda: UniPC(1),
    ],
)
def test_refuses_wrong_values(make: object) -> None:
    with pytest.raises(ValueError, match="="):
        make()  # type: ignore[operator]
