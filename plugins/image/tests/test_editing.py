"""Editing pictures: kept pixels stay to the bit, and mistakes are said in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gendiff import config, runs
from gendiff.errors import ConfigError, DataError
from gendiff.generate import Model
from gendiff.train import Trainer
from gendiff_image import ImageModality, editing

FACTS = {"channels": 1, "height": 8, "width": 8}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "eight.png"
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    modality = ImageModality()
    keys = ["image.channels=16", "image.head_channels=16", f"out={tmp_path_factory.mktemp('run')}"]
    resolved = config.resolve(modality, overrides=[*keys, "sample.steps=4"])
    facts = modality.prepare(resolved.image).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(modality, resolved, facts))
    for _ in range(3):
        trainer.advance([next(trainer.batches())])
    return trainer.model()


def test_kept_pixels_are_bit_equal(model: Model, picture: Path) -> None:
    source = editing.given(FACTS, picture, None)[0]
    x = model.sample(3, source=picture, keep="0:4,:", cond={"label": 3}).x
    assert torch.equal(x[:, :, :4], source[:, :, :4].expand(3, 1, 4, 8))
    assert (x[:, :, 4:] - source[:, :, 4:]).abs().amax((1, 2, 3)).min() > 0.05


@pytest.mark.parametrize(
    ("keep", "rows", "columns"),
    [("2:,:", slice(2, None), slice(None)), (":, -3:", slice(None), slice(-3, None))],
)
def test_slices(picture: Path, keep: str, rows: slice, columns: slice) -> None:
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[rows, columns] = True
    mask = editing.given(FACTS, picture, keep)[1]
    assert mask is not None
    assert torch.equal(mask[0, 0], expected)


def test_a_mask_of_white_pixels(picture: Path, tmp_path: Path) -> None:
    white = np.zeros((8, 8), np.uint8)
    white[1:3, 5] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    mask = editing.given(FACTS, picture, str(tmp_path / "mask.png"))[1]
    assert mask is not None
    assert torch.equal(mask[0, 0], torch.from_numpy(white > 0))


def test_mistakes(picture: Path, tmp_path: Path) -> None:
    for keep, match in (("left", "neither rows"), (":,:", "keeps all"), ("4:4,:", "keeps none")):
        with pytest.raises(ConfigError, match=match):
            editing.given(FACTS, picture, keep)
    with pytest.raises(DataError, match="is no file"):
        editing.given(FACTS, tmp_path / "none.png", None)
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot be read as a picture"):
        editing.given(FACTS, tmp_path / "broken.png", None)
