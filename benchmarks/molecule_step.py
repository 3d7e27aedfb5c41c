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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import turns
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
    """Makes one side's network and serves its steps."""
    answer = turns.quiet_answers()
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(args.threads[0])
    torch.manual_seed(0)
    device = torch.device(args.device)
    network, forward, optimizer, update = (edm if args.worker == "edm" else gendiff)(args, device)
    # EDM makes a list of edges, slowly, when it first meets a padded size: not in the rounds.
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        for i in range(args.batches):
            forward(i)
    step = turns.train_step(
        network, optimizer, lambda number: forward(number % args.batches), args, update
    )
    molecules = args.batches * args.batch
    turns.serve(answer, network, flops.get_total_flops() / molecules, step, args.device)


def side(name: str, threads: int, args: argparse.Namespace) -> turns.Side:
    """A side at work; its unit is a molecule."""
    names = ("width", "depth", "groups", "batch", "batches", "device", "dtype")
    options = [f"--{key}={getattr(args, key)}" for key in names]
    command = [__file__, f"--worker={name}", f"--threads={threads}", *options]
    command += ["--pair", *map(str, args.pair)] + ["--compile"] * args.compile
    if name == "edm":
        python = args.peer_python or peers_python()
        return turns.Side(python, command, threads, args.batch, [args.edm])
    path = [ROOT, ROOT / "plugins" / "molecule"]
    return turns.Side(sys.executable, command, threads, args.batch, path)


def cells(row: turns.Row, args: argparse.Namespace) -> list[str]:
    """A row's threads, side and size."""
    width, pair, layers = args.pair
    size = (
        f"{width}/{pair} x {layers}" if row["side"] == "pair" else f"{args.width} x {args.depth}"
    )
    return [str(row["threads"]), TITLES[row["side"]], size]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edm", type=Path, help="a checkout of EDM's repository")
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
    parser.add_argument("--batches", type=int, default=4, help="steps in a round")
    turns.options(parser, batch=64, workers=SIDES)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    if "edm" in args.sides and not (args.edm and (args.edm / "egnn" / "models.py").is_file()):
        where = args.edm or "../edm"
        parser.error(
            f"--edm: {args.edm or 'not given'}: no checkout of EDM. "
            f"git clone {EDM} {where}; then pass --edm {where}, or leave it out with --sides"
        )
    rows = []
    for threads in args.threads:
        sides = {name: side(name, threads, args) for name in args.sides}
        found = turns.compare(sides, args.rounds, args.batches, args.batches)
        rows += [{"threads": threads, **row} for row in found]
    print("milliseconds per molecule, median (minimum-maximum)\n")
    print(turns.table(["threads", "side", "size"], rows, lambda row: cells(row, args)))
    turns.save(args, rows)
    return None


if __name__ == "__main__":
    main()
