"""Brings a wave nearer to a mel-spectrogram: a few rounds of Griffin-Lim that begin at the wave.

A vocoder is told the mel, and yet what it makes has another. Its magnitudes are corrected until
their bands are the mel's, and its phases then follow from the overlap of the frames, in far fewer
rounds than from random ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gendiff_speech.mel import MelConvention, closer, filters
from gendiff_speech.vocos import ISTFT

ROUNDS = 16
MOMENTUM = 0.99 / 1.99  # as torchaudio's Griffin-Lim has it by default


def refined(wave: Tensor, mel: Tensor, convention: MelConvention) -> Tensor:
    """The wave (T * hop,), in [-1, 1], nearer to a log mel (mels, T) than it was."""
    c = convention
    window = torch.hann_window(c.window)
    inverse = ISTFT(c.n_fft, c.hop, c.window, c.pad)
    if c.centred:  # T centred frames span T - 1 hops
        mel = F.pad(mel, (0, 1), mode="replicate")
    mask = torch.ones(1, 1, mel.shape[1])

    def frames(wave: Tensor) -> Tensor:
        padded = F.pad(wave, (c.pad, c.pad))
        return torch.stft(
            padded, c.n_fft, c.hop, c.window, window, center=False, return_complex=True
        )

    def sound(spectrum: Tensor) -> Tensor:
        phases = spectrum / spectrum.abs().clamp(min=1e-9)
        made: Tensor = inverse((magnitude * phases)[None], mask)[0]
        return made

    spectrum, bank = frames(wave), filters(c)
    magnitude = closer(spectrum.abs().clamp(min=1e-8), mel.exp(), bank, updates=10)
    before = None
    for _ in range(ROUNDS):
        now = frames(sound(spectrum))
        spectrum = now if before is None else now + MOMENTUM * (now - before)
        before = now
    return sound(spectrum)
