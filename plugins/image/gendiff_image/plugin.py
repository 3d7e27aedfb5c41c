"""The image modality, as the engine sees it. Imports no torch until a method is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from gendiff import hookimpl
from gendiff.errors import ConfigError
from gendiff.modality import (
    Condition,
    DataReport,
    Exhibit,
    Features,
    Given,
    Measure,
    Modality,
    Picture,
    Request,
    Section,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from gendiff.spaces import Batch, Cond, Space

Positive = Annotated[int, Field(gt=0, le=1 << 20)]
Depth = Annotated[int, Field(gt=0, le=1000)]  # layers, each of which is built


class ImageConfig(Section):
    """The section ``image`` of a configuration: the data, then the U-Net."""

    data: Literal["digits", "mnist", "fashion_mnist", "cifar10", "celeba", "folder"] = Field(
        "digits", description="data set; digits (8x8) comes with scikit-learn"
    )
    path: str | None = Field(
        None, description="folder with the data: torchvision's root, or a folder of pictures"
    )
    download: bool = Field(False, description="let torchvision download the data into path")
    size: Positive | tuple[Positive, Positive] | None = Field(
        None, description="side or [height, width] in pixels: resize, then crop the centre"
    )
    color: Literal["grey", "rgb"] | None = Field(
        None, description="convert to grey or rgb (transparency becomes white); null keeps"
    )
    flip: bool = Field(False, description="mirror half of the training images left to right")
    skip_bad: bool = Field(False, description="leave out files that cannot be decoded")

    class_conditional: bool = Field(True, description="tell the network the class, where known")
    learned_variance: bool = Field(False, description="a second output: the reverse variance")
    channels: Positive = Field(32, description="width of the U-Net's first level")
    channel_multipliers: tuple[Positive, ...] = Field(
        (1, 2),
        min_length=1,
        max_length=16,
        description="width of each level; every further level halves H and W",
    )
    blocks: Depth = Field(1, description="residual blocks of each level")
    attention_levels: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (1,), description="levels with self-attention, 0 is the finest"
    )
    head_channels: Positive = Field(32, description="width of an attention head")
    norm_groups: Positive = Field(32, description="most groups of a group normalization")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in the residual blocks")


class ImageModality(Modality):
    """Pictures of one size with 1 to 4 channels, with or without classes, in [-1, 1]."""

    name: ClassVar[str] = "image"
    summary: ClassVar[str] = "pictures of one size, 1 to 4 channels, with or without classes"
    Config: ClassVar[type[Section]] = ImageConfig
    # For the digits, on one core; configs/image/digits.yaml is the same recipe as a file.
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,  # layers this small gain nothing from more
        "diffusion": {
            "data_std": 0.75,
            "times": {"name": "log_normal", "mean": -0.4, "std": 1.0},
            "cond_dropout": 0.05,
        },
        "train": {
            "steps": 1600,
            "batch_size": 64,
            "lr": 8e-3,
            "lr_decay": "cosine",
            "ema_half_life_steps": 400,
            "ema_warmup": 0.2,
            "sample_every_steps": 400,
            "checkpoint_every_steps": 400,
        },
        "sample": {"sampler": "dpm++2m_sde", "grid": "flow", "preview": 100},
    }

    def prepare(self, config: ImageConfig) -> DataReport:
        """See :meth:`gendiff.Modality.prepare`.

        Raises:
            DataError: The data is missing, empty or damaged.
            ConfigError: The network cannot take images of this size.
        """
        from gendiff_image import data

        report = data.prepare(config)
        stride = 2 ** (len(config.channel_multipliers) - 1)
        height, width = report.facts["height"], report.facts["width"]
        if height % stride or width % stride:
            near = [max(stride, round(n / stride) * stride) for n in (height, width)]
            raise ConfigError(
                f"image.size: {height}x{width} is not divisible by {stride}, as "
                f"{len(config.channel_multipliers)} levels (image.channel_multipliers) need. "
                f"Try image.size={near if near[0] != near[1] else near[0]} or fewer levels."
            )
        deepest = len(config.channel_multipliers) - 1
        if max(config.attention_levels, default=0) > deepest:
            raise ConfigError(
                f"image.attention_levels: {max(config.attention_levels)} is not a level. "
                f"image.channel_multipliers has levels 0 to {deepest}."
            )
        return report

    def dataset(self, config: ImageConfig, facts: Mapping[str, Any], split: str) -> Dataset[Any]:
        """See :meth:`gendiff.Modality.dataset`. An item is ``(x (C, H, W), label or None)``."""
        from gendiff_image import data

        return data.dataset(config, facts, split)

    def collate(
        self, config: ImageConfig, facts: Mapping[str, Any], items: Sequence[Any]
    ) -> Batch:
        """Stacks items to x (B, C, H, W) and, where they have one, ``label`` (B,)."""
        import torch

        from gendiff.spaces import Batch, Cond, Dense

        x = torch.stack([image for image, _ in items])
        labels = [label for _, label in items]
        if labels[0] is None:
            return Batch(x, Dense(tuple(x.shape)))
        return Batch(x, Dense(tuple(x.shape)), Cond({"label": torch.tensor(labels)}))

    def backbone(self, config: ImageConfig, facts: Mapping[str, Any]) -> nn.Module:
        """The U-Net.

        Raises:
            ConfigError: Its keys contradict each other.
        """
        from gendiff_image.unet import UNet

        keys: dict[str, Any] = dict(
            image_channels=facts["channels"],
            channels=config.channels,
            channel_multipliers=config.channel_multipliers,
            blocks=config.blocks,
            attention_levels=config.attention_levels,
            head_channels=config.head_channels,
            norm_groups=config.norm_groups,
            dropout=config.dropout,
            classes=facts["classes"] if config.class_conditional else None,
            learned_variance=config.learned_variance,
        )
        try:
            return UNet(**keys)
        except ValueError as error:  # its messages begin with the key
            raise ConfigError(f"image.{error}") from error

    def bin_width(self, config: ImageConfig, facts: Mapping[str, Any]) -> float:
        """Between neighbouring grey levels, of which [-1, 1] holds ``levels``."""
        width: float = 2 / (facts["levels"] - 1)
        return width

    def templates(
        self, config: ImageConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        """``label``: a class by number or name, or a list that the ids go round.

        Without it, sample i is of class i modulo the number of classes.

        Raises:
            ConfigError: No such condition or class, or the model has no classes.
        """
        import torch

        from gendiff.spaces import Cond, Dense

        space = Dense((len(request.ids), facts["channels"], facts["height"], facts["width"]))
        classes = facts["classes"] if config.class_conditional else None
        known = [] if classes is None else ["label"]
        for key in request.values:
            if key not in known:
                accepted = "Known: label." if known else "This model is unconditional."
                raise ConfigError(f"cond: unknown condition {key!r}. {accepted}")
        if classes is None:
            return space, None
        wanted = request.values.get("label")
        if wanted is None:
            wanted = list(range(classes))
        entries = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
        if not entries:
            raise ConfigError("label: an empty list. Give at least one class.")
        cycle = [_class_number(entry, facts["class_names"]) for entry in entries]
        labels = torch.tensor([cycle[i % len(cycle)] for i in request.ids], dtype=torch.long)
        return space, Cond({"label": labels})

    def conditions(self, config: ImageConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        """``label``, by name, where the model has classes."""
        if facts["classes"] is None or not config.class_conditional:
            return ()
        return (Condition("label", "class", facts["class_names"], closed=True),)

    def given(
        self,
        config: ImageConfig,
        facts: Mapping[str, Any],
        path: Path,
        keep: str | None,
        request: Request,
    ) -> Given:
        """A picture, brought to the model's size and colour.

        ``keep`` is a picture of the same shape, white where pixels are kept, or rows and columns
        as Python slices: ``0:4,:`` keeps the upper four rows.
        """
        from gendiff.spaces import Batch
        from gendiff_image import editing

        space, cond = self.templates(config, facts, request)
        image, mask = editing.given(facts, path, keep)
        x = image.expand(space.shape)
        return Given(Batch(x, space, cond), None if mask is None else mask.expand(space.shape))

    def write(
        self,
        config: ImageConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """One PNG per sample: ``00017.png``."""
        from gendiff_image import pictures

        return pictures.write(batch.x, folder, ids)

    def preview(
        self, config: ImageConfig, facts: Mapping[str, Any], batch: Batch, path: Path
    ) -> Path:
        """A grid; a column per class where the labels go round the classes."""
        from gendiff_image import pictures

        labels = None if batch.cond is None else batch.cond["label"]
        return pictures.grid(batch.x, labels, path)

    def film(
        self, config: ImageConfig, facts: Mapping[str, Any], frames: Sequence[Batch], path: Path
    ) -> Path:
        """The estimates one after the other, the last one for two seconds."""
        from gendiff_image import pictures

        return pictures.film([frame.x for frame in frames], path)

    def exhibits(
        self, config: ImageConfig, facts: Mapping[str, Any], batch: Batch, ids: Sequence[int]
    ) -> list[Exhibit]:
        """The picture as it is, under its class's name where it has one."""
        from gendiff_image import pictures

        labels = [None] * len(ids) if batch.cond is None else batch.cond["label"].tolist()
        titles = ["" if k is None else str(facts["class_names"][k]) for k in labels]
        shown = pictures.pngs(batch.x)
        return [Exhibit((Picture(png),), t) for png, t in zip(shown, titles, strict=True)]

    def metrics(
        self,
        config: ImageConfig,
        facts: Mapping[str, Any],
        samples: Batch,
        cache: Path,
        seed: int,
    ) -> list[Measure]:
        """See :mod:`gendiff_image.metrics`."""
        from gendiff_image import data, metrics

        labels = None if samples.cond is None else samples.cond["label"]
        return metrics.measure(data.reference(config, facts), samples.x, labels, cache, seed)

    def features(
        self,
        config: ImageConfig,
        facts: Mapping[str, Any],
        batches: Iterable[Batch],
        cache: Path,
        seed: int,
    ) -> Features:
        """Those of a small network, see :func:`gendiff_image.metrics.features`."""
        from gendiff_image import data, metrics

        return metrics.features(data.reference(config, facts), batches, cache, seed)


def _class_number(entry: Any, names: Sequence[str]) -> int:
    """A class's number from its number or name."""
    if isinstance(entry, str) and entry in names:
        return names.index(entry)
    text = str(entry)
    if not isinstance(entry, bool) and text.isdecimal() and int(text) < len(names):
        return int(text)
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise ConfigError(
        f"label: {entry!r} is not a class. Give 0 to {len(names) - 1}, or a name ({shown})."
    )


@hookimpl
def gendiff_modality() -> Modality:
    """Hands the modality to the engine."""
    return ImageModality()
