"""One training step per image: gendiff's U-Net against diffusers' ``UNet2DModel``.

Both have the same parameters and forward FLOPs within 3 % (counted alike, a multiply-add is two,
attention as two matrix products), see the same images, and do what their trainers do: forward,
mean squared error, backward, gradient clipping, AdamW, EMA. Each runs in a process of its own, in
its own environment, and the two take turns, so that whatever else the machine does hits both.

    python benchmarks/image_step.py --threads 1 2 --out image_step.json
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
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peers import ROOT, peers_python

SIDES = ("gendiff", "diffusers")
OURS: dict[str, dict[str, Any]] = {
    "1M": {
        "channels": 64,
        "channel_multipliers": (1, 1, 1),
        "blocks": 1,
        "attention_levels": (1, 2),
        "head_channels": 32,
        "embedding_channels": 384,
    },
    "5M": {
        "channels": 80,
        "channel_multipliers": (1, 1, 2, 3),
        "blocks": 1,
        "attention_levels": (3,),
        "head_channels": 40,
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
    """Makes one side's network, then answers each line ``n`` on stdin with the cost of n steps."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not come between
    os.dup2(2, 1)
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    network, caller, average = build(args.worker, args.sizes[0])
    call = caller(network)
    with FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    network.to(device)
    if cuda:
        network.to(memory_format=torch.channels_last)
    # Compiled as a module; averaged and optimised as the one underneath.
    call = caller(torch.compile(network) if args.compile else network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=args.worker == "gendiff")
    update = average(network)
    x = torch.randn(args.batch, 1, 32, 32, device=device)
    target = torch.randn_like(x)
    noise = torch.linspace(0, 1, args.batch, device=device)
    bf16 = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()

    def step(number: int) -> None:
        with bf16:
            out = call(x, noise)
        loss = (out.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(number)

    facts = {
        "params": sum(p.numel() for p in network.parameters()),
        "flops": flops.get_total_flops(),
        "torch": torch.__version__,
    }
    print(json.dumps(facts), file=answer, flush=True)
    count = 0
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            count += 1
            step(count)
        if cuda:
            torch.cuda.synchronize()
        cost = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps(cost), file=answer, flush=True)


class Side:
    """A worker process and what it has measured, in milliseconds per image."""

    def __init__(self, side: str, size: str, threads: int, args: argparse.Namespace) -> None:
        python = sys.executable if side == "gendiff" else peers_python()
        command = [
            python,
            __file__,
            "--worker",
            side,
            "--sizes",
            size,
            "--threads",
            str(threads),
            "--batch",
            str(args.batch),
            "--device",
            args.device,
            "--dtype",
            args.dtype,
        ]
        path = os.pathsep.join([str(ROOT), str(ROOT / "plugins" / "image")])
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if side == "gendiff":
            environment["PYTHONPATH"] = path
        self.process = subprocess.Popen(
            command + ["--compile"] * args.compile,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.batch = args.batch
        self.facts = self._read()
        self.costs: dict[str, list[float]] = {"cpu": [], "wall": []}

    def _read(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with code {self.process.wait()}; see above")
        return json.loads(line)

    def run(self, steps: int) -> dict[str, float]:
        """Runs ``steps`` training steps; what each clock says, in milliseconds per image."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return {key: 1e3 * seconds / (steps * self.batch) for key, seconds in self._read().items()}

    def measure(self, steps: int) -> None:
        """Runs ``steps`` training steps and keeps their cost."""
        for key, cost in self.run(steps).items():
            self.costs[key].append(cost)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def compare(size: str, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each side, measured in turn."""
    sides = {name: Side(name, size, threads, args) for name in SIDES}
    for side in sides.values():
        side.run(args.warmup)
    for round_number in range(args.rounds):
        order = SIDES if round_number % 2 == 0 else SIDES[::-1]
        for name in order:
            sides[name].measure(args.steps)
    rows = []
    for name, side in sides.items():
        side.close()
        row = {"size": size, "threads": threads, "side": name, **side.facts}
        for clock, values in side.costs.items():
            row[f"{clock}_ms"] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Milliseconds per image as median (minimum-maximum); the ratio is peer over gendiff."""
    lines = [
        "| size | threads | side | params | forward MFLOP | CPU ms | wall ms | CPU ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = 0.0
    for row in rows:
        if row["side"] == SIDES[0]:
            base = row["cpu_ms"]["median"]
        cpu, wall = (
            f"{row[key]['median']:.2f} ({row[key]['min']:.2f}-{row[key]['max']:.2f})"
            for key in ("cpu_ms", "wall_ms")
        )
        lines.append(
            f"| {row['size']} | {row['threads']} | {row['side']} | {row['params'] / 1e6:.3f} M | "
            f"{row['flops'] / 1e6:.0f} | {cpu} | {wall} | {row['cpu_ms']['median'] / base:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps in a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the first round")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    rows = [row for size in args.sizes for n in args.threads for row in compare(size, n, args)]
    print(table(rows))
    if args.out:
        facts = {key: value for key, value in vars(args).items() if key not in ("out", "worker")}
        machine = {
            "processor": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "system": platform.system(),
        }
        args.out.write_text(json.dumps({**facts, **machine, "rows": rows}, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
