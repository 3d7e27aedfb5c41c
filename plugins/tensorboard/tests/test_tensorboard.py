"""What the tracker wrote, read back by TensorBoard itself."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

tensorboard = pytest.importorskip("tensorboard", reason="needs gendiff-tensorboard")

from gendiff import plugins  # noqa: E402
from gendiff.testing import ToyModality  # noqa: E402
from gendiff_tensorboard import Tracker  # noqa: E402


def written(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything = {"scalars": 0, "images": 0}
    found = EventAccumulator(str(run / "tensorboard"), size_guidance=everything)
    return found.Reload()


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in written(run).Scalars(tag)]


def train(out: Path, *overrides: str) -> Path:
    from gendiff import config, runs
    from gendiff.train import train

    toy = ToyModality()
    resolved = config.resolve(toy, overrides=[f"out={out}", *overrides])
    facts = toy.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    run = runs.start(toy, resolved, facts, accept_changes=True)
    assert train(run)
    return run.folder


@pytest.fixture
def tracked() -> Any:
    """A tracker of its own, in place of one that is installed."""
    manager, tracker = plugins._extras(), Tracker()
    installed = manager.unregister(name="tensorboard")
    manager.register(tracker)
    yield tracker
    manager.unregister(tracker)
    if installed is not None:
        manager.register(installed, "tensorboard")


@pytest.mark.usefixtures("tracked")
def test_a_run_s_numbers_and_pictures_are_read_back(tmp_path: Path) -> None:
    from PIL import Image

    folder = train(tmp_path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "lr", "grad_norm"):
        expected = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows]
        assert scalars(folder, key) == expected
    for name in rows[0]["loss_by_log_snr"]:
        kept = [r for r in rows if name in r["loss_by_log_snr"]]
        assert scalars(folder, f"loss_by_log_snr/{name}") == [
            (r["step"], pytest.approx(r["loss_by_log_snr"][name], rel=1e-6)) for r in kept
        ]
    pictures = written(folder).Images("preview")
    files = sorted((folder / "samples").glob("step-*.png"))
    assert [f"step-{p.step:08d}.png" for p in pictures] == [file.name for file in files]
    for event, file in zip(pictures, files, strict=True):
        shown = Image.open(io.BytesIO(event.encoded_image_string))
        assert shown.tobytes() == Image.open(file).convert("RGB").tobytes()


@pytest.mark.usefixtures("tracked")
def test_steps_done_twice_count_once(tmp_path: Path) -> None:
    """A run loses its newest checkpoint, as by a kill, and goes on from the one before."""
    import shutil

    folder = train(tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step-00000020")
    train(tmp_path, "train.steps=30")
    assert [step for step, _ in scalars(folder, "loss")] == [5, 10, 15, 20, 25, 30]


def test_another_process_goes_on_too(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    for steps, value in (((5, 10, 15), 1.0), ((10, 15, 20), 2.0)):
        tracker = Tracker()
        for step in steps:
            tracker.gendiff_metrics(folder, step, {"loss": value})
    assert scalars(tmp_path / "run", "loss") == [(5, 1), (10, 2), (15, 2), (20, 2)]


def test_it_loads_without_torch_or_tensorboard() -> None:
    code = (
        "import sys, gendiff_tensorboard; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'tensorboard', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
