"""The descriptors of molecules: what they do not see, what they see, and the verdicts by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gendiff import evaluate, runs
from gendiff.config import resolve
from gendiff.metrics import verdicts
from gendiff.noise import Streams
from gendiff.runs import Run
from gendiff.spaces import Batch
from gendiff.train import Trainer
from gendiff_molecule.descriptors import descriptors
from gendiff_molecule.molecules import Molecules
from gendiff_molecule.plugin import MoleculeModality

ELEMENTS = [6, 7, 8]


def heap(seed: int, count: int = 7) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.choice(ELEMENTS, count).astype(np.uint8), 1.5 * rng.normal(size=(count, 3))


def of(*atoms: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return descriptors(Molecules.from_list(list(atoms)), ELEMENTS)


def test_turned_moved_mirrored_and_renumbered_molecules_are_the_same() -> None:
    z, x = heap(0)
    q, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    order = np.random.default_rng(2).permutation(len(z))
    found = of((z, x), (z, x @ q + 5), (z, -x), (z[order], x[order]))
    assert np.abs(found - found[0]).max() < 1e-5  # positions are float32


def test_elements_distances_and_sizes_are_seen() -> None:
    z, x = heap(0)
    other = z.copy()
    other[0] = 6 if z[0] != 6 else 7
    nudged = x.copy()
    nudged[3] += 0.05
    found = of((z, x), (other, x), (z, nudged), (z[:-1], x[:-1]), (z, 1.1 * x))
    gaps = np.linalg.norm(found[1:] - found[0], axis=1)
    assert (gaps > 0.01).all()
    assert gaps[1] < gaps[[0, 2, 3]].min()  # a small change is near


def test_a_molecule_of_two_by_hand() -> None:
    """Two carbons 1.5 apart: each sees the other, once."""
    pair = of((np.array([6, 6], np.uint8), np.array([[0, 0, 0], [1.5, 0, 0]])))[0]
    radii = np.arange(0.6, 4.7, 0.3)
    assert pair[: len(radii)] == pytest.approx(np.exp(-((1.5 - radii) ** 2) / 0.08), abs=1e-6)
    near = [np.exp(-(0.2**2) / 0.08), np.exp(-(0.9**2) / 0.08)]
    assert pair[len(radii) : len(radii) + 2] == pytest.approx(near, abs=1e-6)
    assert pair[-5:] == pytest.approx([3, 0, 0, np.log(2), 0.75], abs=1e-6)


def test_what_is_not_finite_is_far_and_finite() -> None:
    z, x = heap(0)
    found = of((z, np.full_like(x, np.nan)), (z, np.full_like(x, np.inf)), (z, x * 1e30))
    assert np.isfinite(found).all()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    modality = MoleculeModality()
    resolved: Any = resolve(modality, overrides=["molecule.heavy_atoms=5"])
    facts = modality.prepare(resolved.molecule).facts
    return Run(tmp_path_factory.mktemp("run"), modality, resolved, facts)


def test_bad_molecules_are_called_out_and_real_ones_are_not(embedded: Run) -> None:
    run, cache = embedded, embedded.folder
    data = {
        split: run.modality.dataset(run.section, run.facts, split) for split in ("train", "test")
    }
    real = evaluate.reals(run, cache, 0)
    count = min(60, len(real.held_out))
    floors = real.floors(count)

    def batch(split: str, numbers: Any) -> Batch:
        items = [data[split][i, 0] for i in numbers]
        return run.modality.collate(run.section, run.facts, items)

    def found(samples: Batch) -> list[str]:
        made = run.modality.features(run.section, run.facts, [samples], cache, 0)
        return [v.name for v in verdicts(real.measures(made.values, floors), count)]

    held_out = torch.linspace(0, len(real.held_out) - 1, count).long().tolist()
    good = batch("test", held_out)
    assert found(good) == []
    train = torch.linspace(0, len(real.train) - 1, count).long().tolist()
    assert found(batch("train", train)) == ["memorised"]
    assert "collapsed" in found(batch("test", [held_out[7]] * count))
    noise = good.space.noise(Streams(0, tuple(range(count))), 0)
    assert "untrained" in found(Batch(noise, good.space, good.cond))
    shaken = torch.cat([good.x[:, :3] + 0.3 * noise[:, :3], good.x[:, 3:]], 1)
    assert "untrained" in found(Batch(shaken, good.space, good.cond))


def test_evaluate_calls_an_untrained_network_out(tmp_path: Path) -> None:
    modality = MoleculeModality()
    small = ["molecule.heavy_atoms=5", "molecule.width=16", "molecule.layers=1"]
    resolved: Any = resolve(modality, overrides=[*small, f"out={tmp_path}"])
    facts = modality.prepare(resolved.molecule).facts
    model = Trainer(runs.start(modality, resolved, facts)).model()
    result = evaluate.evaluate(model, model.settings(steps=5), 60, 0, tmp_path / "cache")
    assert [found["name"] for found in result["verdicts"]] == ["untrained"]
