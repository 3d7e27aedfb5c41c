r"""Bonds from distances, by the rule of EDM (Hoogeboom et al., 2022), and what follows from them.

Two atoms d picometres apart are bonded if d < L1 + 10; doubly, if also d < L2 + 5; triply, if also
d < L3 + 3, with L1, L2, L3 typical lengths of the two elements' bonds (appendix D of
https://arxiv.org/abs/2203.17003; the lengths are of Wired Chemist's tables). There is no aromatic
bond: benzene's 139.5 pm read as single. An atom is *stable* if its orders add to its valence, and
a molecule if all its atoms are.

The margins were tuned on QM9 (H, C, N, O, F). The other elements have EDM's lengths and valences
too, oddities included, so that figures compare: sulfur's valence is 4 alone, which makes every
thioether unstable; boron bonds to hydrogen and chlorine only, and arsenic to hydrogen. Aluminium,
mercury and bismuth, to which EDM gives a valence but no length, are left out. For the validity of
GEOM-Drugs molecules EDM counts every bond as single; here its order is kept.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, RDLogger

RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]

# Typical lengths in pm, by the pair of atomic numbers.
SINGLE = {
    (1, 1): 74, (1, 6): 109, (1, 7): 101, (1, 8): 96, (1, 9): 92, (6, 6): 154, (6, 7): 147,
    (6, 8): 143, (6, 9): 135, (7, 7): 145, (7, 8): 140, (7, 9): 136, (8, 8): 148, (8, 9): 142,
    (9, 9): 142,
    # beyond QM9
    (1, 5): 119, (1, 14): 148, (1, 15): 144, (1, 16): 134, (1, 17): 127, (1, 33): 152,
    (1, 35): 141, (1, 53): 161, (5, 17): 175, (6, 14): 185, (6, 15): 184, (6, 16): 182,
    (6, 17): 177, (6, 35): 194, (6, 53): 214, (7, 15): 177, (7, 16): 168, (7, 17): 175,
    (7, 35): 214, (7, 53): 222, (8, 14): 163, (8, 15): 163, (8, 16): 151, (8, 17): 164,
    (8, 35): 172, (8, 53): 194, (9, 14): 160, (9, 15): 156, (9, 16): 158, (9, 17): 166,
    (9, 35): 178, (9, 53): 187, (14, 14): 233, (14, 16): 200, (14, 17): 202, (14, 35): 215,
    (14, 53): 243, (15, 15): 221, (15, 16): 210, (15, 17): 203, (15, 35): 222, (16, 16): 204,
    (16, 17): 207, (16, 35): 225, (16, 53): 234, (17, 17): 199, (17, 35): 214, (35, 35): 228,
    (53, 53): 266,
}  # fmt: skip
DOUBLE = {
    (6, 6): 134, (6, 7): 129, (6, 8): 120, (7, 7): 125, (7, 8): 121, (8, 8): 121,
    (6, 16): 160, (8, 15): 150, (15, 16): 186,
}  # fmt: skip
TRIPLE = {(6, 6): 120, (6, 7): 116, (6, 8): 113, (7, 7): 110}
MARGINS = (10.0, 5.0, 3.0)
VALENCE = {
    1: (1,), 5: (3,), 6: (4,), 7: (3,), 8: (2,), 9: (1,), 14: (4,), 15: (3, 5), 16: (4,),
    17: (1,), 33: (3,), 35: (1,), 53: (1,),
}  # fmt: skip
_ORDERS = (
    Chem.BondType.SINGLE,
    Chem.BondType.DOUBLE,
    Chem.BondType.TRIPLE,
    Chem.BondType.AROMATIC,
)


@lru_cache
def _limits() -> NDArray[np.float64]:
    """Longest distance in Angstrom of each order, (3, Z, Z) by atomic number; 0 for none."""
    size = max(VALENCE) + 1
    table = np.zeros((3, size, size))
    for order, lengths in enumerate((SINGLE, DOUBLE, TRIPLE)):
        for (a, b), length in lengths.items():
            table[order, a, b] = table[order, b, a] = (length + MARGINS[order]) / 100
    return table


def covered(numbers: NDArray[np.uint8]) -> bool:
    """Whether the table knows all of these elements."""
    return bool(np.isin(numbers, list(VALENCE)).all())


def bond_orders(
    numbers: NDArray[np.uint8],
    positions: NDArray[np.floating[Any]],
) -> NDArray[np.int8]:
    """Orders 0 to 3 between all pairs of atoms, (N, N), symmetric, by EDM's table.

    Args:
        numbers: Atomic numbers that :func:`covered` knows, (N,).
        positions: In Angstrom, (N, 3).
    """
    x = np.asarray(positions, np.float64)
    distance = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distance, np.inf)
    limits = _limits()[:, numbers[:, None], numbers[None]]
    bonded = distance < limits  # nested: a double bond is also short enough for a single one
    return np.logical_and.accumulate(bonded).sum(0).astype(np.int8)


def stable_atoms(numbers: NDArray[np.uint8], orders: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Whether each atom's orders add to its valence (or to one of them), (N,)."""
    totals = orders.sum(1).tolist()
    pairs = zip(numbers.tolist(), totals, strict=True)
    return np.array([total in VALENCE.get(z, ()) for z, total in pairs], dtype=bool)


def to_mol(
    numbers: NDArray[np.uint8],
    orders: NDArray[np.int8],
    positions: NDArray[np.floating[Any]] | None = None,
) -> Chem.Mol:
    """An unsanitised RDKit molecule, neutral, with a conformer where positions are given.

    Orders are 1, 2, 3, or 4 for aromatic; 0 for no bond. RDKit fills open valences with implicit
    hydrogens when it is sanitised.
    """
    mol = Chem.RWMol()
    for z in numbers:
        mol.AddAtom(Chem.Atom(int(z)))
    for i, j in zip(*np.nonzero(np.triu(orders)), strict=True):
        mol.AddBond(int(i), int(j), _ORDERS[orders[i, j] - 1])
        if orders[i, j] == 4:
            bond = mol.GetBondBetweenAtoms(int(i), int(j))
            for part in (bond, bond.GetBeginAtom(), bond.GetEndAtom()):
                part.SetIsAromatic(True)
    if positions is not None:
        conformer = Chem.Conformer(len(numbers))
        conformer.SetPositions(np.asarray(positions, np.float64))
        mol.AddConformer(conformer)
    return mol.GetMol()
