"""Reading molecules: every file of a folder, piece by piece, and what cannot be used.

The formats are described in :mod:`gendiff_molecule.formats`, what becomes of each item in
:mod:`gendiff_molecule.checks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gendiff.errors import DataError
from gendiff.preparing import spread
from gendiff_molecule import pyg, store
from gendiff_molecule.checks import Piece, Rules, finished
from gendiff_molecule.formats import READERS, Graph, Item, Parsed, Problem, Reading, Tick, suffix
from gendiff_molecule.molecules import Molecules

_TABLES = (".txt", ".csv")  # in a folder, read only if there is nothing else
_HEAVY = 256  # records that are a piece of work; a sixteenth as many SMILES are
_TOLD = 100  # problems that are kept; the others are counted


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
    """Reads a file, a folder of files, or PyG's QM9 folder into memory.

    Args:
        path: What to read. Of a folder, all files of known endings, by name; ``.txt`` and ``.csv``
            files in it only if there are no others.
        skip_bad: Leave out what cannot be used, with a warning.
        max_atoms: Larger molecules cannot be used; hydrogens count.
        tick: Called with (what is being done, how many are done, of how many or 0).
        elements: Atomic numbers that are allowed; None for all.
        bonds: Give each molecule bonds: the file's, else those of EDM's table.

    Raises:
        DataError: Nothing is there or can be used, or something cannot and ``skip_bad`` is False.
    """
    path = Path(path).expanduser()
    rules = Rules(max_atoms, elements, bonds, keys=False)
    with TemporaryDirectory() as folder:
        kept = gather(source_of(path), path.name, rules, Path(folder) / "all", tick)
        warnings = judge(kept.left, path.name, skip_bad)
        found = store.load(Path(folder) / "all")
        molecules = found.select(np.arange(len(found)))
    return Loaded(molecules, kept.split, kept.left.problems, warnings)


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


class Source(Protocol):
    """What is read.

    ``share`` tells how far, of 1; ``split`` gives the split of so many items, where it is a matter
    of their number.
    """

    @property
    def share(self) -> float: ...
    @property
    def split(self) -> Callable[[int], NDArray[np.uint8]] | None: ...
    def __iter__(self) -> Iterator[Item]: ...


def source_of(path: Path) -> Source:
    """What a file, a folder of files, or PyG's QM9 folder holds.

    Raises:
        DataError: Nothing is there.
    """
    if not path.exists():
        raise DataError(f"molecule.path: there is no file or folder {path}.")
    if files := pyg.qm9_files(path):
        return pyg.QM9(files)
    if found := listed(path):
        return Reading(found)
    known = " ".join([*READERS, ".npz"])
    what = "holds no file" if path.is_dir() else "is no file"
    raise DataError(f"data: {path} {what} of a known ending: {known}.")


@dataclass(frozen=True)
class Left:
    """What cannot be used: the first of it, how many there are, of how many in all."""

    problems: tuple[Problem, ...] = ()
    bad: int = 0
    total: int = 0


@dataclass(frozen=True)
class Gathered:
    """What is known of M molecules that lie in a folder.

    Args:
        split: 1 train, 2 validation, 3 test, 0 unknown, (M,), uint8.
        keys: As in :class:`~gendiff_molecule.checks.Piece`.
        left: What could not be used.
    """

    split: NDArray[np.uint8]
    keys: NDArray[np.uint64]
    left: Left


def gather(source: Source, name: str, rules: Rules, folder: Path, tick: Tick) -> Gathered:
    """Writes what can be used of a source to a folder; see :mod:`gendiff_molecule.store`.

    Args:
        source: What is read.
        name: What to call it.
        rules: What is asked of each molecule.
        folder: There is nothing yet.
        tick: Called with (what is being done, how many are done, of how many or 0).
    """
    split, keys, places = (
        [np.empty(0, np.uint8)],
        [np.empty((0, 2), np.uint64)],
        [np.empty(0, int)],
    )
    problems: list[Problem] = []
    total = bad = 0
    with store.Writer(folder, rules.bonds) as writer:
        for piece in _pieces(source, rules):
            writer.append(piece.molecules)
            split.append(piece.split)
            keys.append(piece.keys)
            places.append(total + piece.places)
            problems += piece.problems[: _TOLD - len(problems)]
            bad, total = bad + len(piece.problems), total + piece.count
            tick(f"molecules of {name} ({source.share:.0%} read)", total, 0)
    known = np.concatenate(split)
    if source.split is not None:
        known = source.split(total)[np.concatenate(places)]
    return Gathered(known, np.concatenate(keys), Left(tuple(problems), bad, total))


def _pieces(source: Source, rules: Rules) -> Iterator[Piece]:
    """All that a source holds, parsed, placed and checked in worker processes, in order."""
    return spread(partial(finished, rules=rules), _grouped(source))


def _grouped(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Items in pieces of work of about a second at most, arrays of many molecules on their own."""
    group: list[Item] = []
    weight = 0
    for item in items:
        alone = isinstance(item, Parsed)
        if group and (alone or weight >= _HEAVY):
            yield group
            group, weight = [], 0
        group.append(item)
        weight += _HEAVY if alone else _HEAVY // 16 if isinstance(item, Graph) else 1
    if group:
        yield group


def judge(left: Left, name: str, skip_bad: bool) -> tuple[str, ...]:
    """A warning of what is left out, if anything is.

    Raises:
        DataError: Something cannot be used and must not be left out, or nothing can.
    """
    problems, bad, total = left.problems, left.bad, left.total
    if not bad:
        if not total:
            raise DataError(f"data: {name} holds no molecule. Choose another molecule.path.")
        return ()
    first = f"{problems[0].where}: {problems[0].reason}"
    if bad == total:
        if total == 1:
            raise DataError(f"data: {first}. Choose another molecule.path.")
        raise DataError(
            f"data: none of {total} molecules in {name} can be used (first: {first}). "
            "Choose another molecule.path."
        )
    if not skip_bad:
        them = "it" if bad == 1 else "them"
        raise DataError(
            f"data: {bad} of {total} molecules in {name} cannot be used "
            f"(first: {first}). Remove {them} or set molecule.skip_bad=true."
        )
    named = "; ".join(f"{where}: {reason}" for where, reason in problems[:3])
    more = f"; and {bad - 3} more" if bad > 3 else ""
    return (f"{bad} of {total} molecules in {name} left out: {named}{more}",)
