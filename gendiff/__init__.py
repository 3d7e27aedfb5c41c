"""gendiff: one diffusion engine for every modality.

``gendiff.load("runs/…").sample(16)`` draws from a run; the engine's pieces (schedules, denoiser,
objective, samplers, spaces) work alone in any training loop. Names are imported when first used,
so that ``import gendiff`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pluggy

__version__ = "0.1.0"
PLUGIN_API = 1  # grows when a plugin written for the old contract would break
hookimpl = pluggy.HookimplMarker("gendiff")

_HOME = {
    "load": "gendiff.generate",
    "register": "gendiff.plugins",
    "Batch": "gendiff.spaces",
    "Categories": "gendiff.spaces",
    "Cond": "gendiff.spaces",
    "Dense": "gendiff.spaces",
    "Masked": "gendiff.spaces",
    "Ragged": "gendiff.spaces",
    "Modality": "gendiff.modality",
    "Section": "gendiff.modality",
    "DataReport": "gendiff.modality",
    "Request": "gendiff.modality",
    "Condition": "gendiff.modality",
    "Given": "gendiff.modality",
    "Property": "gendiff.modality",
    "Features": "gendiff.modality",
    "Measure": "gendiff.modality",
    "Exhibit": "gendiff.modality",
    "Picture": "gendiff.modality",
    "Scene": "gendiff.modality",
    "Sound": "gendiff.modality",
    "Items": "gendiff.data",
    "MLP": "gendiff.networks",
    "Denoiser": "gendiff.denoiser",
    "Objective": "gendiff.objective",
    "sample": "gendiff.samplers",
}
__all__ = ["PLUGIN_API", "__version__", "hookimpl", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'gendiff' has no attribute {name!r}")
