"""Judging a run: the modality's own metrics and the held-out loss by noise level."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gendiff import console
from gendiff.config import SampleConfig
from gendiff.data import InOrder, loader
from gendiff.generate import Model
from gendiff.modality import Measure
from gendiff.noise import StepNoise
from gendiff.objective import Objective
from gendiff.runs import write_atomically
from gendiff.spaces import join


def evaluate(
    model: Model, settings: SampleConfig, n: int, seed: int, cache: Path
) -> dict[str, Any]:
    """Draws n samples, measures, and writes ``evaluation.json`` into the run.

    Args:
        model: The model.
        settings: How to sample.
        n: How many samples.
        seed: Their seed.
        cache: Folder for what the metrics may keep.
    """
    run = model.run
    batches = []
    with console.progress(n, 0, "samples") as bar:
        for batch in model.batches(list(range(n)), settings, seed):
            batches.append(batch.to("cpu"))
            bar(sum(b.space.batch_size for b in batches))
    cache.mkdir(parents=True, exist_ok=True)
    measures = run.modality.metrics(run.section, run.facts, join(batches), cache, seed)
    result = {
        "step": model.step,
        "samples": n,
        "seed": seed,
        "sampling": settings.model_dump(mode="json"),
        "guide": None if model.guide is None else model.guide.name,
        "network_calls": model.calls(settings),
        "measures": [asdict(measure) for measure in measures],
        "heldout_loss_by_log_snr": heldout_loss(model),
    }
    write_atomically(run.folder / "evaluation.json", json.dumps(result, indent=1))
    return result


def show(result: dict[str, Any]) -> None:
    """Prints an evaluation as a table, with its conditions."""
    rows = []
    for data in result["measures"]:
        m = Measure(**data)
        floor = "" if m.floor is None else f"{m.floor:.4g}"
        rows.append([m.name, f"{m.value:.4g}", floor, m.better, m.note])
    console.table("", ["measure", "samples", "real data", "better", "definition"], rows)
    loss = "  ".join(f"{k}: {v:.4f}" for k, v in result["heldout_loss_by_log_snr"].items())
    console.say(f"held-out loss by log-SNR: {loss}")
    console.say(
        f"{result['samples']} samples, seed {result['seed']}, step {result['step']}, "
        f"{result['network_calls']} network calls each"
    )


@torch.no_grad()
def heldout_loss(model: Model, limit: int = 2048) -> dict[str, float]:
    """The training loss on held-out data at fixed log-SNRs, with fixed noise.

    Args:
        model: The model.
        limit: At most so many items of the held-out split.
    """
    run, d = model.run, model.run.config.diffusion
    data = run.modality.dataset(run.section, run.facts, "test")
    objective = Objective(d.times, d.weight, category_weight=d.category_weight)
    denoiser = model.denoiser
    model.network.eval()
    ends = d.schedule.log_snr(torch.tensor([1.0], dtype=torch.float64)).min().item()
    levels = [level for level in range(-8, 9, 4) if level > ends]
    totals = dict.fromkeys(levels, 0.0)
    count = 0
    order = InOrder(len(data), 64)  # type: ignore[arg-type]
    collate = partial(run.modality.collate, run.section, run.facts)
    for index, batch in enumerate(loader(data, collate, order)):
        batch = batch.to(model.device)
        noise = batch.space.noise(StepNoise(0, 0, model.device, batch.x.dtype), index)
        size = batch.space.batch_size
        for level in levels:
            t = d.schedule.inverse(torch.full((size,), float(level), dtype=torch.float64))
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.autocast):
                loss = objective.at(denoiser, batch, t, noise)
            totals[level] += loss.per_sample.sum().item()
        count += size
        if count >= limit:
            break
    return {str(level): total / count for level, total in totals.items() if math.isfinite(total)}
