r"""How good generated conformers are: coverage and average minimum RMSD (Ganea et al., 2021).

For a molecule with L reference and K = 2L generated conformers, with :math:`d_{lk}` the RMSD of
the heavy atoms after the best superposition and over the molecule's symmetries,

.. math:: \text{COV-R} = \tfrac1L |\{l : \min_k d_{lk} < \delta\}|, \quad
    \text{AMR-R} = \tfrac1L \sum_l \min_k d_{lk},

and COV-P, AMR-P with l and k exchanged: recall asks whether each reference was found, precision
whether each generated conformer is a real one (https://arxiv.org/abs/2106.07802, eq. 12 to 15;
Xu et al., 2022, https://arxiv.org/abs/2203.02923, call AMR "MAT").

Where no ensemble was measured or computed, the reference is one that RDKit makes (ETKDGv3, then
MMFF94), and the same method with another seed is a *floor*: what a perfect copy of the method
would score. It is no competitor, and a network that comes near it has learnt the force field.

Everything is a function of the arguments and of RDKit's version.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdMolAlign

from gendiff.errors import ConfigError
from gendiff.modality import Measure
from gendiff.noise import derive_seed
from gendiff_molecule.embedded import embed

_ATTEMPTS = 50  # conformers tried for a reference ensemble, so also its largest size
_PRUNE = 0.1  # Angstrom: reference conformers nearer to each other are one
_SYMMETRIES = 1000  # looked at for one RMSD; more occur only with many equal branches
_ORDERS = {
    Chem.BondType.SINGLE: 1,
    Chem.BondType.DOUBLE: 2,
    Chem.BondType.TRIPLE: 3,
    Chem.BondType.AROMATIC: 4,
}

Array = NDArray[np.float64]


# --- graphs ------------------------------------------------------------------------------------


def parse(smiles: str) -> Chem.Mol:
    """The molecule of a SMILES, with its hydrogens as atoms after the heavy ones.

    Raises:
        ConfigError: RDKit cannot read it, or it is not one molecule of known elements.
    """
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        raise ConfigError(f"smiles: RDKit cannot read {smiles!r}. Ethanol, for one, is CCO.")
    if not mol.GetNumAtoms():
        raise ConfigError(f"smiles: {smiles!r} has no atoms. Ethanol, for one, is CCO.")
    pieces = len(Chem.GetMolFrags(mol))
    if pieces > 1:
        raise ConfigError(
            f"smiles: {smiles!r} is {pieces} molecules. Give them one by one, without the dot."
        )
    mol = Chem.AddHs(mol)
    if any(a.GetAtomicNum() == 0 for a in mol.GetAtoms()):
        raise ConfigError(f"smiles: {smiles!r} has an atom without an element. Write it out.")
    odd = {str(b.GetBondType()) for b in mol.GetBonds() if b.GetBondType() not in _ORDERS}
    if odd:
        raise ConfigError(
            f"smiles: {smiles!r} has a {min(odd)} bond. "
            "Single, double, triple and aromatic ones are known."
        )
    return mol


def graph(smiles: str) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Atomic numbers and bonds of a SMILES, hydrogens included.

    Returns:
        Atomic numbers (N,), in the order in which RDKit reads the SMILES with the hydrogens after
        the heavy atoms, and rows (first atom, second atom, order), (E, 3), order 1, 2, 3 or 4 for
        aromatic.

    Raises:
        ConfigError: RDKit cannot read it, or it is not one molecule of known elements.
    """
    mol = parse(smiles)
    bonds = [
        (b.GetBeginAtomIdx(), b.GetEndAtomIdx(), _ORDERS[b.GetBondType()]) for b in mol.GetBonds()
    ]
    return _numbers(mol), np.array(bonds, np.int16).reshape(-1, 3)


def flexible(smiles: str, hydrogens: bool = False) -> int:
    """How many internal rotations a molecule has: rotatable bonds plus freedom of its rings.

    A bond counts if it is single, in no ring, no end of it has a triple bond, and both ends have
    another neighbour. A ring of n atoms counts n - 3, less one for each of its bonds that is not
    single, and never below 0: cyclohexane 3, cyclohexene 2, benzene 0. Rings that share atoms are
    counted as if they did not, so bicycles are somewhat stiffer than they count. Amides count.

    Args:
        smiles: The molecule.
        hydrogens: Whether a hydrogen is a neighbour: then CH3, NH2 and OH at the ends count. They
            do not by default, since heavy-atom RMSD does not see them turn.
    """
    mol = parse(smiles)
    # Kept hydrogens and not RemoveHs' choice of them: H2 stays a molecule, and has no rotation.
    kept = [hydrogens or a.GetAtomicNum() > 1 for a in mol.GetAtoms()]
    count = 0
    for bond in mol.GetBonds():
        if bond.GetBondType() != Chem.BondType.SINGLE or bond.IsInRing():
            continue
        count += all(
            kept[end.GetIdx()]
            and sum(kept[a.GetIdx()] for a in end.GetNeighbors()) > 1
            and all(b.GetBondType() != Chem.BondType.TRIPLE for b in end.GetBonds())
            for end in (bond.GetBeginAtom(), bond.GetEndAtom())
        )
    for ring in mol.GetRingInfo().BondRings():
        stiff = sum(mol.GetBondWithIdx(b).GetBondType() != Chem.BondType.SINGLE for b in ring)
        count += max(0, len(ring) - 3 - stiff)
    return count


def _numbers(mol: Chem.Mol) -> NDArray[np.uint8]:
    return np.array([a.GetAtomicNum() for a in mol.GetAtoms()], np.uint8)


# --- ensembles ---------------------------------------------------------------------------------


def baseline(smiles: str, count: int, seed: int, optimise: bool = True) -> Array:
    """Conformers by ETKDGv3 alone, or with MMFF94 after it.

    Args:
        smiles: The molecule.
        count: How many to try; those that fail, or that MMFF94 leaves unconverged, are missing.
        seed: Any integer; other seeds give other conformers.
        optimise: Whether MMFF94 follows.

    Returns:
        (K, N, 3) with K <= ``count``, in Angstrom, atoms as in :func:`graph`.
    """
    mol = parse(smiles)
    # RDKit gives conformer i the seed (i + 1) * seed: of the seeds 1 and 2, half the conformers
    # would be the same, and of seed 0 all. Hashed seeds have nothing in common.
    key = 1 + derive_seed("conformers", smiles, seed) % 10_000_000
    if optimise:
        found = [mol.GetConformer(i).GetPositions() for mol, i in embed(smiles, count, key)]
    else:
        parameters = rdDistGeom.ETKDGv3()
        parameters.randomSeed = key  # type: ignore[assignment]
        parameters.maxIterations = 50  # type: ignore[assignment] # as in embed
        made = rdDistGeom.EmbedMultipleConfs(mol, count, parameters)
        found = [mol.GetConformer(i).GetPositions() for i in made]
    return np.array(found).reshape(-1, mol.GetNumAtoms(), 3)


def reference_ensemble(smiles: str, seed: int) -> Array:
    """A stand-in for a measured ensemble: ETKDGv3 and MMFF94, near-duplicates dropped.

    Of 50 conformers one is kept if its heavy atoms are 0.1 Angstrom or more (RMSD) from those of
    every one kept before it. Weights by energy are not applied. An unspecified stereocentre takes
    both forms.

    Returns:
        (L, N, 3) with L <= 50, in Angstrom, atoms as in :func:`graph`; L = 0 for what RDKit
        cannot place or MMFF94 has no parameters for.
    """
    found = baseline(smiles, _ATTEMPTS, derive_seed("reference", seed))
    mol, kept = parse(smiles), list[int]()
    for i in range(len(found)):
        if not kept or rmsd_matrix(mol, found[kept], found[[i]]).min() >= _PRUNE:
            kept.append(i)
    return found[kept]


# --- distances and figures ---------------------------------------------------------------------


def rmsd_matrix(
    mol: Chem.Mol,
    reference_conformers: ArrayLike,
    generated_conformers: ArrayLike,
    mirror: bool = False,
) -> Array:
    """RMSD of the heavy atoms, over superpositions and symmetries of the graph.

    Each value is RDKit's ``GetBestRMS`` of the molecules without hydrogens: rotations and
    translations, no reflections, as in the protocols of GeoDiff and torsional diffusion. So the
    mirror image of a chiral conformer is another conformer, for molecules without stereocentres
    too, and a reference ensemble has to hold both. Where a SMILES leaves stereo open, generated
    conformers may be of any stereoisomer, and match a reference of the same one only.

    At most 1000 symmetries are tried, so that highly symmetric molecules end in time; there the
    value is an upper bound.

    Args:
        mol: The graph.
        reference_conformers: In Angstrom, atoms as in ``mol``, (L, N, 3).
        generated_conformers: As these, (K, N, 3).
        mirror: Whether to take the better of each generated conformer and its mirror image.

    Returns:
        In Angstrom, (L, K).
    """
    references = np.asarray(reference_conformers, np.float64)
    generated = np.asarray(generated_conformers, np.float64)
    if mirror and references.size and generated.size:
        flipped = rmsd_matrix(mol, references, generated * [1, 1, -1])
        return np.minimum(rmsd_matrix(mol, references, generated), flipped)
    left, right = _heavy(mol, references), _heavy(mol, generated)
    values = [
        rdMolAlign.GetBestRMS(right, left, k, i, maxMatches=_SYMMETRIES)
        for i in range(len(references))
        for k in range(len(generated))
    ]
    return np.array(values, np.float64).reshape(len(references), len(generated))


def _heavy(mol: Chem.Mol, conformers: Array) -> Chem.Mol:
    """The molecule with these conformers (K, N, 3), numbered from 0, without hydrogens."""
    mol = Chem.Mol(mol)
    mol.RemoveAllConformers()
    for positions in conformers:
        conformer = Chem.Conformer(mol.GetNumAtoms())
        conformer.SetPositions(np.ascontiguousarray(positions))
        mol.AddConformer(conformer, assignId=True)
    return Chem.RemoveHs(mol)


def coverage(rmsd: ArrayLike, threshold: float) -> tuple[float, float]:
    """COV-R and COV-P, 0 to 1, of an RMSD matrix (L references, K generated), in Angstrom."""
    d = np.asarray(rmsd, np.float64)
    return float((d.min(1) < threshold).mean()), float((d.min(0) < threshold).mean())


def amr(rmsd: ArrayLike) -> tuple[float, float]:
    """AMR-R and AMR-P, in Angstrom, of an RMSD matrix (L references, K generated)."""
    d = np.asarray(rmsd, np.float64)
    return float(d.min(1).mean()), float(d.min(0).mean())


@dataclass(frozen=True)
class _Known:
    """What does not depend on the generated conformers. Matrices: (L, up to 2L), in Angstrom."""

    references: Array
    optimised: Array
    embedded: Array


@lru_cache(maxsize=512)
def _known(smiles: str, seed: int) -> _Known | None:
    """The reference and the baselines' RMSD matrices; None if RDKit makes no conformers."""
    mol, references = parse(smiles), reference_ensemble(smiles, seed)
    count = 2 * len(references)
    if not count:
        return None
    seeds = derive_seed("mmff", seed), derive_seed("etkdg", seed)
    sets = [baseline(smiles, count, s, optimise=s == seeds[0]) for s in seeds]
    if not all(len(made) for made in sets):
        return None
    return _Known(references, *(rmsd_matrix(mol, references, made) for made in sets))


def conformers_wanted(smiles: str, seed: int) -> int:
    """2L: how many conformers :func:`measure` looks at; 0 if it cannot judge the molecule."""
    known = _known(smiles, seed)
    return 0 if known is None else 2 * len(known.references)


def measure(
    samples: Mapping[str, Sequence[tuple[ArrayLike, ArrayLike]]],
    seed: int,
    threshold: float = 0.5,
) -> list[Measure]:
    """All figures about generated conformers, against ensembles that RDKit makes.

    Args:
        samples: For each SMILES its conformers as (atomic numbers, positions in Angstrom), with
            the atoms of :func:`graph` in its order, or the heavy ones alone. The first 2L are
            judged, L being the size of the reference ensemble.
        seed: Seed of the reference and the baselines.
        threshold: In Angstrom, of coverage; 0.5 is usual for QM9, 0.75 for drugs.

    Returns:
        Mean and median over molecules of COV and AMR, recall and precision, each with the figure
        of ETKDGv3 and MMFF94 with another seed as its floor; then, named ``etkdg_…``, the means
        of ETKDGv3 alone. Nothing if no molecule can be judged.

    Raises:
        ValueError: A conformer's atoms are not those of its SMILES.
    """
    rows: dict[str, list[tuple[float, ...]]] = {"": [], "mmff": [], "etkdg": []}
    judged = wanted = broken = references = 0
    for smiles, conformers in samples.items():
        known = _known(smiles, seed)
        if known is None or not conformers:
            continue
        count = 2 * len(known.references)
        generated = _stacked(smiles, conformers[:count], known.references)
        # A conformer that is not finite counts as one with all its atoms in one place.
        finite = np.array([bool(np.isfinite(x).all()) for x in generated])
        generated = np.where(finite[:, None, None], generated, 0.0)
        matrix = rmsd_matrix(parse(smiles), known.references, generated)
        matrices = {"": matrix, "mmff": known.optimised, "etkdg": known.embedded}
        for name, d in matrices.items():
            rows[name].append((*coverage(d, threshold), *amr(d)))
        judged, wanted = judged + len(generated), wanted + count
        references, broken = references + len(known.references), broken + int((~finite).sum())
    if not rows[""]:
        return []
    counts = f"{len(rows[''])} molecules, {judged} conformers"
    counts += f" ({broken} of them not finite)" if broken else ""
    counts += f" of the {wanted} that the protocol asks for" if judged < wanted else ""
    missing = len(samples) - len(rows[""])
    counts += f", {missing} molecules not judged" if missing else ""
    counts += f", against {references} of ETKDGv3+MMFF94; "
    counts += "floor: the same method with another seed, which a copy of it would reach"
    return _table(rows, threshold, counts)


def _table(
    rows: Mapping[str, list[tuple[float, ...]]], threshold: float, counts: str
) -> list[Measure]:
    table = {name: np.array(values) for name, values in rows.items()}
    means = {name: values.mean(0) for name, values in table.items()}
    medians = {name: np.median(values, 0) for name, values in table.items()}
    about = (
        ("coverage_recall", "higher", f"share of references with a sample within {threshold:g} A"),
        (
            "coverage_precision",
            "higher",
            f"share of samples with a reference within {threshold:g} A",
        ),
        ("amr_recall", "lower", "RMSD in A from a reference to the nearest sample"),
        ("amr_precision", "lower", "RMSD in A from a sample to the nearest reference"),
    )
    measures = []
    for i, (name, better, definition) in enumerate(about):
        definition += ", heavy atoms, symmetry, no reflection"
        for suffix, kind in (("", means), ("_median", medians)):
            word = suffix[1:] or "mean"
            note = f"{definition}, {word} over molecules; {counts}"
            value, floor = float(kind[""][i]), float(kind["mmff"][i])
            measures.append(Measure(name + suffix, value, better, floor, note))
    for i, (name, better, definition) in enumerate(about):
        median = float(medians["etkdg"][i])
        note = f"ETKDGv3 without MMFF94 in the samples' place, median {median:.3g}; {definition}"
        value, floor = float(means["etkdg"][i]), float(means["mmff"][i])
        measures.append(Measure(f"etkdg_{name}", value, better, floor, note))
    return measures


def _stacked(
    smiles: str, conformers: Sequence[tuple[ArrayLike, ArrayLike]], references: Array
) -> Array:
    """Positions (K, N, 3); the hydrogens, where missing, are put at 0, since none looks there."""
    numbers = _numbers(parse(smiles))
    made = np.zeros((len(conformers), *references.shape[1:]))
    for row, (z, x) in zip(made, conformers, strict=True):
        z = np.asarray(z)
        for rows in (numbers > 0, numbers > 1):
            if np.array_equal(z, numbers[rows]):
                row[rows] = x
                break
        else:
            raise ValueError(
                f"a conformer has the atoms {z.tolist()}, but the SMILES {smiles!r} has "
                f"{numbers.tolist()}, in this order"
            )
    return made
