"""Quality against network calls: every sampler of gendiff on one trained run, by its own metric.

For each sampler whose calls are known beforehand and each budget, samples are drawn with the
most steps whose calls stay within it, and judged as ``gendiff evaluate`` does. All see the same
seed, so the same noise. The floor is the metric's own: real data in the samples' place, of the
same number.

    gendiff train --modality image --config configs/image/digits.yaml
    python benchmarks/sampler_quality.py runs/image/default --out quality.json --plot quality.png

A cell of the table is written to ``--out`` once it is measured, and the same command again goes on
where it stopped; ``--show`` prints and plots what there is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from gendiff import config, generate
from gendiff.errors import SamplingError
from gendiff.evaluate import Judge
from gendiff.generate import Model, Wish
from gendiff.runs import cache_folder, write_atomically
from gendiff.samplers import SAMPLERS
from gendiff.spaces import Batch, join
from gendiff.tables import Walker

# The options of a name that are methods of their own; every other name stands for its defaults.
VARIANTS = [
    "{name: dpm++3m, rule: half}",
    "{name: unipc, p: 3}",
    "{name: deis, order: 3}",
    "{name: vab, order: 3}",
    "{name: ddim, eta: 1}",
    "{name: heun, churn: 10}",
]


def settings_for(model: Model, text: str, calls: int, grid: str | None) -> Any:
    """The sampling settings with the most steps within so many calls; None if none stay within."""
    for steps in range(calls, 0, -1):
        found = model.settings(sampler=yaml.safe_load(text), steps=steps, grid=grid)
        try:
            own = model.calls(found)
            if own is not None and own <= calls:
                return found
        except SamplingError:  # a grid that has no so few or so many steps
            continue
    return None


def draw(model: Model, settings: Any, args: argparse.Namespace) -> Batch:
    """The samples; in larger batches than ``gendiff sample``'s, which repeat to the bit."""
    parts = []
    for first in range(0, args.samples, args.batch):
        ids = range(first, min(first + args.batch, args.samples))
        *_, (batch, _state) = model.trajectories(ids, settings, args.seed, Wish())
        parts.append(batch.to("cpu"))
    return join(parts)


def cell(
    model: Model, text: str, calls: int, judge: Judge, args: argparse.Namespace
) -> dict[str, Any]:
    """The measure of one sampler at one budget; without a value where no step is within it."""
    key = {"sampler": text, "budget": calls}
    settings = settings_for(model, text, calls, args.grid)
    if settings is None:
        return {**key, "calls": 0, "steps": 0, "value": None}
    samples = draw(model, settings, args)
    measures = judge.measures(samples, {args.measure})
    names = [measure.name for measure in measures]
    if args.measure not in names:
        raise SystemExit(f"--measure: there is no '{args.measure}'. Choose {', '.join(names)}")
    measure = measures[names.index(args.measure)]
    more = {"calls": model.calls(settings), "steps": settings.steps}
    return {**key, **more, **asdict(measure)}


def measured(model: Model, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Cells that are not in ``--out`` yet, the cheap ones first."""
    done = {(row["sampler"], row["budget"]) for row in read(args)["cells"]}
    judge = Judge(model.run, cache_folder(), args.seed)
    for calls in args.calls:
        for text in args.samplers:
            if (text, calls) not in done:
                yield cell(model, text, calls, judge, args)


def read(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--out`` holds; refuses a file made under other conditions."""
    facts = {
        "run": str(args.run),
        "samples": args.samples,
        "seed": args.seed,
        "grid": args.grid,
        "measure": args.measure,
    }
    if not args.out.exists():
        return {**facts, "cells": []}
    found: dict[str, Any] = json.loads(args.out.read_text())
    changed = [key for key, value in facts.items() if found[key] != value]
    if changed:
        raise SystemExit(f"{args.out} was made with another {', '.join(changed)}; name a new file")
    return found


def table(found: dict[str, Any]) -> str:
    """A row for each sampler; ``*`` where fewer calls were made than the column says."""
    budgets = sorted({row["budget"] for row in found["cells"]})
    lines = [f"| sampler | {' | '.join(f'{b} calls' for b in budgets)} |"]
    lines.append("|---|" + "---|" * len(budgets))
    rows: dict[str, dict[int, str]] = {}
    for row in found["cells"]:
        text = "–" if row["value"] is None else f"{row['value']:.2f}"
        fewer = "*" if 0 < row["calls"] < row["budget"] else ""
        rows.setdefault(row["sampler"], {})[row["budget"]] = text + fewer
    for name, cells in rows.items():
        lines.append(f"| {label(name)} | {' | '.join(cells.get(b, '') for b in budgets)} |")
    floor = next(row["floor"] for row in found["cells"] if row["value"] is not None)
    if floor is not None:
        lines.append(f"| *real data* | {' | '.join(f'{floor:.2f}' for _ in budgets)} |")
    return "\n".join(lines)


def label(text: str) -> str:
    """``heun, churn: 10`` of ``{name: heun, churn: 10}``."""
    return text.strip("{}").removeprefix("name: ")


def plot(found: dict[str, Any], path: Path) -> None:
    """The measure against the calls made, both logarithmic, with the floor as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    names = list(dict.fromkeys(row["sampler"] for row in found["cells"]))
    floor = None
    for i, name in enumerate(names):
        rows = [r for r in found["cells"] if r["sampler"] == name and r["value"] is not None]
        if not rows:
            continue
        rows.sort(key=lambda row: row["budget"])
        floor = rows[0]["floor"]
        style = ("-", "--", ":")[i // 10]
        x, y = [r["calls"] for r in rows], [r["value"] for r in rows]
        axes.plot(x, y, style, color=f"C{i % 10}", marker=".", label=label(name))
    if floor is not None:
        axes.axhline(floor, color="black", linewidth=1, label="real data")
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=found["measure"])
    ticks = sorted({row["budget"] for row in found["cells"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a trained run")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 8, 10, 20, 50])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--samplers", nargs="+", help="names or YAML; all if not given")
    parser.add_argument("--grid", help="in place of the run's")
    parser.add_argument("--measure", default="frechet_distance", help="a metric of the modality")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=250, help="samples at a time")
    parser.add_argument("--device", help="in place of the run's")
    parser.add_argument("--out", type=Path, default=Path("sampler_quality.json"))
    parser.add_argument("--plot", type=Path, help="write a picture here")
    parser.add_argument("--show", action="store_true", help="measure nothing")
    args = parser.parse_args()
    tabled = [name for name, kind in SAMPLERS.items() if not issubclass(kind, Walker)]
    args.samplers = args.samplers or [*tabled, *VARIANTS]
    for text in args.samplers:  # a wrong one is said at once
        if isinstance(config.build("sampler", yaml.safe_load(text)), Walker):
            raise SystemExit(f"{text}: its calls are known afterwards only. See gendiff benchmark")
    if not args.show:
        torch.set_num_threads(1)
        model = generate.load(args.run, args.device)
        for row in measured(model, args):
            found = read(args)
            found["cells"].append(row)
            write_atomically(args.out, json.dumps(found, indent=1) + "\n")
            value = "no steps" if row["value"] is None else f"{row['value']:.3f}"
            print(f"{label(row['sampler'])}, {row['budget']} calls: {value}", flush=True)
    found = read(args)
    print(f"\n{found['measure']}, {found['samples']} samples, seed {found['seed']}\n")
    print(table(found))
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
