"""Reading molecules: every file of a folder, SMILES placed in space, and what cannot be used.

The formats are described in :mod:`gendiff_molecule.formats`. SMILES are placed by ETKDGv3 and
MMFF94 (UFF where MMFF94 has no parameters), the same each time with one version of RDKit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from gendiff.errors import DataError
from gendiff.noise import derive_seed
from gendiff_molecule import pyg
from gendiff_molecule.bonds import bond_orders, covered, to_mol
from gendiff_molecule.formats import (
    READERS,
    Graph,
    Item,
    Parsed,
    Problem,
    Record,
    Tick,
    bonds_of,
    items_of,
    stacked,
    suffix,
    unknown_element,
)
from gendiff_molecule.molecules import SYMBOLS, Molecules
from gendiff_molecule.workers import spread

_FEW = 32  # SMILES that are not worth the start of worker processes
_NEAREST = 0.3  # Angstrom: no two atoms are so close
_PAIRS = 1 << 20  # distances computed at a time
_TABLES = (".txt", ".csv")  # in a folder, read only if there is nothing else


@dataclass(frozen=True)
class Loaded:
    """What :func:`read` found.

    Args:
        molecules: The M that can be used.
        split: 1 train, 2 validation, 3 test, 0 unknown, (M,), uint8.
        problems: What was left out.
        warnings: The same for a person, in one line, or nothing.
    """

    molecules: Molecules
    split: NDArray[np.uint8]
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()


def read(
    path: str | Path,
    skip_bad: bool,
    max_atoms: int,
    tick: Tick,
    *,
    elements: frozenset[int] | None = None,
    bonds: bool = False,
) -> Loaded:
    """Reads a file, a folder of files, or PyG's QM9 folder; see :mod:`gendiff_molecule.readers`.

    Args:
        path: What to read. Of a folder, all files of known endings, by name; ``.txt`` and ``.csv``
            files in it only if there are no others.
        skip_bad: Leave out what cannot be used, with a warning.
        max_atoms: Larger molecules cannot be used; hydrogens count.
        tick: Called with (what is being done, how many are done, of how many).
        elements: Atomic numbers that are allowed; None for all.
        bonds: Give each molecule bonds: the file's, else those of EDM's table.

    Raises:
        DataError: Nothing is there or can be used, or something cannot and ``skip_bad`` is False.
    """
    path = Path(path).expanduser()
    gathered = gather(path, max_atoms, elements, bonds, tick)
    warnings = judge(gathered.problems, gathered.total, path.name, skip_bad)
    return Loaded(gathered.molecules, gathered.split, gathered.problems, warnings)


def listed(path: Path) -> list[tuple[str, Path]]:
    """Files of known endings: the path itself, or those below it, by name."""
    if path.is_file():
        return [(path.name, path)] if suffix(path) in (*READERS, ".npz") else []
    found = sorted(
        p
        for p in path.rglob("*")
        if p.is_file()
        and suffix(p) in (*READERS, ".npz")
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    chosen = [p for p in found if suffix(p) not in _TABLES] or found
    return [(p.relative_to(path).as_posix(), p) for p in chosen]


def parse(files: Sequence[tuple[str, Path]], max_atoms: int, tick: Tick) -> list[Parsed | Problem]:
    """Everything that the files hold, in order.

    Args:
        files: The name by which a problem is reported, and the path, of each.
        max_atoms: Larger molecules are not placed.
        tick: Called with (what is being done, how many are done, of how many).
    """
    items: list[Item] = []
    label = files[0][0] if len(files) == 1 else f"{len(files)} files"
    for done, (name, path) in enumerate(files):
        before = len(items)
        items += items_of(name, path)
        if len(items) == before:
            items.append(Problem(name, "holds no molecule"))
        tick(f"arrays of {label}", done + 1, len(files))
    found: list[Parsed | Problem] = []
    for kind, group in groupby(_placed(items, max_atoms, tick), type):
        if kind is Record:
            found.append(stacked([r for r in group if isinstance(r, Record)]))
        else:
            found += [i for i in group if isinstance(i, Parsed | Problem)]
    return found


def merged(parts: Sequence[Parsed]) -> Parsed:
    """All of them as one."""
    sets = [part.molecules for part in parts]
    if not sets:
        return Parsed(Molecules.from_list([]))
    starts = np.cumsum([0, *(len(m.numbers) for m in sets)])
    offsets = [m.offsets[:-1] + start for m, start in zip(sets, starts[:-1], strict=True)]
    names = dict.fromkeys(name for m in sets for name in m.targets)
    molecules = Molecules(
        np.concatenate([m.numbers for m in sets]),
        np.concatenate([m.positions for m in sets]),
        np.concatenate([*offsets, starts[-1:]]).astype(np.int64),
        np.concatenate([m.smiles for m in sets]),
        targets={
            name: np.concatenate(
                [m.targets.get(name, np.full(len(m), np.nan, np.float32)) for m in sets]
            )
            for name in names
        },
    )
    return Parsed(
        molecules,
        list(chain.from_iterable(part.where for part in parts)),
        np.concatenate([part.split for part in parts]),
        list(chain.from_iterable(part.bonds for part in parts)),
    )


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


def _placed(items: Sequence[Item], max_atoms: int, tick: Tick) -> Iterator[Item]:
    """The items with every graph placed in space, on all cores if there are many."""
    graphs = [item.smiles for item in items if isinstance(item, Graph)]
    job = partial(place, max_atoms=max_atoms)
    places_made = spread(job, graphs) if len(graphs) > _FEW else map(job, graphs)
    found = _counted(places_made, len(graphs), tick)
    places = iter(found)
    for item in items:
        if not isinstance(item, Graph):
            yield item
        elif isinstance(done := next(places), str):
            yield Problem(item.where, done)
        else:
            yield Record(item.where, *done, item.targets)


def _counted(places: Iterable[Place | str], total: int, tick: Tick) -> list[Place | str]:
    found = []
    for done in places:
        found.append(done)
        tick("geometries", len(found), total)
    return found


# --- checks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gathered:
    """What can be used of ``total`` molecules, its split as in :class:`Loaded`, and the rest."""

    molecules: Molecules
    split: NDArray[np.uint8]
    problems: tuple[Problem, ...]
    total: int


def gather(
    path: Path, max_atoms: int, elements: frozenset[int] | None, bonds: bool, tick: Tick
) -> Gathered:
    """What :func:`read` reads, with its problems not yet judged."""
    if not path.exists():
        raise DataError(f"molecule.path: there is no file or folder {path}.")
    if files := pyg.qm9_files(path):
        parts = pyg.read_qm9(files, tick)
    elif found := listed(path):
        parts = parse(found, max_atoms, tick)
    else:
        known = " ".join([*READERS, ".npz"])
        what = "holds no file" if path.is_dir() else "is no file"
        raise DataError(f"data: {path} {what} of a known ending: {known}.")
    return checked(parts, max_atoms, elements, bonds, tick)


def checked(
    parts: Sequence[Parsed | Problem],
    max_atoms: int,
    elements: frozenset[int] | None,
    bonds: bool,
    tick: Tick,
) -> Gathered:
    """The molecules that can be used, and why the others cannot."""
    parsed = merged([part for part in parts if isinstance(part, Parsed)])
    molecules = parsed.molecules
    reasons = _reasons(molecules, max_atoms, elements)
    if bonds:
        for i in np.flatnonzero([known is None for known in parsed.bonds]).tolist():
            if i not in reasons and not covered(molecules[i][0]):
                z = next(z for z in molecules[i][0].tolist() if not covered(np.array([z])))
                reasons[i] = f"no bonds are given, and the table has none of {SYMBOLS[z]}"
    good = np.array([i for i in range(len(molecules)) if i not in reasons], np.int64)
    problems = [part for part in parts if isinstance(part, Problem)]
    problems += [Problem(parsed.where[i], reason) for i, reason in sorted(reasons.items())]
    chosen = molecules.select(good)
    if bonds:
        chosen = _bonded(chosen, [parsed.bonds[i] for i in good.tolist()], tick)
    if not any(chosen.smiles.tolist()):
        chosen = replace(chosen, smiles=np.empty(0, dtype=str))
    total = len(molecules) + len(problems) - len(reasons)
    return Gathered(chosen, parsed.split[good], tuple(problems), total)


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


def _bonded(
    molecules: Molecules, known: Sequence[NDArray[np.int16] | None], tick: Tick
) -> Molecules:
    """Fills in the bonds, and SMILES where the table tells them for sure."""
    smiles, bonds = molecules.smiles.tolist(), []
    for i, given in enumerate(known):
        if given is None:
            given, text = _tabled(*molecules[i])
            smiles[i] = smiles[i] or text
        bonds.append(given)
        if (i + 1) % 1000 == 0 or i + 1 == len(known):
            tick("bonds", i + 1, len(known))
    pairs = Molecules.from_list([], bonds=bonds)
    return replace(
        molecules,
        smiles=np.array(smiles, dtype=str),
        bonds=pairs.bonds,
        bond_offsets=pairs.bond_offsets,
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


def judge(problems: Sequence[Problem], total: int, name: str, skip_bad: bool) -> tuple[str, ...]:
    """A warning of what is left out, if anything is.

    Raises:
        DataError: Something cannot be used and must not be left out, or nothing can.
    """
    if not problems:
        if not total:
            raise DataError(f"data: {name} holds no molecule. Choose another molecule.path.")
        return ()
    first = f"{problems[0].where}: {problems[0].reason}"
    if len(problems) == total:
        if total == 1:
            raise DataError(f"data: {first}. Choose another molecule.path.")
        raise DataError(
            f"data: none of {total} molecules in {name} can be used (first: {first}). "
            "Choose another molecule.path."
        )
    if not skip_bad:
        them = "it" if len(problems) == 1 else "them"
        raise DataError(
            f"data: {len(problems)} of {total} molecules in {name} cannot be used "
            f"(first: {first}). Remove {them} or set molecule.skip_bad=true."
        )
    named = "; ".join(f"{where}: {reason}" for where, reason in problems[:3])
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return (f"{len(problems)} of {total} molecules in {name} left out: {named}{more}",)
