"""One training step per second of speech: gendiff's MelNet against Grad-TTS's estimator.

The peer is the 2-D U-Net of Popov et al. (2021, https://arxiv.org/abs/2105.06337), from a checkout
of its authors' repository; it is told the aligned mean of each frame's token by an encoder, which
is not counted here, where MelNet makes of the tokens what it needs. Both have the same parameters
within 10 %, see segments of the same length in HiFi-GAN's convention, and do forward, mean squared
error, backward, gradient clipping and AdamW. Each runs in a process of its own, and the two take
turns, so that whatever else the machine does hits both.

    git clone https://github.com/huawei-noah/Speech-Backbones ../Speech-Backbones
    python benchmarks/speech_step.py --grad-tts ../Speech-Backbones/Grad-TTS --out speech_step.json
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
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from image_step import Side
from peers import ROOT, peers_python

if TYPE_CHECKING:
    import torch

SOURCE = "https://github.com/huawei-noah/Speech-Backbones"
SIDES = ("gendiff", "grad-tts")
# MelNet's width at 8 blocks and the estimator's; Grad-TTS is published at 64, MelNet's default
# is 160.
SIZES = {"2M": (160, 32), "8M": (304, 64)}
MELS, FRAMES_A_SECOND = 80, 22050 / 256
TOKENS, FRAMES_A_TOKEN = 64, 8


def gendiff(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """MelNet, and its output for the batch."""
    import torch

    from gendiff.spaces import Cond, Masked
    from gendiff_speech.network import MelNet

    network = MelNet(MELS, TOKENS, 1, SIZES[args.sizes[0]][0], 8, (1, 2, 4, 8), 0.0).to(device)
    call = torch.compile(network) if args.compile else network
    count = -(-args.frames // FRAMES_A_TOKEN)
    durations = torch.full((args.batch, count), FRAMES_A_TOKEN)
    durations[:, -1] -= count * FRAMES_A_TOKEN - args.frames
    cond = Cond(
        {
            "tokens": torch.randint(1, TOKENS, (args.batch, count)),
            "durations": durations,
            "speaker": torch.zeros(args.batch, dtype=torch.long),
        }
    ).to(device)
    space = Masked(torch.full((args.batch,), args.frames), MELS, args.frames).to(device)
    x = torch.randn(args.batch, MELS, args.frames, device=device)
    noise = torch.rand(args.batch, device=device)
    return network, lambda: call(x, noise, cond, space)


def grad_tts(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """Grad-TTS's estimator for one speaker, and its output for the batch."""
    import torch

    # Not by way of the package, which wants a compiled alignment search and a text frontend.
    package = types.ModuleType("model")
    package.__path__ = [str(args.grad_tts / "model")]
    sys.modules["model"] = package
    from model.diffusion import GradLogPEstimator2d  # type: ignore[import-not-found]

    network = GradLogPEstimator2d(SIZES[args.sizes[0]][1], n_spks=1, n_feats=MELS).to(device)
    x, mu = (torch.randn(args.batch, MELS, args.frames, device=device) for _ in range(2))
    mask = torch.ones(args.batch, 1, args.frames, device=device)
    t = torch.rand(args.batch, device=device)
    return network, lambda: network(x, mask, mu, t)


def worker(args: argparse.Namespace) -> None:
    """Makes one side's network, then answers each line ``n`` on stdin with the cost of n steps."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not come between
    os.dup2(2, 1)
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    network, forward = (grad_tts if args.worker == "grad-tts" else gendiff)(args, device)
    target = torch.randn(args.batch, MELS, args.frames, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        forward()
    bf16 = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()

    def step() -> None:
        with bf16:
            out = forward()
        (out.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    facts = {
        "params": sum(p.numel() for p in network.parameters()),
        "flops": flops.get_total_flops() / (args.batch * args.frames / FRAMES_A_SECOND),
        "torch": torch.__version__,
    }
    print(json.dumps(facts), file=answer, flush=True)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            step()
        if cuda:
            torch.cuda.synchronize()
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(cost), file=answer, flush=True)


class SpeechSide(Side):
    """A worker process and what it has measured, in milliseconds per second of speech."""

    def __init__(self, side: str, size: str, threads: int, args: argparse.Namespace) -> None:
        names = ("batch", "frames", "device", "dtype")
        options = [f"--{name}={getattr(args, name)}" for name in names]
        command = [__file__, f"--worker={side}", f"--threads={threads}", f"--sizes={size}"]
        if side == "grad-tts":
            python, path = args.peer_python or peers_python(), []
            command.append(f"--grad-tts={args.grad_tts}")
        else:
            python, path = sys.executable, [ROOT, ROOT / "plugins" / "speech"]
            command += ["--compile"] * args.compile
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        self.process = subprocess.Popen(
            [str(python), *command, *options],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.batch = args.batch * args.frames / FRAMES_A_SECOND
        self.facts = self._read()
        self.costs = {"cpu": [], "wall": []}


def compare(size: str, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each side, measured in turn."""
    sides = {name: SpeechSide(name, size, threads, args) for name in SIDES}
    for side in sides.values():
        side.run(args.warmup)
    for round_number in range(args.rounds):
        for name in SIDES if round_number % 2 == 0 else SIDES[::-1]:
            sides[name].measure(args.steps)
    rows = []
    for name, side in sides.items():
        side.close()
        row = {"size": size, "threads": threads, "side": name, **side.facts}
        peer = sides["grad-tts"].costs["cpu"]
        ratios = [theirs / own for theirs, own in zip(peer, side.costs["cpu"], strict=True)]
        row["faster_than_grad_tts"] = statistics.median(ratios)
        for clock, values in side.costs.items():
            row[f"{clock}_ms"] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds per second of speech, median (minimum-maximum); ratios are of each round."""
    lines = [
        "| size | threads | side | params | forward GFLOP | CPU ms | wall ms | times as fast |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cpu, wall = (
            f"{row[key]['median']:.1f} ({row[key]['min']:.1f}-{row[key]['max']:.1f})"
            for key in ("cpu_ms", "wall_ms")
        )
        lines.append(
            f"| {row['size']} | {row['threads']} | {row['side']} | {row['params'] / 1e6:.2f} M | "
            f"{row['flops'] / 1e9:.2f} | {cpu} | {wall} | {row['faster_than_grad_tts']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grad-tts", type=Path, help="the folder Grad-TTS of a checkout")
    parser.add_argument("--peer-python", type=Path, help="default: the environment of peers.py")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--frames", type=int, default=172, help="2 seconds, as Grad-TTS trains")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the first round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="gendiff's network only")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if not (args.grad_tts and (args.grad_tts / "model" / "diffusion.py").is_file()):
        parser.error(
            f"--grad-tts: {args.grad_tts or 'not given'}: no model/diffusion.py there. "
            f"git clone {SOURCE} ../Speech-Backbones; then pass ../Speech-Backbones/Grad-TTS"
        )
    rows = [row for size in args.sizes for n in args.threads for row in compare(size, n, args)]
    print(table(rows))
    if args.out:
        hidden = ("out", "worker", "grad_tts", "peer_python")
        facts = {key: value for key, value in vars(args).items() if key not in hidden}
        machine = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "system": platform.system(),
        }
        args.out.write_text(json.dumps({**facts, **machine, "rows": rows}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
