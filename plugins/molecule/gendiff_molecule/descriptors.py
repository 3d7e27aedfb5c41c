r"""Descriptors by which whole molecules are compared: shape and composition, without bonds.

They do not change when a molecule is turned, moved, mirrored or renumbered, and they change
smoothly with its positions. Of a molecule of N atoms at distances :math:`d_{ij}`:

- radial symmetry functions, averaged over its atoms (Behler & Parrinello, 2007,
  https://doi.org/10.1103/PhysRevLett.98.146401, eq. 4 in the shifted form),
  :math:`\frac1N \sum_{i \ne j} e^{-(d_{ij} - r)^2 / 2 w^2}` for radii r, once over all pairs and
  once over the pairs of each element, where only those of bonds and angles count;
- the share of each element, the logarithm of N, and the radius of gyration in Angstrom.

Each is divided by its spread over training molecules, so that none rules the distances.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gendiff_molecule import task
from gendiff_molecule.molecules import Molecules

if TYPE_CHECKING:
    from gendiff_molecule.plugin import MoleculeConfig

_WIDTH = 0.2  # Angstrom, w; a bond's length varies by 0.03, unlike ones differ by 0.1 and more
_RADII = np.arange(0.6, 4.7, 0.3)  # Angstrom, of all pairs
_NEAR = np.array([1.3, 2.4])  # Angstrom, of each element's pairs: over a bond, over an angle
_NARROWEST = 0.02  # spread below which a descriptor counts as that of molecules alike
_EXAMPLES = 2000  # training molecules of which the spread is taken
ABOUT = "distances between atoms, elements, size and shape, in units of training molecules' spread"


def descriptors(molecules: Molecules, elements: list[int]) -> NDArray[np.float64]:
    """Descriptors (M, F), as they are; positions that are not finite count as far away."""
    rows = [_of_one(z, x, elements) for z, x in molecules]
    width = len(_RADII) + len(elements) * (len(_NEAR) + 1) + 2
    return np.array(rows).reshape(len(rows), width)


def _of_one(
    numbers: NDArray[np.uint8], positions: NDArray[np.float32], elements: list[int]
) -> NDArray[np.float64]:
    x = np.nan_to_num(positions.astype(np.float64), nan=1e3, posinf=1e3, neginf=-1e3)
    x = x.clip(-1e3, 1e3)
    count = max(len(x), 1)
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    radial = _bumps(distance, _RADII).sum((0, 1)) / count
    near = _bumps(distance, _NEAR).sum(1)  # (N, 2)
    kinds = numbers[:, None] == np.array(elements, np.uint8)  # (N, K)
    by_element = kinds.T.astype(np.float64) @ near / count
    gyration = np.sqrt(np.square(x - x.mean(0)).sum(1).mean()) if len(x) else 0.0
    return np.concatenate(
        [radial, by_element.ravel(), kinds.mean(0) * len(elements), [np.log(count), gyration]]
    )


def _bumps(distance: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.square((distance[..., None] - radii) / _WIDTH) / 2)


@lru_cache(maxsize=2)
def _spread(config: MoleculeConfig, elements: tuple[int, ...]) -> NDArray[np.float64]:
    train = task.training(config, task.loaded(config))
    few = train.select(np.arange(0, len(train), max(1, len(train) // _EXAMPLES)))
    return descriptors(few, list(elements)).std(0).clip(min=_NARROWEST)


def features(config: MoleculeConfig, elements: list[int], molecules: Molecules) -> Tensor:
    """Descriptors (M, F) in units of the training molecules' spread."""
    scaled = descriptors(molecules, elements) / _spread(config, tuple(elements))
    return torch.from_numpy(scaled.astype(np.float32))
