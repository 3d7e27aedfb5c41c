"""Extras that work from a clone.

A release's extra ``image`` names the package ``gendiff-image``. In a clone that package is not on
an index but in ``plugins/image``, so its extra points there. ``GENDIFF_RELEASE=1`` builds the
wheel that goes to an index.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

DEVELOPMENT = [
    "espeakng-loader",  # gendiff-speech's extra: GPL-3, so never a requirement
    "hatchling",
    "hypothesis",
    "librosa",
    "mypy",
    "playwright",  # drives a Chromium that is there already, to look at reports
    "pytest",
    "pytest-xdist",
    "ruff",
    "scipy",
    "types-PyYAML",
]
REPORT = ["jinja2>=3.1", "plotly>=6"]
APP = ["gradio>=6", *REPORT]


class Extras(MetadataHookInterface):
    """One extra for each folder in plugins/, ``report``, ``app``, ``plot``, ``all`` and ``dev``.

    ``all`` has the modalities and the report; what observes every run is asked for by name.
    """

    def update(self, metadata: dict[str, Any]) -> None:
        plugins = sorted(path.parent for path in Path(self.root).glob("plugins/*/pyproject.toml"))
        release = bool(os.environ.get("GENDIFF_RELEASE"))
        extras = {
            path.name: [f"gendiff-{path.name}" + ("" if release else f" @ {path.as_uri()}")]
            for path in plugins
        }
        modalities = [
            requirement
            for path in plugins
            if "gendiff.modalities" in (path / "pyproject.toml").read_text()
            for requirement in extras[path.name]
        ]
        metadata["optional-dependencies"] = extras | {
            "report": REPORT,
            "app": APP,
            "plot": ["matplotlib>=3.8"],  # of 'gendiff benchmark'
            "all": modalities + REPORT,
            "dev": DEVELOPMENT + APP,
        }
