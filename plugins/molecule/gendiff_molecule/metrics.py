r"""How good generated molecules are, by the field's protocols, each under its name.

Every figure compares with held-out molecules and comes with a *floor*: the same figure for
held-out molecules in the samples' place, read by the same code. Real molecules do not score 100 %
either: the bond table misreads about one in twenty of QM9.

``edm``: bonds from distances (:mod:`gendiff_molecule.bonds`), and what Hoogeboom et al. (2022,
https://arxiv.org/abs/2203.17003, section 5.1) print: the shares of stable atoms and of stable
molecules, of molecules that RDKit can sanitise (*valid*, of which the largest fragment gives the
SMILES), of distinct ones among the valid, and of distinct ones that are not in the training split.
RDKit fills open valences with hydrogens that nobody generated, so validity exceeds stability.

``strict``: as EQGAT-diff (Le et al., 2024, https://arxiv.org/abs/2309.17296) counts, one fragment
without added hydrogens or radicals.

``geometry``: how far bond lengths, angles and torsions are from held-out ones, by the Wasserstein
distance :math:`\int |F(u) - G(u)|\,du` of two distributions with cumulatives F and G, averaged
over the commonest kinds of the held-out ones; and the strain that MMFF94 finds.

Without hydrogens (``"removed"``) the table gives the bonds of heavy atoms and RDKit the hydrogens;
stability and strict validity are not defined then and left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rdkit import Chem, RDLogger
from rdkit.Chem import rdForceFieldHelpers as mmff
from scipy.stats import wasserstein_distance

from gendiff.errors import DataError
from gendiff.modality import Measure
from gendiff.noise import generator
from gendiff_molecule.bonds import VALENCE, bond_orders, covered, stable_atoms, to_mol
from gendiff_molecule.molecules import SYMBOLS, Molecules

_REFERENCE = 5000  # held-out molecules that distributions are compared with, fewer if there are
_KINDS = 12  # commonest kinds of bonds, angles and torsions that are compared
_CROWDED = 8  # sum of orders at an atom beyond which no element here is valid
_RELAXED = 200  # molecules whose strain is found; drug-sized ones take 0.1 s each
_BUSTED = 200  # molecules that PoseBusters looks at, 0.05 s each
_STRAIGHT = math.sin(math.radians(5))  # a torsion about an angle this near 180 means nothing
_SHARES = {  # name: (protocol, definition, of what)
    "atom_stability": ("edm", "atoms whose bond orders add to their valence", "atoms"),
    "molecule_stability": ("edm", "molecules of stable atoms alone", "molecules"),
    "validity": ("edm", "RDKit sanitises it, adding hydrogens where it likes", "molecules"),
    "uniqueness": ("edm", "distinct SMILES of largest fragments", "valid ones"),
    "valid_and_unique": ("edm", "validity x uniqueness", "molecules"),
    "novelty": ("edm", "SMILES unlike those of {} training molecules read alike", "unique ones"),
    "connected": ("strict", "valid, in one fragment", "molecules"),
    "unique_connected": ("strict", "distinct SMILES", "connected ones"),
    "strict_valid": ("strict", "valid, one fragment, no added hydrogen, no radical", "molecules"),
}
_KINDS_OF = {
    "bond_length_w1_angstrom": "bond lengths, by elements and order",
    "bond_angle_w1_degrees": "angles between bonds, by the element in the middle",
    "torsion_w1_degrees": "torsions without sign, by the bond in the middle",
}
Values = tuple[NDArray[np.int64], NDArray[np.float64]]  # kinds and values, both (K,)


def measure(
    samples: Molecules, train_smiles: Set[str], held_out: Molecules, hydrogens: str, seed: int
) -> Iterator[Measure]:
    """All figures about samples, those that take long last; the caller may stop before them.

    Args:
        samples: Generated molecules; positions may be non-finite, which is invalid.
        train_smiles: What :func:`table_smiles` reads from the training split; novelty needs it.
        held_out: Held-out molecules.
        hydrogens: ``"explicit"``, or ``"removed"`` if samples are of heavy atoms alone.
        seed: Seed of the choice of held-out molecules.

    Yields:
        The figures; none if there are fewer than two samples or held-out molecules.

    Raises:
        DataError: There is an element that the bond table does not know.
    """
    explicit = hydrogens == "explicit"
    if min(len(samples), len(held_out)) < 2:
        return
    order = torch.randperm(len(held_out), generator=generator("floor", seed)).numpy()
    half = len(order) // 2

    def chosen(which: NDArray[np.int64]) -> Molecules:
        molecules = held_out.select(which)
        return molecules if explicit else molecules.without_hydrogens()

    fake = judge(samples)
    real = judge(chosen(order[: len(samples)]))
    about = "" if explicit else ", heavy atoms with RDKit's hydrogens"
    yield from _shares(fake, real, train_smiles, explicit, about)
    # The distributions of one half are compared with those of the other.
    reference = judge(chosen(order[half:][:_REFERENCE]))
    stand_in = real.first(half)
    yield from _distances(fake, stand_in, reference, about)
    yield from _variations(fake, stand_in, reference, about)
    if explicit:
        yield from _strain(fake, real)
    yield from _busted(fake, real, about)


def table_smiles(molecules: Molecules) -> list[str | None]:
    """Canonical SMILES of each molecule's largest fragment, None where it is invalid.

    Bonds are of the table, not those that come with the data, and hydrogen atoms are written out:
    this is what uniqueness and novelty of the protocol ``edm`` compare.
    """
    return judge(molecules).smiles


@dataclass(frozen=True)
class Judged:
    """Molecules with the table's bonds, and what RDKit thinks of them.

    Args:
        molecules: M molecules.
        stable: Whether each atom's orders add to its valence, (R,).
        smiles: Of the largest fragment, None where sanitisation fails, (M,).
        connected: Valid and of one fragment, (M,).
        strict: Connected, without implicit hydrogens or radicals, (M,).
    """

    molecules: Molecules
    stable: NDArray[np.bool_]
    smiles: list[str | None]
    connected: NDArray[np.bool_]
    strict: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.smiles)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Whether RDKit sanitises each molecule, (M,)."""
        return np.array([smiles is not None for smiles in self.smiles], np.bool_)

    def first(self, count: int) -> Judged:
        """The first molecules, fewer if there are."""
        few = self.molecules.select(np.arange(min(count, len(self))))
        atoms = self.stable[: few.offsets[-1]]
        parts = self.smiles[:count], self.connected[:count], self.strict[:count]
        return Judged(few, atoms, *parts)

    def rdkit(self, i: int) -> Chem.Mol:
        """Molecule i in 3D, sanitised; it must be valid."""
        orders = np.zeros((self.molecules.sizes[i],) * 2, np.int8)
        a, b, order = self.molecules.bonds_of(i).T
        orders[a, b] = order
        numbers, positions = self.molecules[i]
        mol = to_mol(numbers, orders, positions)
        Chem.SanitizeMol(mol)
        return mol


def judge(molecules: Molecules) -> Judged:
    """Reads bonds from distances and sanitises each molecule.

    Collapsed molecules, where all are bonded to all, do not reach RDKit: beyond 127 bonds at an
    atom it fails with an internal error. What it has refused no later step sees.

    Raises:
        DataError: There is an element that the bond table does not know.
    """
    _check_elements(molecules)
    bonds, stable = [np.empty((0, 3), np.int16)], [np.empty(0, np.bool_)]
    found: list[tuple[str | None, int, bool]] = []
    for numbers, positions in molecules:
        finite = len(numbers) > 0 and bool(np.isfinite(positions).all())
        none = np.zeros((len(numbers),) * 2, np.int8)
        orders = bond_orders(numbers, positions) if finite else none
        a, b = np.nonzero(np.triu(orders))
        bonds.append(np.column_stack([a, b, orders[a, b]]).astype(np.int16))
        stable.append(stable_atoms(numbers, orders))
        # Not finite: without bonds each atom would be a valid fragment.
        sane = finite and orders.sum(1).max() <= _CROWDED
        found.append(_read(to_mol(numbers, orders)) if sane else (None, 0, False))
    offsets = np.cumsum([len(rows) for rows in bonds]).astype(np.int64)
    connected = np.array([fragments == 1 for _, fragments, _ in found], np.bool_)
    complete = np.array([full for *_, full in found], np.bool_)
    return Judged(
        replace(molecules, bonds=np.concatenate(bonds), bond_offsets=offsets),
        np.concatenate(stable),
        [smiles for smiles, *_ in found],
        connected,
        connected & complete,
    )


def _read(mol: Chem.Mol) -> tuple[str | None, int, bool]:
    """SMILES of the largest fragment, number of fragments, and whether no hydrogen is implicit."""
    try:
        Chem.SanitizeMol(mol)
    except ValueError:
        return None, 0, False
    complete = not any(
        atom.GetNumImplicitHs() or atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()
    )
    count = len(Chem.GetMolFrags(mol))
    if count > 1:  # of equally large ones the first, as in EDM
        mol = max(Chem.GetMolFrags(mol, asMols=True), key=lambda part: part.GetNumAtoms())
    return Chem.MolToSmiles(mol), count, complete


def _check_elements(molecules: Molecules) -> None:
    if covered(molecules.numbers):
        return
    row = int(np.flatnonzero(~np.isin(molecules.numbers, list(VALENCE)))[0])
    z = int(molecules.numbers[row])
    name = SYMBOLS[z] if z < len(SYMBOLS) else f"element {z}"
    i = int(np.searchsorted(molecules.offsets, row, side="right")) - 1
    known = ", ".join(SYMBOLS[z] for z in VALENCE)
    raise DataError(
        f"The bond table knows no {name}: found in molecule {i}. It knows {known}; "
        "remove the molecules with other elements."
    )


# --- shares ------------------------------------------------------------------------------------


def _shares(
    fake: Judged, real: Judged, train_smiles: Set[str], explicit: bool, about: str
) -> list[Measure]:
    """The protocols ``edm`` and ``strict``."""
    measures = []
    floors = _counts(real, train_smiles, explicit)
    for name, (value, count, error) in _counts(fake, train_smiles, explicit).items():
        protocol, what, of = _SHARES[name]
        what = what.format(len(train_smiles))
        note = f"protocol {protocol}{about}: {what}; of {count} {of} in {len(fake)} samples, "
        note += f"floor: {len(real)} held-out molecules"
        floor = floors[name][0] if name in floors else None
        measures.append(Measure(name, value, "higher", floor, note, error))
    return measures


def _counts(
    judged: Judged, train_smiles: Set[str], explicit: bool
) -> dict[str, tuple[float, int, float]]:
    """Share, of how many, and standard error by name; a share of nothing is left out."""
    valid = [smiles for smiles in judged.smiles if smiles is not None]
    whole = [s for s, one in zip(judged.smiles, judged.connected, strict=True) if one]
    unique = set(valid)
    every = len(judged)
    found = {
        "validity": (len(valid), every),
        "uniqueness": (len(unique), len(valid)),
        "valid_and_unique": (len(unique), every),
        "novelty": (len(unique - train_smiles), len(unique) if train_smiles else 0),
        "connected": (len(whole), every),
        "unique_connected": (len(set(whole)), len(whole)),
    }
    shares = {}
    if explicit:
        sizes = judged.molecules.sizes
        owner = np.repeat(np.arange(every), sizes)
        stable = np.bincount(owner[judged.stable], minlength=every)
        share = float(judged.stable.mean()) if len(owner) else 0.0
        # Atoms of one molecule fail together, so molecules are the units of the error.
        error = float(np.std(stable - share * sizes)) / max(float(sizes.mean()), 1e-9)
        shares["atom_stability"] = (share, len(owner), error / math.sqrt(every))
        found = {"molecule_stability": (int((stable == sizes)[sizes > 0].sum()), every)} | found
        found["strict_valid"] = (int(judged.strict.sum()), every)
    for name, (part, count) in found.items():
        if count:
            p = part / count
            shares[name] = (p, count, math.sqrt(p * (1 - p) / count))
    return shares


# --- distributions -----------------------------------------------------------------------------


def _distances(fake: Judged, stand_in: Judged, reference: Judged, about: str) -> list[Measure]:
    """Wasserstein distances of bond lengths, angles and torsions of valid molecules."""
    measures = []
    valid = int(fake.valid.sum())
    counts = f"{valid} valid of {len(fake)} samples against {len(reference)} held-out molecules, "
    counts += f"floor: {len(stand_in)} others"
    parts = [_geometry(judged) for judged in (fake, stand_in, reference)]
    for name, a, b, c in zip(_KINDS_OF, *parts, strict=True):
        value, floor = _apart(a, c), _apart(b, c)
        if value is not None:
            note = f"protocol geometry{about}: Wasserstein distance of {_KINDS_OF[name]}, mean of "
            note += f"the {_KINDS} commonest kinds by share, {value[1]:.0%} of the held-out ones; "
            best = None if floor is None else floor[0]
            measures.append(Measure(name, value[0], "lower", best, note + counts))
    return measures


def _apart(values: Values, reference: Values) -> tuple[float, float] | None:
    """Mean Wasserstein distance over the reference's commonest kinds, and their share of it.

    Kinds that are missing among the values are left out; None if all are.
    """
    kinds, counts = np.unique(reference[0], return_counts=True)
    total = weight = 0.0
    for kind, count in [
        (kinds[k], counts[k]) for k in np.argsort(-counts, kind="stable")[:_KINDS]
    ]:
        mine = values[1][values[0] == kind]
        if len(mine):
            theirs = reference[1][reference[0] == kind]
            total += count * float(wasserstein_distance(mine, theirs))
            weight += count
    return (total / weight, float(weight / counts.sum())) if weight else None


def _geometry(judged: Judged) -> tuple[Values, Values, Values]:
    """Bond lengths, angles at an atom and torsions about a bond, each once, of valid molecules.

    With the bonds in both directions, sorted by their first atom, an angle is two bonds that leave
    an atom, and a torsion adds one that leaves the end of the second.
    """
    few = judged.molecules.select(judged.valid)  # where all are bonded there are too many angles
    z, x = few.numbers.astype(np.int64), few.positions.astype(np.float64)
    shift = np.repeat(few.offsets[:-1], np.diff(few.bond_offsets))
    i, j, order = few.bonds.astype(np.int64).T
    i, j = i + shift, j + shift
    start, end, order = np.r_[i, j], np.r_[j, i], np.r_[order, order]
    by_atom = np.argsort(start, kind="stable")
    start, end, order = start[by_atom], end[by_atom], order[by_atom]
    degree = np.bincount(start, minlength=len(z))
    starts = np.cumsum(degree) - degree

    def leaving(atoms: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For each bond that leaves each of the atoms: which atom of the list, which bond."""
        repeats = degree[atoms]
        which = np.repeat(np.arange(len(atoms)), repeats)
        within = np.arange(len(which)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        return which, starts[atoms][which] + within

    kinds = (np.minimum(z[start], z[end]) * 256 + np.maximum(z[start], z[end])) * 4 + order
    vectors = x[end] - x[start]
    once = start < end
    lengths = kinds[once], np.linalg.norm(vectors[once], axis=1)

    a, b = leaving(start)
    a, b = a[end[a] != end[b]], b[end[a] != end[b]]  # from a's end over the common atom to b's end
    once = end[a] < end[b]
    angles = z[start[a[once]]], _angle(vectors[a[once]], vectors[b[once]])

    a, b = a[start[b] < end[b]], b[start[b] < end[b]]  # b is the middle bond
    which, c = leaving(end[b])
    a, b = a[which], b[which]
    open_ = (end[c] != start[b]) & (end[c] != end[a])  # neither back nor around a triangle
    a, b, c = a[open_], b[open_], c[open_]
    left, right = np.cross(vectors[a], vectors[b]), np.cross(vectors[b], vectors[c])
    bent = (_sine(left, vectors[a], vectors[b]) > _STRAIGHT) & (
        _sine(right, vectors[b], vectors[c]) > _STRAIGHT
    )
    # cross(b1, b2) with b1 = -vectors[a]: the angle of the planes is that of -left and right.
    torsions = kinds[b[bent]], _angle(-left[bent], right[bent])
    return lengths, angles, torsions


def _angle(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angle in degrees between the rows of two arrays, (K, 3); 0 for a vector of length 0."""
    across = np.linalg.norm(np.cross(a, b), axis=1)
    return np.degrees(np.arctan2(across, (a * b).sum(1)))


def _sine(
    cross: NDArray[np.float64], a: NDArray[np.float64], b: NDArray[np.float64]
) -> NDArray[np.float64]:
    scale = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.linalg.norm(cross, axis=1) / np.maximum(scale, 1e-12)


def _variations(fake: Judged, stand_in: Judged, reference: Judged, about: str) -> list[Measure]:
    """Total variation distances of the elements and the sizes, valid or not."""
    measures = []
    for name, what in (
        ("element_variation", "atoms' elements"),
        ("size_variation", "atom counts"),
    ):
        parts = [
            part.molecules.numbers if name == "element_variation" else part.molecules.sizes
            for part in (fake, stand_in, reference)
        ]
        value, floor = (_variation(part, parts[2]) for part in parts[:2])
        note = f"total variation distance of the {what}{about}; {len(fake)} samples against "
        note += f"{len(reference)} held-out molecules, floor: {len(stand_in)} others"
        measures.append(Measure(name, value, "lower", floor, note))
    return measures


def _variation(a: NDArray[np.integer[Any]], b: NDArray[np.integer[Any]]) -> float:
    """Half the summed difference of the shares of each value, 0 to 1."""
    length = int(max(a.max(initial=0), b.max(initial=0))) + 1
    p, q = (np.bincount(v, minlength=length) / max(len(v), 1) for v in (a, b))
    return float(np.abs(p - q).sum()) / 2


# --- energies and PoseBusters ------------------------------------------------------------------


def _strain(fake: Judged, real: Judged) -> list[Measure]:
    """Median MMFF94 strain of strictly valid molecules."""
    found = []
    for judged in (fake, real):
        mols = [judged.rdkit(i) for i in np.flatnonzero(judged.strict)[:_RELAXED]]
        found.append(np.array([e for mol in mols if (e := strain(mol)) is not None]))
    drops, floor = found
    if not len(drops):
        return []
    # The order statistics half a standard deviation of the rank from the middle, to either side.
    ranks = (len(drops) + np.array([-1, 1]) * math.sqrt(len(drops))) / 2
    low, high = np.sort(drops)[np.clip(ranks.astype(int), 0, len(drops) - 1)]
    error = float((high - low) / 2) if np.isfinite(high) else None
    note = "protocol geometry: median fall of the MMFF94 energy on relaxation; of the first "
    note += f"{len(drops)} strictly valid samples that MMFF94 has parameters for; "
    note += f"floor: {len(floor)} held-out molecules"
    best = float(np.median(floor)) if len(floor) else None
    return [Measure("strain_kcal_mol", float(np.median(drops)), "lower", best, note, error)]


def strain(mol: Chem.Mol) -> float | None:
    """Fall of the MMFF94 energy on relaxation in kcal/mol; None if an atom has no parameters."""
    properties = mmff.MMFFGetMoleculeProperties(mol, mmffVariant="MMFF94")
    if properties is None:
        return None
    field = mmff.MMFFGetMoleculeForceField(mol, properties)
    before = field.CalcEnergy()
    field.Minimize(maxIts=1000)
    fall = before - field.CalcEnergy()
    return fall if math.isfinite(fall) else math.inf  # atoms that coincide


def _busted(fake: Judged, real: Judged, about: str) -> list[Measure]:
    """The share that passes PoseBusters (Buttenschoen et al., 2024), if that is installed."""
    if find_spec("posebusters") is None:
        return []
    (value, count), (floor, others) = (_bust(judged) for judged in (fake, real))
    if value is None:
        return []
    note = f"protocol posebusters{about}: passes all tests of its configuration 'mol_fast' "
    note += f"(no energies); of the first {count} connected samples; "
    note += f"floor: {others} held-out molecules"
    error = math.sqrt(value * (1 - value) / count)
    return [Measure("posebusters", value, "higher", floor, note, error)]


def _bust(judged: Judged) -> tuple[float | None, int]:
    """Share that passes, and of how many.

    The configuration ``mol`` adds an energy ratio to 50 new conformers: over 2 s for a molecule of
    QM9, and for 5 of 12 real ones no conformer is found.
    """
    from posebusters import PoseBusters  # type: ignore[import-not-found]

    mols = [judged.rdkit(i) for i in np.flatnonzero(judged.connected)[:_BUSTED]]
    if not mols:
        return None, 0
    table = PoseBusters(config="mol_fast").bust(mols)
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]  # PoseBusters turns it on
    # A test that could not be made is missing, and not passed.
    passed = [all(value is True or value == 1 for value in row) for row in table.to_numpy()]
    return sum(passed) / len(passed), len(passed)
