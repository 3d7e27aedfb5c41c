"""Every format read back, and every kind of bad input named."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from gendiff.errors import DataError
from gendiff_molecule.checks import place
from gendiff_molecule.formats import Problem, Reading, _arrays
from gendiff_molecule.molecules import Molecules
from gendiff_molecule.readers import Loaded, read

WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
METHANE = "CH4", [6, 1, 1, 1, 1]


def silent(what: str, done: int, total: int) -> None:
    assert 0 < done <= (total or done), what


def load(path: Path, skip_bad: bool = False, max_atoms: int = 64, **more: Any) -> Loaded:
    return read(path, skip_bad, max_atoms, silent, **more)


def embedded(smiles: str) -> Chem.Mol:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert AllChem.EmbedMolecule(mol, randomSeed=1) == 0
    return mol


def block(smiles: str, fields: str = "") -> str:
    return Chem.MolToMolBlock(embedded(smiles)) + fields + "\n$$$$\n"


def reason(path: Path, **more: Any) -> str:
    """The reason for the only problem; the file holds one good molecule besides."""
    with pytest.raises(DataError) as caught:
        load(path, **more)
    text = str(caught.value)
    assert "\n" not in text
    assert "1 of 2 molecules" in text
    assert "molecule.skip_bad=true" in text
    left = load(path, skip_bad=True, **more)
    assert len(left.molecules) == 1
    assert len(left.warnings) == 1
    assert left.warnings[0].startswith("1 of 2 molecules")
    (problem,) = left.problems
    assert f"first: {problem.where}: {problem.reason}" in text
    return f"{problem.where}: {problem.reason}"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- SDF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.sdf", "a.sdf.gz", "A.SDF"])
def test_sdf_keeps_atoms_positions_and_fields(tmp_path: Path, name: str) -> None:
    text = block("CCO", ">  <gap>\n0.25\n\n>  <source>\nbottle\n") + block("c1ccccc1")
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = load(path, bonds=True).molecules
    assert found.smiles.tolist() == ["CCO", "c1ccccc1"]
    expected = embedded("CCO").GetConformer().GetPositions()
    np.testing.assert_allclose(found[0][1], expected, atol=6e-5)  # four decimals
    assert found[0][0].tolist() == [6, 6, 8] + [1] * 6
    assert list(found.targets) == ["gap"]
    np.testing.assert_array_equal(found.targets["gap"], np.array([0.25, np.nan], np.float32))
    orders = found.bonds_of(1)[:, 2].tolist()
    assert sorted(orders) == [1] * 6 + [4] * 6
    assert sorted(found.bonds_of(0)[:, 2].tolist()) == [1] * 8


def test_sdf_with_odd_valence_is_read_as_given(tmp_path: Path) -> None:
    mol = Chem.RWMol(embedded("C"))
    mol.AddAtom(Chem.Atom(1))
    mol.AddBond(0, 5, Chem.BondType.SINGLE)
    mol.GetConformer().SetAtomPosition(5, (0.6, -0.6, 1.9))
    text = Chem.MolToMolBlock(mol, kekulize=False)
    found = load(write(tmp_path / "odd.mol", text), bonds=True).molecules
    assert found[0][0].tolist() == [6, 1, 1, 1, 1, 1]
    assert found.smiles.tolist() == []
    assert len(found.bonds_of(0)) == 5


def test_sdf_in_two_dimensions_becomes_three(tmp_path: Path) -> None:
    flat = Chem.MolFromSmiles("C[C@H](F)Cl")
    AllChem.Compute2DCoords(flat)
    text = Chem.MolToMolBlock(flat)
    assert text.splitlines()[1][20:22] == "2D"
    found = load(write(tmp_path / "flat.sdf", text + "$$$$\n")).molecules
    assert found.smiles.tolist() == [Chem.CanonSmiles("C[C@H](F)Cl")]
    numbers, positions = found[0]
    assert (numbers == 1).sum() == 4
    assert positions[:, 2].std() > 0.1


def damaged(what: str) -> str:
    lines = block("CO").splitlines(keepends=True)
    atom = lines[4]
    if what == "nan":
        lines[4] = "       nan" + atom[10:]
    elif what == "element":
        lines[4] = atom[:31] + "Xx " + atom[34:]
    elif what == "truncated":
        return "".join(lines[:7])
    elif what == "close":
        lines[5] = atom
    elif what == "zero":
        zero = "    0.0000" * 3
        lines[4:10] = [zero + line[30:] for line in lines[4:10]]
    elif what == "empty":
        return (
            "\n     RDKit          3D\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n$$$$\n"
        )
    elif what == "garbled":
        lines[3] = "this is no counts line\n"
    elif what == "heavy":
        lines[4] = atom[:31] + "Pt " + atom[34:]
    return "".join(lines)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("nan", "NaN or infinite coordinates"),
        ("element", "unknown element 'Xx'"),
        ("heavy", "unknown element 'Pt'"),
        ("truncated", "truncated: no 'M  END'"),
        ("close", "two atoms 0.00 Angstrom apart"),
        ("zero", "all coordinates are 0"),
        ("empty", "no atoms"),
        ("garbled", "RDKit cannot parse it"),
    ],
)
def test_bad_sdf_records_are_named(tmp_path: Path, what: str, expected: str) -> None:
    path = write(tmp_path / "mols.sdf", block("C") + damaged(what))
    assert reason(path).startswith(f"mols.sdf record 2: {expected}")


def test_large_molecules_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mols.sdf", block("C") + block("CCC"))
    text = reason(path, max_atoms=10)
    assert text == "mols.sdf record 2: 11 atoms, more than molecule.max_atoms=10"


def test_elements_that_are_not_allowed_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "mols.sdf", block("C") + block("CF"))
    assert reason(path, elements=frozenset({1, 6})).endswith("F is not in molecule.elements")


# --- XYZ ---------------------------------------------------------------------------------------


def test_xyz_with_many_frames(tmp_path: Path) -> None:
    found = load(write(tmp_path / "a.xyz", WATER + "\n" + WATER.replace("O 0", "8 0"))).molecules
    assert len(found) == 2
    for numbers, positions in found:
        assert numbers.tolist() == [8, 1, 1]
        np.testing.assert_allclose(positions[2], [-0.24, 0.93, 0])


def test_extended_xyz_has_columns_and_targets(tmp_path: Path) -> None:
    text = (
        "2\nProperties=id:I:1:pos:R:3:species:S:1:forces:R:3 energy=-1.5 label=abc "
        'smiles="[H]Cl" pbc="F F F"\n1 0 0 0 CL 9 9 9\n2 0 0 1.27 H 9 9 9\n'
    )
    found = load(write(tmp_path / "a.extxyz", text)).molecules
    assert found[0][0].tolist() == [17, 1]
    np.testing.assert_allclose(found[0][1], [[0, 0, 0], [0, 0, 1.27]])
    assert {k: v.tolist() for k, v in found.targets.items()} == {"energy": [-1.5]}
    assert found.smiles.tolist() == ["Cl"]


def test_xyz_as_the_qm9_archive_has_it(tmp_path: Path) -> None:
    text = (
        "3\ngdb 3\t799.5\t437.9\t282.9\t1.8511\t6.31\t-0.2928\t0.0687\t0.3615\t19.0\t0.02\t"
        "-76.404702\t-76.40\t-76.40\t-76.42\t6.002\t\n"
        "O\t-0.0343604951\t 0.9775395708\t 0.0076015923\t-0.589706\n"
        "H\t 0.0647664923\t 2.0572*^-2\t 0.0015346341\t 0.294853\n"
        "H\t 0.8717903737\t 1.3007924048\t 0.0006931336\t 0.294853\n"
        "1671.4\t3803.6\t3907.6\nO\tO\nInChI=1S/H2O/h1H2\tInChI=1S/H2O/h1H2\n"
    )
    found = load(write(tmp_path / "dsgdb9nsd_000003.xyz", text)).molecules
    assert found[0][1][1, 1] == pytest.approx(0.020572)
    assert found.targets["gap"][0] == pytest.approx(0.3615)
    assert found.targets["cv"][0] == pytest.approx(6.002)
    assert found.smiles.tolist() == ["O"]


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (WATER.replace("0.96", "nan"), "NaN or infinite coordinates"),
        (WATER.replace("0.96", "-inf"), "NaN or infinite coordinates"),
        (WATER.replace("0.96", "1e99"), "NaN or infinite coordinates"),
        (WATER.replace("0.96", "0.1"), "two atoms 0.10 Angstrom apart"),
        (WATER.replace("H 0.96", "Qq 0.96"), "unknown element 'Qq'"),
        (WATER.replace("0.96 0", "0.96"), "atom 2: cannot read 'H 0.96 0'"),
        (WATER.replace("0.96", "x"), "atom 2: cannot read 'H x 0 0'"),
        ("2\n\nH 0 0 0\nH 0 0 0\n", "all coordinates are 0"),
        ("0\n\n", "no atoms"),
        ("4\n" + WATER[2:], "truncated: 3 of 4 atoms"),
        ("many\n" + WATER[2:], "expected a number of atoms, found 'many'"),
        (WATER.replace("water", 'pbc="T T F"'), "periodic (pbc): crystals are no molecules"),
        (WATER.replace("water", "Properties=a:S:1"), "Properties=a:S:1 names no species and pos"),
    ],
)
def test_bad_xyz_frames_are_named(tmp_path: Path, frame: str, expected: str) -> None:
    path = write(tmp_path / "a.xyz", WATER + frame)
    text = reason(path, max_atoms=10)
    assert text.startswith(f"a.xyz frame 2: {expected}")


# --- SMILES ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.smi", "a.smiles", "a.txt", "a.smi.gz"])
def test_smiles_are_placed_in_space(tmp_path: Path, name: str) -> None:
    text = "# two\nOCC ethanol\n\nc1ccncc1\tpyridine\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = load(path, bonds=True).molecules
    assert found.smiles.tolist() == ["CCO", "c1ccncc1"]
    assert found.sizes.tolist() == [9, 11]
    assert (found.bonds_of(1)[:, 2] == 4).sum() == 6
    again = load(path).molecules
    np.testing.assert_array_equal(found.positions, again.positions)


def test_many_smiles_are_placed_by_worker_processes(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    smiles = ["C" * n + "O" for n in range(1, 4)] * 15
    path = write(tmp_path / "a.smi", "\n".join(smiles))
    found = read(path, False, 64, lambda *what: said.append(what)).molecules
    assert found.smiles.tolist() == [Chem.CanonSmiles(s) for s in smiles]
    assert said[0] == ("molecules of a.smi (100% read)", 16, 0)
    assert [done for _, done, _ in said] == [16, 32, 45]


def test_csv_has_targets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'name,SMILES,logP\n"a, b",CO,-0.5\nc,CC,\n')
    found = load(path).molecules
    assert found.smiles.tolist() == ["CO", "CC"]
    np.testing.assert_array_equal(found.targets["logP"], np.array([-0.5, np.nan], np.float32))


@pytest.mark.parametrize(
    ("smiles", "expected"),
    [
        ("C(C", "RDKit cannot read the SMILES 'C(C'"),
        ("CF(C)C", "RDKit cannot read the SMILES"),
        ("C1#CC1", "RDKit finds no 3D structure of 'C1#CC1'"),
        ("*C", "unknown element '*'"),
        ("[Pt]", "unknown element 'Pt'"),
        ("CCCCCCCCC", "29 atoms, more than molecule.max_atoms=20"),
    ],
)
def test_bad_smiles_are_named(tmp_path: Path, smiles: str, expected: str) -> None:
    path = write(tmp_path / "a.smi", f"CO\n{smiles}\n")
    assert reason(path, max_atoms=20).startswith(f"a.smi line 2: {expected}")


def test_bad_csv_rows_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,smiles\n1,CO\n2\n")
    assert reason(path) == "a.csv line 3: no SMILES"
    with pytest.raises(DataError, match=r"no column 'smiles' among id, formula"):
        load(write(tmp_path / "b.csv", "id,formula\n1,CO\n"))


@pytest.mark.parametrize(("max_atoms", "limit"), [(256, "max_atoms=256"), (10**6, "1000: give")])
def test_a_chain_that_would_take_minutes_is_refused_at_once(max_atoms: int, limit: str) -> None:
    found = place("C" * 200_000, max_atoms)
    assert isinstance(found, str)
    assert found.startswith("600002 atoms, more than")
    assert limit in found


def test_boron_without_mmff_parameters_is_placed_by_uff() -> None:
    found = place("OB(O)c1ccccc1", 64)
    assert not isinstance(found, str)
    assert len(found[0]) == 16


# --- npz ---------------------------------------------------------------------------------------


def arrays() -> dict[str, Any]:
    x = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0], [0, 0, 0], [0, 0, 0.74]])
    return {
        "numbers": np.array([8, 1, 1, 1, 1]),
        "positions": x,
        "offsets": np.array([0, 3, 5]),
    }


def saved(path: Path, **changes: Any) -> Path:
    data = arrays() | changes
    np.savez(path, **{k: v for k, v in data.items() if v is not None})
    return path


def test_npz_in_the_simple_format(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz", split=np.array([1, 3]), **{"target.gap": np.array([1.0, 2])})
    found = load(path)
    assert found.split.tolist() == [1, 3]
    assert found.molecules.numbers.tolist() == [8, 1, 1, 1, 1]
    np.testing.assert_allclose(found.molecules.positions, arrays()["positions"])
    assert found.molecules.targets["gap"].tolist() == [1, 2]


def test_npz_with_integer_positions_and_targets_of_some(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "a.npz",
        positions=None,
        numbers=None,
        atomic_numbers=arrays()["numbers"],
        positions_e5=(arrays()["positions"] * 1e5).round().astype(np.int32),
        edm_split=np.array([2, 3]),
        smiles=np.array(["O", "[H][H]"]),
        target_names=np.array(["mu", "gap"]),
        target_rows=np.array([1]),
        targets=np.array([[0.5, 0.7]]),
        homo_lumo_gap=np.array([[-1.0, 1, 2], [-3, np.nan, 9]]),
    )
    found = load(path)
    np.testing.assert_allclose(found.molecules.positions, arrays()["positions"], atol=1e-6)
    assert found.split.tolist() == [2, 3]
    assert found.molecules.smiles.tolist() == ["O", "[H][H]"]
    nan = np.nan
    for name, values in {
        "mu": [nan, 0.5],
        "homo": [-1, -3],
        "lumo": [1, nan],
        "gap": [2, 0.7],  # what the table of targets says stands
    }.items():
        np.testing.assert_array_equal(found.molecules.targets[name], np.array(values, np.float32))


def test_arrays_with_bonds_and_targets_are_read(tmp_path: Path) -> None:
    first = load(write(tmp_path / "a.sdf", block("CCO", ">  <q>\n3\n") + block("C")), bonds=True)
    names = ("numbers", "positions", "offsets", "smiles", "bonds", "bond_offsets")
    arrays = {name: np.asarray(getattr(first.molecules, name)) for name in names}
    np.savez(tmp_path / "b.npz", **arrays, **{"target.q": first.molecules.targets["q"]})
    second = load(tmp_path / "b.npz", bonds=True)
    for name in names:
        np.testing.assert_array_equal(arrays[name], getattr(second.molecules, name))
    np.testing.assert_array_equal(second.molecules.targets["q"], np.array([3, np.nan], "f4"))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle ran",)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"offsets": None}, "no array 'offsets'"),
        ({"positions": None}, "no array 'positions or positions_e5'"),
        ({"offsets": np.array([0, 3, 6])}, "offsets do not rise from 0 to the 5 rows"),
        ({"offsets": np.array([0, 6, 5])}, "offsets do not rise"),
        ({"offsets": np.array([1, 3, 5])}, "offsets do not rise"),
        ({"offsets": np.array([0.0, 3, 5])}, "offsets do not rise"),
        ({"numbers": np.ones(4, int)}, "numbers are (4,), positions (5, 3)"),
        ({"numbers": np.ones(5)}, "numbers are float64, not integers"),
        ({"split": np.array([1, 7])}, "the split is not 0 to 3"),
        ({"split": np.array([1])}, "the split is not 0 to 3"),
        ({"smiles": np.array(["O"])}, "1 smiles for 2 molecules"),
        ({"smiles": np.array("O")}, "1 smiles for 2 molecules"),
        ({"numbers": np.array(3)}, "numbers are (1,), positions (5, 3)"),
        ({"bond_offsets": np.array(3)}, "no array 'bonds'"),
        ({"homo_lumo_gap": np.array(3)}, "homo_lumo_gap is (1,) for 2 molecules"),
        ({"target.gap": np.zeros(3)}, "target 'gap' is (3,) for 2 molecules"),
        ({"targets": np.zeros((2, 1))}, "no array 'target_names'"),
        ({"positions": np.array([Evil()] * 5)}, "holds pickled objects, which are not read"),
        ({"positions": np.array(["a"] * 15).reshape(5, 3)}, "could not convert"),
        ({"positions": np.ones((5, 3), complex)}, "positions holds complex128, neither real"),
        ({"split": np.zeros(2, "i1,i1")}, "split holds void16, neither real"),
    ],
)
def test_bad_npz_files_are_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = saved(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError) as caught:
        load(path, skip_bad=True)
    assert str(caught.value).startswith(f"data: a.npz: {expected}")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"numbers": np.array([8, 1, 1, 99, 1])}, "unknown element"),
        ({"numbers": np.array([8, 1, 1, 0, 1])}, "unknown element"),
        ({k: v[:3] for k, v in arrays().items()} | {"offsets": np.array([0, 3, 3])}, "no atoms"),
        ({"positions": arrays()["positions"] * [1, 1, 0.1]}, "two atoms 0.07 Angstrom apart"),
    ],
)
def test_bad_molecules_in_npz_are_named(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path = saved(tmp_path / "a.npz", **changes)
    assert reason(path).startswith(f"a.npz molecule 1: {expected}")


@pytest.mark.parametrize("size", [0, 100, 400, -30])
def test_truncated_npz(tmp_path: Path, size: int) -> None:
    path = saved(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match=r"a.npz: (is empty|not an npz file, or truncated)"):
        load(path)


def test_damaged_npz(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz")
    raw = bytearray(path.read_bytes())
    at = raw.index(np.float64(0.96).tobytes())
    raw[at] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(DataError, match="a.npz: damaged or truncated"):
        load(path)


@pytest.mark.parametrize("what", ["compression", "encryption"])
def test_npz_packed_in_an_unknown_way(tmp_path: Path, what: str) -> None:
    path = saved(tmp_path / "a.npz")
    raw = bytearray(path.read_bytes())
    for mark, header in ((b"PK\1\2", 4), (b"PK\3\4", 2)):  # the table's entry, the file's own
        at = raw.index(mark) + header
        if what == "compression":
            raw[at + 6 : at + 8] = struct.pack("<H", 97)
        else:
            raw[at + 4] |= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.npz: damaged or truncated"):
        load(path)


def test_a_pickle_with_the_ending_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="not an npz file"):
        load(path)


def test_npz_arrays_are_not_changed() -> None:
    data = arrays()
    _arrays("a", data)
    np.testing.assert_array_equal(data["offsets"], arrays()["offsets"])


# --- files and folders -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.sdf", "a.xyz", "a.smi", "a.csv", "a.mol", "a.extxyz"])
def test_empty_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=f"{name}: holds no molecule"):
        load(write(tmp_path / name, ""))


def test_truncated_gzip(tmp_path: Path) -> None:
    whole = gzip.compress("".join(block("C" * n) for n in range(1, 9)).encode())
    (tmp_path / "a.sdf.gz").write_bytes(whole[: len(whole) // 2])
    found = load(tmp_path / "a.sdf.gz", skip_bad=True)
    assert 1 <= len(found.molecules) < 8
    assert found.problems[-1].reason.startswith("truncated")
    (tmp_path / "b.sdf.gz").write_text("no gzip")
    with pytest.raises(DataError, match="not compressed by gzip"):
        load(tmp_path / "b.sdf.gz")


def test_how_far_files_are_read_is_known_at_every_item(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(os.urandom(20).hex().encode() + b"\n" for _ in range(2000)))
    (tmp_path / "a.smi.gz").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "b.smi", "C\n" * 20_000)
    files = Reading([(name, tmp_path / name) for name in ("a.smi.gz", "b.smi", "missing.smi")])
    found = [(item, files.share) for item in files]
    shares = [share for item, share in found if not isinstance(item, Problem)]
    assert shares == sorted(shares)
    assert shares[0] < 0.3
    assert 0.5 < shares[-1] <= 1
    assert [item.reason for item, _ in found if isinstance(item, Problem)] == [
        "truncated, or not compressed by gzip",
        "cannot be read: No such file or directory",
    ]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.xyz"
    path.write_bytes(WATER.encode() + bytes(range(128, 256)))
    assert "frame 2: expected a number of atoms" in reason(path)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.xyz", WATER)
    write(tmp_path / "sub" / "a.sdf", block("C", ">  <q>\n1\n"))
    saved(tmp_path / "a.npz", split=np.array([1, 3]))
    write(tmp_path / "README.txt", "not a list of SMILES")
    write(tmp_path / ".hidden.xyz", "damaged")
    write(tmp_path / "notes.pdf", "damaged")
    found = load(tmp_path)
    assert found.molecules.sizes.tolist() == [3, 2, 3, 5]
    assert found.split.tolist() == [1, 3, 0, 0]
    np.testing.assert_array_equal(
        found.molecules.targets["q"], np.array([np.nan] * 3 + [1], np.float32)
    )
    assert found.molecules.smiles.tolist() == ["", "", "", "C"]
    bonded = load(tmp_path, bonds=True).molecules
    assert bonded.smiles.tolist() == ["O", "[H][H]", "O", "C"]  # by the table
    assert np.diff(bonded.bond_offsets).tolist() == [2, 1, 2, 4]


def test_a_folder_of_tables(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "smiles\nC\n")
    write(tmp_path / "b.txt", "CC\n")
    assert load(tmp_path).molecules.smiles.tolist() == ["C", "CC"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file or folder"):
        load(tmp_path / "missing")
    with pytest.raises(DataError, match="holds no file of a known ending"):
        load(tmp_path)
    with pytest.raises(DataError, match="is no file of a known ending"):
        load(write(tmp_path / "a.pdb", "ATOM"))


def test_the_first_three_problems_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.smi", "C\n" + "C(\n" * 5)
    (warning,) = load(path, skip_bad=True).warnings
    assert warning.startswith("5 of 6 molecules in a.smi left out: a.smi line 2: ")
    assert warning.endswith("; and 2 more")
    assert warning.count("line") == 3


def test_bonds_beyond_the_table_are_named(tmp_path: Path) -> None:
    text = WATER + "2\n\nNa 0 0 0\nCl 0 0 2.4\n"
    path = write(tmp_path / "a.xyz", text)
    assert len(load(path).molecules) == 2
    assert reason(path, bonds=True).endswith("no bonds are given, and the table has none of Na")


def test_table_bonds_see_aromatic_rings_and_radicals(tmp_path: Path) -> None:
    mol = embedded("c1ccoc1")
    AllChem.MMFFOptimizeMolecule(mol)
    stream = io.StringIO(Chem.MolToXYZBlock(mol))
    methyl = "4\n\nC 0 0 0\nH 1.08 0 0\nH -0.54 0.935 0\nH -0.54 -0.935 0\n"
    path = write(tmp_path / "a.xyz", stream.read() + methyl)
    found: Molecules = load(path, bonds=True).molecules
    assert found.smiles.tolist() == ["c1ccoc1", ""]
    assert (found.bonds_of(0)[:, 2] == 4).sum() == 5
    assert len(found.bonds_of(1)) == 3


@pytest.mark.parametrize("count", ["9" * 5000, "\u00b2", "\u0663"])
def test_what_only_looks_like_a_number_of_atoms(tmp_path: Path, count: str) -> None:
    path = write(tmp_path / "a.xyz", f"{WATER}{count}\n\nO 0 0 0\n")
    assert "expected a number of atoms" in reason(path)


def test_arrays_larger_than_the_memory(tmp_path: Path) -> None:
    """A header may tell of tebibytes."""
    head = b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999999, 3), }"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("numbers.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head)
    with pytest.raises(DataError, match="arrays larger than the memory"):
        load(tmp_path / "a.npz")
