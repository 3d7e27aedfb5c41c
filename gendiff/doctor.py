"""``gendiff doctor``, what a person pastes into an issue, and the list of ``gendiff plugins``."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from gendiff import __version__, plugins


def examine() -> Iterator[tuple[str, bool]]:
    """Lines about the environment, each with whether it is fine."""
    yield f"gendiff {__version__}, Python {sys.version.split()[0]}, {platform.platform()}", True
    try:
        import torch
    except Exception as error:
        yield f"torch: {type(error).__name__}: {error}", False
        return
    yield f"torch {torch.__version__}, {torch.get_num_threads()} threads", True
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            yield f"cuda:{i} {torch.cuda.get_device_name(i)}, {memory:.0f} GiB", True
    else:
        yield "no CUDA device", True
    yield f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here", True
    for group in (plugins.MODALITIES, plugins.PLUGINS):
        for found in plugins.find(group):
            status = "ok" if found.error is None else f"FAILED: {found.error}"
            yield f"{group} {found.name} ({found.distribution}): {status}", found.error is None
            if found.trace:
                yield found.trace.rstrip(), False


def plugin_rows() -> list[list[str]]:
    """Every plugin in a row: name, kind, package, status, and its summary or its failure."""
    with plugins.without_torch():
        installed = plugins.find(plugins.MODALITIES) + plugins.find(plugins.PLUGINS)
    return [
        [
            found.name,
            "modality" if found.group == plugins.MODALITIES else "plugin",
            found.distribution,
            "failed" if found.error else "ok",
            found.error or (found.modality.summary if found.modality else ""),
        ]
        for found in installed
    ]
