"""The mel front end against librosa's filters and a transform of numpy's."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gendiff.errors import DataError
from gendiff_speech import audio
from gendiff_speech.mel import (
    CONVENTIONS,
    filters,
    griffin_lim,
    log_mel,
    log_spectral_distance,
    spread,
)

REAL = Path(__file__).parents[4] / "shared" / "data" / "ljspeech_32" / "flac.zip"


def vowel(rate: int, seconds: float = 0.6) -> torch.Tensor:
    """A hundred and forty hertz with its overtones, fading in and out."""
    time = torch.arange(int(rate * seconds)) / rate
    wave = sum(torch.sin(2 * torch.pi * 140 * k * time) / k for k in range(1, 20))
    return 0.2 * wave * torch.sin(torch.pi * time / seconds)


def by_numpy(wave: torch.Tensor, name: str) -> np.ndarray:
    librosa = pytest.importorskip("librosa")
    c = CONVENTIONS[name]
    bank = librosa.filters.mel(
        sr=c.sample_rate_hz,
        n_fft=c.n_fft,
        n_mels=c.mels,
        fmin=c.low_hz,
        fmax=c.high_hz,
        htk=c.bands == "htk",
        norm="slaney" if c.bands == "slaney" else None,
    )
    pad = c.n_fft // 2 if c.centred else (c.n_fft - c.hop) // 2
    padded = np.pad(wave.double().numpy(), pad, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(c.window) / c.window)
    frames = np.lib.stride_tricks.sliding_window_view(padded, c.n_fft)[:: c.hop]
    frames = frames[: len(wave) // c.hop]
    magnitude = np.sqrt(np.abs(np.fft.rfft(frames * hann)) ** 2 + c.power)
    return np.log(np.maximum(bank @ magnitude.T, c.floor))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_mel_is_librosa_s(name: str) -> None:
    wave = vowel(CONVENTIONS[name].sample_rate_hz)
    mel = log_mel(wave, CONVENTIONS[name])
    assert mel.shape == (CONVENTIONS[name].mels, len(wave) // CONVENTIONS[name].hop)
    assert np.abs(mel.numpy() - by_numpy(wave, name)).max() < 1e-4


def real_speech() -> torch.Tensor:
    if not REAL.is_file():
        pytest.skip(f"no real speech: {REAL} is not there")
    with zipfile.ZipFile(REAL) as archive:
        name = min(n for n in archive.namelist() if n.endswith(".flac"))
        wave, rate = audio.read(io.BytesIO(archive.read(name)).getvalue(), name)
    assert rate == 22050
    return wave


def test_a_mel_of_real_speech_is_librosa_s() -> None:
    wave = real_speech()
    assert np.abs(log_mel(wave, CONVENTIONS["22khz"]).numpy() - by_numpy(wave, "22khz")).max() < (
        1e-4
    )


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_flat_spectrum_comes_back_from_its_bands(name: str) -> None:
    convention = CONVENTIONS[name]
    bands = filters(convention).sum(0)  # of magnitudes that are all 1
    found = spread(convention) @ bands
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("name", ["8khz", "22khz", "vocos24khz"])
def test_griffin_lim_gives_back_the_mel_frame_by_frame(name: str) -> None:
    convention = CONVENTIONS[name]
    mel = log_mel(vowel(convention.sample_rate_hz), convention)
    wave = griffin_lim(mel, convention)
    assert len(wave) == mel.shape[1] * convention.hop
    assert torch.equal(wave, griffin_lim(mel, convention))
    assert not torch.equal(wave, griffin_lim(mel, convention, seed=1))
    again = log_mel(wave, convention)[:, 4:-4]
    right = log_spectral_distance(again, mel[:, 4:-4])
    late = log_spectral_distance(again[:, 1:], mel[:, 4:-5])  # one frame off
    assert right < late


def test_griffin_lim_of_real_speech() -> None:
    convention = CONVENTIONS["22khz"]
    mel = log_mel(real_speech(), convention)
    again = log_mel(griffin_lim(mel, convention), convention)
    assert log_spectral_distance(again, mel) < 2  # measured: 1.28 dB


def test_the_distance_is_in_decibels() -> None:
    a = torch.zeros(3, 5)
    assert log_spectral_distance(a + torch.tensor(10.0).log(), a) == pytest.approx(20, rel=1e-5)


def test_a_wave_too_short_for_a_frame_is_refused() -> None:
    with pytest.raises(DataError, match=r"too short: 1 samples at 22050 Hz"):
        log_mel(torch.zeros(1), CONVENTIONS["22khz"])
