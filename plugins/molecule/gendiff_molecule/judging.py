"""Which figures a task has, and what they need from the data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendiff.modality import Measure
from gendiff.preparing import Told, spread
from gendiff.runs import write_atomically
from gendiff.spaces import Batch
from gendiff_molecule import conformers, metrics, properties, task
from gendiff_molecule.molecules import Molecules, Subset

if TYPE_CHECKING:
    from gendiff_molecule.plugin import MoleculeConfig


def measure(
    config: MoleculeConfig, facts: Mapping[str, Any], samples: Batch, cache: Path, seed: int
) -> Iterator[Measure]:
    """All figures of the configuration's task; see :meth:`gendiff.Modality.metrics`."""
    molecules = task.unpack(config, facts, samples)
    if config.task == "conformer":
        yield from conformers.measure(_by_smiles(facts, molecules), seed)
        return
    prepared = task.loaded(config)
    known = _train_smiles(task.training(config, prepared), cache)
    if config.condition:
        yield from properties.measure(config, facts, samples, cache, seed)
    yield from metrics.measure(molecules, known, prepared.test, config.hydrogens, seed)


def _by_smiles(facts: Mapping[str, Any], molecules: Molecules) -> dict[str, list[Any]]:
    """Conformers by the molecule they are of, found by its graph."""
    owners = {}
    for smiles in facts["asked"]:
        numbers, bonds = conformers.graph(smiles)
        owners[numbers.tobytes(), _edges(bonds)] = smiles
    found: dict[str, list[Any]] = {}
    for i, (numbers, positions) in enumerate(molecules):
        owner = owners.get((numbers.tobytes(), _edges(molecules.bonds_of(i))))
        if owner is not None:
            found.setdefault(owner, []).append((numbers, positions))
    return found


def _edges(bonds: Any) -> frozenset[tuple[int, int, int]]:
    return frozenset((min(i, j), max(i, j), order) for i, j, order in bonds.tolist())


def _train_smiles(train: Subset, cache: Path) -> set[str]:
    """What the table reads from the training molecules; kept, for it takes a minute on QM9."""
    digest = hashlib.sha256()
    for piece in train.pieces():
        digest.update(piece.numbers.tobytes() + piece.positions.tobytes())
    path = cache / f"molecule-smiles-{digest.hexdigest()[:16]}.txt"
    if not path.is_file():
        found: set[str] = set()
        told, done = Told(), 0
        for smiles in spread(metrics.table_smiles, train.pieces()):
            found.update(s for s in smiles if s is not None)
            done += len(smiles)
            told("SMILES of training molecules", done, len(train))
        write_atomically(path, "\n".join(sorted(found)))
    return set(path.read_text().split("\n"))
