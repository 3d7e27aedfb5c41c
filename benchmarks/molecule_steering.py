"""Asked and obtained: what steering towards a property does to a trained run's molecules.

    python benchmarks/molecule_steering.py runs/molecule/default --count 200

For each property that RDKit computes from a molecule's graph (so no network judges), the 10, 50
and 90 % quantiles of the training data are asked for. Printed: the mean absolute error of the
valid molecules' true values from what was asked, beside that of samples that were not steered, and
the shares that are valid and unique. Random numbers are shared between all rows.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import gendiff
from gendiff import console
from gendiff_molecule import embedded, metrics, task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    model = gendiff.load(args.run)
    run = model.run
    section: Any = run.section
    train = task.training(section, task.loaded(section))
    free = smiles_of(model.sample(args.count), run)
    rows = []
    for name in embedded.targets(["C"]):
        values = np.array(embedded.targets(train.smiles.tolist())[name])
        for quantile in (0.1, 0.5, 0.9):
            asked = float(np.quantile(values, quantile))
            steered = smiles_of(model.sample(args.count, toward={name: asked}), run)
            rows.append(
                [name, f"{asked:.2f}", *row(steered, name, asked), row(free, name, asked)[0]]
            )
    names = ["property", "asked", "MAE", "mean", "valid %", "unique %", "MAE unsteered"]
    console.table("", names, rows)


def smiles_of(batch: Any, run: Any) -> list[str | None]:
    """Of each sample that is valid and connected, else None."""
    found = metrics.judge(task.unpack(run.section, run.facts, batch))
    return [s if one else None for s, one in zip(found.smiles, found.connected, strict=True)]


def row(smiles: list[str | None], name: str, asked: float) -> list[str]:
    """Error, mean, and the shares of the valid and of the different."""
    valid = [s for s in smiles if s is not None]
    values = np.array(embedded.targets(valid)[name])
    error, mean = np.abs(values - asked).mean(), values.mean()
    shares = [100 * len(valid) / len(smiles), 100 * len(set(valid)) / max(len(valid), 1)]
    return [f"{error:.2f}", f"{mean:.2f}", *(f"{share:.1f}" for share in shares)]


if __name__ == "__main__":
    main()
