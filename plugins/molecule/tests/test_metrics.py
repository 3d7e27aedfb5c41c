"""The metrics: hand-made molecules, closed forms, real ones, and that good beats bad."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolTransforms
from scipy.stats import wasserstein_distance

from gendiff.errors import DataError
from gendiff.modality import Measure
from gendiff_molecule import metrics as module
from gendiff_molecule.metrics import judge, measure, strain, table_smiles
from gendiff_molecule.molecules import Molecules

QM9 = Path(__file__).resolve().parents[4] / "shared" / "data" / "qm9" / "qm9.npz"
Atoms = tuple[np.ndarray, np.ndarray]
STABILITY = {"atom_stability", "molecule_stability", "strict_valid", "strain_kcal_mol"}


def relaxed(smiles: str, seed: int = 1) -> Atoms:
    """Numbers and positions of a molecule at its MMFF94 minimum."""
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=seed)
    rdForceFieldHelpers.MMFFOptimizeMolecule(mol, maxIters=2000)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], np.uint8)
    return numbers, mol.GetConformer().GetPositions()


def join(a: Atoms, b: Atoms, shift: float = 20.0) -> Atoms:
    return np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1] + shift])


def moved(molecules: Molecules, noise: float, seed: int = 0) -> Molecules:
    rng = np.random.default_rng(seed)
    return Molecules.from_list([(z, x + noise * rng.normal(size=x.shape)) for z, x in molecules])


def figures(measures: Iterable[Measure]) -> dict[str, Measure]:
    return {m.name: m for m in measures}


METHANE, ETHENE, ETHANOL = relaxed("C"), relaxed("C=C"), relaxed("CCO")
METHYL = METHANE[0][:-1], METHANE[1][:-1]
LOST = METHANE[0], np.full((5, 3), np.nan)
HEAP = np.full(29, 6, np.uint8), np.zeros((29, 3))
CARBON = np.array([6], np.uint8), np.zeros((1, 3))


@pytest.fixture(scope="module")
def pool() -> Molecules:
    """Small molecules in several conformers."""
    smiles = ["CCO", "CCN", "CC=O", "C1CC1C", "CCCO", "NCC#N", "CC(C)=O", "OCCO", "CCCC", "CNC=O"]
    return Molecules.from_list([relaxed(s, seed) for seed in (1, 2, 3) for s in smiles])


@pytest.mark.parametrize(
    ("atoms", "smiles", "connected", "strict", "stable"),
    [
        (METHANE, "C", True, True, 5),
        (ETHENE, "C=C", True, True, 6),
        (METHYL, "C", True, False, 3),  # valid: RDKit adds the hydrogen that is missing
        (CARBON, "C", True, False, 0),
        (join(ETHENE, METHANE), "C=C", False, False, 11),
        (join(METHANE, ETHENE), "C=C", False, False, 11),  # the largest, not the first
        (HEAP, None, False, False, 0),
        ((np.ones(181, np.uint8), np.zeros((181, 3))), None, False, False, 0),
        (LOST, None, False, False, 0),
        ((METHANE[0], np.where(np.eye(5, 3), np.inf, METHANE[1])), None, False, False, 0),
        ((np.empty(0, np.uint8), np.empty((0, 3))), None, False, False, 0),
        ((METHANE[0], METHANE[1] * 0.4), None, False, False, 1),  # hydrogens bond
        ((METHANE[0], METHANE[1] * 1e30), "C", False, False, 0),  # EDM calls this valid
    ],
)
def test_judge(
    atoms: Atoms, smiles: str | None, connected: bool, strict: bool, stable: int
) -> None:
    judged = judge(Molecules.from_list([atoms]))
    found = judged.smiles[0]
    assert (found and Chem.MolToSmiles(Chem.RemoveHs(Chem.MolFromSmiles(found)))) == smiles
    assert judged.valid.tolist() == [smiles is not None]
    assert judged.connected.tolist() == [connected]
    assert judged.strict.tolist() == [strict]
    assert judged.stable.sum() == stable


def test_smiles_write_hydrogens_out() -> None:
    """So that a methyl is not a methane, as in EDM."""
    found = table_smiles(Molecules.from_list([METHANE, METHYL, LOST]))
    assert found == ["[H]C([H])([H])[H]", "[H]C([H])[H]", None]
    heavy = Molecules.from_list([ETHANOL, METHANE]).without_hydrogens()
    assert table_smiles(heavy) == ["CCO", "C"]


def test_shares_of_a_hand_made_set(pool: Molecules) -> None:
    samples = Molecules.from_list(
        [METHANE, METHANE, ETHENE, METHYL, LOST, HEAP, join(METHANE, ETHENE), ETHANOL]
    )
    train = {s for s in table_smiles(Molecules.from_list([METHANE, ETHANOL])) if s}
    found = figures(measure(samples, train, pool, "explicit", 0))
    atoms = np.array([5, 5, 6, 4, 5, 29, 11, 9])
    stable = np.array([5, 5, 6, 3, 0, 0, 11, 9])
    expected = {
        "atom_stability": stable.sum() / atoms.sum(),
        "molecule_stability": 5 / 8,
        "validity": 6 / 8,
        "uniqueness": 4 / 6,  # the largest fragment of the pair is ethene again
        "valid_and_unique": 4 / 8,
        "novelty": 2 / 4,  # ethene and methyl
        "connected": 5 / 8,
        "unique_connected": 4 / 5,
        "strict_valid": 4 / 8,
    }
    for name, value in expected.items():
        assert found[name].value == pytest.approx(value), name
        assert found[name].better == "higher"
    assert "of 6 valid ones in 8 samples" in found["uniqueness"].note
    assert "2 training molecules" in found["novelty"].note
    assert found["validity"].error == pytest.approx(np.sqrt(0.75 * 0.25 / 8))
    assert found["validity"].floor == 1
    assert "floor: 8 held-out molecules" in found["validity"].note


def test_error_of_atoms_counts_molecules() -> None:
    """All atoms of a molecule together: the error is that of as many coin tosses."""
    good = Molecules.from_list([METHANE] * 50 + [LOST] * 50)
    share, count, error = module._counts(judge(good), set(), True)["atom_stability"]
    assert (share, count) == (0.5, 500)
    assert error == pytest.approx(0.05)


def test_nothing_valid_leaves_shares_of_nothing_out(pool: Molecules) -> None:
    found = figures(measure(Molecules.from_list([LOST, HEAP]), {"C"}, pool, "explicit", 0))
    assert found["validity"].value == found["connected"].value == 0
    assert not {"uniqueness", "novelty", "unique_connected", "strain_kcal_mol"} & set(found)
    assert not {"bond_length_w1_angstrom", "torsion_w1_degrees"} & set(found)


def test_too_few() -> None:
    one = Molecules.from_list([METHANE])
    two = Molecules.from_list([METHANE, ETHENE])
    assert not list(measure(one, set(), two, "explicit", 0))
    assert not list(measure(two, set(), one, "explicit", 0))
    assert not list(measure(Molecules.from_list([]), set(), two, "explicit", 0))
    assert table_smiles(Molecules.from_list([])) == []
    assert list(measure(two, set(), two, "explicit", 0))


@pytest.mark.parametrize(("z", "name"), [(34, "Se"), (80, "element 80"), (0, "X")])
def test_unknown_element(z: int, name: str) -> None:
    odd = METHANE[0].copy()
    odd[0] = z
    samples = Molecules.from_list([METHANE, (odd, METHANE[1])])
    with pytest.raises(DataError, match=f"knows no {name}: found in molecule 1") as error:
        table_smiles(samples)
    assert "\n" not in str(error.value)


def test_same_seed_same_figures(pool: Molecules) -> None:
    samples = moved(pool, 0.02)
    first, again, other = (list(measure(samples, {"C"}, pool, "explicit", n)) for n in (5, 5, 6))
    assert first == again
    assert first != other


@pytest.mark.parametrize("hydrogens", ["explicit", "removed"])
def test_noise_is_worse(pool: Molecules, hydrogens: str) -> None:
    clean = pool if hydrogens == "explicit" else pool.without_hydrogens()
    good = figures(measure(clean, {"C"}, pool, hydrogens, 0))
    bad = figures(measure(moved(clean, 0.08), {"C"}, pool, hydrogens, 0))
    assert (STABILITY & set(good)) == (STABILITY if hydrogens == "explicit" else set())
    names = {"bond_length_w1_angstrom", "validity", "connected"} | (STABILITY & set(good))
    for name in names:
        worse = bad[name].value - good[name].value
        assert worse < 0 if good[name].better == "higher" else worse > 0, name
        assert good[name].floor is not None
    assert good["element_variation"].value == bad["element_variation"].value
    assert all("heavy atoms" in m.note for m in good.values()) == (hydrogens == "removed")


# --- distributions -----------------------------------------------------------------------------


@pytest.mark.parametrize("smiles", ["CCCC", "C1CC1C(N)=O", "C12CC1C2", "CC#N", "OO", "C=CC=O"])
def test_geometry_is_rdkits(smiles: str) -> None:
    """Against nested loops over RDKit's neighbours."""
    judged = judge(Molecules.from_list([METHANE, LOST, relaxed(smiles), HEAP]))
    mol = judged.rdkit(2)
    place = mol.GetConformer()
    near = [[a.GetIdx() for a in atom.GetNeighbors()] for atom in mol.GetAtoms()]
    z = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    lengths, angles, torsions = [], [], []
    for j, around in enumerate(near):
        for k in around:
            if j < k:
                lengths.append(rdMolTransforms.GetBondLength(place, j, k))
            for i in around:
                if i < k:
                    angles.append((z[j], rdMolTransforms.GetAngleDeg(place, i, j, k)))
                for m in near[k]:
                    bent = [
                        rdMolTransforms.GetAngleDeg(place, *three)
                        for three in ((i, j, k), (j, k, m))
                        if len(set(three)) == 3
                    ]
                    if j < k and len({i, j, k, m}) == 4 and max(bent) < 175:
                        torsions.append(abs(rdMolTransforms.GetDihedralDeg(place, i, j, k, m)))
    found = module._geometry(judged)
    methane = module._geometry(judge(Molecules.from_list([METHANE])))
    assert len(methane[2][1]) == 0
    expected = sorted([*lengths, *methane[0][1]])
    np.testing.assert_allclose(np.sort(found[0][1]), expected, atol=1e-5)
    expected = sorted([*(angle for _, angle in angles), *methane[1][1]])
    np.testing.assert_allclose(np.sort(found[1][1]), expected, atol=1e-3)
    np.testing.assert_allclose(np.sort(found[2][1]), sorted(torsions), atol=0.01)
    assert sorted(found[1][0]) == sorted([*(centre for centre, _ in angles), *[6] * 6])


def test_stretched_molecules_differ_by_the_stretch(pool: Molecules) -> None:
    reference = module._geometry(judge(pool))
    longer = Molecules.from_list([(z, 1.01 * x) for z, x in pool])
    lengths, angles, torsions = module._geometry(judge(longer))
    assert np.array_equal(lengths[0], reference[0][0])
    for values, real, by in (
        (lengths, reference[0], 0.01 * reference[0][1].mean()),
        (angles, reference[1], 0),
        (torsions, reference[2], 0),
    ):
        found = module._apart(values, real)
        assert found is not None
        assert found[0] == pytest.approx(by, abs=1e-4)
        assert found[1] == pytest.approx(1)


def test_apart_weighs_kinds_by_share() -> None:
    kinds = np.array([3] * 6 + [8] * 3 + [9])
    values = np.arange(10.0)
    mine = np.array([3, 3, 8]), np.array([1.0, 4.0, 6.0])
    first = wasserstein_distance([1, 4], values[:6])
    second = wasserstein_distance([6], values[6:9])
    found = module._apart(mine, (kinds, values))
    assert found == pytest.approx(((6 * first + 3 * second) / 9, 0.9))
    assert module._apart((np.array([5]), np.array([1.0])), (kinds, values)) is None


def test_variation() -> None:
    a, b = np.array([6, 6, 1, 1]), np.array([6, 1, 1, 8], np.uint8)
    assert module._variation(a, a) == 0
    assert module._variation(a, b) == pytest.approx(0.25)
    assert module._variation(np.array([1]), np.array([9])) == 1


# --- energies, PoseBusters, real data ------------------------------------------------------------


def test_strain() -> None:
    relaxed_ = judge(Molecules.from_list([ETHANOL, (ETHANOL[0], 1.03 * ETHANOL[1])]))
    low, high = strain(relaxed_.rdkit(0)), strain(relaxed_.rdkit(1))
    assert low == pytest.approx(0, abs=0.01)
    assert 3 < high < 30
    arsane = Chem.AddHs(Chem.MolFromSmiles("[AsH3]"))
    rdDistGeom.EmbedMolecule(arsane, randomSeed=1)
    assert strain(arsane) is None


def test_coincident_atoms_cost_no_crash(pool: Molecules) -> None:
    x = METHANE[1].copy()
    x[1] = x[0]
    samples = Molecules.from_list([(METHANE[0], x), METHANE, METHANE])
    found = figures(measure(samples, set(), pool, "explicit", 0))
    assert np.isfinite(found["strain_kcal_mol"].value)
    assert np.isfinite(found["bond_angle_w1_degrees"].value)


def test_posebusters(pool: Molecules) -> None:
    pytest.importorskip("posebusters")
    share, count = module._bust(judge(pool.select(np.arange(4))))
    assert (share, count) == (1.0, 4)
    found = figures(measure(pool, set(), pool, "removed", 0))
    assert found["posebusters"].value > 0.8


def test_absent_posebusters_is_left_out(pool: Molecules, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "posebusters" not in figures(measure(pool, set(), pool, "explicit", 0))


@pytest.mark.skipif(not QM9.exists(), reason="the QM9 file of the shared data is not there")
def test_qm9_scores_what_is_published() -> None:
    """EDM's row for the data: 99.0 % of atoms, 95.2 % of molecules stable, 97.7 % valid.

    Its functions, run on these molecules, agree with ours on every atom; they say 99.42 % of all
    12,859 test molecules' atoms (99.42 % in training too), not 99.0, so the atoms have a lower
    bound only. The molecules with fluorine are not in the file.
    """
    with np.load(QM9) as data:
        offsets, numbers = data["offsets"], data["atomic_numbers"]
        positions, test = data["positions_e5"], np.flatnonzero(data["edm_split"] == 3)
    chosen = np.random.default_rng(0).permutation(test)[:2000]
    parts = [slice(offsets[i], offsets[i + 1]) for i in chosen]
    judged = judge(Molecules.from_list([(numbers[s], positions[s] * 1e-5) for s in parts]))
    shares = module._counts(judged, set(), True)
    for name, published in (("molecule_stability", 0.952), ("validity", 0.977)):
        share, count, error = shares[name]
        assert count == 2000
        assert abs(share - published) < 2 * error, name
    share, _, error = shares["atom_stability"]
    assert 0.990 - 2 * error < share < 0.996
