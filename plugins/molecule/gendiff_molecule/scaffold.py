"""Molecules from a file as the start of others: what is kept of them, what is made anew."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem

from gendiff.errors import ConfigError, DataError
from gendiff.modality import Given, Request
from gendiff.spaces import Batch, Ragged
from gendiff_molecule import asked, readers
from gendiff_molecule.bonds import to_mol
from gendiff_molecule.molecules import SYMBOLS, Molecules

if TYPE_CHECKING:
    from gendiff_molecule.plugin import MoleculeConfig


def given(
    config: MoleculeConfig,
    facts: Mapping[str, Any],
    path: Path,
    keep: str | None,
    request: Request,
) -> Given:
    """See :meth:`gendiff.Modality.given`.

    Kept atoms come first, in the file's order. Without ``keep`` a sample has the file's atoms;
    with it the number of atoms that is asked for (``atoms``), else one from the data's histogram
    beyond the kept ones.

    Args:
        config: The section.
        facts: The data's facts.
        path: A file that holds one molecule (see :mod:`gendiff_molecule.readers`).
        keep: A SMARTS pattern, whose first match is kept, or atoms by their numbers in the file,
            from 0: ``0,1,2``.
        request: Which samples.

    Raises:
        ConfigError: ``keep`` picks nothing, or the numbers of atoms contradict each other.
        DataError: The file cannot be used.
    """
    if config.task == "conformer":
        raise ConfigError("edit: a model of conformers cannot edit. Train with task=generate")
    numbers, positions, mol = _molecule(config, facts, path)
    if keep is None:
        kept = np.arange(0)
        same = request.values.get("atoms", len(numbers))
        if same != len(numbers):
            raise ConfigError(f"atoms: {same}, but {path.name} has {len(numbers)}; leave it out")
        request = Request(request.ids, request.seed, {**request.values, "atoms": len(numbers)})
    else:
        kept = _kept(mol, keep)
    space, cond = asked.templates(config, facts, request, len(kept) + (keep is not None))
    assert isinstance(space, Ragged)
    if int(space.sizes.min()) < len(kept):
        raise ConfigError(
            f"atoms: {int(space.sizes.min())}, but {len(kept)} are kept. Ask for more"
        )
    rest = np.setdiff1d(np.arange(len(numbers)), kept)
    order = np.concatenate([kept, rest])
    code = np.eye(len(facts["elements"]), dtype=np.float32)
    types = code[[facts["elements"].index(z) for z in numbers.tolist()]] * config.type_scale
    known = torch.from_numpy(np.concatenate([positions, types], 1)[order])
    rows, masks = [], []
    for size in space.sizes.tolist():
        row = torch.full((size, space.columns), float("nan"))
        if size == len(numbers):
            row[:] = known
        else:
            row[: len(kept)] = known[: len(kept)]
        rows.append(row)
        masks.append((torch.arange(size) < len(kept))[:, None].expand(-1, space.columns))
    x = torch.cat(rows)
    if keep is None:
        return Given(Batch(space.project(x), space, cond))
    return Given(Batch(x, space, cond), torch.cat(masks))


def _molecule(
    config: MoleculeConfig, facts: Mapping[str, Any], path: Path
) -> tuple[NDArray[np.uint8], NDArray[np.float32], Chem.Mol]:
    """Atomic numbers (N,), positions (N, 3) and the graph of the file's molecule."""
    if not path.is_file():
        raise DataError(f"edit: {path} is no file")
    found: Molecules = readers.read(
        path, False, config.max_atoms, lambda *_: None, bonds=True
    ).molecules
    if len(found) != 1:
        raise DataError(f"edit: {path} holds {len(found)} molecules. Give a file with one")
    if config.hydrogens == "removed":
        found = found.without_hydrogens()
        if not len(found):
            raise DataError(f"edit: {path} has no heavy atom, and the model makes no others")
    numbers, positions = found[0]
    for z in numbers.tolist():
        if z not in facts["elements"]:
            known = " ".join(SYMBOLS[e] for e in facts["elements"])
            raise DataError(f"edit: {path} has {SYMBOLS[z]}, the model knows {known} only")
    orders = np.zeros((len(numbers), len(numbers)), np.int8)
    first, second, order = found.bonds_of(0).T
    orders[first, second] = orders[second, first] = order
    return numbers, positions, to_mol(numbers, orders)


def _kept(mol: Chem.Mol, keep: str) -> NDArray[np.int64]:
    """The atoms that are kept, in the file's order."""
    if re.fullmatch(r"\d+(,\d+)*", keep):
        kept = sorted({int(number) for number in keep.split(",")})
        if kept[-1] >= mol.GetNumAtoms():
            raise ConfigError(
                f"keep: atom {kept[-1]} is not there, the file's are 0 to {mol.GetNumAtoms() - 1}"
            )
        return np.array(kept)
    pattern = Chem.MolFromSmarts(keep)
    if pattern is None:
        raise ConfigError(f"keep: '{keep}' is neither a SMARTS pattern nor numbers as in 0,1,2")
    mol = Chem.Mol(mol)
    Chem.SanitizeMol(mol, catchErrors=True)
    match = mol.GetSubstructMatch(pattern)
    if not match:
        raise ConfigError(f"keep: nothing in the file matches '{keep}'")
    return np.array(sorted(match))
