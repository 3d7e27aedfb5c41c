r"""A mel denoiser: a residual convolutional network on frames that know their text.

Each frame sees the token that is spoken there, how far into the token it is, the speaker and the
noise level. The blocks are those of diffusion U-Nets (Dhariwal & Nichol, 2021,
https://arxiv.org/abs/2105.05233, appendix A) without its levels: dilation widens what a frame
sees, as in Diff-TTS (Jeong et al., 2021, https://arxiv.org/abs/2104.01409). Its normalization is
over the channels of each frame and padding is zero before every convolution, so that padding
changes nothing.

To the blocks a frame's bands are channels, whose neighbourhood they would have to learn. At low
noise it is all that matters: a linear filter of 5 bands by 5 frames denoises better there than
blocks do after minutes of training. :class:`Fine` adds what such filters see.
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
    """Two convolutions on normalized frames; noise and text scale and shift between them."""

    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.noise = nn.Linear(channels, 2 * channels)
        self.cond = nn.Conv1d(channels, channels, 1)
        self.conv1 = nn.Conv1d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h: Tensor, noise: Tensor, cond: Tensor, mask: Tensor) -> Tensor:
        scale, shift = self.noise(noise)[..., None].chunk(2, 1)
        y = self.conv1(F.silu(self._norm(0, h)) * mask) + self.cond(cond)
        y = F.silu(self._norm(1, y) * (1 + scale) + shift)
        return h + self.conv2(self.dropout(y) * mask)

    def _norm(self, which: int, h: Tensor) -> Tensor:
        return self.norms[which](h.transpose(1, 2)).transpose(1, 2)


class Fine(nn.Module):
    """What bands and frames nearby say of each value.

    Two convolutions over (bands, T), 5 by 5 and 3 by 3. They see the noisy mel and four maps
    drawn from the blocks' features; noise scales and shifts between them.
    """

    def __init__(self, mels: int, channels: int) -> None:
        super().__init__()
        self.maps = nn.Conv1d(channels, 4 * mels, 1)
        self.noise = nn.Linear(channels, 2 * 16)
        self.conv1 = nn.Conv2d(1 + 4, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 1, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        assert self.conv2.bias is not None
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, h: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
        maps = self.maps(h).unflatten(1, (4, x.shape[1]))
        scale, shift = self.noise(noise)[..., None, None].chunk(2, 1)
        y = self.conv1(torch.cat([x[:, None], maps], 1) * mask[:, None])
        y = F.silu(y * (1 + scale) + shift) * mask[:, None]
        found: Tensor = self.conv2(y)[:, 0]
        return found


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
        self.first = nn.Conv1d(mels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(channels, dilations[i % len(dilations)], dropout) for i in range(blocks)
        )
        self.norm = nn.LayerNorm(channels)
        self.last = nn.Conv1d(channels, mels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)
        self.fine = Fine(mels, channels)

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
        h = self.first(x) + known
        for block in self.blocks:
            h = block(h, level, known, mask)
        h = F.silu(self.norm(h.transpose(1, 2)).transpose(1, 2)) * mask
        return (self.last(h) + self.fine(x, h, level, mask)) * mask
