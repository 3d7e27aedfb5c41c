"""A toy modality with a known law, in each of the three spaces: the engine is tested alone.

Each row of a sample is normal with a mean that depends on the sample's class and a variance of
its own; centred columns have no mean; with ``types`` a one-hot code of the class follows. Items
cost nothing, and what a perfect model would put out
is :class:`gendiff.testing.Gaussian`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import Dataset

from gendiff.errors import ConfigError, DataError
from gendiff.modality import (
    Condition,
    DataReport,
    Given,
    Measure,
    Modality,
    Property,
    Request,
    Section,
)
from gendiff.noise import Streams, derive_seed
from gendiff.spaces import Batch, Categories, Cond, Dense, Masked, Ragged, Space

CLASSES, WIDTH, VARIANCE = 3, 4, 0.04


class ToyConfig(Section):
    """The section ``toy``."""

    kind: Literal["dense", "masked", "ragged"] = Field("dense", description="the space")
    items: int = Field(64, ge=2, le=1 << 24, description="items of a split")
    hidden: int = Field(32, ge=4, le=1 << 14, description="width of the network")
    centred: int = Field(3, ge=0, le=WIDTH, description="centred columns, ragged only")
    types: bool = Field(False, description="append a one-hot code of the class to every row")
    distance: bool = Field(False, description="add the mean absolute error to the loss")
    decimals: int = Field(6, ge=0, le=6, description="of the numbers in a written file")

    @property
    def width(self) -> int:
        """Columns of a row."""
        return WIDTH + CLASSES * self.types


def _space(config: ToyConfig, sizes: Sequence[int]) -> Space:
    if config.kind == "dense":
        return Dense((len(sizes), config.width))
    counts = torch.tensor(sizes)
    if config.kind == "masked":
        return Masked(counts, config.width, max(sizes))
    return Ragged(counts, config.width, config.centred)


def _size(config: ToyConfig, *names: int | str) -> int:
    return 1 if config.kind == "dense" else 2 + derive_seed("size", *names) % 5


def mean(space: Space, labels: Tensor) -> Tensor:
    """The data's mean for these classes, of the batch's shape."""
    level = labels.double() - (CLASSES - 1) / 2
    return space.project(space.expand(level) * torch.ones(space.shape, dtype=torch.float64))


class ToyData(Dataset[Any]):
    """Items (x of one sample, label)."""

    def __init__(self, config: ToyConfig, split: str) -> None:
        self.config, self.split = config, split

    def __len__(self) -> int:
        return self.config.items

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, label = key[0], key[0] % CLASSES
        space = _space(self.config, [_size(self.config, self.split, index)])
        noise = space.noise(Streams(derive_seed(self.split), (index,)), 0)
        x = mean(space, torch.tensor([label])).to(noise) + VARIANCE**0.5 * noise
        for part in _categories(self.config):
            part.of(x).zero_().narrow(1, label, 1).fill_(part.scale)
        return x, label


def _categories(config: ToyConfig) -> tuple[Categories, ...]:
    return (Categories(WIDTH, CLASSES, 0.5),) if config.types else ()


class ToyNet(nn.Module):
    """A row-wise network that also sees the mean row of its sample."""

    def __init__(self, hidden: int, width: int = WIDTH) -> None:
        super().__init__()
        self.width = width
        self.label = nn.Embedding(CLASSES + 1, hidden)
        self.noise = nn.Linear(1, hidden)
        self.first = nn.Linear(2 * width, hidden)
        self.last = nn.Linear(hidden, width)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Space) -> Tensor:
        rows = x.transpose(1, 2) if isinstance(space, Masked) else x
        width = self.width
        means = torch.stack([space.mean(_only(space, x, c)) for c in range(width)], 1) * width
        label = torch.full_like(noise, CLASSES, dtype=torch.long)
        if cond is not None:
            hidden = (
                torch.zeros_like(label, dtype=torch.bool)
                if cond.dropped is None
                else (cond.dropped)
            )
            label = torch.where(hidden, CLASSES, cond["label"])
        context = torch.cat([means, self.label(label) + self.noise(noise[:, None])], 1)
        if isinstance(space, Ragged):
            context = context[space.index]
        elif isinstance(space, Masked):
            context = context[:, None].expand(-1, rows.shape[1], -1)
        h = self.first(torch.cat([rows, context[..., :width]], -1)) + context[..., width:]
        out: Tensor = self.last(torch.nn.functional.silu(h))
        return out.transpose(1, 2) if isinstance(space, Masked) else out


def _only(space: Space, x: Tensor, column: int) -> Tensor:
    keep = torch.zeros(x.shape[1]).to(x)
    keep[column] = 1
    return x * (keep[None, :, None] if isinstance(space, Masked) else keep)


class ToyModality(Modality):
    """See the module."""

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "Gaussian rows with a class, for tests"
    Config: ClassVar[type[Section]] = ToyConfig
    output_keys: ClassVar[frozenset[str]] = frozenset({"decimals"})
    defaults: ClassVar[Mapping[str, Any]] = {
        "diffusion": {"data_std": 1.0},
        "train": {
            "steps": 20,
            "batch_size": 16,
            "lr": 1e-2,
            "sample_every_steps": 10,
            "checkpoint_every_steps": 5,
            "log_every_steps": 5,
            "ema_half_life_steps": 5,
        },
        "sample": {"steps": 5, "preview": 8},
    }

    def prepare(self, config: ToyConfig) -> DataReport:
        return DataReport(f"{config.items} toy items, {config.kind}", {"classes": CLASSES})

    def dataset(self, config: ToyConfig, facts: Mapping[str, Any], split: str) -> Dataset[Any]:
        return ToyData(config, split)

    def collate(self, config: ToyConfig, facts: Mapping[str, Any], items: Sequence[Any]) -> Batch:
        tensors = [x for x, _ in items]
        cond = Cond({"label": torch.tensor([label for _, label in items])})
        if config.kind == "ragged":
            return Batch(torch.cat(tensors), _space(config, [len(x) for x in tensors]), cond)
        if config.kind == "masked":
            space = _space(config, [x.shape[2] for x in tensors])
            pad = [torch.nn.functional.pad(x, (0, space.shape[2] - x.shape[2])) for x in tensors]
            return Batch(torch.cat(pad), space, cond)
        return Batch(torch.cat(tensors), _space(config, [1] * len(items)), cond)

    def backbone(self, config: ToyConfig, facts: Mapping[str, Any]) -> nn.Module:
        return ToyNet(config.hidden, config.width)

    def categories(self, config: ToyConfig, facts: Mapping[str, Any]) -> tuple[Categories, ...]:
        return _categories(config)

    def distance(
        self, config: ToyConfig, facts: Mapping[str, Any]
    ) -> Callable[[Tensor, Batch], Tensor] | None:
        if not config.distance:
            return None
        return lambda x_hat, batch: batch.space.mean((x_hat - batch.x).abs())

    def templates(
        self, config: ToyConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        sizes = [_size(config, request.seed, i) for i in request.ids]
        labels = [request.values.get("label", i % CLASSES) for i in request.ids]
        for label in labels:
            if label not in range(CLASSES):
                raise ConfigError(f"label: {label!r} is no class. Choose 0 to {CLASSES - 1}")
        return _space(config, sizes), Cond({"label": torch.tensor(labels)})

    def conditions(self, config: ToyConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        return (Condition("label", "class", range(CLASSES), closed=True),)

    def given(
        self,
        config: ToyConfig,
        facts: Mapping[str, Any],
        path: Path,
        keep: str | None,
        request: Request,
    ) -> Given:
        """What :meth:`write` wrote; ``keep`` is a number of columns."""
        try:
            one = torch.tensor(json.loads(path.read_text()))
        except (ValueError, TypeError, RuntimeError):  # no text, no JSON, no numbers
            raise DataError(f"{path} is no sample of the toy. Give what it has written") from None
        rows = one.shape[2] if config.kind == "masked" else len(one)
        count = len(request.ids)
        space = _space(config, [rows] * count)
        x = one.repeat(count, *[1] * (one.ndim - 1))
        labels = [request.values.get("label", 0)] * count
        mask = None
        if keep is not None:
            if keep not in map(str, range(1, config.width)):
                raise ConfigError(
                    f"keep: '{keep}' is no number of columns. Give 1 to {config.width - 1}"
                )
            columns = torch.arange(config.width) < int(keep)
            mask = (columns[:, None] if config.kind == "masked" else columns).expand(space.shape)
        return Given(Batch(x, space, Cond({"label": torch.tensor(labels)})), mask)

    def property_named(
        self, config: ToyConfig, facts: Mapping[str, Any], name: str, cache: Path
    ) -> Property:
        """``level``: the mean of the last column of the rows proper."""
        if name != "level":
            raise ConfigError(f"toward: unknown property '{name}'. Known: level")
        return Property(
            lambda x, space: space.mean(_only(space, x, WIDTH - 1)) * config.width, 0.05
        )

    def write(
        self,
        config: ToyConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        paths = []
        for row, sample in enumerate(ids):
            path = folder / f"{sample:05d}.json"
            numbers = batch.select([row]).x.double().round(decimals=config.decimals)
            path.write_text(json.dumps(numbers.tolist()))
            paths.append(path)
        return paths

    def metrics(
        self, config: ToyConfig, facts: Mapping[str, Any], samples: Batch, cache: Path, seed: int
    ) -> list[Measure]:
        assert samples.cond is not None
        offset = samples.x - mean(samples.space, samples.cond["label"]).to(samples.x)
        offset = torch.stack([_only(samples.space, offset, c) for c in range(WIDTH)]).sum(0)
        error = samples.space.mean(offset.square()).mean().item() * config.width / WIDTH
        return [
            Measure(
                "mean_square_offset",
                error,
                "lower",
                VARIANCE,
                "of the samples from their class's mean; floor: the data's variance",
            )
        ]
