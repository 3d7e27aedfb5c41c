"""For tests: denoisers known in closed form, a toy modality, and the conformance check."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ExactNetwork": "oracles",
    "Gaussian": "oracles",
    "Mixture": "oracles",
    "slope": "oracles",
    "ToyModality": "toy",
    "check_modality": "conformance",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"gendiff.testing.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gendiff.testing' has no attribute {name!r}")
