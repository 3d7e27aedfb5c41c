"""The hooks that a plugin may implement, with ``@gendiff.hookimpl``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluggy

from gendiff.modality import Modality

hookspec = pluggy.HookspecMarker("gendiff")


@hookspec(firstresult=True)
def gendiff_modality() -> Modality:  # type: ignore[empty-body]
    """Hands over the modality. Entry-point group ``gendiff.modalities``, loaded by name."""


@hookspec
def gendiff_parts() -> Mapping[str, Mapping[str, type[Any]]]:  # type: ignore[empty-body]
    """More schedules, samplers, grids, …: ``{"sampler": {"mine": MySampler}}``.

    Entry-point group ``gendiff.plugins``.
    """


@hookspec
def gendiff_metrics(run: str, step: int, metrics: Mapping[str, float]) -> None:
    """Observes what a run logs. Entry-point group ``gendiff.plugins``."""


@hookspec
def gendiff_preview(run: str, step: int, path: str) -> None:
    """Observes the pictures that a run draws in training. Entry-point group ``gendiff.plugins``.

    The same samples each time, as a PNG.
    """
