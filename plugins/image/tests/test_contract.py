"""The image modality keeps the engine's contract, to the bit."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gendiff import Picture, config, runs
from gendiff.testing import check_modality
from gendiff.train import Trainer
from gendiff_image import ImageModality

SMALL = ["image.channels=16", "image.head_channels=16"]


@pytest.mark.parametrize(
    "extra",
    [[], ["image.learned_variance=true", "diffusion.prediction=eps", "diffusion.schedule=cosine"]],
)
def test_the_contract(extra: list[str]) -> None:
    assert any(
        "files" in line or "written" in line
        for line in check_modality("image", [*SMALL, "train.lr=1e-3", *extra])
    )


def test_a_picture_is_the_same_bits_at_batch_sizes_1_7_and_64(tmp_path: Path) -> None:
    modality = ImageModality()
    resolved = config.resolve(modality, overrides=[*SMALL, f"out={tmp_path}", "sample.steps=3"])
    facts = modality.prepare(resolved.image).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(modality, resolved, facts))
    for _ in range(3):  # the U-Net starts as nothing
        trainer.advance([next(trainer.batches())])
    model = trainer.model()
    reference = model.sample(64, batch_size=64, seed=1)
    assert reference.x.std() > 0.1
    for size in (1, 7):
        assert torch.equal(model.sample(64, batch_size=size, seed=1).x, reference.x)
    for i in (0, 6, 63):
        assert torch.equal(model.sample(ids=[i], seed=1).x[0], reference.x[i])


def test_the_learned_variance_samples(tmp_path: Path) -> None:
    modality = ImageModality()
    overrides = [
        *SMALL,
        f"out={tmp_path}",
        "image.learned_variance=true",
        "diffusion.prediction=eps",
        "diffusion.schedule=vp_linear",
        "diffusion.times={name: uniform, steps: 1000}",
        "diffusion.weight=eps",
    ]
    resolved = config.resolve(modality, overrides=overrides)
    facts = modality.prepare(resolved.image).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(modality, resolved, facts))
    batch = next(trainer.batches())
    losses = [trainer.advance([batch]).loss.mean.item() for _ in range(5)]
    assert all(loss == loss for loss in losses)
    sampler = {"name": "ddpm", "variance": "learned"}
    x = trainer.model().sample(4, sampler=sampler, grid="time", steps=10).x
    assert x.shape == (4, 1, 8, 8)
    assert x.isfinite().all()


def test_an_exhibit_is_the_picture_that_is_written_with_its_class(tmp_path: Path) -> None:
    modality = ImageModality()
    section = modality.Config()
    facts = modality.prepare(section).facts
    data = modality.dataset(section, facts, "test")
    items = [data[i, 0] for i in range(5)]
    batch = modality.collate(section, facts, items)
    files = modality.write(section, facts, batch, tmp_path, range(5))
    shown = modality.exhibits(section, facts, batch, range(5))
    assert [e.title for e in shown] == [str(label) for _, label in items]
    for exhibit, file in zip(shown, files, strict=True):
        (part,) = exhibit.parts
        assert isinstance(part, Picture)
        seen = np.asarray(Image.open(io.BytesIO(part.png)))
        assert (seen == np.asarray(Image.open(file))).all()
        assert seen.std() > 20
