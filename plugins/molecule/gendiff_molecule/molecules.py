"""Many molecules as flat arrays: what is cached, read and judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SYMBOLS = (
    "X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As "
    "Se Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe"
)
SYMBOLS: tuple[str, ...] = tuple(_SYMBOLS.split())  # by atomic number


@dataclass(frozen=True)
class Molecules:
    """M molecules with R atoms in all.

    Args:
        numbers: Atomic numbers, (R,), uint8.
        positions: In Angstrom, (R, 3), float32.
        offsets: Molecule i has the rows ``offsets[i]:offsets[i + 1]``, (M + 1,), int64.
        smiles: Canonical SMILES or "", (M,), or empty. Conformers of one molecule share it. Of
            molecules on disk it is :class:`~gendiff_molecule.store.Texts`.
        bonds: Rows (first atom, second atom, order), atoms counted within the molecule, order 1,
            2, 3 or 4 for aromatic, (E, 3), int16; empty where bonds are not known.
        bond_offsets: As ``offsets``, for ``bonds``, (M + 1,), int64; empty without bonds.
        targets: Properties by name, each (M,), float32, NaN where unknown.
    """

    numbers: NDArray[np.uint8]
    positions: NDArray[np.float32]
    offsets: NDArray[np.int64]
    smiles: Any = field(default_factory=lambda: np.empty(0, dtype=str))
    bonds: NDArray[np.int16] = field(default_factory=lambda: np.empty((0, 3), np.int16))
    bond_offsets: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    targets: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Atomic numbers (N,) and positions (N, 3) of molecule i."""
        rows = slice(self.offsets[i], self.offsets[i + 1])
        return self.numbers[rows], self.positions[rows]

    def __iter__(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        return (self[i] for i in range(len(self)))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Atoms of each molecule, (M,)."""
        return np.diff(self.offsets)

    def bonds_of(self, i: int) -> NDArray[np.int16]:
        """The bonds of molecule i, (E_i, 3)."""
        return self.bonds[self.bond_offsets[i] : self.bond_offsets[i + 1]]

    @classmethod
    def from_list(
        cls,
        atoms: Sequence[tuple[NDArray[np.uint8], NDArray[np.float32]]],
        smiles: Sequence[str] = (),
        bonds: Sequence[NDArray[np.int16]] = (),
        targets: Mapping[str, Sequence[float]] | None = None,
    ) -> Molecules:
        """From one (numbers, positions) a molecule."""
        return cls(
            np.concatenate([np.empty(0, np.uint8), *(z for z, _ in atoms)]).astype(np.uint8),
            np.concatenate([np.empty((0, 3)), *(x for _, x in atoms)]).astype(np.float32),
            _offsets([len(z) for z, _ in atoms]),
            np.array(smiles, dtype=str),
            np.concatenate([np.empty((0, 3)), *bonds]).astype(np.int16),
            _offsets([len(b) for b in bonds]) if len(bonds) else np.empty(0, np.int64),
            {k: np.asarray(v, np.float32) for k, v in (targets or {}).items()},
        )

    def select(self, which: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> Molecules:
        """The molecules of these numbers (or where a mask is True), in that order."""
        which = np.asarray(which)
        chosen = np.flatnonzero(which) if which.dtype == bool else which.astype(np.int64)
        rows, offsets = _rows(self.offsets, chosen)
        bonds, bond_offsets = self.bonds, self.bond_offsets
        if len(bond_offsets):
            kept, bond_offsets = _rows(bond_offsets, chosen)
            bonds = bonds[kept]
        return Molecules(
            self.numbers[rows],
            self.positions[rows],
            offsets,
            self.smiles[chosen] if len(self.smiles) else self.smiles,
            bonds,
            bond_offsets,
            {k: v[chosen] for k, v in self.targets.items()},
        )

    def without_hydrogens(self) -> Molecules:
        """The heavy atoms alone; bonds to hydrogen go with it. Molecules of hydrogen vanish."""
        heavy = self.numbers > 1
        owner = np.repeat(np.arange(len(self)), self.sizes)
        sizes = np.bincount(owner[heavy], minlength=len(self))
        bonds, bond_offsets = self.bonds, self.bond_offsets
        if len(bond_offsets):
            of = np.repeat(np.arange(len(self)), np.diff(bond_offsets))
            place = np.cumsum(heavy) - 1 - np.repeat(_offsets(sizes)[:-1], self.sizes)
            ends = bonds[:, :2] + self.offsets[of][:, None]
            kept = heavy[ends].all(1)
            bonds = np.column_stack([place[ends], bonds[:, 2]])[kept].astype(np.int16)
            bond_offsets = _offsets(np.bincount(of[kept], minlength=len(self)))
        lean = replace(
            self,
            numbers=self.numbers[heavy],
            positions=self.positions[heavy],
            offsets=_offsets(sizes),
            bonds=bonds,
            bond_offsets=bond_offsets,
        )
        return lean if sizes.all() else lean.select(sizes > 0)

    def target(self, name: str) -> NDArray[np.float32]:
        """A property of each molecule, (M,), NaN where unknown."""
        return np.asarray(self.targets[name])

    def pieces(self) -> Iterator[Molecules]:
        """The molecules again, some thousands at a time."""
        return Subset(self, np.arange(len(self))).pieces()


@dataclass(frozen=True)
class Subset:
    """Molecules of a set that may be larger than memory; none is copied before it is asked for.

    Args:
        molecules: The set.
        rows: Numbers of those that belong, (M,), int64.
    """

    molecules: Molecules
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Atoms of each molecule, (M,)."""
        return self.molecules.sizes[self.rows]

    def target(self, name: str) -> NDArray[np.float32]:
        """A property of each molecule, (M,), NaN where unknown."""
        return self.molecules.target(name)[self.rows]

    def narrowed(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Subset:
        """Those of these numbers (or where a mask is True)."""
        return Subset(self.molecules, self.rows[which])

    def select(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> Molecules:
        """A copy of those of these numbers (or where a mask is True)."""
        return self.molecules.select(self.rows[which])

    def pieces(self) -> Iterator[Molecules]:
        """Copies of the molecules, some thousands at a time."""
        for start in range(0, len(self), _PIECE):
            yield self.molecules.select(self.rows[start : start + _PIECE])


_PIECE = 4096


def _offsets(sizes: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)


def _rows(
    offsets: NDArray[np.int64], chosen: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of the chosen groups, and the offsets that they then have."""
    starts, ends = offsets[chosen], offsets[chosen + 1]
    new = _offsets(ends - starts)
    return np.arange(new[-1]) + np.repeat(starts - new[:-1], ends - starts), new
