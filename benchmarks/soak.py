"""A training that is killed again and again ends bit-equal to one that never was.

Random SIGKILLs and SIGTERMs at random times, also while a checkpoint is being written and while
the process starts, over one short training of the toy modality that saves every second step.
After each, every checkpoint that bears its name is checked against its fingerprint.

    python benchmarks/soak.py --kills 50 --steps 900 --seed 0

With ``--ranks 2`` each training is of two processes (gloo): one, chosen at random, gets the
signal, and after a SIGKILL the other is killed too, as torchrun does. ``--parallel fsdp`` shards
the training and its checkpoints. With ``--rounds 30`` it
instead trains so many times without a kill and counts how the processes ended; with ``--memory``
it trains 5,000 steps without a kill and prints the resident memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from gendiff import checkpoint, config, console, distributed, runs, train
from gendiff.errors import CheckpointError
from gendiff.testing import ToyModality

CONTEXT = multiprocessing.get_context("forkserver")  # each process starts with torch loaded


def train_toy(out: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    console.out.quiet = True
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"out={out}", *overrides])
    train.train(runs.start(modality, resolved, {"classes": 3}))


def member(rank: int, ranks: int, port: int, out: str, *overrides: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.joined(torch.device("cpu")):
        train_toy(out, *overrides)


def started(ranks: int, out: Path, overrides: list[str]) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members: list[BaseProcess] = []
    for rank in range(ranks):
        arguments = (rank, ranks, port, str(out), *overrides)
        members.append(CONTEXT.Process(target=member, args=arguments))
        members[-1].start()
    return members


def finished(members: list[BaseProcess]) -> list[int | None]:
    """The exit codes; when one process fails the others are killed."""
    while any(p.is_alive() for p in members):
        time.sleep(0.01)
        if any(p.exitcode for p in members):
            for p in members:
                p.kill()
    for p in members:
        p.join()
    return [p.exitcode for p in members]


def settings(steps: int, parallel: str) -> list[str]:
    often = ["train.checkpoint_every_steps=2", "train.log_every_steps=2"]
    size = ["toy.hidden=256", f"train.parallel={parallel}"]
    return [f"train.steps={steps}", *often, "train.sample_every_steps=50", *size]


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


def soak(kills: int, given: list[str], seed: int, ranks: int, out: Path) -> bool:
    chance = random.Random(seed)
    begin = time.monotonic()
    assert not any(finished(started(ranks, out / "whole", given)))
    once = time.monotonic() - begin
    folder = checkpoints(out / "killed")
    counts = dict.fromkeys(
        ("SIGKILL", "SIGTERM", "while writing", "at the start", "unreadable", "wrong exit"), 0
    )
    for _ in range(kills):
        number = chance.choice([signal.SIGKILL, signal.SIGTERM])
        before = newest_step(folder)
        members = started(ranks, out / "killed", given)
        process = chance.choice(members)
        deadline = time.monotonic() + (chance.uniform(0, 0.4) if chance.random() < 0.2 else 60)
        while time.monotonic() < deadline and newest_step(folder) == before:
            time.sleep(0.001)
        trained = newest_step(folder) > before
        time.sleep(chance.uniform(0, 0.3) if trained else 0)
        assert process.is_alive(), "the training ended before its kills: give more --steps"
        assert process.pid is not None
        os.kill(process.pid, number)
        codes = finished(members)
        counts[number.name] += 1
        counts["at the start"] += not trained
        counts["while writing"] += bool(list(folder.glob("*.tmp")))
        counts["unreadable"] += unreadable(folder)
        # A SIGTERM before the training has begun ends the process at once, as any.
        if number == signal.SIGKILL:
            counts["wrong exit"] += process.exitcode != -signal.SIGKILL
        elif trained:
            counts["wrong exit"] += any(codes)
    counts["wrong exit"] += any(finished(started(ranks, out / "killed", given)))
    a, b = (checkpoint.newest(checkpoints(out / name), print) for name in ("whole", "killed"))
    assert a is not None
    assert b is not None
    equal = same(checkpoint.load_state(a), checkpoint.load_state(b))
    print(
        f"{kills} kills of 1 of {ranks} processes: "
        + ", ".join(f"{v} {k}" for k, v in counts.items())
    )
    print(
        f"{given[0]}, a checkpoint every 2; {once:.0f} s uninterrupted, "
        f"{time.monotonic() - begin - once:.0f} s with the kills"
    )
    print(f"final state bit-equal to the uninterrupted run: {equal}")
    return equal and not counts["unreadable"] and not counts["wrong exit"]


def repeat(rounds: int, given: list[str], ranks: int, out: Path) -> bool:
    codes: Counter[int | None] = Counter()
    for i in range(rounds):
        codes.update(finished(started(ranks, out / str(i), given)))
    told = ", ".join(f"{count} with exit code {code}" for code, count in codes.items())
    print(f"{rounds} trainings, {given[0]}, by {ranks} processes each: {told}")
    return set(codes) == {0}


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
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    CONTEXT.set_forkserver_preload(["gendiff.train", "gendiff.testing"])
    given = settings(args.steps, args.parallel)
    with tempfile.TemporaryDirectory() as folder:
        if args.memory:
            fine = memory(5000, Path(folder))
        elif args.rounds:
            fine = repeat(args.rounds, given, args.ranks, Path(folder))
        else:
            fine = soak(args.kills, given, args.seed, args.ranks, Path(folder))
    raise SystemExit(0 if fine else 1)


if __name__ == "__main__":
    main()
