"""What a modality of plain arrays need not write: batches, files and a picture of them."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gendiff.errors import ConfigError, DataError, PluginError, reason
from gendiff.modality import Given
from gendiff.spaces import Batch, Cond, Dense, Ragged, Space

PIXELS = 8  # along the side of a number in a picture


def stack(items: Sequence[Any]) -> Batch:
    r"""A batch of arrays of one shape (C, \*), each alone or in a pair with its conditions.

    Args:
        items: ``x``, or ``(x, {"label": 3})``.

    Raises:
        PluginError: The shapes differ.
    """
    pairs: list[tuple[Any, Mapping[str, Any]]] = [
        item if isinstance(item, tuple) else (item, {}) for item in items
    ]
    arrays = [torch.as_tensor(x, dtype=torch.float32) for x, _ in pairs]
    shapes = sorted({tuple(x.shape) for x in arrays})
    if len(shapes) > 1:
        raise PluginError(
            f"items have the shapes {shapes[0]} and {shapes[1]}, which no Dense batch can hold. "
            "Make them alike, or write collate() for a Masked or Ragged space"
        )
    names = pairs[0][1]
    values = {n: torch.stack([torch.as_tensor(told[n]) for _, told in pairs]) for n in names}
    x = torch.stack(arrays)
    return Batch(x, Dense(tuple(x.shape)), Cond(values) if values else None)


def write(batch: Batch, folder: Path, ids: Sequence[int]) -> list[Path]:
    """``00017.npy`` for each sample: its state, without padding."""
    paths = [folder / f"{i:05d}.npy" for i in ids]
    for row, path in enumerate(paths):
        one = batch.select([row])
        np.save(path, (one.x if isinstance(one.space, Ragged) else one.x[0]).cpu().numpy())
    return paths


def read(path: Path, keep: str | None, space: Space, cond: Cond | None) -> Given:
    """What :func:`write` wrote of a dense sample, for each sample of a space.

    Args:
        path: The file.
        keep: Which of its numbers stay, as slices of its axes: ``0:4`` or ``:,8:16``.
        space: That of the samples to be made.
        cond: Their conditions.

    Raises:
        ConfigError: ``keep`` is no slices, or keeps all or nothing.
        DataError: The file holds no such array.
    """
    if not isinstance(space, Dense):
        raise ConfigError("edit: samples that differ in size need a given() of the modality's own")
    try:
        array = np.load(path, allow_pickle=False)
        if np.iscomplexobj(array):  # torch would take the real part
            raise TypeError("it holds complex numbers")
        x = torch.as_tensor(array, dtype=torch.float32)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"edit: {path} cannot be read as an array: {reason(error)}") from None
    if x.shape != space.shape[1:]:
        raise DataError(f"edit: {path} has shape {tuple(x.shape)}, the model {space.shape[1:]}")
    batch = Batch(x.expand(space.shape), space, cond)
    return Given(batch, None if keep is None else _mask(keep, x).expand(space.shape))


def _mask(keep: str, x: Tensor) -> Tensor:
    parts = [re.fullmatch(r"\s*(-?\d{1,9})?:(-?\d{1,9})?\s*", part) for part in keep.split(",")]
    if len(parts) > x.ndim or not all(parts):
        raise ConfigError(
            f"keep: '{keep}' is no part of an array of shape {tuple(x.shape)}. Give a slice of "
            "each axis, as in 0:4 or :,8:16"
        )
    mask = torch.zeros(x.shape, dtype=torch.bool)
    bounds = [[int(n) if n else None for n in part.groups()] for part in parts if part]
    mask[tuple(slice(*pair) for pair in bounds)] = True
    if mask.all() or not mask.any():
        raise ConfigError(f"keep: '{keep}' keeps {'all' if mask.all() else 'none'} of the numbers")
    return mask


def picture(batch: Batch, path: Path) -> Path:
    """A grey PNG: a line of squares for each row of the state, black and white its extremes."""
    rows = batch.x.flatten(1).float().cpu()
    grey = (127.5 * (1 + rows / rows.abs().max().clamp(min=1e-9))).nan_to_num().byte()
    grey = grey.repeat_interleave(PIXELS, 0).repeat_interleave(PIXELS, 1)
    height, width = grey.shape
    lines = b"".join(b"\0" + line.tobytes() for line in grey.numpy())
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
    return path
