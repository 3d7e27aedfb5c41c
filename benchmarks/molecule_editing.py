"""Asked and obtained: steering a trained run's molecules, and building onto parts of others.

    python benchmarks/molecule_editing.py runs/molecule/default --count 200

*Toward a property.* For each one that RDKit computes from a molecule's graph (so no network
judges), the 10, 50 and 90 % quantiles of the training data are asked for. Printed: the mean
absolute error of the valid molecules' true values from what was asked, beside that of samples that
were not steered, and the shares that are valid and unique.

*Keeping a part.* Atoms of small molecules, placed by MMFF94, are kept and a molecule of so many
atoms is asked for. Printed: the shares that are valid and in one piece, beside those of plain
replacement (no conjugate gradients), and how many different molecules there are.

Random numbers are shared between all rows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import gendiff
from gendiff import console
from gendiff.editing import Kept
from gendiff.generate import Model
from gendiff.modality import Request
from gendiff.noise import Streams
from gendiff.samplers import sample, start
from gendiff.spaces import Batch
from gendiff_molecule import embedded, metrics, task

# SMILES, its atoms that are kept, and the atoms of the whole
SCAFFOLDS = [("c1ccoc1", "0,1,2,3,4", 7), ("CC(C)=O", "0,1,3", 6), ("C1CC1", "0,1,2", 7)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    model = gendiff.load(args.run)
    steering(model, args.count)
    keeping(model, args.count)


def steering(model: Model, count: int) -> None:
    """Prints the table of properties."""
    run = model.run
    section: Any = run.section
    smiles = task.loaded(section).train.smiles.tolist()
    free = smiles_of(model.sample(count), model)
    rows = []
    for name in embedded.targets(["C"]):
        values = np.array(embedded.targets(smiles)[name])
        for quantile in (0.1, 0.5, 0.9):
            asked = float(np.quantile(values, quantile))
            steered = smiles_of(model.sample(count, toward={name: asked}), model)
            unsteered = row(free, name, asked)[0]
            rows.append([name, f"{asked:.2f}", *row(steered, name, asked), unsteered])
    names = ["property", "asked", "MAE", "mean", "valid %", "unique %", "MAE unsteered"]
    console.table("", names, rows)


def keeping(model: Model, count: int) -> None:
    """Prints the table of kept parts."""
    rows = []
    with TemporaryDirectory() as folder:
        for smiles, keep, atoms in SCAFFOLDS:
            path = Path(folder) / "part.smi"
            path.write_text(smiles)
            shares = []
            for iterations in (0, Kept.iterations):
                found = smiles_of(kept(model, path, keep, atoms, count, iterations), model)
                valid = [s for s in found if s is not None]
                shares += [f"{100 * len(valid) / count:.0f}", str(len(set(valid)))]
            rows.append([smiles, keep, str(atoms), *shares])
    names = ["molecule", "kept", "atoms", "replacement: valid %", "different"]
    console.table("", [*names, "kept: valid %", "different "], rows)


def kept(model: Model, path: Path, keep: str, atoms: int, count: int, iterations: int) -> Batch:
    """What ``model.sample(source=path, keep=keep)`` draws, at so many conjugate gradients."""
    ids, settings, schedule = list(range(count)), model.settings(), model.denoiser.schedule
    run = model.run
    request = Request(ids, 0, {"atoms": atoms})
    given = run.modality.given(run.section, run.facts, path, keep, request)
    assert given.mask is not None
    x, space, cond = given.batch.x, given.batch.space, given.batch.cond
    bound = model.denoiser.bind(space, cond)
    denoiser = Kept(bound, space, schedule, x, given.mask, iterations)
    streams = Streams(0, tuple(ids))
    times = settings.grid.times(schedule, settings.steps)
    first = start(
        space, schedule, times[0], streams, space.hold(torch.zeros_like(x), x, given.mask)
    )
    return Batch(
        sample(denoiser, space, schedule, settings.sampler, times, streams, first), space, cond
    )


def smiles_of(batch: Batch, model: Model) -> list[str | None]:
    """Of each sample that is valid and connected, else None."""
    found = metrics.judge(task.unpack(model.run.section, model.run.facts, batch))
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
