"""One training step per molecule: gendiff's EGNN and its default network against EDM's EGNN.

Gendiff's EGNN is the same function as EDM's, with the same parameters. All sides see the same
molecules, of QM9's sizes, and do what their trainers do: forward, mean squared error, backward,
gradient clipping, AdamW, EMA. Each runs in a process of its own, the peer in an environment of its
own, and they take turns, so that whatever else the machine does hits all of them. A round is one
pass over the same few batches.

    git clone https://github.com/ehoogeboom/e3_diffusion_for_molecules ../edm
    python benchmarks/molecule_step.py --edm ../edm --width 64 --depth 4 --out molecule_step.json
"""

from __future__ import annotations

import argparse
import copy
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
from typing import TYPE_CHECKING, Any

from image_step import Side
from peers import ROOT, peers_python

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EDM = "https://github.com/ehoogeboom/e3_diffusion_for_molecules"
SIDES = ("egnn", "pair", "edm")
TITLES = {"egnn": "gendiff EGNN", "pair": "gendiff PairNet", "edm": "EDM's EGNN"}
KINDS = 6  # five elements and the charge number, as EDM has them for QM9
# Molecules of QM9 by their number of atoms, 3 to 29; those with fluorine left out.
SIZES = (
    "2 4 4 11 18 57 138 379 863 1908 3639 6363 9947 13640 16882 17376 18115 12385 13151 4425 "
    "6353 711 1923 59 356 0 35"
)
# The output for the i-th batch and its target.
Forward = Callable[[int], "tuple[Tensor, Tensor]"]
Update = Callable[[int], None]


def batches(args: argparse.Namespace) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sizes (B,), atoms (R, 3 + K) with their positions centred, and noise numbers (B,)."""
    import torch

    weights = torch.tensor([float(count) for count in SIZES.split()])
    random = torch.Generator().manual_seed(0)
    made = []
    for _ in range(args.batches):
        sizes = 3 + weights.multinomial(args.batch, replacement=True, generator=random)
        x = torch.randn(int(sizes.sum()), 3 + KINDS, generator=random)
        for rows in x.split(sizes.tolist()):
            rows[:, :3] -= rows[:, :3].mean(0)
        made.append((sizes, x, torch.rand(args.batch, generator=random)))
    return made


def gendiff(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.nn.Module, Forward, torch.optim.Optimizer, Update]:
    """Gendiff's networks, with the engine's optimizer and EMA."""
    import torch

    from gendiff.ema import EMA
    from gendiff.spaces import Ragged

    network: torch.nn.Module
    if args.worker == "egnn":
        from gendiff_molecule.egnn import EGNN

        network = EGNN(KINDS, args.width, args.depth, groups=args.groups)
    else:
        from gendiff_molecule.pairnet import PairNet

        width, pair, layers = args.pair
        network = PairNet(KINDS, width, pair, layers=layers, groups=args.groups)
    network.to(device)
    call = torch.compile(network) if args.compile else network
    inputs = [
        (x.to(device), noise.to(device), Ragged(sizes, 3 + KINDS, 3).to(device))
        for sizes, x, noise in batches(args)
    ]
    targets = [torch.randn_like(x) for x, _, _ in inputs]

    def forward(i: int) -> tuple[Tensor, Tensor]:
        x, noise, space = inputs[i]
        return space.project(call(x, noise, None, space)), targets[i]

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    return network, forward, optimizer, EMA(network, half_life_steps=1000).update


def edm(
    args: argparse.Namespace, device: torch.device
) -> tuple[torch.nn.Module, Forward, torch.optim.Optimizer, Update]:
    """EDM's network for QM9 at its own options, with its optimizer and EMA."""
    import torch
    from egnn.models import EGNN_dynamics_QM9  # type: ignore[import-not-found]
    from equivariant_diffusion.utils import EMA  # type: ignore[import-not-found]

    network = EGNN_dynamics_QM9(
        in_node_nf=KINDS + 1,
        context_node_nf=0,
        n_dims=3,
        hidden_nf=args.width,
        device=device,
        n_layers=args.depth,
        attention=True,
        tanh=True,
        norm_constant=1,
        inv_sublayers=1,
        normalization_factor=1,
    )
    inputs, targets = [], []
    for sizes, rows, noise in batches(args):
        longest = int(sizes.max())
        mask = torch.arange(longest) < sizes[:, None]
        edges = mask[:, :, None] & mask[:, None] & ~torch.eye(longest, dtype=torch.bool)
        x = torch.zeros(len(sizes), longest, 3 + KINDS)
        x[mask] = rows
        live, pairs = mask[..., None].float(), edges.float().view(-1, 1)
        inputs.append([v.to(device) for v in (noise[:, None], x, live, pairs)])
        targets.append(torch.randn_like(x).to(device) * live.to(device))

    def forward(i: int) -> tuple[Tensor, Tensor]:
        return network._forward(*inputs[i], None), targets[i]

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, amsgrad=True, weight_decay=1e-12)
    averaged, average = copy.deepcopy(network), EMA(0.9999)
    return (
        network,
        forward,
        optimizer,
        lambda step: average.update_model_average(averaged, network),
    )


def worker(args: argparse.Namespace) -> None:
    """Makes one side's network, then answers each line ``n`` on stdin with the cost of n steps."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    answer = os.fdopen(os.dup(1), "w")  # what libraries print must not come between
    os.dup2(2, 1)
    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    device, cuda = torch.device(args.device), args.device.startswith("cuda")
    network, forward, optimizer, update = (edm if args.worker == "edm" else gendiff)(args, device)
    # EDM makes a list of edges, slowly, when it first meets a padded size: not in the rounds.
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        for i in range(args.batches):
            forward(i)
    bf16 = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()

    def step(number: int) -> None:
        with bf16:
            out, target = forward(number % args.batches)
        loss = (out.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update(number)

    facts = {
        "params": sum(p.numel() for p in network.parameters()),
        "flops": flops.get_total_flops() / (args.batches * args.batch),
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


class MoleculeSide(Side):
    """A worker process and what it has measured, in milliseconds per molecule."""

    def __init__(self, side: str, threads: int, args: argparse.Namespace) -> None:
        names = ("width", "depth", "groups", "batch", "batches", "device", "dtype")
        options = [f"--{name}={getattr(args, name)}" for name in names]
        command = [__file__, f"--worker={side}", f"--threads={threads}", *options]
        command += ["--pair", *map(str, args.pair)] + ["--compile"] * args.compile
        if side == "edm":
            python, path = args.peer_python or peers_python(), [args.edm]
        else:
            python, path = sys.executable, [ROOT, ROOT / "plugins" / "molecule"]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join(map(str, path)),
        }
        self.process = subprocess.Popen(
            [str(python), *command],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.batch = args.batch
        self.facts = self._read()
        self.costs = {"cpu": [], "wall": []}


def compare(threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each side, measured in turn."""
    sides = {name: MoleculeSide(name, threads, args) for name in args.sides}
    for side in sides.values():
        side.run(args.batches)
    for round_number in range(args.rounds):
        for name in args.sides if round_number % 2 == 0 else args.sides[::-1]:
            sides[name].measure(args.batches)
    rows = []
    for name, side in sides.items():
        side.close()
        row = {"threads": threads, "side": name, **side.facts}
        for clock, values in side.costs.items():
            row[f"{clock}_ms"] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Milliseconds per molecule, median (minimum-maximum); the ratio is to the first side."""
    lines = [
        "| threads | side | size | params | forward MFLOP | CPU ms | wall ms | CPU ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    base = 0.0
    for row in rows:
        if row["side"] == args.sides[0]:
            base = row["cpu_ms"]["median"]
        cpu, wall = (
            f"{row[key]['median']:.2f} ({row[key]['min']:.2f}-{row[key]['max']:.2f})"
            for key in ("cpu_ms", "wall_ms")
        )
        width, pair, layers = args.pair
        size = f"{width}/{pair} x {layers}" if row["side"] == "pair" else ""
        size = size or f"{args.width} x {args.depth}"
        lines.append(
            f"| {row['threads']} | {TITLES[row['side']]} | {size} | {row['params'] / 1e6:.3f} M | "
            f"{row['flops'] / 1e6:.0f} | {cpu} | {wall} | {row['cpu_ms']['median'] / base:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edm", type=Path, help="a checkout of EDM's repository")
    parser.add_argument("--peer-python", type=Path, help="default: the environment of peers.py")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--width", type=int, default=256, help="of both EGNNs")
    parser.add_argument("--depth", type=int, default=9, help="of both EGNNs")
    parser.add_argument(
        "--pair",
        nargs=3,
        type=int,
        default=[96, 32, 5],
        metavar=("WIDTH", "PAIR", "LAYERS"),
        help="of the PairNet",
    )
    parser.add_argument("--groups", type=int, default=4, help="of gendiff's networks")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true", help="gendiff's networks only")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if "edm" in args.sides and not (args.edm and (args.edm / "egnn" / "models.py").is_file()):
        where = args.edm or "../edm"
        parser.error(
            f"--edm: {args.edm or 'not given'}: no checkout of EDM. "
            f"git clone {EDM} {where}; then pass --edm {where}, or leave it out with --sides"
        )
    rows = [row for threads in args.threads for row in compare(threads, args)]
    print(table(rows, args))
    if args.out:
        hidden = ("out", "worker", "edm", "peer_python")
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
