"""The speech modality keeps the engine's contract, and says what it cannot do."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from gendiff import Picture, Sound, config, evaluate, runs
from gendiff.errors import ConfigError
from gendiff.modality import Request
from gendiff.spaces import join
from gendiff.testing import check_modality
from gendiff.train import Trainer
from gendiff_speech.plugin import SpeechModality

SMALL = ["speech.data=fsdd", "speech.channels=16", "speech.blocks=2"]
RECIPES = sorted((Path(__file__).parents[3] / "configs" / "speech").glob("*.yaml"))


def test_the_contract(fsdd: Path) -> None:
    lines = list(check_modality("speech", [*SMALL, f"speech.path={fsdd}"]))
    assert any("files" in line or "written" in line for line in lines)


def test_evaluate_calls_an_untrained_network_of_few_recordings_out(
    fsdd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gendiff_speech.recogniser._STEPS", 60)
    modality = SpeechModality()
    overrides = [*SMALL, f"speech.path={fsdd}", f"out={tmp_path / 'run'}"]
    resolved = config.resolve(modality, overrides=overrides)
    facts = modality.prepare(resolved.speech).facts  # type: ignore[attr-defined]
    model = Trainer(runs.start(modality, resolved, facts)).model()
    result = evaluate.evaluate(model, model.settings(steps=3), 40, 0, tmp_path / "cache")
    # The balls of 8 held-out recordings hold anything, so density cannot say "untrained" here;
    # that the samples are all alike can be said.
    assert [found["name"] for found in result["verdicts"]] == ["collapsed"]


def test_a_sample_does_not_depend_on_its_batch(fsdd: Path, tmp_path: Path) -> None:
    modality = SpeechModality()
    overrides = [*SMALL, f"speech.path={fsdd}", f"out={tmp_path / 'run'}", "sample.steps=3"]
    resolved = config.resolve(modality, overrides=overrides)
    facts = modality.prepare(resolved.speech).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(modality, resolved, facts))
    for _ in range(3):
        trainer.advance([next(trainer.batches())])
    model = trainer.model()
    together = model.sample(9, batch_size=9, seed=1)
    for i in range(9):
        alone = model.sample(ids=[i], seed=1)
        length = alone.x.shape[2]
        assert torch.allclose(together.x[i, :, :length], alone.x[0], atol=1e-5)
        assert together.x[i, :, length:].abs().sum() == 0
    assert together.x.std() > 0.1
    parts = join([model.sample(ids=[i], seed=1) for i in range(9)])
    assert parts.cond is not None
    assert together.cond is not None
    assert torch.equal(parts.cond["tokens"], together.cond["tokens"])


def test_what_is_asked(fsdd: Path) -> None:
    modality = SpeechModality()
    section = modality.Config(data="fsdd", path=str(fsdd))
    facts = modality.prepare(section).facts

    def asked(**values: object) -> list[tuple[int, int]]:
        cond = modality.templates(section, facts, Request(range(4), 0, values))[1]
        assert cond is not None
        return list(zip(cond["text"].tolist(), cond["speaker"].tolist(), strict=True))

    assert asked() == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert asked(text="seven") == [(1, 0), (1, 1), (1, 0), (1, 1)]
    assert asked(text="seven", speaker="bob") == [(1, 1)] * 4
    assert asked(text=[0, "seven"], speaker=0) == [(0, 0), (1, 0)] * 2
    for values, line in [
        ({"text": "sven"}, "text: 'sven' is unknown. Did you mean 'seven'? Known: zero, seven."),
        ({"text": ""}, "text: '' is unknown. Known: zero, seven."),
        ({"text": "sé"}, "text: 'sé' is unknown. Known: zero, seven."),
        ({"speaker": 2}, "speaker: 2 is unknown. Known: ann, bob."),
        ({"speed": 0}, "speed: 0 is not a number above 0. 1 is the data's speed."),
        ({"txt": 1}, "cond: unknown condition 'txt'. Known: text, speaker, speed."),
    ]:
        with pytest.raises(ConfigError) as error:
            asked(**values)
        assert str(error.value) == line


def test_sound_of_the_right_length_is_written(fsdd: Path, tmp_path: Path) -> None:
    modality = SpeechModality()
    section = modality.Config(data="fsdd", path=str(fsdd))
    facts = modality.prepare(section).facts
    items = [modality.dataset(section, facts, "test")[i, 0] for i in range(2)]
    batch = modality.collate(section, facts, items)
    paths = modality.write(section, facts, batch, tmp_path, [3, 17])
    assert [path.name for path in paths] == ["00003.wav", "00017.wav"]
    for path, item in zip(paths, items, strict=True):
        wave, rate = soundfile.read(path)
        assert rate == 8000
        assert len(wave) == 128 * item.mel.shape[1]
        spectrum = np.abs(np.fft.rfft(wave))
        strongest = spectrum.argmax() * rate / len(wave)
        tone = (220, 110)[item.speaker] * (1 + 7 * item.text)
        assert abs(strongest - tone) < 25
    assert modality.preview(section, facts, batch, tmp_path / "p.png").stat().st_size > 5000


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    resolved = config.resolve(SpeechModality(), [recipe])
    text = recipe.read_text()
    assert f"gendiff train --modality speech --config configs/speech/{recipe.name}" in text
    if recipe.stem == "digits":
        assert resolved == config.resolve(SpeechModality())


def test_an_exhibit_is_the_sound_that_is_written_and_its_mel(fsdd: Path, tmp_path: Path) -> None:
    modality = SpeechModality()
    section = modality.Config(data="fsdd", path=str(fsdd))
    facts = modality.prepare(section).facts
    data = modality.dataset(section, facts, "test")
    batch = modality.collate(section, facts, [data[i, 0] for i in (0, 7)])
    files = modality.write(section, facts, batch, tmp_path, [0, 1])
    shown = modality.exhibits(section, facts, batch, [0, 1])
    assert batch.cond is not None
    for row, (exhibit, file) in enumerate(zip(shown, files, strict=True)):
        picture, sound = exhibit.parts
        assert isinstance(picture, Picture)
        assert isinstance(sound, Sound)
        assert sound.wav == file.read_bytes()
        wave, rate = soundfile.read(io.BytesIO(sound.wav))
        assert rate == 8000
        assert np.abs(wave).max() > 0.05
        mel = np.load(file.with_suffix(".npy"))
        seen = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")).astype(float)
        assert seen.shape[:2] == mel.shape
        # Low bands lie below, and what is louder is brighter.
        assert np.corrcoef(seen.sum(2)[::-1].ravel(), mel.ravel())[0, 1] > 0.95
        assert exhibit.title == facts["texts"][int(batch.cond["text"][row])]
        assert exhibit.notes[0] == facts["speakers"][int(batch.cond["speaker"][row])]
