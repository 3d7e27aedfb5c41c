"""eSpeak NG: every voice speaks, boundaries cover the wave, and the same call is the same wave."""

import hashlib
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest

from gendiff.errors import DataError
from gendiff_speech import espeak
from gendiff_speech.espeak import VOICES, Spoken, speak

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def usable() -> bool:
    try:
        speak("a", VOICES[0])
    except DataError:
        return False
    return True


needs_espeak = pytest.mark.skipif(not usable(), reason="eSpeak NG is not installed")


def digest(spoken: Spoken) -> str:
    parts = spoken.wave.tobytes() + repr((spoken.phonemes, spoken.starts)).encode()
    return hashlib.sha256(parts).hexdigest()


@needs_espeak
@pytest.mark.parametrize("voice", VOICES)
def test_digits_have_phonemes_that_cover_the_wave(voice):
    for digit in DIGITS:
        spoken = speak(digit, voice)
        assert spoken.wave.dtype == np.float32
        assert spoken.rate_hz == 22050
        assert 0.05 < np.abs(spoken.wave).max() <= 1
        assert spoken.starts[0] == 0
        edges = (*spoken.starts, len(spoken.wave))
        assert all(a < b for a, b in pairwise(edges))
        assert len(spoken.phonemes) == len(spoken.starts)
        assert all(a != "_" or b != "_" for a, b in pairwise(spoken.phonemes))
        assert sum(p != "_" for p in spoken.phonemes) >= 2
        loud = {
            p: np.abs(spoken.wave[a:b]).max()
            for p, (a, b) in zip(spoken.phonemes, pairwise(edges), strict=True)
        }
        assert all(level > 0.005 for p, level in loud.items() if p != "_")


@needs_espeak
def test_boundaries_stand_where_the_sound_changes():
    spoken = speak("seven", "en-us")
    assert spoken.phonemes == ("_", "s", "'E", "v", "@", "n", "_")
    edges = (*spoken.starts, len(spoken.wave))
    crossings = [np.mean(np.diff(np.sign(spoken.wave[a:b])) != 0) for a, b in pairwise(edges)]
    assert crossings[1] > 0.3  # a hiss changes its sign at every other sample, a vowel seldom
    assert crossings[2] < 0.15
    assert not spoken.wave[: edges[1]].any()
    assert not spoken.wave[edges[-2] + 1500 :].any()


@needs_espeak
def test_voices_differ_clearly():
    means = []
    for voice in VOICES:
        wave = np.concatenate([speak(digit, voice).wave for digit in DIGITS])
        power = np.abs(np.fft.rfft(wave[: len(wave) // 512 * 512].reshape(-1, 512))) ** 2
        bands = np.log(power.mean(0)[1:129].reshape(32, 4).mean(1))
        means.append(bands - bands.mean())
    assert min(np.abs(a - b).mean() for a, b in combinations(means, 2)) > 0.25


@needs_espeak
@pytest.mark.parametrize("voice", [VOICES[0], VOICES[6], "en-us+whisper", "en-us+klatt4"])
def test_the_same_call_gives_the_same_samples_here_and_in_a_new_process(voice):
    first = digest(speak("seven", voice))
    speak("Something else, in between.", "en-gb-scotland+m3", 80, 200)
    assert digest(speak("seven", voice)) == first
    code = (
        "from test_espeak import digest, speak\n"
        f"speak('one', 'en')\nprint(digest(speak('seven', {voice!r})))"
    )
    path = [str(p) for p in (*sys.path, __file__.rpartition("/")[0])]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == first


@needs_espeak
def test_pitch_and_rate_change_what_is_heard():
    plain = speak("seven", "en-us")
    assert len(speak("seven", "en-us", rate=240).wave) < len(plain.wave)
    assert digest(speak("seven", "en-us", pitch=80)) != digest(plain)


def test_phonemes_without_time_share_that_of_the_one_before():
    events = [("_", 0), ("O:", 100), ("l", 700), ("_:", 700), ("_", 900), ("a", 1000), ("_", 1200)]
    assert espeak._cover(events, 1200) == (("_", "O:", "l", "_", "a"), (0, 100, 400, 700, 1000))
    assert espeak._cover([("a", 0), ("_", 5), ("b", 5)], 9) == (("a", "b"), (0, 5))


@needs_espeak
@pytest.mark.parametrize("voice", ["nowhere", "en-us+nobody"])
def test_an_unknown_voice_is_named(voice):
    with pytest.raises(DataError, match=r"no voice '.*Choose from: en-us, "):
        speak("one", voice)


def test_without_the_library_the_fix_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak, "_SYSTEM", "libespeak-ng-that-is-not-there.so.1")
    with pytest.raises(DataError, match="pip install espeakng-loader.*apt install espeak-ng"):
        speak("one", "en-us")


@needs_espeak
def test_without_voice_data_the_fix_is_named(monkeypatch, tmp_path):
    loader = pytest.importorskip("espeakng_loader")
    monkeypatch.setattr(loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="voice data: `pip install"):
        speak("one", "en-us")
