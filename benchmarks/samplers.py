"""What samplers cost besides the network: ours against those that the peers have too.

Around a network that returns a tensor made beforehand, on one thread, a trajectory of ``--steps``
steps from its beginning (grid and table; ``set_timesteps``) to its end, in CPU-microseconds of a
step. Each side runs in a process of its own and they take turns. diffusers' schedulers are given
the noise that the network predicts, and so is ours beside them (with a ``Denoiser``);
k-diffusion's and azula's samplers are given the estimate of the data, and so is ours beside these.

    python benchmarks/samplers.py --out samplers.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ROOT, peers_python
from sampler_accuracy import our_samplers

SHAPES = {"1x2": (1, 2), "64x3x32x32": (64, 3, 32, 32)}
OURS = {"diffusers": "gendiff", "k-diffusion": "gendiff, estimate", "azula": "gendiff, estimate"}
Walk = Callable[[], Any]  # makes a whole trajectory


def gendiff_walks(shape: tuple[int, ...], steps: int, network: bool) -> dict[str, Walk]:
    """gendiff's driver, with a denoiser of a network or with the estimate itself."""
    import torch

    from gendiff.denoiser import Denoiser
    from gendiff.grids import Karras
    from gendiff.noise import Streams
    from gendiff.samplers import sample
    from gendiff.schedules import EDM
    from gendiff.spaces import Dense

    out, x = torch.randn(shape), torch.randn(shape)
    schedule, space, noise = EDM(), Dense(shape), Streams(0, tuple(range(shape[0])))
    whole = Denoiser(lambda x, noise, cond, space: out, schedule, "eps").bind(space)
    denoiser = whole if network else lambda x, t: out

    def walk(sampler: Any) -> Walk:
        def run() -> Any:
            times = Karras().times(schedule, steps)
            return sample(denoiser, space, schedule, sampler, times, noise, x)

        return run

    return {name: walk(sampler) for name, sampler in our_samplers().items()}


def diffusers_walks(shape: tuple[int, ...], steps: int) -> dict[str, Walk]:
    """Its schedulers with their defaults, as its pipelines call them."""
    import diffusers
    import torch

    out, start = torch.randn(shape), torch.randn(shape)

    def walk(name: str, order: int | None = None, **options: Any) -> Walk:
        scheduler = getattr(diffusers, name)(**options)
        extra = {} if order is None else {"order": order}

        def run() -> Any:
            scheduler.set_timesteps(steps)
            x = start
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(out, t, x, return_dict=False, **extra)[0]
            return x

        return run

    multistep = "DPMSolverMultistepScheduler"
    return {
        "ddim": walk("DDIMScheduler"),
        "euler": walk("EulerDiscreteScheduler"),
        "heun": walk("HeunDiscreteScheduler"),
        "dpm++2s": walk("DPMSolverSinglestepScheduler", solver_order=2),
        "dpm++2m": walk(multistep, solver_type="heun"),
        "dpm++2m midpoint": walk(multistep),
        "dpm++3m half": walk(multistep, solver_order=3),
        "unipc 2": walk("UniPCMultistepScheduler"),
        "unipc 3": walk("UniPCMultistepScheduler", solver_order=3),
        "lms 4": walk("LMSDiscreteScheduler", order=4),
        "deis 3 log_rho": walk("DEISMultistepScheduler", solver_order=3),
        "pndm": walk("PNDMScheduler", skip_prk_steps=True),
    }


def k_diffusion_walks(shape: tuple[int, ...], steps: int) -> dict[str, Walk]:
    """Its functions, on its own grid of Karras et al."""
    import torch
    from sampler_accuracy import k_diffusion_sampling

    s = k_diffusion_sampling()
    out, x = torch.randn(shape), torch.randn(shape)

    def walk(function: Any, **options: Any) -> Walk:
        def run() -> Any:
            sigmas = s.get_sigmas_karras(steps, 0.002, 80)
            return function(lambda x, sigma: out, x, sigmas, disable=True, **options)

        return run

    quiet = {"eta": 0.0, "noise_sampler": lambda *_: torch.zeros(())}
    return {
        "euler": walk(s.sample_euler),
        "heun": walk(s.sample_heun),
        "dpm++2s": walk(s.sample_dpmpp_2s_ancestral, **quiet),
        "dpm++2m midpoint": walk(s.sample_dpmpp_2m),
        "dpm++3m half": walk(s.sample_dpmpp_3m_sde, **quiet),
        "lms 4": walk(s.sample_lms),
    }


def azula_walks(shape: tuple[int, ...], steps: int) -> dict[str, Walk]:
    """Its samplers, under its VP schedule."""
    import torch
    from azula import sample as s
    from azula.denoise import Denoiser, DiracPosterior
    from azula.noise import VPSchedule

    out, x = torch.randn(shape), torch.randn(shape)

    class Known(Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VPSchedule()

        def forward(self, x_t: Any, t: Any, **_: Any) -> Any:
            return DiracPosterior(out)

    def walk(kind: Any, **options: Any) -> Walk:
        return lambda: kind(Known(), steps=steps, silent=True, **options)(x)

    return {
        "ddim": walk(s.DDIMSampler),
        "euler": walk(s.EulerSampler),
        "heun": walk(s.HeunSampler),
        "dpm++2m": walk(s.xEABSampler, order=2),
        "dpm++3m": walk(s.xEABSampler, order=3),
        "lms 4": walk(s.zABSampler, order=4),
        "vab 2": walk(s.vABSampler, order=2),
    }


SIDES: dict[str, Callable[[tuple[int, ...], int], dict[str, Walk]]] = {
    "gendiff": lambda shape, steps: gendiff_walks(shape, steps, True),
    "gendiff, estimate": lambda shape, steps: gendiff_walks(shape, steps, False),
    "diffusers": diffusers_walks,
    "k-diffusion": k_diffusion_walks,
    "azula": azula_walks,
}


def worker(args: argparse.Namespace) -> None:
    """Answers each line ``n`` on stdin with the cost of a step by method, over n trajectories."""
    import torch

    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not come between
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    # As a network's large tensors do: from now on malloc keeps what is freed, up to this size.
    large = torch.empty(28 << 20, dtype=torch.uint8)
    del large
    walks = SIDES[args.worker](SHAPES[args.shapes[0]], args.steps)
    for line in sys.stdin:
        count, costs = int(line), {}
        for name, walk in walks.items():
            begin = time.process_time()
            for _ in range(count):
                walk()
            costs[name] = 1e6 * (time.process_time() - begin) / (count * args.steps)
        print(json.dumps(costs), file=answer, flush=True)


class Side:
    """A worker process and what it has measured, by method."""

    def __init__(self, side: str, shape: str, steps: int) -> None:
        ours = side.startswith("gendiff")
        python = sys.executable if ours else peers_python()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ours:
            environment["PYTHONPATH"] = str(ROOT)
        command = [python, __file__, "--worker", side, "--shapes", shape, "--steps", str(steps)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.costs: dict[str, list[float]] = {}

    def run(self, count: int) -> dict[str, float]:
        """Runs ``count`` trajectories of each method."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; see above")
        return json.loads(line)

    def measure(self, count: int) -> None:
        """Runs ``count`` trajectories of each method and keeps their cost."""
        for name, cost in self.run(count).items():
            self.costs.setdefault(name, []).append(cost)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(shape: str, args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """All sides at one shape, measured in turn: costs by side and method."""
    sides = {name: Side(name, shape, args.steps) for name in SIDES}
    for side in sides.values():
        side.run(1)
    names = list(SIDES)
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            sides[name].measure(args.trajectories)
    for side in sides.values():
        side.close()
    return {name: side.costs for name, side in sides.items()}


def table(rows: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    """For each method and peer: microseconds of a step, median (range), and ours over theirs."""
    lines = [
        "| method | peer | state | ours | theirs | ours / theirs |",
        "|---|---|---|---|---|---|",
    ]
    for name in our_samplers():
        for peer, ours in OURS.items():
            for shape, costs in rows.items():
                if name not in costs[peer]:
                    continue
                both = costs[ours][name], costs[peer][name]
                told = [f"{statistics.median(c):.0f} ({min(c):.0f}–{max(c):.0f})" for c in both]
                ratio = statistics.median(both[0]) / statistics.median(both[1])
                lines.append(f"| {name} | {peer} | {shape} | {' | '.join(told)} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20, help="steps of a trajectory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--trajectories", type=int, default=5, help="of a method in a round")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    rows = {shape: compare(shape, args) for shape in args.shapes}
    print(table(rows))
    if args.out:
        facts = {key: getattr(args, key) for key in ("steps", "rounds", "trajectories")}
        args.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
