"""A U-Net for images, made of few and large operations.

The residual blocks are those of DDPM++ (Song et al., 2021, https://arxiv.org/abs/2011.13456;
Karras et al., 2022, https://arxiv.org/abs/2206.00364): group norm, SiLU, convolution, twice, with
the embedding of noise level and class added in between. What differs is what surrounds them,
because on small images that is where the time goes:

- Down-sampling is a 2x2 mean and up-sampling a repetition, neither with a convolution of its own;
  the first block after the former and the last before the latter change the width.
- Skip connections are added, not concatenated, so that a decoder block is as cheap as an encoder
  block, and none needs a projection at full resolution.
- Activations are channels_last throughout: convolutions and resampling are faster, and attention
  reads them as (B, H * W, C) without a copy.
- One linear layer makes the embeddings of all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from gendiff.spaces import Cond, Space


class UNet(nn.Module):
    """Maps a noisy image, its noise level and its class to an image.

    Any height and width divisible by :attr:`stride` are accepted, at any time.

    Args:
        image_channels: Channels of the image.
        channels: Width at level 0, the full resolution.
        channel_multipliers: Width of each level in units of ``channels``; a level has half the
            height and width of the one before.
        blocks: Residual blocks per level, as many in the encoder as in the decoder.
        attention_levels: Levels with self-attention after every block. Levels and not sizes in
            pixels, so that a network means the same at every image size. If the last level is
            among them, so is the middle.
        head_channels: Width of an attention head; a level's width must be a multiple of it.
        dropout: Probability of dropping an activation before a block's second convolution.
        classes: Number of classes; None for an unconditional network.
        learned_variance: Return twice the channels, the second half for the reverse variance
            (Nichol & Dhariwal, 2021, https://arxiv.org/abs/2102.09672).
        norm_groups: Most groups of a group norm; see :func:`group_norm`.
        embedding_channels: Width of the embedding; four times ``channels`` unless given.
        frequencies: Lowest and highest angular frequency at which the noise level is embedded.
            The default resolves both log(sigma) / 4 and 1000 * t.
    """

    frequencies: Tensor

    def __init__(
        self,
        *,
        image_channels: int = 1,
        channels: int = 32,
        channel_multipliers: Sequence[int] = (1, 2),
        blocks: int = 1,
        attention_levels: Sequence[int] = (),
        head_channels: int = 32,
        dropout: float = 0.0,
        classes: int | None = None,
        learned_variance: bool = False,
        norm_groups: int = 8,
        embedding_channels: int | None = None,
        frequencies: tuple[float, float] = (1e-3, 4.0),
    ) -> None:
        super().__init__()
        widths = [channels * multiplier for multiplier in channel_multipliers]
        levels = len(widths)
        if any(not 0 <= level < levels for level in attention_levels):
            raise ValueError(
                f"attention_levels: {list(attention_levels)}. Levels are 0 to {levels - 1}."
            )
        self.stride = 2 ** (levels - 1)
        self.blocks = blocks
        self.classes = classes

        embedding = embedding_channels or 4 * channels
        low, high = torch.tensor(frequencies, dtype=torch.float64).log().tolist()
        table = torch.linspace(low, high, channels, dtype=torch.float64).exp().float()
        self.register_buffer("frequencies", table, persistent=False)
        self.embed_noise = nn.Sequential(
            nn.Linear(2 * channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        # The last row stands for "no class".
        self.embed_class = None if classes is None else nn.Embedding(classes + 1, embedding)

        def stage(level: int, before: int, after: int) -> Stage:
            attends = level in attention_levels
            if attends and after % head_channels:
                raise ValueError(
                    f"head_channels: {head_channels} does not divide the {after} channels of an "
                    f"attention layer at level {level}. Use a divisor of {after}."
                )
            return Stage(before, after, norm_groups, dropout, head_channels if attends else None)

        self.conv_in = nn.Conv2d(image_channels, widths[0], 3, padding=1)
        self.encoder = nn.ModuleList()
        before = widths[0]
        for level, width in enumerate(widths):
            for _ in range(blocks):
                self.encoder.append(stage(level, before, width))
                before = width
        self.middle = nn.ModuleList(stage(levels - 1, before, before) for _ in range(2))
        self.decoder = nn.ModuleList()
        for level in reversed(range(levels)):
            for after in [widths[level]] * (blocks - 1) + [widths[max(level - 1, 0)]]:
                self.decoder.append(stage(level, widths[level], after))
        self.norm_out = group_norm(widths[0], norm_groups)
        self.conv_out = zeroed(
            nn.Conv2d(widths[0], image_channels * (1 + learned_variance), 3, padding=1)
        )
        self.shift_widths = [
            module.shift_channels for module in self.modules() if isinstance(module, Block)
        ]
        self.shifts = nn.Linear(embedding, sum(self.shift_widths))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, x: Tensor, noise: Tensor, cond: Cond | None = None, space: Space | None = None
    ) -> Tensor:
        """Runs the network.

        Args:
            x: Input-scaled noisy images, shape (B, C, H, W).
            noise: The number that stands for the noise level, shape (B,).
            cond: Holds ``cond["label"]``, classes of shape (B,), and ``cond.dropped``, None or a
                mask of shape (B,) of the samples that shall not see their class. Without it
                no sample sees one.
            space: Not needed; part of the engine's call.

        Returns:
            Shape (B, C, H, W), or (B, 2 * C, H, W) with ``learned_variance``.

        Raises:
            ValueError: The height or width is not a multiple of :attr:`stride`.
        """
        del space
        height, width = x.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"image size: {height}x{width} is not divisible by {self.stride}. "
                f"Use other sizes, or fewer channel_multipliers."
            )
        shifts = iter(self.shifts(self.embed(noise, cond)).split(self.shift_widths, dim=1))
        h: Tensor = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        h = h.contiguous(memory_format=torch.channels_last)  # one channel has no layout of its own
        skips = []
        for i, stage in enumerate(self.encoder):
            if i and i % self.blocks == 0:
                h = F.avg_pool2d(h, 2)
            h = stage(h, next(shifts))
            skips.append(h)
        for stage in self.middle:
            h = stage(h, next(shifts))
        for i, stage in enumerate(self.decoder):
            if i and i % self.blocks == 0:
                h = F.interpolate(h, scale_factor=2.0, mode="nearest")
            h = stage(h + skips.pop(), next(shifts))
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out

    def embed(self, noise: Tensor, cond: Cond | None) -> Tensor:
        """The activated embedding of noise level and class, shape (B, E)."""
        phase = noise.float()[:, None] * self.frequencies
        embedding: Tensor = self.embed_noise(torch.cat((phase.cos(), phase.sin()), dim=1))
        if self.embed_class is not None and self.classes is not None:
            none = torch.full_like(noise, self.classes, dtype=torch.int64)
            label = none if cond is None else cond["label"]
            if cond is not None and cond.dropped is not None:
                label = torch.where(cond.dropped, none, label)
            embedding = embedding + self.embed_class(label)
        return F.silu(embedding)


class Stage(nn.Module):
    """A residual block and, if ``head_channels`` is given, self-attention after it."""

    def __init__(
        self, before: int, after: int, groups: int, dropout: float, head_channels: int | None
    ) -> None:
        super().__init__()
        self.block = Block(before, after, groups, dropout)
        self.attention = Attention(after, groups, head_channels) if head_channels else None

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """Shapes (B, before, H, W) and (B, shift_channels) to (B, after, H, W)."""
        h: Tensor = self.block(x, shift)
        return h if self.attention is None else self.attention(h)


class Block(nn.Module):
    """``x + conv(silu(norm(conv(silu(norm(x))) + shift)))``."""

    def __init__(self, before: int, after: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.shift_channels = after
        self.norm_1 = group_norm(before, groups)
        self.conv_1 = nn.Conv2d(before, after, 3, padding=1, bias=False)  # the shift has one
        self.norm_2 = group_norm(after, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv_2 = zeroed(nn.Conv2d(after, after, 3, padding=1))
        self.project = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """Shapes (B, before, H, W) and (B, after) to (B, after, H, W)."""
        h: Tensor = self.conv_1(F.silu(self.norm_1(x))) + shift[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        return h + self.project(x)


class Attention(nn.Module):
    """Residual self-attention among all positions of an image."""

    def __init__(self, channels: int, groups: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (B, C, H, W) to the same."""
        h = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, N, C), a view
        qkv = self.qkv(h).unflatten(2, (3, -1, self.head_channels))  # (B, N, 3, heads, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D)
        h = attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(h).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention, shapes (B, heads, N, D)."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # torch's kernel for this case takes three times as long as the products, backwards.
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return weights.softmax(-1, torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """A group norm with the most groups, up to ``groups``, of a multiple of 8 channels each.

    On a CPU, in channels_last, groups that do not fill a vector register cost ten times as much.
    """
    unit = 8 if channels % 8 == 0 else 1
    fitting = [n for n in range(1, groups + 1) if channels % (unit * n) == 0]
    return nn.GroupNorm(max(fitting), channels)


def zeroed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Sets the weights of the last layer of a branch to zero: the branch starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
