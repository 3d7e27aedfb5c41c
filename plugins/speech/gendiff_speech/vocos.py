r"""Vocos: ConvNeXt blocks on frames, and the wave by an inverse Fourier transform.

Siuzdak, 2023 (https://arxiv.org/abs/2306.00814): no upsampling layers; every layer works at the
rate of the frames, the head puts out the magnitude m and the phase p of each bin of a frame, and

.. math:: x = ISTFT(m\, (\cos p + i \sin p)).

The blocks are those of Liu et al., 2022 (https://arxiv.org/abs/2201.03545), in one dimension.
Parameters bear the published names (charactr/vocos-mel-24khz), so that such weights load.
Padded frames are zero before every convolution: padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.spaces import Cond, Space
from gendiff_speech.mel import MelConvention, spread


class ConvNeXtBlock(nn.Module):
    """A residual block: depthwise convolution of 7 frames, LayerNorm, two layers with GELU."""

    def __init__(self, dim: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = nn.Parameter(scale * torch.ones(dim))

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(self.dwconv(h * mask).transpose(1, 2))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return h + y.transpose(1, 2)


class VocosBackbone(nn.Module):
    """Features (B, channels, T) to (B, T, dim)."""

    def __init__(self, channels: int, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Conv1d(channels, dim, 7, padding=3)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.convnext = nn.ModuleList(
            ConvNeXtBlock(dim, hidden, 1 / layers) for _ in range(layers)
        )
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Conv1d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``mask`` (B, 1, T) is 1 at live frames."""
        h = self.norm(self.embed(x * mask).transpose(1, 2)).transpose(1, 2)
        for block in self.convnext:
            h = block(h, mask)
        out: Tensor = self.final_layer_norm(h.transpose(1, 2))
        return out


class ISTFT(nn.Module):
    """The wave of a spectrogram.

    Args:
        n_fft, hop, window: In samples.
        pad: By how many samples the frames stick out of the wave on both sides: n_fft / 2 if
            they are centred, (n_fft - hop) / 2 if they are aligned as HiFi-GAN's mels.
    """

    window: Tensor

    def __init__(self, n_fft: int, hop: int, window: int, pad: int) -> None:
        super().__init__()
        self.n_fft, self.hop, self.pad = n_fft, hop, pad
        self.register_buffer("window", torch.hann_window(window))

    def forward(self, spectrum: Tensor, mask: Tensor) -> Tensor:
        """The wave (B, (T - 1) * hop + n_fft - 2 pad) of a complex spectrogram (B, bins, T).

        Windowed overlap-add of the live frames, divided by the sum of their squared windows.
        """
        blank = (self.n_fft - len(self.window)) // 2
        window = F.pad(self.window, (blank, blank))[:, None]
        frames = torch.fft.irfft(spectrum, self.n_fft, dim=1) * window * mask
        wave = self._overlap_add(frames)
        weight = self._overlap_add(window.square() * mask.expand(len(spectrum), 1, -1))
        return wave / weight.clamp(min=1e-8)

    def _overlap_add(self, frames: Tensor) -> Tensor:
        count = frames.shape[2]
        size = (count - 1) * self.hop + self.n_fft
        out = F.fold(frames, (1, size), kernel_size=(1, self.n_fft), stride=(1, self.hop))
        return out[:, 0, 0, self.pad : size - self.pad]


class ISTFTHead(nn.Module):
    """Magnitude and phase of every bin from a frame's features, and the wave of them."""

    def __init__(self, dim: int, n_fft: int, hop: int, window: int, pad: int) -> None:
        super().__init__()
        self.out = nn.Linear(dim, n_fft + 2)
        self.istft = ISTFT(n_fft, hop, window, pad)

    def spectrum(self, h: Tensor) -> Tensor:
        """The complex spectrogram (B, n_fft / 2 + 1, T); no magnitude exceeds 100."""
        magnitude, phase = self.out(h).float().transpose(1, 2).chunk(2, 1)
        return torch.polar(magnitude.exp().clamp(max=1e2), phase)


class Vocos(nn.Module):
    """The published network, for weights that were trained elsewhere.

    Args:
        mels: Bands of the mel.
        dim, hidden, layers: Of the backbone.
        n_fft, hop: Of the head, in samples.
        centred: Whether its frames are centred at multiples of the hop (``padding: center``).
    """

    def __init__(
        self, mels: int, dim: int, hidden: int, layers: int, n_fft: int, hop: int, centred: bool
    ) -> None:
        super().__init__()
        self.backbone = VocosBackbone(mels, dim, hidden, layers)
        self.centred = centred
        pad = n_fft // 2 if centred else (n_fft - hop) // 2
        self.head = ISTFTHead(dim, n_fft, hop, n_fft, pad)

    def forward(self, mel: Tensor) -> Tensor:
        """Log mels (B, mels, T) to waves (B, T * hop)."""
        if self.centred:  # T centred frames span T - 1 hops
            mel = F.pad(mel, (0, 1), mode="replicate")
        mask = torch.ones_like(mel[:, :1])
        wave: Tensor = self.head.istft(self.head.spectrum(self.backbone(mel, mask)), mask)
        return wave


class OneStepVocos(nn.Module):
    r"""Vocos as the backbone of a denoiser whose only step is from pure noise.

    There x_t says nothing of x, and what it puts out is a function of the mel alone: a wave, in
    frames. What is known of the wave need not be learnt: the head's magnitudes are factors of
    those that the mel tells, and bin k of frame t has the phase :math:`2 \pi k t\, hop / n_{fft}`
    of a steady tone in its middle beside what the head puts out.

    Args:
        convention: Of the mels.
        mean, std: What normalised each of its bands.
        scale: What the waves are divided by.
        dim, hidden, layers: Of the backbone.
    """

    spread: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        convention: MelConvention,
        mean: Sequence[float],
        std: Sequence[float],
        scale: float,
        dim: int,
        hidden: int,
        layers: int,
    ) -> None:
        super().__init__()
        c = convention
        self.register_buffer("spread", spread(c) / scale)
        self.register_buffer("mean", torch.tensor(mean)[:, None])
        self.register_buffer("std", torch.tensor(std)[:, None])
        self.backbone = VocosBackbone(c.mels, dim, hidden, layers)
        pad = (c.n_fft - c.hop) // 2  # the wave has T * hop samples, whatever the mel's frames
        self.head = ISTFTHead(dim, c.n_fft, c.hop, c.window, pad)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        assert cond is not None
        mask = space.project(torch.ones_like(x))[:, :1]
        mel = cond["mel"].transpose(1, 2)
        if cond.dropped is not None:
            mel = mel.masked_fill(cond.dropped[:, None, None], 0)
        told = self.spread @ (mel * self.std + self.mean).float().exp()
        spectrum = told * self._steady(mel.shape[2]) * self.head.spectrum(self.backbone(mel, mask))
        wave = self.head.istft(spectrum, mask)
        return space.project(wave.unflatten(1, (x.shape[2], -1)).transpose(1, 2))

    def _steady(self, frames: int) -> Tensor:
        """exp(2 pi i k t hop / n_fft), (n_fft / 2 + 1, T)."""
        istft, device = self.head.istft, self.spread.device
        bins = torch.arange(len(self.spread), device=device)[:, None]
        turn = bins * torch.arange(frames, device=device) * istft.hop % istft.n_fft
        angle = turn * (2 * torch.pi / istft.n_fft)
        return torch.polar(torch.ones_like(angle), angle)
