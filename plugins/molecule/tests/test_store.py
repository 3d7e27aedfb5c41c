"""Molecules on disk, and sets larger than memory."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gendiff.errors import DataError
from gendiff_molecule import store
from gendiff_molecule.molecules import Molecules, Subset
from gendiff_molecule.plugin import MoleculeConfig
from gendiff_molecule.task import MoleculeData


def molecules(sizes: list[int], **more: object) -> Molecules:
    rng = np.random.default_rng(len(sizes))
    atoms = [
        (np.full(n, 6, np.uint8), rng.standard_normal((n, 3)).astype(np.float32)) for n in sizes
    ]
    return Molecules.from_list(atoms, **more)  # type: ignore[arg-type]


def test_pieces_are_one_set_with_the_targets_of_all(tmp_path: Path) -> None:
    bonds = [np.array([[0, 1, 2]], np.int16), np.empty((0, 3), np.int16)]
    parts = [
        molecules([2, 1], smiles=["C=C", "C"], bonds=bonds, targets={"gap": [1, 2]}),
        molecules([], targets={"odd/../name": []}).select([]),
        molecules([3], smiles=["\N{GREEK SMALL LETTER ALPHA}"], targets={"mu": [5]}),
    ]
    parts[1:] = [
        Molecules(**vars(p) | {"bond_offsets": np.zeros(len(p) + 1, int)}) for p in parts[1:]
    ]
    store.write(parts, tmp_path / "a", bonds=True)
    found = store.load(tmp_path / "a")
    assert found.sizes.tolist() == [2, 1, 3]
    np.testing.assert_array_equal(found.positions, np.concatenate([p.positions for p in parts]))
    assert found.smiles.tolist() == ["C=C", "C", "\N{GREEK SMALL LETTER ALPHA}"]
    assert [found.bonds_of(i).tolist() for i in range(3)] == [[[0, 1, 2]], [], []]
    nan = np.nan
    for name, values in {
        "gap": [1, 2, nan],
        "mu": [nan, nan, 5],
        "odd/../name": [nan] * 3,
    }.items():
        np.testing.assert_array_equal(found.target(name), np.array(values, np.float32))
    assert {p.parent for p in tmp_path.rglob("*.npy")} == {tmp_path / "a"}
    chosen = found.select(np.array([2, 0]))
    assert chosen.smiles.tolist() == ["\N{GREEK SMALL LETTER ALPHA}", "C=C"]
    np.testing.assert_array_equal(chosen.positions[:3], parts[2].positions)


def test_no_smiles_are_none(tmp_path: Path) -> None:
    store.write([molecules([2])], tmp_path / "a", bonds=False)
    found = store.load(tmp_path / "a")
    assert len(found.smiles) == 0
    assert len(found.bond_offsets) == 0


def test_many_targets_are_few_open_files(tmp_path: Path) -> None:
    many = molecules([1, 2], targets={f"t{i}": [i, 2 * i] for i in range(256)})
    store.write([many], tmp_path / "a", bonds=False)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    found = store.load(tmp_path / "a")
    assert found.select([1]).targets["t255"].tolist() == [510]
    assert len(found.targets) == 256
    with pytest.raises(KeyError):
        found.target("t256")
    if before:
        assert len(os.listdir("/proc/self/fd")) - before < 10


def test_too_many_targets_are_refused(tmp_path: Path) -> None:
    many = molecules([1], targets={f"t{i}": [0.0] for i in range(257)})
    with pytest.raises(DataError, match="more than 256 properties of molecules; 't256'"):
        store.write([many], tmp_path / "a", bonds=False)


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store.write([molecules([2, 3])], tmp_path / "a", bonds=False)
    store.write([molecules([2, 2])], tmp_path / "b", bonds=False)
    (tmp_path / "a" / "numbers.npy").unlink()
    (tmp_path / "b" / "numbers.npy").rename(tmp_path / "a" / "numbers.npy")
    with pytest.raises(ValueError, match="do not fit"):
        store.load(tmp_path / "a")


def test_a_loaders_workers_are_given_paths_and_not_molecules(tmp_path: Path) -> None:
    store.write([molecules([20] * 5000)], tmp_path / "a", bonds=False)
    every = Subset(store.load(tmp_path / "a"), np.arange(2, 5000, 1000))
    data = MoleculeData(MoleculeConfig(), {"elements": [6]}, every)
    text = pickle.dumps(data)
    assert len(text) < 10_000
    again = pickle.loads(text)
    np.testing.assert_array_equal(again[3, 0].positions, data[3, 0].positions)
    np.testing.assert_array_equal(again[3, 0].positions, every.molecules[3002][1])


LIMITED = """
import resource, sys
import numpy as np, torch
from gendiff import preparing
preparing.cores = lambda: 1  # the limit is of one process
from gendiff.modality import Modality
from gendiff_molecule import MoleculeModality
from gendiff_molecule.plugin import MoleculeConfig
from gendiff_molecule import task, store, embedded
torch.set_num_threads(1)
held = [int(l.split()[1]) << 10 for l in open("/proc/self/status") if "VmData" in l][0]
resource.setrlimit(resource.RLIMIT_DATA, (held + (40 << 20),) * 2)
config = MoleculeConfig(data="files", path=sys.argv[1], hydrogens="removed")
report = MoleculeModality().prepare(config)
data = MoleculeModality().dataset(config, report.facts, "train")
total = sum(len(data[i, 0].types) for i in range(0, len(data), 50))
print(len(data), total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is Linux's")
def test_memory_holds_a_part_of_a_set(tmp_path: Path) -> None:
    """120 MB of molecules, prepared and read with 40 MiB besides what the imports take."""
    atoms, count, files = 30, 10_000, 30
    shape = np.random.default_rng(0).standard_normal((atoms, 3)) + 5 * np.arange(atoms)[:, None]
    (tmp_path / "data").mkdir()
    arrays = {
        "numbers": np.tile(np.array([6] * 20 + [1] * 10, np.uint8), count),
        "positions": np.tile(shape.astype(np.float32), (count, 1)),
        "offsets": np.arange(count + 1) * atoms,
        "split": np.where(np.arange(count) % 10, 1, 3),
    }
    for i in range(files):
        np.savez(tmp_path / "data" / f"{i:02d}.npz", **arrays)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "data")],
        env=os.environ
        | {
            "GENDIFF_CACHE": str(tmp_path / "cache"),
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",  # else malloc keeps what is freed, as it likes
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    train = files * count * 9 // 10
    assert done.stdout.splitlines()[-1] == f"{train} {train // 50 * 20}"
    kept = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.npy"))
    assert kept > 4 * (40 << 20)
