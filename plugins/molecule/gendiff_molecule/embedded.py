"""The embedded data set: small organic molecules made by rules, so that no download is needed.

Graphs of C, N, O and F are grown atom by atom; each is closed under "close a ring" and "raise a
bond's order"; what a chemist would not keep in a bottle is dropped. RDKit places the atoms
(ETKDGv3, then MMFF94), and molecules whose distances EDM's table does not read as their own bonds
are dropped too, so that a perfect model can reach 100 % in its metrics.

Everything is a function of the arguments and of RDKit's version.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import Crippen, rdDistGeom, rdForceFieldHelpers, rdMolDescriptors

from gendiff.noise import derive_seed
from gendiff.preparing import spread
from gendiff_molecule.bonds import bond_orders
from gendiff_molecule.molecules import Molecules

ELEMENTS = {6: 4, 7: 3, 8: 2, 9: 1}
VERSION = 2  # grows when the rules change

# Heteroatoms bound to each other: nothing that is grown from such a graph is kept.
_DEAD = ("[#7,#8,#9]~[#7,#8,#9]",)
# Strained, tautomers that do not last, or gone with the first drop of water.
_UNKEPT = (
    "*=*=*", "[r3,r4]=,#@*", "*#@*", "[R2]=@[R]", "[a;R2]", "*1~*2~*~1~*~2",
    "[CX4]([OX2H,NX3;!H0])[O,N,F]", "[CX4](F)[O,N]", "[CX4]([O,N])([O,N])[O,N]",
    "C=C[OX2H]", "C=C[NX3]", "[O,N,F]C=C[O,N,F]", "C#C[O,N,F]", "N#C[O,N,F]", "[NX2H]", "FC=[O,N]",
    "C(=N)[O,F]", "C(=O)C=[O,N]", "C(=O)OC=O", "N=CC=N", "C(=O)C#N", "[CX4](C#N)[O,N;H]",
)  # fmt: skip


@lru_cache
def _patterns(smarts: tuple[str, ...]) -> list[Chem.Mol]:
    return [Chem.MolFromSmarts(s) for s in smarts]


def _matches(mol: Chem.Mol, smarts: tuple[str, ...]) -> bool:
    return any(mol.HasSubstructMatch(pattern) for pattern in _patterns(smarts))


def _finish(mol: Chem.RWMol) -> tuple[str, Chem.Mol] | None:
    try:
        Chem.SanitizeMol(mol)
    except (Chem.AtomValenceException, Chem.KekulizeException):
        return None
    return Chem.MolToSmiles(mol), mol


def _free(atom: Chem.Atom) -> int:
    return ELEMENTS[atom.GetAtomicNum()] - int(
        sum(b.GetValenceContrib(atom) for b in atom.GetBonds())
    )


def _grown(smiles: str) -> Iterator[str]:
    """The graphs with one atom more, bound by a single bond."""
    mol = Chem.MolFromSmiles(smiles)
    for atom in mol.GetAtoms():
        if _free(atom) < 1:
            continue
        for z in ELEMENTS:
            new = Chem.RWMol(mol)
            new.AddBond(atom.GetIdx(), new.AddAtom(Chem.Atom(z)), Chem.BondType.SINGLE)
            done = _finish(new)
            if done and not _matches(done[1], _DEAD):
                yield done[0]


_HIGHER = {Chem.BondType.SINGLE: Chem.BondType.DOUBLE, Chem.BondType.DOUBLE: Chem.BondType.TRIPLE}


def _changed(mol: Chem.Mol) -> Iterator[Chem.RWMol]:
    """The graphs with one ring more (at most two) or one bond raised."""
    free = [_free(atom) for atom in mol.GetAtoms()]
    distance = Chem.GetDistanceMatrix(mol)
    if mol.GetRingInfo().NumRings() < 2:
        for i, j in zip(*np.nonzero(np.triu((distance >= 2) & (distance <= 5))), strict=True):
            if free[i] and free[j]:
                new = Chem.RWMol(mol)
                new.AddBond(int(i), int(j), Chem.BondType.SINGLE)
                yield new
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if free[i] and free[j] and bond.GetBondType() in _HIGHER:
            new = Chem.RWMol(mol)
            new.GetBondBetweenAtoms(i, j).SetBondType(_HIGHER[bond.GetBondType()])
            yield new


def _closed(skeleton: str) -> list[str]:
    """A skeleton's molecules that are kept."""
    seen = {skeleton}
    queue = [skeleton]
    for smiles in queue:
        mol = Chem.MolFromSmiles(smiles)
        Chem.Kekulize(mol, clearAromaticFlags=True)
        for new in _changed(mol):
            done = _finish(new)
            if done and done[0] not in seen and not _matches(done[1], _DEAD):
                seen.add(done[0])
                queue.append(done[0])
    return [s for s in queue if not _matches(Chem.MolFromSmiles(s), _UNKEPT)]


def embed(smiles: str, conformers: int, seed: int = 0) -> list[tuple[Chem.Mol, int]]:
    """Conformers by ETKDGv3, optimised by MMFF94; those that converged, with hydrogens.

    Args:
        smiles: The molecule.
        conformers: How many to try.
        seed: Another one gives other conformers.
    """
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    parameters: Any = rdDistGeom.ETKDGv3()
    # RDKit's conformer i has the seed (i + 1) times this one: 0 would make all alike.
    parameters.randomSeed = 1 + derive_seed("conformers", smiles, seed) % 10_000_000
    parameters.maxIterations = 50
    found = rdDistGeom.EmbedMultipleConfs(mol, conformers, parameters)
    if not found or not rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        return []
    done = rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol, maxIters=500)
    return [(mol, conf) for conf, (left, _) in zip(found, done, strict=True) if left == 0]


def kekulised_orders(mol: Chem.Mol) -> NDArray[np.int8]:
    """Bond orders (N, N) of a molecule with aromatic rings written as alternating bonds."""
    plain = Chem.Mol(mol)
    Chem.Kekulize(plain, clearAromaticFlags=True)
    return Chem.GetAdjacencyMatrix(plain, useBO=True).astype(np.int8)  # type: ignore[no-any-return]


def _placed(job: tuple[str, int]) -> list[tuple[str, NDArray[np.uint8], NDArray[np.float32]]]:
    smiles, conformers = job
    rows = []
    for mol, conf in embed(smiles, conformers):
        numbers = np.array([a.GetAtomicNum() for a in mol.GetAtoms()], np.uint8)
        positions = mol.GetConformer(conf).GetPositions()
        if (bond_orders(numbers, positions) == kekulised_orders(mol)).all():
            rows.append((smiles, numbers, positions.astype(np.float32)))
    return rows


def graphs(heavy_atoms: int, tick: Callable[[str, int, int], None]) -> list[str]:
    """Canonical SMILES of every kept molecule of at most so many heavy atoms, sorted by size."""
    level = {Chem.MolToSmiles(Chem.MolFromSmiles(s)) for s in ("C", "N", "O")}
    kept: list[str] = []
    for size in range(1, heavy_atoms + 1):
        skeletons = sorted(level)
        found: set[str] = set()
        few = 0 if size > 4 else len(skeletons)  # small jobs, done sooner than processes start
        for done, molecules in enumerate(spread(_closed, skeletons, few, size=8)):
            found.update(molecules)
            tick(f"graphs of {size} heavy atoms", done + 1, len(skeletons))
        kept += sorted(found)
        level = {new for s in skeletons for new in _grown(s)} if size < heavy_atoms else set()
    return kept


def generate(
    heavy_atoms: int, conformers: int, tick: Callable[[str, int, int], None]
) -> Molecules:
    """Makes the data set, on all cores.

    Args:
        heavy_atoms: At most so many heavy atoms.
        conformers: At most so many conformers of each molecule.
        tick: Called with (what is being done, how many are done, of how many).
    """
    jobs = [(s, conformers) for s in graphs(heavy_atoms, tick)]
    rows = []
    for done, new in enumerate(spread(_placed, jobs, few=100, size=16)):
        rows += new
        tick("geometries", done + 1, len(jobs))
    names = [s for s, _, _ in rows]
    return Molecules.from_list([(z, x) for _, z, x in rows], names, targets=targets(names))


def targets(smiles: list[str]) -> dict[str, list[float]]:
    """Properties that a condition may name: Crippen's logP, and the polar surface in A^2."""
    mols = [Chem.MolFromSmiles(s) for s in smiles]
    return {
        "logp": [Crippen.MolLogP(mol) for mol in mols],  # type: ignore[attr-defined]
        "tpsa": [rdMolDescriptors.CalcTPSA(mol) for mol in mols],
    }
