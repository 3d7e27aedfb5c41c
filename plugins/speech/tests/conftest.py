"""A small corpus in the Free Spoken Digit Dataset's format, made of tones."""

from __future__ import annotations

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
