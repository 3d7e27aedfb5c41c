"""The molecule modality from the command line: the whole way, and one line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rdkit import Chem

SMALL = [
    "molecule.heavy_atoms=4",
    "molecule.width=16",
    "molecule.pair_width=8",
    "molecule.layers=1",
    "molecule.heads=2",
    "molecule.regressor_steps=20",
    "train.steps=20",
    "train.batch_size=16",
    "train.sample_every_steps=0",
    "sample.steps=3",
    "sample.preview=4",
]
METHANE = (
    "5\n\nC 0 0 0\nH 0.63 0.63 0.63\nH -0.63 -0.63 0.63\nH -0.63 0.63 -0.63\nH 0.63 -0.63 -0.63\n"
)


def gendiff(*args: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gendiff", *args],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if ok:
        assert done.returncode == 0, done.stderr
    return done


def train(*args: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return gendiff("train", "--modality", "molecule", *SMALL, *args, cwd=cwd, ok=ok)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    done = train(cwd=folder)
    assert "heavy atoms only" in done.stdout
    return folder


def test_sample_film_and_evaluate(trained: Path) -> None:
    run = "runs/molecule/default"
    args = ("sample", run, "-n", "5", "--film", "--cond", "atoms=3", "--out", "made")
    done = gendiff(*args, cwd=trained)
    assert "5 samples" in done.stdout
    assert len(list((trained / "made").glob("*.sdf"))) == 5
    mol = next(iter(Chem.SDMolSupplier(str(trained / "made/00000.sdf"), sanitize=False)))
    assert sum(atom.GetAtomicNum() > 1 for atom in mol.GetAtoms()) == 3
    assert Image.open(trained / "made/film.gif").n_frames == 3  # type: ignore[attr-defined]
    assert Image.open(trained / "made/preview.png").size[0] > 100
    gendiff("evaluate", run, "-n", "20", cwd=trained)
    result = json.loads((trained / run / "evaluation.json").read_text())
    names = [measure["name"] for measure in result["measures"]]
    assert {"validity", "connected"} <= set(names)
    assert "molecule_stability" not in names  # without hydrogens it means nothing
    assert all(
        measure["floor"] == 1.0
        for measure in result["measures"]
        if measure["name"] in ("validity", "connected")
    )


def test_edit_and_steer(trained: Path) -> None:
    run = "runs/molecule/default"
    (trained / "furan.smi").write_text("c1ccoc1\n")
    done = gendiff("edit", run, "furan.smi", "--keep", "c1ccoc1", "-n", "3", cwd=trained)
    assert "3 samples in runs/molecule/default/generated/furan-seed-0" in done.stdout
    folder = trained / run / "generated" / "furan-seed-0"
    mol = next(iter(Chem.SDMolSupplier(str(folder / "00000.sdf"), sanitize=False)))
    assert [atom.GetSymbol() for atom in mol.GetAtoms()][:5] == ["C", "C", "C", "O", "C"]
    (trained / "ethanol.smi").write_text("CCO\n")
    vary = ("--noise", "0.4", "--toward", "logp=1", "-n", "2")
    assert "2 samples" in gendiff("edit", run, "ethanol.smi", *vary, cwd=trained).stdout
    for args, line in (
        (("edit", run, "ethanol.smi"), "error: edit: say what to keep (--keep) or"),
        (
            ("edit", run, "ethanol.smi", "--noise", "99"),
            "error: noise=99: this model's noise goes",
        ),
        (("edit", run, "none.smi", "--keep", "C"), "error: edit: none.smi is no file"),
        (("sample", run, "--toward", "logp=high"), "error: --toward logp: a number is needed"),
        (("sample", run, "--toward", "gap=1"), "error: toward: unknown property 'gap'."),
    ):
        done = gendiff(*args, cwd=trained, ok=False)
        assert done.returncode == 2
        assert done.stderr.startswith(line)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "name", "parts"),
    [
        ("CCO\nC(\n", "a.smi", ["a.smi", "line 2", "molecule.skip_bad=true"]),
        (METHANE + METHANE.replace("0.63 0.63 0.63", "nan 0 0", 1), "b.xyz", ["b.xyz", "NaN"]),
        (METHANE.replace("C 0", "Zz 0"), "c.xyz", ["c.xyz", "Zz"]),
        (METHANE.replace("-0.63 -0.63 0.63", "0.63 0.63 0.63"), "d.xyz", ["d.xyz", "Angstrom"]),
        (
            "2000\n\n" + "".join(f"C {2 * i} 0 0\n" for i in range(2000)),
            "e.xyz",
            ["2000", "max_at"],
        ),
        ("", "f.sdf", ["f.sdf"]),
    ],
    ids=["smiles", "nan", "element", "coincident", "large", "empty"],
)
def test_bad_data_is_one_line(tmp_path: Path, text: str, name: str, parts: list[str]) -> None:
    (tmp_path / name).write_text(text)
    args = ("molecule.data=files", f"molecule.path={name}", "molecule.hydrogens=explicit")
    done = train(*args, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0]
    assert not (tmp_path / "runs").exists()


def test_elements_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    (tmp_path / "s.smi").write_text("CCO\nCCS\nCCN\n")
    keys = ("molecule.data=files", "molecule.path=s.smi", "molecule.elements=[C,N,O]")
    done = train(*keys, cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "S" in done.stderr
    assert "line 2" in done.stderr


def test_a_molecule_of_one_atom_trains_and_samples(tmp_path: Path) -> None:
    np.savez(
        tmp_path / "m.npz",
        atomic_numbers=np.array([6, 6, 8, 6, 6, 8, 7], np.uint8),
        positions=np.array([[0, 0, 0], [0, 0, 0], [1.43, 0, 0]] * 2 + [[0, 0, 0]], float),
        offsets=np.array([0, 1, 3, 4, 6, 7]),
        split=np.array([1, 1, 3, 3, 1], np.uint8),
    )
    train("molecule.data=files", "molecule.path=m.npz", cwd=tmp_path)
    gendiff("sample", "runs/molecule/default", "-n", "4", "--cond", "atoms=1", cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/molecule/default/generated/seed-0/*.xyz"))) == 4
