"""Editing recordings: what is kept stays to the bit, what is made has the recording's length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner

from gendiff import config, runs
from gendiff.cli import main
from gendiff.errors import ConfigError, DataError
from gendiff.generate import Model
from gendiff.train import Trainer
from gendiff_speech import editing, metrics, recogniser
from gendiff_speech.mel import CONVENTIONS, log_mel
from gendiff_speech.plugin import SpeechModality

EIGHT = CONVENTIONS["8khz"]
SMALL = ["speech.data=fsdd", "speech.channels=16", "speech.blocks=2", "sample.steps=3"]


@pytest.fixture
def model(fsdd: Path, tmp_path: Path) -> Model:
    modality = SpeechModality()
    overrides = [*SMALL, f"speech.path={fsdd}", f"out={tmp_path / 'run'}"]
    resolved = config.resolve(modality, overrides=overrides)
    facts = modality.prepare(resolved.speech).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(modality, resolved, facts))
    for _ in range(3):
        trainer.advance([next(trainer.batches())])
    trainer.save()
    return trainer.model()


def test_what_is_kept_is_bit_equal_in_the_files(model: Model, fsdd: Path, tmp_path: Path) -> None:
    path, out = fsdd / "7_ann_3.wav", tmp_path / "out"
    command = ["edit", str(model.run.folder), str(path), "--keep", "0-0.1,0.25-", "-n", "2"]
    done = CliRunner().invoke(main, [*command, "--out", str(out), "--cond", "text=seven"])
    assert done.exit_code == 0, done.output
    wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    frames = len(wave) // 128
    wave = wave[: frames * 128]
    kept = editing.kept_frames("0-0.1,0.25-", frames, EIGHT).numpy()
    real = log_mel(wave, EIGHT).numpy()
    mels = [np.load(out / f"0000{i}.npy") for i in range(2)]
    for i, mel in enumerate(mels):
        assert np.array_equal(mel[:, kept], real[:, kept])
        assert np.abs(mel - real)[:, ~kept].max() > 0.5
        made = soundfile.read(out / f"0000{i}.wav", dtype="float32")[0]
        near = np.abs(made - wave.numpy()) < 2.5 / 32768  # 16 bits in, 16 bits out
        assert near[:512].all()  # 0.1 s is 6 frames; the last 2 see what was made, or fade
        assert near[-512:].all()
        assert near[768:2048].mean() < 0.2
    assert not np.array_equal(mels[0][:, ~kept], mels[1][:, ~kept])


def test_the_state_of_what_is_kept_is_bit_equal(model: Model, fsdd: Path) -> None:
    path = fsdd / "0_bob_4.wav"
    batch = model.sample(3, source=path, keep="-0.2")
    _, mel = editing.recording(model.run.facts, path)
    kept = editing.kept_frames("-0.2", mel.shape[1], EIGHT)
    assert torch.equal(batch.x[..., kept], mel[:, kept].expand(3, -1, -1))
    assert batch.cond is not None
    assert batch.cond["text"].tolist() == [0] * 3  # as the file's name says
    assert batch.cond["speaker"].tolist() == [1] * 3
    assert batch.cond["durations"].sum(1).tolist() == [mel.shape[1]] * 3


def test_a_voice_is_asked_for_and_the_rest_is_the_recording_s(model: Model, fsdd: Path) -> None:
    path = fsdd / "7_ann_3.wav"
    _, mel = editing.recording(model.run.facts, path)
    varied = model.sample(2, source=path, noise=0.01, cond={"speaker": ["bob", "ann"]})
    assert (varied.x - mel).abs().max() < 0.2
    assert varied.cond is not None
    assert varied.cond["speaker"].tolist() == [1, 0]
    assert varied.cond["text"].tolist() == [1, 1]
    at = {"noise": 20, "guidance": 1}  # the recording's own field is not guided
    same = model.sample(1, source=path, cond={"speaker": 0}, origin={"speaker": "ann"}, **at)
    assert (same.x - mel).abs().max() < 1e-4  # translated to what it is
    other = model.sample(1, source=path, cond={"speaker": 1}, origin={"speaker": "ann"}, **at)
    assert (other.x - mel).abs().max() > 3e-4  # by a network that has learnt three steps


def test_what_no_name_tells_is_heard(
    model: Model, fsdd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tones of the corpus are told apart after a short training."""
    monkeypatch.setattr(recogniser, "_STEPS", 40)
    run = model.run
    for digit, speaker, text, who in ((0, "bob", 0, 1), (7, "ann", 1, 0)):
        path = tmp_path / "unnamed.wav"
        path.write_bytes((fsdd / f"{digit}_{speaker}_2.wav").read_bytes())
        _, mel = editing.recording(run.facts, path)
        found = editing.labels(run.section, run.facts, path, mel, tmp_path)
        assert found == {"text": text, "speaker": who}
    monkeypatch.setattr(metrics, "listener", lambda *_: (None, None, None))
    assert editing.labels(run.section, run.facts, path, mel, tmp_path) == {}


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("0-0.25,0.4-", [k for k in range(40) if not 0.25 <= (k + 0.5) * 0.016 < 0.4]),
        ("-0.016", [0]),
        (" .1-.13 ", [6, 7]),
        ("0.6-9", [37, 38, 39]),
    ],
)
def test_spans(keep: str, kept: list[int]) -> None:
    assert editing.kept_frames(keep, 40, EIGHT).nonzero()[:, 0].tolist() == kept


def test_durations_fit() -> None:
    durations = torch.tensor([[4, 4, 4, 4], [1, 7, 0, 0], [30, 1, 1, 0]])
    fitted = editing.fitted(durations, 8)
    assert fitted.tolist() == [[2, 2, 2, 2], [1, 7, 0, 0], [6, 1, 1, 0]]
    assert torch.equal(editing.fitted(durations[:1], 16), durations[:1])
    with pytest.raises(DataError, match="the recording's 3 frames are fewer than the text's 4"):
        editing.fitted(durations, 3)


def test_the_source_s_samples_lie_well_inside() -> None:
    """Frames that see a sample in its window all are kept, where the sample is the source's."""
    kept = torch.ones(30, dtype=torch.bool)
    kept[12:17] = False
    source, wave = torch.zeros(30 * 128), torch.ones(30 * 128)
    weight = editing.with_source(wave, source, kept, EIGHT)
    made = weight.reshape(30, 128)
    assert (made[12:17] == 1).all()
    changed = (weight > 0).nonzero()[:, 0]
    first, last = int(changed[0]), int(changed[-1])
    assert 12 * 128 - 192 - 64 <= first <= 12 * 128 - 192
    assert 17 * 128 + 192 <= last + 1 <= 17 * 128 + 192 + 64
    assert weight.diff().abs().max() < 0.01  # faded, not cut


def test_mistakes(model: Model, fsdd: Path, tmp_path: Path) -> None:
    path = fsdd / "7_ann_3.wav"
    for keep, line in [
        ("left", "keep: 'left' is not spans of seconds, as in 0-0.25,0.4- for all but the time "),
        ("-", "keep: '-' is not spans of seconds"),
        ("0-9", "keep: '0-9' keeps all of the recording's 0.35 s"),
        ("3-", "keep: '3-' keeps none of the recording's 0.35 s"),
    ]:
        with pytest.raises(ConfigError) as error:
            model.sample(1, source=path, keep=keep)
        assert str(error.value).startswith(line)
    with pytest.raises(ConfigError, match="speed: an edited recording keeps its length"):
        model.sample(1, source=path, noise=1, cond={"speed": 2})
    with pytest.raises(DataError, match="none.wav is no file"):
        model.sample(1, source=tmp_path / "none.wav", noise=1)
    soundfile.write(tmp_path / "7_ann_0.wav", np.zeros(100), 8000)
    with pytest.raises(DataError, match="edit: 7_ann_0.wav is too short: 0 samples"):
        model.sample(1, source=tmp_path / "7_ann_0.wav", noise=1)
    soundfile.write(tmp_path / "7_ann_0.wav", np.zeros(520), 8000)
    with pytest.raises(DataError, match="4 frames are fewer than the text's 5 tokens"):
        model.sample(1, source=tmp_path / "7_ann_0.wav", noise=1)
