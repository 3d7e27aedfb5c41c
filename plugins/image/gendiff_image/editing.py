"""A picture as the start of others, and which of its pixels are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gendiff.errors import ConfigError, DataError
from gendiff_image.folders import open_picture
from gendiff_image.sets import to_unit

_COLOR = {1: "grey", 3: "rgb"}
_SLICES = re.compile(r"(-?\d{1,9})?:(-?\d{1,9})?,(-?\d{1,9})?:(-?\d{1,9})?")


def given(facts: Mapping[str, Any], path: Path, keep: str | None) -> tuple[Tensor, Tensor | None]:
    """The picture as (1, C, H, W) in [-1, 1], and the mask of what is kept, (1, 1, H, W), or None.

    Raises:
        ConfigError: ``keep`` is neither slices nor a picture, or keeps all or nothing.
        DataError: A picture cannot be used.
    """
    size = (facts["height"], facts["width"])
    image = _picture(path, _COLOR.get(facts["channels"]), size)
    if len(image) != facts["channels"]:
        raise DataError(f"edit: {path} has {len(image)} channels, the model {facts['channels']}")
    if keep is None:
        return image[None], None
    mask = torch.zeros(size, dtype=torch.bool)
    if slices := _SLICES.fullmatch(keep.replace(" ", "")):
        top, bottom, left, right = (int(n) if n else None for n in slices.groups())
        mask[top:bottom, left:right] = True
    elif Path(keep).is_file():
        mask = _picture(Path(keep), "grey", size)[0] > 0
    else:
        raise ConfigError(
            f"keep: '{keep}' is neither rows and columns, as in 0:4,: for the upper four rows, "
            "nor a picture, white where pixels are kept"
        )
    if mask.all() or not mask.any():
        raise ConfigError(f"keep: '{keep}' keeps {'all' if mask.all() else 'none'} of the pixels")
    return image[None], mask[None, None]


def _picture(path: Path, color: str | None, size: tuple[int, int]) -> Tensor:
    try:
        pixels = open_picture(path, color, size)
    except FileNotFoundError:
        raise DataError(f"edit: {path} is no file") from None
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise DataError(f"edit: {path} cannot be read as a picture: {error}") from error
    return torch.from_numpy(to_unit(pixels, 255))
