"""How far samplers land from the exact trajectory, at equal network calls: ours and the peers'.

The networks are exact: two mixtures of Gaussians, in 2 and in 64 dimensions. Every method starts
from the same states, stands at the same noise scales sigma / alpha of the same schedule (the
linear one of Ho et al.) and ends at the same one. A figure is the root mean square distance from
a reference of 2000 steps of order 3. A method takes the most steps whose calls stay within the
budget; calls are counted where the network is called. Stochastic samplers have no trajectory.

Two grids: ``time``, uniform in t into the data (diffusers' "trailing"), and ``inner``, that of
Karras et al. from the same start to sigma / alpha = 0.05 and no further, where a last step of
another kind is asked of no method. azula's methods cannot end at 0, nor can diffusers' DEIS: on
``time`` they end at their own 0.001 and 0.01. diffusers' DDIM and PNDM know ``time`` only.

A name is a method, not what a peer calls it: diffusers and k-diffusion's 3M takes half of the
parabola's curvature ("dpm++3m half"), diffusers' DEIS polynomials in log(rho). Where a peer
departs from a method, at its end or by times of its own, ours is measured again with the same
departure. Samplers that choose their steps have a table of their own: calls and error by the
tolerance.

``--slopes`` prints the order at which each sampler of ours converges instead, under five schedules
with five predictions: minus the slope of log error over log steps, for 60 and 120 steps
between sigma / alpha = 8 and 0.15, on a grid of Karras's form.

    python benchmarks/sampler_accuracy.py --out accuracy.json
    python benchmarks/sampler_accuracy.py --out accuracy.json --only gendiff  # the rest as it was
    python benchmarks/sampler_accuracy.py --slopes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ROOT, peers_python

BUDGETS = (5, 8, 10, 20, 50)
GRIDS = ("time", "inner")
PEERS = ("diffusers", "k-diffusion", "azula")
LAST, AZULA_LAST, DEIS_LAST, K_DIFFUSION_LAST = 0.05, 1e-3, 1e-2, 1e-3
# Ours with a departure of a peer's on a grid: the peer, its method, the grid and what that is.
DEPARTURES = {
    f"{name} to 0.001": ("azula", name, "time", "ends at 0.001")
    for name in ("ddim", "euler", "heun", "dpm++2m", "dpm++3m", "lms 4", "vab 2")
} | {
    "deis 3 log_rho to 0.01": (
        "diffusers",
        "deis 3 log_rho",
        "time",
        "ends at 0.01, of fewer than 15 steps by orders 2 and 1",
    ),
    "dpm++2s halves": ("k-diffusion", "dpm++2s", "time", "calls between the grid's times"),
    "heun, Euler last": ("diffusers", "heun", "inner", "takes Euler's step last on every grid"),
}
# (y, sigma) -> the estimate of the data, for y = x / alpha
Denoise = Callable[[Any, Any], Any]
# (denoise, y, sigmas) -> the last y
Method = Callable[[Denoise, Any, Any], Any]


class Network:
    """The exact denoiser of a mixture; counts its calls."""

    def __init__(self, means: Any, stds: Any, weights: Any) -> None:
        self.means, self.stds, self.weights, self.calls = means, stds, weights, 0

    def __call__(self, y: Any, sigma: Any) -> Any:
        """E[x | y], for y = x + sigma z of shape (B, D), in the dtype of y; sigma 1 or (B,)."""
        import torch

        self.calls += 1
        kind, y = y.dtype, y.double()
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1, 1)
        variance = self.stds**2 + sigma**2
        offset = y[:, None] - self.means
        log_p = -offset.square().sum(-1) / (2 * variance)
        log_p = log_p - y.shape[1] / 2 * variance.log() + self.weights.log()
        posterior_means = self.means + (self.stds**2 / variance)[..., None] * offset
        return (log_p.softmax(1)[..., None] * posterior_means).sum(1).to(kind)


def laws() -> dict[str, tuple[Any, Any, Any]]:
    """Means (K, D), standard deviations (K,) and weights (K,)."""
    import torch

    result = {}
    for dimension, count in ((2, 5), (64, 8)):
        generator = torch.Generator().manual_seed(dimension)
        means = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
        stds = torch.linspace(0.2, 0.4, count, dtype=torch.float64)
        result[f"{dimension}-D"] = (means, stds, stds / stds.sum())
    return result


# --- the sides -----------------------------------------------------------------------------------


def our_samplers() -> dict[str, Any]:
    """Every deterministic sampler."""
    from gendiff import samplers as s

    return {
        "ddim": s.DDIM(),
        "euler": s.Euler(),
        "heun": s.Heun(),
        "dpm++2s": s.DPMSolverPP2S(),
        "dpm++2m": s.DPMSolverPP2M(),
        "dpm++2m midpoint": s.DPMSolverPP2M("midpoint"),
        "dpm++3m": s.DPMSolverPP3M(),
        "dpm++3m half": s.DPMSolverPP3M("half"),
        "unipc 2": s.UniPC(2),
        "unipc 3": s.UniPC(3),
        "lms 4": s.LMS(4),
        "deis 3": s.DEIS(3),
        "deis 3 log_rho": s.DEIS(3, "log_rho"),
        "vab 2": s.VAB(2),
        "vab 3": s.VAB(3),
        "pndm": s.PNDM(),
    }


def gendiff_methods() -> dict[str, Method]:
    """Every deterministic sampler."""
    import torch

    from gendiff.noise import Streams
    from gendiff.samplers import DEIS, DPMSolverPP2S, sample
    from gendiff.schedules import VPLinear
    from gendiff.spaces import Dense

    schedule = VPLinear()

    def method(sampler: Any) -> Method:
        def run(denoise: Denoise, y: Any, sigmas: Any) -> Any:
            times = schedule.inverse(-2 * sigmas.log()).tolist()
            times[0] = min(times[0], 1.0)
            space, noise = Dense(tuple(y.shape)), Streams(0, tuple(range(len(y))))

            def estimate(x: Any, t: float) -> Any:
                alpha, sigma, _ = schedule.level(t)
                return denoise(x / alpha, sigma / alpha)

            x = schedule.level(times[0]).alpha * y
            x = sample(estimate, space, schedule, sampler, times, noise, x)
            return x / schedule.level(times[-1]).alpha

        return run

    class Falling(DEIS):
        def table(self, schedule: Any, times: list[float]) -> Any:
            first, second, third = (
                DEIS(order, self.variable).table(schedule, times) for order in (1, 2, 3)
            )
            return third if len(third) >= 15 else [*third[:-2], second[-2], first[-1]]

    methods = {name: method(sampler) for name, sampler in our_samplers().items()}
    heun, euler, falling = methods["heun"], methods["euler"], method(Falling(3, "log_rho"))
    midpoint = method(DPMSolverPP2S("midpoint"))

    def euler_last(denoise: Denoise, y: Any, sigmas: Any) -> Any:
        return euler(denoise, heun(denoise, y, sigmas[:-1]), sigmas[-2:])

    def halves(denoise: Denoise, y: Any, sigmas: Any) -> Any:
        between = (sigmas[:-2] * sigmas[1:-1]).sqrt()
        pairs = torch.stack([sigmas[:-2], between], 1).flatten()
        return midpoint(denoise, y, torch.cat([pairs, sigmas[-2:]]))

    def above_zero(run: Method, last: float) -> Method:
        return lambda denoise, y, sigmas: run(denoise, y, sigmas.clamp(min=last))

    for name, (peer, theirs, _, _) in DEPARTURES.items():
        if peer == "azula":
            methods[name] = above_zero(methods[theirs], AZULA_LAST)
    own = {"heun, Euler last": euler_last, "dpm++2s halves": halves}
    return methods | own | {"deis 3 log_rho to 0.01": above_zero(falling, DEIS_LAST)}


def gendiff_adaptive(denoise: Denoise, y: Any, first: Any, tolerance: float) -> tuple[Any, Any]:
    """The end from noise scale ``first`` to the data, and each sample's calls."""
    from gendiff.noise import Streams
    from gendiff.samplers import Adaptive, states
    from gendiff.schedules import VPLinear
    from gendiff.spaces import Dense

    schedule = VPLinear()

    def estimate(x: Any, t: Any) -> Any:
        alpha, sigma = schedule(t)
        return denoise(x / alpha[:, None], sigma / alpha)

    start = schedule.level(1.0)
    assert abs(start.sigma / start.alpha - first.item()) < 1e-9 * first.item()
    space, noise = Dense(tuple(y.shape)), Streams(0, tuple(range(len(y))))
    walk = states(
        estimate, space, schedule, Adaptive(tolerance), [1.0, 0.0], noise, start.alpha * y
    )
    (end,) = walk
    return end.x, sum(~t.isnan() for t in end.asked)


def diffusers_methods() -> dict[str, Method]:
    """Its schedulers, told to stand at the given noise scales; in float32, as they compute."""
    import diffusers
    import torch

    diffusers.logging.set_verbosity_error()

    def method(name: str, vp: bool, order: int | None = None, **options: Any) -> Method:
        extra = {} if order is None else {"order": order}
        heun = name.startswith("Heun")
        # What they do at the end is for a last step into the data, which "inner" has not.
        pure: dict[str, Any] = {"lower_order_final": False}
        deis = name.startswith("DEIS")
        if not deis:
            pure["final_sigmas_type"] = "sigma_min"

        def run(denoise: Denoise, y: Any, sigmas: Any) -> Any:
            scheduler = getattr(diffusers, name)(
                beta_start=1e-4,
                beta_end=0.02,
                beta_schedule="linear",
                prediction_type="epsilon",
                **options,
                **(pure if vp and sigmas[-1] > 0 else {}),
            )
            scheduler.set_timesteps(len(sigmas) - 1)
            inner = sigmas[1:-1].repeat_interleave(2) if heun else sigmas[1:-1]
            last = sigmas[-1:].clamp(min=DEIS_LAST) if deis else sigmas[-1:]
            at = torch.cat([sigmas[:1], inner, last]).float()
            scheduler.sigmas = at
            scheduler.set_begin_index(0)

            def scale(i: int) -> Any:
                return (1 + at[i] ** 2).rsqrt() if vp else 1.0

            x = y.float() * scale(0)
            for i, t in enumerate(scheduler.timesteps):
                scheduler.scale_model_input(x, t)
                now = x / scale(i)
                eps = (now - denoise(now, at[i])) / at[i]
                x = scheduler.step(eps, t, x, return_dict=False, **extra)[0]
            return x / scale(-1)

        return run

    def chain(name: str, **options: Any) -> Method:
        """Methods that know the chain's indices only: their own "trailing" times."""

        def run(denoise: Denoise, y: Any, sigmas: Any) -> Any:
            scheduler = getattr(diffusers, name)(
                beta_start=1e-4,
                beta_end=0.02,
                beta_schedule="linear",
                timestep_spacing="trailing",
                set_alpha_to_one=True,
                **options,
            )
            scheduler.set_timesteps(len(sigmas) - 1)
            bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)
            scheduler.alphas_cumprod = bar
            x = y * bar[-1].sqrt()
            for t in scheduler.timesteps:
                alpha, sigma = bar[t].sqrt(), (1 - bar[t]).sqrt()
                eps = (x - alpha * denoise(x / alpha, sigma / alpha)) / sigma
                x = scheduler.step(eps, t, x, return_dict=False)[0]
            return x

        run.chain = True  # type: ignore[attr-defined]
        return run

    multistep = "DPMSolverMultistepScheduler"
    return {
        "ddim": chain("DDIMScheduler", clip_sample=False),
        "euler": method("EulerDiscreteScheduler", False),
        "heun": method("HeunDiscreteScheduler", False),
        "dpm++2s": method("DPMSolverSinglestepScheduler", True, solver_order=2),
        "dpm++2m": method(multistep, True, solver_type="heun"),
        "dpm++2m midpoint": method(multistep, True),
        "dpm++3m half": method(multistep, True, solver_order=3),
        "unipc 2": method("UniPCMultistepScheduler", True),
        "unipc 3": method("UniPCMultistepScheduler", True, solver_order=3),
        "lms 4": method("LMSDiscreteScheduler", False, order=4),
        "deis 3 log_rho": method("DEISMultistepScheduler", True, solver_order=3),
        "pndm": chain("PNDMScheduler", skip_prk_steps=True),
    }


def k_diffusion_sampling() -> Any:
    """Its module of samplers; the package's own import would ask for what these do not need."""
    import importlib.util
    import types

    spec = importlib.util.find_spec("k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["k_diffusion"] = package
    from k_diffusion import sampling

    return sampling


def k_diffusion_methods() -> dict[str, Method]:
    """Its functions."""
    import torch

    s = k_diffusion_sampling()

    def method(function: Any, **options: Any) -> Method:
        def run(denoise: Denoise, y: Any, sigmas: Any) -> Any:
            return function(lambda x, at: denoise(x, at[0]), y, sigmas, disable=True, **options)

        return run

    def silent(*_: Any) -> Any:
        return torch.zeros(())

    return {
        "euler": method(s.sample_euler),
        "heun": method(s.sample_heun),
        "dpm++2s": method(s.sample_dpmpp_2s_ancestral, eta=0.0, noise_sampler=silent),
        "dpm++2m midpoint": method(s.sample_dpmpp_2m),
        "dpm++3m half": method(s.sample_dpmpp_3m_sde, eta=0.0, noise_sampler=silent),
        "lms 4": method(s.sample_lms),
    }


def k_diffusion_adaptive(
    denoise: Denoise, y: Any, first: Any, tolerance: float
) -> tuple[Any, Any]:
    """Its DPM-Solver-23, to 0.001; one step for all samples, by the error of all."""
    import torch
    from k_diffusion.sampling import sample_dpm_adaptive

    options = {"rtol": tolerance, "atol": tolerance, "disable": True, "return_info": True}
    x, info = sample_dpm_adaptive(
        lambda x, at: denoise(x, at), y, K_DIFFUSION_LAST, first.item(), **options
    )
    return x, torch.full((len(y),), info["nfe"])


def azula_methods() -> dict[str, Method]:
    """Its samplers, under a schedule whose time is an index into the noise scales."""
    import torch
    from azula import sample as s
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import Schedule

    class At(Schedule):
        def __init__(self, sigmas: Any) -> None:
            self.sigmas = sigmas

        def __call__(self, t: Any) -> tuple[Any, Any]:
            return torch.ones_like(t), self.sigmas[t.round().long()]

    class Exact(Denoiser):
        def __init__(self, denoise: Denoise, sigmas: Any) -> None:
            super().__init__()
            self.denoise, self.schedule = denoise, At(sigmas)

        def forward(self, x_t: Any, t: Any, **_: Any) -> Any:
            return DiracPosterior(self.denoise(x_t, self.schedule(t)[1]))

    def method(cls: Any, **options: Any) -> Method:
        def run(denoise: Denoise, y: Any, sigmas: Any) -> Any:
            sigmas, n = sigmas.clamp(min=AZULA_LAST), len(sigmas) - 1
            numbers = {"start": 0, "stop": n, "steps": n, "dtype": torch.float64}
            return cls(Exact(denoise, sigmas), silent=True, **numbers, **options)(y)

        return run

    return {
        "ddim": method(s.DDIMSampler),
        "euler": method(s.EulerSampler),
        "heun": method(s.HeunSampler),
        "dpm++2m": method(s.xEABSampler, order=2),
        "dpm++3m": method(s.xEABSampler, order=3),
        "lms 4": method(s.zABSampler, order=4),
        "vab 2": method(s.vABSampler, order=2),
    }


# Samplers that choose their own steps, at each tolerance
ADAPTIVE = {"gendiff": gendiff_adaptive, "k-diffusion": k_diffusion_adaptive}
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4)

METHODS: dict[str, Callable[[], dict[str, Method]]] = {
    "gendiff": gendiff_methods,
    "diffusers": diffusers_methods,
    "k-diffusion": k_diffusion_methods,
    "azula": azula_methods,
}


def worker(side: str, path: Path) -> None:
    """Runs a side's methods on the task at ``path``; writes {law: {grid: {method: [...]}}}."""
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    task = torch.load(path / "task.pt")
    methods = METHODS[side]()
    result: dict[str, Any] = {}
    for law, parts in task["laws"].items():
        network = Network(*parts)
        start, ends = task["starts"][law], task["ends"][law]
        for grid in GRIDS:
            for name, method in methods.items():
                if grid == "inner" and hasattr(method, "chain"):
                    continue
                if name in DEPARTURES and DEPARTURES[name][2] != grid:
                    continue
                cells = [
                    _cell(method, network, start, ends[grid], task["sigmas"][grid], budget)
                    for budget in BUDGETS
                ]
                result.setdefault(law, {}).setdefault(grid, {})[name] = cells
        if side in ADAPTIVE:
            for tolerance in TOLERANCES:
                first, network.calls = task["sigmas"]["time"][2][0], 0
                found, calls = ADAPTIVE[side](network, start.clone(), first, tolerance)
                errors = (found.double() - ends["time"]).square()
                row = {"tolerance": tolerance, "error": errors.mean().sqrt().item()}
                row |= {"calls": calls.double().mean().item(), "batch": network.calls}
                result[law].setdefault("adaptive", []).append(row)
    (path / f"{side}.json").write_text(json.dumps(result))


def _cell(
    method: Method, network: Network, start: Any, end: Any, sigmas: Any, budget: int
) -> dict[str, Any]:
    """The error with the most steps that stay within the budget."""
    for steps in sorted({budget, budget - 1, (budget + 1) // 2, budget // 2}, reverse=True):
        network.calls = 0
        found = method(network, start.clone(), sigmas[steps])
        if network.calls <= budget:
            error = (found.double() - end).square().mean().sqrt().item()
            return {"error": error, "calls": network.calls, "steps": steps}
    raise SystemExit(f"{budget} calls are too few for a method")


# --- the comparison ------------------------------------------------------------------------------


def make_task(count: int) -> dict[str, Any]:
    """Laws, starting states y, noise scales by grid and steps, and where the trajectories end."""
    import torch

    from gendiff.grids import Karras, LogSNR, UniformTime
    from gendiff.noise import Streams
    from gendiff.samplers import DPMSolverPP3M, sample
    from gendiff.schedules import VPLinear
    from gendiff.spaces import Dense
    from gendiff.tables import noise_scale
    from gendiff.testing import Mixture

    schedule = VPLinear()

    def scales(times: list[float]) -> Any:
        at = [noise_scale(schedule.level(t)) if t else 0.0 for t in times]
        return torch.tensor(at, dtype=torch.float64)

    steps = range(2, max(BUDGETS) + 1)
    inner = Karras(sigma_min=LAST)
    sigmas = {
        "time": {n: scales(UniformTime().times(schedule, n)) for n in steps},
        "inner": {n: scales(inner.times(schedule, n + 1)[:-1]) for n in steps},
    }
    starts, ends, doubt = {}, {}, 0.0
    for law, parts in laws().items():
        shape = (count, parts[0].shape[1])
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        first = schedule.level(1.0)
        starts[law] = first.sigma / first.alpha * z
        exact = Mixture(schedule, *parts)
        network = Network(*parts)
        level = schedule.level(0.3)
        gap = exact(level.alpha * z, 0.3) - network(z, level.sigma / level.alpha)
        assert gap.abs().max() < 1e-10, "the sides' network is not the oracle"

        def follow(
            n: int, low: float, into_data: bool, x: Any = first.sigma * z, law: Any = exact
        ) -> Any:
            times = LogSNR(sigma_min=low).times(schedule, n)
            times = times if into_data else times[:-1]
            space, noise = Dense(tuple(x.shape)), Streams(0, tuple(range(count)))
            x = sample(law, space, schedule, DPMSolverPP3M(), times, noise, x)
            return x / schedule.level(times[-1]).alpha

        ends[law] = {"time": follow(2000, 1e-4, True), "inner": follow(2000, LAST, False)}
        half = follow(1000, 1e-4, True)
        doubt = max(doubt, (half - ends[law]["time"]).square().mean().sqrt().item())
    return {
        "laws": laws(),
        "starts": starts,
        "sigmas": sigmas,
        "ends": ends,
        "reference_doubt": doubt,
    }


def compare(count: int, known: dict[str, Any]) -> dict[str, Any]:
    """All sides but those known, each in its environment, on one task."""
    import torch

    task = make_task(count)
    wanted = [side for side in METHODS if side not in known]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(task, folder / "task.pt")
        for side in wanted:
            python = sys.executable if side == "gendiff" else peers_python()
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            if side == "gendiff":
                environment["PYTHONPATH"] = str(ROOT)
            command = [python, __file__, "--worker", side, "--folder", str(folder)]
            subprocess.run(command, env=environment, check=True)
        found = {side: json.loads((folder / f"{side}.json").read_text()) for side in wanted}
    results = {side: found.get(side) or known[side] for side in METHODS}
    return {"samples": count, "reference_doubt": task["reference_doubt"], "sides": results}


def table(found: dict[str, Any], grid: str) -> str:
    """Errors in 2-D / 64-D; ``*`` where fewer calls were made than the column says."""
    head = " | ".join(f"{budget} calls" for budget in BUDGETS)
    lines = [f"| method | of | {head} |", "|---|---|" + "---|" * len(BUDGETS)]
    sides = found["sides"]
    first, second = laws()
    names = dict.fromkeys(name for side in sides.values() for name in side[first][grid])
    for name in names:
        for side, result in sides.items():
            if name not in result[first][grid]:
                continue
            cells = [
                f"{a['error']:.3g} / {b['error']:.3g}" + ("*" if a["calls"] < budget else "")
                for a, b, budget in zip(
                    result[first][grid][name], result[second][grid][name], BUDGETS, strict=True
                )
            ]
            lines.append(f"| {name} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def adaptive_table(found: dict[str, Any]) -> str:
    """Of samplers that choose their steps: calls a sample (and of the batch), and error."""
    heads = [f"{side}: {what}" for side in ADAPTIVE for what in ("calls", "error")]
    lines = [f"| tolerance | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for i, tolerance in enumerate(TOLERANCES):
        cells = []
        for side in ADAPTIVE:
            rows = [found["sides"][side][law]["adaptive"][i] for law in laws()]
            cells.append(" / ".join(f"{row['calls']:.0f} ({row['batch']})" for row in rows))
            cells.append(" / ".join(f"{row['error']:.3g}" for row in rows))
        lines.append(f"| {tolerance:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(found: dict[str, Any], grid: str) -> str:
    """For each method that a peer has too: at how many of the cells ours is as accurate, or 2 %.

    The worst ratio is our error over the peer's.
    """
    lines = ["| method | peer | as accurate or better | worst ratio | best ratio |"]
    lines.append("|---|---|---|---|---|")
    for name in found["sides"]["gendiff"]["2-D"][grid]:
        for peer in PEERS:
            if name not in found["sides"][peer]["2-D"][grid]:
                continue
            lines.append(_verdict(found, grid, peer, name, name))
            for same, departure in DEPARTURES.items():
                if departure[:3] == (peer, name, grid):
                    lines.append(_verdict(found, grid, peer, name, same))
    return "\n".join(lines)


def _verdict(found: dict[str, Any], grid: str, peer: str, theirs: str, ours: str) -> str:
    sides = found["sides"]
    ratios = [
        one["error"] / other["error"]
        for law in sides[peer]
        for one, other in zip(
            sides["gendiff"][law][grid][ours], sides[peer][law][grid][theirs], strict=True
        )
    ]
    fine = sum(ratio <= 1.02 for ratio in ratios)
    return f"| {ours} | {peer} | {fine} of {len(ratios)} | {max(ratios):.3g} | {min(ratios):.3g} |"


# --- orders --------------------------------------------------------------------------------------


def slopes() -> list[dict[str, Any]]:
    """The measured order of every sampler under every schedule with every prediction."""
    import torch

    from gendiff.denoiser import PREDICTIONS, Denoiser
    from gendiff.noise import Streams
    from gendiff.samplers import UniPC, sample
    from gendiff.schedules import EDM, Cosine, Flow, Polynomial, VPLinear
    from gendiff.spaces import Dense
    from gendiff.testing import ExactNetwork, Mixture, slope

    torch.set_default_dtype(torch.float64)
    means = torch.tensor([[1.0, 0.5], [-0.8, 0.2], [0.1, -1.1]])
    parts = means, torch.tensor([0.5, 0.6, 0.7]), torch.tensor([0.5, 0.2, 0.3])
    y = 8 * torch.randn(16, 2, generator=torch.Generator().manual_seed(3))
    space, noise, counts = Dense((16, 2)), Streams(0, tuple(range(16))), (60, 120)

    def grid(schedule: Any, n: int) -> list[float]:
        scales = torch.linspace(8 ** (1 / 3), 0.15 ** (1 / 3), n + 1) ** 3
        return schedule.inverse(-2 * scales.log()).tolist()

    def follow(denoiser: Any, schedule: Any, sampler: Any, times: list[float]) -> Any:
        x = schedule.level(times[0]).alpha * y
        x = sample(denoiser, space, schedule, sampler, times, noise, x)
        return x / schedule.level(times[-1]).alpha

    flow = Flow()
    end = follow(Mixture(flow, *parts), flow, UniPC(3), grid(flow, 2000))
    rows = []
    for schedule in (VPLinear(), Cosine(), Polynomial(), EDM(), flow):
        for prediction in PREDICTIONS:
            net = ExactNetwork(prediction, schedule, Mixture(schedule, *parts), 1.0)
            denoiser = Denoiser(net, schedule, prediction).bind(space)
            for name, sampler in our_samplers().items():
                errors = []
                for n in counts:
                    times = grid(schedule, n)
                    # The first steps, of order 1 and 2, leave h^2 and h^3 once: made shorter.
                    gap = (times[1] - times[0]) / n
                    times[1:1] = [times[0] + k * gap for k in range(1, sampler.order - 1)]
                    error = follow(denoiser, schedule, sampler, times) - end
                    errors.append(error.square().mean().sqrt().item())
                    net.inputs.clear()
                row = {"sampler": name, "declared": sampler.order, "errors": errors}
                row |= {"schedule": type(schedule).__name__, "prediction": prediction}
                rows.append({**row, "slope": slope(errors, counts)})
    return rows


def slope_table(rows: list[dict[str, Any]]) -> str:
    """A line for each sampler and schedule, a column for each prediction."""
    predictions = list(dict.fromkeys(row["prediction"] for row in rows))
    lines = [f"| sampler | declared | schedule | {' | '.join(predictions)} |"]
    lines.append("|---|---|---|" + "---|" * len(predictions))
    cells: dict[tuple[Any, ...], list[str]] = {}
    for row in sorted(rows, key=lambda row: list(our_samplers()).index(row["sampler"])):
        key = (row["sampler"], row["declared"], row["schedule"])
        cells.setdefault(key, []).append(f"{row['slope']:.2f}")
    for key, values in cells.items():
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="trajectories")
    parser.add_argument("--slopes", action="store_true", help="print orders of convergence")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--only", choices=METHODS, help="the other sides' figures are --out's")
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.folder)
    if args.slopes:
        rows = slopes()
        print(slope_table(rows))
        if args.out:
            args.out.write_text(json.dumps(rows, indent=2) + "\n")
        return None
    known: dict[str, Any] = {}
    if args.only:
        if args.out is None or not args.out.exists():
            raise SystemExit("--only takes the other sides' figures from --out, which is missing")
        before = json.loads(args.out.read_text())
        if before["samples"] != args.samples:
            raise SystemExit(f"{args.out} holds figures of --samples {before['samples']}")
        known = {side: v for side, v in before["sides"].items() if side != args.only}
    found = compare(args.samples, known)
    print(f"the reference differs from half its steps by {found['reference_doubt']:.1e}\n")
    for grid in GRIDS:
        print(f"grid: {grid}\n\n{table(found, grid)}\n\n{verdicts(found, grid)}\n")
    print(f"steps by their error\n\n{adaptive_table(found)}\n")
    if args.out:
        args.out.write_text(json.dumps(found, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
