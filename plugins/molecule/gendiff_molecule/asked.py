"""What is asked of samples: sizes, compositions, properties, graphs; and what goes with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gendiff.errors import ConfigError, suggest
from gendiff.modality import Condition, Request
from gendiff.noise import derive_seed
from gendiff.spaces import Cond, Ragged, Space
from gendiff_molecule import conformers
from gendiff_molecule.molecules import SYMBOLS
from gendiff_molecule.task import columns, graph_cond, standardised

if TYPE_CHECKING:
    from gendiff_molecule.plugin import MoleculeConfig


def templates(
    config: MoleculeConfig, facts: Mapping[str, Any], request: Request, least: int = 1
) -> tuple[Space, Cond | None]:
    """See :meth:`gendiff.Modality.templates`.

    Sizes that are not asked for are at least ``least``.

    Raises:
        ConfigError: An unknown condition, or one that the model cannot meet.
    """
    if config.task == "conformer":
        return _conformer_templates(config, facts, request)
    _check_names(request, [condition.name for condition in conditions(config, facts)])
    values = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in request.values.items()}
    for name, listed in values.items():
        if not listed:
            raise ConfigError(f"{name}: an empty list. Give at least one value")
    rows = [
        _wanted(
            config, facts, request.seed, i, {k: v[i % len(v)] for k, v in values.items()}, least
        )
        for i in request.ids
    ]
    columns = 3 + len(facts["elements"])
    space = Ragged(torch.tensor([size for size, _ in rows]), columns, 3)
    if not config.condition:
        return space, None
    raw = np.array([context for _, context in rows], np.float64)
    return space, Cond({"context": torch.from_numpy(standardised(facts, raw))})


def conditions(config: MoleculeConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
    """See :meth:`gendiff.Modality.conditions`; the hints are training data's."""
    if config.task == "conformer":
        return (Condition("smiles", "molecule whose conformers are made", facts["asked"][:4]),)
    atoms = "atoms" if config.hydrogens == "explicit" else "heavy atoms"
    typical = max(facts["sizes"], key=lambda row: row[1])[0]  # [size, how often]
    known = [Condition("atoms", f"number of {atoms}", (typical,))]
    for column, name in enumerate(columns(config, facts)):
        if name != "composition":
            mean = float(f"{facts['context_mean'][column]:.3g}")
            known.append(Condition(name, "a property of the data, in its unit", (mean,)))
    if "composition" in config.condition:
        known.append(Condition("formula", "atoms of each element", (_formula(config, facts),)))
    return tuple(known)


def _formula(config: MoleculeConfig, facts: Mapping[str, Any]) -> str:
    """A training molecule's, of the elements that the model makes."""
    first = columns(config, facts).index("composition")
    counts = facts["examples"][0][1 + first :]
    parts = zip(facts["elements"], counts, strict=False)  # properties may follow
    return "".join(f"{SYMBOLS[z]}{int(count)}" for z, count in parts if count)


def _check_names(request: Request, accepted: Sequence[str]) -> None:
    for name in request.values:
        if name not in accepted:
            raise ConfigError(
                f"cond: unknown condition '{name}'.{suggest(name, accepted)} "
                "(a model knows what molecule.condition named when it was trained)"
            )


def _wanted(
    config: MoleculeConfig,
    facts: Mapping[str, Any],
    seed: int,
    sample: int,
    values: Mapping[str, Any],
    least: int,
) -> tuple[int, list[float]]:
    """Size and raw context of one sample: what is asked, the rest from the training data."""
    size = _size(values["atoms"], facts) if "atoms" in values else None
    draw = derive_seed("molecule", seed, sample)
    if not config.condition:
        return size or _drawn_size(facts, draw, least), []
    counts: list[int] | None = None
    if "formula" in values:
        counts = _composition(str(values["formula"]), config, facts)
        if size is not None and size != sum(counts):
            raise ConfigError(
                f"atoms: {size}, but {values['formula']} has {sum(counts)} atoms here"
            )
        size = sum(counts)
    names = columns(config, facts)
    asked = {
        column: _number(name, values[name]) for column, name in enumerate(names) if name in values
    }
    if counts is not None:
        first = names.index("composition")
        asked |= {first + k: float(count) for k, count in enumerate(counts)}
    examples = np.array(facts["examples"])
    examples = examples[examples[:, 0] >= min(least, examples[:, 0].max())]
    context = examples[:, 1:]
    # The nearest training molecules tell what goes with what is asked: their size and the rest.
    offset = np.zeros(len(examples))
    for column, value in asked.items():
        offset += ((context[:, column] - value) / facts["context_std"][column]) ** 2
    if size is not None:
        offset += 1e6 * (examples[:, 0] - size) ** 2
    near = (
        np.argsort(offset, kind="stable")[: max(1, len(examples) // 20)] if asked or size else ()
    )
    chosen = int(near[draw % len(near)]) if len(near) else draw % len(examples)
    row = [asked.get(column, float(value)) for column, value in enumerate(context[chosen])]
    return size or max(least, int(examples[chosen, 0])), row


def _drawn_size(facts: Mapping[str, Any], draw: int, least: int) -> int:
    sizes, counts = np.array(facts["sizes"]).T
    if least > sizes.max():
        return least
    sizes, counts = sizes[sizes >= least], counts[sizes >= least]
    return int(sizes[np.searchsorted(np.cumsum(counts), draw % counts.sum(), side="right")])


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ConfigError(f"{name}: a number is needed, got {value!r}")
    return float(value)


def _size(value: Any, facts: Mapping[str, Any]) -> int:
    largest = facts["max_atoms"]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2 * largest:
        raise ConfigError(
            f"atoms: {value!r} cannot be drawn. Give a number from 1 to {2 * largest} (the "
            f"largest training molecule has {largest})"
        )
    return value


def _composition(formula: str, config: MoleculeConfig, facts: Mapping[str, Any]) -> list[int]:
    """Counts of each element; hydrogens do not count where they are removed."""
    if not re.fullmatch(r"([A-Z][a-z]?\d*)+", formula):
        raise ConfigError(f"formula: '{formula}' is not a formula. Write it as in C4H8O")
    counts = dict.fromkeys(facts["elements"], 0)
    for symbol, count in re.findall(r"([A-Z][a-z]?)(\d*)", formula):
        z = SYMBOLS.index(symbol) if symbol in SYMBOLS else 0
        if z == 1 and config.hydrogens == "removed":
            continue
        if z not in counts:
            known_symbols = " ".join(SYMBOLS[e] for e in counts)
            raise ConfigError(f"formula: the model does not know {symbol}, only {known_symbols}")
        counts[z] += int(count or 1)
    _size(sum(counts.values()), facts)
    return list(counts.values())


def _conformer_templates(
    config: MoleculeConfig, facts: Mapping[str, Any], request: Request
) -> tuple[Space, Cond | None]:
    _check_names(request, [condition.name for condition in conditions(config, facts)])
    wanted = request.values.get("smiles", facts["asked"])
    listed = [str(s) for s in (wanted if isinstance(wanted, (list, tuple)) else [wanted])]
    if not listed:
        raise ConfigError("smiles: an empty list. Give at least one molecule")
    lookup = {z: k for k, z in enumerate(facts["elements"])}
    graphs = []
    for smiles in listed:
        numbers, bonds = conformers.graph(smiles)
        for z in numbers.tolist():
            if z not in lookup:
                symbols = " ".join(SYMBOLS[e] for e in facts["elements"])
                raise ConfigError(
                    f"smiles: {smiles} has {SYMBOLS[z]}, the model knows {symbols} only"
                )
        graphs.append((np.array([lookup[z] for z in numbers.tolist()]), bonds))
    width = max(facts["max_atoms"], *(len(types) for types, _ in graphs))
    mine = [graphs[i % len(graphs)] for i in request.ids]
    space = Ragged(torch.tensor([len(types) for types, _ in mine]), 3, 3)
    return space, graph_cond(mine, width)
