"""What worker processes do with what is read: parse it, place it in space, check it.

SMILES are placed by ETKDGv3 and MMFF94 (UFF where MMFF94 has no parameters), the same each time
with one version of RDKit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from gendiff.noise import derive_seed
from gendiff_molecule.bonds import bond_orders, covered, to_mol
from gendiff_molecule.formats import (
    Block,
    Frame,
    Graph,
    Item,
    Parsed,
    Problem,
    Record,
    bonds_of,
    frame,
    molblock,
    stacked,
    unknown_element,
)
from gendiff_molecule.molecules import SYMBOLS, Molecules

_NEAREST = 0.3  # Angstrom: no two atoms are so close
_PAIRS = 1 << 18  # distances computed at a time


@dataclass(frozen=True)
class Rules:
    """What is asked of a molecule; see :func:`read`.

    Args:
        max_atoms: Its most atoms.
        elements: Its atomic numbers, or None for all.
        bonds: Whether it needs bonds.
        keys: Whether it needs keys for a split.
    """

    max_atoms: int
    elements: frozenset[int] | None = None
    bonds: bool = False
    keys: bool = True


@dataclass(frozen=True)
class Piece:
    """Items that are read and checked.

    Args:
        molecules: The M that can be used.
        places: Their numbers among the items, (M,).
        split: 1 train, 2 validation, 3 test, 0 unknown, (M,), uint8.
        keys: Hashes of each graph, which conformers share, and of its positions, where the split
            is unknown and keys are needed, (M, 2), uint64.
        problems: The other items.
        count: How many items there were.
    """

    molecules: Molecules
    places: NDArray[np.int64]
    split: NDArray[np.uint8]
    keys: NDArray[np.uint64]
    problems: list[Problem]
    count: int


def _record(item: Item, max_atoms: int) -> Record | Problem:
    """A text parsed, a graph placed."""
    done: Item | Record = item
    if isinstance(done, Block):
        done = molblock(done)
    if isinstance(done, Frame):
        done = frame(done)
    if isinstance(done, Graph):
        found = place(done.smiles, max_atoms)
        if isinstance(found, str):
            return Problem(done.where, found)
        return Record(done.where, *found, done.targets)
    assert isinstance(done, Record | Problem)
    return done


def finished(items: list[Item], rules: Rules) -> Piece:
    """The molecules of some items: texts and graphs, or one array of many molecules."""
    bad: dict[int, Problem] = {}
    if isinstance(items[0], Parsed):
        parsed = items[0]
        places = np.arange(len(parsed.where))
    else:
        done = [_record(item, rules.max_atoms) for item in items]
        bad = {i: item for i, item in enumerate(done) if isinstance(item, Problem)}
        places = np.array([i for i in range(len(done)) if i not in bad], np.int64)
        parsed = stacked([item for item in done if isinstance(item, Record)])
    molecules = parsed.molecules
    reasons = _reasons(molecules, rules.max_atoms, rules.elements)
    if rules.bonds:
        for i in np.flatnonzero([known is None for known in parsed.bonds]).tolist():
            if i not in reasons and not covered(molecules[i][0]):
                z = next(z for z in molecules[i][0].tolist() if not covered(np.array([z])))
                reasons[i] = f"no bonds are given, and the table has none of {SYMBOLS[z]}"
    count = len(bad) + len(molecules)
    bad |= {int(places[i]): Problem(parsed.where[i], why) for i, why in reasons.items()}
    good = np.array([i for i in range(len(molecules)) if i not in reasons], np.int64)
    chosen, split = molecules.select(good), parsed.split[good]
    if rules.bonds:
        chosen = _bonded(chosen, [parsed.bonds[i] for i in good.tolist()])
    keys = np.zeros((len(chosen), 2), np.uint64)
    if rules.keys:
        for i in np.flatnonzero(split == 0).tolist():
            keys[i] = hashed(_key(chosen, i)), hashed(chosen[i][1].round(2).tobytes().hex())
    return Piece(chosen, places[good], split, keys, [bad[i] for i in sorted(bad)], count)


def _key(molecules: Molecules, i: int) -> str:
    """What conformers of molecule i share."""
    if len(molecules.smiles) and molecules.smiles[i]:
        return str(molecules.smiles[i])
    numbers, positions = molecules[i]
    if not covered(numbers):
        return str(np.bincount(numbers).tolist())
    return Chem.MolToSmiles(to_mol(numbers, bond_orders(numbers, positions)))


def hashed(key: str) -> int:
    """64 bits of a text's hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _too_large(atoms: int, max_atoms: int) -> str:
    """The reason that a large molecule is refused for."""
    return f"{atoms} atoms, more than molecule.max_atoms={max_atoms}"


def _reasons(
    molecules: Molecules, max_atoms: int, elements: frozenset[int] | None
) -> dict[int, str]:
    """Why a molecule cannot be used, by its number."""
    sizes, count = molecules.sizes, len(molecules)
    owner = np.repeat(np.arange(count), sizes)
    found: dict[int, str] = {}

    def note(which: NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        for i in np.flatnonzero(which).tolist():
            found.setdefault(i, reason(i))

    def owners(rows: Any) -> NDArray[np.bool_]:
        return np.bincount(owner[rows], minlength=count) > 0

    finite = np.isfinite(molecules.positions).all(1)
    note(sizes == 0, lambda i: "no atoms")
    note(owners(molecules.numbers == 0), lambda i: "unknown element (known: H to Xe)")
    note(owners(~finite), lambda i: "NaN or infinite coordinates")
    note(sizes > max_atoms, lambda i: _too_large(int(sizes[i]), max_atoms))
    note((sizes > 1) & ~owners(molecules.positions.any(1)), lambda i: "all coordinates are 0")
    if elements is not None:
        alien = ~np.isin(molecules.numbers, sorted(elements))
        first = {
            int(o): int(z) for o, z in zip(owner[alien], molecules.numbers[alien], strict=True)
        }
        note(owners(alien), lambda i: f"{SYMBOLS[first[i]]} is not in molecule.elements")
    fine = np.array([i not in found for i in range(count)], bool)
    nearest = _nearest(molecules, np.flatnonzero(fine))
    note(nearest < _NEAREST, lambda i: f"two atoms {nearest[i]:.2f} Angstrom apart")
    return found


def _nearest(molecules: Molecules, which: NDArray[np.int64]) -> NDArray[np.float32]:
    """The smallest distance in each chosen molecule, inf for single atoms and the rest, (M,)."""
    found = np.full(len(molecules), np.inf, np.float32)
    sizes = molecules.sizes[which]
    for size in np.unique(sizes[sizes > 1]).tolist():
        first, second = np.triu_indices(size, 1)
        alike = which[sizes == size]
        for some in np.array_split(alike, len(alike) * len(first) // _PAIRS + 1):
            rows = molecules.offsets[some][:, None] + np.arange(size)
            x = molecules.positions[rows]  # (m, N, 3)
            with np.errstate(over="ignore"):
                squares = np.square(x[:, first] - x[:, second]).sum(-1)
            found[some] = np.sqrt(squares.min(1))
    return found


def _bonded(molecules: Molecules, known: Sequence[NDArray[np.int16] | None]) -> Molecules:
    """Fills in the bonds, and SMILES where the table tells them for sure."""
    smiles, bonds = molecules.smiles.tolist(), []
    for i, given in enumerate(known):
        if given is None:
            given, text = _tabled(*molecules[i])
            smiles[i] = smiles[i] or text
        bonds.append(given)
    pairs = Molecules.from_list([], bonds=bonds)
    return replace(
        molecules,
        smiles=np.array(smiles, dtype=str),
        bonds=pairs.bonds,
        bond_offsets=pairs.bond_offsets if bonds else np.zeros(1, np.int64),
    )


def _tabled(
    numbers: NDArray[np.uint8], positions: NDArray[np.float32]
) -> tuple[NDArray[np.int16], str]:
    """Bonds by EDM's table (aromatic where RDKit sees it), and SMILES if no valence is open."""
    mol = to_mol(numbers, bond_orders(numbers, positions))
    clean = Chem.Mol(mol)
    if Chem.SanitizeMol(clean, catchErrors=True):
        return bonds_of(mol), ""
    whole = not any(a.GetNumImplicitHs() or a.GetNumRadicalElectrons() for a in clean.GetAtoms())
    return bonds_of(clean), Chem.MolToSmiles(Chem.RemoveHs(clean)) if whole else ""


# --- SMILES in space ---------------------------------------------------------------------------


_MOST_PLACED = 1000  # atoms of a SMILES, hydrogens included
Place = tuple[list[int], NDArray[np.float64], str, NDArray[np.int16]]


def place(smiles: str, max_atoms: int) -> Place | str:
    """A structure of a SMILES, hydrogens included, or why there is none.

    Returns:
        Atomic numbers (N,), positions in Angstrom (N, 3), canonical SMILES, bonds (E, 3).
    """
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        return f"RDKit cannot read the SMILES '{smiles[:60]}'"
    if not mol.GetNumAtoms():
        return "no atoms"
    # Before what takes minutes for a long chain.
    if (count := mol.GetNumAtoms(onlyExplicit=False)) > max_atoms:
        return _too_large(count, max_atoms)
    if count > _MOST_PLACED:
        return f"{count} atoms, more than {_MOST_PLACED}: give their positions, in an sdf file"
    canonical = Chem.MolToSmiles(mol)
    mol = Chem.AddHs(mol)
    numbers = [a.GetAtomicNum() for a in mol.GetAtoms()]
    odd = [a.GetSymbol() for a in mol.GetAtoms() if not 0 < a.GetAtomicNum() < len(SYMBOLS)]
    if odd:
        return unknown_element(odd[0])
    parameters: Any = rdDistGeom.ETKDGv3()
    parameters.randomSeed = 1 + derive_seed("conformers", canonical, 0) % 10_000_000
    parameters.maxIterations = 50
    nowhere = f"RDKit finds no 3D structure of '{smiles[:60]}'"
    try:
        if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
            parameters.useRandomCoords = True
            if rdDistGeom.EmbedMolecule(mol, parameters) < 0:
                return nowhere
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=2000)
        elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
            rdForceFieldHelpers.UFFOptimizeMolecule(mol, maxIters=2000)
        else:
            return "neither MMFF94 nor UFF has parameters for it"
    except (RuntimeError, ValueError, MemoryError):
        return nowhere
    return numbers, mol.GetConformer().GetPositions(), canonical, bonds_of(mol)
