"""Tensors to PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

_READABLE = 64  # pixels: smaller images are enlarged to about this side in a grid
_GAP = 2  # pixels between the images of a grid


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] to 0 … 255, rounded and clamped, any shape."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_picture(pixels: Tensor) -> Image.Image:
    """A uint8 (C, H, W) tensor as a grey, grey and alpha, RGB or RGBA picture."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array))


def write(x: Tensor, folder: Path, ids: Sequence[int]) -> list[Path]:
    """Writes x (B, C, H, W) as one PNG per image, named after its id; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:05d}.png" for i in ids]
    for pixels, path in zip(to_uint8(x), paths, strict=True):
        to_picture(pixels).save(path)
    return paths


def pngs(x: Tensor) -> list[bytes]:
    """x (B, C, H, W) as the content of one PNG file per image."""
    files = [BytesIO() for _ in x]
    for pixels, file in zip(to_uint8(x), files, strict=True):
        to_picture(pixels).save(file, "PNG")
    return [file.getvalue() for file in files]


def grid(x: Tensor, labels: Tensor | None, path: Path) -> Path:
    """Draws x (B, C, H, W) as one picture, tiny images enlarged by a whole factor.

    The grid is nearly square, unless the labels (B,) go round up to 20 classes in order: then
    each class is a column.
    """
    count, channels, height, width = x.shape
    factor = max(1, _READABLE // max(height, width))
    pixels = F.interpolate(to_uint8(x).cpu(), scale_factor=factor, mode="nearest")
    columns = _classes_in_turn(labels) or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    cell_h, cell_w = height * factor + _GAP, width * factor + _GAP
    size = (channels, rows * cell_h - _GAP, columns * cell_w - _GAP)
    canvas = torch.full(size, 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * cell_h, i % columns * cell_w
        canvas[:, top : top + height * factor, left : left + width * factor] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(canvas).save(path)
    return path


def _classes_in_turn(labels: Tensor | None) -> int | None:
    """The number of classes if the labels are 0, 1, … K - 1, 0, 1, … with K <= 20, else None."""
    if labels is None:
        return None
    labels = labels.cpu()
    classes = int(labels.max()) + 1
    in_turn = torch.equal(labels, torch.arange(len(labels)) % classes)
    return classes if in_turn and 1 < classes <= 20 and len(labels) % classes == 0 else None


def film(frames: Sequence[Tensor], path: Path, milliseconds: int = 120) -> Path:
    """Draws the images x (1, C, H, W) one after the other as a GIF; the last stays for 2 s."""
    pictures = []
    for x in frames:
        factor = max(1, 4 * _READABLE // max(x.shape[2:]))
        pixels = F.interpolate(to_uint8(x).cpu(), scale_factor=factor, mode="nearest")
        pictures.append(to_picture(pixels[0]).convert("RGB"))
    durations = [milliseconds] * (len(pictures) - 1) + [2000]
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path
