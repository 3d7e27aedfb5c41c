from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from rdkit import Chem

from gendiff.errors import ConfigError
from gendiff.modality import Measure
from gendiff_molecule import conformers
from gendiff_molecule.conformers import (
    amr,
    baseline,
    coverage,
    flexible,
    graph,
    measure,
    parse,
    reference_ensemble,
    rmsd_matrix,
)

FLEXIBLE = "CCCCCO"
ROTATION = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
ROTATION *= np.linalg.det(ROTATION)  # a proper one


def samples(
    smiles: str, positions: NDArray[np.float64]
) -> list[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    return [(graph(smiles)[0], x) for x in positions]


def by_name(measures: list[Measure]) -> dict[str, Measure]:
    return {m.name: m for m in measures}


def test_coverage_and_amr_of_a_matrix_done_by_hand() -> None:
    rmsd = [[0.1, 0.9, 2.0, 0.5], [0.7, 0.6, 3.0, 0.8]]  # 2 references, 4 generated
    assert coverage(rmsd, 0.5) == (0.5, 0.25)  # a distance equal to the threshold is not covered
    assert coverage(rmsd, 0.65) == (1.0, 0.75)
    assert amr(rmsd) == pytest.approx(((0.1 + 0.6) / 2, (0.1 + 0.6 + 2.0 + 0.5) / 4))


@pytest.mark.parametrize(
    ("smiles", "numbers", "orders"),
    [
        ("C#N", [6, 7, 1], {(0, 1): 3, (0, 2): 1}),
        ("C=O", [6, 8, 1, 1], {(0, 1): 2, (0, 2): 1, (0, 3): 1}),
        ("[NH4+]", [7, 1, 1, 1, 1], {(0, i): 1 for i in range(1, 5)}),
    ],
)
def test_graph_has_hydrogens_after_heavy_atoms(
    smiles: str, numbers: list[int], orders: dict[tuple[int, int], int]
) -> None:
    z, bonds = graph(smiles)
    assert z.tolist() == numbers
    assert {(a, b): order for a, b, order in bonds.tolist()} == orders


def test_graph_of_an_aromatic_ring() -> None:
    z, bonds = graph("c1ccccc1")
    assert len(z) == 12
    assert sorted(bonds[:, 2].tolist()) == [1] * 6 + [4] * 6


@pytest.mark.parametrize(
    ("smiles", "message"),
    [
        ("C1CC", "cannot read"),
        ("", "no atoms"),
        ("C.O", "2 molecules"),
        ("*C", "without an element"),
        ("N->[Fe]", "DATIVE"),
    ],
)
def test_what_is_no_molecule_is_named(smiles: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        graph(smiles)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("smiles", "heavy", "all_atoms"),
    [
        ("[H][H]", 0, 0),
        ("C", 0, 0),
        ("CC", 0, 1),
        ("CCCC", 1, 3),
        ("CCCCCO", 3, 5),
        ("CC#CC", 0, 0),
        ("CC(=O)NC", 1, 3),
        ("C1CC1C", 0, 1),
        ("C1CCCCC1", 3, 3),
        ("C1CCC=CC1", 2, 2),
        ("c1ccccc1CC", 1, 2),
    ],
)
def test_flexible(smiles: str, heavy: int, all_atoms: int) -> None:
    assert flexible(smiles) == heavy
    assert flexible(smiles, hydrogens=True) == all_atoms


def test_rmsd_does_not_see_where_a_molecule_is() -> None:
    x = baseline(FLEXIBLE, 3, 0)
    moved = x @ ROTATION.T + [3.0, -1.0, 2.0]
    matrix = rmsd_matrix(parse(FLEXIBLE), x, moved)
    assert np.diag(matrix) == pytest.approx(0, abs=1e-4)
    assert matrix == pytest.approx(matrix.T, abs=1e-4)


@pytest.mark.parametrize(
    ("smiles", "order"),
    [
        ("CC(C)(C)O", [3, 1, 2, 0, 4]),  # two of three methyls change places
        ("c1ccccc1", [1, 2, 3, 4, 5, 0]),
        ("CC(=O)[O-]", [0, 1, 3, 2]),
    ],
)
def test_rmsd_does_not_see_which_of_equal_atoms_is_which(smiles: str, order: list[int]) -> None:
    x = baseline(smiles, 1, 0)
    swapped = x.copy()
    # The hydrogens, which come later, stay where they are: they do not count.
    swapped[:, : len(order)] = x[:, order]
    assert rmsd_matrix(parse(smiles), x, swapped).item() < 1e-4


def test_mirror_images_differ_unless_asked() -> None:
    x = baseline("CC(O)(F)N", 1, 0)
    image = x * [1, 1, -1]
    mol = parse("CC(O)(F)N")
    assert rmsd_matrix(mol, x, image).item() > 0.3
    assert rmsd_matrix(mol, x, image, mirror=True).item() < 1e-4


def test_rmsd_of_a_highly_symmetric_molecule_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conformers, "_SYMMETRIES", 100)
    smiles = "CC(C)(C)C(C(C)(C)C)(C(C)(C)C)C(C)(C)C"  # 4! * 6^4 symmetries of the heavy atoms
    x = np.random.default_rng(0).normal(size=(2, parse(smiles).GetNumAtoms(), 3))
    matrix = rmsd_matrix(parse(smiles), x, x)
    assert np.isfinite(matrix).all()


def test_baseline_is_a_function_of_the_seed() -> None:
    first, again, other = (baseline(FLEXIBLE, 4, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    # RDKit's own seeds 1 and 2 share half of their conformers, and its seed 0 gives one only.
    exact = np.abs(first[:, None] - other[None]).max((2, 3))
    assert exact.min() > 1e-3
    unrelaxed = baseline(FLEXIBLE, 4, 0, optimise=False)
    assert np.abs(unrelaxed[0] - unrelaxed[1]).max() > 1e-3


def test_reference_has_no_near_duplicates() -> None:
    x = reference_ensemble(FLEXIBLE, 0)
    matrix = rmsd_matrix(parse(FLEXIBLE), x, x)
    assert 5 < len(x) <= 50
    assert matrix[~np.eye(len(x), dtype=bool)].min() >= 0.1 - 1e-6
    assert len(reference_ensemble("c1ccccc1", 0)) == 1


def test_force_field_is_near_the_reference_and_noise_is_far() -> None:
    smiles = [FLEXIBLE, "OCC(=O)NCC"]
    good = by_name(measure({s: samples(s, baseline(s, 100, 9)) for s in smiles}, seed=0))
    rng = np.random.default_rng(0)
    noise = {s: samples(s, rng.normal(size=baseline(s, 100, 9).shape)) for s in smiles}
    bad = by_name(measure(noise, seed=0))
    assert good["amr_recall"].value < 0.3
    assert good["amr_precision"].value < 0.15
    assert good["coverage_precision"].value > 0.9
    # Noise is worse than the nearest of 40 collapsed molecules would be: above 1 Angstrom.
    assert bad["amr_recall"].value > 1.0
    assert bad["coverage_recall"].value == bad["coverage_precision"].value == 0.0
    for name, m in good.items():
        assert m.floor is not None
        assert m.floor == bad[name].floor
        assert np.isfinite(m.value)
    # Without the force field, geometries are further from a force field's.
    etkdg = good["etkdg_amr_precision"]
    assert etkdg.floor is not None
    assert etkdg.value > etkdg.floor
    assert "2 molecules" in good["amr_recall"].note


def test_a_perfect_copy_scores_perfectly() -> None:
    copy = reference_ensemble(FLEXIBLE, 5)
    found = by_name(measure({FLEXIBLE: samples(FLEXIBLE, copy)}, seed=5))
    assert found["amr_recall"].value == pytest.approx(0, abs=1e-4)
    assert found["coverage_recall"].value == found["coverage_precision"].value == 1.0
    assert f"{len(copy)} conformers of the {2 * len(copy)}" in found["amr_recall"].note


def test_heavy_atoms_alone_give_the_same_figures() -> None:
    full = samples(FLEXIBLE, baseline(FLEXIBLE, 10, 9))
    lean = [(z[z > 1], x[z > 1]) for z, x in full]
    for a, b in zip(measure({FLEXIBLE: full}, 0), measure({FLEXIBLE: lean}, 0), strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-6)


def test_odd_conformers_are_counted_and_not_hidden() -> None:
    good = samples("CCO", baseline("CCO", 1, 0))
    odd = [(z, np.full_like(x, np.nan)) for z, x in good]
    found = by_name(measure({"CCO": [*good, *odd], "[H][H]": [], "CCN": []}, seed=0))
    assert found["coverage_precision"].value == 0.5
    assert found["amr_precision"].value > 0.3  # as far as a collapsed molecule
    assert "1 of them not finite" in found["amr_precision"].note
    assert "2 molecules not judged" in found["amr_precision"].note
    assert measure({}, seed=0) == []
    with pytest.raises(ValueError, match="in this order"):
        measure({"CCO": [(np.array([8, 6, 6]), np.zeros((3, 3)))]}, seed=0)


def test_atoms_are_in_rdkits_order() -> None:
    numbers, _ = graph("OCC(=O)NCC")
    mol = Chem.AddHs(Chem.MolFromSmiles("OCC(=O)NCC"))
    assert numbers.tolist() == [a.GetAtomicNum() for a in mol.GetAtoms()]
