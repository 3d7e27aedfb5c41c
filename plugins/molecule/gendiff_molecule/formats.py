"""The file formats: molecules as they stand there, and what cannot be parsed.

==========================  =======================================================================
``.sdf .mol``               As given: odd valences and missing hydrogens survive. A record with the
                            2D flag and no z gets hydrogens and a 3D structure. Numeric data fields
                            are targets.
``.xyz .extxyz``            One or many frames. ``key=value`` pairs in the comment are targets;
                            ``Properties=species:S:1:pos:R:3:…`` gives the order of the columns.
                            QM9's own files (``gdb 1 …``) are known too.
``.smi .smiles .txt``       A SMILES and perhaps a name on each line.
``.csv``                    A column ``smiles``; other columns of numbers are targets.
``.npz``                    ``numbers`` or ``atomic_numbers`` (R,), ``positions`` in Angstrom or
                            ``positions_e5`` in 1e-5 Angstrom (R, 3), ``offsets`` (M + 1,). May
                            have ``split`` or ``edm_split`` (M,) (1 train, 2 validation, 3 test, 0
                            unknown), ``smiles`` (M,), ``bonds`` (E, 3) with ``bond_offsets``
                            (M + 1,), and targets: ``target.NAME`` (M,), or ``targets`` (K, T) with
                            ``target_names`` (T,) for the molecules ``target_rows`` (K,), and
                            ``homo_lumo_gap`` (M, 3).
PyG's QM9 folder            See :mod:`gendiff_molecule.pyg`.
==========================  =======================================================================

All but ``.npz`` may be compressed (``.gz``). Nothing is unpickled.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem

from gendiff_molecule.molecules import SYMBOLS, Molecules

Tick = Callable[[str, int, int], None]

NUMBERS = {s.upper(): z for z, s in enumerate(SYMBOLS) if z} | {"D": 1, "T": 1}
QM9_NAMES = (
    "A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298",
    "g298", "cv",
)  # fmt: skip
_SLICE = 4096  # molecules of an npz file that are checked at a time
_ORDERS = {
    Chem.BondType.SINGLE: 1,
    Chem.BondType.DOUBLE: 2,
    Chem.BondType.TRIPLE: 3,
    Chem.BondType.AROMATIC: 4,
}


class Problem(NamedTuple):
    """What cannot be used: where it is, and why."""

    where: str
    reason: str


class Record(NamedTuple):
    """One molecule of a file."""

    where: str
    numbers: Sequence[int]
    positions: Any  # (N, 3)
    smiles: str = ""
    bonds: NDArray[np.int16] | None = None
    targets: Mapping[str, float] = {}


class Block(NamedTuple):
    """A record of an SDF file that has yet to be parsed.

    Args:
        where: Its place.
        lines: All its lines.
        closed: Whether the line that ends a record was there.
        targets: What a table beside the file tells; the record's own fields, and its bonds, are
            then not taken.
    """

    where: str
    lines: Sequence[str]
    closed: bool
    targets: Mapping[str, float] | None = None


class Frame(NamedTuple):
    """A frame of an XYZ file that has yet to be parsed."""

    where: str
    comment: str
    rows: Sequence[str]
    smiles: str


class Graph(NamedTuple):
    """A molecule that has yet to be placed in space."""

    where: str
    smiles: str
    targets: Mapping[str, float] = {}


@dataclass(frozen=True)
class Parsed:
    """Molecules as read, not yet checked.

    Args:
        molecules: M of them, without bonds; atomic number 0 where an element is not known.
        where: Their places, (M,).
        split: 1 train, 2 validation, 3 test, 0 unknown, (M,), uint8.
        bonds: Rows (first atom, second atom, order), or None where not known, (M,).
    """

    molecules: Molecules
    where: list[str] = field(default_factory=list)
    split: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    bonds: list[NDArray[np.int16] | None] = field(default_factory=list)


Item = Block | Frame | Graph | Problem | Parsed  # what is read, and parsed elsewhere


def suffix(path: Path) -> str:
    """The ending that tells the format, without ``.gz``, in lower case."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


_NOTHING: Any = io.BytesIO()


class Reading:
    """What files hold, one item after the other, and how far it is read.

    Args:
        files: The name by which a problem is reported, and the path, of each.
    """

    split = None  # of the files' own, or by hash

    def __init__(self, files: Sequence[tuple[str, Path]]) -> None:
        self.files = files
        self._sizes = [path.stat().st_size if path.is_file() else 0 for _, path in files]
        self._done, self._stream = 0, _NOTHING

    @property
    def share(self) -> float:
        """Of the bytes, between 0 and 1."""
        here = 0 if self._stream.closed else self._stream.tell()
        return min(1.0, (self._done + here) / max(1, sum(self._sizes)))

    def __iter__(self) -> Iterator[Item]:
        for (name, path), size in zip(self.files, self._sizes, strict=True):
            held = False
            for item in _npz(name, path) if suffix(path) == ".npz" else self._text(name, path):
                held = True
                yield item
            self._done, self._stream = self._done + size, _NOTHING
            if not held:
                yield Problem(name, "holds no molecule")

    def _text(self, name: str, path: Path) -> Iterator[Item]:
        try:
            with path.open("rb") as self._stream:
                packed = path.name.lower().endswith(".gz")
                content: Any = gzip.GzipFile(fileobj=self._stream) if packed else self._stream
                lines = io.TextIOWrapper(content, "utf-8-sig", errors="replace", newline=None)
                yield from READERS[suffix(path)](name, lines)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield Problem(name, "truncated, or not compressed by gzip")
        except OSError as error:
            yield Problem(name, f"cannot be read: {error.strerror}")


def stacked(records: Sequence[Record]) -> Parsed:
    """Records as arrays."""
    columns: dict[str, NDArray[np.float32]] = {}
    for i, record in enumerate(records):
        for name, value in record.targets.items():
            if name not in columns:
                columns[name] = np.full(len(records), np.nan, np.float32)
            columns[name][i] = value
    atoms = []
    with np.errstate(over="ignore"):  # infinite coordinates are found later
        for record in records:
            positions = np.asarray(record.positions, np.float32).reshape(-1, 3)
            atoms.append((np.asarray(record.numbers, np.uint8), positions))
    smiles = [record.smiles for record in records]
    molecules = Molecules.from_list(atoms, smiles, targets=columns)  # type: ignore[arg-type]
    where = [r.where for r in records]
    return Parsed(molecules, where, np.zeros(len(records), np.uint8), [r.bonds for r in records])


def _is_count(text: str) -> bool:
    """Whether a text is a number of things, as ``²`` and a number of 5000 digits are not."""
    return text.isascii() and text.isdigit() and len(text) <= 12


def numeric(fields: Iterable[tuple[str, Any]]) -> dict[str, float]:
    """Those of the named values that are finite numbers."""
    found = {}
    for name, value in fields:
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if np.isfinite(number):
            found[name] = number
    return found


# --- SDF ---------------------------------------------------------------------------------------


def _sdf(name: str, lines: Iterable[str]) -> Iterator[Item]:
    for number, (record, closed) in enumerate(records(lines), 1):
        yield Block(f"{name} record {number}", record, closed)


def records(lines: Iterable[str]) -> Iterator[tuple[list[str], bool]]:
    """The lines of each record, and whether the line ``$$$$`` closed it."""
    record: list[str] = []
    for line in lines:
        if line.startswith("$$$$"):
            yield record, True
            record = []
        else:
            record.append(line.rstrip("\r\n"))
    if any(line.strip() for line in record):
        yield record, False


def _fields(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line, value in zip(lines, lines[1:], strict=False):
        if line.startswith(">") and (name := re.search(r"<(.+)>", line)):
            yield name[1], value


def molblock(given: Block) -> Record | Graph | Problem:
    """Reads a record: as it is, or its graph where it is flat."""
    where = given.where
    end = next((i for i, line in enumerate(given.lines) if line.startswith("M  END")), None)
    if end is None:
        reason = "damaged" if given.closed else "truncated"
        return Problem(where, f"{reason}: no 'M  END'")
    lines, targets = given.lines[: end + 1], given.targets
    block = "\n".join(lines)
    mol = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
    if mol is None:
        return Problem(where, _why(lines))
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    odd = [a.GetSymbol() for a in mol.GetAtoms() if not 0 < a.GetAtomicNum() < len(SYMBOLS)]
    if odd:
        return Problem(where, unknown_element(odd[0]))
    if not numbers:
        return Problem(where, "no atoms")
    positions = mol.GetConformer().GetPositions()
    if targets is not None:
        return Record(where, numbers, positions, targets=targets)
    targets = numeric(_fields(given.lines[end + 1 :]))
    if lines[1][20:22] == "2D" and not positions[:, 2].any():
        flat = Chem.MolFromMolBlock(block)  # reads the wedges too
        if flat is None:
            return Problem(where, "2D, and RDKit cannot sanitise it to make it 3D")
        return Graph(where, Chem.MolToSmiles(flat), targets)
    clean = Chem.Mol(mol)
    if Chem.SanitizeMol(clean, catchErrors=True):
        return Record(where, numbers, positions, "", bonds_of(mol), targets)
    smiles = Chem.MolToSmiles(Chem.RemoveHs(clean))
    return Record(where, numbers, positions, smiles, bonds_of(clean), targets)


def bonds_of(mol: Chem.Mol) -> NDArray[np.int16]:
    """Rows (first atom, second atom, order); bonds of other kinds (dative, …) count as single."""
    rows = [
        (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), _ORDERS.get(b.GetBondType(), 1))
        for b in mol.GetBonds()
    ]
    return np.array(rows, np.int16).reshape(-1, 3)


def unknown_element(symbol: str) -> str:
    """The reason that a molecule of such an element is refused for."""
    return f"unknown element '{symbol}' (known: H to Xe)"


def _why(lines: Sequence[str]) -> str:
    """What is wrong with a record that RDKit refuses."""
    counts = lines[3] if len(lines) > 3 else ""
    if _is_count(counts[:3].strip()) and "V3000" not in counts:
        atoms = lines[4 : 4 + int(counts[:3])]
        for line in atoms:
            if re.search(r"\b(nan|inf|infinity)\b", line[:30].lower()):
                return "NaN or infinite coordinates"
            if (symbol := line[31:34].strip()) and symbol.upper() not in NUMBERS:
                return unknown_element(symbol)
    return "RDKit cannot parse it"


# --- XYZ ---------------------------------------------------------------------------------------


def _xyz(name: str, lines: Iterator[str]) -> Iterator[Item]:
    frame = 0
    for line in lines:
        if not line.strip():
            continue
        frame += 1
        where = f"{name} frame {frame}"
        if not _is_count(line.strip()):
            found = line.strip()[:40]
            yield Problem(where, f"expected a number of atoms, found '{found}'")
            return  # where the next frame begins is not known
        count = int(line)
        comment = next(lines, "")
        rows = list(islice(lines, count))
        if len(rows) < count:
            yield Problem(where, f"truncated: {len(rows)} of {count} atoms")
            return
        smiles = ""
        if comment.startswith("gdb "):  # frequencies, SMILES, InChI follow
            smiles = next(islice(lines, 1, 2), "").split("\t")[-1].strip()
            next(lines, "")
        yield Frame(where, comment, rows, smiles)


def frame(given: Frame) -> Record | Problem:
    """Reads a frame."""
    where, comment, rows, smiles = given
    if not rows:
        return Problem(where, "no atoms")
    pairs = re.findall(r'([A-Za-z_][\w.-]*)=(?:"([^"]*)"|(\S+))', comment)
    keys = {key: quoted or bare for key, quoted, bare in pairs}
    if re.search("[T1]", keys.get("pbc", "")):
        return Problem(where, "periodic (pbc): crystals are no molecules")
    columns = _columns(keys.get("Properties", "species:S:1:pos:R:3"))
    if columns is None:
        return Problem(where, f"Properties={keys['Properties']} names no species and pos")
    symbol, first = columns
    numbers, positions = [], []
    for i, row in enumerate(rows, 1):
        words = row.replace("*^", "e").split()  # as in QM9's own files
        try:
            positions.append([float(w) for w in words[first : first + 3]])
            element = words[symbol]
        except (ValueError, IndexError):
            return Problem(where, f"atom {i}: cannot read '{row.strip()[:60]}'")
        if len(positions[-1]) < 3:
            return Problem(where, f"atom {i}: cannot read '{row.strip()[:60]}'")
        z = int(element) if _is_count(element) else NUMBERS.get(element.upper(), 0)
        if not 0 < z < len(SYMBOLS):
            return Problem(where, unknown_element(element))
        numbers.append(z)
    targets = numeric(keys.items())
    if comment.startswith("gdb "):
        targets = numeric(zip(QM9_NAMES, comment.split()[2:], strict=False))
    mol = Chem.MolFromSmiles(keys.get("smiles", smiles))
    graph = "" if mol is None else Chem.MolToSmiles(mol)
    return Record(where, numbers, positions, graph, None, targets)


def _columns(properties: str) -> tuple[int, int] | None:
    """The columns of the element and of x, by the extended format's ``name:kind:width:…``."""
    words = properties.split(":")
    at, start = {}, 0
    for name, _, width in zip(words[::3], words[1::3], words[2::3], strict=False):
        at[name.lower()] = start
        start += int(width) if _is_count(width) else 0
    element = at.get("species", at.get("z"))
    return None if element is None or "pos" not in at else (element, at["pos"])


# --- SMILES ------------------------------------------------------------------------------------


def _smi(name: str, lines: Iterable[str]) -> Iterator[Item]:
    for number, line in enumerate(lines, 1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith("#"):
            continue
        if number == 1 and words[0].lower() == "smiles":
            continue
        yield Graph(f"{name} line {number}", words[0])


def _csv(name: str, lines: Iterable[str]) -> Iterator[Item]:
    reader = csv.DictReader(lines)
    try:
        header = list(reader.fieldnames or ())
        column = next((h for h in header if h.strip().lower() == "smiles"), None)
        if column is None:
            if header:
                yield Problem(name, f"no column 'smiles' among {', '.join(header)[:80]}")
            return
        for row in reader:
            where = f"{name} line {reader.line_num}"
            smiles = (row[column] or "").strip()
            others = [(h.strip(), row[h]) for h in header if h != column]
            yield Graph(where, smiles, numeric(others)) if smiles else Problem(where, "no SMILES")
    except csv.Error as error:
        yield Problem(f"{name} line {reader.line_num}", str(error))


# --- npz ---------------------------------------------------------------------------------------


def _npz(name: str, path: Path) -> Iterator[Parsed | Problem]:
    found = _loaded(name, path)
    if isinstance(found, Problem):
        yield found
    else:
        yield from slices(found)


def slices(parsed: Parsed) -> Iterator[Parsed]:
    """The same, some thousands of molecules at a time."""
    for start in range(0, len(parsed.where), _SLICE):
        part = slice(start, start + _SLICE)
        rows = np.arange(len(parsed.where))[part]
        yield Parsed(
            parsed.molecules.select(rows),
            parsed.where[part],
            parsed.split[part],
            parsed.bonds[part],
        )


def _loaded(name: str, path: Path) -> Parsed | Problem:
    if not zipfile.is_zipfile(path):
        empty = path.is_file() and path.stat().st_size == 0
        return Problem(name, "is empty" if empty else "not an npz file, or truncated")
    try:
        with np.load(path, allow_pickle=False) as data, np.errstate(all="ignore"):
            arrays = {key: np.atleast_1d(data[key]) for key in data.files}
            for key, array in arrays.items():
                if array.dtype.kind not in "biufUS":
                    told = f"{key} holds {array.dtype.name}, neither real numbers nor text"
                    return Problem(name, told)
            return _arrays(name, arrays)
    # RuntimeError: encrypted, or (NotImplementedError) packed in a way that zipfile does not know.
    except (EOFError, zlib.error, zipfile.BadZipFile, OSError, RuntimeError):
        return Problem(name, "damaged or truncated")
    except MemoryError:
        return Problem(name, "tells of arrays larger than the memory")
    except ValueError as error:
        if "pickle" in str(error):
            return Problem(name, "holds pickled objects, which are not read")
        return Problem(name, str(error))


def _arrays(name: str, data: Mapping[str, NDArray[Any]]) -> Parsed:
    """Raises: ValueError: An array is missing or does not fit the others."""
    numbers = _first(data, "numbers", "atomic_numbers")
    positions = _first(data, "positions", "positions_e5")
    offsets = _first(data, "offsets")
    rows, count = len(numbers), len(offsets) - 1
    if positions.shape != (rows, 3) or numbers.shape != (rows,):
        raise ValueError(f"numbers are {numbers.shape}, positions {positions.shape}")
    _check_offsets("offsets", offsets, rows, count)
    if numbers.dtype.kind not in "iu":
        raise ValueError(f"numbers are {numbers.dtype}, not integers")
    if "positions" not in data:
        positions = positions * 1e-5
    split = data.get("split", data.get("edm_split", np.zeros(count, np.uint8)))
    if split.shape != (count,) or not np.isin(split, (0, 1, 2, 3)).all():
        raise ValueError(f"the split is not 0 to 3 for each of {count} molecules")
    smiles = data.get("smiles", np.empty(0, str)).astype(str)
    if smiles.shape not in ((0,), (count,)):
        raise ValueError(f"{len(smiles)} smiles for {count} molecules")
    bonds: list[NDArray[np.int16] | None] = [None] * count
    at = data.get("bond_offsets", np.empty(0, np.int64))
    if len(at):
        table = _first(data, "bonds").astype(np.int16)
        _check_offsets("bond_offsets", at, len(table), count)
        bonds = [table[a:b] for a, b in zip(at[:-1].tolist(), at[1:].tolist(), strict=True)]
    known = (numbers > 0) & (numbers < len(SYMBOLS))
    molecules = Molecules(
        np.where(known, numbers, 0).astype(np.uint8),
        positions.astype(np.float32),
        offsets.astype(np.int64),
        smiles if len(smiles) else np.full(count, "", dtype=str),
        targets=_targets(data, count),
    )
    where = [f"{name} molecule {i}" for i in range(count)]
    return Parsed(molecules, where, split.astype(np.uint8), bonds)


def _first(data: Mapping[str, NDArray[Any]], *names: str) -> NDArray[Any]:
    for name in names:
        if name in data:
            return data[name]
    raise ValueError(f"no array '{' or '.join(names)}'")


def _check_offsets(name: str, offsets: NDArray[Any], rows: int, count: int) -> None:
    good = offsets.ndim == 1 and offsets.dtype.kind in "iu" and len(offsets) == count + 1 >= 1
    good = good and offsets[0] == 0 and offsets[-1] == rows
    if not good or (np.diff(offsets.astype(np.int64)) < 0).any():
        raise ValueError(f"{name} do not rise from 0 to the {rows} rows that there are")


def _targets(data: Mapping[str, NDArray[Any]], count: int) -> dict[str, NDArray[np.float32]]:
    found = {
        key.removeprefix("target."): value.astype(np.float32)
        for key, value in data.items()
        if key.startswith("target.")
    }
    if "targets" in data:
        values, names = data["targets"], _first(data, "target_names").astype(str)
        rows = data.get("target_rows", np.arange(count))
        if values.shape != (len(rows), len(names)) or not np.isin(rows, np.arange(count)).all():
            raise ValueError("targets, target_names and target_rows do not fit each other")
        for name, column in zip(names.tolist(), values.T, strict=True):
            found[name] = np.full(count, np.nan, np.float32)
            found[name][rows] = column
    energies = data.get("homo_lumo_gap", np.empty((count, 0)))
    if energies.ndim != 2:
        raise ValueError(f"homo_lumo_gap is {energies.shape} for {count} molecules")
    for name, column in zip(("homo", "lumo", "gap"), energies.T, strict=False):
        known = found.get(name, np.full(count, np.nan, np.float32))
        found[name] = np.where(np.isnan(known), column, known).astype(np.float32)
    for name, column in found.items():
        if column.shape != (count,):
            raise ValueError(f"target '{name}' is {column.shape} for {count} molecules")
    return found


READERS: dict[str, Callable[[str, Any], Iterator[Item]]] = {
    ".sdf": _sdf,
    ".mol": _sdf,
    ".xyz": _xyz,
    ".extxyz": _xyz,
    ".smi": _smi,
    ".smiles": _smi,
    ".txt": _smi,
    ".csv": _csv,
}
