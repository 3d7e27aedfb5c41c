"""A small corpus in the Free Spoken Digit Dataset's format, made of tones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile


@pytest.fixture
def fsdd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "recordings"
    folder.mkdir()
    random = np.random.default_rng(0)
    for digit in (0, 7):
        for speaker, pitch in (("ann", 220), ("bob", 110)):
            for index in range(1, 10):
                time = np.arange(2400 + 160 * index) / 8000
                wave = 0.3 * np.sin(2 * np.pi * pitch * (1 + digit) * time)
                wave += 0.01 * random.standard_normal(len(time))
                soundfile.write(folder / f"{digit}_{speaker}_{index}.wav", wave, 8000)
    return folder


LETTERS = "abdegilmnorstu"


def _say(
    text: str, random: np.random.Generator, pitch: float = 1.0
) -> tuple[np.ndarray, list[int]]:
    """A wave at 16 kHz that spells a text: each letter has a tone, a space and the ends are soft.

    With it the sample at which each letter or space begins, from the silence before on.
    """
    parts, starts = [], []
    for letter in f"_{text} ":
        long = 0.06 + 0.05 * (letter in "aeiou") + 0.02 * random.random()
        time = np.arange(int(16000 * long)) / 16000
        level = 0.3 if letter in LETTERS else 0.0
        hertz = pitch * (300 + 350 * LETTERS.find(letter))
        starts.append(sum(map(len, parts)))
        parts.append(level * np.sin(2 * np.pi * hertz * time))
    wave = np.concatenate(parts)
    return wave + 1e-2 * random.standard_normal(len(wave)), starts


def _sentence(random: np.random.Generator) -> str:
    """Four words of one to six letters, no two alike side by side."""
    letters = np.array(list(LETTERS))
    return " ".join("".join(random.permutation(letters)[: random.integers(1, 7)]) for _ in "1234")


def _write_ljspeech(folder: Path, count: int) -> Path:
    """A small corpus in LJSpeech's layout, of tones."""
    (folder / "wavs").mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        said = _sentence(random)
        soundfile.write(folder / "wavs" / f"T{number:03d}.wav", _say(said, random)[0], 16000)
        lines.append(f"T{number:03d}|{said}|{said.capitalize()}.\n")
    (folder / "metadata.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def ljspeech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gendiff_speech.durations._STEPS", 60)
    return _write_ljspeech(tmp_path / "LJ", 30)


@pytest.fixture
def say() -> Callable[..., tuple[np.ndarray, list[int]]]:
    return _say


@pytest.fixture
def sentence() -> Callable[[np.random.Generator], str]:
    return _sentence
