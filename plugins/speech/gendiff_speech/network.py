r"""Mel denoisers on frames that know their text.

Each frame is told the token that is spoken there, how far into the token it is, the speaker and
the noise level (:class:`Told`). What makes a mel of that is one of two networks.

:class:`MelNet`, the default. Its blocks are those of diffusion U-Nets (Dhariwal & Nichol, 2021,
https://arxiv.org/abs/2105.05233, appendix A) without its levels: dilation widens what a frame
sees. After each round of dilations all frames attend to all (Vaswani et al., 2017,
https://arxiv.org/abs/1706.03762), as a voice keeps its pitch from one end to the other. To the
blocks a frame's bands are channels, whose neighbourhood they would have to learn. At low noise it
is all that matters: a linear filter of 5 bands by 5 frames denoises better there than blocks do
after minutes of training. :class:`Fine` adds what such filters see, and the harmonics some bands
away.

:class:`DiffTTS`, the decoder of Diff-TTS (Jeong et al., 2021, https://arxiv.org/abs/2104.01409).

Normalization is over the channels of each frame, padding is zero before every convolution and not
attended to, so that padding changes nothing.
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


class Attention(nn.Module):
    """Frames look at all frames of their sample, and add what they find."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, 4)
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(h.transpose(1, 2))).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, width)
        found = F.scaled_dot_product_attention(q, k, v, mask[:, None] > 0)
        return h + self.out(found.transpose(1, 2).flatten(2)).transpose(1, 2)


class Fine(nn.Module):
    """What bands and frames nearby say of each value.

    Convolutions over (bands, T). They see the noisy mel and four maps drawn from the blocks'
    features; noise scales and shifts after each but the last. Two are dilated, and reach 8 bands
    to either side: at 22.05 kHz low bands are 37 Hz apart, the harmonics of a voice 80 to 300.
    """

    WIDTH, DILATIONS = 16, ((2, 1), (4, 2))  # over bands, over frames

    def __init__(self, mels: int, channels: int) -> None:
        super().__init__()
        width = self.WIDTH
        self.maps = nn.Conv1d(channels, 4 * mels, 1)
        self.noise = nn.Linear(channels, 2 * width * (1 + len(self.DILATIONS)))
        self.first = nn.Conv2d(1 + 4, width, 5, padding=2)
        self.wider = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in self.DILATIONS
        )
        self.last = nn.Conv2d(width, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, h: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
        mask = mask[:, None]
        maps = self.maps(h).unflatten(1, (4, x.shape[1]))
        levels = self.noise(noise)[..., None, None].chunk(1 + len(self.wider), 1)
        y = self._at(levels[0], self.first(torch.cat([x[:, None], maps], 1) * mask)) * mask
        for conv, level in zip(self.wider, levels[1:], strict=True):
            y = y + self._at(level, conv(y)) * mask
        found: Tensor = self.last(y)[:, 0]
        return found

    @staticmethod
    def _at(level: Tensor, y: Tensor) -> Tensor:
        scale, shift = level.chunk(2, 1)
        return F.silu(y * (1 + scale) + shift)


class Told(nn.Module):
    """What frames are told; the networks begin with it.

    Args:
        tokens: Size of the alphabet; token 0 stands for none.
        speakers: How many there are.
        channels: Width.
    """

    def __init__(self, tokens: int, speakers: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.token = nn.Embedding(tokens, channels)
        self.speaker = nn.Embedding(speakers + 1, channels)  # the last: none is told
        self.place = nn.Linear(16, channels)
        self.text = nn.Conv1d(channels, channels, 5, padding=2)
        self.noise = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()
        )

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

    def known(
        self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The noise level (B, channels), each frame's conditions and the mask (B, 1, T)."""
        assert cond is not None
        mask = space.project(torch.ones_like(x[:1, :1]).expand(len(x), x.shape[1], -1))[:, :1]
        level = self.noise(fourier(noise, self.channels, 100.0))
        return level, self.conditions(cond, x.shape[2], mask), mask


class MelNet(Told):
    """The default network; see the module.

    Args:
        mels: Bands of the mel-spectrogram.
        tokens, speakers, channels: See :class:`Told`.
        blocks: How many residual blocks.
        dilations: Of the blocks, gone round; after each round frames attend to each other.
        dropout: Before each block's last convolution.
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
        super().__init__(tokens, speakers, channels)
        self.first = nn.Conv1d(mels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            Block(channels, dilations[i % len(dilations)], dropout) for i in range(blocks)
        )
        self.round = len(dilations)
        self.attention = nn.ModuleList(Attention(channels) for _ in range(blocks // self.round))
        self.norm = nn.LayerNorm(channels)
        self.last = nn.Conv1d(channels, mels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)
        self.fine = Fine(mels, channels)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        level, known, mask = self.known(x, noise, cond, space)
        h = self.first(x) + known
        for i, block in enumerate(self.blocks, 1):
            h = block(h, level, known, mask)
            if i % self.round == 0:
                h = self.attention[i // self.round - 1](h, mask)
        h = F.silu(self.norm(h.transpose(1, 2)).transpose(1, 2)) * mask
        return (self.last(h) + self.fine(x, h, level, mask)) * mask


class Gated(nn.Module):
    """A block of WaveNet as diffusion has it (Kong et al., 2021, https://arxiv.org/abs/2009.09761).

    Returns:
        What the next block sees, and what goes to the end.
    """

    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.noise = nn.Linear(channels, channels)
        self.cond = nn.Conv1d(channels, 2 * channels, 1)
        self.conv = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv1d(channels, 2 * channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, h: Tensor, noise: Tensor, cond: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        y = self.conv(self.dropout(h + self.noise(noise)[..., None]) * mask) + self.cond(cond)
        value, gate = y.chunk(2, 1)
        on, end = self.out(value.tanh() * gate.sigmoid()).chunk(2, 1)
        return (h + on) / math.sqrt(2), end


class DiffTTS(Told):
    """Diff-TTS's decoder: gated blocks whose second outputs are summed. As :class:`MelNet`."""

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
        super().__init__(tokens, speakers, channels)
        self.first = nn.Conv1d(mels, channels, 1)
        self.blocks = nn.ModuleList(
            Gated(channels, dilations[i % len(dilations)], dropout) for i in range(blocks)
        )
        self.end = nn.Conv1d(channels, channels, 1)
        self.last = nn.Conv1d(channels, mels, 1)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        level, known, mask = self.known(x, noise, cond, space)
        h = F.relu(self.first(x))
        total = torch.zeros_like(h)
        for block in self.blocks:
            h, end = block(h, level, known, mask)
            total = total + end
        return self.last(F.relu(self.end(total / math.sqrt(len(self.blocks))))) * mask
