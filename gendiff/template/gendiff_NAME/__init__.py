"""NAME, a modality for gendiff: waveforms of three shapes, until you put your data here.

The engine imports this module to list what is installed: torch is imported in the methods only.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

import gendiff
from gendiff.modality import Condition, DataReport, Measure, Modality, Section

SHAPES = ("sine", "square", "sawtooth")


class Config(Section):
    """The section ``NAME`` of a configuration."""

    length: int = Field(64, ge=8, description="values of a waveform")
    hidden: int = Field(48, ge=8, description="channels of the network")


class Waveforms(Modality):
    """What gendiff asks of a modality; see :class:`gendiff.Modality` for each method."""

    name = "NAME"
    summary = "waveforms of three shapes"
    Config = Config
    defaults: ClassVar = {"train": {"steps": 600, "lr": 3e-3, "ema_half_life_steps": 50}}

    def prepare(self, config: Any) -> DataReport:
        return DataReport(
            f"900 made-up waveforms of {len(SHAPES)} shapes", {"shapes": list(SHAPES)}
        )

    def dataset(self, config: Any, facts: Any, split: str) -> Any:
        from .model import Data

        return Data(config.length, 900 if split == "train" else 300, int(split == "test"))

    def backbone(self, config: Any, facts: Any) -> Any:
        from .model import Network

        return Network(config.hidden, len(SHAPES))

    def templates(self, config: Any, facts: Any, request: Any) -> Any:
        space = gendiff.Dense((len(request.ids), 1, config.length))
        return space, request.classes(shape=len(SHAPES))

    def conditions(self, config: Any, facts: Any) -> Any:
        return (Condition("shape", "number of the shape", range(len(SHAPES)), closed=True),)

    def preview(self, config: Any, facts: Any, batch: gendiff.Batch, path: Any) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 6), layout="constrained")
        for axes, wave in zip(figure.subplots(3, 3).flat, batch.x[:, 0].numpy(), strict=False):
            axes.plot(wave)
        figure.savefig(path)
        return path

    def metrics(
        self, config: Any, facts: Any, samples: gendiff.Batch, cache: Any, seed: int
    ) -> list[Measure]:
        from .model import nearest_accuracy

        train, test = (self.dataset(config, facts, split) for split in ("train", "test"))
        real, other = (
            self.collate(config, facts, [data[i, 0] for i in range(len(data))])
            for data in (train, test)
        )
        note = (
            "share whose nearest held-out waveform has the shape asked for; floor: training data"
        )
        value, floor = nearest_accuracy(samples, other), nearest_accuracy(real, other)
        return [Measure("shape_accuracy", value, "higher", floor, note)]


@gendiff.hookimpl
def gendiff_modality() -> Modality:
    """Hands the modality to gendiff."""
    return Waveforms()
