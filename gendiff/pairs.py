r"""Pairs of noise and sample: what a student learns in place of data.

A pair is a noise z, the teacher's sample x that is made of it without further noise, the space
and the condition. They are kept in the student's run folder, a safetensors file a block, each
whole or absent, with what it was made from as its metadata: making goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from gendiff.errors import RunError
from gendiff.schedules import Schedule
from gendiff.spaces import Batch, Cond, Dense, Masked, Ragged, Space

SPACES: dict[str, type[Space]] = {space.__name__: space for space in (Dense, Masked, Ragged)}


def coupled(z: Tensor, x: Tensor, space: Space, schedule: Schedule) -> Tensor:
    r"""The noise with which :math:`\alpha_t x + \sigma_t \epsilon` leads from the start to x.

    .. math:: \epsilon = z - \frac{\alpha_1}{\sigma_1} x

    A sampler starts from :math:`\sigma_1 z`, of which a schedule that keeps some signal at t = 1
    (:math:`\alpha_1 > 0`) makes no x with noise z; for rectified flow the two noises are one.

    Args:
        z: The noise, of the batch's shape.
        x: The sample that is made of it.
        space: Their space.
        schedule: The schedule.
    """
    alpha, sigma = schedule(torch.ones(space.batch_size, dtype=torch.float64))
    return z - space.expand((alpha / sigma).to(x)) * x


def path(folder: Path, block: int) -> Path:
    """The file of a block."""
    return folder / f"{block:06d}.safetensors"


def made_from(file: Path) -> str | None:
    """What a block was made from; None if there is no block."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata()["made_from"]
    except (OSError, SafetensorError, KeyError, TypeError):  # TypeError: there are no metadata
        return None


def save(file: Path, batch: Batch, origin: str) -> None:
    """Writes a block, a batch with its eps, whole or not at all."""
    assert batch.eps is not None
    tensors = {"x": batch.x, "eps": batch.eps}
    fields: dict[str, Any] = {"kind": type(batch.space).__name__}
    for field in dataclasses.fields(batch.space):  # type: ignore[arg-type]
        value = getattr(batch.space, field.name)
        if not field.init:
            continue
        if isinstance(value, Tensor):
            tensors[f"space.{field.name}"] = value
        else:
            fields[field.name] = value
    if batch.cond is not None:
        tensors |= {f"cond.{name}": value for name, value in batch.cond.values.items()}
        if batch.cond.dropped is not None:
            tensors["dropped"] = batch.cond.dropped
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    plain = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(plain, temporary, {"space": json.dumps(fields), "made_from": origin})
    with temporary.open("rb") as opened:
        os.fsync(opened.fileno())
    os.replace(temporary, file)


def read(file: Path) -> Batch:
    """The batch of a block."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        fields = json.loads(opened.metadata()["space"])
    kind = SPACES[fields.pop("kind")]
    plain = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    space = kind(**plain, **_under("space.", tensors))
    values = _under("cond.", tensors)
    cond = Cond(values, tensors.get("dropped")) if values else None
    return Batch(tensors["x"], space, cond, tensors["eps"])


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


class Pairs(Dataset[Batch]):
    """The first pairs of a folder, in memory; an item is a batch of one, with its eps.

    Args:
        folder: The folder.
        count: How many.

    Raises:
        RunError: There are not so many, or a file is damaged.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.items: list[Batch] = []
        for block in itertools.count():
            if len(self.items) >= count:
                break
            file = path(folder, block)
            try:
                batch = read(file)
            except (OSError, SafetensorError):
                raise RunError(
                    f"{file} is missing or damaged. 'gendiff distill' makes the pairs anew"
                ) from None
            self.items += [batch.select([row]) for row in range(batch.space.batch_size)]
        del self.items[count:]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        return self.items[key[0]]
