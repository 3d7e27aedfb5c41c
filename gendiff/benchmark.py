"""A suite: modalities, samplers, network calls and guidance, judged alike.

A suite is a YAML file (:class:`Suite`). Every cell of it says how good so many samples are, by
the modality's headline figures and their ratio to the floor that real data set, and what a sample
cost. Runs that are absent are trained; cells that are in the results already are not made again,
so the same command goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, model_validator

from gendiff import checkpoint, config, console, generate, metrics, plugins, runs, standings
from gendiff import train as training
from gendiff.config import RunConfig, SampleConfig
from gendiff.errors import CheckpointError, ConfigError, RunError, SamplingError
from gendiff.evaluate import Judge
from gendiff.generate import Model
from gendiff.modality import Measure, Modality, Section
from gendiff.spaces import Batch, join

Part = str | dict[str, Any]  # a named part, as in a run's configuration
Count = Annotated[int, Field(ge=metrics.FEWEST, le=10**8)]  # as of gendiff sample
Calls = Annotated[int, Field(ge=1, le=10**6)]


class Sampling(Section):
    """A way to sample."""

    sampler: Part = Field(description="the method, as sample.sampler")
    grid: Part | None = Field(None, description="where its times lie; null: the run's")


class Entry(Section):
    """A run, and what of the suite is otherwise for it; null: as in the suite."""

    modality: str | None = Field(None, description="what to generate, by a run that is made")
    run: str | None = Field(None, description="a trained run, seen from the suite's folder")
    config: tuple[str, ...] = Field((), description="YAML files, seen from the suite's folder")
    overrides: dict[str, Any] = Field({}, description="configuration over these: train.steps: 400")
    samples: Count | None = Field(None, description="samples of a cell")
    samplers: tuple[Sampling, ...] | None = Field(None, description="ways to sample")
    calls: tuple[Calls, ...] | None = Field(None, description="network calls of a sample, at most")
    guidance: tuple[Any, ...] | None = Field(None, description="scales or parts of guidance")

    @model_validator(mode="after")
    def _one_of_both(self) -> Entry:
        if (self.modality is None) == (self.run is None):
            raise ValueError("either modality or run is needed")
        if self.run is not None and (self.config or self.overrides):
            raise ValueError("a trained run takes neither config nor overrides")
        return self


class Suite(Section):
    """A benchmark."""

    seed: int = Field(0, ge=0, lt=2**63, description="of samples and of choices of real data")
    samples: Count = Field(200, description="samples of a cell")
    samplers: tuple[Sampling, ...] = Field(
        (Sampling(sampler="dpm++2m"),), min_length=1, description="ways to sample"
    )
    calls: tuple[Calls, ...] = Field(
        (5, 10, 20), min_length=1, description="network calls of a sample, at most"
    )
    guidance: tuple[Any, ...] = Field((1.0,), min_length=1, description="scales of guidance")
    entries: tuple[Entry, ...] = Field(min_length=1, description="the runs")


def read(path: Path) -> Suite:
    """A suite from its file.

    Raises:
        ConfigError: A line for each problem, with the key and a suggestion.
    """
    data = config.read_yaml(path)
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        valid = list(_keys(data))
        sources = {str(key): str(path) for key in data}
        lines = [config.problem_line(problem, valid, sources) for problem in error.errors()]
        raise ConfigError(*dict.fromkeys(lines)) from None


def _keys(data: Mapping[str, Any]) -> Iterator[str]:
    """The keys that are valid, with the numbers that lists have in this file."""
    yield from Suite.model_fields
    entries = data.get("entries")
    places = [("", data)]
    for i, entry in enumerate(entries if isinstance(entries, list) else ()):
        yield from (f"entries.{i}.{key}" for key in Entry.model_fields)
        places.append((f"entries.{i}.", entry if isinstance(entry, dict) else {}))
    for prefix, place in places:
        samplers = place.get("samplers")
        for j in range(len(samplers) if isinstance(samplers, list) else 0):
            yield from (f"{prefix}samplers.{j}.{key}" for key in Sampling.model_fields)


# --- what is to be done --------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One way to sample from one run.

    Args:
        settings: The settings, with the steps that take no more calls than asked for.
        calls: The network calls that a sample takes; None: to be counted.
        samples: How many are judged.
        key: What the results are found by: all that they depend on.
    """

    settings: SampleConfig
    calls: int | None
    samples: int
    key: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run and its cells.

    Args:
        modality: What it generates.
        config: What it is made from.
        folder: Where it is, if it is to be taken as it is.
        cells: Ways to sample from it.
    """

    modality: Modality
    config: RunConfig
    folder: Path | None
    cells: tuple[Cell, ...]


def budgets(suite: Suite) -> list[int]:
    """All network calls that the suite allows a sample, ascending."""
    own = (entry.calls or suite.calls for entry in suite.entries)
    return sorted({calls for all_calls in own for calls in all_calls})


def plans(suite: Suite, path: Path, device: str | None = None) -> list[Plan]:
    """All that the suite asks for, checked before anything is made.

    Raises:
        ConfigError, PluginError: An entry asks for what there is not.
    """
    found = []
    for number, entry in enumerate(suite.entries):
        where = f"{path}, entries.{number}"
        try:
            found.append(_plan(suite, entry, path, device))
        except (ConfigError, SamplingError, RunError, CheckpointError) as error:
            lines = str(error).splitlines()
            raise ConfigError(*(f"{line} ({where})" for line in lines)) from None
    return found


def _plan(suite: Suite, entry: Entry, path: Path, device: str | None) -> Plan:
    modality, resolved, folder = _source(entry, path, device)
    step = resolved.train.steps if folder is None else _trained(folder / "checkpoints")
    if not step:
        raise CheckpointError(f"{folder} has no checkpoint yet. Run 'gendiff train' first")
    base = config.dump(resolved)
    place = generate.pick_device(device or resolved.device, resolved.threads).type
    told = {k: v for k, v in config.flatten(base).items() if k not in config.VOLATILE}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]
    cells = []
    for way in entry.samplers or suite.samplers:
        for guidance in entry.guidance or suite.guidance:
            sample = {"sampler": way.sampler, "guidance": guidance}
            sample |= {} if way.grid is None else {"grid": way.grid}
            merged = config.merge(base, {"sample": sample})
            settings = config.validate(modality, merged).sample
            for most in entry.calls or suite.calls:
                fitted = _within(resolved, settings, most)
                calls = _calls(resolved, fitted)
                count = entry.samples or suite.samples
                key = {
                    "modality": modality.name,
                    "run": resolved.name,
                    "config": digest,
                    "step": step,
                    "sampling": fitted.model_dump(mode="json", exclude={"preview"}),
                    "samples": count,
                    "seed": suite.seed,
                    "device": place,
                }
                cells.append(Cell(fitted, calls, count, key))
    unlike = {json.dumps(cell.key): cell for cell in cells}  # 9 and 10 calls of Heun are one
    return Plan(modality, resolved, folder, tuple(unlike.values()))


def _trained(checkpoints: Path) -> int:
    """The step of the newest whole checkpoint; 0 if there is none."""
    path = checkpoint.newest(checkpoints, console.warn)
    return 0 if path is None else int(path.name.removeprefix("step-"))


def _source(
    entry: Entry, path: Path, device: str | None
) -> tuple[Modality, RunConfig, Path | None]:
    """Modality and configuration of an entry, and the folder of a run that is trained already."""
    if entry.run is not None:
        run = runs.load(path.parent / entry.run)
        return run.modality, run.config, run.folder
    assert entry.modality is not None
    modality = plugins.modality(entry.modality)
    layers = [("the suite", {"name": f"benchmark-{path.stem}"})]
    layers += [("overrides", config.nested(k, v)) for k, v in entry.overrides.items()]
    if device is not None:
        layers.append(("--device", {"device": device}))
    files = [path.parent / name for name in entry.config]
    return modality, config.resolve_layers(modality, files, layers), None


def _within(resolved: RunConfig, settings: SampleConfig, most: int) -> SampleConfig:
    """The settings with as many steps as so many network calls allow.

    Where these are known afterwards only the settings stay as they are, one cell for any ``most``.

    Raises:
        ConfigError: Even the fewest take more.
    """
    reason = "one step takes more"
    for steps in range(most, 0, -1):
        fitted = settings.model_copy(update={"steps": steps})
        try:
            calls = _calls(resolved, fitted)
            if calls is None:
                return settings
            if calls <= most:
                return fitted
        except SamplingError as error:
            reason = str(error)
    raise ConfigError(f"calls: {most} are not possible with this sampler: {reason}")


def _calls(resolved: RunConfig, settings: SampleConfig) -> int | None:
    schedule = resolved.diffusion.schedule
    times = settings.grid.times(schedule, settings.steps, 1.0)
    return generate.network_calls(settings, schedule, times)


# --- doing it ------------------------------------------------------------------------------------


def benchmark(path: Path, out: Path, device: str | None = None) -> list[dict[str, Any]]:
    """Makes the cells of a suite that are missing in ``out/results.json``.

    Args:
        path: The suite's file.
        out: Folder for the results.
        device: In place of the runs'.

    Returns:
        The cells of the suite, in its order; fewer if training was stopped on request.

    Raises:
        ConfigError: The suite, or an entry, is wrong; nothing was made then.
        RunError: A run's folder holds another run, or the results are damaged.
    """
    suite = read(path)
    todo = plans(suite, path, device)
    kept = out / "results.json"
    known = _known(kept)
    for plan in todo:
        missing = [cell for cell in plan.cells if _name(cell.key) not in known]
        if not missing:
            continue
        model = _model(plan, device)
        if model is None:
            break
        judge = Judge(model.run, runs.cache_folder(), suite.seed)
        for cell in missing:
            found = _measured(model, cell, judge)
            known[_name(cell.key)] = found
            _make_folder(out)
            runs.write_atomically(kept, json.dumps({"cells": list(known.values())}, indent=1))
            console.say(" | ".join(standings.row(found)))
    cells = [known.get(_name(cell.key)) for plan in todo for cell in plan.cells]
    return [cell for cell in cells if cell is not None]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}") from None


def _name(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """The cells that were made before, by their keys."""
    if not path.exists():
        return {}
    try:
        return {_name(cell["key"]): cell for cell in json.loads(path.read_text())["cells"]}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is damaged. Remove it, or choose another --out") from None


def _model(plan: Plan, device: str | None) -> Model | None:
    """The plan's run, trained to its end; None if that was stopped on request."""
    if plan.folder is not None:
        return generate.load(plan.folder, device)
    report = runs.prepare(plan.modality, plan.config)
    console.say(f"{plan.modality.name}: {report.summary}")
    for line in report.warnings:
        console.warn(line)
    run = runs.start(plan.modality, plan.config, report.facts)
    done = _trained(run.checkpoints) == plan.config.train.steps
    if not done and not training.train(run):
        return None
    return generate.load(run.folder, device)


def _measured(model: Model, cell: Cell, judge: Judge) -> dict[str, Any]:
    """One cell of the results."""
    seed = cell.key["seed"]
    next(model.batches([0], cell.settings, seed))  # what is slow once is not timed
    counts: list[int] = []
    with peak_memory(model.device) as memory:
        begin = time.perf_counter()
        samples = _samples(model, cell, seed, counts)
        seconds = time.perf_counter() - begin
    wanted = model.run.modality.headline
    found = judge.measures(samples, set(wanted))
    verdicts = metrics.verdicts(found, cell.samples)
    figures = {m.name: asdict(m) | {"ratio": ratio(m)} for m in found if m.name in wanted}
    return {
        "key": cell.key,
        "network_calls": generate.mean_calls(cell.calls, counts),
        "figures": [figures[name] for name in wanted if name in figures],
        "verdicts": [verdict.name for verdict in verdicts],
        "seconds_per_sample": seconds / cell.samples,
        "peak_memory_mib": memory[0] if memory else None,
        "threads": torch.get_num_threads(),
    }


def _samples(model: Model, cell: Cell, seed: int, counts: list[int]) -> Batch:
    parts = model.batches(list(range(cell.samples)), cell.settings, seed, counts=counts)
    return join([part.to("cpu") for part in parts])  # to the CPU, so that all is done


def ratio(measure: Measure) -> float | None:
    """How many times worse than real data: 1 is as good; None where that cannot be said."""
    if measure.floor is None:
        return None
    pair = (measure.value, measure.floor)
    above, below = pair if measure.better == "lower" else pair[::-1]
    return above / below if below else None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """Holds, afterwards, the most memory in MiB that was in use; nothing where it is not known.

    On CUDA what tensors took; on Linux's CPUs what the whole process had resident.
    """
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) / 2**20)
        return
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        known = device.type == "cpu"
    except OSError:
        known = False
    yield found
    if known:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        found.append(int(lines["VmHWM"].split()[0]) / 1024)
