"""A training that is killed again and again ends bit-equal to one that never was.

Random SIGKILLs and SIGTERMs at random times, also while a checkpoint is being written and while
the process starts, over one short training of the toy modality that saves every second step.
After each, every checkpoint that bears its name is checked against its fingerprint.

    python benchmarks/soak.py --kills 50 --steps 900 --seed 0

With ``--memory`` it instead trains 5,000 steps without a kill and prints the resident memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

from gendiff import checkpoint, config, console, runs, train
from gendiff.errors import CheckpointError
from gendiff.testing import ToyModality

CONTEXT = multiprocessing.get_context("forkserver")  # each process starts with torch loaded


def train_toy(out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    console.out.quiet = True
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"out={out}", *overrides])
    train.train(runs.start(modality, resolved, {"classes": 3}))


def settings(steps: int) -> list[str]:
    often = ["train.checkpoint_every_steps=2", "train.log_every_steps=2"]
    return [f"train.steps={steps}", *often, "train.sample_every_steps=50", "toy.hidden=256"]


def checkpoints(out: Path) -> Path:
    return out / "toy" / "default" / "checkpoints"


def newest_step(folder: Path) -> int:
    return max((int(p.name.removeprefix("step-")) for p in checkpoint.steps(folder)), default=0)


def unreadable(folder: Path) -> int:
    count = 0
    for path in checkpoint.steps(folder):
        try:
            checkpoint.check(path)
            checkpoint.load_state(path)
        except (CheckpointError, RuntimeError):
            count += 1
    return count


def same(a: object, b: object) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a.keys() - {"elapsed"})
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def soak(kills: int, steps: int, seed: int, out: Path) -> bool:
    chance = random.Random(seed)
    begin = time.monotonic()
    train_toy(str(out / "whole"), *settings(steps))
    once = time.monotonic() - begin
    folder = checkpoints(out / "killed")
    counts = dict.fromkeys(
        ("SIGKILL", "SIGTERM", "while writing", "at the start", "unreadable", "wrong exit"), 0
    )
    for _ in range(kills):
        number = chance.choice([signal.SIGKILL, signal.SIGTERM])
        arguments = (str(out / "killed"), *settings(steps))
        process = CONTEXT.Process(target=train_toy, args=arguments)
        before = newest_step(folder)
        process.start()
        deadline = time.monotonic() + (chance.uniform(0, 0.4) if chance.random() < 0.2 else 60)
        while time.monotonic() < deadline and newest_step(folder) == before:
            time.sleep(0.001)
        trained = newest_step(folder) > before
        time.sleep(chance.uniform(0, 0.3) if trained else 0)
        assert process.is_alive(), "the training ended before its kills: give more --steps"
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join()
        counts[number.name] += 1
        counts["at the start"] += not trained
        counts["while writing"] += bool(list(folder.glob("*.tmp")))
        counts["unreadable"] += unreadable(folder)
        # A SIGTERM before the training has begun ends the process at once, as any.
        stopped = 0 if trained else process.exitcode
        counts["wrong exit"] += process.exitcode != (
            -signal.SIGKILL if number == signal.SIGKILL else stopped
        )
    train_toy(str(out / "killed"), *settings(steps))
    a, b = (checkpoint.newest(checkpoints(out / name), print) for name in ("whole", "killed"))
    assert a is not None
    assert b is not None
    equal = same(checkpoint.load_state(a), checkpoint.load_state(b))
    print(f"{kills} kills: " + ", ".join(f"{v} {k}" for k, v in counts.items()))
    print(
        f"{steps} steps, a checkpoint every 2; {once:.0f} s uninterrupted, "
        f"{time.monotonic() - begin - once:.0f} s with the kills"
    )
    print(f"final state bit-equal to the uninterrupted run: {equal}")
    return equal and not counts["unreadable"] and not counts["wrong exit"]


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(steps: int, out: Path) -> bool:
    """Resident memory from step 500 on, in a whole training: logs, previews, checkpoints."""
    marks: dict[int, float] = {}
    advance = train.Trainer.advance

    def watched(self: train.Trainer, parts: list) -> train.StepResult:
        result = advance(self, parts)
        if result.step % 500 == 0:
            marks[result.step] = resident_mib()
        return result

    train.Trainer.advance = watched  # type: ignore[method-assign]
    more = ["train.sample_every_steps=500", "train.checkpoint_every_steps=500"]
    train_toy(str(out), f"train.steps={steps}", "train.log_every_steps=100", *more)
    growth = marks[steps] / marks[500] - 1
    print(", ".join(f"{step}: {mib:.1f} MiB" for step, mib in marks.items()))
    print(f"growth of resident memory from step 500 to {steps}: {growth:.2%}")
    return growth < 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    CONTEXT.set_forkserver_preload(["gendiff.train", "gendiff.testing"])
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            fine = memory(5000, Path(folder))
        else:
            fine = soak(args.kills, args.steps, args.seed, Path(folder))
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
