"""Molecular data sets: found, read and checked once, kept in the cache folder, and split.

The checked arrays are kept in ``$GENDIFF_CACHE`` (else ``$XDG_CACHE_HOME/gendiff``, else
``~/.cache/gendiff``), under a hash of the files' names, sizes and times, of the settings that
matter and of RDKit's version; a damaged entry is made anew. They are written as they are made, and
read from the disk as they are used: a set may be larger than memory, which holds a few numbers a
molecule. (An ``.npz`` file is read whole, so a large set is a folder of several.)

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import rdkit
from numpy.typing import NDArray

from gendiff.data import content_of
from gendiff.errors import ConfigError, DataError, suggest
from gendiff.preparing import written
from gendiff.runs import cache_folder
from gendiff_molecule import embedded, pyg, store
from gendiff_molecule.checks import Rules, hashed
from gendiff_molecule.formats import Item, Parsed, Problem, Tick
from gendiff_molecule.molecules import SYMBOLS, Molecules, Subset
from gendiff_molecule.readers import Gathered, Left, Source, gather, judge, listed, source_of

T = TypeVar("T")

_FORMAT = 3  # of the folders in the cache
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
        tick: Called with (what is being done, how many are done, of how many or 0).

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
        rules = Rules(config.max_atoms, elements, config.needs_bonds)

        def made() -> tuple[Source, str]:
            return source_of(path), _content(path)

        found = _cached(f"files-{_fingerprint(path, rules)}", name, rules, made, tick)
    warnings = judge(found.left, name, config.skip_bad) + found.notes
    train, test = found.train, found.test
    if config.hydrogens == "removed":
        train, test = found.heavy()
    elif 2 * found.bare > len(train):
        warnings += (
            f"{found.bare} of {len(train)} training molecules have no hydrogen atom, but "
            "molecule.hydrogens=explicit: were hydrogens left out of the files?",
        )
    for what, part in (("training", train), ("held-out", test)):
        if not len(part):
            raise DataError(
                f"data: {name} leaves no {what} molecules of {found.left.total}. Add molecules, "
                "or divide them by an array 'split' in an npz file (1 train, 3 test)."
            )
    return Prepared(train, test, warnings, name, found.content)


def split_of(key: str) -> str:
    """``"test"`` for a tenth of all keys, by their hash, else ``"train"``."""
    return "test" if hashed(key) < _TENTH else "train"


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
    shape = f"embedded-{_FORMAT}-{embedded.VERSION}-{config.heavy_atoms}-{config.conformers}"
    shape += f"-rdkit-{rdkit.__version__}"
    content = content_of([shape])
    kinds = "conformer" if config.conformers == 1 else "conformers"
    name = f"embedded (up to {config.heavy_atoms} heavy atoms, {config.conformers} {kinds})"

    def generated() -> tuple[Source, str]:
        made = embedded.generate(config.heavy_atoms, config.conformers, tick)
        return _Held([(0, made)]), content

    whole = _cached(shape, name, Rules(np.iinfo(np.int64).max), generated, tick)
    largest = max(whole.train.sizes.max(), whole.test.sizes.max(initial=0))
    if elements is None and not config.needs_bonds and largest <= config.max_atoms:
        return name, whole
    rules = Rules(config.max_atoms, elements, config.needs_bonds)

    def fitted() -> tuple[Source, str]:
        return _Held([(1, whole.train), (3, whole.test)]), content

    key = _digest([shape, config.max_atoms, sorted(elements or ()), config.needs_bonds])
    return name, _cached(f"embedded-{key}", name, rules, fitted, tick)


class _Held:
    """Embedded molecules as something to read, with the split of each part (0 for none)."""

    split = None

    def __init__(self, parts: Sequence[tuple[int, Molecules]]) -> None:
        self.parts, self.share = parts, 1.0

    def __iter__(self) -> Iterator[Item]:
        for side, molecules in self.parts:
            for piece in molecules.pieces():
                count = len(piece)
                where = [f"embedded molecule {smiles}" for smiles in piece.smiles.tolist()]
                # Bonds are not given: atoms are where the table reads them.
                yield Parsed(piece, where, np.full(count, side, np.uint8), [None] * count)


# --- splits ------------------------------------------------------------------------------------


_TENTH = 2**64 // 10


def _divided(gathered: Gathered) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """The split of each molecule, (M,), and what a person should know of it."""
    split = gathered.split.copy()
    notes: tuple[str, ...] = ()
    unknown = np.flatnonzero(split == 0)
    if len(unknown):
        keys = gathered.keys[unknown, 0]
        if len(unknown) == len(split) > 1 and keys.min() == keys.max():
            notes = ("all molecules are conformers of one: split by conformer",)
            keys = gathered.keys[unknown, 1]
        # At least one of each kind, if two differ.
        held = (keys != keys.max()) & ((keys == keys.min()) | (keys < _TENTH))
        split[unknown] = np.where(held, 3, 1)
    return split, notes


# --- cache -------------------------------------------------------------------------------------


def _digest(facts: Any) -> str:
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()


def _fingerprint(path: Path, rules: Rules) -> str:
    stats = []
    for _, file in _files(path):
        try:
            stat = file.stat()
            stats.append([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
        except OSError:
            stats.append([str(file), "missing"])
    allowed = None if rules.elements is None else sorted(rules.elements)
    asked = [rules.max_atoms, allowed, rules.bonds]
    return _digest([_FORMAT, rdkit.__version__, str(path.resolve()), stats, *asked])


def _files(path: Path) -> list[tuple[str, Path]]:
    return [(file.name, file) for file in pyg.qm9_files(path)] or listed(path)


def _content(path: Path) -> str:
    return content_of(part for named in _files(path) for part in named)


@dataclass(frozen=True)
class _Found:
    """What is cached.

    Args:
        folder: Where.
        train, test: Its molecules, mapped.
        left: What was left out.
        notes: What else a person should know.
        bare: Training molecules without a hydrogen atom.
        content: A name of what was read.
    """

    folder: Path
    train: Molecules
    test: Molecules
    left: Left
    notes: tuple[str, ...]
    bare: int
    content: str

    def heavy(self) -> tuple[Molecules, Molecules]:
        """Both splits without hydrogens, which are made when they are first asked for."""
        parts = (("train", self.train), ("test", self.test))
        train, test = (self._heavy(f"{name}-heavy", part) for name, part in parts)
        return train, test

    def _heavy(self, name: str, molecules: Molecules) -> Molecules:
        folder = self.folder / name
        kept = _read_back(folder, store.load)
        if kept is None:
            with written(folder) as new:
                lean = (piece.without_hydrogens() for piece in molecules.pieces())
                store.write(lean, new, len(molecules.bond_offsets) > 0)
            kept = store.load(folder)
        return kept


def _cached(
    key: str, name: str, rules: Rules, made: Callable[[], tuple[Source, str]], tick: Tick
) -> _Found:
    """What is kept under a key, else what ``made`` gives to read, which is kept then."""
    folder = cache_folder() / "molecule" / key
    found = _read_back(folder, _restored)
    if found is None:
        with written(folder) as new:
            source, content = made()
            asked = replace(rules, keys=source.split is None)
            gathered = gather(source, name, asked, new / "all", tick)
            about = {"content": content, **asdict(gathered.left)} | _parted(new, gathered, rules)
            shutil.rmtree(new / "all")
            (new / "index.json").write_text(json.dumps(about))
        found = _restored(folder)
    return found


def _parted(folder: Path, gathered: Gathered, rules: Rules) -> dict[str, Any]:
    """Writes both splits of the molecules there; what the index says of them."""
    split, notes = _divided(gathered)
    whole = store.load(folder / "all")
    bare = 0

    def train() -> Iterator[Molecules]:
        nonlocal bare
        for piece in Subset(whole, np.flatnonzero(split == 1)).pieces():
            owner = np.repeat(np.arange(len(piece)), piece.sizes)
            bare += len(piece) - len(np.unique(owner[piece.numbers == 1]))
            yield piece

    store.write(train(), folder / "train", rules.bonds)
    test = Subset(whole, np.flatnonzero(split == 3))
    store.write(test.pieces(), folder / "test", rules.bonds)
    return {"notes": notes, "bare": bare, "train": int((split == 1).sum()), "test": len(test)}


def _restored(folder: Path) -> _Found:
    about = json.loads((folder / "index.json").read_text())
    train, test = (store.load(folder / part) for part in ("train", "test"))
    if (len(train), len(test)) != (about["train"], about["test"]):
        raise ValueError("sizes differ")
    problems = tuple(Problem(*problem) for problem in about["problems"])
    left = Left(problems, about["bad"], about["total"])
    notes = tuple(about["notes"])
    return _Found(folder, train, test, left, notes, about["bare"], about["content"])


def _read_back(folder: Path, read: Callable[[Path], T]) -> T | None:
    """What is in a folder, if it is there and whole."""
    if folder.exists():
        try:
            return read(folder)
        except Exception:  # whatever a damaged file makes numpy or json raise
            shutil.rmtree(folder, ignore_errors=True)
    return None
