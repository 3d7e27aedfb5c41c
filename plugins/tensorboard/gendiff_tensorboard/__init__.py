"""TensorBoard for gendiff: an observer of the group ``gendiff.plugins``.

Imports neither torch nor tensorboard until a run logs something.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gendiff import hookimpl

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Tracker:
    """Writes what runs log and draw to ``RUN/tensorboard``."""

    def __init__(self) -> None:
        self._writers: dict[str, tuple[SummaryWriter, int]] = {}  # and the last step with numbers

    @hookimpl
    def gendiff_metrics(self, run: str, step: int, metrics: Mapping[str, float]) -> None:
        """A scalar for each number."""
        writer = self._writer(run, step, step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    @hookimpl
    def gendiff_preview(self, run: str, step: int, path: str) -> None:
        """The picture, under ``preview``."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        writer = self._writer(run, step, step - 1)  # a step's numbers come before its picture
        writer.add_image("preview", pixels, step, dataformats="HWC")
        writer.flush()

    def _writer(self, run: str, step: int, numbered: int) -> SummaryWriter:
        """The run's writer; a new one where the run goes on from an earlier step.

        ``numbered``: the last step that has its numbers once this call is served.
        """
        from torch.utils.tensorboard import SummaryWriter

        writer, last = self._writers.get(run, (None, -1))
        if writer is not None and (numbered == last == step or step < last):
            writer.close()
            writer = None
        if writer is None:
            # Hides what older files say of this step and later ones.
            writer = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step)
            last = -1
        self._writers[run] = writer, max(numbered, last)
        return writer


tracker = Tracker()
