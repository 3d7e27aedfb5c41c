"""Samples as files: what ``gendiff sample`` and ``gendiff edit`` leave in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gendiff import console
from gendiff.config import SampleConfig
from gendiff.generate import Model, Wish, mean_calls, said_calls
from gendiff.runs import Run
from gendiff.shards import Files
from gendiff.spaces import Batch, join
from gendiff.world import World

PREVIEW = 1024  # samples of a preview at most


@dataclass(frozen=True)
class Order:
    """Which samples are made, and where they go.

    Args:
        model: What makes them.
        run: Its run, with the keys by which samples are written.
        settings: How they are drawn.
        wish: What they are to be.
        seed: Their seed.
        ema_width: What the model was loaded with.
        out: The folder.
    """

    model: Model
    run: Run
    settings: SampleConfig
    wish: Wish
    seed: int
    ema_width: float | None
    out: Path


def produce(order: Order, count: int, world: World) -> None:
    """Writes this process's share of the first ``count`` samples that are not there yet.

    The first process also draws a preview of all, up to ``PREVIEW``.

    Raises:
        ConfigError, SamplingError, DataError, RunError: They cannot be made or written.
    """
    model, run, settings = order.model, order.run, order.settings
    wish, seed = order.wish, order.seed
    identity = model.identity(settings, seed, wish, order.ema_width)
    files = Files(order.out, world, identity, model.block)
    missing = files.missing(count)
    shown = list(range(min(count, PREVIEW)))
    batches: list[Batch] = []
    counts: list[int] = []
    done = 0
    with console.progress(len(missing), 0, "samples") as bar:
        for batch in model.batches(missing, settings, seed, wish, counts=counts):
            batch = batch.to("cpu")
            ids = missing[done : done + batch.space.batch_size]
            files.add(ids, partial(run.modality.write, run.section, run.facts, batch, ids=ids))
            if done < PREVIEW:
                batches.append(batch)
            done += len(ids)
            bar(done)
    if not world.first:
        console.say(f"{done} samples of share {world.rank}/{world.size} in {order.out}")
        return
    picture = order.out / "preview.png"
    if done or not picture.exists():
        if missing[: len(shown)] != shown:  # some were made before, or by others
            batches = [b.to("cpu") for b in model.batches(shown, settings, seed, wish)]
        preview = join(batches)
        if preview.space.batch_size > len(shown):
            preview = preview.select(shown)
        run.modality.preview(run.section, run.facts, preview, picture)
    files.close()
    calls = mean_calls(model.calls(settings, wish), counts)
    whose = f"{done} samples of share 0/{world.size}" if world.size > 1 else f"{count} samples"
    console.say(f"{whose} in {order.out} ({said_calls(calls)} each)")
    console.say(f"preview: {picture}")


def film(order: Order) -> None:
    """Draws how sample 0 came about, where the modality draws films."""
    run = order.run
    frames = order.model.film(0, order.settings, order.seed, order.wish)
    path = run.modality.film(run.section, run.facts, frames, order.out / "film.gif")
    console.say(f"film: {path}" if path else f"{run.modality.name} draws no films")
