"""The formant synthesiser: its sounds, the corpus of it, and when the default falls to it."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from gendiff import preparing, runs
from gendiff.cli import main
from gendiff.errors import DataError
from gendiff_speech import data, espeak, formants
from gendiff_speech.formants import RATE_HZ, SOUNDS, SPEAKERS, VOICES, WORDS, speak
from gendiff_speech.mel import CONVENTIONS, log_mel
from gendiff_speech.plugin import SpeechConfig

FEW = {"train": 3, "test": 1}


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of few takes of two voices, in a cache of its own."""
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "TAKES", FEW)
    monkeypatch.setattr(formants, "VOICES", ("bass", "alto"))
    monkeypatch.setattr(preparing, "cores", lambda: 1)  # worker processes take seconds to start


def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if eSpeak NG were not installed."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak, "_SYSTEM", "libespeak-ng-that-is-not-there.so.1")


class Asked(Exception):
    """eSpeak NG was asked to speak."""


def refuse(*_: object, **__: object) -> None:
    raise Asked


def appears(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if eSpeak NG were installed now, but must not be used."""
    monkeypatch.setattr(espeak, "missing", lambda: None)
    monkeypatch.setattr(espeak, "speak", refuse)


def steady(name: str, voice: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The middle of a long sound."""
    monkeypatch.setitem(WORDS, "steady", f"{name} 500")
    spoken = speak("steady", voice)
    return spoken.wave[spoken.starts[1] + 3000 : spoken.starts[2] - 3000]


@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("word", WORDS)
def test_every_word_is_covered_by_its_sounds_and_is_not_clipped(word: str, voice: str) -> None:
    spoken = speak(word, voice, pitch=80, rate=200)
    assert spoken.wave.dtype == np.float32
    assert spoken.phonemes[0] == spoken.phonemes[-1] == "_"
    assert len(spoken.phonemes) == len(spoken.starts)
    assert spoken.starts[0] == 0
    assert all(a < b for a, b in pairwise((*spoken.starts, len(spoken.wave))))
    assert 0.2 < len(spoken.wave) / RATE_HZ < 0.7
    assert np.isfinite(spoken.wave).all()
    assert np.abs(spoken.wave).max() == pytest.approx(0.5)


def test_the_same_call_is_the_same_wave() -> None:
    first = speak("six", "child", 40, 140)
    speak("nine", "bass")
    again = speak("six", "child", 40, 140)
    assert first.wave.tobytes() == again.wave.tobytes()
    assert first.starts == again.starts
    other = speak("six", "child", 41, 140)
    assert other.starts == first.starts
    assert not np.allclose(other.wave, first.wave, atol=1e-2)


@pytest.mark.parametrize("voice", ["bass", "baritone", "tenor"])
@pytest.mark.parametrize("vowel", ["i:", "I", "E", "V", "u:"])
def test_a_vowel_s_envelope_peaks_at_the_table_s_formants(
    vowel: str, voice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The roots of linear prediction; its error grows with the distance of the harmonics."""
    wave = steady(vowel, voice, monkeypatch).astype(np.float64)
    wave = np.append(wave[0], wave[1:] - 0.95 * wave[:-1]) * np.hanning(len(wave))
    roots = np.roots(librosa.lpc(wave, order=24))
    roots = roots[(roots.imag > 0) & (np.abs(roots) > 0.94)]
    peaks = np.sort(np.angle(roots)) * RATE_HZ / (2 * np.pi)
    for wanted in SOUNDS[vowel].formants or ():
        hertz = wanted / SPEAKERS[voice].tract
        nearest = peaks[np.abs(peaks - hertz).argmin()]
        assert nearest == pytest.approx(hertz, rel=0.05, abs=45), peaks


@pytest.mark.parametrize("voice", VOICES)
def test_a_vowel_has_the_voice_s_pitch(voice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = steady("V", voice, monkeypatch)
    part = wave[len(wave) // 2 :][:2048]
    strength = np.correlate(part, part, "full")[len(part) :]
    low, high = (int(RATE_HZ / SPEAKERS[voice].pitch_hz * factor) for factor in (0.7, 1.5))
    period = low + strength[low:high].argmax() + 1
    # The middle of the fall from 1.12 to 0.82.
    assert SPEAKERS[voice].pitch_hz * 0.85 < RATE_HZ / period < SPEAKERS[voice].pitch_hz * 1.05


def test_hisses_are_high_and_vowels_low(monkeypatch: pytest.MonkeyPatch) -> None:
    def share_above_4_khz(name: str) -> float:
        power = np.abs(np.fft.rfft(steady(name, "baritone", monkeypatch))) ** 2
        return float(power[len(power) * 4000 * 2 // RATE_HZ :].sum() / power.sum())

    assert share_above_4_khz("s") > 0.9
    assert share_above_4_khz("i:") < 0.05
    assert 0.02 < share_above_4_khz("z") < 0.9


def look(word: str, voice: str, pitch: int, rate: int) -> torch.Tensor:
    """A word's look: mels smoothed over 8 bands, in 24 frames."""
    mel = log_mel(torch.from_numpy(speak(word, voice, pitch, rate).wave), CONVENTIONS["22khz"])
    mel = torch.nn.functional.interpolate(mel[None], 24, mode="linear")[0]
    return torch.nn.functional.avg_pool1d(mel.T[:, None], 8)[:, 0].flatten()


@pytest.mark.parametrize("voice", VOICES)
def test_a_digit_is_nearest_to_itself_at_another_pitch_and_pace(voice: str) -> None:
    known = torch.stack([look(word, voice, 40, 140) for word in WORDS])
    heard = torch.stack([look(word, voice, 60, 190) for word in WORDS])
    assert torch.cdist(heard, known).argmin(1).tolist() == list(range(10))


def test_the_corpus_has_durations_that_add_to_its_frames(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "cores", lambda: 2)
    config = SpeechConfig(data="formants")
    report = data.prepare(config)
    assert report.summary.startswith("80 utterances of 10 words by 2 speakers, by a formant ")
    assert report.summary.endswith("to try the code with; not speech to learn from")
    assert report.warnings == ()
    facts = report.facts
    assert facts["texts"] == list(data.WORDS)
    train, test = (data.dataset(config, facts, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (60, 20)
    for item in (*(train[i, 0] for i in range(60)), *(test[i, 0] for i in range(20))):
        said = [facts["tokens"][i] for i in item.tokens.tolist()]
        assert said[1:-1] == WORDS[facts["texts"][item.text]].split()[::2]
        assert item.durations.sum() == item.mel.shape[1]
        assert item.durations.min() >= 1
        assert torch.isfinite(item.mel).all()


def test_durations_are_those_of_the_sounds(few: None) -> None:
    config = SpeechConfig(data="formants", convention="16khz")
    facts = data.prepare(config).facts
    hissing = facts["tokens"].index("s")
    silent = facts["tokens"].index("_")
    rows = data.dataset(config, facts, "train")
    louder = []
    for item in (rows[i, 0] for i in range(len(rows))):
        told = item.tokens.repeat_interleave(item.durations)
        high = item.mel[60:].mean(0)
        if (told == hissing).any():
            louder.append(float(high[told == hissing].mean() - high[told == silent].mean()))
    assert len(louder) == 12
    assert min(louder) > 0.5  # standard deviations of the bands


def test_without_espeak_the_default_is_formants_and_says_so(
    few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch)
    report = data.prepare(SpeechConfig())
    assert report.facts["data"] == "formants"
    (line,) = report.warnings
    assert "formant synthesiser" in line
    assert "`pip install espeakng-loader`" in line
    assert "\n" not in line
    again = data.prepare(SpeechConfig())
    assert again == report
    assert data.prepare(SpeechConfig(data="formants")).facts == report.facts
    shutil.rmtree(runs.cache_folder())
    appears(monkeypatch)
    assert len(data.dataset(SpeechConfig(), report.facts, "train")) == 60


def test_espeak_that_was_asked_for_stays_an_error(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch)
    with pytest.raises(
        DataError, match="speech.data=espeak: .*espeakng-loader.*=formants"
    ) as told:
        data.prepare(SpeechConfig(data="espeak"))
    assert "\n" not in str(told.value)
    assert not (tmp_path / "cache").exists()


def test_a_run_goes_on_with_what_it_began_with(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(name: str, steps: int, *more: str) -> Result:
        small = ["speech.channels=8", "speech.blocks=1", "sample.steps=2", "sample.preview=1"]
        told = [f"out={tmp_path}", f"name={name}", f"train.steps={steps}", *small, *more]
        return CliRunner().invoke(main, ["train", "--modality", "speech", *told])

    with monkeypatch.context() as patch:
        without(patch)
        begun = train("old", 2)
    assert begun.output.count("warning: data: eSpeak NG") == 1
    appears(monkeypatch)
    shutil.rmtree(tmp_path / "cache")  # what the network learnt from is made anew
    resumed = train("old", 4, "--accept-changes")
    assert resumed.exit_code == 0, resumed.output
    assert "by a formant synthesiser" in resumed.output
    assert len(list((tmp_path / "speech/old/checkpoints").iterdir())) == 2
    assert (
        json.loads((tmp_path / "speech/old/run.json").read_text())["facts"]["data"] == "formants"
    )
    assert isinstance(train("new", 2).exception, Asked)


def test_what_was_automatic_is_settled_by_the_facts_alone() -> None:
    config = SpeechConfig()
    assert data.settled(config, {"data": "espeak"}).data == "espeak"
    assert data.settled(config, {"data": "fsdd"}).data == "auto"  # the run's data were changed
    assert data.settled(SpeechConfig(data="espeak"), {"data": "formants"}).data == "espeak"
    letters = {"data": "ljspeech", "reading": {"kind": "characters"}}
    assert data.settled(SpeechConfig(data="ljspeech"), letters).tokens == "characters"
