r"""Distances of waves by their spectrograms, as losses.

The multi-resolution STFT loss (Yamamoto et al., 2020, https://arxiv.org/abs/1910.11480, eq. 5 to
7): for magnitudes S and :math:`\hat S` of each resolution

.. math:: \frac{\lVert S - \hat S \rVert_F}{\lVert S \rVert_F}
          + \frac1N \lVert \log S - \log \hat S \rVert_1,

averaged over resolutions; and the L1 distance of log mels (Kong et al., 2020,
https://arxiv.org/abs/2010.05646, eq. 5).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from gendiff_speech.mel import MelConvention, filters

# The transform's length in those of the mel's, and its hop in its own.
RESOLUTIONS = ((0.5, 0.125), (1.0, 0.25), (2.0, 0.25))


@lru_cache
def _window(length: int, device: torch.device) -> Tensor:
    return torch.hann_window(length, device=device)


def magnitudes(wave: Tensor, n_fft: int, hop: int, floor: float) -> Tensor:
    """STFT magnitudes (B, n_fft / 2 + 1, frames) of waves (B, T), without padding."""
    window = _window(n_fft, wave.device)
    out = torch.stft(wave, n_fft, hop, n_fft, window, center=False, return_complex=True)
    power = torch.view_as_real(out).square().sum(-1)  # the modulus has no gradient at 0
    return (power + floor**2).sqrt()


def spectral_distance(x_hat: Tensor, x: Tensor, convention: MelConvention, scale: float) -> Tensor:
    """The distance of estimated waves from the true ones, (B,).

    Args:
        x_hat, x: Waves (B, T) in units of ``scale``.
        convention: The mel's, whose n_fft gives the resolutions.
        scale: What the waves are divided by.
    """
    total = x.new_zeros(len(x))
    bank = filters(convention).to(x)
    for length, hop in RESOLUTIONS:
        n_fft = round(length * convention.n_fft)
        s_hat, s = (
            magnitudes(v * scale, n_fft, round(hop * n_fft), floor=1e-3) for v in (x_hat, x)
        )
        convergence = (s - s_hat).norm(dim=(1, 2)) / s.norm(dim=(1, 2))
        total = total + convergence + (s.log() - s_hat.log()).abs().mean((1, 2))
        if n_fft == convention.n_fft:
            mel_hat, mel = ((bank.T @ v).clamp(min=convention.floor).log() for v in (s_hat, s))
            total = total + (mel - mel_hat).abs().mean((1, 2))
    return total / len(RESOLUTIONS)
