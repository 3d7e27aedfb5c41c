"""Properties as networks: one judges samples, another steers them.

*Judging* (EDM's protocol; Hoogeboom et al., 2022, section 5.2): one half of the training molecules
trains the generator, the other half a regressor; the figure is the mean absolute error between
what was asked and what the regressor sees in the samples. It stands between two others: the
regressor's own error on held-out molecules (the floor) and what the number of atoms alone tells
(``size_only``).

*Steering*: the engine asks for a function of its estimates, which are blurred: positions between
those that are possible, types as probabilities. A regressor that is to steer therefore learns
from blurred molecules, those of the network's own training set, never from the judge's half.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from gendiff import console
from gendiff.errors import ConfigError, suggest
from gendiff.modality import Measure, Property
from gendiff.noise import generator
from gendiff.spaces import Batch, Ragged, Space
from gendiff_molecule import task
from gendiff_molecule.molecules import Molecules, Subset
from gendiff_molecule.pairnet import PairNet

if TYPE_CHECKING:
    from gendiff_molecule.plugin import MoleculeConfig

_VERSION = 1  # of what is cached: grows when the training changes
_BATCH, _RATE = 64, 2e-3
_SHAKE, _CERTAINTY = 0.3, 3.0  # the most blur: Angstrom, and the logit of a type's own column


class Regressor:
    """A property as the mean of what an invariant network says of each atom.

    Args:
        network: The network; its fourth output column is used.
        elements: Atomic numbers that it knows.
        mean, spread: Of the property.
    """

    def __init__(self, network: PairNet, elements: list[int], mean: float, spread: float) -> None:
        self.network, self.elements, self.mean, self.spread = network, elements, mean, spread

    def batch(
        self,
        molecules: Molecules | Subset,
        which: NDArray[np.int64],
        blur: torch.Generator | None = None,
    ) -> Batch:
        """The network's input: positions and one-hot types; blurred, by a level of each's own."""
        few = molecules.select(which)
        lookup = np.zeros(256, np.int64)
        lookup[self.elements] = np.arange(len(self.elements))
        kinds = torch.from_numpy(lookup[few.numbers])
        code = torch.nn.functional.one_hot(kinds, len(self.elements))
        x = torch.cat([torch.from_numpy(few.positions), code.float()], 1)
        space = Ragged(torch.from_numpy(few.sizes), x.shape[1], 3)
        if blur is not None:
            level = torch.rand(len(which), 1, generator=blur)[space.index]
            shake = _SHAKE * level * torch.randn(len(x), 3, generator=blur)
            noise = torch.randn(code.shape, generator=blur)
            likely = (_CERTAINTY * code + 2 * noise).softmax(1)
            soft = torch.lerp(code.float(), likely, level)
            x = torch.cat([x[:, :3] + shake, soft], 1)
        return Batch(space.project(x), space)

    def scaled(self, batch: Batch) -> Tensor:
        """The property in units of its spread, (B,)."""
        space: Any = batch.space
        noise = batch.x.new_zeros(space.batch_size)
        said = self.network(batch.x, noise, None, space)[:, 3]
        total = said.new_zeros(space.batch_size).index_add(0, space.index, said)
        return total / space.sizes

    @torch.no_grad()
    def __call__(self, molecules: Molecules | Subset) -> NDArray[np.float64]:
        """The property of each molecule, (M,)."""
        self.network.eval()
        parts = [
            self.scaled(self.batch(molecules, np.arange(i, min(i + 256, len(molecules)))))
            for i in range(0, len(molecules), 256)
        ]
        values: NDArray[np.float64] = torch.cat(parts).double().numpy()
        return values * self.spread + self.mean


def regressor(
    molecules: Subset,
    name: str,
    elements: list[int],
    steps: int,
    cache: Path,
    seed: int,
    blurred: bool = False,
) -> Regressor:
    """Trains a regressor of one property, or reads it from the cache.

    Args:
        molecules: What it learns from; those without the property are left out.
        name: The property.
        elements: Atomic numbers.
        steps: Optimiser steps of 64 molecules; the learning rate falls to 0.
        cache: Folder that keeps it.
        seed: Seed of the network and of the order.
        blurred: Learn from blurred molecules; for steering.
    """
    molecules = molecules.narrowed(np.isfinite(molecules.target(name)))
    values = molecules.target(name).astype(np.float64)
    mean, spread = float(values.mean()), float(np.abs(values - values.mean()).mean())
    torch.manual_seed(seed)
    network = PairNet(len(elements), 64, 32, 8, 4, groups=2, outputs=1)
    found = Regressor(network, elements, mean, spread)
    key = repr((_VERSION, name, elements, steps, seed, blurred, len(molecules), values.sum()))
    path = (
        cache / f"molecule-regressor-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    )
    if path.is_file():
        network.load_state_dict(load_file(path))
        return found
    console.say(f"training a regressor of {name} on {len(molecules)} molecules ({steps} steps) …")
    target = torch.from_numpy(((values - mean) / spread).astype(np.float32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps)
    gen = generator("regressor", seed)
    network.train()
    for _ in range(steps):
        which = torch.randint(len(molecules), (_BATCH,), generator=gen)
        batch = found.batch(molecules, which.numpy(), gen if blurred else None)
        error = found.scaled(batch) - target[which]
        error.abs().mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, temporary)
    temporary.replace(path)
    return found


@lru_cache(maxsize=4)  # asked for again with every batch of samples
def steering(
    config: MoleculeConfig, elements: tuple[int, ...], name: str, cache: Path
) -> Property:
    """See :meth:`gendiff.Modality.property_named`: a target of the data, by a regressor.

    Its tolerance is the regressor's mean absolute error on held-out molecules.

    Raises:
        ConfigError: The data have no such target.
    """
    prepared = task.loaded(config)
    known = prepared.train.targets
    if name not in known or config.task == "conformer":
        raise ConfigError(
            f"toward: unknown property '{name}'.{suggest(name, known)} "
            f"Known: {', '.join(known) or 'none'}"
        )
    found = regressor(
        task.training(config, prepared),
        name,
        list(elements),
        config.regressor_steps,
        cache,
        0,
        blurred=True,
    )
    test = task.whole(prepared.test)
    test = test.narrowed(np.isfinite(test.target(name)))
    error = _error(found(test), test.target(name).astype(np.float64))
    found.network.requires_grad_(False)

    def function(x: Tensor, space: Space) -> Tensor:
        x = torch.cat([x[:, :3], x[:, 3:] / config.type_scale], 1)
        return found.scaled(Batch(x, space)) * found.spread + found.mean

    return Property(function, error)


def measure(
    config: MoleculeConfig, facts: Mapping[str, Any], samples: Batch, cache: Path, seed: int
) -> list[Measure]:
    """The error of each property that was asked for, in its own unit; compositions that match."""
    molecules = task.unpack(config, facts, samples)
    assert samples.cond is not None
    context = samples.cond["context"].double().cpu().numpy()
    context = context * np.array(facts["context_std"]) + np.array(facts["context_mean"])
    columns = task.columns(config, facts)
    figures = []
    if "composition" in config.condition:
        first = columns.index("composition")
        asked = context[:, first : first + len(facts["elements"])].round()
        figures.append(_composition(molecules, facts["elements"], asked))
    if not task.properties(config):
        return figures
    prepared = task.loaded(config)
    other = task.halves(prepared.train)[0]
    test = task.known(config, task.whole(prepared.test))
    for name in task.properties(config):
        judge = regressor(other, name, facts["elements"], config.regressor_steps, cache, seed)
        asked = context[:, columns.index(name)]
        real = test.target(name).astype(np.float64)
        floor = _error(judge(test), real)
        counts = f"{len(asked)} samples; floor: the regressor's own error on {len(test)} held-out"
        note = f"|asked - found by a regressor that learnt from the other half|; {counts}"
        guess = _by_size(other, name, test)
        shuffled = real[torch.randperm(len(real), generator=generator("shuffled", seed)).numpy()]
        figures += [
            Measure(f"{name}_mae", _error(judge(molecules), asked), "lower", floor, note),
            Measure(
                f"{name}_mae_size_only",
                _error(guess, real),
                "lower",
                None,
                "baseline: the other half's median at the same number of atoms, on held-out",
            ),
            Measure(
                f"{name}_mae_shuffled",
                _error(judge(test), shuffled),
                "lower",
                None,
                "baseline: held-out molecules against other molecules' values",
            ),
        ]
    return figures


def _composition(molecules: Molecules, elements: list[int], asked: NDArray[np.float64]) -> Measure:
    found = np.array([[(z == e).sum() for e in elements] for z, _ in molecules])
    share = float((found == asked).all(1).mean())
    note = f"share of {len(asked)} samples with exactly the atoms that were asked for"
    return Measure("composition_match", share, "higher", 1.0, note)


def _error(found: NDArray[np.float64], wanted: NDArray[np.float64]) -> float:
    return float(np.abs(found - wanted).mean())


def _by_size(known: Subset, name: str, asked: Subset) -> NDArray[np.float64]:
    """The median of a property at each asked molecule's number of atoms."""
    finite = known.narrowed(np.isfinite(known.target(name)))
    values = finite.target(name).astype(np.float64)
    table = {n: float(np.median(values[finite.sizes == n])) for n in np.unique(finite.sizes)}
    rest = float(np.median(values))
    return np.array([table.get(n, rest) for n in asked.sizes])
