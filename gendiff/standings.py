"""What a suite found (:mod:`gendiff.benchmark`), as tables and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gendiff import config
from gendiff.errors import GendiffError

Cells = Sequence[Mapping[str, Any]]

HEADER = [
    "modality", "sampler", "guidance", "calls", "figure", "samples", "real data", "ratio",
    "ms/sample", "MiB", "verdict",
]  # fmt: skip


def table(cells: Cells) -> str:
    """The cells as a table in Markdown, a row for each figure, and what the figures are."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    notes: dict[str, str] = {}
    for cell in cells:
        for figure in cell["figures"]:
            lines.append("| " + " | ".join(row(cell, figure)) + " |")
            key = cell["key"]
            name = f"{key['modality']} {figure['name']}"
            notes.setdefault(name, f"{figure['note']}; seed {key['seed']}, step {key['step']}")
    lines += ["", *(f"- {name}: {note}" for name, note in notes.items())]
    return "\n".join(lines) + "\n"


def summary(cells: Cells, budgets: Sequence[int]) -> str:
    """The figures alone in Markdown: a row for each way to sample, a column for each budget.

    Args:
        cells: What a suite found.
        budgets: Network calls of a sample, at most; a cell is in the first column it is within,
            or in the last with its own calls beside it.
    """
    columns = sorted(set(budgets))
    rows: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        sampling, figures = cell["key"]["sampling"], cell["figures"]
        if not figures:
            continue
        head: tuple[str, ...] = (
            cell["key"]["modality"],
            way(sampling),
            _short(sampling["guidance"]),
            " / ".join(figure["name"] for figure in figures),
            " / ".join("?" if f["floor"] is None else f"{f['floor']:.3g}" for f in figures),
        )
        rows.setdefault(head, []).append(cell)
    names = ["modality", "sampler", "guidance", "figures", "real data"]
    names += [*(f"{calls} calls" for calls in columns), "ms a call"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for told_by, found in rows.items():
        told = dict.fromkeys(columns, "")
        for cell in found:
            calls = cell["network_calls"]
            column = next((budget for budget in columns if budget >= calls), columns[-1])
            told[column] = " / ".join(f"{figure['value']:.3g}" for figure in cell["figures"])
            if calls > column:  # of a sampler that chooses its steps
                told[column] += f" ({calls:g} calls)"
        spent = [1000 * cell["seconds_per_sample"] / cell["network_calls"] for cell in found]
        parts = [*told_by, *told.values(), f"{statistics.median(spent):.2g}"]
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"


def row(cell: Mapping[str, Any], figure: Mapping[str, Any] | None = None) -> list[str]:
    """A row of :func:`table`, by default of the first figure."""
    figure = figure or (cell["figures"][0] if cell["figures"] else None)
    key, memory = cell["key"], cell["peak_memory_mib"]
    shown = ["", "", "", ""]
    if figure is not None:
        error = "" if figure["error"] is None else f" ± {figure['error']:.2g}"
        floor = "" if figure["floor"] is None else f"{figure['floor']:.3g}"
        times = "" if figure["ratio"] is None else f"{figure['ratio']:.2f}"
        shown = [figure["name"], f"{figure['value']:.3g}{error}", floor, times]
    return [
        key["modality"],
        way(key["sampling"]),
        _short(key["sampling"]["guidance"]),
        str(cell["network_calls"]),
        *shown,
        f"{1000 * cell['seconds_per_sample']:.1f}",
        "" if memory is None else f"{memory:.0f}",
        ", ".join(cell["verdicts"]),
    ]


def way(sampling: Mapping[str, Any]) -> str:
    """Sampler and grid in short; what is as by default is left out."""
    names = []
    for kind in ("sampler", "grid"):
        part = sampling[kind]
        plain = (
            config.describe(kind, config.build(kind, part["name"])) if _bare(kind, part) else {}
        )
        changed = [
            f"{k}={_short(v)}" for k, v in part.items() if plain.get(k) != v and k != "name"
        ]
        names.append(part["name"] + (f"({', '.join(changed)})" if changed else ""))
    return " on ".join(names)


def _bare(kind: str, part: Mapping[str, Any]) -> bool:
    """Whether a part can be made from its name alone."""
    try:
        config.build(kind, part["name"])
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{k}={_short(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def plot(cells: Cells, path: Path) -> Path:
    """Ratio to the floor against network calls: a panel for each modality, a curve for each way.

    Filled points are on the Pareto front: no other of the modality is better at as few calls.

    Raises:
        GendiffError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise GendiffError("the plot needs matplotlib. pip install 'gendiff[plot]'") from None
    groups: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    titles: dict[str, str] = {}
    for cell in cells:
        first = next((figure for figure in cell["figures"] if figure["ratio"]), None)
        if first is None:
            continue
        key, relative = cell["key"], (first["error"] or 0) / first["value"]
        guidance = _short(key["sampling"]["guidance"])
        name = way(key["sampling"]) + ("" if guidance == "1" else f", guidance {guidance}")
        ratio_, error = first["ratio"], first["ratio"] * relative
        curves = groups.setdefault(key["modality"], {})
        curves.setdefault(name, []).append((cell["network_calls"], ratio_, error))
        titles[key["modality"]] = first["name"].replace("_", " ")
    figure = Figure(figsize=(4.6 * max(1, len(groups)), 4.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(groups)), sharey=True, squeeze=False)[0]
    for panel, (modality, curves) in zip(panels, groups.items(), strict=False):
        every = [point for points in curves.values() for point in points]
        ticks: list[float] = []
        for calls in sorted({calls for calls, *_ in every}):
            if not ticks or calls > 1.15 * ticks[-1]:  # labels must not touch
                ticks.append(calls)
        for number, (name, points) in enumerate(curves.items()):
            at, ratios, errors = zip(*sorted(points), strict=True)
            color = f"C{number}"
            low = [min(error, 0.9 * r) for r, error in zip(ratios, errors, strict=True)]
            panel.errorbar(at, ratios, [low, errors], color=color, capsize=2, label=name, lw=1.2)
            for c, r in zip(at, ratios, strict=True):
                best = not any((d <= c and q < r) or (d < c and q <= r) for d, q, _ in every)
                panel.plot(c, r, "o", ms=7, mec=color, mfc=color if best else "white", zorder=3)
        panel.axhline(1, color="0.5", ls="--", lw=1)
        panel.set(xscale="log", yscale="log", title=f"{modality}: {titles[modality]}")
        panel.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        panel.set_xticks([], minor=True)
        panel.set_xlabel("network calls a sample")
        panel.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("times the real data's figure (dashed: as good)")
    figure.savefig(path, dpi=120)
    return path
