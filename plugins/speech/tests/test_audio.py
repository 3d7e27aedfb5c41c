"""Sound files of every kind that people have, and the line each bad one gets."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from gendiff.errors import DataError
from gendiff_speech import audio

TONE = 0.5 * np.sin(np.arange(1600) * 0.3)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [("a.wav", "PCM_16", 1e-4), ("a.wav", "PCM_U8", 1e-2), ("a.flac", "PCM_24", 1e-6)],
)
def test_formats(tmp_path: Path, name: str, subtype: str, tolerance: float) -> None:
    soundfile.write(tmp_path / name, TONE, 192000, subtype=subtype)
    wave, rate = audio.read(tmp_path / name, name)
    assert rate == 192000
    assert np.abs(wave.numpy() - TONE).max() < tolerance
    same, _ = audio.read((tmp_path / name).read_bytes(), name)
    assert torch.equal(same, wave)


def test_stereo_is_averaged(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "s.wav", np.stack([TONE, -TONE], 1), 8000, subtype="FLOAT")
    assert audio.read(tmp_path / "s.wav", "s.wav")[0].abs().max() < 1e-6


def test_bad_files_get_one_line_that_names_them(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as error:
            audio.read(path, "x.wav")
        assert str(error.value).startswith("x.wav: ")
        assert "\n" not in str(error.value)

    refused("cannot be decoded")  # not there
    path.write_bytes(b"")
    refused("cannot be decoded")
    path.write_text("I am no sound at all")
    refused("cannot be decoded")
    soundfile.write(path, np.zeros(0), 8000)
    refused("holds no sound")
    soundfile.write(path, np.where(np.arange(1600) == 7, np.nan, TONE), 8000, subtype="FLOAT")
    refused("NaN")
    soundfile.write(path, np.zeros(601 * 100, dtype=np.int16), 100)
    refused("lasts 601 s. At most 600 s")
    soundfile.write(tmp_path / "t.flac", np.random.default_rng(0).standard_normal(80000), 8000)
    path.write_bytes((tmp_path / "t.flac").read_bytes()[:9000])
    refused("cannot be decoded|truncated")
    soundfile.write(path, TONE, 8000)
    path.write_bytes(path.read_bytes()[:1000])
    refused("truncated, its header tells of more")


def test_silence_at_the_ends_is_cut() -> None:
    sound = torch.sin(torch.arange(8000) * 0.3)
    wave = torch.cat([1e-4 * torch.ones(4000), sound, torch.zeros(1600), sound, torch.zeros(6000)])
    found = audio.trim(wave, 8000, "x.wav")
    assert abs(len(found) - (400 + 8000 + 1600 + 8000 + 400)) <= 80
    assert torch.equal(found[400:8400], sound)
    assert torch.equal(audio.trim(sound, 8000, "x.wav"), sound)
    with pytest.raises(DataError, match="x.wav: holds only silence"):
        audio.trim(torch.zeros(800), 8000, "x.wav")


def test_what_is_written_does_not_clip(tmp_path: Path) -> None:
    audio.write_wav(tmp_path / "w.wav", torch.tensor([0.0, 2.0, -4.0]), 8000)
    wave, rate = audio.read(tmp_path / "w.wav", "w.wav")
    assert rate == 8000
    assert torch.allclose(wave, torch.tensor([0.0, 0.5, -1.0]), atol=1e-4)


def test_resampling_keeps_a_tone() -> None:
    time = torch.arange(8000) / 8000
    out = audio.resample(torch.sin(2 * torch.pi * 100 * time), 8000, 22050)
    exact = torch.sin(2 * torch.pi * 100 * torch.arange(22050) / 22050)
    assert len(out) == 22050
    assert (out - exact)[500:-500].abs().max() < 5e-3


def test_rates_without_a_common_factor() -> None:
    """The filters from one such rate to the other would take gigabytes."""
    wave = torch.zeros(1000)
    assert len(audio.resample(wave, 44100, 16000)) == 363
    for rate in (7, 44_099, 1_999_999_973):
        with pytest.raises(DataError, match=f"a rate of {rate} Hz cannot be brought to 22050"):
            audio.resample(wave, rate, 22050)


@pytest.mark.parametrize("damage", ["cut", "flip", "bomb"])
def test_a_zip_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a.wav", bytes(audio.LARGEST_BYTES + 1) if damage == "bomb" else bytes(999))
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-30])
    elif damage == "flip":  # of the compressed bytes
        path.write_bytes(content[:36] + b"\xff" * 6 + content[42:])
    with pytest.raises(DataError, match="a.zip"), audio.archive(path) as opened:
        opened.read("a.wav")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"a.wav: cannot be decoded \(no file\)"):
        audio.read(tmp_path / "a.wav", "a.wav")
