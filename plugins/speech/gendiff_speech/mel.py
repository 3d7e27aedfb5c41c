"""Log mel-spectrograms in the convention of HiFi-GAN, and sound from them by Griffin-Lim.

Magnitudes of a Hann-windowed Fourier transform without centring, the wave extended by reflection
by (n_fft - hop) / 2 on both sides, through a Slaney filter bank with Slaney norm, and the natural
logarithm of what is at least 1e-5 (Kong et al., 2020, https://arxiv.org/abs/2010.05646): what
HiFi-GAN, BigVGAN and their like accept. ``vocos24khz`` is what Vocos was published with (Siuzdak,
2023, https://arxiv.org/abs/2306.00814): frames centred at multiples of the hop, bands on the HTK
scale without norm, a floor of 1e-7. Of its T // hop + 1 frames the last is left out, so that in
every convention a frame stands for ``hop`` samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from gendiff.errors import DataError


@dataclass(frozen=True)
class MelConvention:
    """What a mel-spectrogram's numbers mean.

    Args:
        sample_rate_hz: Samples of the wave per second.
        n_fft: Length of the Fourier transform in samples.
        hop: Samples from frame to frame.
        window: Length of the Hann window in samples.
        mels: Bands.
        low_hz: Lower end of the lowest band.
        high_hz: Upper end of the highest band.
        floor: Least value before the logarithm.
        power: What is added to the squared magnitude of each bin.
        bands: ``slaney``, with Slaney norm, or ``htk``, without norm.
        centred: Frame k is centred at sample k * hop, half a hop before HiFi-GAN's.
    """

    sample_rate_hz: int
    n_fft: int
    hop: int
    window: int
    mels: int
    low_hz: float
    high_hz: float
    floor: float = 1e-5
    power: float = 1e-9
    bands: Literal["slaney", "htk"] = "slaney"
    centred: bool = False

    @property
    def pad(self) -> int:
        """Samples by which the first and the last frame stick out of the wave."""
        return self.n_fft // 2 if self.centred else (self.n_fft - self.hop) // 2


CONVENTIONS = {
    "8khz": MelConvention(8000, 512, 128, 512, 64, 0, 4000),
    "16khz": MelConvention(16000, 1024, 256, 1024, 80, 0, 8000),
    "22khz": MelConvention(22050, 1024, 256, 1024, 80, 0, 8000),  # HiFi-GAN's
    "24khz": MelConvention(24000, 1024, 256, 1024, 100, 0, 12000),
    "vocos24khz": MelConvention(
        24000, 1024, 256, 1024, 100, 0, 12000, 1e-7, 0.0, bands="htk", centred=True
    ),
}


@lru_cache
def filters(convention: MelConvention) -> Tensor:
    """The filter bank, (n_fft / 2 + 1, mels)."""
    from torchaudio.functional import melscale_fbanks

    bank: Tensor = melscale_fbanks(
        convention.n_fft // 2 + 1,
        convention.low_hz,
        convention.high_hz,
        convention.mels,
        convention.sample_rate_hz,
        norm="slaney" if convention.bands == "slaney" else None,
        mel_scale=convention.bands,
    )
    return bank


@lru_cache
def spread(convention: MelConvention) -> Tensor:
    """S, (n_fft / 2 + 1, mels): ``S @ exp(log_mel)`` are about the magnitudes of the wave.

    A bin has the mean of the bands that see it, those that see no more than it foremost; a bin
    that none sees has its neighbour's. A flat spectrum comes back as it was.
    """
    bank = filters(convention)
    level = bank.sum(0).clamp(min=1e-8)  # of a band, where all magnitudes are 1
    share = bank / level
    seen = share.sum(1)
    live = (seen > 0).nonzero()[:, 0]
    nearest = live[(torch.arange(len(bank))[:, None] - live).abs().argmin(1)]
    return share[nearest] / seen[nearest, None] / level


def log_mel(wave: Tensor, convention: MelConvention) -> Tensor:
    """The log mel-spectrogram, (mels, T // hop), of a wave (T,) in [-1, 1].

    Raises:
        DataError: The wave is shorter than the reflection needs.
    """
    pad = convention.pad
    if len(wave) <= max(pad, convention.hop):
        raise DataError(
            f"too short: {len(wave)} samples at {convention.sample_rate_hz} Hz. "
            f"A spectrogram needs more than {max(pad, convention.hop)}."
        )
    # In float64: near the floor the logarithm would magnify a float32 transform's rounding.
    padded = torch.nn.functional.pad(wave[None].double(), (pad, pad), mode="reflect")[0]
    spectrum = torch.stft(
        padded,
        convention.n_fft,
        convention.hop,
        convention.window,
        torch.hann_window(convention.window, dtype=torch.float64),
        center=False,
        return_complex=True,
    )[:, : len(wave) // convention.hop]
    magnitude = (spectrum.abs().square() + convention.power).sqrt()
    bands = filters(convention).T.double() @ magnitude
    return bands.clamp(min=convention.floor).log().float()


def closer(magnitude: Tensor, mel: Tensor, bank: Tensor, updates: int) -> Tensor:
    """Magnitudes (n_fft / 2 + 1, T) whose bands are nearer to (mels, T), both without logarithm.

    Lee & Seung's multiplicative updates: they keep zeros and signs, and need no step size.
    """
    for _ in range(updates):
        magnitude = magnitude * (bank @ mel) / (bank @ (bank.T @ magnitude) + 1e-12)
    return magnitude


def griffin_lim(
    mel: Tensor, convention: MelConvention, iterations: int = 60, seed: int = 0
) -> Tensor:
    """A wave (T * hop,) with about this log mel-spectrogram (mels, T).

    Non-negative least squares for the magnitudes, then the fast Griffin-Lim algorithm (Perraudin
    et al., 2013) from phases drawn from ``seed``.
    """
    from torchaudio.functional import griffinlim

    bank = filters(convention)
    target = mel.float().exp()
    magnitude = closer((bank @ target).clamp(min=1e-8), target, bank, updates=50)
    frames = magnitude.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wave: Tensor = griffinlim(
            torch.nn.functional.pad(magnitude, (0, 1), mode="replicate"),
            torch.hann_window(convention.window),
            convention.n_fft,
            convention.hop,
            convention.window,
            power=1.0,
            n_iter=iterations,
            momentum=0.99,
            length=frames * convention.hop,
            rand_init=True,
        )
    # Griffin-Lim's frame k is centred at k * hop, HiFi-GAN's half a hop later.
    half = 0 if convention.centred else convention.hop // 2
    return torch.nn.functional.pad(wave, (half, 0))[: frames * convention.hop]


def log_spectral_distance(a: Tensor, b: Tensor) -> Tensor:
    """RMS difference over bands of two log mels (mels, T), in dB, mean over frames."""
    decibel = 20 / torch.log(torch.tensor(10.0))
    return (decibel * (a - b)).square().mean(0).sqrt().mean()
