"""Editing molecules, and steering them: what is kept stays, what is asked is got nearer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import AllChem

from gendiff import config, runs
from gendiff.errors import ConfigError, DataError
from gendiff.generate import Model
from gendiff.modality import Request
from gendiff.train import Trainer
from gendiff_molecule import MoleculeModality, task

MODALITY = MoleculeModality()
SMALL = (
    "heavy_atoms=4", "width=16", "pair_width=8", "layers=2", "heads=2", "regressor_steps=60",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    keys = [f"molecule.{key}" for key in SMALL]
    keys += [f"out={tmp_path_factory.mktemp('run')}", "sample.steps=12", "train.batch_size=32"]
    resolved = config.resolve(MODALITY, overrides=keys)
    section: Any = resolved.molecule  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(MODALITY, resolved, MODALITY.prepare(section).facts))
    batches = trainer.batches()
    for _ in range(60):
        trainer.advance([next(batches)])
    return trainer.model()


@pytest.fixture
def ethanol(tmp_path: Path) -> Path:
    """CCO with hydrogens and a geometry of MMFF94's."""
    mol = Chem.AddHs(Chem.MolFromSmiles("CCO"))
    AllChem.EmbedMolecule(mol, randomSeed=1)  # type: ignore[attr-defined]
    path = tmp_path / "ethanol.sdf"
    path.write_text(Chem.MolToMolBlock(mol) + "$$$$\n")
    return path


def distances(x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, x)


@pytest.mark.parametrize("keep", ["CO", "1,2"])
def test_kept_atoms_stay(model: Model, ethanol: Path, keep: str) -> None:
    batch = model.sample(12, source=ethanol, keep=keep)
    molecules = task.unpack(model.run.section, model.run.facts, batch)
    conformer = Chem.MolFromMolFile(str(ethanol)).GetConformer()
    apart = np.linalg.norm(conformer.GetPositions()[1] - conformer.GetPositions()[2])
    assert len(set(molecules.sizes.tolist())) > 1  # from the histogram
    assert molecules.sizes.min() >= 3
    for numbers, positions in molecules:
        assert numbers[:2].tolist() == [6, 8]
        assert np.linalg.norm(positions[0] - positions[1]) == pytest.approx(apart, abs=1e-4)


def test_size_and_order(model: Model, ethanol: Path) -> None:
    request = Request([0, 1], 0, {"atoms": 3})
    section, facts = model.run.section, model.run.facts
    given = MODALITY.given(section, facts, ethanol, "O", request)
    assert given.mask is not None
    assert given.mask[:, 0].tolist() == [True, False, False] * 2
    # All three atoms are there, the kept one first, so that noise may be added to the rest.
    assert given.batch.x.isfinite().all()
    longer = MODALITY.given(section, facts, ethanol, "O", Request([0], 0, {"atoms": 4}))
    assert longer.batch.x[0].isfinite().all()
    assert longer.batch.x[1:].isnan().all()
    assert (
        model.sample(2, source=ethanol, keep="O", noise=0.3, cond={"atoms": 3}).x.isfinite().all()
    )
    with pytest.raises(ConfigError, match="Leave --noise out"):
        model.sample(1, source=ethanol, keep="O", noise=0.3, cond={"atoms": 4})


def test_little_noise_changes_little(model: Model, ethanol: Path) -> None:
    section, facts = model.run.section, model.run.facts
    source = MODALITY.given(section, facts, ethanol, None, Request([0], 0)).batch.x[:, :3]
    rms = []
    for noise in (0.02, 2.0):
        x = model.sample(8, source=ethanol, noise=noise).x[:, :3].reshape(8, 3, 3)
        rms.append(float((distances(x) - distances(source)).square().mean().sqrt()))
    assert rms[0] < 0.1 < rms[1]


def test_steering_moves_the_property(model: Model) -> None:
    """As the regressor itself sees it; docs/benchmarks.md has RDKit's own values."""
    found = model.property("logp")
    assert 0 < found.tolerance < 5
    means = []
    for target in (-1.0, 1.5):
        batch = model.sample(32, toward={"logp": target}, cond={"atoms": 4})
        means.append(float(found.function(batch.x, batch.space).mean()))
    assert means[1] > means[0] + 0.3


@pytest.mark.parametrize(
    ("keep", "values", "match"),
    [
        ("zz", {}, "neither a SMARTS"),
        ("N", {}, "nothing in the file matches"),
        ("0,7", {}, "atom 7 is not there"),
        ("CCO", {"atoms": 2}, "3 are kept"),
        (None, {"atoms": 2}, "has 3; leave it out"),
    ],
)
def test_what_cannot_be_kept(
    model: Model, ethanol: Path, keep: str | None, values: dict[str, Any], match: str
) -> None:
    section, facts = model.run.section, model.run.facts
    with pytest.raises(ConfigError, match=match):
        MODALITY.given(section, facts, ethanol, keep, Request([0], 0, values))


@pytest.mark.parametrize(
    ("text", "match"),
    [("CCO\nCCN\n", "holds 2 molecules"), ("CCS\n", "the model knows"), ("C1\n", "smi")],
)
def test_files_that_cannot_be_edited(model: Model, tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "one.smi"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        MODALITY.given(model.run.section, model.run.facts, path, "C", Request([0], 0))
    with pytest.raises(DataError, match="is no file"):
        MODALITY.given(
            model.run.section, model.run.facts, tmp_path / "none.sdf", "C", Request([0], 0)
        )


def test_an_unknown_property(model: Model) -> None:
    with pytest.raises(ConfigError, match=r"'logq'\. Did you mean 'logp'"):
        model.property("logq")
