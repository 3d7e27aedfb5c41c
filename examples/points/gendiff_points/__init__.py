"""Handwritten digits as sets of points in the plane: what gendiff asks of a modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

import gendiff
from gendiff.modality import Condition, DataReport, Measure, Modality, Request, Section

if TYPE_CHECKING:
    from torch import nn

    from gendiff.spaces import Batch, Cond, Space


class PointsConfig(Section):
    """The section ``points`` of a configuration."""

    width: int = Field(64, ge=8, multiple_of=4, description="width of the transformer, 4 heads")
    layers: int = Field(3, ge=1, description="of the transformer")


class PointsModality(Modality):
    """Points (x, y) in [-1, 1], padded to x (B, 2, N), with the digit that they draw."""

    name: ClassVar[str] = "points"
    summary: ClassVar[str] = "handwritten digits as sets of points"
    Config: ClassVar[type[Section]] = PointsConfig
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,
        "train": {"steps": 2000, "batch_size": 64, "lr": 2e-3, "lr_decay": "cosine"},
        "sample": {"preview": 100},
    }

    def prepare(self, config: PointsConfig) -> DataReport:
        """See :meth:`gendiff.Modality.prepare`. The facts hold how many points digits have."""
        from gendiff_points.model import Data

        train, test = Data("train"), Data("test")
        counts: list[list[int]] = [[] for _ in range(10)]
        for cells, digit in zip(train.cells, train.digits, strict=True):
            counts[digit].append(len(cells))
        return DataReport(
            f"{len(train)} training and {len(test)} held-out digits as points", {"counts": counts}
        )

    def dataset(self, config: PointsConfig, facts: Mapping[str, Any], split: str) -> Any:
        """See :meth:`gendiff.Modality.dataset`. An item is (points (2, N), digit)."""
        from gendiff_points.model import Data

        return Data(split)

    def collate(
        self, config: PointsConfig, facts: Mapping[str, Any], items: Sequence[Any]
    ) -> Batch:
        """Pads the points with zeros."""
        import torch

        from gendiff.spaces import Batch, Cond, Masked

        counts = torch.tensor([points.shape[1] for points, _ in items])
        space = Masked(counts, 2, int(counts.max()))
        x = torch.zeros(space.shape)
        for row, (points, _) in zip(x, items, strict=True):
            row[:, : points.shape[1]] = points
        return Batch(x, space, Cond({"digit": torch.tensor([digit for _, digit in items])}))

    def backbone(self, config: PointsConfig, facts: Mapping[str, Any]) -> nn.Module:
        """A transformer without positions."""
        from gendiff_points.model import Network

        return Network(config.width, config.layers)

    def templates(
        self, config: PointsConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        """``digit``: which; the number of points is drawn from the data's.

        Raises:
            ConfigError: No such condition, or no digit.
        """
        import torch

        from gendiff.noise import derive_seed
        from gendiff.spaces import Masked

        cond = request.classes(digit=10)
        counts = []
        for i, d in zip(request.ids, cond["digit"].tolist(), strict=True):
            choices = facts["counts"][d]
            counts.append(choices[derive_seed("count", request.seed, i) % len(choices)])
        return Masked(torch.tensor(counts), 2, max(counts)), cond

    def conditions(self, config: PointsConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        """``digit``."""
        return (Condition("digit", "which digit", range(10), closed=True),)

    def write(
        self,
        config: PointsConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """``00017.csv`` with a point on each line."""
        import numpy as np

        from gendiff_points.model import separate

        paths = [folder / f"{i:05d}.csv" for i in ids]
        for path, points in zip(paths, separate(batch), strict=True):
            np.savetxt(path, points.T.numpy(), "%.4f", ",", header="x,y", comments="")
        return paths

    def preview(
        self, config: PointsConfig, facts: Mapping[str, Any], batch: Batch, path: Path
    ) -> Path:
        """The point sets, ten in a row."""
        from matplotlib.figure import Figure

        from gendiff_points.model import separate

        sets = separate(batch)
        rows = -(-len(sets) // 10)
        figure = Figure(figsize=(10, rows), layout="constrained")
        grid = figure.subplots(rows, 10, squeeze=False)
        for axes in grid.flat:
            axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")
            axes.axis("off")
        for axes, points in zip(grid.flat, sets, strict=False):
            axes.scatter(*points.numpy(), s=8, color="#224488")
        figure.savefig(path)
        return path

    def metrics(
        self,
        config: PointsConfig,
        facts: Mapping[str, Any],
        samples: Batch,
        cache: Path,
        seed: int,
    ) -> list[Measure]:
        """Whether a sample's nearest held-out set is of the digit asked for."""
        from gendiff_points.model import Data, nearest_accuracy

        train, test = (
            self.collate(config, facts, [data[i, seed] for i in range(len(data))])
            for data in (Data("train"), Data("test"))
        )
        return [
            Measure(
                "digit_accuracy",
                nearest_accuracy(samples, test),
                "higher",
                nearest_accuracy(train, test),
                "share whose nearest of 360 held-out point sets, as blurred pictures, is of the "
                "digit asked for; floor: training data",
            )
        ]


@gendiff.hookimpl
def gendiff_modality() -> Modality:
    """Hands the modality to gendiff."""
    return PointsModality()
