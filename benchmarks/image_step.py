"""One training step per image: gendiff's U-Net against diffusers' ``UNet2DModel``.

Both have the same parameters and forward FLOPs within 3 % (counted alike, a multiply-add is two,
attention as two matrix products), see the same images, and do what their trainers do: forward,
mean squared error, backward, gradient clipping, AdamW, EMA. Each runs in a process of its own, in
its own environment, and the two take turns, so that whatever else the machine does hits both.

    python benchmarks/image_step.py --threads 1 2 --out image_step.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import turns
from peers import ROOT, peers_python

SIDES = ("gendiff", "diffusers")
OURS: dict[str, dict[str, Any]] = {
    "1M": {
        "channels": 64,
        "channel_multipliers": (1, 1, 1),
        "blocks": 1,
        "attention_levels": (1, 2),
        "head_channels": 32,
        "norm_groups": 2,
        "embedding_channels": 384,
    },
    "5M": {
        "channels": 80,
        "channel_multipliers": (1, 1, 2, 3),
        "blocks": 1,
        "attention_levels": (3,),
        "head_channels": 40,
        "norm_groups": 4,
        "embedding_channels": 160,
    },
}
PEERS: dict[str, dict[str, Any]] = {
    "1M": {
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 3,
        "up_block_types": ("UpBlock2D",) * 3,
    },
    "5M": {
        "block_out_channels": (32, 64, 128, 160),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 2 + ("AttnDownBlock2D",) * 2,
        "up_block_types": ("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 2,
    },
}
Forward = Callable[[Any, Any], Any]


def build(side: str, size: str) -> tuple[Any, Forward, Callable[[Any], Callable[[int], None]]]:
    """The network, how to call it, and what makes its EMA's update, a function of the step."""
    if side == "gendiff":
        from gendiff.ema import EMA
        from gendiff_image.unet import UNet

        def average(network: Any) -> Callable[[int], None]:
            return EMA(network, half_life_steps=1000).update

        return UNet(image_channels=1, **OURS[size]), lambda net: net, average

    from diffusers import UNet2DModel
    from diffusers.training_utils import EMAModel

    def average(network: Any) -> Callable[[int], None]:
        ema = EMAModel(network.parameters(), use_ema_warmup=True)
        return lambda step: ema.step(network.parameters())

    network = UNet2DModel(sample_size=32, in_channels=1, out_channels=1, **PEERS[size])
    return network, lambda net: lambda x, noise: net(x, noise, return_dict=False)[0], average


def worker(args: argparse.Namespace) -> None:
    """Makes one side's network and serves its steps."""
    answer = turns.quiet_answers()
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    device = torch.device(args.device)
    network, caller, average = build(args.worker, args.sizes[0])
    call = caller(network)
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    network.to(device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    # Compiled as a module; averaged and optimised as the one underneath.
    call = caller(torch.compile(network) if args.compile else network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=args.worker == "gendiff")
    x = torch.randn(args.batch, 1, 32, 32, device=device)
    target = torch.randn_like(x)
    noise = torch.linspace(0, 1, args.batch, device=device)
    step = turns.train_step(
        network, optimizer, lambda _: (call(x, noise), target), args, average(network)
    )
    turns.serve(answer, network, flops.get_total_flops(), step, args.device)


def side(name: str, size: str, threads: int, args: argparse.Namespace) -> turns.Side:
    """A side at work; its unit is an image."""
    options = [f"--{key}={getattr(args, key)}" for key in ("batch", "device", "dtype")]
    command = [__file__, f"--worker={name}", f"--sizes={size}", f"--threads={threads}", *options]
    command += ["--compile"] * args.compile
    if name == "gendiff":
        path = [ROOT, ROOT / "plugins" / "image"]
        return turns.Side(sys.executable, command, threads, args.batch, path)
    return turns.Side(args.peer_python or peers_python(), command, threads, args.batch)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    turns.options(parser, batch=64, workers=SIDES)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    turns.sizes(args, SIDES, side, "image")
    return None


if __name__ == "__main__":
    main()
