from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rdkit import Chem

from gendiff import Picture, Scene
from gendiff_molecule import pictures
from gendiff_molecule.conformers import baseline, graph
from gendiff_molecule.molecules import Molecules
from gendiff_molecule.pictures import animate, exhibits, orientation, preview, stages, write


def molecules(*smiles: str, bonds: bool = False) -> Molecules:
    graphs = [graph(s) for s in smiles]
    atoms = [
        (z, baseline(s, 1, 0)[0].astype(np.float32))
        for s, (z, _) in zip(smiles, graphs, strict=True)
    ]
    return Molecules.from_list(atoms, smiles, [b for _, b in graphs] if bonds else ())


def odd() -> Molecules:
    z, x = molecules("CCO")[0]
    rng = np.random.default_rng(0)
    return Molecules.from_list(
        [
            (np.array([8], np.uint8), np.zeros((1, 3), np.float32)),
            (np.empty(0, np.uint8), np.empty((0, 3), np.float32)),
            (z, np.full_like(x, np.nan)),
            (z, np.full_like(x, np.inf)),
            (z, x * 0),
            (z, x * 1e3),
            (z, x * 1e6),
            (np.full(9, 6, np.uint8), rng.normal(size=(9, 3)).astype(np.float32)),
            (np.array([26, 92, 6], np.uint8), x[:3]),
            (np.array([6, 6], np.uint8), np.array([[0, 0, 0], [0, 0, 1.5]], np.float32)),
        ]
    )


def read(path: Path, **how: bool) -> Chem.Mol:
    supplier = Chem.SDMolSupplier(str(path), removeHs=False, **how)
    assert len(supplier) == 1
    return supplier[0]


@pytest.mark.parametrize("bonds", [False, True])
def test_sdf_reads_back(tmp_path: Path, bonds: bool) -> None:
    smiles = ["CCO", "CC(=O)NC", "C#CC=C"]
    made = molecules(*smiles, bonds=bonds)
    paths = write(made, tmp_path / "sdf", [17, 3, 4])
    assert [p.name for p in paths] == ["00017.sdf", "00003.sdf", "00004.sdf"]
    for path, (z, x), text in zip(paths, made, smiles, strict=True):
        mol = read(path)
        assert [a.GetAtomicNum() for a in mol.GetAtoms()] == z.tolist()
        # A molfile has four decimals.
        assert mol.GetConformer().GetPositions() == pytest.approx(x, abs=6e-5)
        canonical = Chem.MolToSmiles(Chem.MolFromSmiles(text))
        assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == canonical == mol.GetProp("smiles")
        assert mol.GetProp("valid") == "true"
        assert mol.GetIntProp("n_atoms") == len(z)
        assert mol.GetProp("hydrogens") == "generated"
        assert mol.GetProp("missing_hydrogens") == "0"


def test_bonds_that_are_given_are_written_whatever_the_distances(tmp_path: Path) -> None:
    made = molecules("c1ccncc1", "C[N+](=O)[O-]", bonds=True)
    wide = Molecules(
        made.numbers, made.positions * 3, made.offsets, made.smiles, made.bonds, made.bond_offsets
    )
    for path, text in zip(write(wide, tmp_path, [0, 1]), made.smiles, strict=True):
        mol = read(path)
        assert mol.GetProp("valid") == "true"
        assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == Chem.CanonSmiles(str(text))
    assert {
        int(line[6:9]) for line in (tmp_path / "00000.sdf").read_text().split("\n")[15:26]
    } == {
        1,
        2,
    }  # kekulised


def test_aromatic_bonds_without_a_smiles(tmp_path: Path) -> None:
    made = molecules("c1ccccc1", bonds=True)
    nameless = Molecules.from_list(list(made), bonds=[made.bonds_of(0)])
    assert read(write(nameless, tmp_path, [0])[0]).GetProp("smiles") == "c1ccccc1"


def test_xyz_reads_back(tmp_path: Path) -> None:
    made = molecules("CC(=O)NC")
    path = write(made, tmp_path, [17])[0].with_suffix(".xyz")
    mol = Chem.MolFromXYZFile(str(path))
    z, x = made[0]
    assert [a.GetAtomicNum() for a in mol.GetAtoms()] == z.tolist()
    assert mol.GetConformer().GetPositions() == pytest.approx(x, abs=1e-6)


def test_hydrogens_are_added_and_said_to_be(tmp_path: Path) -> None:
    heavy = molecules("CCO", "C#CC=C").without_hydrogens()
    for path, (z, x), total in zip(
        write(heavy, tmp_path, [0, 1], "removed"), heavy, (9, 8), strict=True
    ):
        mol = read(path)
        assert mol.GetNumAtoms() == total == mol.GetIntProp("n_atoms")
        assert mol.GetProp("hydrogens") == "added by RDKit"
        placed = mol.GetConformer().GetPositions()
        assert placed[: len(z)] == pytest.approx(x, abs=6e-5)
        distance = np.linalg.norm(placed[:, None] - placed[None], axis=-1)
        assert (np.sort(distance[len(z) :], 1)[:, 1] < 1.15).all()  # each is bound to something
        assert path.with_suffix(".xyz").read_text().startswith(f"{len(z)}\n")


def test_what_is_not_valid_is_written_all_the_same(tmp_path: Path) -> None:
    made = odd()
    paths = write(made, tmp_path, range(len(made)), "removed")
    for path, (z, _) in zip(paths, made, strict=True):
        mol = read(path, sanitize=False)
        assert [a.GetAtomicNum() for a in mol.GetAtoms()][: len(z)] == z.tolist()
        assert np.isfinite(mol.GetConformer().GetPositions()).all()
    crowd = read(paths[7], sanitize=False)
    assert crowd.GetProp("valid") == "false"
    assert crowd.GetProp("fault").startswith("C with ")
    assert crowd.GetNumBonds() > 8
    assert read(paths[2], sanitize=False).GetProp("positions") == "not finite"
    assert "nan" in paths[2].with_suffix(".xyz").read_text()


def test_preview_shows_each_molecule(tmp_path: Path) -> None:
    made = molecules("CCO", "CC(=O)NC", "C1CC1C")
    images = [
        np.asarray(Image.open(preview(made.select([i]), tmp_path / f"{i}.png"))) for i in range(3)
    ]
    assert images[0].shape == images[1].shape == images[2].shape
    for i in range(3):
        different = (images[i] != images[(i + 1) % 3]).any(-1).mean()
        assert different > 0.02  # of all pixels
        assert images[i].std() > 10
    # Red for oxygen and blue for nitrogen, in the view's half.
    red, green, blue = images[1][:240].astype(int).transpose(2, 0, 1)
    assert ((red - green > 80) & (red - blue > 80)).sum() > 200
    assert ((blue - red > 80) & (blue - green > 60)).sum() > 200


def test_preview_is_a_grid_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_CELLS", 6)
    made = molecules("C").select(np.zeros(9, np.int64))
    one = Image.open(preview(made.select([0]), tmp_path / "one.png"))
    wide = Image.open(preview(made.select([0, 0, 0, 0]), tmp_path / "wide.png", columns=2))
    many = Image.open(preview(made, tmp_path / "many.png", columns=3))
    step_x, step_y = wide.width - one.width, wide.height - one.height
    assert (many.width, many.height) == (one.width + 2 * step_x, one.height + step_y)


def test_preview_and_film_of_odd_molecules(tmp_path: Path) -> None:
    made = odd()
    with Image.open(preview(made, tmp_path / "odd.png")) as picture:
        pixels = np.asarray(picture).astype(int)
    assert ((pixels[..., 0] - pixels[..., 1]) > 100).sum() > 500  # red frames
    assert preview(made.select(np.empty(0, np.int64)), tmp_path / "none.png").exists()
    assert preview(made.without_hydrogens(), tmp_path / "heavy.png").exists()
    for last in range(len(made)):
        path = animate(made.select([0, 2, 4, last]), tmp_path / f"{last}.gif", size=60)
        assert Image.open(path).n_frames == 4
    with pytest.raises(ValueError, match="at least one"):
        animate([], tmp_path / "empty.gif")


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_has_its_frames(tmp_path: Path, suffix: str) -> None:
    z, x = molecules("CCO")[0]
    noise = np.random.default_rng(0).normal(size=x.shape)
    frames = [(z, x + s * noise) for s in (2.0, 1.0, 0.3, 0.0, 0.0)]
    film = Image.open(animate(frames, tmp_path / f"film{suffix}", size=120, milliseconds=50))
    assert film.n_frames == 5
    assert film.size == (120, 120)
    seen = []
    for i in range(5):
        film.seek(i)
        seen.append(np.asarray(film.convert("RGB")).astype(int))
    assert np.abs(seen[0] - seen[3])[:115].mean() > 2
    # The last two states are the same, seen by the same camera.
    assert np.abs(seen[3] - seen[4])[:110].mean() < 1


def test_view_turns_with_the_molecule_and_is_no_mirror() -> None:
    z, x = molecules("CC(F)(O)N")[0]
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    rotation *= np.linalg.det(rotation)
    x = x - x.mean(0)
    turned = x @ rotation.T
    turn = orientation(z, x)
    assert np.linalg.det(turn) == pytest.approx(1)
    assert x @ turn.T == pytest.approx(turned @ orientation(z, turned).T, abs=1e-4)


def centres(scene: object) -> np.ndarray:
    assert isinstance(scene, Scene)
    return np.array([ball.centre for ball in scene.balls])


def test_an_exhibit_is_the_molecule_turned_but_not_mirrored() -> None:
    found = molecules("C[C@H](O)C#N", "C=O")
    for i, (exhibit, lines) in enumerate(zip(exhibits(found), (8 + 3, 2 + 2), strict=True)):
        scene, sketch = exhibit.parts
        assert isinstance(scene, Scene)
        assert isinstance(sketch, Picture)
        assert sketch.drawing
        x, y = found[i][1].astype(float), centres(scene)
        turn = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
        assert np.allclose((x - x.mean(0)) @ turn, y - y.mean(0), atol=1e-4)
        if i == 0:  # the other is flat
            assert np.allclose(turn @ turn.T, np.eye(3), atol=1e-4)
            assert np.linalg.det(turn) > 0.99
        assert len(scene.sticks) == 2 * lines  # two halves; a double bond has two lines
        ends = np.array([stick.start for stick in scene.sticks[::2]])
        assert np.linalg.norm(ends[:, None] - y[None], axis=2).min(1).max() < 0.2
        still = np.asarray(Image.open(io.BytesIO(scene.still.png)))
        assert still[0, 0, 3] == 0
        assert (still[..., 3] == 255).mean() > 0.03
    title, notes = exhibits(found)[0].title, exhibits(found)[0].notes
    assert title == "C3H5NO"
    assert notes == ("CC(O)C#N", "10 atoms")


def test_stages_have_one_camera() -> None:
    z, x = molecules("CC(=O)OCC")[0]
    frames = [Molecules.from_list([(z, np.float32(k) * x)]) for k in (0.5, 2, 1)]
    half, twice, last = (centres(stage.parts[0]) for stage in stages(frames))
    assert np.allclose(half * 4, twice, atol=1e-4)
    assert np.allclose(half * 2, last, atol=1e-4)


def test_what_cannot_be_drawn_is_said_and_stages_go_on() -> None:
    found = odd()
    shown = exhibits(found)
    assert [bool(e.parts) for e in shown] == [True, *[False] * 6, True, True, True]
    assert shown[2].title == "not valid"
    assert any("not finite" in "".join(e.notes) for e in shown)
    states = [found.select([i]) for i in range(len(found))]
    drawn = [bool(stage.parts) for stage in stages(states)]
    assert drawn == [True, False, False, False, True, False, False, True, True, True]
