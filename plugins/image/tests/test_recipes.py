"""Every recipe is valid, and the CIFAR ones run on data in CIFAR's format."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

import gendiff_image
from gendiff import config, runs, train

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "image").glob("*.yaml"))
MODALITY = gendiff_image.ImageModality()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    config.resolve(MODALITY, [recipe])
    text = recipe.read_text()
    assert f"gendiff train --modality image --config configs/image/{recipe.name}" in text


def test_the_digits_recipe_is_the_default_written_out() -> None:
    recipe = next(path for path in RECIPES if path.stem == "digits")
    assert config.resolve(MODALITY, [recipe]) == config.resolve(MODALITY)


def test_reproductions_name_what_they_reproduce() -> None:
    for path in RECIPES:
        if "_" in path.stem and path.stem.startswith("cifar"):
            text = path.read_text()
            assert "Reproduces: " in text
            assert "Published: FID " in text


@pytest.mark.parametrize("name", ["cifar10_ddpm", "cifar10_edm"])
def test_a_cifar_recipe_dry_runs_on_data_in_cifar_s_format(name: str, tmp_path: Path) -> None:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    random = np.random.default_rng(0)
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": images, "labels": [0, 1, 2, 9]}
        (base / file).write_bytes(pickle.dumps(content))
    names = [f"class{i}" for i in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    recipe = next(path for path in RECIPES if path.stem == name)
    resolved = config.resolve(
        MODALITY,
        [recipe],
        [f"image.path={tmp_path}", f"out={tmp_path}", "train.batch_size=2", "device=cpu"],
    )
    report = MODALITY.prepare(resolved.image)  # type: ignore[attr-defined]
    run = runs.Run(tmp_path / "run", MODALITY, resolved, report.facts)
    lines = train.dry_run(run)
    assert lines[0].startswith("batch: x (2, 3, 32, 32)")
    calls = {"cifar10_ddpm": 1000, "cifar10_edm": 35}[name]
    assert f"{calls} network calls" in lines[3]
