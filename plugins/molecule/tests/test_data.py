"""Splits, the cache, the embedded set, QM9 in PyG's layout, and PyG's objects."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from gendiff.errors import ConfigError, DataError
from gendiff_molecule import data, embedded, readers
from gendiff_molecule.data import Prepared, load, split_of
from gendiff_molecule.molecules import Molecules
from gendiff_molecule.pyg import edm_split, from_pyg, to_pyg

QM9 = Path(__file__).resolve().parents[4] / "shared" / "data" / "qm9" / "qm9.npz"


@dataclass(frozen=True)
class Config:
    data: Literal["embedded", "qm9", "files"] = "files"
    path: str | None = None
    hydrogens: Literal["removed", "explicit"] = "explicit"
    elements: tuple[str, ...] | None = None
    max_atoms: int = 64
    skip_bad: bool = False
    heavy_atoms: int = 3
    conformers: int = 1
    needs_bonds: bool = False


def silent(what: str, done: int, total: int) -> None:
    pass


def broken(*_: Any) -> Any:
    raise AssertionError("made again")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GENDIFF_CACHE", str(folder))
        yield folder


def smiles_file(tmp_path: Path, count: int = 20) -> Path:
    path = tmp_path / "a.smi"
    path.write_text("\n".join("C" * n for n in range(1, count + 1)) + "\n")
    return path


def water(bond: float, comment: str = "") -> str:
    return f"3\n{comment}\nO 0 0 0\nH {bond} 0 0\nH -0.24 0.93 0\n"


def same(a: Molecules, b: Molecules) -> None:
    for name in ("numbers", "positions", "offsets", "smiles", "bonds", "bond_offsets"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert list(a.targets) == list(b.targets)
    for name, values in a.targets.items():
        np.testing.assert_array_equal(values, b.targets[name])


# --- splits ------------------------------------------------------------------------------------


def test_a_tenth_is_held_out() -> None:
    share = np.mean([split_of(str(i)) == "test" for i in range(10_000)])
    assert share == pytest.approx(0.1, abs=0.012)  # four standard errors


def test_conformers_fall_on_one_side(tmp_path: Path) -> None:
    mols = [Chem.AddHs(Chem.MolFromSmiles("C" * n + "O")) for n in range(1, 9)]
    text = ""
    for seed in (1, 2, 3):
        for mol in mols:
            AllChem.EmbedMolecule(mol, randomSeed=seed)
            AllChem.MMFFOptimizeMolecule(mol)
            text += Chem.MolToXYZBlock(mol)  # no SMILES: the table's graph
    (tmp_path / "a.xyz").write_text(text)
    found = load(Config(path=str(tmp_path / "a.xyz")), silent)
    assert len(found.train) + len(found.test) == 24
    assert len(found.test) % 3 == 0
    assert not set(found.train.sizes) & set(found.test.sizes)


def test_atoms_beyond_the_table_are_split_by_composition(tmp_path: Path) -> None:
    frames = ["2\n\nNa 0 0 0\nCl 0 0 2.4\n", "2\n\nNa 0 0 0\nCl 0 0 2.5\n", water(0.96)]
    (tmp_path / "a.xyz").write_text("".join(frames))
    found = load(Config(path=str(tmp_path / "a.xyz")), silent)
    assert sorted([len(found.train), len(found.test)]) == [1, 2]


def test_conformers_of_one_molecule_are_split_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("".join(water(0.9 + i / 200) for i in range(20)))
    found = load(Config(path=str(tmp_path / "a.xyz")), silent)
    assert len(found.train) + len(found.test) == 20
    assert len(found.test) >= 1
    assert found.warnings == ("all molecules are conformers of one: split by conformer",)


def test_one_molecule_is_too_few(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(water(0.96))
    with pytest.raises(DataError, match=r"a.xyz leaves no held-out molecules of 1. Add molecules"):
        load(Config(path=str(tmp_path / "a.xyz")), silent)


def test_a_file_keeps_its_own_split(tmp_path: Path) -> None:
    offsets = np.arange(0, 13, 2)
    x = np.array([[0, 0, 0], [0, 0, 0.74]] * 6) * np.repeat(1 + np.arange(6), 2)[:, None]
    np.savez(
        tmp_path / "a.npz",
        numbers=np.ones(12, int),
        positions=x,
        offsets=offsets,
        split=np.array([3, 1, 2, 2, 1, 1]),
    )
    found = load(Config(path=str(tmp_path / "a.npz")), silent)
    np.testing.assert_allclose(found.train.positions[1::2, 2], [1.48, 3.7, 4.44], rtol=1e-6)
    np.testing.assert_allclose(found.test.positions[1::2, 2], [0.74], rtol=1e-6)
    with pytest.raises(DataError, match="leaves no training molecules"):
        load(Config(path=str(tmp_path / "a.npz"), hydrogens="removed"), silent)


# --- the cache ---------------------------------------------------------------------------------


def folders(cache: Path) -> list[Path]:
    return sorted((cache / "molecule").iterdir())


def test_the_second_load_reads_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    config = Config(path=str(smiles_file(tmp_path)), skip_bad=True, max_atoms=32)
    first = load(config, silent)
    assert first.warnings[0].startswith("10 of 20 molecules in a.smi left out")
    with monkeypatch.context() as patch:
        patch.setattr(data, "gather", broken)
        second = load(config, silent)
        lean = load(replace(config, hydrogens="removed"), silent)
    same(first.train, second.train)
    same(first.test, second.test)
    assert first.warnings == second.warnings
    assert (lean.train.numbers > 1).all()
    assert len(folders(tmp_path / "cache")) == 1
    with pytest.raises(DataError, match="molecule.skip_bad=true"):
        load(replace(config, skip_bad=False), silent)


def test_changed_files_are_read_again(tmp_path: Path) -> None:
    path = smiles_file(tmp_path, 4)
    config = Config(path=str(path))
    before = load(config, silent)
    smiles_file(tmp_path, 5)
    after = load(config, silent)
    assert len(after.train) + len(after.test) == len(before.train) + len(before.test) + 1


def test_the_content_is_that_of_the_files(tmp_path: Path) -> None:
    path = smiles_file(tmp_path, 4)
    first = load(Config(path=str(path)), silent).content
    assert first
    assert load(Config(path=str(path)), silent).content == first  # from the cache
    other = tmp_path / "other"
    other.mkdir()
    copy = Path(shutil.copy(path, other))
    assert load(Config(path=str(copy)), silent).content == first
    copy.write_text(copy.read_text() + "CCCO\n")
    assert load(Config(path=str(copy)), silent).content != first


@pytest.mark.parametrize(
    "name", ["index.json", "train/positions.npy", "test/offsets.npy", "train/targets.json"]
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: str
) -> None:
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    config = Config(path=str(smiles_file(tmp_path, 4)))
    found = load(config, silent)
    train, test = (part.select(np.arange(len(part))) for part in (found.train, found.test))
    (folder,) = folders(tmp_path / "cache")
    raw = bytearray((folder / name).read_bytes())
    if damage == "cut":
        (folder / name).write_bytes(raw[: len(raw) // 2])
    elif damage == "gone":
        (folder / name).unlink()
    else:
        raw[:60] = bytes(255 - b for b in raw[:60])
        (folder / name).write_bytes(raw)
    second = load(config, silent)
    same(train, second.train)
    same(test, second.test)
    monkeypatch.setattr(data, "gather", broken)
    load(config, silent)
    assert folders(tmp_path / "cache") == [folder]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="GENDIFF_CACHE to a folder with space"):
        load(Config(path=str(smiles_file(tmp_path, 2))), silent)


# --- settings ----------------------------------------------------------------------------------


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"molecule.path: not set. Give a file or a folder"):
        load(Config(), silent)
    with pytest.raises(ConfigError, match=r"datasets.QM9\(root=FOLDER\)"):
        load(Config("qm9"), silent)
    with pytest.raises(DataError, match=r"there is no file or folder .*missing"):
        load(Config(path=str(tmp_path / "missing")), silent)
    with pytest.raises(DataError, match=r"is not PyG's QM9 folder.*molecule.data=files"):
        load(Config("qm9", path=str(tmp_path)), silent)


def test_elements(tmp_path: Path) -> None:
    path = tmp_path / "a.smi"
    path.write_text("CC\nCO\nCN\n")
    with pytest.raises(ConfigError, match="molecule.elements: 'Cc' is no element"):
        load(Config(path=str(path), elements=("Cc",)), silent)
    with pytest.raises(DataError, match=r"1 of 3 .*a.smi line 3: N is not in molecule.elements"):
        load(Config(path=str(path), elements=("C", "O"), hydrogens="removed"), silent)
    config = Config(path=str(path), elements=("H", "C", "O"), skip_bad=True)
    found = load(config, silent)
    assert len(found.train) + len(found.test) == 2
    with pytest.raises(DataError, match="none of 3 molecules.*H is not in molecule.elements"):
        load(replace(config, elements=("C", "O")), silent)


def test_hydrogens_that_were_left_out_are_mentioned(tmp_path: Path) -> None:
    text = "".join(f"2\n\nC 0 0 0\n{z} 0 0 1.3\n" for z in "CNOF")
    (tmp_path / "a.xyz").write_text(text)
    found = load(Config(path=str(tmp_path / "a.xyz")), silent)
    assert "have no hydrogen atom" in found.warnings[0]
    assert not load(Config(path=str(tmp_path / "a.xyz"), hydrogens="removed"), silent).warnings


# --- the embedded set --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(own_cache: Path) -> Prepared:
    return load(Config("embedded"), silent)


def test_embedded(small: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    assert small.summary_name == "embedded (up to 3 heavy atoms, 1 conformer)"
    assert len(small.train) > 20
    assert len(small.test) >= 1
    assert not set(small.train.smiles) & set(small.test.smiles)
    monkeypatch.setattr(embedded, "generate", broken)
    same(load(Config("embedded"), silent).train, small.train)
    lean = load(Config("embedded", hydrogens="removed"), silent)
    assert lean.train.sizes.max() == 3
    with pytest.raises(AssertionError, match="made again"):
        load(Config("embedded", conformers=2), silent)


def test_embedded_bonds_are_those_of_the_smiles(
    small: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "generate", broken)
    found = load(Config("embedded", needs_bonds=True), silent).train
    same(
        replace(found, bonds=small.train.bonds, bond_offsets=small.train.bond_offsets), small.train
    )
    for i, smiles in enumerate(found.smiles.tolist()):
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        expected = {
            (*sorted((b.GetBeginAtomIdx(), b.GetEndAtomIdx())), int(b.GetBondTypeAsDouble()))
            for b in mol.GetBonds()
        }
        assert {tuple(row) for row in found.bonds_of(i).tolist()} == expected


def test_embedded_elements(small: Prepared) -> None:
    config = Config("embedded", elements=("H", "C"), skip_bad=True)
    found = load(config, silent)
    assert set(found.train.numbers.tolist()) == {1, 6}
    with pytest.raises(DataError, match="is not in molecule.elements"):
        load(replace(config, skip_bad=False), silent)


# --- QM9 ---------------------------------------------------------------------------------------

HEADER = "mol_id,A,B,C,mu,alpha,homo,lumo,gap,r2,zpve,u0,u298,h298,g298,cv"
HEADER += ",u0_atom,u298_atom,h298_atom,g298_atom"


def qm9_folder(root: Path, count: int = 30, dropped: tuple[int, ...] = (4, 7)) -> Path:
    """A folder as PyG's QM9 has it: raw files, and numbers that tell the row and the column."""
    (root / "raw").mkdir(parents=True)
    smiles = ["C" * (i % 6 + 1) + "NOF"[i % 3] for i in range(count)]
    with Chem.SDWriter(str(root / "raw" / "gdb9.sdf")) as writer:
        for i, text in enumerate(smiles):
            mol = Chem.AddHs(Chem.MolFromSmiles(text))
            AllChem.EmbedMolecule(mol, randomSeed=i)
            mol.SetProp("_Name", f"gdb_{i + 1}")
            writer.write(mol)
    with (root / "raw" / "gdb9.sdf.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(HEADER.split(","))
        for i in range(count):
            rows.writerow([f"gdb_{i + 1}", *(i + 100.0 * c for c in range(1, 20))])
    listing = "".join(f"header {n}\n" for n in range(9))
    listing += "".join(f"  {n}  C  C\n" for n in dropped) + f"{len(dropped)} compounds\n"
    (root / "raw" / "uncharacterized.txt").write_text(listing)
    return root


def test_edm_split_is_the_published_one() -> None:
    split = edm_split(130_831)
    assert np.bincount(split).tolist() == [0, 100_000, 17_748, 13_083]
    np.random.seed(0)  # as the reference code does
    order = np.random.permutation(130_831)
    assert (split[order[:100_000]] == 1).all()
    assert (split[order[-13_083:]] == 3).all()
    assert np.bincount(edm_split(28)).tolist() == [0, 21, 5, 2]


def test_qm9_in_pygs_layout(tmp_path: Path) -> None:
    root = qm9_folder(tmp_path / "qm9")
    found = load(Config("qm9", path=str(root)), silent)
    assert found.summary_name == "QM9"
    kept = [n for n in range(30) if n + 1 not in (4, 7)]
    split = edm_split(28)
    rows = [n for n, s in zip(kept, split, strict=True) if s == 1]
    np.testing.assert_array_equal(found.train.targets["A"], np.float32(100) + rows)
    np.testing.assert_array_equal(found.train.targets["gap"], np.float32(800) + rows)
    assert len(found.train) == 21
    assert len(found.test) == 2
    as_files = load(Config("files", path=str(root / "raw" / "gdb9.sdf")), silent)
    same(as_files.train, found.train)
    bonded = load(Config("qm9", path=str(root), needs_bonds=True), silent)
    assert len(bonded.train.bond_offsets) == 22


@pytest.mark.filterwarnings("ignore")
def test_pyg_and_we_read_the_same(tmp_path: Path) -> None:
    from torch_geometric.datasets import QM9 as PyG

    root = qm9_folder(tmp_path / "qm9")
    theirs = from_pyg(PyG(str(root)))
    ours = readers.read(root, False, 64, silent).molecules
    np.testing.assert_array_equal(ours.numbers, theirs.numbers)
    np.testing.assert_array_equal(ours.positions, theirs.positions)
    for file in (root / "raw").iterdir():
        file.unlink()
    left = readers.read(root, False, 64, silent)  # from processed/ alone
    np.testing.assert_array_equal(left.molecules.positions, theirs.positions)
    np.testing.assert_array_equal(left.split, edm_split(28))
    for name, values in ours.targets.items():
        np.testing.assert_allclose(left.molecules.targets[name], values, rtol=1e-6)
    (processed,) = (root / "processed").glob("data*")
    processed.write_bytes(processed.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read as plain tensors"):
        readers.read(root, False, 64, silent)


def test_a_damaged_record_of_qm9_is_named(tmp_path: Path) -> None:
    root = qm9_folder(tmp_path / "qm9")
    sdf = root / "raw" / "gdb9.sdf"
    records = sdf.read_text().split("$$$$\n")
    whole = readers.read(root, False, 64, silent)
    records[9] = records[9].replace("    0.", "    x.", 1)
    sdf.write_text("$$$$\n".join(records))
    with pytest.raises(DataError, match="gdb9.sdf record 10: RDKit cannot parse it"):
        load(Config("qm9", path=str(root)), silent)
    found = readers.read(root, True, 64, silent)
    assert len(found.molecules) == 27
    # the others stay on their sides
    np.testing.assert_array_equal(found.split, np.delete(whole.split, 7))


def test_qm9_with_missing_or_short_files(tmp_path: Path) -> None:
    root = qm9_folder(tmp_path / "qm9")
    sdf, table, listing = (root / "raw" / n for n in ("gdb9.sdf", "gdb9.sdf.csv", "u"))
    text = sdf.read_text()
    sdf.write_text("$$$$\n".join(text.split("$$$$\n")[:20]) + "$$$$\n")
    with pytest.raises(DataError, match="gdb9.sdf is truncated: 20 records for the 30 rows"):
        load(Config("qm9", path=str(root)), silent)
    sdf.write_text(text)
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:20]))
    with pytest.raises(DataError, match="has 19 rows, gdb9.sdf has more records"):
        load(Config("qm9", path=str(root)), silent)
    table.write_text("".join(lines))
    (root / "raw" / "uncharacterized.txt").rename(listing)
    with pytest.raises(DataError, match=r"there is no .*uncharacterized.txt"):
        load(Config("qm9", path=str(root)), silent)


@pytest.mark.skipif(not QM9.is_file(), reason="shared/data/qm9/qm9.npz is not here")
def test_the_real_qm9() -> None:
    found = load(Config("qm9", path=str(QM9)), silent)
    assert (len(found.train), len(found.test)) == (98_412, 12_859)
    assert found.warnings == ()
    assert np.isfinite(found.train.targets["gap"]).sum() == 69_796
    assert np.isfinite(found.test.targets["gap"]).sum() == 9_078
    assert np.isfinite(found.train.targets["u0"]).sum() == 15_775
    assert (found.train.sizes.min(), found.train.sizes.max()) == (3, 29)
    lean = load(Config("qm9", path=str(QM9), hydrogens="removed"), silent)
    assert len(lean.train) == 98_412
    assert lean.train.sizes.max() == 9


# --- PyG's objects -----------------------------------------------------------------------------


def test_to_pyg_and_back(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("smiles,q\nCO,1\nCC,2\n")
    molecules = readers.read(tmp_path / "a.csv", False, 64, silent).molecules
    items = to_pyg(molecules)
    assert [d.smiles for d in items] == ["CO", "CC"]
    assert [d.y.tolist() for d in items] == [[[1.0]], [[2.0]]]
    assert items[1].z.tolist() == molecules[1][0].tolist()
    same(from_pyg(items), replace(molecules, targets={}))
    items[0].z = items[0].z[:-1]
    with pytest.raises(DataError, match="PyG item 0: no z"):
        from_pyg(items)
    items[1].z[0] = 90
    with pytest.raises(DataError, match="PyG item 0: z from 1 to 90"):
        from_pyg(items[1:])


def test_pyg_batches_what_it_is_given() -> None:
    from torch_geometric.loader import DataLoader

    atoms = np.array([1, 1], np.uint8), np.array([[0, 0, 0], [0, 0, 0.74]], np.float32)
    (batch,) = DataLoader(to_pyg(Molecules.from_list([atoms] * 3)), batch_size=3)
    assert batch.batch.tolist() == [0, 0, 1, 1, 2, 2]
    assert tuple(batch.pos.shape) == (6, 3)


def test_settings_are_the_modalitys() -> None:
    """Every setting but needs_bonds, which follows from the task, is a key of the section."""
    from gendiff_molecule.plugin import MoleculeConfig

    keys = {k for k in vars(data.Settings) if not k.startswith("_")} - {"needs_bonds"}
    assert keys <= set(MoleculeConfig.model_fields)
