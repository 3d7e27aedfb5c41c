"""Which mel network is best for its cost: the default beside four designs of the field.

All know of text and speaker what the default's network knows of them; what follows is

- *unet2d*: a U-Net over (bands, frames) with linear attention, after Grad-TTS's decoder (Popov et
  al., 2021, https://arxiv.org/abs/2105.06337);
- *unet1d*: a U-Net over frames, each level with a residual and a transformer block, after
  Matcha-TTS's (Mehta et al., 2024, https://arxiv.org/abs/2309.03199);
- *dit*: transformer blocks whose norms the noise level scales and shifts, with rotary positions,
  after F5-TTS's (Chen et al., 2024, https://arxiv.org/abs/2410.06885);
- *diff_tts*: gated blocks, ``speech.network=diff_tts``;

the first three written here for this comparison, all of about the default's parameters.
*unet1d_fine* and *dit_fine* also have the default's convolutions over bands and frames;
*no_attention* is the default without attention. Each is trained on the embedded digits for the
same CPU-seconds of one thread, at each learning rate, and judged.

    python benchmarks/speech_networks.py --seconds 150 --count 100
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recipe import row
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff import plugins
from gendiff_speech.network import DiffTTS, Fine, MelNet, Told

FIGURES = (
    "label_accuracy", "frechet_distance", "mel_cepstral_distortion", "f0_rmse", "voicing_error",
)  # fmt: skip


class Rival(Told):
    """The default network's knowledge of text, speaker and noise, with another trunk."""

    end: nn.Module  # of what the trunk finds, (B, channels, T)

    def __init__(self, facts: Any, channels: int, fine: bool = False) -> None:
        super().__init__(len(facts["tokens"]), len(facts["speakers"]), channels)
        self.fine = Fine(facts["mels"], channels) if fine else None

    def forward(self, x: Tensor, noise: Tensor, cond: Any, space: Any) -> Tensor:
        frames, fill = x.shape[2], -x.shape[2] % 4  # two levels halve the frames
        level, known, mask = self.known(x, noise, cond, space)
        filled = (F.pad(part, (0, fill)) for part in (known, mask))
        h = self.trunk(F.pad(x, (0, fill)), level, *filled)[..., :frames]
        found = self.end(h)
        if self.fine is not None:
            found = found + self.fine(x, h, level, mask)
        return found * mask

    def trunk(self, x: Tensor, level: Tensor, known: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError


class Residual(nn.Module):
    """Convolution, group norm and SiLU, twice; the noise level is added between them."""

    def __init__(self, conv: Callable[..., nn.Module], level: int, inside: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(inside, out, 3, padding=1), conv(out, out, 3, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, out), nn.GroupNorm(8, out)
        self.level = nn.Linear(level, out)
        self.skip = conv(inside, out, 1) if inside != out else nn.Identity()

    def forward(self, h: Tensor, level: Tensor, mask: Tensor) -> Tensor:
        y = F.silu(self.norm1(self.conv1(h * mask))) * mask
        y = y + self.level(level).unflatten(-1, (-1, *[1] * (h.ndim - 2)))
        y = F.silu(self.norm2(self.conv2(y * mask)))
        return (y + self.skip(h)) * mask


class LinearAttention(nn.Module):
    """Attention over all bands and frames at a cost linear in them."""

    def __init__(self, channels: int, heads: int = 4, width: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Conv2d(channels, 3 * heads * width, 1, bias=False)
        self.out = nn.Conv2d(heads * width, channels, 1)

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(h).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        context = k.softmax(-1) @ v.transpose(-1, -2)
        found = context.transpose(-1, -2) @ q
        return h + self.out(found.flatten(1, 2).unflatten(-1, h.shape[2:]))


class UNet2d(Rival):
    """Three levels over (bands, frames)."""

    def __init__(self, facts: Any, width: int) -> None:
        super().__init__(facts, 128)
        sizes = [width, 2 * width, 4 * width]
        self.spread = nn.Conv1d(128, 2 * facts["mels"], 1)
        ins = [3, *sizes[:-1]]
        self.downs = nn.ModuleList(
            nn.ModuleList([self._res(i, o), self._res(o, o), LinearAttention(o)])
            for i, o in zip(ins, sizes, strict=True)
        )
        self.halves = nn.ModuleList(nn.Conv2d(s, s, 3, 2, 1) for s in sizes[:-1])
        last = sizes[-1]
        self.mid = nn.ModuleList([self._res(last, last), LinearAttention(last)])
        self.ups = nn.ModuleList(
            nn.ModuleList([self._res(2 * o, i), self._res(i, i), LinearAttention(i)])
            for i, o in zip(sizes[1::-1], sizes[:0:-1], strict=True)
        )
        self.doubles = nn.ModuleList(nn.ConvTranspose2d(s, s, 4, 2, 1) for s in sizes[1::-1])
        self.last = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.last.weight)
        self.end = nn.Identity()

    def _res(self, inside: int, out: int) -> Residual:
        return Residual(nn.Conv2d, 128, inside, out)

    def trunk(self, x: Tensor, level: Tensor, known: Tensor, mask: Tensor) -> Tensor:
        maps = self.spread(known).unflatten(1, (2, x.shape[1]))
        h, masks, kept = torch.cat([x[:, None], maps], 1), [mask[:, None]], []
        for number, (one, two, attention) in enumerate(self.downs):
            h = attention(two(one(h, level, masks[-1]), level, masks[-1]))
            kept.append(h)
            if number < len(self.halves):
                h = self.halves[number](h * masks[-1])
                masks.append(masks[-1][..., ::2])
        one, attention = self.mid
        h = attention(one(h, level, masks[-1]))
        for (one, two, attention), double in zip(self.ups, self.doubles, strict=True):
            h = torch.cat([h, kept.pop()], 1)
            h = attention(two(one(h, level, masks[-1]), level, masks[-1]))
            h = double(h * masks.pop())
        return self.last(h * masks[-1])[:, 0]


def attend(qkv: Tensor, heads: int, mask: Tensor, turn: Tensor | None = None) -> Tensor:
    """Self-attention of frames (B, T, 3 C) among those of the mask (B, 1, T)."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    if turn is not None:
        q, k = (rotated(part, turn) for part in (q, k))
    found = F.scaled_dot_product_attention(q, k, v, mask[:, None] > 0)
    return found.transpose(1, 2).flatten(2)


def rotated(part: Tensor, turn: Tensor) -> Tensor:
    """Each pair of channels turned by its angle, (B, heads, T, C) by (T, C / 2)."""
    a, b = part.chunk(2, -1)
    return torch.cat([a * turn.cos() - b * turn.sin(), a * turn.sin() + b * turn.cos()], -1)


class Transformer(nn.Module):
    """Attention and two layers, each on normalized frames."""

    def __init__(self, channels: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.feed = nn.Sequential(
            nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        h = h.transpose(1, 2)
        h = h + self.out(attend(self.qkv(self.norm1(h)), self.heads, mask))
        return (h + self.feed(self.norm2(h))).transpose(1, 2) * mask


class UNet1d(Rival):
    """Two levels over frames."""

    def __init__(self, facts: Any, width: int, fine: bool = False) -> None:
        super().__init__(facts, width, fine)
        self.begin = nn.Conv1d(facts["mels"] + width, width, 1)
        self.downs = nn.ModuleList(self._level(width) for _ in range(2))
        self.mids = nn.ModuleList(self._level(width) for _ in range(1))
        self.ups = nn.ModuleList(self._level(2 * width) for _ in range(2))
        self.coarser = nn.Conv1d(width, width, 3, 2, 1)
        self.finer = nn.ConvTranspose1d(width, width, 4, 2, 1)
        self.end = nn.Conv1d(width, facts["mels"], 1)
        nn.init.zeros_(self.end.weight)

    def _level(self, inside: int) -> nn.ModuleList:
        width = self.channels
        return nn.ModuleList([Residual(nn.Conv1d, width, inside, width), Transformer(width)])

    def trunk(self, x: Tensor, level: Tensor, known: Tensor, mask: Tensor) -> Tensor:
        h, coarse = self.begin(torch.cat([x, known], 1)) * mask, mask[..., ::2]
        residual, transformer = self.downs[0]
        fine = h = transformer(residual(h, level, mask), mask)
        residual, transformer = self.downs[1]
        kept = h = transformer(residual(self.coarser(h), level, coarse), coarse)
        for residual, transformer in self.mids:
            h = transformer(residual(h, level, coarse), coarse)
        residual, transformer = self.ups[0]
        h = transformer(residual(torch.cat([h, kept], 1), level, coarse), coarse)
        residual, transformer = self.ups[1]
        h = torch.cat([self.finer(h) * mask, fine], 1)
        return transformer(residual(h, level, mask), mask)


class Modulated(nn.Module):
    """A block of a diffusion transformer (Peebles & Xie, 2023, adaLN-Zero)."""

    def __init__(self, channels: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels, elementwise_affine=False)
        self.level = nn.Linear(channels, 6 * channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.feed = nn.Sequential(
            nn.Linear(channels, 2 * channels),
            nn.GELU("tanh"),
            nn.Linear(2 * channels, channels),
        )
        nn.init.zeros_(self.level.weight)
        nn.init.zeros_(self.level.bias)

    def forward(self, h: Tensor, level: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.level(level)[:, None].chunk(6, -1)
        y = self.norm(h) * (1 + scale1) + shift1
        h = h + gate1 * self.out(attend(self.qkv(y), self.heads, mask, turn))
        return h + gate2 * self.feed(self.norm(h) * (1 + scale2) + shift2)


class DiT(Rival):
    """Transformer blocks over frames."""

    def __init__(self, facts: Any, width: int, depth: int, fine: bool = False) -> None:
        super().__init__(facts, width, fine)
        self.begin = nn.Linear(facts["mels"] + width, width)
        self.place_conv = nn.Conv1d(width, width, 31, padding=15, groups=16)
        self.trunk_blocks = nn.ModuleList(Modulated(width) for _ in range(depth))
        self.end = nn.Conv1d(width, facts["mels"], 1)
        nn.init.zeros_(self.end.weight)

    def trunk(self, x: Tensor, level: Tensor, known: Tensor, mask: Tensor) -> Tensor:
        h = self.begin(torch.cat([x, known], 1).transpose(1, 2))
        h = h + F.mish(self.place_conv(h.transpose(1, 2) * mask)).transpose(1, 2)
        half = h.shape[-1] // 8
        speed = torch.exp(-math.log(1e4) * torch.arange(half, device=h.device) / half)
        turn = torch.arange(h.shape[1], device=h.device)[:, None] * speed
        for block in self.trunk_blocks:
            h = block(h, level, mask, turn)
        return F.layer_norm(h, h.shape[-1:]).transpose(1, 2)


def sizes(facts: Any) -> tuple[int, int, int]:
    """What the plugin's networks are told of the data."""
    return facts["mels"], len(facts["tokens"]), len(facts["speakers"])


# One dilation more than there are blocks, after all of which attention would come.
NO_ATTENTION = (1, 2, 4, 8, 1, 2, 4, 8, 1)
NETWORKS: dict[str, Callable[[Any], nn.Module] | None] = {
    "default": None,
    "no_attention": lambda facts: MelNet(*sizes(facts), 160, 8, NO_ATTENTION, 0.0),
    "unet2d": lambda facts: UNet2d(facts, 32),
    "unet1d": lambda facts: UNet1d(facts, 128),
    "unet1d_fine": lambda facts: UNet1d(facts, 128, True),
    "dit": lambda facts: DiT(facts, 160, 6),
    "dit_fine": lambda facts: DiT(facts, 160, 6, True),
    "diff_tts": lambda facts: DiffTTS(*sizes(facts), 128, 12, (1,), 0.0),
}


def main() -> None:
    """Trains, judges and prints a row for each network and learning rate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--lrs", nargs="*", type=float, default=[1e-3])
    parser.add_argument("--seconds", type=float, default=150, help="CPU-seconds of training")
    parser.add_argument("--count", type=int, default=200, help="samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="an override of every run")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    args.figures = [*FIGURES]
    torch.set_num_threads(1)
    modality = plugins.modality("speech")
    rows = []
    for name in args.networks:
        other = copy.copy(modality)
        if (make := NETWORKS[name]) is not None:
            other.backbone = lambda config, facts, make=make: make(facts)
        for lr in args.lrs:
            found = row(other, [], f"train.lr={lr:g} speech.data=espeak", args)
            rows.append(found | {"network": name, "lr": lr})
            told = "  ".join(f"{n} {v:.4g} ({f:.4g})" for n, (v, f) in found["measures"].items())
            loss = " ".join(f"{at}: {value:.3f}" for at, value in found["heldout_loss"].items())
            line = f"{name:8} lr {lr:g}  {found['parameters'] / 1e6:.2f} M  "
            line += f"{found['cpu_seconds']} s  {found['steps']} steps  {told}  loss {loss}"
            print(line, flush=True)
            if args.out:
                args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
