"""What a person sees: a progress bar on a terminal, plain lines elsewhere; a log file beside."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gendiff.errors import escaped

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, log: Path | None = None) -> None:
    """Prints a line, and appends it to a log file; neither where ``out.quiet`` is set."""
    text = escaped(text)  # names of files may hold anything
    out.print(text, markup=False)
    if log is not None and not out.quiet:
        with log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")


def warn(text: str) -> None:
    """Prints a warning to standard error; like an error it ends without a full stop."""
    err.print(f"warning: {escaped(text.removesuffix('.'))}", markup=False)


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints a table; with wide cells left whole where the output is not a terminal."""
    view = Table(title=title or None, title_justify="left", show_edge=False, pad_edge=False)
    for name in header:
        view.add_column(name, overflow="fold")
    for row in rows:
        view.add_row(*row)
    (out if out.is_terminal else Console(width=160, highlight=False)).print(view, markup=False)


@contextmanager
def progress(total: int, done: int, unit: str) -> Iterator[Any]:
    """A bar on a terminal; calling the result with ``done`` and a text advances it."""
    if not out.is_terminal:
        yield lambda done, text="": None
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda done, text="": bar.update(task, completed=done, description=text)


def duration(seconds: float) -> str:
    """Seconds as ``1h02m``, ``3m05s`` or ``12s``."""
    s = round(seconds)
    if s >= 3600:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 60}m{s % 60:02d}s" if s >= 60 else f"{s}s"
