"""Molecular data sets: found, read and checked once, kept in the cache folder, and split.

The checked arrays are kept in ``$GENDIFF_CACHE`` (else ``$XDG_CACHE_HOME/gendiff``, else
``~/.cache/gendiff``), under a hash of the files' names, sizes and times, of the settings that
matter and of RDKit's version; a damaged entry is made anew.

Splits are a function of the data alone. QM9's folder and ``.npz`` files keep their own (the
validation part is not used). Elsewhere a molecule is held out when the hash of its SMILES is in
the lowest tenth of all hashes: conformers of one molecule fall on one side. Where no SMILES is
known, the graph that EDM's bond table reads stands in, or the composition if an element is not in
the table.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import rdkit
from rdkit import Chem

from gendiff.data import content_of
from gendiff.errors import ConfigError, DataError, suggest
from gendiff.runs import cache_folder
from gendiff_molecule import embedded, pyg
from gendiff_molecule.bonds import bond_orders, covered, to_mol
from gendiff_molecule.formats import Parsed, Problem, Tick
from gendiff_molecule.molecules import SYMBOLS, Molecules
from gendiff_molecule.readers import Gathered, checked, gather, judge, listed

_FORMAT = 2  # of the folders in the cache
_FETCH = "torch_geometric.datasets.QM9(root=FOLDER) fetches it"


class Settings(Protocol):
    """What :func:`load` needs of a configuration."""

    @property
    def data(self) -> Literal["embedded", "qm9", "files"]: ...
    @property
    def path(self) -> str | None: ...
    @property
    def hydrogens(self) -> Literal["removed", "explicit"]: ...
    @property
    def elements(self) -> tuple[str, ...] | None: ...
    @property
    def max_atoms(self) -> int: ...
    @property
    def skip_bad(self) -> bool: ...
    @property
    def heavy_atoms(self) -> int: ...
    @property
    def conformers(self) -> int: ...
    @property
    def needs_bonds(self) -> bool: ...


@dataclass(frozen=True)
class Prepared:
    """A data set ready for use: both splits, what a person should know, and its name.

    ``content`` names what was read.
    """

    train: Molecules
    test: Molecules
    warnings: tuple[str, ...] = ()
    summary_name: str = ""
    content: str = ""


def load(config: Settings, tick: Tick) -> Prepared:
    """Both splits of the data that a configuration names, from the cache if they are there.

    Args:
        config: The section ``molecule``.
        tick: Called with (what is being done, how many are done, of how many).

    Raises:
        ConfigError: ``path`` is not set, or ``elements`` names an unknown symbol.
        DataError: The data are missing, damaged or empty, or the cache cannot be written.
    """
    elements = _allowed(config)
    if config.data == "embedded":
        name, found = _embedded(config, elements, tick)
    else:
        path = _source(config)
        name = "QM9" if config.data == "qm9" else path.name
        key = _fingerprint(path, config.max_atoms, elements, config.needs_bonds)
        found = _cached(
            f"files-{key}",
            lambda: replace(
                _divided(gather(path, config.max_atoms, elements, config.needs_bonds, tick)),
                content=_content(path),
            ),
        )
    warnings = judge(found.problems, found.total, name, config.skip_bad) + found.notes
    train, test = found.train, found.test
    if config.hydrogens == "removed":
        train, test = train.without_hydrogens(), test.without_hydrogens()
    else:
        warnings += _bare(train)
    for what, part in (("training", train), ("held-out", test)):
        if not len(part):
            raise DataError(
                f"data: {name} leaves no {what} molecules of {found.total}. Add molecules, or "
                "divide them by an array 'split' in an npz file (1 train, 3 test)."
            )
    return Prepared(train, test, warnings, name, found.content)


def split_of(key: str) -> str:
    """``"test"`` for a tenth of all keys, by their hash, else ``"train"``."""
    return "test" if _hash(key) < _TENTH else "train"


# --- what to read ------------------------------------------------------------------------------


def _allowed(config: Settings) -> frozenset[int] | None:
    if config.elements is None:
        return None
    for symbol in config.elements:
        if symbol not in SYMBOLS[1:]:
            raise ConfigError(
                f"molecule.elements: '{symbol}' is no element from H to Xe."
                f"{suggest(symbol, SYMBOLS[1:])}"
            )
    hidden = {1} if config.hydrogens == "removed" else set()
    return frozenset({SYMBOLS.index(symbol) for symbol in config.elements} | hidden)


def _source(config: Settings) -> Path:
    """The path of the configuration, known to be there."""
    if config.path is None:
        what = f"PyG's QM9 folder ({_FETCH})" if config.data == "qm9" else "a file or a folder"
        raise ConfigError(f"molecule.path: not set. Give {what}.")
    path = Path(config.path).expanduser()
    if not path.exists():
        hint = f" {_FETCH}." if config.data == "qm9" else ""
        raise DataError(f"molecule.path: there is no file or folder {path}.{hint}")
    if config.data == "qm9" and path.is_dir() and not pyg.qm9_files(path):
        raise DataError(
            f"molecule.path: {path} is not PyG's QM9 folder: no raw/gdb9.sdf. {_FETCH}; "
            "for other molecules set molecule.data=files."
        )
    return path


def _embedded(config: Settings, elements: frozenset[int] | None, tick: Tick) -> tuple[str, _Found]:
    shape = (
        f"embedded-{_FORMAT}-{embedded.VERSION}-{config.heavy_atoms}-{config.conformers}"
        f"-rdkit-{rdkit.__version__}"
    )
    most = np.iinfo(np.int64).max

    def made() -> _Found:
        molecules = embedded.generate(config.heavy_atoms, config.conformers, tick)
        parts = [_of_smiles(molecules)]
        found = _divided(checked(parts, int(most), None, False, tick))
        return replace(found, content=content_of([shape]))

    def fitted() -> _Found:
        whole = _cached(shape, made)
        parts = [
            checked([_of_smiles(part, side)], config.max_atoms, elements, config.needs_bonds, tick)
            for side, part in ((1, whole.train), (3, whole.test))
        ]
        problems = tuple(p for part in parts for p in part.problems)
        both = parts[0].molecules, parts[1].molecules
        return _Found(*both, problems, whole.total, content=whole.content)

    kinds = "conformer" if config.conformers == 1 else "conformers"
    name = f"embedded (up to {config.heavy_atoms} heavy atoms, {config.conformers} {kinds})"
    if elements is None and not config.needs_bonds:
        found = _cached(shape, made)
        if max(*found.train.sizes, *found.test.sizes) <= config.max_atoms:
            return name, found
    key = _digest([shape, config.max_atoms, sorted(elements or ()), config.needs_bonds])
    return name, _cached(f"embedded-{key}", fitted)


def _of_smiles(molecules: Molecules, side: int = 0) -> Parsed:
    """Molecules whose atoms are in the order of their SMILES."""
    count = len(molecules)
    return Parsed(
        molecules,
        [f"embedded molecule {smiles}" for smiles in molecules.smiles.tolist()],
        np.full(count, side, np.uint8),
        [None] * count,
    )


def _bare(molecules: Molecules) -> tuple[str, ...]:
    """A warning where explicit hydrogens are asked for and most molecules have none."""
    owner = np.repeat(np.arange(len(molecules)), molecules.sizes)
    bare = len(molecules) - len(np.unique(owner[molecules.numbers == 1]))
    if 2 * bare <= len(molecules):
        return ()
    return (
        f"{bare} of {len(molecules)} training molecules have no hydrogen atom, but "
        "molecule.hydrogens=explicit: were hydrogens left out of the files?",
    )


# --- splits ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What is cached."""

    train: Molecules
    test: Molecules
    problems: tuple[Problem, ...] = ()
    total: int = 0
    notes: tuple[str, ...] = ()
    content: str = ""


def _divided(gathered: Gathered) -> _Found:
    molecules, split = gathered.molecules, gathered.split.copy()
    notes: tuple[str, ...] = ()
    unknown = np.flatnonzero(split == 0)
    if len(unknown):
        keys = [_key(molecules, i) for i in unknown.tolist()]
        if len(unknown) == len(split) > 1 and len(set(keys)) == 1:
            notes = ("all molecules are conformers of one: split by conformer",)
            keys = [molecules[i][1].round(2).tobytes().hex() for i in unknown.tolist()]
        split[unknown] = np.where(_held_out(keys), 3, 1)
    train, test = molecules.select(split == 1), molecules.select(split == 3)
    return _Found(train, test, gathered.problems, gathered.total, notes)


def _key(molecules: Molecules, i: int) -> str:
    """What conformers of molecule i share."""
    if len(molecules.smiles) and molecules.smiles[i]:
        return str(molecules.smiles[i])
    numbers, positions = molecules[i]
    if not covered(numbers):
        return str(np.bincount(numbers).tolist())
    return Chem.MolToSmiles(to_mol(numbers, bond_orders(numbers, positions)))


_TENTH = (2**64 // 10).to_bytes(8, "big")


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=8).digest()


def _held_out(keys: Sequence[str]) -> list[bool]:
    """True for the keys of :func:`split_of`'s tenth; at least one of each kind if two differ."""
    hashes = [_hash(key) for key in keys]
    lowest, highest = min(hashes), max(hashes)
    return [h != highest and (h == lowest or h < _TENTH) for h in hashes]


# --- cache -------------------------------------------------------------------------------------


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _fingerprint(path: Path, max_atoms: int, elements: frozenset[int] | None, bonds: bool) -> str:
    stats = []
    for _, file in _files(path):
        try:
            stat = file.stat()
            stats.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
        except OSError:
            stats.append([str(file), "missing"])
    allowed = None if elements is None else sorted(elements)
    return _digest(
        [_FORMAT, rdkit.__version__, str(path.resolve()), stats, max_atoms, allowed, bonds]
    )


def _files(path: Path) -> list[tuple[str, Path]]:
    return [(file.name, file) for file in pyg.qm9_files(path)] or listed(path)


def _content(path: Path) -> str:
    return content_of(part for named in _files(path) for part in named)


def _cached(name: str, build: Callable[[], _Found]) -> _Found:
    """What is kept under a name, else what ``build`` makes, which is kept then."""
    folder = cache_folder() / "molecule" / name
    if folder.exists():
        try:
            return _restored(folder)
        except Exception:  # whatever a damaged file makes numpy, zlib or json raise
            shutil.rmtree(folder, ignore_errors=True)
    found = build()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    try:
        found.train.save(temporary / "train.npz")
        found.test.save(temporary / "test.npz")
        about = {"problems": found.problems, "total": found.total, "notes": found.notes}
        about["content"] = found.content
        sizes = {"train": len(found.train), "test": len(found.test)}
        (temporary / "index.json").write_text(json.dumps(about | sizes))
        if not folder.exists():  # another process may have been faster
            temporary.rename(folder)
    except OSError as error:
        if not folder.exists():
            raise _unwritable(folder.parent, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _restored(folder: Path) -> _Found:
    about = json.loads((folder / "index.json").read_text())
    train, test = (Molecules.load(folder / f"{part}.npz") for part in ("train", "test"))
    if (len(train), len(test)) != (about["train"], about["test"]):
        raise ValueError("sizes differ")
    problems = tuple(Problem(*problem) for problem in about["problems"])
    notes = tuple(about["notes"])
    return _Found(train, test, problems, about["total"], notes, about["content"])


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"data: cannot write to the cache folder {folder} ({error}). "
        "Set the environment variable GENDIFF_CACHE to a folder with space."
    )
