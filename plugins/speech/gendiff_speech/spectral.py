r"""Distances of waves by their spectrograms, as losses.

The multi-resolution STFT loss (Yamamoto et al., 2020, https://arxiv.org/abs/1910.11480, eq. 5 to
7) and the L1 distance of log mels (Kong et al., 2020, https://arxiv.org/abs/2010.05646, eq. 5), of
each resolution: for magnitudes S and :math:`\hat S`, and M and :math:`\hat M` in mel bands,

.. math:: \frac{\lVert S - \hat S \rVert_F}{\lVert S \rVert_F}
          + \frac1N \lVert \log S - \log \hat S \rVert_1
          + \frac wN \lVert \log M - \log \hat M \rVert_1,

averaged over resolutions. Bands are what is heard: without their weight w the many bins of high
frequencies, which nobody tells apart, have most of the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from gendiff_speech.mel import MelConvention, filters

# The transform's length in those of the mel's, and its hop in its own.
RESOLUTIONS = ((0.5, 0.125), (1.0, 0.25), (2.0, 0.25))
MEL_WEIGHT = 3.0


@lru_cache
def _window(length: int, device: torch.device) -> Tensor:
    return torch.hann_window(length, device=device)


def magnitudes(wave: Tensor, n_fft: int, hop: int, floor: float) -> Tensor:
    """STFT magnitudes (B, n_fft / 2 + 1, frames) of waves (B, T), without padding."""
    window = _window(n_fft, wave.device)
    out = torch.stft(wave, n_fft, hop, n_fft, window, center=False, return_complex=True)
    # The modulus has no gradient at 0.
    return (out.real.square() + out.imag.square() + floor**2).sqrt()


def spectral_distance(x_hat: Tensor, x: Tensor, convention: MelConvention, scale: float) -> Tensor:
    """The distance of estimated waves from the true ones, (B,).

    Args:
        x_hat, x: Waves (B, T) in units of ``scale``.
        convention: The mel's, whose n_fft gives the resolutions.
        scale: What the waves are divided by.
    """
    total = x.new_zeros(len(x))
    for length, hop in RESOLUTIONS:
        n_fft, mels = round(length * convention.n_fft), round(length * convention.mels)
        bank = filters(replace(convention, n_fft=n_fft, mels=mels)).T.to(x)
        s_hat, s = (
            magnitudes(v * scale, n_fft, round(hop * n_fft), floor=1e-3) for v in (x_hat, x)
        )
        mel_hat, mel = ((bank @ v).clamp(min=convention.floor) for v in (s_hat, s))
        convergence = (s - s_hat).norm(dim=(1, 2)) / s.norm(dim=(1, 2))
        total = total + convergence + _log_distance(s_hat, s)
        total = total + MEL_WEIGHT * _log_distance(mel_hat, mel)
    return total / len(RESOLUTIONS)


def _log_distance(a: Tensor, b: Tensor) -> Tensor:
    return (a.log() - b.log()).abs().mean((1, 2))
