"""Three networks that are bad on purpose, and a good one, as ``gendiff evaluate`` judges them.

Of each modality: *untrained*, after one step; *memorising*, taught a few training items for twice
as long; *collapsed*, taught one; and *taught*, all of them. All are compared with the whole data,
as any run is. Prints a row for each with its verdict.

    python benchmarks/bad_models.py
    python benchmarks/bad_models.py --modality molecule --few 40
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Dataset

from gendiff import config, metrics, plugins, runs
from gendiff.evaluate import Judge
from gendiff.spaces import join
from gendiff.train import Trainer

# Steps, and what makes them short: one CPU core does each training in two minutes or so.
SHORT = {
    "image": (1000, []),
    "speech": (900, ["threads=1"]),
    "molecule": (2500, ["molecule.heavy_atoms=6", "train.lr=3e-3"]),
}
WAYS = ("untrained", "memorising", "collapsed", "taught")
SHOWN = ("frechet_distance", "precision", "coverage", "pairwise_distance", "training_copies")


class Few(Dataset[Any]):
    """So many items, evenly spaced, of a training split."""

    def __init__(self, data: Any, count: int) -> None:
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: tuple[int, int]) -> Any:
        number, visit = key
        return self.data[number * len(self.data) // self.count, visit]


def taught(modality: Any, few: int | None) -> Any:
    """The modality with no more training items than so many; None: all."""
    if few is None:
        return modality
    less = copy.copy(modality)

    def dataset(section: Any, facts: Any, split: str) -> Any:
        data = modality.dataset(section, facts, split)
        return Few(data, few) if split == "train" else data

    less.dataset = dataset
    return less


def judged(name: str, few: int | None, steps: int, args: argparse.Namespace) -> list[str]:
    """Trains one network and judges it; a row of the table."""
    modality = plugins.modality(name)
    overrides = [f"train.steps={steps}", "train.sample_every_steps=0", *SHORT[name][1]]
    with TemporaryDirectory() as folder:
        resolved = config.resolve(modality, overrides=[*overrides, f"out={folder}"])
        facts = modality.prepare(getattr(resolved, name)).facts
        trainer = Trainer(runs.start(taught(modality, few), resolved, facts))
        for _ in trainer.steps():
            pass
        model = trainer.model()
        ids = list(range(args.count))
        samples = join(list(model.batches(ids, model.settings(), args.seed)))
        run = runs.load(Path(model.run.folder))  # whose training items are all
        found = Judge(run, runs.cache_folder(), args.seed).measures(samples, set(SHOWN))
    figures = {m.name: m for m in found}
    told = [f"{figures[n].value:.3g} ({figures[n].floor:.3g})" for n in SHOWN]
    verdicts = [verdict.name for verdict in metrics.verdicts(found, args.count)]
    return [*told, ", ".join(verdicts) or "neither"]


def main() -> None:
    """Trains, judges and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modality", nargs="*", default=[*SHORT], choices=[*SHORT])
    parser.add_argument("--ways", nargs="*", default=[*WAYS], choices=WAYS)
    parser.add_argument("--few", type=int, default=40, help="items that are memorised")
    parser.add_argument("--count", type=int, default=300, help="samples")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    header = ["network", *(name.replace("_", " ") for name in SHOWN), "verdict"]
    print(f"| modality | {' | '.join(header)} |")
    print("|" + "---|" * (len(header) + 1))
    for name in args.modality:
        steps = SHORT[name][0]
        ways = [
            ("untrained", None, 1),
            ("memorising", args.few, 2 * steps),
            ("collapsed", 1, steps),
        ]
        for way, few, count in [*ways, ("taught", None, steps)]:
            if way not in args.ways:
                continue
            row = judged(name, few, count, args)
            print(f"| {name} | {way} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
