"""``gendiff report``: one HTML file that tells all of a run, or compares several.

The file holds everything it shows, and its content security policy forbids any request. Charts and
views in space are Plotly's; what a sample looks like is its modality's (``Modality.exhibits``).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendiff import config as configuration
from gendiff import console, generate, panels, runs
from gendiff.errors import CheckpointError, ConfigError, RunError
from gendiff.modality import Exhibit, Measure, Picture
from gendiff.runs import Run
from gendiff.spaces import join

STAGES = 12  # frames of a film, and at most so many pictures of a run's history
COLOURS = 6  # of runs, in the style sheet; more runs go round them
LISTED = 24  # a fact with more entries is told by their number


@dataclass(frozen=True)
class Film:
    """How one sample came about.

    Args:
        stages: An exhibit for some of the steps, the first and the last among them.
        numbers: Which steps, counted from 1.
        steps: How many there were.
    """

    stages: Sequence[Exhibit]
    numbers: Sequence[int]
    steps: int


@dataclass(frozen=True)
class Drawn:
    """What the newest checkpoint of a run gives.

    Args:
        step: Its training step.
        parameters: Numbers in the network.
        calls: Network calls a sample.
        exhibits: The samples.
        film: How the first one came about.
    """

    step: int
    parameters: int
    calls: float | None
    exhibits: Sequence[Exhibit]
    film: Film


@dataclass(frozen=True)
class Told:
    """All that the page tells of a run.

    Args:
        name: What the run is called on the page.
        run: The run.
        record: Its ``run.json``: command line, versions.
        metrics: The rows of its ``metrics.jsonl``.
        evaluation: Its ``evaluation.json``, or None.
        history: The pictures drawn in training, by their step.
        drawn: Samples; None without a checkpoint.
    """

    name: str
    run: Run
    record: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any] | None
    history: Mapping[int, Picture]
    drawn: Drawn | None


def write(
    folders: Sequence[Path],
    out: Path | None,
    n: int = 16,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Draws samples of each run and writes the page.

    Args:
        folders: The runs, at least one.
        out: The file; None for ``report.html`` in the first run's folder.
        n: How many samples of each run.
        seed: Their seed.
        device: In place of the runs'.

    Raises:
        RunError, PluginError, CheckpointError: A run cannot be opened.
        ConfigError: The file cannot be written, or the extra ``report`` is not installed.
    """
    plotly = panels.plotly("report")  # what is missing is said before anything is sampled
    out = out or folders[0] / "report.html"
    told = [
        _told(folder, name, n, seed, device)
        for folder, name in zip(folders, _names(folders), strict=True)
    ]
    text = page(told, seed, plotly)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """``modality/name`` of each run, or its path where two are called alike."""
    short = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    return short if len(set(short)) == len(short) else [str(folder) for folder in folders]


def _told(folder: Path, name: str, n: int, seed: int, device: str | None) -> Told:
    run = runs.load(folder)
    evaluation = _evaluation(folder / "evaluation.json")
    try:
        drawn = _drawn(folder, n, seed, device)
    except CheckpointError as error:
        if run.checkpoints.exists() and any(run.checkpoints.iterdir()):
            raise
        console.warn(f"{error}; the report goes without samples")
        drawn = None
    return Told(
        name,
        run,
        json.loads((folder / "run.json").read_text()),
        _metrics(folder / "metrics.jsonl"),
        evaluation,
        _history(run.samples),
        drawn,
    )


def _drawn(folder: Path, n: int, seed: int, device: str | None) -> Drawn:
    """Draws n samples, and the first of them again, step by step."""
    model = generate.load(folder, device)
    run, settings, ids = model.run, model.run.config.sample, list(range(n))
    batches, counts = [], list[int]()
    with console.progress(n, 0, "samples") as bar:
        for batch in model.batches(ids, settings, seed, counts=counts):
            batches.append(batch.to("cpu"))
            bar(sum(b.space.batch_size for b in batches))
    frames = model.film(0, settings, seed)
    last = len(frames) - 1
    some = sorted({round(i * last / (STAGES - 1)) for i in range(STAGES)})
    stages = run.modality.stages(run.section, run.facts, [frames[i] for i in some])
    return Drawn(
        model.step,
        sum(p.numel() for p in model.network.parameters()),
        generate.mean_calls(model.calls(settings), counts),
        run.modality.exhibits(run.section, run.facts, join(batches), ids),
        Film(stages, [i + 1 for i in some], len(frames)),
    )


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def _evaluation(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return {
            **{key: found[key] for key in ("step", "samples", "seed", "network_calls")},
            "measures": [Measure(**m) for m in found["measures"]],
            "heldout_loss_by_log_snr": found["heldout_loss_by_log_snr"],
            "heldout_likelihood": found.get("heldout_likelihood"),
        }
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path} is damaged. Run 'gendiff evaluate' again") from None


def _history(folder: Path) -> dict[int, Picture]:
    """Some of the pictures drawn in training, the first and the last among them."""
    paths = sorted(folder.glob("step-[0-9]*.png"))
    last = len(paths) - 1
    some = sorted({round(i * last / (STAGES - 1)) for i in range(STAGES)}) if paths else []
    return {int(paths[i].stem.removeprefix("step-")): Picture(paths[i].read_bytes()) for i in some}


# --- the page ----------------------------------------------------------------------------------


def page(told: Sequence[Told], seed: int, plotly: str) -> str:
    """The page's text.

    Args:
        told: The runs.
        seed: Of their samples.
        plotly: The source of plotly.js.
    """
    scenes: list[Any] = []
    shown = [_shown(one, scenes) | {"dot": f"run-{i % COLOURS}"} for i, one in enumerate(told)]
    return panels.render(
        "report.html",
        runs=shown,
        seed=seed,
        measures=_measures(told),
        settings=_settings(told),
        data=panels.finite({"runs": [_series(one) for one in told], "scenes": scenes}),
        plotly=plotly,
    )


def _shown(one: Told, scenes: list[Any]) -> dict[str, Any]:
    """A run as the template wants it; its scenes are appended to those of the page."""
    drawn, run = one.drawn, one.run
    exhibits, film = [], []
    if drawn is not None:
        exhibits = [panels.exhibit(e, scenes) for e in drawn.exhibits]
        film = [
            panels.exhibit(e, scenes) | {"number": k}
            for e, k in zip(drawn.film.stages, drawn.film.numbers, strict=True)
        ]
    return {
        "name": one.name,
        "modality": run.modality.name,
        "summary": run.modality.summary,
        "folder": str(run.folder),
        "command": one.record.get("command", ""),
        "versions": one.record.get("versions", {}),
        "facts": _facts(run.facts),
        "tiles": _tiles(one),
        "sampling": _sampling(one),
        "exhibits": exhibits,
        "film": film,
        "film_steps": 0 if drawn is None else drawn.film.steps,
        "history": [
            {"step": step, "picture": panels.picture(p)}
            for step, p in one.history.items()
            if panels.is_png(p.png)
        ],
        "evaluation": one.evaluation,
    }


def _tiles(one: Told) -> list[tuple[str, str]]:
    """The run in a few figures."""
    tiles = []
    if one.drawn is not None:
        tiles += [
            ("parameters", f"{one.drawn.parameters:,}"),
            ("training steps", f"{one.drawn.step:,}"),
            ("network calls a sample", f"{one.drawn.calls:g}"),
        ]
    if one.metrics:
        last = one.metrics[-1]
        tiles += [
            (name, form(last[key]))
            for name, key, form in (
                ("training time", "elapsed_seconds", console.duration),
                ("samples a second", "samples_per_second", lambda v: f"{v:,.0f}"),
                ("loss at the end", "loss", lambda v: f"{v:.4f}"),
            )
            if isinstance(last.get(key), (int, float)) and math.isfinite(last[key])
        ]
    return tiles


def _sampling(one: Told) -> str:
    """How the samples were drawn, in one line."""
    said = []
    for key, value in configuration.dump(one.run.config)["sample"].items():
        if key in ("batch_size", "preview"):
            continue
        flat = configuration.flatten(value)
        name = flat.pop("name", None)
        more = ", ".join(f"{k} {_text(v)}" for k, v in flat.items() if k)
        said.append(
            f"{key}: {_text(value) if name is None else name}{f' ({more})' if more else ''}"
        )
    return "; ".join(said)


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts of the data that a line can tell."""
    return [(key, _brief(value)) for key, value in facts.items()]


def _brief(value: Any) -> str:
    if isinstance(value, (list, dict)) and (
        len(value) > LISTED or any(isinstance(v, (list, dict)) for v in value)
    ):
        return f"{len(value)} entries"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(v)}" for key, v in value.items())
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _settings(told: Sequence[Told]) -> dict[str, list[dict[str, Any]]]:
    """The configuration by section: each key with a value for each run, None where it has none."""
    flat = [configuration.flatten(configuration.dump(one.run.config)) for one in told]
    sections: dict[str, list[dict[str, Any]]] = {}
    for key in dict.fromkeys(key for values in flat for key in values):
        head, _, rest = key.rpartition(".") if "." not in key else key.partition(".")
        values = [_text(one[key]) if key in one else None for one in flat]
        row = {"key": rest, "values": values, "differs": len(set(values)) > 1}
        sections.setdefault(head or "run", []).append(row)
    return sections


def _measures(told: Sequence[Told]) -> list[dict[str, Any]]:
    """What was measured, with a bar for each run and for real data."""
    found: dict[str, list[tuple[int, Measure]]] = {}
    for index, one in enumerate(told):
        for measure in one.evaluation["measures"] if one.evaluation else ():
            found.setdefault(measure.name, []).append((index, measure))
    return [
        {
            "name": name.replace("_", " "),
            "better": rows[0][1].better,
            "bars": _bars(rows),
            "notes": list(dict.fromkeys(m.note for _, m in rows if m.note)),
        }
        for name, rows in found.items()
    ]


def _bars(rows: Sequence[tuple[int, Measure]]) -> list[dict[str, Any]]:
    """A bar for each run, one for real data; the widest is 100 %."""
    floors = dict.fromkeys(m.floor for _, m in rows if m.floor is not None)
    values = [(index, m.value) for index, m in rows] + [(None, floor) for floor in floors]
    finite = [abs(v) for _, v in values if math.isfinite(v)]
    most = max(finite, default=0) or 1
    runs_values = [m.value for _, m in rows]
    best = (min if rows[0][1].better == "lower" else max)(runs_values)
    alone = len(rows) > 1 and runs_values.count(best) == 1
    return [
        {
            "run": index,
            "text": f"{v:.4g}",
            "percent": round(100 * abs(v) / most, 1) if math.isfinite(v) else 0,
            "best": index is not None and alone and v == best,
        }
        for index, v in values
    ]


def _series(one: Told) -> dict[str, Any]:
    """What the charts of a run show."""
    rows = one.metrics
    named = ("loss", "lr", "grad_norm", "samples_per_second")
    bins = sorted(
        {name for row in rows for name in row.get("loss_by_log_snr", {})},
        key=lambda name: float(name.partition("..")[0]),
    )
    heldout = one.evaluation["heldout_loss_by_log_snr"] if one.evaluation else {}
    return {
        "name": one.name,
        "steps": [row["step"] for row in rows],
        "series": {key: [row.get(key) for row in rows] for key in named},
        "bins": {
            name: [row.get("loss_by_log_snr", {}).get(name) for row in rows] for name in bins
        },
        "heldout": [[float(level), loss] for level, loss in heldout.items()],
    }
