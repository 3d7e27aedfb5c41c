"""``check_modality`` finds out whether a modality keeps its side of the contract.

Every check names what it looked at, and raises :class:`PluginError` with what was expected and
what was found. The checks use the modality's own defaults, made small.
"""

from __future__ import annotations

import json
import math
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
from gendiff.errors import CheckpointError, ConfigError, PluginError
from gendiff.evaluate import Judge
from gendiff.generate import Model, restore
from gendiff.metrics import BETTER, FEWEST
from gendiff.modality import Condition, DataReport, Exhibit, Measure, Modality, Request
from gendiff.noise import StepNoise, Streams
from gendiff.spaces import Batch, Cond, Ragged, Space
from gendiff.train import Trainer

STEPS = 40  # on one batch
DRAWS = 16  # of noise, over which the loss on that batch is averaged
CLOSE = 1e-3  # relative: what float32 makes of other shapes of matrices stays far below


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
            "sample.guidance=1",
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
        trainer = Trainer(run)
        yield from _check_training(trainer)
        model = trainer.model()
        yield from _check_network(model)
        yield from _check_sampling(model, Path(folder))
        yield from _check_judging(model, Path(folder))


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
        for part in modality.categories(section, run.facts):
            codes = part.of(batch.x) / part.scale
            live = part.of(space.project(torch.ones_like(batch.x))) > 0.5
            _expect(
                bool(((codes == 0) | (codes == 1)).all())
                and torch.equal(codes.sum(1), live[:, 0].to(codes)),
                "the columns of categories() hold one-hot codes",
                codes,
            )
        yield f"{split}: {len(data)} items, x {tuple(batch.x.shape)}"


def _train_batch(run: runs.Run, size: int) -> Batch:
    data: Any = run.modality.dataset(run.section, run.facts, "train")
    order = VisitOrder(len(data), size, 0)
    return next(loader(data, partial(run.modality.collate, run.section, run.facts), order))


def _check_training(trainer: Trainer) -> Iterator[str]:
    run = trainer.run
    batch = _train_batch(run, run.config.train.batch_size)
    shape, found = tuple(batch.x.shape), tuple(_output(trainer.network, batch).shape)
    _expect(
        found in (shape, (shape[0], 2 * shape[1], *shape[2:])),
        "the network's output is of x's shape, or of twice its width",
        found,
    )
    early = _loss(trainer, batch)
    for _ in range(STEPS):
        trainer.advance([batch])
    late = _loss(trainer, batch)
    unused = [
        name
        for name, p in trainer.network.named_parameters()
        if p.requires_grad
        and not trainer.optimizer.state.get(p, {}).get("exp_avg_sq", p * 0).any()
    ]
    _expect(not unused, "the gradient reaches every parameter", unused)
    _expect(late < 0.95 * early, f"{STEPS} steps on one batch lower its loss", (early, late))
    yield f"{STEPS} steps on one batch: loss {early:.3f} to {late:.3f}"
    path = trainer.save()
    fresh = run.modality.backbone(run.section, run.facts).eval().requires_grad_(False)
    try:
        restore(fresh, checkpoint.load_weights(path), path)
    except CheckpointError as error:
        raise PluginError(
            f"contract broken: expected that weights survive saving; {error}"
        ) from None
    _expect(
        torch.equal(_output(fresh, batch), _output(trainer.model().network, batch)),
        "a network with the saved weights gives what the saved one gave",
        "another output; is there a tensor that is neither parameter nor buffer?",
    )
    yield "weights survive saving"
    path = _after(Trainer(run), 2).save()
    halted = Trainer(run)
    halted.restore(path)
    straight, resumed = (_after(t, 4).network.state_dict() for t in (Trainer(run), halted))
    for name, value in straight.items():
        _expect(torch.equal(resumed[name], value), "training resumes to the bit", name)
    yield "training resumes to the bit"


@torch.no_grad()
def _loss(trainer: Trainer, batch: Batch) -> float:
    """The loss on a batch, always over the same times and noise."""
    trainer.network.eval()
    draws = [
        trainer.objective(
            trainer.denoiser,
            batch,
            StepNoise(0, 0, trainer.device, batch.x.dtype),
            history=trainer.history,
            seed=0,
            step=k,
            slot=0,
            slots=1,
        )
        for k in range(DRAWS)
    ]
    return sum(loss.mean.item() for loss in draws) / DRAWS


@torch.no_grad()
def _output(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """What a network says of a batch at a noise level for each sample, in its place."""
    noise = torch.linspace(-0.5, 0.5, 7)[torch.arange(batch.space.batch_size) % 7]
    out: torch.Tensor = network.eval()(batch.x, noise, batch.cond, batch.space)
    return out


def _check_network(model: Model) -> Iterator[str]:
    """What the space implies: samples do not see each other, nor padding; rows have no order."""
    run, network = model.run, model.network
    batch = _train_batch(run, 7)
    out = _output(network, batch)
    width = batch.x.shape[1]
    out = out[:, :width]
    for i in range(7):
        alone = batch.select([i])
        ours = Batch(batch.space.project(out), batch.space).select([i]).x
        noise = torch.linspace(-0.5, 0.5, 7)[i : i + 1]
        with torch.no_grad():
            theirs = network(alone.x, noise, alone.cond, alone.space)[:, :width]
        gap = _gap(ours, alone.space.project(theirs))
        _expect(gap < CLOSE, "the network says the same of a sample alone and among others", gap)
    yield "the network sees each sample alone, whatever padding and company it has"
    conds: Mapping[str, Any] = {} if batch.cond is None else batch.cond.values
    # A condition that is longer than a number a sample may speak of rows by their order.
    if isinstance(batch.space, Ragged) and all(v.ndim == 1 for v in conds.values()):
        order = _turned(batch.space)
        gap = _gap(_output(network, Batch(batch.x[order], batch.space, batch.cond)), out[order])
        _expect(gap < CLOSE, "the order of a sample's rows means nothing to the network", gap)
        yield "the order of rows means nothing to the network"


def _turned(space: Ragged) -> torch.Tensor:
    """The numbers of the rows, those of each sample from the last to the first."""
    ends = space.sizes.cumsum(0)
    first, last = (ends - space.sizes)[space.index], ends[space.index] - 1
    return first + last - torch.arange(len(space.index))


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item()


def _after(trainer: Trainer, step: int) -> Trainer:
    """The trainer after this step."""
    for result in trainer.steps():
        if result.step == step:
            break
    return trainer


def _check_sampling(model: Model, folder: Path) -> Iterator[str]:
    run, modality, section = model.run, model.run.modality, model.run.section
    _check_templates(run)
    full, part = model.sample(ids=[0, 1, 2, 3]), model.sample(ids=[2])
    _expect(
        _same(full.select([2]), part),
        "sample 2 is the same alone and among others",
        "another sample",
    )
    for condition in modality.conditions(section, run.facts):
        for value in condition.values:
            _check_condition(run, condition, value)
    yield "a sample depends on its number and the seed alone"
    paths = modality.write(section, run.facts, full, folder, [0, 1, 2, 3])
    _expect(
        len(paths) == len(set(paths)) == 4 and all(p.stat().st_size for p in paths),
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
    if type(modality).given is not Modality.given or type(modality).write is Modality.write:
        yield _read_back(run, folder)


def _check_templates(run: runs.Run) -> None:
    _expect(
        _templates_alone(run),
        "what a template holds for a sample depends on its id and the seed alone",
        "another template",
    )
    batch = _train_batch(run, 2)
    space, cond = run.modality.templates(run.section, run.facts, Request([0, 1], 5))
    of_data, of_samples = ((type(s), s.shape[1]) for s in (batch.space, space))
    _expect(of_data == of_samples, f"templates are of the data's space, {of_data}", of_samples)
    names = [sorted(c.values) if isinstance(c, Cond) else [] for c in (batch.cond, cond)]
    _expect(names[0] == names[1], f"templates have the data's conditions, {names[0]}", names[1])


def _read_back(run: runs.Run, folder: Path) -> str:
    """Two held-out items are written, and read as starts of samples: each is itself again."""
    modality, section = run.modality, run.section
    data: Any = modality.dataset(section, run.facts, "test")
    items = [data[0, 0], data[len(data) // 2, 0]]
    batch = modality.collate(section, run.facts, items)
    paths = modality.write(section, run.facts, batch, folder, [100, 101])
    for row, path in enumerate(paths):
        try:
            given = modality.given(section, run.facts, path, None, Request([0, 1, 2], 5)).batch
        except ConfigError as error:
            return f"no file is read back: {error}"
        _expect(given.space.batch_size == 3, "given() makes a state for each sample", given.space)
        one, back = batch.select([row]).x, given.select([1]).x
        known = back.isfinite() if one.shape == back.shape else torch.zeros(1, dtype=torch.bool)
        _expect(bool(known.any()), f"given() knows {path.name} again", tuple(back.shape))
        missed, spread = (one - back)[known].square().mean(), one[known].var()
        share = (missed / spread).item()
        _expect(share < 0.5, f"what write() wrote is read back from {path.name}", share)
    return f"a {paths[0].suffix} is read back as it was written"


def _check_judging(model: Model, folder: Path) -> Iterator[str]:
    """Of samples that are hardly any yet, which must do no harm, and of training items."""
    run, cache = model.run, folder / "cache"
    modality, section = run.modality, run.section
    cache.mkdir()
    poor = list(modality.metrics(section, run.facts, model.sample(16), cache, 0))
    _expect(all(isinstance(m, Measure) for m in poor), "metrics() returns Measures", poor)
    samples = _train_batch(run, 16)
    measures = Judge(run, cache, 0).measures(samples)
    names = [m.name for m in measures]
    _expect(len(set(names)) == len(names), "no two measures have one name", names)
    for m in measures:
        known = [m.value] if m.floor is None else [m.value, m.floor]
        _expect(all(math.isfinite(v) for v in known), "figures of real data are finite", m)
        _expect(m.better in BETTER.values(), "of a figure lower or higher is better", m)
    floors = {m.name: m.floor for m in measures if m.floor is not None}
    if len(modality.reference(section, run.facts)) >= FEWEST:  # of fewer little can be said
        best = [name for name in modality.headline if name in floors]
        _expect(bool(best), f"a figure of {modality.headline} has a floor", sorted(floors))
    both, each = (
        modality.features(section, run.facts, parts, cache, 0).values
        for parts in ([samples], [samples.select([i]) for i in range(16)])
    )
    _expect(len(both) == 16, "features() has a row for each sample", len(both))
    gap = _gap(each, both) if each.shape == both.shape else float("inf")
    _expect(gap < CLOSE, "features() do not depend on the batches' sizes", gap)
    yield f"judged by {len(measures)} figures, {len(floors)} of them beside those of real data"


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
