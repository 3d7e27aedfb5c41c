"""Training steps of several sides, each in a process and an environment of its own, in turn.

Whatever else the machine does hits all sides alike: they take turns within one run, and every
figure is the median of some rounds beside the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


def quiet_answers() -> TextIO:
    """A worker's way to answer; what libraries print to standard output goes to the error's."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answer


def precision(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """``--dtype`` on ``--device``."""
    import torch

    if args.dtype == "fp32":
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, torch.bfloat16)


def train_step(
    network: Any,
    optimizer: Any,
    forward: Callable[[int], tuple[Any, Any]],
    args: argparse.Namespace,
    update: Callable[[int], None] = lambda number: None,
) -> Callable[[int], None]:
    """Forward to output and target, mean squared error, backward, clipping, optimizer, average."""
    import torch

    context = precision(args)

    def step(number: int) -> None:
        with context:
            out, target = forward(number)
        (out.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(number)

    return step


def serve(
    answer: TextIO, network: Any, flops: float, step: Callable[[int], None], device: str
) -> None:
    """Tells what the network is, then answers each line ``n`` with the cost of n more steps."""
    import torch

    parameters = sum(p.numel() for p in network.parameters())
    facts = {"params": parameters, "flops": flops, "torch": torch.__version__}
    print(json.dumps(facts), file=answer, flush=True)
    count = 0
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            count += 1
            step(count)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(cost), file=answer, flush=True)


class Side:
    """A worker process and what it has measured, in milliseconds per unit.

    Args:
        python: Its interpreter.
        command: The script and its options.
        threads: Of the CPU.
        units: In a step: images, molecules, seconds of speech.
        path: Folders to import from.
    """

    def __init__(
        self,
        python: str | Path,
        command: Sequence[str],
        threads: int,
        units: float,
        path: Sequence[str | Path] = (),
    ) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        self.process = subprocess.Popen(
            [str(python), *command],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.units = units
        self.facts = self._read()
        self.costs: dict[str, list[float]] = {"cpu": [], "wall": []}

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; see above")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, float]:
        """Runs ``steps`` training steps; what each clock says, in milliseconds per unit."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return {key: 1e3 * seconds / (steps * self.units) for key, seconds in self._read().items()}

    def row(self) -> Row:
        """What the side is, and the median, least and largest of its rounds; ends the process."""
        self.process.stdin.close()
        self.process.wait()
        return self.facts | {
            f"{clock}_ms": {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
            for clock, values in self.costs.items()
        }


def compare(sides: Mapping[str, Side], rounds: int, steps: int, warmup: int) -> list[Row]:
    """A row for each side, measured in turn, every second round backwards.

    ``cpu_ratio`` is the median over the rounds of this side's CPU time over the first one's.
    """
    for side in sides.values():
        side.run(warmup)
    for number in range(rounds):
        for side in list(sides.values())[:: 1 if number % 2 == 0 else -1]:
            for key, cost in side.run(steps).items():
                side.costs[key].append(cost)
    first, *_ = (side.costs["cpu"] for side in sides.values())
    return [
        {
            "side": name,
            **side.row(),
            "cpu_ratio": statistics.median(
                own / base for base, own in zip(first, side.costs["cpu"], strict=True)
            ),
        }
        for name, side in sides.items()
    ]


def table(columns: Sequence[str], rows: Iterable[Row], cells: Callable[[Row], list[str]]) -> str:
    """The rows as Markdown: the given columns by ``cells``, then size, cost and ratio."""
    head = [*columns, "params", "forward MFLOP", "CPU ms", "wall ms", "CPU ratio"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cpu, wall = (
            f"{row[key]['median']:.2f} ({row[key]['min']:.2f}-{row[key]['max']:.2f})"
            for key in ("cpu_ms", "wall_ms")
        )
        size = [f"{row['params'] / 1e6:.3f} M", f"{row['flops'] / 1e6:.0f}"]
        line = [*cells(row), *size, cpu, wall, f"{row['cpu_ratio']:.2f}"]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def sizes(
    args: argparse.Namespace,
    names: Sequence[str],
    side: Callable[[str, str, int, argparse.Namespace], Side],
    unit: str,
) -> None:
    """Compares the named sides at each of ``--sizes`` and ``--threads``; prints and saves."""
    rows = []
    for size in args.sizes:
        for threads in args.threads:
            sides = {name: side(name, size, threads, args) for name in names}
            found = compare(sides, args.rounds, args.steps, args.warmup)
            rows += [{"size": size, "threads": threads, **row} for row in found]
    columns = ["size", "threads", "side"]
    print(f"milliseconds per {unit}, median (minimum-maximum)\n")
    print(table(columns, rows, lambda row: [str(row[name]) for name in columns]))
    save(args, rows)


def options(parser: argparse.ArgumentParser, batch: int, workers: Sequence[str]) -> None:
    """The options that every such script has."""
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks")
    parser.add_argument("--peer-python", type=Path, help="default: the environment of peers.py")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=workers, help=argparse.SUPPRESS)


def save(args: argparse.Namespace, rows: list[Row]) -> None:
    """Writes ``--out``, where it is given: settings, machine and rows."""
    if not args.out:
        return
    facts = {k: v for k, v in vars(args).items() if k != "worker" and not isinstance(v, Path)}
    machine = {
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "system": platform.system(),
    }
    args.out.write_text(json.dumps({**facts, **machine, "rows": rows}, indent=2) + "\n")
