"""``check_modality`` finds out whether a modality keeps its side of the contract.

Every check names what it looked at, and raises :class:`PluginError` with what was expected and
what was found. The checks use the modality's own defaults, made small.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gendiff import checkpoint, config, plugins, runs
from gendiff.data import VisitOrder, loader
from gendiff.errors import ConfigError, PluginError
from gendiff.generate import restore
from gendiff.modality import Condition, DataReport, Exhibit, Modality, Request
from gendiff.noise import Streams
from gendiff.spaces import Batch, Space
from gendiff.train import Trainer


def check_modality(modality: str | Modality, overrides: Sequence[str] = ()) -> Iterator[str]:
    """Runs the checks and yields a line for each that holds.

    Args:
        modality: Its name (its entry point is then checked too), or the object itself.
        overrides: ``key=value``, to point it at data or to make it smaller.

    Raises:
        PluginError: A check failed.
    """
    if isinstance(modality, str):
        yield _imports_no_torch(modality)
        modality = plugins.modality(modality)
    with tempfile.TemporaryDirectory() as folder:
        small = (
            "train.batch_size=8",
            "train.accumulate=1",
            "train.warmup_steps=0",
            "train.compile=false",
            "sample.steps=2",
            "diffusion.cond_dropout=0",
            "train.steps=1000",
            f"out={folder}",
            "device=cpu",
            *overrides,
        )
        resolved = config.resolve(modality, overrides=small)
        section = getattr(resolved, modality.name)
        report = modality.prepare(section)
        _expect(isinstance(report, DataReport), "prepare() returns a DataReport", report)
        _expect(
            json.loads(json.dumps(report.facts)) == report.facts,
            "the facts survive JSON (no tuples, no numbers as keys)",
            report.facts,
        )
        yield f"data: {report.summary}"
        run = runs.start(modality, resolved, report.facts)
        yield from _check_data(run)
        yield from _check_training(run)
        yield from _check_sampling(run, Path(folder))


def _expect(holds: bool, what: str, found: Any) -> None:
    if not holds:
        raise PluginError(f"contract broken: expected that {what}; found {found!r}")


def _imports_no_torch(name: str) -> str:
    code = (
        f"import sys; from gendiff import plugins; plugins.modality({name!r}); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    _expect(
        done.returncode == 0,
        "the entry point loads without importing torch",
        done.stderr.strip().splitlines()[-1:] or "torch was imported",
    )
    return "the entry point loads without torch"


def _check_data(run: runs.Run) -> Iterator[str]:
    modality, section = run.modality, run.section
    for split in ("train", "test"):
        data: Any = modality.dataset(section, run.facts, split)
        _expect(len(data) > 0, f"the {split} split has items", len(data))
        items = [data[0, 7], data[min(1, len(data) - 1), 7]]
        batch, again = (
            modality.collate(section, run.facts, items),
            modality.collate(section, run.facts, [data[0, 7], data[min(1, len(data) - 1), 7]]),
        )
        _expect(
            torch.equal(batch.x, again.x),
            "an item is a function of its index and seed",
            "two different items",
        )
        space = batch.space
        _expect(
            isinstance(space, Space) and tuple(batch.x.shape) == tuple(space.shape),
            "x has its space's shape",
            (tuple(batch.x.shape), space),
        )
        _expect(space.batch_size == 2, "two items make two samples", space.batch_size)
        _expect(bool(batch.x.isfinite().all()), "the data are finite", batch.x)
        gap = (space.project(batch.x) - batch.x).abs().max().item()
        _expect(gap < 1e-5, "the data lie in the space's subspace", gap)
        width = modality.bin_width(section, run.facts)
        if width is not None:
            live = batch.x[space.project(torch.ones_like(batch.x)) > 0.5]
            steps = (live - live.min()).double() / width
            gap = (steps - steps.round()).abs().max().item()
            _expect(gap < 0.01, "discrete data are multiples of bin_width() apart", gap)
        yield f"{split}: {len(data)} items, x {tuple(batch.x.shape)}"


def _check_training(run: runs.Run) -> Iterator[str]:
    trainer = Trainer(run)
    data: Any = run.modality.dataset(run.section, run.facts, "train")
    order = VisitOrder(len(data), run.config.train.batch_size, 0)
    batch = next(loader(data, partial(run.modality.collate, run.section, run.facts), order))
    losses = [trainer.advance([batch]).loss.mean.item() for _ in range(40)]
    early, late = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
    _expect(late < early, "40 steps on one batch lower the loss", (early, late))
    unused = [
        name
        for name, p in trainer.network.named_parameters()
        if not trainer.optimizer.state.get(p)
    ]
    _expect(not unused, "the gradient reaches every parameter", unused)
    yield f"40 steps on one batch: loss {early:.3f} to {late:.3f}"
    path = trainer.save()
    fresh = run.modality.backbone(run.section, run.facts)
    restore(fresh, checkpoint.load_weights(path), path)
    for name, value in trainer.ema.module.state_dict().items():
        _expect(torch.equal(fresh.state_dict()[name], value), "weights survive saving", name)
    yield "weights survive saving"
    path = _after(Trainer(run), 2).save()
    halted = Trainer(run)
    halted.restore(path)
    straight, resumed = (_after(t, 4).network.state_dict() for t in (Trainer(run), halted))
    for name, value in straight.items():
        _expect(torch.equal(resumed[name], value), "training resumes to the bit", name)
    yield "training resumes to the bit"


def _after(trainer: Trainer, step: int) -> Trainer:
    """The trainer after this step."""
    for result in trainer.steps():
        if result.step == step:
            break
    return trainer


def _check_sampling(run: runs.Run, folder: Path) -> Iterator[str]:
    modality, section = run.modality, run.section
    model = Trainer(run).model()
    full, part = model.sample(ids=[0, 1, 2, 3]), model.sample(ids=[2])
    _expect(
        _same(full.select([2]), part),
        "sample 2 is the same alone and among others",
        "another sample",
    )
    for condition in modality.conditions(section, run.facts):
        for value in condition.values:
            _check_condition(run, condition, value)
    _expect(
        _templates_alone(run),
        "what a template holds for a sample depends on its id and the seed alone",
        "another template",
    )
    paths = modality.write(section, run.facts, full, folder, [0, 1, 2, 3])
    _expect(
        len(paths) == 4 and all(p.stat().st_size for p in paths),
        "write() makes a file for each sample",
        paths,
    )
    preview = modality.preview(section, run.facts, full, folder / "preview.png")
    _expect(preview.stat().st_size > 0, "preview() makes a picture", preview)
    shown = modality.exhibits(section, run.facts, full, [0, 1, 2, 3])
    _expect(
        len(shown) == 4 and all(isinstance(e, Exhibit) for e in shown),
        "exhibits() shows each sample",
        shown,
    )
    yield f"4 samples written, as {paths[0].suffix}, a preview, and an exhibit of each"


def _check_condition(run: runs.Run, condition: Condition, value: Any) -> None:
    request = Request([0, 1], 5, {condition.name: value})
    size: Any
    try:
        size = run.modality.templates(run.section, run.facts, request)[0].batch_size
    except ConfigError as error:
        size = str(error)
    what = f"templates() takes {condition.name}={value}, as conditions() says"
    _expect(size == len(request.ids), what, size)


def _templates_alone(run: runs.Run) -> bool:
    def noise(ids: list[int]) -> Batch:
        space, cond = run.modality.templates(run.section, run.facts, Request(ids, 5))
        return Batch(space.noise(Streams(5, tuple(ids)), 0), space, cond)

    return _same(noise([0, 1, 2]).select([1]), noise([1]))


def _same(a: Batch, b: Batch) -> bool:
    conds: list[Mapping[str, Any]] = [{} if v.cond is None else v.cond.values for v in (a, b)]
    return (
        torch.equal(a.x, b.x)
        and conds[0].keys() == conds[1].keys()
        and all(_alike(conds[0][k], conds[1][k]) for k in conds[0])
    )


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for zeros behind: a batch pads conditions of different lengths."""
    if a.dim() != b.dim() or a.shape[:1] != b.shape[:1]:
        return False
    shape = [max(pair) for pair in zip(a.shape, b.shape, strict=True)]
    padded = [v.new_zeros(shape) for v in (a, b)]
    for out, v in zip(padded, (a, b), strict=True):
        out[tuple(slice(size) for size in v.shape)] = v
    return torch.equal(*padded)
