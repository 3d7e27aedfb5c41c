"""PyTorch Geometric: its QM9 folder, and molecules to and from its ``Data`` objects.

The folder is what ``torch_geometric.datasets.QM9(root)`` makes. Its raw files are read as they
are, so that a damaged record is found by its number; where only ``processed/data_v3.pt`` is left,
that is read by torch's loader of plain tensors, never unpickled. Targets are in the units of
``gdb9.sdf.csv`` (Hartree, Debye, …), not in PyG's eV.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gendiff.errors import DataError
from gendiff_molecule.formats import Block, Item, Parsed, numeric, records, slices
from gendiff_molecule.molecules import SYMBOLS, Molecules

if TYPE_CHECKING:
    from torch_geometric.data import Data

_TRAIN, _TEST, _ALL = 100_000, 13_083, 130_831  # EDM's split of the characterised molecules
_HARTREE, _KCAL = 27.211386246, 0.04336414  # in eV, as PyG has them
# PyG's columns of y, and what to divide them by to be back at the file's units.
_COLUMNS = {
    "mu": 1, "alpha": 1, "homo": _HARTREE, "lumo": _HARTREE, "gap": _HARTREE, "r2": 1,
    "zpve": _HARTREE, "u0": _HARTREE, "u298": _HARTREE, "h298": _HARTREE, "g298": _HARTREE,
    "cv": 1, "u0_atom": _KCAL, "u298_atom": _KCAL, "h298_atom": _KCAL, "g298_atom": _KCAL,
    "A": 1, "B": 1, "C": 1,
}  # fmt: skip
_NAMES = ("gdb9.sdf", "gdb9.sdf.csv", "uncharacterized.txt")


def to_pyg(molecules: Molecules) -> list[Data]:
    """One ``Data`` a molecule.

    Returns:
        Objects with ``z`` (N,), ``pos`` (N, 3) in Angstrom, ``smiles`` where it is known, and
        ``y`` (1, T) with the targets in the order of ``molecules.targets``, if there are any.
    """
    import torch
    from torch_geometric.data import Data

    values = np.stack(list(molecules.targets.values()), 1) if molecules.targets else None
    found = []
    for i, (numbers, positions) in enumerate(molecules):
        data = Data(z=torch.from_numpy(numbers.astype(np.int64)), pos=torch.tensor(positions))
        if len(molecules.smiles) and molecules.smiles[i]:
            data.smiles = str(molecules.smiles[i])
        if values is not None:
            data.y = torch.from_numpy(values[i : i + 1])
        found.append(data)
    return found


def from_pyg(items: Iterable[Data]) -> Molecules:
    """Molecules of ``Data`` objects, or of any PyG data set whose items have ``z`` and ``pos``.

    Raises:
        DataError: An item has no ``z`` and ``pos`` of one length, or an unknown element.
    """
    atoms, smiles = [], []
    for i, data in enumerate(items):
        z, pos = getattr(data, "z", None), getattr(data, "pos", None)
        if z is None or pos is None or tuple(pos.shape) != (len(z), 3):
            raise DataError(f"PyG item {i}: no z (N,) with pos (N, 3). Give data that have both.")
        if len(z) and not 0 < int(z.min()) <= int(z.max()) < len(SYMBOLS):
            raise DataError(
                f"PyG item {i}: z from {int(z.min())} to {int(z.max())}. H to Xe only."
            )
        numbers = z.detach().cpu().numpy().astype(np.uint8)
        atoms.append((numbers, pos.detach().cpu().numpy().astype(np.float32)))
        smiles.append(getattr(data, "smiles", None) or "")
    return Molecules.from_list(atoms, smiles if any(smiles) else ())


def edm_split(count: int) -> NDArray[np.uint8]:
    """EDM's split of QM9's characterised molecules in ascending order, (count,).

    They are permuted with numpy's seed 0; of 130,831 the first 100,000 train (1), the next 17,748
    validate (2) and the last 13,083 test (3). Other counts are divided in the same proportions.
    """
    order = np.random.RandomState(0).permutation(count)
    train = count * _TRAIN // _ALL
    test = max(1, count * _TEST // _ALL)
    split = np.full(count, 2, np.uint8)
    split[order[:train]] = 1
    split[order[count - test :]] = 3
    return split


def qm9_files(path: Path) -> tuple[Path, ...]:
    """The files to read of PyG's QM9 folder, of its ``raw``, or of ``gdb9.sdf``; or none."""
    folder = path.parent if path.name == "gdb9.sdf" else path
    for raw in (folder / "raw", folder):
        if (raw / "gdb9.sdf").is_file():
            return tuple(raw / name for name in _NAMES)
    processed = folder / "processed" / "data_v3.pt"
    return (processed,) if processed.is_file() else ()


class QM9:
    """QM9 without its uncharacterised molecules; they are split by :func:`edm_split`.

    Args:
        files: Those of :func:`qm9_files`.

    Raises:
        DataError: A file is missing, or, once it is read, the files do not fit each other.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        for file in files:
            if not file.is_file():
                raise DataError(
                    f"data: there is no {file}. QM9 needs {', '.join(_NAMES)}; "
                    "torch_geometric.datasets.QM9(root=FOLDER) fetches all."
                )
        self.files, self.share, self.split = files, 0.0, edm_split

    def __iter__(self) -> Iterator[Item]:
        if len(self.files) == 1:
            yield from slices(_processed(self.files[0]))
            return
        rows, dropped = _table(self.files[1]), _dropped(self.files[2])
        number = 0
        with self.files[0].open(errors="replace") as lines:
            for number, (record, closed) in enumerate(records(lines), 1):
                if number > len(rows):
                    raise DataError(
                        f"data: gdb9.sdf.csv has {len(rows)} rows, gdb9.sdf has more records. "
                        "Fetch both again."
                    )
                self.share = number / len(rows)
                if number not in dropped:
                    # Its bonds are wrong for some thirty thousand molecules: none are taken.
                    where = f"gdb9.sdf record {number}"
                    yield Block(where, record, closed, rows[number - 1])
        if number < len(rows):
            raise DataError(
                f"data: gdb9.sdf is truncated: {number} records for the {len(rows)} rows of "
                "gdb9.sdf.csv. Fetch both again."
            )


def _table(file: Path) -> list[dict[str, float]]:
    with file.open(newline="", errors="replace") as lines:
        reader = csv.DictReader(lines)
        header = [name for name in reader.fieldnames or () if name != "mol_id"]
        if "u0" not in header:
            raise DataError(f"data: {file} has no column u0. Fetch QM9 again.")
        return [numeric((name, row[name]) for name in header) for row in reader]


def _dropped(file: Path) -> set[int]:
    """Record numbers of the molecules whose geometry did not match their graph."""
    lines = file.read_text(errors="replace").split("\n")[9:-2]  # as PyG reads it
    try:
        return {int(line.split()[0]) for line in lines}
    except (ValueError, IndexError) as error:
        raise DataError(f"data: {file} is damaged ({error}). Fetch QM9 again.") from error


def _processed(file: Path) -> Parsed:
    import torch
    import torch_geometric.data  # noqa: F401  # lets the loader know its Data class

    try:
        data, slices = torch.load(file, map_location="cpu", weights_only=True)[:2]
        values: Mapping[str, Any] = data if isinstance(data, Mapping) else data.to_dict()
        z, pos, y = (values[name].numpy() for name in ("z", "pos", "y"))
        offsets = slices["z"].numpy().astype(np.int64)
        if pos.shape != (len(z), 3) or y.shape != (len(offsets) - 1, len(_COLUMNS)):
            raise ValueError(f"pos is {pos.shape}, y {y.shape}")
    except Exception as error:  # the loader raises anything on damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data: {file} cannot be read as plain tensors ({reason}). Give the folder with raw/."
        ) from error
    count = len(offsets) - 1
    targets = {
        name: (y[:, i] / unit).astype(np.float32)
        for i, (name, unit) in enumerate(_COLUMNS.items())
    }
    molecules = Molecules(
        z.astype(np.uint8), pos, offsets, np.full(count, "", dtype=str), targets=targets
    )
    where = [f"{file.name} item {i}" for i in range(count)]
    return Parsed(molecules, where, np.zeros(count, np.uint8), [None] * count)
