"""Pictures of mel-spectrograms."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from gendiff_speech.mel import MelConvention

MOST = 24


def grid(
    mels: Sequence[Tensor], titles: Sequence[str], convention: MelConvention, path: Path
) -> Path:
    """Log mels (mels, T), drawn on one scale of colours with seconds and bands as axes, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(len(mels), MOST)
    columns = min(5, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.6 * columns, 1.9 * rows), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    second = convention.sample_rate_hz / convention.hop
    low = min(float(mel.min()) for mel in mels[:count])
    high = max(float(mel.max()) for mel in mels[:count])
    longest = max(mel.shape[1] for mel in mels[:count]) / second
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis, mel, title in zip(axes, mels[:count], titles[:count], strict=False):
        extent = (0, mel.shape[1] / second, 0, mel.shape[0])
        axis.imshow(mel.numpy(), origin="lower", aspect="auto", extent=extent, vmin=low, vmax=high)
        axis.set_xlim(0, longest)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=6)
    figure.supxlabel("seconds", fontsize=8)
    figure.supylabel("mel band", fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return path
