"""From molecules to batches and back.

A state is x (R, 3 + K): positions in Angstrom without centre of mass, then one-hot types, scaled.
For the conformer task it is (R, 3), and the graph is the condition: ``atoms`` (B, P) and ``bonds``
(B, P, P), padded to one P for the whole run, so that what a sample holds does not depend on its
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from gendiff.errors import ConfigError, DataError, suggest
from gendiff.modality import DataReport
from gendiff.noise import generator
from gendiff.preparing import Told
from gendiff.spaces import Batch, Cond, Ragged
from gendiff_molecule import conformers, data
from gendiff_molecule.molecules import SYMBOLS, Molecules, Subset

if TYPE_CHECKING:
    from gendiff_molecule.plugin import MoleculeConfig

EXAMPLES = 2000  # training molecules whose size and properties are kept in the run
ASKED = 50  # held-out molecules whose conformers are drawn where nothing is asked for
FEWEST = 20  # so few molecules say nothing: less flexible ones are taken too
FLEXIBLE = 5  # degrees of freedom from which on a molecule is worth its conformers


class Item(NamedTuple):
    """One molecule."""

    types: NDArray[np.int64]  # (N,), index into facts["elements"]
    positions: NDArray[np.float32]  # (N, 3)
    context: NDArray[np.float32] | None  # (C,), standardised
    bonds: NDArray[np.int16] | None  # (E, 3)


@lru_cache(maxsize=2)
def loaded(config: MoleculeConfig) -> data.Prepared:
    """The data of a configuration, read once in a process."""
    return data.load(config, Told())


def training(config: MoleculeConfig, prepared: data.Prepared) -> Subset:
    """The molecules that train the network: half of them where a property is asked for.

    The other half trains the regressor that judges (Hoogeboom et al., 2022, section 5.2).
    """
    if not properties(config):
        return whole(prepared.train)
    return known(config, halves(prepared.train)[1])


def whole(molecules: Molecules) -> Subset:
    """All of them."""
    return Subset(molecules, np.arange(len(molecules)))


def halves(molecules: Molecules) -> tuple[Subset, Subset]:
    """Two halves, the same each time."""
    order = torch.randperm(len(molecules), generator=generator("halves")).numpy()
    middle = len(order) // 2
    one, other = np.sort(order[:middle]), np.sort(order[middle:])
    return Subset(molecules, one), Subset(molecules, other)


def known(config: MoleculeConfig, molecules: Subset) -> Subset:
    """Those of which every property that the configuration names has a value."""
    values = [np.isfinite(molecules.target(name)) for name in properties(config)]
    return molecules.narrowed(np.logical_and.reduce([np.ones(len(molecules), bool), *values]))


def properties(config: MoleculeConfig) -> list[str]:
    """The scalar properties among the conditions."""
    return [name for name in config.condition if name != "composition"]


def prepare(config: MoleculeConfig) -> DataReport:
    """Loads everything, and reports what the other methods need.

    Raises:
        DataError: See :mod:`gendiff_molecule.data`.
        ConfigError: A condition that the data do not have.
    """
    if config.task == "conformer" and config.hydrogens != "explicit":
        raise ConfigError("molecule.hydrogens: the conformer task needs 'explicit'")
    prepared = loaded(config)
    for name in properties(config):
        if name not in prepared.train.targets:
            raise ConfigError(
                f"molecule.condition: the data have no property '{name}'."
                f"{suggest(name, ['composition', *prepared.train.targets])}"
            )
    if config.task == "conformer" and config.condition:
        raise ConfigError("molecule.condition: the conformer task has the graph; leave it empty")
    train = training(config, prepared)
    if not len(train):
        raise DataError(
            f"no training molecule has all of {', '.join(properties(config))}. "
            "Choose other properties in molecule.condition"
        )
    elements = _elements(train)
    if config.elements is not None:
        elements = sorted(SYMBOLS.index(symbol) for symbol in config.elements)
    alien = sorted(set(_elements(whole(prepared.test))) - set(elements))
    if alien:
        raise DataError(
            f"{SYMBOLS[alien[0]]} is in the held-out molecules and in no training molecule. "
            "Name the elements to keep in molecule.elements, with molecule.skip_bad=true"
        )
    sizes, counts = np.unique(train.sizes, return_counts=True)
    facts: dict[str, Any] = {
        "task": config.task,
        "elements": elements,
        "sizes": [[int(n), int(c)] for n, c in zip(sizes, counts, strict=True)],
        "max_atoms": int(max(sizes.max(), prepared.test.sizes.max())),
        "content": prepared.content,
    }
    if config.condition:
        facts |= _context_facts(config, train, elements)
    if config.task == "conformer":
        facts["asked"] = _held_out_graphs(prepared.test)
    kind = "heavy atoms only" if config.hydrogens == "removed" else "explicit hydrogens"
    symbols = " ".join(SYMBOLS[z] for z in elements)
    summary = (
        f"{prepared.summary_name}: {len(train)} training and {len(prepared.test)} held-out "
        f"molecules, {kind}, {symbols}, {sizes.min()} to {facts['max_atoms']} atoms, position std "
        f"{_position_std(train):.3f}"
    )
    return DataReport(summary, facts, prepared.warnings)


def _elements(molecules: Subset) -> list[int]:
    """Atomic numbers that occur, sorted."""
    counts = sum(np.bincount(piece.numbers, minlength=256) for piece in molecules.pieces())
    return np.flatnonzero(counts).tolist()


def _position_std(molecules: Subset) -> float:
    few = molecules.select(np.arange(0, len(molecules), max(1, len(molecules) // 2000)))
    x = torch.from_numpy(few.positions)
    centred: torch.Tensor = Ragged(torch.from_numpy(few.sizes), 3, 3).project(x)
    return centred.std().item()


def _context_facts(config: MoleculeConfig, train: Subset, elements: list[int]) -> dict[str, Any]:
    """Mean and spread of each column of the context, and examples of (size, raw context)."""
    raw = _raw_context(config, train, elements)
    pick = torch.randperm(len(train), generator=generator("examples"))[:EXAMPLES].numpy()
    return {
        "context_mean": raw.mean(0).tolist(),
        "context_std": np.maximum(raw.std(0), 1e-6).tolist(),
        "examples": [
            [int(n), *row] for n, row in zip(train.sizes[pick], raw[pick].tolist(), strict=True)
        ],
    }


def _raw_context(
    config: MoleculeConfig, molecules: Subset, elements: Sequence[int]
) -> NDArray[np.float64]:
    columns: list[NDArray[Any]] = []
    for name in config.condition:
        if name == "composition":
            counts = [_composition(piece, elements) for piece in molecules.pieces()]
            columns += list(np.concatenate(counts).T)
        else:
            columns.append(molecules.target(name))
    return np.stack(columns, 1).astype(np.float64)


def _composition(molecules: Molecules, elements: Sequence[int]) -> NDArray[np.int64]:
    """Atoms of each element in each molecule, (M, K)."""
    owner = np.repeat(np.arange(len(molecules)), molecules.sizes)
    return np.stack(
        [np.bincount(owner[molecules.numbers == z], minlength=len(molecules)) for z in elements], 1
    )


def columns(config: MoleculeConfig, facts: Mapping[str, Any]) -> list[str]:
    """A name for each column of the context."""
    names = []
    for name in config.condition:
        names += [name] * (len(facts["elements"]) if name == "composition" else 1)
    return names


def _held_out_graphs(test: Molecules) -> list[str]:
    """SMILES of the most flexible held-out molecules: those worth their conformers."""
    smiles = sorted({str(s) for s in test.smiles if s})
    flexible = [(conformers.flexible(s), s) for s in smiles]
    worth = [s for count, s in flexible if count >= FLEXIBLE]
    if len(worth) < FEWEST:
        worth = [s for _, s in sorted(flexible, key=lambda pair: (-pair[0], pair[1]))][:FEWEST]
    pick = torch.randperm(len(worth), generator=generator("asked"))[:ASKED]
    return worth[:ASKED] if len(worth) <= ASKED else [worth[i] for i in sorted(pick.tolist())]


class MoleculeData(Dataset[Item]):
    """A split, map-style; nothing about an item is random, as the networks see no direction."""

    def __init__(
        self, config: MoleculeConfig, facts: Mapping[str, Any], molecules: Subset
    ) -> None:
        self.molecules, self.rows = molecules.molecules, molecules.rows
        self.lookup = np.full(256, -1)
        self.lookup[facts["elements"]] = np.arange(len(facts["elements"]))
        self.context: NDArray[np.float32] | None = None
        if config.condition:
            raw = _raw_context(config, molecules, facts["elements"])
            self.context = standardised(facts, raw)
        self.graph = config.task == "conformer"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        i = self.rows[key[0]]
        numbers, positions = self.molecules[i]
        return Item(
            self.lookup[numbers],
            positions,
            None if self.context is None else self.context[key[0]],
            self.molecules.bonds_of(i) if self.graph else None,
        )


def standardised(facts: Mapping[str, Any], raw: NDArray[np.float64]) -> NDArray[np.float32]:
    """A raw context (…, C) in the training data's units of spread, as the network sees it."""
    scaled = (raw - np.array(facts["context_mean"])) / np.array(facts["context_std"])
    return scaled.astype(np.float32)  # type: ignore[no-any-return]


def dataset(config: MoleculeConfig, facts: Mapping[str, Any], split: str) -> MoleculeData:
    """The split's molecules; see :func:`training`."""
    prepared = loaded(config)
    if split == "train":
        return MoleculeData(config, facts, training(config, prepared))
    return MoleculeData(config, facts, known(config, whole(prepared.test)))


def collate(config: MoleculeConfig, facts: Mapping[str, Any], items: Sequence[Item]) -> Batch:
    """See :meth:`gendiff.Modality.collate`."""
    sizes = torch.tensor([len(item.types) for item in items])
    positions = torch.from_numpy(np.concatenate([item.positions for item in items]))
    if config.task == "conformer":
        space = Ragged(sizes, 3, 3)
        graphs = [(item.types, item.bonds) for item in items]
        return Batch(space.project(positions), space, graph_cond(graphs, facts["max_atoms"]))
    kinds = torch.from_numpy(np.concatenate([item.types for item in items]))
    code = torch.nn.functional.one_hot(kinds, len(facts["elements"])) * config.type_scale
    x = torch.cat([positions, code.to(positions)], 1)
    space = Ragged(sizes, x.shape[1], 3)
    cond = None
    if items[0].context is not None:
        context = np.stack([item.context for item in items if item.context is not None])
        cond = Cond({"context": torch.from_numpy(context)})
    return Batch(space.project(x), space, cond)


def graph_cond(graphs: Sequence[tuple[Any, Any]], width: int) -> Cond:
    """Types (N,) and bonds (E, 3) of each molecule as padded tensors."""
    atoms = np.zeros((len(graphs), width), np.int64)
    orders = np.zeros((len(graphs), width, width), np.int64)
    for row, (types, bonds) in enumerate(graphs):
        atoms[row, : len(types)] = types
        i, j, order = bonds.T
        orders[row, i, j] = orders[row, j, i] = order
    return Cond({"atoms": torch.from_numpy(atoms), "bonds": torch.from_numpy(orders)})


def unpack(config: MoleculeConfig, facts: Mapping[str, Any], batch: Batch) -> Molecules:
    """The molecules that a batch of states holds: the likeliest types, and the given bonds."""
    space = batch.space
    assert isinstance(space, Ragged)
    sizes = space.sizes.tolist()
    x = batch.x.detach().float().cpu()
    elements = np.array(facts["elements"], np.uint8)
    positions = x[:, :3].numpy()
    bonds: list[NDArray[np.int16]] = []
    if config.task == "conformer":
        assert batch.cond is not None
        atoms, orders = batch.cond["atoms"].cpu().numpy(), batch.cond["bonds"].cpu().numpy()
        types = np.concatenate([row[:n] for row, n in zip(atoms, sizes, strict=True)])
        for row in orders:
            i, j = np.nonzero(np.triu(row))
            bonds.append(np.stack([i, j, row[i, j]], 1).astype(np.int16))
    else:
        types = x[:, 3:].argmax(1).numpy()
    ends = np.cumsum(sizes)[:-1]
    pairs = zip(np.split(elements[types], ends), np.split(positions, ends), strict=True)
    return Molecules.from_list(list(pairs), bonds=bonds)
