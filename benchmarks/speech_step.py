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
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import turns
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
    """Makes one side's network and serves its steps."""
    answer = turns.quiet_answers()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    device = torch.device(args.device)
    network, forward = (grad_tts if args.worker == "grad-tts" else gendiff)(args, device)
    target = torch.randn(args.batch, MELS, args.frames, device=device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        forward()
    step = turns.train_step(network, optimizer, lambda _: (forward(), target), args)
    turns.serve(answer, network, flops.get_total_flops() / seconds(args), step, args.device)


def seconds(args: argparse.Namespace) -> float:
    """Of speech in a batch."""
    return args.batch * args.frames / FRAMES_A_SECOND


def side(name: str, size: str, threads: int, args: argparse.Namespace) -> turns.Side:
    """A side at work; its unit is a second of speech."""
    options = [f"--{key}={getattr(args, key)}" for key in ("batch", "frames", "device", "dtype")]
    command = [__file__, f"--worker={name}", f"--threads={threads}", f"--sizes={size}", *options]
    if name == "grad-tts":
        command.append(f"--grad-tts={args.grad_tts}")
        python = args.peer_python or peers_python()
        return turns.Side(python, command, threads, seconds(args))
    command += ["--compile"] * args.compile
    path = [ROOT, ROOT / "plugins" / "speech"]
    return turns.Side(sys.executable, command, threads, seconds(args), path)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grad-tts", type=Path, help="the folder Grad-TTS of a checkout")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--frames", type=int, default=172, help="2 seconds, as Grad-TTS trains")
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the first round")
    turns.options(parser, batch=16, workers=SIDES)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if not (args.grad_tts and (args.grad_tts / "model" / "diffusion.py").is_file()):
        parser.error(
            f"--grad-tts: {args.grad_tts or 'not given'}: no model/diffusion.py there. "
            f"git clone {SOURCE} ../Speech-Backbones; then pass ../Speech-Backbones/Grad-TTS"
        )
    turns.sizes(args, SIDES, side, "second of speech")
    return None


if __name__ == "__main__":
    main()
