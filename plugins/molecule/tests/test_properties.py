"""The judge of asked properties: right on real molecules, and not fooled by wrong ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gendiff import config
from gendiff.spaces import Batch, Cond
from gendiff_molecule import MoleculeModality, properties, task
from gendiff_molecule.embedded import generate

MODALITY = MoleculeModality()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Molecules of at most 5 heavy atoms with their radius of gyration, in Angstrom."""
    path: Path = tmp_path_factory.mktemp("data") / "small.npz"
    molecules = generate(5, 1, lambda *_: None).without_hydrogens()
    size = [float(np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())) for _, x in molecules]
    size[3] = np.nan  # an unknown value
    np.savez(
        path,
        atomic_numbers=molecules.numbers,
        positions=molecules.positions,
        offsets=molecules.offsets,
        split=np.where(np.arange(len(molecules)) % 4 == 0, 3, 1).astype(np.uint8),
        **{"target.radius": np.array(size, np.float32)},
    )
    return path


def test_what_was_asked_for_is_compared_with_what_is_there(data: Path, tmp_path: Path) -> None:
    keys = ["data=files", f"path={data}", "condition=[radius]", "regressor_steps=250"]
    resolved = config.resolve(MODALITY, overrides=[f"molecule.{key}" for key in keys])
    section: Any = resolved.molecule  # type: ignore[attr-defined]
    facts = MODALITY.prepare(section).facts
    prepared = task.loaded(section)
    train = task.training(section, prepared)
    assert abs(2 * len(train) - len(prepared.train)) <= 3  # half of them, all with a value
    assert np.isfinite(train.target("radius")).all()

    held_out = task.dataset(section, facts, "test")
    real = task.collate(section, facts, [held_out[i, 0] for i in range(len(held_out))])

    def figures(batch: Batch) -> dict[str, Any]:
        return {m.name: m for m in properties.measure(section, facts, batch, tmp_path, 0)}

    found = figures(real)
    error = found["radius_mae"]
    # Real molecules that have what they were asked for score at the floor, by definition.
    assert error.value == pytest.approx(error.floor, rel=1e-4)
    assert error.value < 0.5 * found["radius_mae_size_only"].value
    assert found["radius_mae_size_only"].value < found["radius_mae_shuffled"].value
    # Held-out molecules that were asked to have each other's values score like shuffled ones.
    assert real.cond is not None
    gen = torch.Generator().manual_seed(0)
    order = torch.randperm(real.space.batch_size, generator=gen)
    wrong = Batch(real.x, real.space, Cond({"context": real.cond["context"][order]}))
    again = figures(wrong)["radius_mae"]
    assert again.value > 0.5 * found["radius_mae_shuffled"].value
    assert again.floor == error.floor  # read from the cache, not trained again
    assert len(list(tmp_path.glob("molecule-regressor-*"))) == 1


def test_compositions_are_counted(tmp_path: Path) -> None:
    keys = ["molecule.heavy_atoms=3", "molecule.condition=[composition]"]
    section: Any = config.resolve(MODALITY, overrides=keys).molecule  # type: ignore[attr-defined]
    facts = MODALITY.prepare(section).facts
    data = task.dataset(section, facts, "train")
    real = task.collate(section, facts, [data[i, 0] for i in range(20)])
    (match,) = properties.measure(section, facts, real, tmp_path, 0)
    assert (match.name, match.value) == ("composition_match", 1.0)
    assert real.cond is not None
    context = real.cond["context"].clone()
    context[:5, 0] += 1 / facts["context_std"][0]  # one carbon more than there is
    wrong = Batch(real.x, real.space, Cond({"context": context}))
    assert properties.measure(section, facts, wrong, tmp_path, 0)[0].value == 0.75
