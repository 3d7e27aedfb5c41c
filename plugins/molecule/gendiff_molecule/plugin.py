"""The molecule modality, as the engine sees it. Imports no torch until a method is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from gendiff import hookimpl
from gendiff.errors import ConfigError
from gendiff.modality import (
    Condition,
    DataReport,
    Exhibit,
    Features,
    Given,
    Measure,
    Modality,
    Property,
    Request,
    Section,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from gendiff.spaces import Batch, Categories, Cond, Space

Positive = Annotated[int, Field(gt=0, le=1 << 20)]
Depth = Annotated[int, Field(gt=0, le=1000)]  # layers, each of which is built


class MoleculeConfig(Section):
    """The section ``molecule`` of a configuration: the task, the data, then the network."""

    task: Literal["generate", "conformer"] = Field(
        "generate", description="generate: types and positions; conformer: positions of a graph"
    )
    data: Literal["embedded", "qm9", "files"] = Field(
        "embedded", description="embedded is made by rules on first use, without a download"
    )
    path: str | None = Field(None, description="PyG's QM9 folder, a file, or a folder of files")
    hydrogens: Literal["removed", "explicit"] = Field(
        "removed", description="removed: heavy atoms only, RDKit adds hydrogens to samples"
    )
    elements: tuple[str, ...] | None = Field(
        None, description="symbols that are allowed; null: those of the data"
    )
    max_atoms: Positive = Field(256, description="larger molecules are refused")
    skip_bad: bool = Field(False, description="leave out molecules that cannot be used")
    heavy_atoms: Annotated[int, Field(ge=1, le=8)] = Field(
        7, description="embedded data: at most so many heavy atoms"
    )
    conformers: Positive = Field(1, description="embedded data: conformers of each molecule")
    condition: tuple[str, ...] = Field(
        (), description="what to condition on: names of targets, or composition"
    )

    regressor_steps: Positive = Field(
        3000, description="training of the regressor that judges conditions on properties"
    )

    type_scale: float = Field(0.25, gt=0, description="one-hot types are scaled by this, Angstrom")
    type_loss: Literal["cross_entropy", "squared"] = Field(
        "cross_entropy", description="squared: types are numbers like the positions, as in EDM"
    )
    network: Literal["pair", "egnn"] = Field(
        "pair", description="pair: attention over pairs; egnn: EDM's (Hoogeboom et al., 2022)"
    )
    width: Positive = Field(96, description="features of an atom")
    pair_width: Positive = Field(32, description="features of a pair of atoms (pair)")
    layers: Depth = Field(5, description="layers")
    heads: Positive = Field(8, description="attention heads (pair)")
    groups: Positive = Field(2, description="groups of like size into which a batch is cut")

    @property
    def needs_bonds(self) -> bool:
        """Whether the task is given the graph."""
        return self.task == "conformer"


class MoleculeModality(Modality):
    """Sets of atoms: positions in Angstrom without centre of mass, and one-hot types."""

    name: ClassVar[str] = "molecule"
    summary: ClassVar[str] = "3D molecules: types and positions, or conformers of a graph"
    Config: ClassVar[type[Section]] = MoleculeConfig
    # For heavy atoms of the embedded data, on one core; configs/molecule/small.yaml is the same
    # recipe as a file, docs/benchmarks.md how it was found.
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,  # layers this small gain little from more
        "diffusion": {
            "schedule": {"name": "edm", "sigma_max": 5.0},
            "data_std": 0.96,
            "times": {"name": "log_normal", "mean": -0.9, "std": 1.3},
        },
        "train": {
            "steps": 9000,
            "batch_size": 128,
            "lr": 5e-3,
            "lr_decay": "cosine",
            "betas": [0.9, 0.99],
            "ema_half_life_steps": 300,
            "sample_every_steps": 3000,
            "checkpoint_every_steps": 1000,
        },
        "sample": {
            "sampler": {"name": "euler", "churn": 40.0},
            "grid": {"name": "log_normal", "mean": -2.3, "std": 0.9},
            "steps": 100,
            "preview": 16,
        },
    }
    headline: ClassVar[tuple[str, ...]] = ("frechet_distance", "valid_and_unique")

    def prepare(self, config: MoleculeConfig) -> DataReport:
        """See :meth:`gendiff.Modality.prepare`."""
        from gendiff_molecule import task

        return task.prepare(config)

    def dataset(
        self, config: MoleculeConfig, facts: Mapping[str, Any], split: str
    ) -> Dataset[Any]:
        """See :meth:`gendiff.Modality.dataset`."""
        from gendiff_molecule import task

        return task.dataset(config, facts, split)

    def collate(
        self, config: MoleculeConfig, facts: Mapping[str, Any], items: Sequence[Any]
    ) -> Batch:
        """Centred positions and scaled one-hot types, x (R, 3 + K)."""
        from gendiff_molecule import task

        return task.collate(config, facts, items)

    def categories(
        self, config: MoleculeConfig, facts: Mapping[str, Any]
    ) -> tuple[Categories, ...]:
        """The columns of the types."""
        from gendiff.spaces import Categories

        if config.task == "conformer" or config.type_loss == "squared":
            return ()
        return (Categories(3, len(facts["elements"]), config.type_scale),)

    def backbone(self, config: MoleculeConfig, facts: Mapping[str, Any]) -> nn.Module:
        """The network.

        Raises:
            ConfigError: Its keys contradict each other.
        """
        from gendiff_molecule.egnn import EGNN
        from gendiff_molecule.pairnet import PairNet

        kinds = len(facts["elements"])
        context = len(facts.get("context_mean", ()))
        if config.network == "egnn":
            if config.task == "conformer":
                raise ConfigError(
                    "molecule.network: egnn does not see the graph, the conformer task needs pair"
                )
            return EGNN(kinds, config.width, config.layers, context=context, groups=config.groups)
        if config.width % config.heads:
            raise ConfigError(
                f"molecule.width: {config.width} is not divisible by molecule.heads={config.heads}"
            )
        return PairNet(
            0 if config.task == "conformer" else kinds,
            config.width,
            config.pair_width,
            config.heads,
            config.layers,
            context=context,
            graph_types=kinds if config.task == "conformer" else 0,
            groups=config.groups,
        )

    def templates(
        self, config: MoleculeConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        """``atoms``, ``formula``, a property by its name, or ``smiles``, each also as a list.

        What is not asked for is drawn from the training data: sizes from their histogram, sizes
        and properties together.
        """
        from gendiff_molecule import asked

        return asked.templates(config, facts, request)

    def conditions(
        self, config: MoleculeConfig, facts: Mapping[str, Any]
    ) -> tuple[Condition, ...]:
        """Those of :meth:`templates`."""
        from gendiff_molecule import asked

        return asked.conditions(config, facts)

    def given(
        self,
        config: MoleculeConfig,
        facts: Mapping[str, Any],
        path: Path,
        keep: str | None,
        request: Request,
    ) -> Given:
        """A molecule's file; ``keep`` is a SMARTS pattern or atoms' numbers, ``0,1,2``."""
        from gendiff_molecule import scaffold

        return scaffold.given(config, facts, path, keep, request)

    def property_named(
        self, config: MoleculeConfig, facts: Mapping[str, Any], name: str, cache: Path
    ) -> Property:
        """A target of the data, by a regressor that is trained when it is first asked for."""
        from gendiff_molecule import properties

        return properties.steering(config, tuple(facts["elements"]), name, cache)

    def write(
        self,
        config: MoleculeConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """An SDF with bonds for each sample, ``00017.sdf``, and an XYZ beside it."""
        from gendiff_molecule import pictures, task

        molecules = task.unpack(config, facts, batch)
        return pictures.write(molecules, folder, ids, config.hydrogens)

    def preview(
        self, config: MoleculeConfig, facts: Mapping[str, Any], batch: Batch, path: Path
    ) -> Path:
        """A grid: each molecule in space, and its structure."""
        from gendiff_molecule import pictures, task

        return pictures.preview(task.unpack(config, facts, batch), path)

    def film(
        self, config: MoleculeConfig, facts: Mapping[str, Any], frames: Sequence[Batch], path: Path
    ) -> Path:
        """The estimates one after the other, seen from one place."""
        from gendiff_molecule import pictures, task

        states = [task.unpack(config, facts, frame)[0] for frame in frames]
        return pictures.animate(states, path)

    def exhibits(
        self,
        config: MoleculeConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        ids: Sequence[int],
    ) -> list[Exhibit]:
        """The molecule in space, its structure, its formula and its SMILES."""
        from gendiff_molecule import pictures, task

        return pictures.exhibits(task.unpack(config, facts, batch))

    def stages(
        self, config: MoleculeConfig, facts: Mapping[str, Any], frames: Sequence[Batch]
    ) -> list[Exhibit]:
        """The estimates in space, all as the last one is seen best."""
        from gendiff_molecule import pictures, task

        return pictures.stages([task.unpack(config, facts, frame) for frame in frames])

    def metrics(
        self,
        config: MoleculeConfig,
        facts: Mapping[str, Any],
        samples: Batch,
        cache: Path,
        seed: int,
    ) -> Iterable[Measure]:
        """See :mod:`gendiff_molecule.metrics`, ``conformers`` and ``properties``."""
        from gendiff_molecule import judging

        return judging.measure(config, facts, samples, cache, seed)

    def features(
        self,
        config: MoleculeConfig,
        facts: Mapping[str, Any],
        batches: Iterable[Batch],
        cache: Path,
        seed: int,
    ) -> Features:
        """Of distances, elements, size and shape, see :mod:`gendiff_molecule.descriptors`."""
        from gendiff.metrics import joined
        from gendiff_molecule import descriptors, task

        parts = (task.unpack(config, facts, batch) for batch in batches)
        elements = facts["elements"]
        found = [descriptors.features(config, elements, part) for part in parts]
        return joined(found, descriptors.ABOUT)

    def sample_count(self, facts: Mapping[str, Any]) -> int:
        """1000 molecules, or 40 conformers of each molecule that is asked for."""
        return 40 * len(facts["asked"]) if facts["task"] == "conformer" else 1000


@hookimpl
def gendiff_modality() -> Modality:
    """Hands the modality to the engine."""
    return MoleculeModality()
