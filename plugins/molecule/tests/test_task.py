"""The molecule modality keeps the engine's contract, to the bit; what may be asked of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rdkit import Chem

from gendiff import config, runs
from gendiff.errors import ConfigError, DataError
from gendiff.modality import Request
from gendiff.testing import check_modality
from gendiff.train import Trainer
from gendiff_molecule import MoleculeModality, task
from gendiff_molecule.molecules import SYMBOLS

MODALITY = MoleculeModality()
SMALL = [
    "molecule.heavy_atoms=3",
    "molecule.width=32",
    "molecule.pair_width=16",
    "molecule.layers=2",
    "molecule.heads=4",
]
CONFORMER = ["molecule.task=conformer", "molecule.hydrogens=explicit", "molecule.conformers=3"]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    task.loaded.cache_clear()
    yield
    task.loaded.cache_clear()


def opened(folder: Path, *overrides: str) -> runs.Run:
    resolved = config.resolve(MODALITY, overrides=[*SMALL, f"out={folder}", *overrides])
    section = resolved.molecule  # type: ignore[attr-defined]
    return runs.start(MODALITY, resolved, MODALITY.prepare(section).facts)


def asked(run: runs.Run, ids: list[int], **values: Any) -> Any:
    return MODALITY.templates(run.section, run.facts, Request(ids, 3, values))


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["molecule.hydrogens=explicit"],
        ["molecule.network=egnn", "molecule.hydrogens=explicit", "train.lr=1e-3"],
        ["molecule.condition=[composition]"],
        ["molecule.type_loss=squared"],
        CONFORMER,
    ],
    ids=["heavy", "explicit", "egnn", "composition", "squared", "conformer"],
)
def test_the_contract(extra: list[str]) -> None:
    lines = list(check_modality("molecule", [*SMALL, *extra]))
    assert any("written, as .sdf" in line for line in lines)


def test_a_molecule_is_the_same_bits_at_batch_sizes_1_7_and_40(tmp_path: Path) -> None:
    run = opened(tmp_path, "sample.steps=4", "train.batch_size=16")
    trainer = Trainer(run)
    batches = trainer.batches()
    for _ in range(3):
        trainer.advance([next(batches)])
    model = trainer.model()
    whole = model.sample(40, batch_size=40, seed=1)
    for size in (1, 7):
        assert torch.equal(model.sample(40, batch_size=size, seed=1).x, whole.x)
    for i in (0, 6, 39):
        assert torch.equal(model.sample(ids=[i], seed=1).x, whole.select([i]).x)


def test_items_survive_the_way_to_a_batch_and_back(tmp_path: Path) -> None:
    run = opened(tmp_path, "molecule.hydrogens=explicit")
    data = task.dataset(run.section, run.facts, "train")
    batch = task.collate(run.section, run.facts, [data[i, 0] for i in range(5)])
    back = task.unpack(run.section, run.facts, batch)
    for i in range(5):
        numbers, positions = data.molecules[i]
        assert (back[i][0] == numbers).all()
        centred = positions - positions.mean(0)
        np.testing.assert_allclose(back[i][1], centred, atol=1e-5)


def test_sizes_come_from_the_data_s_histogram(tmp_path: Path) -> None:
    run = opened(tmp_path)
    space, cond = asked(run, list(range(3000)))
    assert cond is None
    sizes, counts = np.array(run.facts["sizes"]).T
    found = np.bincount(space.sizes, minlength=sizes.max() + 1)[sizes] / 3000
    share = counts / counts.sum()
    assert np.abs(found - share).max() < 4 * np.sqrt(share * (1 - share) / 3000).max()


def test_a_size_may_be_asked_for(tmp_path: Path) -> None:
    run = opened(tmp_path)
    space, _ = asked(run, [0, 1, 2], atoms=[2, 3])
    assert space.sizes.tolist() == [2, 3, 2]


def test_a_composition_may_be_asked_for(tmp_path: Path) -> None:
    run = opened(tmp_path, "molecule.condition=[composition]")
    space, cond = asked(run, [0, 1], formula="C2H6O")
    assert space.sizes.tolist() == [3, 3]  # hydrogens are removed here
    raw = cond["context"].numpy() * run.facts["context_std"] + run.facts["context_mean"]
    wanted = {"C": 2.0, "O": 1.0}
    for column, z in enumerate(run.facts["elements"]):
        assert raw[0, column] == pytest.approx(wanted.get(SYMBOLS[z], 0.0), abs=1e-4)
    free, cond = asked(run, list(range(200)))
    raw = cond["context"].numpy() * run.facts["context_std"] + run.facts["context_mean"]
    # Sizes and compositions are drawn together.
    np.testing.assert_allclose(raw.sum(1), free.sizes.numpy(), atol=1e-3)


def test_the_conformer_task_takes_smiles(tmp_path: Path) -> None:
    run = opened(tmp_path, *CONFORMER)
    space, _ = asked(run, [0, 1, 2], smiles=["CCO", "C"])
    assert space.sizes.tolist() == [9, 5, 9]
    model = Trainer(run).model()
    batch = model.sample(3, steps=2, cond={"smiles": ["CCO", "C"]})
    molecules = task.unpack(run.section, run.facts, batch)
    assert [SYMBOLS[z] for z in molecules[0][0][:3]] == ["C", "C", "O"]
    assert len(molecules.bonds_of(0)) == 8
    paths = MODALITY.write(run.section, run.facts, batch, tmp_path, [0, 1, 2])
    mol = next(iter(Chem.SDMolSupplier(str(paths[0]))))
    assert Chem.MolToSmiles(mol) == "CCO"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"atom": 3}, "unknown condition 'atom'. Did you mean 'atoms'"),
        ({"atoms": 2000}, "atoms: 2000 cannot be drawn"),
        ({"atoms": 0}, "atoms: 0 cannot be drawn"),
        ({"atoms": "many"}, "atoms: 'many' cannot be drawn"),
        ({"atoms": []}, "an empty list"),
        ({"formula": "C2H6O"}, "unknown condition 'formula'"),
    ],
)
def test_what_cannot_be_generated(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        asked(opened(tmp_path), [0], **values)


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("c2", "is not a formula"),
        ("C2S", "does not know S"),
        ("C900", "cannot be drawn"),
        ("H2", "cannot be drawn"),
    ],
)
def test_compositions_that_make_no_sense(tmp_path: Path, formula: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(opened(tmp_path, "molecule.condition=[composition]"), [0], formula=formula)


@pytest.mark.parametrize(
    ("smiles", "message"),
    [("C(", "C\\("), ("CC.O", "CC.O"), ("CS", "has S"), ([], "an empty list"), ("", "smiles")],
)
def test_graphs_that_make_no_sense(tmp_path: Path, smiles: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(opened(tmp_path, *CONFORMER), [0], smiles=smiles)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["molecule.condition=[gap]"], ConfigError, "no property 'gap'"),
        ([*CONFORMER, "molecule.condition=[composition]"], ConfigError, "leave it empty"),
        (["molecule.task=conformer"], ConfigError, "needs 'explicit'"),
        (["molecule.data=qm9"], (ConfigError, DataError), "molecule.path"),
        (["molecule.data=files", "molecule.path=nowhere"], (ConfigError, DataError), "nowhere"),
    ],
)
def test_configurations_that_cannot_be(
    tmp_path: Path, overrides: list[str], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        opened(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["molecule.width=30"], "molecule.width: 30 is not divisible"),
        ([*CONFORMER, "molecule.network=egnn"], "needs pair"),
    ],
)
def test_networks_that_cannot_be(tmp_path: Path, overrides: list[str], message: str) -> None:
    run = opened(tmp_path, *overrides)
    with pytest.raises(ConfigError, match=message):
        MODALITY.backbone(run.section, run.facts)
