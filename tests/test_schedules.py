from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch
from exactness import alpha_bars, near
from oracle_tools import SCHEDULES

from gendiff.schedules import (
    EDM,
    VE,
    Cosine,
    Flow,
    Parts,
    Polynomial,
    Schedule,
    Shifted,
    SigmoidBetas,
    SohlDickstein,
    VPLinear,
    ZeroTerminal,
)

pytestmark = pytest.mark.usefixtures("float64")
ALL: dict[str, Schedule] = {
    **SCHEDULES,
    "vp_short": VPLinear(2e-3, 0.2, 100),
    "vp_constant": VPLinear(0.01, 0.01, 500),
    "cosine_to_noise": Cosine(min_log_snr=-math.inf),
    "cosine_wide": Cosine(0.1, -6.0),
    "vp_sigmoid": SigmoidBetas(),
    "vp_sohl_dickstein": SohlDickstein(),
    "vp_shifted": Shifted(VPLinear(), -1.4),
    "cosine_shifted": Shifted(Cosine(), 1.4),
    "poly_shifted": Shifted(Polynomial(), -3.0),
    "flow_shifted": Shifted(Flow(), -2.2),
    "edm_shifted": Shifted(EDM(), 1.0),
    "vp_to_noise": ZeroTerminal(VPLinear()),
    "vp_sigmoid_to_noise": ZeroTerminal(SigmoidBetas()),
    "vp_shifted_to_noise": ZeroTerminal(Shifted(Cosine(), 3.0)),
}
every = pytest.mark.parametrize("schedule", ALL.values(), ids=ALL.keys())


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(1e-4, 0.02, 1000), (2e-3, 0.2, 100), (0.01, 0.01, 500)]
)
def test_vp_linear_is_the_chain(start: float, end: float, steps: int) -> None:
    _, bar = alpha_bars(start, end, steps)
    t = torch.arange(steps + 1) / steps
    alpha, sigma = VPLinear(start, end, steps)(t)
    near(alpha, bar.sqrt(), 1e-12)
    near(sigma, (1 - bar).sqrt(), 1e-11)  # the reference's cancellation: 1e-16 / 2 sigma
    assert alpha[0] == 1
    assert sigma[0] == 0


@pytest.mark.parametrize(("start", "end", "steps"), [(1e-4, 0.02, 1000), (2e-3, 0.2, 100)])
def test_vp_linear_between_the_steps(start: float, end: float, steps: int) -> None:
    """The continuation F of the sum satisfies F(u + 1) - F(u) = log(1 - beta(u + 1)), all u."""
    schedule = VPLinear(start, end, steps)
    u = torch.linspace(0, steps - 1, 1237)
    rise = schedule.log_alpha_bar((u + 1) / steps) - schedule.log_alpha_bar(u / steps)
    beta = start + (end - start) / (steps - 1) * u
    near(rise, torch.log1p(-beta), 1e-13)  # a few roundings of F, which is of size 10


@every
def test_derivatives(schedule: Schedule) -> None:
    t = torch.linspace(0.02, 0.98, 49)
    h = 1e-5  # central differences: h^2 and 1e-16 / h, relative to values up to 1e2

    def values(time: torch.Tensor) -> torch.Tensor:
        return torch.stack([*schedule(time), schedule.log_snr(time)])

    jacobian = torch.autograd.functional.jacobian(lambda v: values(v).sum(1), t)
    near(jacobian, (values(t + h) - values(t - h)) / (2 * h), 1e-6)
    levels = schedule.log_snr(t).requires_grad_()
    (slope,) = torch.autograd.grad(schedule.inverse(levels).sum(), levels)
    near(slope * jacobian[2], torch.ones(49), 1e-9)  # of inverse functions


@every
def test_inverse(schedule: Schedule) -> None:
    t = torch.cat([torch.logspace(-7, 0, 300), torch.linspace(0, 1, 101)])
    torch.testing.assert_close(schedule.inverse(schedule.log_snr(t)), t, rtol=1e-12, atol=0)
    assert schedule.inverse(torch.tensor(math.inf)) == 0


@every
def test_log_snr(schedule: Schedule) -> None:
    t = torch.cat([torch.zeros(1), torch.logspace(-6, -2, 30), torch.linspace(0.02, 1, 50)])
    log_snr = schedule.log_snr(t)
    assert log_snr[0] == math.inf
    assert (log_snr.diff() < 0).all()
    alpha, sigma = schedule(t)
    near(log_snr[1:-1], 2 * (alpha.log() - sigma.log())[1:-1], 1e-12)
    for i in (0, 17, 40, -1):
        level = schedule.level(t[i].item())
        near([level.alpha, level.sigma], [alpha[i], sigma[i]], 1e-15)
        near(level.log_snr, log_snr[i], 1e-14)


@pytest.mark.parametrize("name", [k for k in ALL if k.startswith(("vp", "cosine", "poly"))])
def test_variance_preserved(name: str) -> None:
    alpha, sigma = ALL[name](torch.linspace(0, 1, 1001))
    near(alpha**2 + sigma**2, torch.ones(1001), 2e-15)


def test_sigmoid_is_the_chain() -> None:
    """GeoDiff's betas, as its authors make them."""
    for start, end, steps in ((1e-7, 2e-3, 5000), (1e-4, 0.02, 1000)):
        beta = torch.sigmoid(torch.linspace(-6, 6, steps)) * (end - start) + start
        bar = torch.cat([torch.ones(1), torch.cumprod(1 - beta, 0)])
        schedule = SigmoidBetas(start, end, steps)
        alpha, sigma = schedule(torch.arange(steps + 1) / steps)
        near(alpha, bar.sqrt(), 1e-12)
        near(sigma, (1 - bar).sqrt(), 3e-11)  # the reference's cancellation: 1e-16 / 2 sigma
        u = torch.linspace(0, steps - 1, 1237)  # and between the steps
        rise = schedule.log_alpha_bar((u + 1) / steps) - schedule.log_alpha_bar(u / steps)
        x = -6 + 12 * u / (steps - 1)
        near(rise, torch.log1p(-start - (end - start) * torch.sigmoid(x)), 1e-13)


@pytest.mark.parametrize("steps", [7, 1000])
def test_sohl_dickstein_is_the_chain(steps: int) -> None:
    beta = 1 / (steps - torch.arange(1, steps + 1) + 1)
    bar = torch.cat([torch.ones(1), torch.cumprod(1 - beta, 0)])
    alpha, sigma = SohlDickstein()(torch.arange(steps + 1) / steps)
    near(alpha**2, bar, 1e-13)
    near(sigma**2, 1 - bar, 1e-13)
    assert (alpha[-1], sigma[0]) == (0, 0)
    assert SohlDickstein().log_snr(torch.ones(1)) == -math.inf


@pytest.mark.parametrize("d", [128, 32])
def test_shift_of_simple_diffusion(d: int) -> None:
    """Hoogeboom et al., 2023: alpha^2 = sigmoid(log snr + 2 log(64 / d))."""
    t = torch.linspace(0.01, 0.99, 50)
    shift = 2 * math.log(64 / d)
    alpha, sigma = Shifted(Cosine(), shift)(t)
    expected = torch.sigmoid(Cosine().log_snr(t) + shift)
    near(alpha**2, expected, 1e-14)
    near(sigma**2, 1 - expected, 1e-14)


def test_shift_of_a_flow_is_that_of_time() -> None:
    """Esser et al., 2024, eq. 23."""
    t, m = torch.linspace(0, 1, 50), 3.0
    alpha, sigma = Shifted(Flow(), -2 * math.log(m))(t)
    near(sigma, m * t / (1 + (m - 1) * t), 1e-15)
    near(alpha + sigma, torch.ones(50), 1e-15)
    near(Shifted(EDM(40.0), -2 * math.log(m))(t)[1], 120 * t, 1e-15)  # alpha stays 1
    near(Shifted(VE(), -2 * math.log(m))(t)[0], torch.ones(50), 0)


def test_zero_terminal_is_the_paper_s_rescaling() -> None:
    """Lin et al., 2023, algorithm 1, of the chain that begins with the data, k = 0."""
    _, bar = alpha_bars()
    root = bar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * first / (first - last)
    alpha, sigma = ZeroTerminal(VPLinear())(torch.arange(1001) / 1000)
    near(alpha, root, 1e-12)
    near(sigma, (1 - root**2).sqrt(), 1e-11)
    assert (alpha[-1], alpha[0], sigma[0]) == (0, 1, 0)
    assert ZeroTerminal(VPLinear()).log_snr(torch.ones(1)) == -math.inf
    # of a chain that ends without signal already, nothing changes
    t = torch.linspace(0, 1, 50)
    near(torch.stack(ZeroTerminal(SohlDickstein())(t)), torch.stack(SohlDickstein()(t)), 1e-15)


def test_cosine_formula() -> None:
    """Nichol & Dhariwal, eq. 17."""
    t = torch.linspace(0, 1, 201)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha, _ = Cosine(min_log_snr=-math.inf)(t)
    near(alpha**2, f / f[0], 1e-14)
    assert alpha[-1] == 0
    assert Cosine(min_log_snr=-math.inf).log_snr(t)[-1] == -math.inf


@pytest.mark.parametrize("end", [-4.0, -20.0, -30.0])
def test_cosine_ends_where_it_should(end: float) -> None:
    """A relative error 1e-16 of the last angle, pi/2 - e^(end/2), is 1e-16 e^(-end/2) there."""
    near(Cosine(min_log_snr=end).log_snr(torch.ones(1)), [end], 1e-15 * math.exp(-end / 2) + 1e-13)


def test_formulas_of_the_others() -> None:
    t = torch.linspace(0, 1, 41)
    alpha, sigma = VE(0.01, 50.0)(t)
    near(alpha, torch.ones(41), 0)
    near(sigma, 0.01 * torch.sqrt((50 / 0.01) ** (2 * t) - 1), 1e-12)
    near(torch.stack(EDM(80.0)(t)), torch.stack([torch.ones(41), 80 * t]), 1e-15)
    near(torch.stack(Flow()(t)), torch.stack([1 - t, t]), 0)
    alpha, sigma = Polynomial(2.0, 1e-5)(t)
    near(alpha**2, 1e-5 + (1 - 1e-5) * (1 - t**2) ** 2, 1e-14)


def test_parts() -> None:
    t = torch.tensor([0.1, 0.7, 0.9])
    parts = Parts((VPLinear(), Flow()))
    for i, schedule in enumerate(parts.schedules):
        for whole, alone in zip(parts(t), schedule(t), strict=True):
            assert torch.equal(whole[:, i], alone)
        assert torch.equal(parts.log_snr(t)[:, i], schedule.log_snr(t))
    with pytest.raises(ValueError, match="different times"):
        parts.inverse(parts.log_snr(t))


@every
def test_dtype_and_value(schedule: Schedule) -> None:
    t = torch.linspace(0.1, 0.9, 5)
    for low, high in zip(schedule(t.float()), schedule(t), strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=1e-6, atol=1e-6)  # of float32
    assert hash(schedule) == hash(type(schedule)(**vars(schedule)))
    with pytest.raises(FrozenInstanceError):
        schedule.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make",
    [
        lambda: VPLinear(0.0, 0.02),
        lambda: VPLinear(0.02, 1e-4),
        lambda: VPLinear(1e-4, 1.0),
        lambda: VPLinear(steps=1),
        lambda: VPLinear(1e-3, 0.2, 100),  # its continuation would start with alpha > 1
        lambda: Cosine(0.0),
        lambda: Cosine(min_log_snr=1.0),
        lambda: Polynomial(floor=0.0),
        lambda: Polynomial(power=-1.0),
        lambda: VE(0.0, 1.0),
        lambda: VE(2.0, 1.0),
        lambda: EDM(0.0),
        lambda: EDM(math.nan),
        lambda: SigmoidBetas(1e-3, 1e-4),
        lambda: SigmoidBetas(steps=3),
        lambda: Shifted(Flow(), math.inf),
        lambda: ZeroTerminal(EDM()),
        lambda: ZeroTerminal(Flow()),
    ],
)
def test_refuses_what_is_no_schedule(make: object) -> None:
    with pytest.raises(ValueError, match="needed"):
        make()  # type: ignore[operator]
