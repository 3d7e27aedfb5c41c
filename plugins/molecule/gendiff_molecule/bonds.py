r"""Bonds from distances, by the rule of EDM (Hoogeboom et al., 2022), and what follows from them.

Two atoms d picometres apart are bonded if d < L1 + 10; doubly, if also d < L2 + 5; triply, if also
d < L3 + 3, with L1, L2, L3 typical lengths of the two elements' bonds (appendix D of
https://arxiv.org/abs/2203.17003; the lengths are of Wired Chemist's tables). There is no aromatic
bond: rings are read as alternating ones. An atom is *stable* if its orders add to its valence, and
a molecule if all its atoms are.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, RDLogger

RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]

# Typical lengths in pm, by the pair of atomic numbers.
SINGLE = {
    (1, 1): 74, (1, 6): 109, (1, 7): 101, (1, 8): 96, (1, 9): 92, (6, 6): 154, (6, 7): 147,
    (6, 8): 143, (6, 9): 135, (7, 7): 145, (7, 8): 140, (7, 9): 136, (8, 8): 148, (8, 9): 142,
    (9, 9): 142,
}  # fmt: skip
DOUBLE = {(6, 6): 134, (6, 7): 129, (6, 8): 120, (7, 7): 125, (7, 8): 121, (8, 8): 121}
TRIPLE = {(6, 6): 120, (6, 7): 116, (6, 8): 113, (7, 7): 110}
MARGINS = (10.0, 5.0, 3.0)
VALENCE = {1: 1, 6: 4, 7: 3, 8: 2, 9: 1}
_ORDERS = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)


@lru_cache
def _limits() -> NDArray[np.float64]:
    """Longest distance in Angstrom of each order, (3, 10, 10) by atomic number; 0 for none."""
    table = np.zeros((3, 10, 10))
    for order, lengths in enumerate((SINGLE, DOUBLE, TRIPLE)):
        for (a, b), length in lengths.items():
            table[order, a, b] = table[order, b, a] = (length + MARGINS[order]) / 100
    return table


def covered(numbers: NDArray[np.uint8]) -> bool:
    """Whether the table knows all of these elements (H, C, N, O, F)."""
    return bool(np.isin(numbers, list(VALENCE)).all())


def bond_orders(
    numbers: NDArray[np.uint8], positions: NDArray[np.floating[object]]  # type: ignore[type-var]
) -> NDArray[np.int8]:
    """Orders 0 to 3 between all pairs of atoms, (N, N), symmetric, by EDM's table.

    Args:
        numbers: Atomic numbers of H, C, N, O, F, (N,).
        positions: In Angstrom, (N, 3).
    """
    x = np.asarray(positions, np.float64)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    limits = _limits()[:, numbers[:, None], numbers[None]]
    bonded = distance < limits  # nested: a double bond is also short enough for a single one
    return np.logical_and.accumulate(bonded).sum(0).astype(np.int8)


def stable_atoms(numbers: NDArray[np.uint8], orders: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Whether each atom's orders add to its valence, (N,)."""
    valence = np.array([VALENCE.get(int(z), -1) for z in numbers])
    return orders.sum(1) == valence  # type: ignore[no-any-return]


def to_mol(
    numbers: NDArray[np.uint8],
    orders: NDArray[np.int8],
    positions: NDArray[np.floating[object]] | None = None,  # type: ignore[type-var]
) -> Chem.Mol:
    """An unsanitised RDKit molecule, neutral, with a conformer where positions are given.

    RDKit fills open valences with implicit hydrogens when it is sanitised.
    """
    mol = Chem.RWMol()
    for z in numbers:
        mol.AddAtom(Chem.Atom(int(z)))
    for i, j in zip(*np.nonzero(np.triu(orders)), strict=True):
        mol.AddBond(int(i), int(j), _ORDERS[orders[i, j] - 1])
    if positions is not None:
        conformer = Chem.Conformer(len(numbers))
        conformer.SetPositions(np.asarray(positions, np.float64))
        mol.AddConformer(conformer)
    return mol.GetMol()
