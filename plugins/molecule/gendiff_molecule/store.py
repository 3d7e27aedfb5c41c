"""Molecules in a folder: written piece by piece, and read where they lie, never as a whole.

The folder holds an array a file, as :class:`~gendiff_molecule.molecules.Molecules` names them;
SMILES as bytes one after the other, with their offsets; targets by number, their names in
``targets.json``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gendiff.errors import DataError
from gendiff.preparing import Mapped, Rows
from gendiff_molecule.molecules import Molecules

_MOST_TARGETS = 256  # each is a file that is open while the molecules are written
_GAP = 1 << 20  # unknown values written at a time


class Texts(Sequence[str]):
    """M texts, of which those that are asked for are read.

    Args:
        letters: All of them in UTF-8, uint8.
        offsets: Text i is ``letters[offsets[i]:offsets[i + 1]]``, (M + 1,).
    """

    def __init__(self, letters: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.letters, self.offsets = letters, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, key: Any) -> Any:
        """The text of a number; those of an array of numbers as an array."""
        if isinstance(key, np.ndarray | slice):
            return np.array([self[i] for i in np.arange(len(self))[key].tolist()], dtype=str)
        if not 0 <= key < len(self):
            raise IndexError(key)
        return self.letters[self.offsets[key] : self.offsets[key + 1]].tobytes().decode()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[np.str_]:
        return np.array(list(self), dtype=str)

    def tolist(self) -> list[str]:
        """All of them."""
        return list(self)


class Columns(Mapping[str, NDArray[np.float32]]):
    """Targets by name, each (M,), mapped when it is asked for: each mapping is an open file.

    Args:
        folder: Where they lie.
        names: Theirs, in the order of the files' numbers.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self.names:
            raise KeyError(name)
        return Mapped(self.folder / f"target-{self.names.index(name)}.npy")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Writer:
    """A folder of molecules, made anew.

    Args:
        folder: Its path; there is nothing in it yet.
        bonds: Whether the molecules have bonds.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, folder: Path, bonds: bool) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.bonds, self.count = folder, bonds, 0
        self._targets: dict[str, Rows] = {}
        self._arrays = {
            "numbers": Rows(folder / "numbers.npy", np.uint8),
            "positions": Rows(folder / "positions.npy", np.float32, (3,)),
            "offsets": Rows(folder / "offsets.npy", np.int64),
            "smiles": Rows(folder / "smiles.npy", np.uint8),
            "smiles_offsets": Rows(folder / "smiles_offsets.npy", np.int64),
            "bonds": Rows(folder / "bonds.npy", np.int16, (3,)),
            "bond_offsets": Rows(folder / "bond_offsets.npy", np.int64),
        }
        for name in ("offsets", "smiles_offsets", *(["bond_offsets"] if bonds else [])):
            self._arrays[name].append([0])

    def append(self, molecules: Molecules) -> None:
        """Adds molecules. Targets that others have had, or have later, are NaN for them.

        Raises:
            DataError: There are more targets than are kept.
        """
        rows = self._arrays
        rows["offsets"].append(rows["numbers"].count + molecules.offsets[1:])
        rows["numbers"].append(molecules.numbers)
        rows["positions"].append(molecules.positions)
        texts = [text.encode(errors="replace") for text in molecules.smiles.tolist()]
        ends = np.cumsum([len(text) for text in texts] or np.zeros(len(molecules), np.int64))
        rows["smiles_offsets"].append(rows["smiles"].count + ends)
        rows["smiles"].append(np.frombuffer(b"".join(texts), np.uint8))
        if self.bonds:
            rows["bond_offsets"].append(rows["bonds"].count + molecules.bond_offsets[1:])
            rows["bonds"].append(molecules.bonds)
        for name in molecules.targets:
            if name not in self._targets:
                self._begin(name)
        for name, column in self._targets.items():
            known = molecules.targets.get(name)
            column.append(np.full(len(molecules), np.nan) if known is None else known)
        self.count += len(molecules)

    def _begin(self, name: str) -> None:
        number = len(self._targets)
        if number == _MOST_TARGETS:
            raise DataError(
                f"data: more than {_MOST_TARGETS} properties of molecules; '{name[:40]}' is one "
                "too many. Remove those that are not used from the files."
            )
        self._targets[name] = column = Rows(self.folder / f"target-{number}.npy", np.float32)
        for start in range(0, self.count, _GAP):
            column.append(np.full(min(_GAP, self.count - start), np.nan))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for rows in (*self._arrays.values(), *self._targets.values()):
            rows.close()
        if kind is None:
            (self.folder / "targets.json").write_text(json.dumps(list(self._targets)))


def load(folder: Path) -> Molecules:
    """What a :class:`Writer` wrote, mapped.

    Raises:
        OSError, ValueError: Something is missing or damaged.
    """

    def array(name: str) -> Mapped:
        return Mapped(folder / f"{name}.npy")

    names = json.loads((folder / "targets.json").read_text())
    texts = Texts(array("smiles"), array("smiles_offsets"))
    found = Molecules(
        array("numbers"),
        array("positions"),
        array("offsets"),
        texts if len(texts.letters) else np.empty(0, dtype=str),
        array("bonds"),
        array("bond_offsets"),
        Columns(folder, names),
    )
    ends: list[tuple[Any, Any]] = [
        (found.numbers, found.offsets),
        (found.positions, found.offsets),
    ]
    ends += [(texts.letters, texts.offsets)]
    ends += [(found.bonds, found.bond_offsets)] if len(found.bond_offsets) else []
    columns = [len(texts), *(len(column) for column in found.targets.values())]
    fit = all(len(rows) == offsets[-1] for rows, offsets in ends)
    if not fit or set(columns) != {len(found)}:
        raise ValueError(f"{folder}: arrays do not fit each other")
    return found


def write(source: Iterable[Molecules], folder: Path, bonds: bool) -> None:
    """Writes molecules to a folder, which may be there if it is empty."""
    with Writer(folder, bonds) as writer:
        for piece in source:
            writer.append(piece)
