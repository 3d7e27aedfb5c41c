"""HiFi-GAN's generator, for weights that were trained elsewhere.

Kong et al., 2020 (https://arxiv.org/abs/2010.05646, section 2.2 and appendix A): transposed
convolutions bring a mel to the rate of the wave, each followed by the mean of residual blocks of
several kernel sizes and dilations. Parameters bear the published names (jik876/hifi-gan), with the
weight normalization already multiplied out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1  # of the leaky ReLUs, but for PyTorch's 0.01 in the last


@dataclass(frozen=True)
class HiFiGANShape:
    """The published configuration's keys that shape the generator, by their names."""

    num_mels: int
    resblock: str
    upsample_rates: Sequence[int]
    upsample_kernel_sizes: Sequence[int]
    upsample_initial_channel: int
    resblock_kernel_sizes: Sequence[int]
    resblock_dilation_sizes: Sequence[Sequence[int]]


def _conv(channels: int, kernel: int, dilation: int) -> nn.Conv1d:
    pad = dilation * (kernel - 1) // 2
    return nn.Conv1d(channels, channels, kernel, padding=pad, dilation=dilation)


class ResBlock1(nn.Module):
    """Pairs of convolutions, a dilated one and a plain one, each pair around a residual."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_conv(channels, kernel, d) for d in dilations)
        self.convs2 = nn.ModuleList(_conv(channels, kernel, 1) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class ResBlock2(nn.Module):
    """Single dilated convolutions, each around a residual (the small V3)."""

    def __init__(self, channels: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(channels, kernel, d) for d in dilations)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(F.leaky_relu(x, SLOPE))
        return x


class HiFiGAN(nn.Module):
    """Log mels (B, mels, T) to waves (B, T * product of the rates)."""

    def __init__(self, shape: HiFiGANShape) -> None:
        super().__init__()
        block = {"1": ResBlock1, "2": ResBlock2}[shape.resblock]
        channels = shape.upsample_initial_channel
        self.kernels = len(shape.resblock_kernel_sizes)
        self.conv_pre = nn.Conv1d(shape.num_mels, channels, 7, padding=3)
        self.ups = nn.ModuleList()
        self.resblocks = nn.ModuleList()
        for rate, kernel in zip(shape.upsample_rates, shape.upsample_kernel_sizes, strict=True):
            half, pad = channels // 2, (kernel - rate) // 2
            self.ups.append(nn.ConvTranspose1d(channels, half, kernel, rate, padding=pad))
            for size, dilations in zip(
                shape.resblock_kernel_sizes, shape.resblock_dilation_sizes, strict=True
            ):
                self.resblocks.append(block(half, size, dilations))
            channels = half
        self.conv_post = nn.Conv1d(channels, 1, 7, padding=3)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, SLOPE))
            blocks = self.resblocks[i * self.kernels : (i + 1) * self.kernels]
            x = torch.stack([block(x) for block in blocks]).mean(0)
        out: Tensor = self.conv_post(F.leaky_relu(x)).tanh()
        return out[:, 0]


def without_weight_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    r"""Multiplies weight normalization out: :math:`w = g\, v / \lVert v \rVert`.

    Salimans & Kingma, 2016 (https://arxiv.org/abs/1602.07868, eq. 2), under both of PyTorch's
    names: ``weight_g``, ``weight_v`` and ``parametrizations.weight.original0``, ``original1``.
    The norm is over all axes but the first.
    """
    plain = dict(weights)
    for g, v in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        for key, value in weights.items():
            stem = key.removesuffix(v)
            if key.endswith(v) and stem + g in plain:
                norm = value.flatten(1).norm(dim=1).reshape(-1, *[1] * (value.ndim - 1))
                plain[stem + "weight"] = plain.pop(stem + g) * plain.pop(key) / norm
    return plain
