"""Corpora: FSDD's layout, and what is said of files that are not in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from gendiff.errors import DataError
from gendiff_speech import data
from gendiff_speech.plugin import SpeechConfig


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8), st.integers(8, 40))
def test_every_token_has_a_frame_and_all_frames_a_token(starts: list[int], frames: int) -> None:
    durations = data.frames_of(sorted(starts), 128, frames)
    assert durations.sum() == frames
    assert durations.min() >= 1


def test_durations_are_those_of_the_samples() -> None:
    assert data.frames_of([0, 512, 1280], 128, 20).tolist() == [4, 6, 10]


def test_fsdd_is_read_from_a_folder_and_from_a_zip(fsdd: Path) -> None:
    shutil.make_archive(str(fsdd.parent / "packed" / "recordings"), "zip", fsdd.parent, fsdd.name)
    for path in (fsdd, fsdd.parent / "packed"):
        config = SpeechConfig(data="fsdd", path=str(path))
        report = data.prepare(config)
        facts = report.facts
        assert report.summary == "36 utterances of 2 words by 2 speakers"
        assert facts["texts"] == ["zero", "seven"]
        assert facts["speakers"] == ["ann", "bob"]
        train, test = (data.dataset(config, facts, split) for split in ("train", "test"))
        assert (len(train), len(test)) == (20, 16)
        mels = torch.cat([train[i, 0].mel for i in range(len(train))], 1)
        assert torch.allclose(mels.mean(1), torch.zeros(64), atol=1e-3)
        assert torch.allclose(mels.std(1), torch.ones(64), atol=2e-2)
        item = train[0, 0]
        assert item.durations.sum() == item.mel.shape[1]
        letters = [facts["tokens"][i] for i in item.tokens.tolist()]
        assert "".join(letters) == facts["texts"][item.text]


def test_durations_at_synthesis_have_the_data_s_mean_and_speed(fsdd: Path) -> None:
    config = SpeechConfig(data="fsdd", path=str(fsdd))
    facts = data.prepare(config).facts
    items = [data.dataset(config, facts, "train")[i, 0] for i in range(20)]
    real = [i.mel.shape[1] for i in items if (i.speaker, i.text) == (1, 1)]
    made = [int(data.spoken(facts, 1, 1, 0, i, 1.0)[1].sum()) for i in range(200)]
    slow = [int(data.spoken(facts, 1, 1, 0, i, 0.5)[1].sum()) for i in range(200)]
    assert abs(np.mean(made) / np.mean(real) - 1) < 0.1
    assert abs(np.mean(slow) / np.mean(made) - 2) < 0.1
    assert 0.3 < np.std(made) / np.std(real) < 2
    same = data.spoken(facts, 1, 1, 0, 7, 1.0)[1]
    assert torch.equal(same, data.spoken(facts, 1, 1, 0, 7, 1.0)[1])


def test_broken_files_are_counted_and_named_and_nothing_is_kept(fsdd: Path) -> None:
    (fsdd / "0_ann_30.wav").write_bytes(b"no sound")
    soundfile.write(fsdd / "7_bob_31.wav", np.zeros(1), 8000)
    with pytest.raises(
        DataError, match=r"2 recordings cannot be used:\n  0_ann_30.wav: cannot be "
    ):
        data.prepare(SpeechConfig(data="fsdd", path=str(fsdd)))
    assert not list((fsdd.parent / "cache" / "speech").iterdir())
    (fsdd / "0_ann_30.wav").unlink()
    with pytest.raises(DataError, match=r"data: 7_bob_31.wav: too short: 1 samples at 8000 Hz"):
        data.prepare(SpeechConfig(data="fsdd", path=str(fsdd)))


def test_a_folder_without_recordings_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"speech.path: no .wav file in .*empty"):
        data.prepare(SpeechConfig(data="fsdd", path=str(tmp_path / "empty")))
    with pytest.raises(DataError, match=r"speech.path: not set"):
        data.prepare(SpeechConfig(data="fsdd"))
