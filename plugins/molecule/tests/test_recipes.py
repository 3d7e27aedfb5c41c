"""Every recipe is valid, says how to run it and what it is to be compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from gendiff import config
from gendiff_molecule import MoleculeModality

RECIPES = sorted((Path(__file__).parents[3] / "configs" / "molecule").glob("*.yaml"))
MODALITY = MoleculeModality()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    config.resolve(MODALITY, [recipe])
    text = recipe.read_text()
    assert f"gendiff train --modality molecule --config configs/molecule/{recipe.name}" in text


def test_the_small_recipe_is_the_default_written_out() -> None:
    recipe = next(path for path in RECIPES if path.stem == "small")
    assert config.resolve(MODALITY, [recipe]) == config.resolve(MODALITY)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_published_work_name_its_figures(recipe: Path) -> None:
    if recipe.stem not in ("small", "explicit"):
        text = recipe.read_text()
        assert "Published" in text or "To compare with" in text or "published" in text
