"""torchrun starts a killed training again, which ends bit-equal to one that was not killed.

Two processes train the image package's digits, once as they are and once with SIGKILL to process 0
when its third checkpoint is there. torchrun sees it and starts both again, once, by itself.

    python benchmarks/restart.py --parallel fsdp
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gendiff import checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
TRAIN = ["train.steps=60", "train.batch_size=8", "train.checkpoint_every_steps=5"]
IMAGE = ["channels=8", "channel_multipliers=[1,1]", "head_channels=8", "blocks=1"]
TINY = [*TRAIN, *(f"image.{part}" for part in IMAGE), "train.sample_every_steps=0", "threads=1"]


def started(out: Path, parallel: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, "--max-restarts=3", "-m", "gendiff", "train", "--modality", "image"]
    return subprocess.Popen(
        [*command, *TINY, "device=cpu", f"out={out}", f"train.parallel={parallel}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="fsdp")
    parallel = parser.parse_args().parallel
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = (Path(folder) / name / "image" / "default" for name in ("a", "b"))
        first = started(whole.parents[1], parallel)
        told = first.communicate()[0]
        assert not first.returncode, told
        group = started(killed.parents[1], parallel)
        while not (killed / "checkpoints" / "step-00000015").exists():
            assert group.poll() is None, group.communicate()[0]
            time.sleep(0.01)
        process = int((killed / "lock").read_text().split()[0])
        os.kill(process, signal.SIGKILL)
        print(group.communicate()[0])
        print(f"exit code {group.returncode} after SIGKILL to process {process}")
        a, b = (
            checkpoint.load_weights(run / "checkpoints" / "step-00000060")
            for run in (whole, killed)
        )
        equal = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        resumed = (killed / "log.txt").read_text().count("resumed from")
        print(f"resumed {resumed} time(s); averaged weights bit-equal to the others': {equal}")
    raise SystemExit(0 if equal and resumed and not group.returncode else 1)


if __name__ == "__main__":
    main()
