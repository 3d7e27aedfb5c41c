"""The bond table entry by entry, and molecules whose bonds are known."""

from __future__ import annotations

from itertools import combinations_with_replacement

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from gendiff_molecule.bonds import VALENCE, bond_orders, covered, stable_atoms, to_mol
from gendiff_molecule.molecules import SYMBOLS

# Typical lengths in pm, a row for each element: written down apart from the module's own table.
SINGLE = """
H: H 74 B 119 C 109 N 101 O 96 F 92 Si 148 P 144 S 134 Cl 127 As 152 Br 141 I 161
B: Cl 175
C: C 154 N 147 O 143 F 135 Si 185 P 184 S 182 Cl 177 Br 194 I 214
N: N 145 O 140 F 136 P 177 S 168 Cl 175 Br 214 I 222
O: O 148 F 142 Si 163 P 163 S 151 Cl 164 Br 172 I 194
F: F 142 Si 160 P 156 S 158 Cl 166 Br 178 I 187
Si: Si 233 S 200 Cl 202 Br 215 I 243
P: P 221 S 210 Cl 203 Br 222
S: S 204 Cl 207 Br 225 I 234
Cl: Cl 199 Br 214
Br: Br 228
I: I 266
"""
DOUBLE = """
C: C 134 N 129 O 120 S 160
N: N 125 O 121
O: O 121 P 150
P: S 186
"""
TRIPLE = """
C: C 120 N 116 O 113
N: N 110
"""
ELEMENTS = ["H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "As", "Br", "I"]


def rows(table: str) -> dict[tuple[str, str], int]:
    found = {}
    for line in table.strip().splitlines():
        a, rest = line.split(": ")
        words = rest.split()
        found |= {(a, b): int(length) for b, length in zip(words[::2], words[1::2], strict=True)}
    return found


LIMITS = [
    (*pair, order, length + margin)
    for order, table, margin in ((1, SINGLE, 10), (2, DOUBLE, 5), (3, TRIPLE, 3))
    for pair, length in rows(table).items()
]


def order_at(a: str, b: str, picometres: float) -> int:
    numbers = np.array([SYMBOLS.index(a), SYMBOLS.index(b)], np.uint8)
    orders = bond_orders(numbers, np.array([[0, 0, 0], [0, 0, picometres / 100]]))
    assert orders[0, 1] == orders[1, 0]
    assert not orders.diagonal().any()
    return int(orders[0, 1])


@pytest.mark.parametrize(("a", "b", "order", "limit"), LIMITS)
def test_threshold(a: str, b: str, order: int, limit: int) -> None:
    for first, second in ((a, b), (b, a)):
        assert order_at(first, second, limit - 0.01) == order
        assert order_at(first, second, limit + 0.01) == order - 1


def test_nothing_else_bonds() -> None:
    pairs = set(rows(SINGLE))
    assert len(pairs) == 64
    for a, b in combinations_with_replacement(ELEMENTS, 2):
        if (a, b) not in pairs and (b, a) not in pairs:
            assert order_at(a, b, 50) == 0
    triple, double = set(rows(TRIPLE)), set(rows(DOUBLE))
    for pair in pairs:  # the highest order that any distance gives
        assert order_at(*pair, 50) == 1 + (pair in double) + (pair in triple)


def test_strict_inequality() -> None:
    assert order_at("C", "C", 164) == 0  # as far as d = 1.64 is above 1.64 in floating point
    assert order_at("O", "O", 158) == 0


def test_valences() -> None:
    expected = {"H": [1], "B": [3], "C": [4], "N": [3], "O": [2], "F": [1], "Si": [4]}
    expected |= {"P": [3, 5], "S": [4], "Cl": [1], "As": [3], "Br": [1], "I": [1]}
    for symbol in ELEMENTS:
        for total in range(8):
            orders = np.array([[0, total], [total, 0]], np.int8)
            z = SYMBOLS.index(symbol)
            stable = stable_atoms(np.array([z, z], np.uint8), orders)
            assert stable.tolist() == [total in expected[symbol]] * 2
    assert sorted(SYMBOLS[z] for z in VALENCE) == sorted(ELEMENTS)


def test_covered() -> None:
    assert covered(np.array([1, 6, 53], np.uint8))
    for z in (0, 2, 13, 34, 80, 83):  # EDM has no lengths for aluminium, mercury and bismuth
        assert not covered(np.array([6, z], np.uint8))


def relaxed(smiles: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and positions of a molecule at its MMFF94 minimum."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=2000)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8)
    return numbers, mol.GetConformer().GetPositions()


@pytest.mark.parametrize(
    "smiles", ["C", "C=C", "C#C", "C#N", "NC=O", "CCO", "C1CC1", "COC", "CC(F)(F)F", "NN"]
)
def test_known_molecules(smiles: str) -> None:
    numbers, x = relaxed(smiles)
    orders = bond_orders(numbers, x)
    assert stable_atoms(numbers, orders).all()
    mol = to_mol(numbers, orders, x)
    Chem.SanitizeMol(mol)
    np.testing.assert_allclose(mol.GetConformer().GetPositions(), x)
    assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == Chem.CanonSmiles(smiles)


def test_carbon_dioxide() -> None:
    line = np.array([[-1.167, 0, 0], [0, 0, 0], [1.167, 0, 0]])
    orders = bond_orders(np.array([8, 6, 8], np.uint8), line)
    assert orders.tolist() == [[0, 2, 0], [2, 0, 2], [0, 2, 0]]


def test_benzene_is_not_aromatic() -> None:
    """By the table benzene of QM9 (139.5 pm) is a ring of single bonds, which is not stable."""
    angles = np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    numbers = np.array([6] * 6 + [1] * 6, np.uint8)
    orders = bond_orders(numbers, np.concatenate([1.395 * ring, (1.395 + 1.086) * ring]))
    assert orders.sum(1).tolist() == [3] * 6 + [1] * 6
    assert stable_atoms(numbers, orders).tolist() == [False] * 6 + [True] * 6
    doubled = bond_orders(numbers, np.concatenate([1.385 * ring, (1.385 + 1.086) * ring]))
    assert doubled.sum(1).tolist() == [5] * 6 + [1] * 6


def test_odd_input() -> None:
    alone = bond_orders(np.array([6], np.uint8), np.zeros((1, 3)))
    assert alone.tolist() == [[0]]
    heap = bond_orders(np.full(29, 6, np.uint8), np.zeros((29, 3)))
    assert (heap == 3 * (1 - np.eye(29))).all()
    lost = bond_orders(np.array([6, 1], np.uint8), np.full((2, 3), np.nan))
    assert not lost.any()
