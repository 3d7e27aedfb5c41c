"""Judging a run: the modality's metrics, the held-out loss by noise level, the likelihood."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gendiff import console, distributed, metrics
from gendiff.config import SampleConfig
from gendiff.data import InOrder, loader
from gendiff.generate import Model, make_objective, mean_calls, said_calls
from gendiff.likelihood import ode_log_likelihood
from gendiff.metrics import Floors, Reals
from gendiff.modality import Features, Measure
from gendiff.noise import StepNoise, Streams, derive_seed
from gendiff.runs import Run, write_atomically
from gendiff.spaces import Batch, join

LIMITS = {"test": 10_000, "train": 50_000}  # items of a split that samples are compared with


def evaluate(
    model: Model,
    settings: SampleConfig,
    n: int,
    seed: int,
    cache: Path,
    items: int = 0,
    ode_steps: int = 32,
) -> dict[str, Any]:
    """Draws n samples, measures, and writes ``evaluation.json`` into the run.

    In a group of processes (:mod:`gendiff.distributed`) each draws its share; process 0 does the
    rest, and the others return an empty result.

    Args:
        model: The model.
        settings: How to sample.
        n: How many samples.
        seed: Their seed.
        cache: Folder for what the metrics may keep.
        items: How many held-out items the likelihood is taken of; 0 for none.
        ode_steps: Steps of its ODE.

    Raises:
        SamplingError: The likelihood cannot be had for the run's schedule.
    """
    run = model.run
    world = distributed.present()
    ids = [i for i in range(n) if world.owns(i // model.block)]
    batches: list[tuple[int, Batch]] = []  # with the id of its first sample
    counts: list[int] = []
    done = 0
    with console.progress(len(ids), 0, "samples") as bar:
        for batch in model.batches(ids, settings, seed, counts=counts):
            batches.append((ids[done], batch.to("cpu")))
            done += batch.space.batch_size
            bar(done)
    shares = distributed.collect(batches)
    counts = [calls for share in distributed.collect(counts) for calls in share]
    if not world.first:
        return {}
    batches = sorted((b for share in shares for b in share), key=lambda pair: pair[0])
    measures = Judge(run, cache, seed).measures(join([b for _, b in batches]))
    result = {
        "step": model.step,
        "samples": n,
        "seed": seed,
        "resamples": metrics.RESAMPLES,
        "sampling": settings.model_dump(mode="json"),
        "guide": None if model.guide is None else model.guide.name,
        "network_calls": mean_calls(model.calls(settings), counts),
        "measures": [asdict(measure) for measure in measures],
        "verdicts": [asdict(verdict) for verdict in metrics.verdicts(measures, n)],
        "heldout_loss_by_log_snr": heldout_loss(model),
    }
    if items:
        result["heldout_likelihood"] = heldout_likelihood(model, items, ode_steps, seed)
    write_atomically(run.folder / "evaluation.json", json.dumps(result, indent=1))
    return result


class Judge:
    """What the samples of a run are compared with; found once for any number of sets of them.

    Args:
        run: The run whose data they are compared with.
        cache: Folder for what the metrics may keep.
        seed: Names the choices of real data and the resamples.
    """

    def __init__(self, run: Run, cache: Path, seed: int) -> None:
        cache.mkdir(parents=True, exist_ok=True)
        self.run, self.cache, self.seed = run, cache, seed
        self.real = reals(run, cache, seed)
        self._floors: dict[int, Floors | None] = {}

    def measures(self, samples: Batch, names: Set[str] | None = None) -> list[Measure]:
        """The figures of samples on the CPU, the modality's headline first.

        With ``names``, of the modality's own no more are found than it takes to have those.
        """
        run, count = self.run, samples.space.batch_size
        found: list[Measure] = []
        wanted = None if names is None else names - metrics.BETTER.keys()
        if wanted is None or wanted:
            own = run.modality.metrics(run.section, run.facts, samples, self.cache, self.seed)
            found = list(own) if wanted is None else _until(own, wanted)
        made = _features(run, [samples], self.cache, self.seed)
        if count not in self._floors:
            self._floors[count] = self.real.floors(count)
        found += self.real.measures(made.values, self._floors[count])
        order = {name: rank for rank, name in enumerate(run.modality.headline)}
        return sorted(found, key=lambda measure: order.get(measure.name, len(order)))


def _until(measures: Iterable[Measure], names: Set[str]) -> list[Measure]:
    """Measures up to the last of those with the names."""
    found = []
    for measure in measures:
        found.append(measure)
        if names <= {one.name for one in found}:
            break
    return found


def reals(run: Run, cache: Path, seed: int) -> Reals:
    """The real data of a run as features, to compare samples with."""
    modality, section, facts = run.modality, run.section, run.facts
    collate = partial(modality.collate, section, facts)
    found = {}
    for split, limit in LIMITS.items():
        data: Any = modality.dataset(section, facts, split)
        numbers = modality.reference(section, facts) if split == "test" else range(len(data))
        count = min(len(numbers), limit)
        keys = [(numbers[i * len(numbers) // count], 0) for i in range(count)]
        order = [keys[i : i + 256] for i in range(0, count, 256)]
        found[split] = _features(run, loader(data, collate, order), cache, seed)
    return Reals(found["test"].values, found["train"].values, found["test"].about, seed)


def _features(run: Run, batches: Iterable[Batch], cache: Path, seed: int) -> Features:
    return run.modality.features(run.section, run.facts, batches, cache, seed)


def show(result: dict[str, Any]) -> None:
    """Prints an evaluation as a table, with its conditions; what notes share stands below it."""
    notes = [data["note"].split("; ") for data in result["measures"]]
    often = Counter(part for note in notes for part in note)
    shared = {part: f"[{i}]" for i, part in enumerate((p for p in often if often[p] > 1), 1)}
    rows = []
    for data, note in zip(result["measures"], notes, strict=True):
        m = Measure(**data)
        floor = "" if m.floor is None else f"{m.floor:.4g}"
        error = "" if m.error is None else f" ± {m.error:.2g}"
        own = "; ".join(part for part in note if part not in shared)
        said = " ".join([own, *(shared[part] for part in note if part in shared)])
        rows.append([m.name, f"{m.value:.4g}{error}", floor, m.better, said.strip()])
    header = ["measure", "samples", "real data", "better", "definition, reference set and counts"]
    console.table("", header, rows)
    for part, mark in shared.items():
        console.say(f"{mark} {part}")
    for verdict in result["verdicts"]:
        console.say(f"verdict: {verdict['name']}: {verdict['text']}")
    if result["samples"] < metrics.FEWEST:
        console.say(f"verdict: none of fewer than {metrics.FEWEST} samples")
    elif not result["verdicts"]:
        console.say("verdict: neither untrained, nor collapsed, nor memorised")
    loss = "  ".join(f"{k}: {v:.4f}" for k, v in result["heldout_loss_by_log_snr"].items())
    console.say(f"held-out loss by log-SNR: {loss}")
    if "heldout_likelihood" in result:
        console.say(_likelihood_line(result["heldout_likelihood"]))
    console.say(
        f"{result['samples']} samples, seed {result['seed']}, step {result['step']}, "
        f"{said_calls(result['network_calls'])} each; ±: standard error, by "
        f"{result['resamples']} resamples of the samples or, for the modality's own, by formula"
    )


def _likelihood_line(found: dict[str, Any]) -> str:
    error = found["standard_error"]
    line = f"held-out log-likelihood: {found['nats_per_dim']:.4f} ± {error:.4f} nats/dim"
    if found["bits_per_dim"] is None:
        what = "a density of the state, its scaled and its one-hot columns as they are"
    else:
        line += f", {found['bits_per_dim']:.4f} ± {error / math.log(2):.4f} bits/dim"
        what = f"values {found['bin_width']:.4g} apart, uniformly dequantised: a bound on bits"
    return f"{line} ({found['items']} items, {found['ode_steps']} steps of the ODE; {what})"


def heldout_likelihood(model: Model, items: int, steps: int, seed: int) -> dict[str, Any]:
    r"""The log-likelihood of held-out items by the probability-flow ODE, in nats/dim.

    One probe on the sphere estimates the divergence, without bias: what it adds to the spread is
    part of the standard error, which is that of the mean over the items. The network runs in
    float32. Where the modality's data are discrete, each value gets uniform noise as wide as the
    distance w between values, and the density of the sum bounds the data's probability,

    .. math:: -\log P(x) \le -\mathbb E_u \log p(x + w u) - dof \log w, \quad
              u \sim \mathcal U[-\tfrac12, \tfrac12]

    (Theis et al., 2016, https://arxiv.org/abs/1511.01844, section 3.1).

    Args:
        model: The model.
        items: At most so many items of the held-out split, spread over it evenly.
        steps: Steps of the ODE, each of four network calls and their gradients.
        seed: Names the probes and the noise.

    Raises:
        SamplingError: The parts of the state have schedules of their own.
    """
    run = model.run
    data = run.modality.dataset(run.section, run.facts, "test")
    width = run.modality.bin_width(run.section, run.facts)
    size: int = len(data)  # type: ignore[arg-type]
    count = min(items, size)
    keys = [(i * size // count, 0) for i in range(count)]
    order = [keys[i : i + 64] for i in range(0, count, 64)]
    collate = partial(run.modality.collate, run.section, run.facts)
    denoiser = model.denoiser
    model.network.eval()
    found: list[float] = []
    with console.progress(count, 0, "items") as bar:
        for batch in loader(data, collate, order):
            batch = batch.to(model.device)
            space, x = batch.space, batch.x
            ids = tuple(range(len(found), len(found) + space.batch_size))
            if width is not None:
                spread = space.noise(Streams(derive_seed("bins", seed), ids, model.device), 0)
                x = x + width * (torch.special.ndtr(spread) - 0.5)
            nats = ode_log_likelihood(
                denoiser.bind(space, batch.cond),
                Batch(x, space, batch.cond),
                denoiser.schedule,
                steps=steps,
                probes="sphere",
                noise=Streams(derive_seed("probes", seed), ids, model.device),
            )
            found += (nats.cpu() / space.dof().cpu()).tolist()
            bar(len(found))
    values = torch.tensor(found, dtype=torch.float64)
    mean = values.mean().item()
    return {
        "items": len(found),
        "ode_steps": steps,
        "nats_per_dim": mean,
        "standard_error": (values.std() / math.sqrt(len(found))).item(),
        "bin_width": width,
        "bits_per_dim": None if width is None else -(mean + math.log(width)) / math.log(2),
    }


@torch.no_grad()
def heldout_loss(model: Model, limit: int = 2048) -> dict[str, float]:
    """The training loss on held-out data at fixed log-SNRs, with fixed noise.

    Args:
        model: The model.
        limit: At most so many items of the held-out split.
    """
    run, d = model.run, model.run.config.diffusion
    data = run.modality.dataset(run.section, run.facts, "test")
    objective = make_objective(run)
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
