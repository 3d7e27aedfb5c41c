"""Checks of formulas against the papers, for the engine or for a mutant of it.

Each check takes the engine as a namespace of its modules and raises AssertionError. No network,
no Monte Carlo: all of them together take well below a second. The tolerances are a few hundred
roundings of float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from oracle_tools import exponential_moment, normal

MODULES = (
    "schedules", "denoiser", "multistep", "objective", "samplers", "singlestep", "spaces",
    "likelihood", "guidance", "adaptive", "ema", "editing", "pairs", "metrics", "modality",
    "noise",
)  # fmt: skip


def engine(package: str = "gendiff") -> SimpleNamespace:
    return SimpleNamespace(**{name: import_module(f"{package}.{name}") for name in MODULES})


def near(found: Any, expected: Any, tolerance: float = 1e-11) -> None:
    found, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (found, expected))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def alpha_bars(start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> tuple[Any, Any]:
    """beta_k and alpha-bar_k of DDPM, the index 0 being k = 0."""
    beta = torch.linspace(start, end, steps, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    return torch.cat([0 * one, beta]), torch.cat([one, torch.cumprod(1 - beta, 0)])


def chains(g: SimpleNamespace) -> None:
    """The betas of Ho et al., of GeoDiff and of Sohl-Dickstein et al., multiplied up."""
    k = torch.arange(1001, dtype=torch.float64)
    x = torch.linspace(-6, 6, 1000, dtype=torch.float64)
    for schedule, beta in (
        (g.schedules.VPLinear(), alpha_bars()[0][1:]),
        (g.schedules.SigmoidBetas(1e-4, 0.02, 1000), 1e-4 + 0.0199 * torch.sigmoid(x)),
        (g.schedules.SohlDickstein(), 1 / (1000 - k[1:] + 1)),
    ):
        bar = torch.cat([k[:1] + 1, torch.cumprod(1 - beta, 0)])
        alpha, _ = schedule(k / 1000)
        near(alpha**2, bar, 1e-12)
        near(schedule.log_snr(k[1:-1] / 1000), (bar / (1 - bar)).log()[1:-1], 1e-10)
        near(schedule.inverse(schedule.log_snr(k[1:] / 1000)), k[1:] / 1000, 1e-12)


def wrapped(g: SimpleNamespace) -> None:
    """Hoogeboom et al., 2023: the log-SNR moved; Lin et al., 2023, algorithm 1."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    for schedule in (g.schedules.VPLinear(), g.schedules.Flow(), g.schedules.EDM()):
        alpha, sigma = schedule(t)
        shifted = g.schedules.Shifted(schedule, -1.4)
        moved_alpha, moved_sigma = shifted(t)
        near(moved_sigma / moved_alpha, sigma / alpha * math.exp(0.7))
        near(shifted.log_snr(t), schedule.log_snr(t) - 1.4)
        near(shifted.inverse(shifted.log_snr(t)), t)
        name = {"VPLinear": 2, "Flow": 1}.get(type(schedule).__name__)
        kind = moved_alpha if name is None else moved_alpha**name + moved_sigma**name
        near(kind, torch.ones(99))
    root = alpha_bars()[1].sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    zero = g.schedules.ZeroTerminal(g.schedules.VPLinear())
    k = torch.arange(1001, dtype=torch.float64) / 1000
    near(zero(k)[0], root)
    near(zero(k)[1] ** 2, 1 - root**2)
    near(zero.log_snr(k[1:-1]), (root**2 / (1 - root**2)).log()[1:-1], 1e-10)
    near(zero.inverse(zero.log_snr(t)), t)


def ddpm_rows(g: SimpleNamespace) -> None:
    """Ho et al., 2020, eq. 7 at t = k/T."""
    beta, bar = alpha_bars()
    schedule = g.schedules.VPLinear()
    for k in (1000, 617, 50, 2):
        mean_x = bar[k - 1].sqrt() * beta[k] / (1 - bar[k])
        mean_x_t = (1 - beta[k]).sqrt() * (1 - bar[k - 1]) / (1 - bar[k])
        tilde = (1 - bar[k - 1]) / (1 - bar[k]) * beta[k]
        times = [k / 1000, (k - 1) / 1000]
        for variance, expected in (("small", tilde), ("large", beta[k])):
            (step,) = g.samplers.DDPM(variance).table(schedule, times)
            (stage,) = step.stages
            near(stage.a, mean_x_t)
            near(stage.b, mean_x[None])
            near(stage.c**2 / expected, 1.0, 1e-9)  # 1 - alpha_bar loses digits near the data
            assert stage.variance is None
        (step,) = g.samplers.DDPM("learned").table(schedule, times)
        near(step.stages[0].variance, torch.stack([tilde.log(), beta[k].log()]), 1e-9)
        assert step.stages[0].c == 0
        t, s = torch.tensor(times, dtype=torch.float64)[:, None]
        low, high, gain = g.singlestep.posterior(schedule, t, s)
        near(low, tilde.log()[None], 1e-9)
        near(high, beta[k].log()[None], 1e-9)
        near(gain, mean_x[None])
    (step,) = g.samplers.DDPM("large").table(schedule, [1 / 1000, 0.0])
    near([step.stages[0].a, *step.stages[0].b, step.stages[0].c], [0, 1, 0])


def ddim_rows(g: SimpleNamespace) -> None:
    """Song et al., 2021, eq. 12 and 16."""
    schedule = g.schedules.VPLinear()
    _, bar = alpha_bars()
    x_t, x_hat = 0.7, -0.4
    for k, j in ((1000, 900), (300, 120), (20, 1)):
        a_t, a_s = bar[k], bar[j]
        eps_hat = (x_t - a_t.sqrt() * x_hat) / (1 - a_t).sqrt()
        for eta in (0.0, 0.3, 1.0):
            tau = eta * ((1 - a_s) / (1 - a_t)).sqrt() * (1 - a_t / a_s).sqrt()
            (step,) = g.samplers.DDIM(eta).table(schedule, [k / 1000, j / 1000])
            (stage,) = step.stages
            mean = a_s.sqrt() * x_hat + (1 - a_s - tau**2).sqrt() * eps_hat
            near(stage.a * x_t + stage.b[0] * x_hat, mean)
            near(stage.c, tau)


def heun_rows(g: SimpleNamespace) -> None:
    """Karras et al., 2022, algorithm 2, lines 6 to 10, for y = x / alpha."""
    x, first, second = 1.3, 0.4, -0.2
    for schedule in (g.schedules.EDM(), g.schedules.VPLinear(), g.schedules.Flow()):
        for t, s in ((0.9, 0.5), (0.5, 0.1)):
            a_t, sigma_t, _ = schedule.level(t)
            a_s, sigma_s, _ = schedule.level(s)
            now, end, y = sigma_t / a_t, sigma_s / a_s, x / a_t
            slope = (y - first) / now
            trial = y + (end - now) * slope
            corrected = y + (end - now) * (slope / 2 + (trial - second) / end / 2)
            (euler,) = g.samplers.Euler().table(schedule, [t, s])[0].stages
            predict, correct = g.samplers.Heun().table(schedule, [t, s])[0].stages
            assert predict == euler
            assert correct.t == s
            near(predict.a * x + predict.b[0] * first, a_s * trial)
            near(correct.a * x + correct.b[0] * second + correct.b[1] * first, a_s * corrected)


def churn_rows(g: SimpleNamespace) -> None:
    """Karras et al., 2022, algorithm 2, lines 4 to 6."""
    schedule = g.schedules.EDM()
    times = [0.9, 0.5, 0.2, 0.05, 0.01]
    for churn in (0.4, 30.0):
        sampler = g.samplers.Heun(churn, churn_min=3.0, churn_max=50.0, churn_noise=1.003)
        table = sampler.table(schedule, times)
        for step, t in zip(table, times[:-1], strict=True):
            if not 3 <= 80 * t <= 50:
                assert step.renoise is None
                assert step.stages[0].t == t
                continue
            gamma = min(churn / 4, math.sqrt(2) - 1)
            hat = 80 * t * (1 + gamma)
            near(80 * step.stages[0].t, hat)
            scale, std = step.renoise
            near([scale, std], [1.0, 1.003 * math.sqrt(hat**2 - (80 * t) ** 2)])
            (plain, _) = g.samplers.Heun().table(schedule, [hat / 80, step.s])[0].stages
            near([step.stages[0].a, *step.stages[0].b], [plain.a, *plain.b])


def restart_rows(g: SimpleNamespace) -> None:
    """Xu et al., 2023: down, K times up by the forward process and down again, and on."""
    times = [1.0, 0.8, 0.5, 0.35, 0.2, 0.1, 0.0]
    for schedule in (g.schedules.EDM(), g.schedules.VPLinear(), g.schedules.Flow()):
        top, low = schedule.level(0.5), schedule.level(0.2)
        ends = [1.001 * low.sigma / low.alpha, 0.999 * low.sigma / low.alpha]
        for inner, plain in (("heun", g.samplers.Heun()), ("euler", g.samplers.Euler())):
            sampler = g.samplers.Restart(inner, 3, ends[1], 1.001 * top.sigma / top.alpha)
            steps = plain.table(schedule, times)
            table = sampler.table(schedule, times)
            assert [step.s for step in table] == [
                0.8, 0.5, 0.35, 0.2, *[0.35, 0.2] * 3, 0.1, 0.0
            ]  # fmt: skip
            assert [step.stages for step in table] == [
                step.stages for step in (*steps[:4], *steps[2:4] * 3, *steps[4:])
            ]
            for i, step in enumerate(table):
                if i in (4, 6, 8):
                    assert step.t == 0.2
                    scale, std = step.renoise
                    near(scale * low.alpha, top.alpha)
                    near((scale * low.sigma) ** 2 + std**2, top.sigma**2)
                else:
                    assert step.renoise is None
            narrow = g.samplers.Restart(inner, 3, ends[0], 1.001 * top.sigma / top.alpha)
            assert len(narrow.table(schedule, times)) == 6 + 3
            empty = g.samplers.Restart(inner, 3, 1e-9, 1e-8)
            assert empty.table(schedule, times) == steps


def langevin_rows(g: SimpleNamespace) -> None:
    """Song et al., 2021, algorithms 4 and 5, at eps = 2 r^2 sigma^2."""
    times, r, x, x_hat = [0.9, 0.6, 0.2, 0.0], 0.3, 0.7, -0.4
    for schedule in (g.schedules.EDM(), g.schedules.VPLinear(), g.schedules.Flow()):
        plain = g.samplers.DDPM().table(schedule, times)
        table = g.samplers.PredictorCorrector(r, 2).table(schedule, times)
        assert [table[i] for i in (0, 3, 6)] == plain
        assert len(table) == 7
        for i in (1, 2, 4, 5):
            step, (stage,) = table[i], table[i].stages
            alpha, sigma, _ = schedule.level(step.s)
            assert step.t == step.s == stage.t == plain[i // 3].s
            eps = 2 * r**2 * sigma**2
            score = (alpha * x_hat - x) / sigma**2
            near(stage.a * x + stage.b[0] * x_hat, x + eps * score)
            near(stage.c, math.sqrt(2 * eps))


def multistep_weights(g: SimpleNamespace) -> None:
    """The weights integrate every polynomial of degree below the number of nodes."""
    for start, end in ((0.0, 0.01), (-1.0, -0.3), (-4.0, 3.5), (-20.0, 40.0), (-5.0, 150.0)):
        h = end - start
        for nodes in (
            [start],
            [start, start - h / 3],
            [start, start - 2 * h],
            [end, start],
            [start, start - 0.4 * h, start - h],
            [end, start, start - h, start - 3 * h],
        ):
            weights = g.multistep.exponential_weights(nodes, start, end)
            for degree in range(len(nodes)):
                terms = [w * (n - end) ** degree for w, n in zip(weights, nodes, strict=True)]
                size = max(1.0, sum(abs(v) for v in terms))
                assert abs(sum(terms) - exponential_moment(h, degree)) < 1e-13 * size
    assert g.multistep.exponential_weights([-math.inf], -math.inf, 1.0) == [1.0]


def multistep_rows(g: SimpleNamespace) -> None:
    """Lu et al., 2022 (DPM-Solver++), algorithm 2; and a line through two estimates, exactly."""
    schedule, times = g.schedules.VPLinear(), [1.0, 0.8, 0.65, 0.2, 0.0]
    x, past, present = 0.3, -1.2, 0.8
    lam = [schedule.level(t).log_snr / 2 for t in times]
    for rule in ("midpoint", "exact"):
        table = g.samplers.DPMSolverPP2M(rule).table(schedule, times)
        assert [len(step.stages[0].b) for step in table] == [1, 2, 2, 1]
        for i in (1, 2):
            end, now = schedule.level(times[i + 1]), schedule.level(times[i])
            h, before = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
            if rule == "midpoint":
                r = before / h
                line = (1 + 1 / (2 * r)) * present - past / (2 * r)
                integral = line * -math.expm1(-h)
            else:
                rise = (present - past) / before  # x_hat(l) = present + rise (l - lam_t)
                integral = (present + rise * h) * exponential_moment(h, 0)
                integral += rise * exponential_moment(h, 1)
            (stage,) = table[i].stages
            expected = end.sigma / now.sigma * x + end.alpha * integral
            near(stage.a * x + stage.b[0] * present + stage.b[1] * past, expected)
        near([table[3].stages[0].a, *table[3].stages[0].b], [0, 1])


def solver_rows(g: SimpleNamespace) -> None:
    """2S as in Lu et al., 2022, algorithm 1; 3M on a parabola; SDE-2M on a constant."""
    schedule, times = g.schedules.VPLinear(), [1.0, 0.8, 0.65, 0.4, 0.3]
    lam = [schedule.level(t).log_snr / 2 for t in times]
    past, present = -1.2, 0.8
    for rule in ("midpoint", "exact"):
        for i, step in enumerate(g.samplers.DPMSolverPP2S(rule).table(schedule, times)):
            first, second = step.stages
            now, middle, end = (schedule.level(t) for t in times[2 * i : 2 * i + 3])
            one, two, three = lam[2 * i : 2 * i + 3]
            assert (step.t, first.t, second.t, step.s) == (
                *(times[2 * i : 2 * i + 2] * 2)[::2],
                times[2 * i + 1],
                times[2 * i + 2],
            )
            near(
                [first.a, *first.b],
                [middle.sigma / now.sigma, -middle.alpha * math.expm1(one - two)],
            )
            h, rise = three - one, (present - past) / (two - one)
            if rule == "midpoint":
                integral = (past + h / 2 * rise) * -math.expm1(-h)
            else:  # x_hat(l) = past + rise (l - lam_t)
                integral = (past + rise * h) * exponential_moment(h, 0)
                integral += rise * exponential_moment(h, 1)
            near(second.a, end.sigma / now.sigma)
            near(second.b[0] * present + second.b[1] * past, end.alpha * integral)
    sizes = {(1.0, 0.5, 0.0): [1, 1], (1.0, 0.5, 0.2, 0.0): [2, 1], (1.0, 0.5, 0.2): [2],
             (1.0, 0.7, 0.5, 0.2, 0.0): [1, 2, 1], (1.0, 0.7, 0.5, 0.2): [2, 1]}  # fmt: skip
    for grid, expected in sizes.items():
        table = g.samplers.DPMSolverPP2S().table(schedule, list(grid))
        assert [len(step.stages) for step in table] == expected
    for i, step in enumerate(g.samplers.DPMSolverPP3M().table(schedule, times)[2:], 2):
        (stage,) = step.stages
        for degree in range(3):
            found = sum(b * (lam[i - j] - lam[i + 1]) ** degree for j, b in enumerate(stage.b))
            expected = schedule.level(step.s).alpha * exponential_moment(
                lam[i + 1] - lam[i], degree
            )
            near(found, expected, 1e-13)
    for i, step in enumerate(g.samplers.DPMSolverPP3M("half").table(schedule, times)[2:], 2):
        # The authors' code: D1 and D2 of three estimates m, with phi_3 where Taylor's is 2 phi_3.
        m, (stage,), alpha = (0.8, -1.2, 0.5), step.stages, schedule.level(step.s).alpha
        h, r0, r1 = lam[i + 1] - lam[i], lam[i] - lam[i - 1], lam[i - 1] - lam[i - 2]
        r0, r1 = r0 / h, r1 / h
        one, two = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
        d1, d2 = one + r0 / (r0 + r1) * (one - two), (one - two) / (r0 + r1)
        published = -math.expm1(-h) * m[0] + (math.expm1(-h) / h + 1) * d1
        published -= ((math.expm1(-h) + h) / h**2 - 0.5) * d2
        near(sum(b * v for b, v in zip(stage.b, m, strict=True)), alpha * published)
    for rule, counts in {"exact": [1, 2, 3, 2, 1], "half": [1, 2, 3, 3, 1]}.items():
        table = g.samplers.DPMSolverPP3M(rule).table(schedule, [*times[:-1], 0.3, 0.0])
        assert [len(step.stages[0].b) for step in table] == counts
    for step in g.samplers.SDEDPMSolverPP2M(0.7).table(schedule, times):
        (stage,), now, end = step.stages, schedule.level(step.t), schedule.level(step.s)
        near(stage.a * now.alpha + sum(stage.b), end.alpha)
        near((stage.a * now.sigma) ** 2 + stage.c**2, end.sigma**2)


def noise_rows(g: SimpleNamespace) -> None:
    """Multistep methods on noise or velocity: exact for polynomials in rho, t, log(rho), tau."""
    times, x, x_hat = [1.0, 0.8, 0.65, 0.4, 0.3, 0.25, 0.0], 0.7, -0.4
    u = torch.linspace(0, 1, 4001, dtype=torch.float64)
    for schedule in (g.schedules.VPLinear(), g.schedules.EDM(), g.schedules.Cosine()):
        levels = [schedule.level(t) for t in times]
        rho = [level.sigma / level.alpha for level in levels]
        tau = [level.sigma / (level.alpha + level.sigma) for level in levels]
        tables = {
            name: sampler.table(schedule, times)
            for name, sampler in {
                "LMS": g.samplers.LMS(4),
                "DEIS": g.samplers.DEIS(3),
                "DEIS log": g.samplers.DEIS(3, "log_rho"),
                "VAB": g.samplers.VAB(3),
                "PNDM": g.samplers.PNDM(),
            }.items()
        }
        for i, (now, end) in enumerate(zip(levels, levels[1:], strict=False)):
            for name, table in tables.items():
                (stage,) = table[i].stages
                p, q = stage.keep
                eps, last = (x - now.alpha * x_hat) / now.sigma, end.alpha
                near(p * x + q * x_hat, eps - x_hat if name == "VAB" else eps)
                if name == "VAB":
                    last = end.alpha + end.sigma
                near(stage.a, last / (now.alpha + (now.sigma if name == "VAB" else 0)))
                assert len(stage.b) == min(i + 1, 4 if name in ("LMS", "PNDM") else 3)
            b = {name: [v / end.alpha for v in t[i].stages[0].b] for name, t in tables.items()}
            lms = b["DEIS log"] if end.sigma == 0 else []  # log(rho) is infinite
            for weights in (b["LMS"], lms):
                for k in range(len(weights)):
                    exact = (rho[i + 1] ** (k + 1) - rho[i] ** (k + 1)) / (k + 1)
                    near(sum(w * rho[i - j] ** k for j, w in enumerate(weights)), exact, 1e-10)
            t = times[i + 1] + (times[i] - times[i + 1]) * u**2  # rho may be a root of t near 0
            scale = (-schedule.log_snr(t) / 2).exp() * 2 * (times[i] - times[i + 1]) * u
            for k in range(len(b["DEIS"])):  # by parts, with Simpson's rule
                inner = k * t ** (k - 1) * scale if k else 0 * t
                inner = torch.where(u > 0, inner, 0.0)
                inner = inner[0] + inner[-1] + 4 * inner[1::2].sum() + 2 * inner[2:-1:2].sum()
                exact = times[i + 1] ** k * rho[i + 1] - times[i] ** k * rho[i]
                exact = exact + inner * u[1] / 3
                near(sum(w * times[i - j] ** k for j, w in enumerate(b["DEIS"])), exact, 1e-9)
            for k in range(0 if end.sigma == 0 else len(b["DEIS log"])):
                high, low = (
                    r * (1, math.log(r) - 1, math.log(r) ** 2 - 2 * math.log(r) + 2)[k]
                    for r in (rho[i + 1], rho[i])
                )
                found = sum(w * math.log(rho[i - j]) ** k for j, w in enumerate(b["DEIS log"]))
                near(found, high - low, 1e-10)
            velocity = [v / (end.alpha + end.sigma) for v in tables["VAB"][i].stages[0].b]
            for k in range(len(velocity)):
                exact = (tau[i + 1] ** (k + 1) - tau[i] ** (k + 1)) / (k + 1)
                near(sum(w * tau[i - j] ** k for j, w in enumerate(velocity)), exact, 1e-10)
            published = [[24], [36, -12], [46, -32, 10], [55, -59, 37, -9]][min(i, 3)]
            near([24 * v / (rho[i + 1] - rho[i]) for v in b["PNDM"]], published)


def unipc_rows(g: SimpleNamespace) -> None:
    """Zhao et al., 2023: a_m from the order conditions for D_m / r_m, m = 1 … p."""
    schedule, times = g.schedules.VPLinear(), [1.0, 0.8, 0.65, 0.4, 0.3, 0.2, 0.15, 0.0]
    levels = [schedule.level(t) for t in times]
    lam = [level.log_snr / 2 for level in levels]

    def published(i: int, others: list[int]) -> list[float]:
        """On the estimate at time i and those at ``others``, for the step from i to i + 1."""
        h = lam[i + 1] - lam[i]
        total = -math.expm1(-h)
        r = torch.tensor([(lam[j] - lam[i]) / h for j in others], dtype=torch.float64)
        u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000  # the midpoint rule
        moments = torch.stack(
            [((h * (u - 1)).exp() * u**k).mean() * h for k in range(1, len(r) + 1)]
        )
        matrix = torch.stack([r**k for k in range(len(r))])
        a = torch.linalg.solve(matrix, moments) if len(r) > 1 else torch.tensor([total / 2]).to(r)
        a = a if len(r) != 1 or others[0] != i + 1 else torch.tensor([total / 2]).to(r)
        return [total - (a / r).sum().item(), *(a / r).tolist()]

    for p in (2, 3):
        table = g.samplers.UniPC(p).table(schedule, times)
        counts = [1, 2, 3, 3, 3, 2, 1] if p == 3 else [1, 2, 2, 2, 2, 2, 1]
        assert [len(step.stages[0].b) for step in table] == counts
        for i, step in enumerate(table):
            (stage,) = step.stages
            if 0 < i < len(table) - 1:
                near(stage.a, levels[i + 1].sigma / levels[i].sigma)
                past = [i - m for m in range(1, counts[i])]
                near([b / levels[i + 1].alpha for b in stage.b], published(i, past), 1e-7)
                a, (newest, *others) = stage.correct
                near(a, levels[i].sigma / levels[i - 1].sigma)
                past = [i, *(i - 1 - m for m in range(1, counts[i - 1]))]
                found = [others[0], newest, *others[1:]]
                near([b / levels[i].alpha for b in found], published(i - 1, past), 1e-7)
            else:
                assert stage.correct is None


LEVELS = ((1.0, 0.01), (1.0, 7.0), (0.6, 0.8), (0.999, 0.045), (0.3, 0.7), (0.02, 0.98))


def targets(name: str, x: Any, eps: Any, alpha: float, sigma: float, std: float) -> Any:
    """What a network learns, as the papers write it, from x and eps."""
    x_t = alpha * x + sigma * eps
    if name == "edm":  # eq. 8: (y - c_skip (y + n)) / c_out with y + n = x_t / alpha
        scale = sigma / alpha
        c_skip = std**2 / (scale**2 + std**2)
        c_out = scale * std / math.sqrt(scale**2 + std**2)
        return (x - c_skip * x_t / alpha) / c_out
    phi = math.atan2(sigma, alpha)
    v = math.cos(phi) * eps - math.sin(phi) * x
    return {"eps": eps, "x": x, "v": v, "flow": eps - x}[name]


def predictions(g: SimpleNamespace) -> None:
    """Targets and the way back to x, for each prediction."""
    x, eps = normal(4, seed=1), normal(4, seed=2)
    for alpha, sigma in LEVELS:
        for std in (1.0, 0.5):
            x_t = alpha * x + sigma * eps
            for name, rule in g.denoiser.PREDICTIONS.items():
                target = targets(name, x, eps, alpha, sigma, std)
                p, q = rule(alpha, sigma, std)
                near(p * x + q * eps, target)
                s = g.denoiser.scalings(name, std, alpha, sigma)
                near(s.c_skip * x_t + s.c_out * target, x, 1e-10)
                near(s.c_in, 1 / math.sqrt(std**2 * alpha**2 + sigma**2))


def edm_table(g: SimpleNamespace) -> None:
    """Karras et al., 2022, table 1, for alpha = 1."""
    for std in (0.5, 1.0):
        for sigma in (0.002, 0.5, 3.0, 80.0):
            s = g.denoiser.scalings("edm", std, 1.0, sigma)
            near(s.c_skip, std**2 / (sigma**2 + std**2))
            near(s.c_out, sigma * std / math.sqrt(std**2 + sigma**2))
            near(s.c_in, 1 / math.sqrt(sigma**2 + std**2))
            near(g.denoiser.noise_number(-2 * math.log(sigma)), math.log(sigma) / 4)
            log_snr = torch.tensor([-2 * math.log(sigma)], dtype=torch.float64)
            near(g.denoiser.noise_number(log_snr), [math.log(sigma) / 4])


def weights(g: SimpleNamespace) -> None:
    """Each named weight gives the mean squared error of what it is named after."""
    x, eps, x_hat = normal(3, 6, seed=1), normal(3, 6, seed=2), normal(3, 6, seed=3)
    space, schedule, std = g.spaces.Dense((3, 6)), g.schedules.VPLinear(), 0.5
    t = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
    alpha, sigma = (value[:, None] for value in schedule(t))
    x_t = alpha * x + sigma * eps
    eps_hat = (x_t - alpha * x_hat) / sigma
    error, snr = (x_hat - x) ** 2, (alpha / sigma) ** 2
    later = t.clone().requires_grad_()
    (rate,) = torch.autograd.grad(schedule.log_snr(later).sum(), later)
    expected = {
        "eps": (eps_hat - eps) ** 2,
        "x": error,
        "v": ((alpha * eps_hat - sigma * x_hat) - (alpha * eps - sigma * x)) ** 2,
        "flow": ((eps_hat - x_hat) - (eps - x)) ** 2,
        "edm": ((sigma / alpha) ** 2 + std**2) / (sigma / alpha * std) ** 2 * error,
        "min_snr": snr.clamp(max=5) * error,
        "p2": (eps_hat - eps) ** 2 / (1 + snr),
        "vlb": -rate[:, None] / 2 * (eps_hat - eps) ** 2,
        "sigmoid": -rate[:, None] / 2 / (1 + snr * math.exp(-2)) * (eps_hat - eps) ** 2,
    }
    assert set(expected) == set(g.objective.WEIGHTS)

    for prediction in g.denoiser.PREDICTIONS:
        rows = [
            targets(prediction, x_hat[i], eps_hat[i], alpha[i].item(), sigma[i].item(), std)
            for i in range(3)
        ]
        output = torch.stack(rows)
        denoiser = g.denoiser.Denoiser(
            lambda x, noise, cond, space, output=output: output, schedule, prediction, std
        )
        for name, value in expected.items():
            loss = g.objective.Objective(g.objective.Uniform(), g.objective.WEIGHTS[name]()).at(
                denoiser, g.spaces.Batch(x, space), t, eps
            )
            near(loss.per_sample, value.mean(1), 1e-10)
            near(loss.mean, value.mean(), 1e-10)


def densities(g: SimpleNamespace) -> None:
    """Of the log-SNR, for times of each density: -d log snr / dt is 2 / t (1 - t) for a flow."""
    t, o = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64), g.objective
    flow, edm, log_odds = g.schedules.Flow(), g.schedules.EDM(), torch.logit(t)

    def law(x: Any, mean: float, std: float) -> Any:
        return torch.exp(-(((x - mean) / std) ** 2) / 2) / std / math.sqrt(2 * math.pi)

    near(o.Uniform().log_snr_density(t, flow).exp(), t * (1 - t) / 2)
    near(o.Uniform().log_snr_density(t, edm).exp(), t / 2)
    # log snr is -2 logit(t) for a flow, and log(sigma / alpha) is logit(t)
    expected = law(log_odds, 0.3, 1.4) / 2
    near(o.LogitNormal(0.3, 1.4).log_snr_density(t, flow).exp(), expected)
    near(o.LogNormal(0.3, 1.4).log_snr_density(t, flow).exp(), expected)
    u, scale = torch.tensor([0.2, 0.7, 1.0], dtype=torch.float64), 80 * t
    near(o.UniformFlowTime()(u, flow), u)
    share = 80 * o.UniformFlowTime()(u, edm)
    near(share / (1 + share), u * 80 / 81)
    near(o.UniformFlowTime().log_snr_density(t, flow).exp(), t * (1 - t) / 2)
    found = o.UniformFlowTime().log_snr_density(t, edm).exp()
    near(found, scale / (1 + scale) ** 2 / 2 / (80 / 81))
    parts = o.Uniform().log_snr_density(t, g.schedules.Parts((flow, edm)))
    expected = torch.stack([t * (1 - t) / 2, t / 2], 1)
    near(parts.exp(), expected)


def reflow(g: SimpleNamespace) -> None:
    """Liu et al., 2023, section 2.2: lines from sampling's start to x, and no loss on them."""
    space, z, x = g.spaces.Dense((3, 2)), normal(3, 2, seed=1), normal(3, 2, seed=2)
    for schedule in (g.schedules.Flow(), g.schedules.EDM(), g.schedules.VPLinear()):
        eps = g.pairs.coupled(z, x, space, schedule)
        start = schedule.level(1.0)
        near(start.alpha * x + start.sigma * eps, start.sigma * z)
        seen = []

        def network(x_t: Any, noise: Any, cond: Any, space: Any, seen: Any = seen) -> Any:
            seen.append((x_t, noise))
            return x

        denoiser = g.denoiser.Denoiser(network, schedule, "x")
        objective = g.objective.Objective(
            g.objective.UniformFlowTime(), g.objective.FlowMatching()
        )
        batch = g.spaces.Batch(x, space, None, eps)
        loss = objective(denoiser, batch, None, seed=1, step=2)  # asks for no other noise
        near(loss.per_sample, torch.zeros(3))
        ((x_t, noise),) = seen
        share = torch.sigmoid(4 * noise)[:, None]  # sigma / (alpha + sigma), in a step of DDIM
        line = (1 - share) * x + share * eps
        near(x_t * (share**2 + (1 - share) ** 2).sqrt(), line)


def resampler(g: SimpleNamespace) -> None:
    """Nichol & Dhariwal, 2021, eq. 18: lists of losses, and p summed up bin by bin."""
    times, schedule, K = g.objective.LossSecondMoment(bins=3), g.schedules.Flow(), 3
    history, lists = times.start(), [[], [], []]  # type: ignore[var-annotated]
    p = [1 / 3] * 3
    for step in range(30):
        u = (torch.arange(8, dtype=torch.float64) + 0.3 + 0.02 * step) / 8
        t, weight = times.draw(u, schedule, history)
        for i in range(8):
            k = next(k for k in range(K) if u[i] <= sum(p[: k + 1]) or k == K - 1)
            near(t[i], (k + (u[i] - sum(p[:k])) / p[k]) / K)
            near(weight[i], 1 / (K * p[k]))
        if step == 20:
            assert max(p) > 2 * min(p)
        loss = (1 + 0.1 * step) * t**2 * (1.5 + torch.sin(50 * t))
        history = times.record(history, t, loss)
        for time, value in zip(t.tolist(), loss.tolist(), strict=True):
            lists[math.ceil(K * time) - 1].append(value)
        if all(len(values) >= 10 for values in lists):
            root = [math.sqrt(sum(v * v for v in values[-10:]) / 10) for values in lists]
            p = [0.999 * r / sum(root) + 0.001 / K for r in root]
    chain = g.objective.LossSecondMoment(steps=100, bins=100)  # a bin for each of its times
    t = torch.arange(1, 101, dtype=torch.float64) / 100
    near(chain.record(chain.start(), t, t)[:, -1], t**2)


def variance_bound(g: SimpleNamespace) -> None:
    """Nichol & Dhariwal, 2021, eq. 15 and 4: KL between two normals, in bits/dim, times T."""
    beta, bar = alpha_bars()
    x, eps, x_hat = normal(4, 3, 2, seed=1), normal(4, 3, 2, seed=2), normal(4, 3, 2, seed=3)
    v = normal(4, 3, 2, seed=4) / 2
    t = torch.tensor([1, 2, 400, 1000], dtype=torch.float64) / 1000
    denoiser = g.denoiser.Denoiser(
        lambda *_: torch.cat([x_hat, v], 1), g.schedules.VPLinear(), "x", 1.0
    )
    batch = g.spaces.Batch(x, g.spaces.Dense((4, 3, 2)))
    args = (g.objective.Uniform(1000), g.objective.X())
    with_bound = g.objective.Objective(*args, vlb_weight=1.0).at(denoiser, batch, t, eps)
    without = g.objective.Objective(*args, vlb_weight=0.0).at(denoiser, batch, t, eps)
    bound = with_bound.per_sample - without.per_sample
    near(bound[0], 0.0)
    for i, k in ((1, 2), (2, 400), (3, 1000)):
        tilde = (1 - bar[k - 1]) / (1 - bar[k]) * beta[k]
        gain = bar[k - 1].sqrt() * beta[k] / (1 - bar[k])
        share = (v[i] + 1) / 2
        log_variance = share * beta[k].log() + (1 - share) * tilde.log()
        q = torch.distributions.Normal(gain * x[i], tilde.sqrt())
        p = torch.distributions.Normal(gain * x_hat[i], (log_variance / 2).exp())
        kl = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
        near(bound[i], 1000 * kl, 1e-8)  # of numbers of size 1e3, by cumprod


def own_distance(g: SimpleNamespace) -> None:
    """A modality's distance is that of the denoiser's x_hat, added at its weight."""
    n = torch.tensor([2, 3])
    space = g.spaces.Ragged(n, 5, 2)
    code = g.spaces.Categories(2, 3, 0.5)
    x, eps = (space.project(normal(5, 5, seed=s)) for s in (1, 2))
    code.of(x).copy_(0.5 * torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1]])
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    batch, schedule = g.spaces.Batch(x, space), g.schedules.Flow()
    x_t = space.expand(schedule(t)[0]) * x + space.expand(schedule(t)[1]) * eps

    def distance(x_hat: Any, batch: Any) -> Any:
        return space.mean((x_hat - 2 * batch.x).abs())

    for prediction in g.denoiser.PREDICTIONS:
        denoiser = g.denoiser.Denoiser(
            lambda x, *_: torch.sin(3 * x) + 1, schedule, prediction, 0.7, categories=(code,)
        )
        parts = (g.objective.Uniform(), g.objective.X())
        plain = g.objective.Objective(*parts).at(denoiser, batch, t, eps)
        both = g.objective.Objective(*parts, distance=distance, distance_weight=0.3)
        found = both.at(denoiser, batch, t, eps).per_sample - plain.per_sample
        near(found, 0.3 * distance(denoiser.bind(space)(x_t, t), batch))


def bound_denoiser(g: SimpleNamespace) -> None:
    """A network that puts out the target exactly: x_hat is x, and c_in makes the input."""
    x, eps = normal(3, 4, seed=1), normal(3, 4, seed=2)
    for schedule in (g.schedules.VPLinear(), g.schedules.EDM()):
        alpha, sigma, _ = schedule.level(0.3)
        x_t, std, seen = alpha * x + sigma * eps, 0.5, []
        for name in g.denoiser.PREDICTIONS:
            target = targets(name, x, eps, alpha, sigma, std)

            def net(x_in: Any, *_: Any, target: Any = target, seen: list[Any] = seen) -> Any:
                seen.append(x_in)
                return target

            bound = g.denoiser.Denoiser(net, schedule, name, std).bind(g.spaces.Dense((3, 4)))
            for t in (0.3, torch.full((3,), 0.3, dtype=torch.float64)):
                near(bound(x_t, t), x, 1e-10)
                near(seen[-1], x_t / math.sqrt(std**2 * alpha**2 + sigma**2))


def guidance(g: SimpleNamespace) -> None:
    """Ho & Salimans, 2022, eq. 6; Lin et al., 2023, eq. 15-16; Sadat et al., 2024, algorithm 1."""
    space, w, phi, eta, r = g.spaces.Dense((1, 7)), 3.5, 0.3, 0.25, 0.4 * math.sqrt(7)
    plus, minus = normal(1, 7, seed=1), normal(1, 7, seed=2)
    cfg = (1 + (w - 1)) * plus - (w - 1) * minus
    make = g.guidance.Guidance
    near(make(w).combine(plus, minus, space), cfg)
    rescaled = cfg * plus.std() / cfg.std()
    near(make(w, rescale=phi).combine(plus, minus, space), phi * rescaled + (1 - phi) * cfg)
    diff = plus - minus
    diff = diff * min(1, r / diff.norm().item())
    along = (diff * plus).sum() / (plus * plus).sum() * plus
    apg = plus + (w - 1) * (diff - along + eta * along)
    bounded = make(w, parallel=eta, threshold=r / math.sqrt(7))
    near(bounded.combine(plus, minus, space), apg)
    schedule, edges = g.schedules.EDM(10.0), make(w, (2.0, 5.0))
    found = [edges.inside(schedule, t) for t in (0.51, 0.49, 0.21, 0.19)]
    assert found == [False, True, True, False]
    assert [edges.calls(schedule, t) for t in (0.9, 0.3)] == [1, 2]
    t = torch.tensor([0.51, 0.49, 0.21, 0.19])
    assert edges.inside(schedule, t).tolist() == found


def clips(g: SimpleNamespace) -> None:
    """Saharia et al., 2022, section 2.3, a sample at a time with torch's quantile."""
    x = 2 * normal(9, 4, seed=1)
    masked = torch.cat([x[:2].T[None], torch.zeros(1, 4, 1).double()], 2)  # a frame of padding
    spaces = g.spaces
    for space, value, samples in (
        (spaces.Dense((9, 4)), x, list(x)),
        (spaces.Masked(torch.tensor([2]), 4, 3), masked, [x[:2]]),
        (spaces.Ragged(torch.tensor([2, 7]), 4), x, [x[:2], x[2:]]),
    ):
        for q in (0.0, 0.3, 0.9, 1.0):
            expected = torch.stack([v.abs().flatten().quantile(q) for v in samples])
            near(space.quantile(value.abs(), q), expected)
        static = g.guidance.StaticClip(0.7)(value, space)
        near(static, torch.minimum(torch.maximum(value, -0.7 + 0 * value), 0.7 + 0 * value))
        s = torch.stack([v.abs().flatten().quantile(0.9) for v in samples])
        s = space.expand(torch.maximum(s, 0.7 + 0 * s))
        dynamic = torch.minimum(torch.maximum(value, -s), s) / s * 0.7
        near(g.guidance.DynamicClip(0.9, 0.7)(value, space), dynamic)
        near(g.guidance.DynamicClip(0.9, 9.0)(value, space), value)


def adaptive(g: SimpleNamespace) -> None:
    """Ralston's step and the midpoint rule for one number, and how a step is chosen."""
    space, tolerance = g.spaces.Dense((1, 1)), 1e-3
    for schedule, x0, times in (
        (g.schedules.EDM(5.0), 0.1, [0.9, 0.5, 0.2]),
        (g.schedules.VPLinear(), 1.3, [0.9, 0.6, 0.5, 0.0]),
        (g.schedules.Flow(), 0.7, [1.0, 0.3, 0.0]),
    ):
        levels = [schedule.level(t) for t in times]
        stops = [level.sigma / (level.alpha + level.sigma) for level in levels]
        x = torch.full((1, 1), x0, dtype=torch.float64)

        def denoise(x: Any, t: Any) -> Any:
            return torch.sin(2 * x) + torch.as_tensor(t, dtype=torch.float64)

        def v(tau: float, z: float, schedule: Any = schedule, denoise: Any = denoise) -> float:
            log_snr = math.inf if tau == 1 else 2 * math.log(tau / (1 - tau))
            t = schedule.inverse(torch.tensor(-log_snr, dtype=torch.float64))
            alpha, sigma = (value.item() for value in schedule(t))
            x_hat = denoise(torch.tensor((alpha + sigma) * z, dtype=torch.float64), t.item())
            return (z - x_hat.item()) / tau

        z, tau, calls, told = x0 / (levels[0].alpha + levels[0].sigma), stops[0], 0, []
        h, fresh = -tau / 10, True
        while tau > stops[-1]:
            h = max(h, stops[-1] - tau)
            if fresh:
                k1 = v(tau, z)
            k2 = v(tau + h / 2, z + h / 2 * k1)
            k3 = v(tau + 3 * h / 4, z + 3 * h / 4 * k2)
            calls += 2 + fresh
            third = z + h * (2 * k1 + 3 * k2 + 4 * k3) / 9
            size = abs(third - (z + h * k2)) / (tolerance * (1 + abs(z)))
            fresh = size <= 1
            if fresh:
                parabola = np.poly1d(np.polyfit([0, 1 / 2, 3 / 4], [k1, k2, k3], 2))
                end = stops[-1] if h == stops[-1] - tau else tau + h
                for stop in stops[len(told) + 1 :]:
                    if stop >= end:
                        c = (stop - tau) / (end - tau)
                        here = z + (end - tau) * np.polyint(parabola)(c)
                        told.append((here, here - stop * parabola(c)))
                z, tau = third, end
            h *= min(max(0.9 * max(size, 1e-9) ** (-1 / 3), 0.2), 5.0)
        sampler, asked = g.samplers.Adaptive(tolerance, 500), []
        try:
            found = list(g.samplers.states(denoise, space, schedule, sampler, times, None, x))
        except Exception as error:
            raise AssertionError("it does not arrive") from error
        for state, level, (here, x_hat) in zip(found, levels[1:], told, strict=True):
            asked += state.asked
            scale = level.alpha + level.sigma
            near(state.x, torch.full((1, 1), scale * here, dtype=torch.float64), 1e-10)
            near(state.x_hat, torch.full((1, 1), x_hat, dtype=torch.float64), 1e-9)
        near(state.x, torch.full((1, 1), scale * z, dtype=torch.float64), 1e-10)
        assert len(asked) == calls


def driver(g: SimpleNamespace) -> None:
    """The published loops, written out for a state x = alpha y and any denoiser."""
    space, times = g.spaces.Dense((2, 3)), [0.9, 0.6, 0.4, 0.25, 0.1]

    class Fixed:  # a different tensor for each draw
        def normal(self, rows: Any, width: Any, draw: int) -> Any:
            return normal(len(rows), *width, seed=draw)

    for schedule in (g.schedules.VPLinear(), g.schedules.Flow()):
        levels = [schedule.level(t) for t in times]
        first = normal(2, 3, seed=100)

        def denoise(x: Any, t: float) -> Any:
            return torch.sin(2 * x) + t

        def run(sampler: Any, schedule: Any = schedule, first: Any = first) -> Any:
            return g.samplers.sample(denoise, space, schedule, sampler, times, Fixed(), first)

        x, past, before = first, None, 0.0
        for i, (t, now, end) in enumerate(zip(times, levels, levels[1:], strict=False)):
            h = (end.log_snr - now.log_snr) / 2
            x_hat = denoise(x, t)
            line = x_hat if i == 0 else x_hat + h / (2 * before) * (x_hat - past)
            x = end.sigma / now.sigma * x - end.alpha * math.expm1(-h) * line
            past, before = x_hat, h
        near(run(g.samplers.DPMSolverPP2M("midpoint")), x)

        states_, estimates = [first], []
        predictor = g.samplers.DPMSolverPP2M("midpoint").table(schedule, times)
        corrector = g.samplers.UniPC().table(schedule, times)
        x = first
        for i, t in enumerate(times[:-1]):
            estimates.append(denoise(x, t))
            if i:
                a, b = corrector[i].stages[0].correct
                terms = zip(b, reversed(estimates), strict=False)
                states_.append(a * states_[-1] + sum(w * e for w, e in terms))
            (stage,) = predictor[i].stages
            terms = zip(stage.b, reversed(estimates), strict=False)
            x = stage.a * states_[-1] + sum(w * e for w, e in terms)
        near(run(g.samplers.UniPC()), x)

        y, noises = first / levels[0].alpha, []
        for i, (t, now, end) in enumerate(zip(times, levels, levels[1:], strict=False)):
            noises.append((y - denoise(now.alpha * y, t)) / (now.sigma / now.alpha))
            mean = noises[-1] if i == 0 else (3 * noises[-1] - noises[-2]) / 2
            if i == 2:
                mean = (23 * noises[-1] - 16 * noises[-2] + 5 * noises[-3]) / 12
            if i == 3:
                mean = (55 * noises[3] - 59 * noises[2] + 37 * noises[1] - 9 * noises[0]) / 24
            y = y + (end.sigma / end.alpha - now.sigma / now.alpha) * mean
        near(run(g.samplers.PNDM()), levels[-1].alpha * y)

        y, gamma = first / levels[0].alpha, 0.2
        for i, (t, s, now, end) in enumerate(
            zip(times, times[1:], levels, levels[1:], strict=False)
        ):
            old = now.sigma / now.alpha
            hat, last = old * (1 + gamma), end.sigma / end.alpha
            start = schedule.inverse(torch.tensor(-2 * math.log(hat), dtype=torch.float64)).item()
            if start > 1:  # the level does not leave the schedule
                start, level = 1.0, schedule.level(1.0)
                hat = level.sigma / level.alpha
            if not math.isinf(hat):
                y = y + math.sqrt(hat**2 - old**2) * normal(2, 3, seed=2 * i + 2)
            slope = (y - denoise(schedule.level(start).alpha * y, start)) / hat
            trial = y + (last - hat) * slope
            slope = (slope + (trial - denoise(end.alpha * trial, s)) / last) / 2
            y = y + (last - hat) * slope
        near(run(g.samplers.Heun(churn=4 * gamma)), levels[-1].alpha * y)


class Source(Protocol):
    """What gives noise: :class:`gendiff.noise.NoiseSource` of the engine or of a mutant."""

    def normal(self, rows: Any, width: Any, draw: int) -> Any: ...


class Draws:
    """A different tensor for each draw."""

    def normal(self, rows: Any, width: Any, draw: int) -> Any:
        return normal(sum(rows), *width, seed=draw)


def bound_terms(g: SimpleNamespace) -> None:
    """Ho et al., 2020, eq. 5: the divergences of torch's normals, for an arbitrary denoiser."""
    normal_law, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    space = g.spaces.Dense((2, 3))
    x, times = normal(2, 3, seed=9), [1.0, 0.7, 0.3, 0.05, 0.0]

    def denoise(x_t: Any, t: float) -> Any:
        return torch.sin(2 * x_t) + t

    for schedule in (g.schedules.VPLinear(), g.schedules.EDM(3.0)):
        for variance in ("small", "large"):
            bound = g.likelihood.variational_bound(
                denoise, g.spaces.Batch(x, space), schedule, times, Draws(), variance
            )
            levels = [schedule.level(t) for t in times]
            prior = normal_law(0.0, levels[0].sigma)
            near(bound.prior, kl(normal_law(levels[0].alpha * x, levels[0].sigma), prior).sum(1))
            for i, (now, end) in enumerate(zip(levels[:-2], levels[1:-1], strict=True)):
                x_t = now.alpha * x + now.sigma * normal(2, 3, seed=i)
                beta = now.sigma**2 - (now.alpha / end.alpha * end.sigma) ** 2
                kept = now.alpha * end.sigma**2 / end.alpha / now.sigma**2 * x_t
                gain = end.alpha * beta / now.sigma**2
                std = math.sqrt(beta) * end.sigma / now.sigma
                q = normal_law(kept + gain * x, std)
                p = normal_law(
                    kept + gain * denoise(x_t, times[i]),
                    std if variance == "small" else math.sqrt(beta),
                )
                near(bound.steps[i], kl(q, p).sum(1), 1e-9)
            last = levels[-2]
            x_hat = denoise(last.alpha * x + last.sigma * normal(2, 3, seed=3), times[-2])
            decoder = normal_law(x_hat, last.sigma / last.alpha).log_prob(x).sum(1)
            near(bound.decoder, -decoder)


def bins(g: SimpleNamespace) -> None:
    """Ho et al., 2020, eq. 13: the bins' probabilities are those of torch's normal."""
    values = torch.linspace(-1, 1, 17, dtype=torch.float64)[:, None]
    space = g.spaces.Dense((17, 1))
    for x_hat, std in ((0.13, 0.2), (0.9, 0.01), (-1.4, 0.7)):
        law = torch.distributions.Normal(torch.tensor(x_hat, dtype=torch.float64), std)
        edges = torch.linspace(-15 / 16, 15 / 16, 16, dtype=torch.float64)
        inner = law.cdf(edges)
        expected = torch.diff(torch.cat([0 * inner[:1], inner, 0 * inner[:1] + 1]))
        nats = g.likelihood._decoder(
            space,
            values,
            torch.full_like(values, x_hat),
            torch.full_like(values, std),
            g.likelihood.Bins(1 / 8),
        )
        assert nats.isfinite().all()
        near((-nats).exp(), expected)


def trace(g: SimpleNamespace) -> None:
    """Of P diag(w) P, P written out."""
    space, w = g.spaces.Ragged(torch.tensor([3]), 2, 1), normal(3, 2, seed=1)
    basis = torch.eye(6, dtype=torch.float64).reshape(6, 3, 2)
    p = torch.stack([space.project(row).flatten() for row in basis])
    near(space.trace(w), torch.trace(p @ torch.diag(w.flatten()) @ p)[None])


def ode(g: SimpleNamespace) -> None:
    """A Gaussian's density in a subspace, by what its flow makes of the prior at the end."""
    n, v, centred = torch.tensor([2, 1]), 0.3, 1
    space = g.spaces.Ragged(n, 2, centred)
    x, dof = space.project(normal(3, 2, seed=1)), 2 * n - centred
    square = torch.stack([x[:2].square().sum(), x[2:].square().sum()])
    for schedule in (g.schedules.Flow(), g.schedules.EDM(3.0)):

        def denoise(x_t: Any, t: float, schedule: Any = schedule) -> Any:
            alpha, sigma, _ = schedule.level(t)
            return space.project(alpha * v / (alpha**2 * v + sigma**2) * x_t)

        found = g.likelihood.ode_log_likelihood(
            denoise, g.spaces.Batch(x, space), schedule, steps=14, sigma_min=0.2
        )
        alpha, sigma, _ = schedule.level(1.0)
        variance = (v + 0.2**2) * sigma**2 / (alpha**2 * v + sigma**2)
        exact = -(square / variance + dof * math.log(2 * math.pi * variance)) / 2
        near(found, exact, 2e-3)  # Runge-Kutta's own error


def power_average(e: SimpleNamespace) -> None:
    """Published width of gamma = 6.94, quadrature of profiles, and the weights of the average."""
    near(e.ema.gamma_of(0.10), 6.94, 2e-3)  # EDM2, section 3.2: widths 0.05 and 0.10
    near(e.ema.gamma_of(0.05), 16.97, 2e-3)
    tau = (torch.arange(20_000, dtype=torch.float64) + 0.5) * 3 / 20_000
    product = 3 * tau**2 / 3**3 * 7.5 * tau**6.5 / 5**7.5
    near(e.ema.inner(3.0, 2.0, 5.0, 6.5), product.sum() * 3 / 20_000, 1e-6)
    near(e.ema.inner(5.0, 6.5, 3.0, 2.0), product.sum() * 3 / 20_000, 1e-6)
    near(e.ema.mixture([(4.0, 2.0), (5.0, 6.5)], 5.0, 6.5), [0.0, 1.0], 1e-9)
    net = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    average, n = e.ema.PowerEMA(net, 0.10), 8
    for k in range(1, n + 1):  # the weight of step k is the profile's integral over (k - 1, k]
        net.weight.data.fill_(k**2)
        average.update(k)
    power = average.gamma + 1
    parts = [k**2 * ((k / n) ** power - ((k - 1) / n) ** power) for k in range(1, n + 1)]
    near(average.module.weight, [[sum(parts)]], 1e-12)


def translation(g: SimpleNamespace) -> None:
    """FlowEdit's eq. 11 in y = x_t / alpha: dx'/dk = the difference of the fields at x' + k z and
    x + k z, k = sigma / alpha, each field being (y - x_hat) / k."""
    space, k = g.spaces.Dense((2, 3)), 0.7
    x, z, edited = (normal(2, 3, seed=i) for i in (1, 2, 3))
    for schedule in (g.schedules.VPLinear(), g.schedules.EDM()):
        t = g.editing.time_of_noise(schedule, k)
        alpha, sigma, _ = schedule.level(t)
        near(sigma / alpha, k, 1e-6)

        def wanted(y: Any) -> Any:
            return torch.tanh(2 * y)

        def own(y: Any) -> Any:
            return torch.sin(y) - 0.3

        model = g.editing.Translated(
            lambda x_t, t, a=alpha: wanted(x_t / a),
            lambda x_t, t, a=alpha: own(x_t / a),
            space, schedule, x, z,
        )  # fmt: skip
        y, y_own = edited + k * z, x + k * z
        slope = (y - wanted(y)) / k - (y_own - own(y_own)) / k
        near((y - model(alpha * y, t)) / k - z, slope, 1e-6)


def compared(e: SimpleNamespace) -> None:
    """Two sets: Heusel et al., eq. 6, in the plane; Kynkäänniemi et al.; Naeem et al."""
    m = e.metrics
    a = torch.tensor([[0.0, 0], [2, 1], [1, 3], [4, 4]], dtype=torch.float64)
    b = torch.tensor([[1.0, 1], [0, 5], [3, 0]], dtype=torch.float64)
    s, t = a.T.cov(), b.T.cov()  # tr (S T)^(1/2) of 2 x 2 matrices, by Cayley and Hamilton
    cross = ((s @ t).trace() + 2 * (s.det() * t.det()).sqrt()).sqrt()
    square = (a.mean(0) - b.mean(0)).square().sum()
    near(m.frechet_distance(a, b), square + s.trace() + t.trace() - 2 * cross)
    real = torch.tensor([0.0, 1, 2, 3, 5])[:, None]  # radii for k = 1: 1 1 1 1 2; k = 2: 2 1 1 2 3
    fake = torch.tensor([-1.0, 1.5, 9, 11])[:, None]  # k = 1: 2.5 2.5 2 2
    near(m.precision_recall(real, fake, 1), [0.5, 1 - 1 / 5])
    near(m.density_coverage(real, fake, 1), [3 / 4, 3 / 5])
    near(m.density_coverage(real, fake, 2), [5 / 8, 4 / 5])
    near(m.nearest_distance(fake, real), [1, 0.5, 4, 6])
    train = torch.arange(100.0)[:, None]
    held_out = train[:40] + torch.linspace(0.1, 0.4, 40)[:, None]
    fake = torch.tensor([3.0, 3.11, 3.4, 3.3, 20.05, 20.2, 20.4, 20.3])[:, None]
    measures = m.Reals(held_out, train, "", 0).measures(fake)
    found = {one.name: one.value for one in measures}
    near([found[k] for k in ("precision", "recall")], m.precision_recall(held_out, fake), 1e-6)
    near([found[k] for k in ("density", "coverage")], m.density_coverage(held_out, fake), 1e-6)
    near(found["frechet_distance"], m.frechet_distance(held_out, fake))
    near(found["pairwise_distance"], torch.pdist(fake).mean(), 1e-6)
    near(found["training_copies"], 3 / 8)  # 0.05 quantile: 0.115
    near(measures[-1].error, math.sqrt(3 * 5 / 8**3))

    def said(**values: float) -> list[str]:
        plain = dict.fromkeys(m.BETTER, 1.0) | {"training_copies": 0.05} | values
        every = [
            e.modality.Measure(k, v, "", 0.05 if k == "training_copies" else 1.0, "", 0.01)
            for k, v in plain.items()
        ]
        return [verdict.name for verdict in m.verdicts(every, 100)]

    for values, names in (
        ({}, []),
        ({"density": 0.47, "precision": 0.72, "coverage": 0.1}, ["untrained"]),
        ({"density": 0.47, "precision": 0.74}, []),
        ({"density": 0.49, "precision": 0.5}, []),
        ({"pairwise_distance": 0.47}, ["collapsed"]),
        ({"pairwise_distance": 0.49}, []),
        ({"coverage": 0.47}, ["collapsed"]),
        ({"recall": 0.47}, ["collapsed"]),
        ({"coverage": 0.49}, []),
        ({"training_copies": 0.28}, ["memorised"]),
        ({"training_copies": 0.26}, []),
    ):
        assert said(**values) == names, values


def parts_of_a_batch(g: SimpleNamespace) -> None:
    """A step's loss, times, noise and hidden conditions are those of its parts, in order."""
    spaces, objective = g.spaces, g.objective.Objective(g.objective.Uniform(), g.objective.V())
    objective = replace(objective, cond_dropout=0.5)
    x, hidden = normal(8, 3, seed=1), []

    def net(x: Any, noise: Any, cond: Any, space: Any) -> Any:
        hidden.append(cond.dropped)
        return torch.sin(x) + cond.dropped[:, None]

    denoiser = g.denoiser.Denoiser(net, g.schedules.VPLinear(), "v")

    def losses(first: int, count: int, slot: int, slots: int) -> Any:
        cond = spaces.Cond({"label": torch.zeros(count)})
        batch = spaces.Batch(x[first : first + count], spaces.Dense((count, 3)), cond)
        noise = g.noise.StepNoise(4, first, dtype=torch.float64)
        return objective(denoiser, batch, noise, seed=2, step=7, slot=slot, slots=slots)

    whole = losses(0, 8, 0, 1)
    for slots in (2, 4, 8):
        size = 8 // slots
        parts = [losses(slot * size, size, slot, slots) for slot in range(slots)]
        near(torch.cat([part.per_sample for part in parts]), whole.per_sample)
        near(torch.cat([part.t for part in parts]), whole.t)
        assert torch.equal(torch.cat(hidden[1:]), hidden[0])
        del hidden[1:]


CHECKS: tuple[Callable[[SimpleNamespace], None], ...] = (
    chains,
    power_average,
    wrapped,
    ddpm_rows,
    ddim_rows,
    heun_rows,
    churn_rows,
    restart_rows,
    langevin_rows,
    multistep_weights,
    multistep_rows,
    solver_rows,
    noise_rows,
    unipc_rows,
    predictions,
    edm_table,
    bound_denoiser,
    driver,
    guidance,
    clips,
    adaptive,
    weights,
    densities,
    reflow,
    resampler,
    variance_bound,
    own_distance,
    bound_terms,
    bins,
    trace,
    ode,
    translation,
    compared,
    parts_of_a_batch,
)
