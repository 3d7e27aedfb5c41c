r"""A mel denoiser of gated residual convolutions, as in Diff-TTS, on frames that know their text.

Each frame sees the token that is spoken there, how far into the token it is, the speaker and the
noise level. A block is

    h <- (h + c * dilated_conv([h + noise], conditions) gated)  with  gate = tanh(a) * sigmoid(b)

(Jeong et al., 2021, https://arxiv.org/abs/2104.01409, figure 2; the block is WaveNet's, van den
Oord et al., 2016). The skips of all blocks add to the output. Padding is zero before every
convolution, so it changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.spaces import Cond, Space


def fourier(value: Tensor, width: int, top: float) -> Tensor:
    """Sines and cosines of a number, (\\*, width), at frequencies from 1 to ``top``."""
    steps = torch.linspace(0, math.log(top), width // 2, device=value.device)
    angles = value[..., None] * steps.exp()
    return torch.cat([angles.sin(), angles.cos()], -1)


def token_of_frame(durations: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Which token a frame belongs to, and how far into it the frame is.

    Args:
        durations: (B, L) int64 frames, zero where there is no token.
        frames: T.

    Returns:
        The token's place (B, T), at most L - 1, and the position in [0, 1), (B, T).
    """
    ends = durations.cumsum(1)  # (B, L)
    frame = torch.arange(frames, device=durations.device).expand(len(durations), -1).contiguous()
    place = torch.searchsorted(ends, frame, right=True).clamp(max=durations.shape[1] - 1)
    lasts = durations.gather(1, place)
    begin = ends.gather(1, place) - lasts
    return place, ((frame - begin + 0.5) / lasts.clamp(min=1)).clamp(0, 1)


class Block(nn.Module):
    """A gated dilated convolution with a residual and a skip output."""

    def __init__(self, channels: int, cond: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.noise = nn.Linear(channels, channels)
        self.conv = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.cond = nn.Conv1d(cond, 2 * channels, 1)
        self.out = nn.Conv1d(channels, 2 * channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, h: Tensor, noise: Tensor, cond: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = self.dropout(h + self.noise(noise)[..., None]) * mask
        a, b = (self.conv(y) + self.cond(cond)).chunk(2, 1)
        residual, skip = self.out(a.tanh() * b.sigmoid()).chunk(2, 1)
        return (h + residual) / math.sqrt(2), skip


class MelNet(nn.Module):
    """The network; see the module.

    Args:
        mels: Bands of the mel-spectrogram.
        tokens: Size of the alphabet; token 0 stands for none.
        speakers: How many there are.
        channels: Width.
        blocks: How many residual blocks.
        dilations: Of the blocks, gone round.
        dropout: Before each convolution.
    """

    def __init__(
        self,
        mels: int,
        tokens: int,
        speakers: int,
        channels: int,
        blocks: int,
        dilations: Sequence[int],
        dropout: float,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.token = nn.Embedding(tokens, channels)
        self.speaker = nn.Embedding(speakers + 1, channels)  # the last: none is told
        self.place = nn.Linear(16, channels)
        self.text = nn.Conv1d(channels, channels, 5, padding=2)
        self.noise = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()
        )
        self.first = nn.Conv1d(mels, channels, 1)
        self.blocks = nn.ModuleList(
            Block(channels, channels, dilations[i % len(dilations)], dropout)
            for i in range(blocks)
        )
        self.middle = nn.Conv1d(channels, channels, 1)
        self.last = nn.Conv1d(channels, mels, 1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def conditions(self, cond: Cond, frames: int, mask: Tensor) -> Tensor:
        """What each frame knows of text and speaker, (B, channels, T)."""
        tokens, durations, speaker = cond["tokens"], cond["durations"], cond["speaker"]
        if cond.dropped is not None:
            tokens = tokens.masked_fill(cond.dropped[:, None], 0)
            speaker = speaker.masked_fill(cond.dropped, self.speaker.num_embeddings - 1)
        place, position = token_of_frame(durations, frames)
        spoken = tokens.gather(1, place)
        position = torch.where(spoken > 0, position, 0.5)
        token = self.token(spoken)
        h = token + self.place(fourier(math.pi * position, 16, 16.0).to(token))
        h = (h + self.speaker(speaker)[:, None]).transpose(1, 2)
        return F.silu(self.text(h * mask)) + h

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        mask = space.project(torch.ones_like(x[:1, :1]).expand(len(x), x.shape[1], -1))[:, :1]
        assert cond is not None
        level = self.noise(fourier(noise, self.channels, 100.0))
        known = self.conditions(cond, x.shape[2], mask)
        h = F.silu(self.first(x))
        total = torch.zeros_like(h)
        for block in self.blocks:
            h, skip = block(h, level, known, mask)
            total = total + skip
        out = F.silu(self.middle(total / math.sqrt(len(self.blocks))))
        return self.last(out) * mask
