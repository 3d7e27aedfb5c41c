"""What a checkpoint costs each process of a training in main memory and time, by train.parallel.

Two processes (gloo) train a network of 50 million parameters for two steps, save, and go on from
what they saved. For each process: the peak of its resident memory above what it held before.

    python benchmarks/sharded_memory.py
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gendiff import checkpoint, config, console, distributed, runs, train
from gendiff.spaces import Cond, Space
from gendiff.testing import ToyModality
from gendiff.testing.toy import ToyNet

HIDDEN, BLOCKS = 1024, 48


class Deep(ToyNet):
    """The toy's network and many square layers, each sharded on its own."""

    def __init__(self) -> None:
        super().__init__(HIDDEN)
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(BLOCKS))

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        h = self.noise(noise[:, None])
        for block in self.blocks:
            h = h + torch.nn.functional.silu(block(h))
        return super().forward(x, noise, cond, space) + h[:, :1]


class DeepToy(ToyModality):
    """The toy with that network."""

    def backbone(self, section: object, facts: object) -> nn.Module:
        return Deep()


def resident_mib(name: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(re.findall(rf"{name}:\s+(\d+) kB", text)[0]) / 1024


def measured(action: Callable[[], object]) -> str:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed hides what is taken
    Path("/proc/self/clear_refs").write_text("5")  # the peak anew
    before, begin = resident_mib("VmRSS"), time.monotonic()
    action()
    return f"+{resident_mib('VmHWM') - before:.0f} MiB in {time.monotonic() - begin:.1f} s"


def member(rank: int, port: int, out: str, parallel: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    console.out.quiet = True
    with distributed.joined(torch.device("cpu")):
        modality = DeepToy()
        given = [f"out={out}", f"train.parallel={parallel}", "train.steps=2"]
        run = runs.start(modality, config.resolve(modality, overrides=given), {"classes": 3})
        trainer = train.Trainer(run)
        list(trainer.steps())
        trainer.model()  # sets up once what gathers weights
        saving = measured(trainer.save)
        del trainer
        trainer = train.Trainer(run)
        loading = measured(lambda: trainer.restore(checkpoint.steps(run.checkpoints)[-1]))
        print(f"{parallel}, process {rank}: saving {saving}, loading {loading}", flush=True)


def main() -> None:
    size = sum(p.numel() for p in Deep().parameters())
    print(f"{size:,} parameters: {size * 4 / 2**20:.0f} MiB in float32, four times in a state")
    context = multiprocessing.get_context("spawn")
    for parallel in ("ddp", "fsdp"):
        with tempfile.TemporaryDirectory() as out, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            members = [
                context.Process(target=member, args=(rank, port, out, parallel)) for rank in (0, 1)
            ]
            for process in members:
                process.start()
            for process in members:
                process.join()
            (folder,) = checkpoint.steps(Path(out) / "toy" / "default" / "checkpoints")
            for name in checkpoint.files(folder):
                print(f"{parallel}, {name}: {(folder / name).stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
