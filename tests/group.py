"""Helper of the tests: groups of training processes, forked from one that has torch already."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["group", "gendiff.train", "gendiff.testing", "gendiff.evaluate"])


def member(
    rank: int,
    size: int,
    port: int,
    jobs: Sequence[Sequence[str]],
    delay: float,
    limits: Mapping[int, int],
    told: Path | None,
) -> None:
    """One process of a group that does some trainings, a list of overrides each."""
    import torch

    from gendiff import config, console, distributed, errors, runs, train
    from gendiff.testing import ToyModality

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    advance = train.Trainer.advance

    def slow(self: train.Trainer, parts: list) -> train.StepResult:
        time.sleep(delay)
        return advance(self, parts)

    train.Trainer.advance = slow  # type: ignore[method-assign]
    if rank in limits:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits[rank], limits[rank]))
    modality = ToyModality()
    with distributed.joined(torch.device("cpu")) as world:
        console.out.quiet = not world.first
        for overrides in jobs:
            resolved = config.resolve(modality, overrides=overrides)
            facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
            try:
                train.train(runs.start(modality, resolved, facts))
            except errors.GendiffError as error:
                if told is None:
                    raise
                (told / f"{rank}.txt").write_text(errors.explained(error) or "")
                raise SystemExit(2) from None


def start(
    size: int,
    jobs: Sequence[Sequence[str]],
    delay: float = 0.0,
    limits: Mapping[int, int] | None = None,
    told: Path | None = None,
) -> list[BaseProcess]:
    """Starts a group.

    Args:
        size: Of the group.
        jobs: Overrides, a list for each training.
        delay: Seconds before each step.
        limits: The largest file, in bytes, that processes may write, by rank.
        told: Where each process writes its error's line, as the command line would say it.
    """
    port = free_port()
    members = []
    for rank in range(size):
        process = _CONTEXT.Process(
            target=member, args=(rank, size, port, jobs, delay, limits or {}, told)
        )
        process.start()
        members.append(process)
    return members


def free_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def finish(members: list[BaseProcess]) -> list[int | None]:
    """Waits for a group; when one fails the others are killed, as torchrun does."""
    while any(p.is_alive() for p in members):
        time.sleep(0.02)
        if any(p.exitcode for p in members):
            for p in members:
                p.kill()
    for p in members:
        p.join()
    return [p.exitcode for p in members]


def wait_for(path: Path, members: list[BaseProcess], seconds: float = 120.0) -> None:
    """Until a file is there and not empty."""
    deadline = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        assert all(p.is_alive() for p in members), "a process ended too early"
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def send(process: BaseProcess, number: signal.Signals) -> None:
    """Signals one process of a group."""
    assert process.pid is not None
    os.kill(process.pid, number)
