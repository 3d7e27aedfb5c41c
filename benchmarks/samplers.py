"""What a step of a sampler costs besides the network: gendiff's driver against diffusers'.

Both run DPM-Solver++(2M) over ``--steps`` steps around a network that returns a tensor made
beforehand, one thread, each in a process of its own; the two take turns. ``step`` is a step after
the first (gendiff: :func:`gendiff.samplers.states` with a ``Denoiser``; diffusers:
``scale_model_input`` and ``step``). ``all`` is a whole trajectory divided by its steps, with what
comes before the first: gendiff's grid and table, diffusers' ``set_timesteps``.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peers import ROOT, peers_python

SIDES = ("gendiff", "diffusers")
SHAPES = {"1x2": (1, 2), "64x3x32x32": (64, 3, 32, 32)}
Walk = Callable[[], Iterator[Any]]  # a new trajectory, step by step


def gendiff_walk(shape: tuple[int, ...], steps: int) -> Walk:
    """gendiff's driver with the defaults of ``SampleConfig``."""
    import torch

    from gendiff.denoiser import Denoiser
    from gendiff.grids import Karras
    from gendiff.noise import Streams
    from gendiff.samplers import DPMSolverPP2M, states
    from gendiff.schedules import EDM
    from gendiff.spaces import Dense

    out, x = torch.randn(shape), torch.randn(shape)
    schedule, space = EDM(), Dense(shape)
    denoiser = Denoiser(lambda x, noise, cond, space: out, schedule).bind(space)
    noise = Streams(0, tuple(range(shape[0])))

    def walk() -> Iterator[Any]:
        times = Karras().times(schedule, steps)
        return states(denoiser, space, schedule, DPMSolverPP2M(), times, noise, x)

    return walk


def diffusers_walk(shape: tuple[int, ...], steps: int) -> Walk:
    """diffusers' scheduler with its defaults, as its pipelines call it."""
    import torch
    from diffusers import DPMSolverMultistepScheduler

    out, start = torch.randn(shape), torch.randn(shape)
    scheduler = DPMSolverMultistepScheduler()

    def walk() -> Iterator[Any]:
        scheduler.set_timesteps(steps)
        x = start
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(out, t, x, return_dict=False)[0]
            yield x

    return walk


def worker(args: argparse.Namespace) -> None:
    """Answers each line ``n`` on stdin with the cost of a step over n trajectories, in us."""
    import torch

    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not come between
    os.dup2(2, 1)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    make = gendiff_walk if args.worker == "gendiff" else diffusers_walk
    walk = make(SHAPES[args.shapes[0]], args.steps)
    for line in sys.stdin:
        count, total, after = int(line), 0.0, 0.0
        for _ in range(count):
            begin = time.process_time()
            path = walk()
            next(path)
            first = time.process_time()
            for _ in path:
                pass
            end = time.process_time()
            total, after = total + end - begin, after + end - first
        cost = {"step": after / (args.steps - 1), "all": total / args.steps}
        print(
            json.dumps({key: 1e6 * value / count for key, value in cost.items()}),
            file=answer,
            flush=True,
        )


class Side:
    """A worker process and what it has measured, in microseconds of CPU per step."""

    def __init__(self, side: str, shape: str, steps: int) -> None:
        python = sys.executable if side == "gendiff" else peers_python()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if side == "gendiff":
            environment["PYTHONPATH"] = str(ROOT)
        command = [python, __file__, "--worker", side, "--shapes", shape, "--steps", str(steps)]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.costs: dict[str, list[float]] = {"step": [], "all": []}

    def run(self, count: int) -> dict[str, float]:
        """Runs ``count`` trajectories."""
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; see above")
        return json.loads(line)

    def measure(self, count: int) -> None:
        """Runs ``count`` trajectories and keeps their cost."""
        for key, cost in self.run(count).items():
            self.costs[key].append(cost)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides at one shape, measured in turn."""
    sides = {name: Side(name, shape, args.steps) for name in SIDES}
    for side in sides.values():
        side.run(args.trajectories)
    for number in range(args.rounds):
        for name in SIDES if number % 2 == 0 else SIDES[::-1]:
            sides[name].measure(args.trajectories)
    row: dict[str, Any] = {"shape": shape}
    for name, side in sides.items():
        side.close()
        row[name] = {
            key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for key, values in side.costs.items()
        }
    row["ratio"] = {
        key: row["gendiff"][key]["median"] / row["diffusers"][key]["median"]
        for key in ("step", "all")
    }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Microseconds per step as median (minimum-maximum); the ratio is gendiff over diffusers."""
    lines = ["| state | cost | gendiff us | diffusers us | ratio |", "|---|---|---|---|---|"]
    for row in rows:
        for key in ("step", "all"):
            ours, theirs = (
                f"{c['median']:.1f} ({c['min']:.1f}-{c['max']:.1f})"
                for c in (row[side][key] for side in SIDES)
            )
            lines.append(
                f"| {row['shape']} | {key} | {ours} | {theirs} | {row['ratio'][key]:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=20, help="steps of a trajectory")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--trajectories", type=int, default=20, help="in a round")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    rows = [compare(shape, args) for shape in args.shapes]
    print(table(rows))
    if args.out:
        facts = {key: getattr(args, key) for key in ("steps", "rounds", "trajectories")}
        args.out.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
