"""The contract between the engine and a modality: one object, handed over by a plugin.

A modality brings data and a backbone. It never brings a training loop, a noise schedule, a
sampler, a checkpoint format or randomness of its own: these are the engine's, and every modality
has all of them. This module imports no torch, and a plugin's entry-point module must not either,
so that ``gendiff plugins`` stays instant.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict

from gendiff import PLUGIN_API
from gendiff.errors import ConfigError, suggest

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from gendiff.spaces import Batch, Categories, Cond, Space
    from gendiff.steering import Function


class Section(BaseModel):
    """A section of the configuration: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


@dataclass(frozen=True)
class DataReport:
    """What ``prepare`` found.

    Args:
        summary: One line for the person who waits.
        facts: What the other methods need to know of the data (number of classes, size, …).
            Plain JSON values: they are kept in the run, so that sampling needs no data. A run is
            not resumed where they differ, or, if there is one, where ``content`` does: a digest
            of all that training reads, see :func:`gendiff.data.content_of`.
        warnings: One line each.
    """

    summary: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """Which samples to make.

    Args:
        ids: Their numbers; sample i depends on the seed and i alone.
        seed: The seed.
        values: What the person asked for (``--cond label=7``), names to plain values.
    """

    ids: Sequence[int]
    seed: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)

    def classes(self, **counts: int) -> Cond:
        """The classes asked for; of a condition that is not asked for, all in turn.

        Several may be asked for, as in ``--cond 'label=[1, 3]'``: the ids go round them.

        Args:
            counts: How many classes each condition has.

        Raises:
            ConfigError: There is no such condition or class.
        """
        import torch

        from gendiff.spaces import Cond

        for name in self.values:
            if name not in counts:
                raise ConfigError(f"cond: unknown condition '{name}'.{suggest(name, counts)}")
        told, turn = {}, 1
        for name, count in counts.items():
            asked = self.values.get(name, range(count))
            entries = asked if isinstance(asked, (list, tuple, range)) else [asked]
            for k in entries or [None]:
                if isinstance(k, bool) or k not in range(count):
                    raise ConfigError(f"cond: {name}={k} is no class. Give 0 to {count - 1}")
            row = [entries[i // turn % len(entries)] for i in self.ids]
            told[name] = torch.tensor(row, dtype=torch.long)
            turn *= len(entries)  # so that all pairs of classes come up
        return Cond(told)


@dataclass(frozen=True)
class Condition:
    """A condition that a model takes: ``--cond name=value``, a field in ``gendiff demo``.

    Args:
        name: Its name in :attr:`Request.values`.
        about: What it asks for, in a few words, with its unit.
        values: Values that it takes, texts or numbers of one kind; the first is shown as a hint.
        closed: ``values`` are all that there are: a choice. Otherwise a number is asked for
            where they are numbers, and a text where they are texts or there are none.
    """

    name: str
    about: str
    values: Sequence[str | int | float] = ()
    closed: bool = False


@dataclass(frozen=True)
class Given:
    """What a file gives to the samples that are to be made of it.

    Args:
        batch: A state for each sample. Where the file says nothing of an element, it is NaN.
        mask: True where an element is to be kept, of the shape of ``batch.x``; None if nothing is.
    """

    batch: Batch
    mask: Tensor | None = None


@dataclass(frozen=True)
class Property:
    """A differentiable property by which samples may be steered.

    Args:
        function: The property of each sample, (B,), of estimates of the data.
        tolerance: A standard deviation in its unit: how well the function knows the property.
    """

    function: Function
    tolerance: float


@dataclass(frozen=True)
class Measure:
    """One figure about samples, with what is needed to judge it.

    Args:
        name: What was measured, named as what it is.
        value: The figure.
        better: ``"lower"`` or ``"higher"``.
        floor: The same measured on held-out real data against real data, where it exists.
        note: Definition, reference set and counts, in one line.
        error: Standard error of the value, over sets of so many samples.
    """

    name: str
    value: float
    better: str
    floor: float | None = None
    note: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Features:
    """What the engine compares samples and data by.

    Args:
        values: Features of each sample, (N, F), on the CPU. Distances between them should mean
            something: near where a person would say that two samples are alike.
        about: What they are, in a few words.
    """

    values: Tensor
    about: str


@dataclass(frozen=True)
class Picture:
    """A picture of a sample.

    Args:
        png: The content of a PNG file.
        drawing: Dark lines on white, of which a dark page shows the negative.
    """

    png: bytes
    drawing: bool = False


@dataclass(frozen=True)
class Sound:
    """The sound of a sample.

    Args:
        wav: The content of a WAV file.
    """

    wav: bytes


class Ball(NamedTuple):
    """A ball of a :class:`Scene`: its centre and radius in the scene's unit, its RGB colour."""

    centre: tuple[float, float, float]
    radius: float
    colour: int  # 0xRRGGBB


class Stick(NamedTuple):
    """A cylinder of a :class:`Scene`: its ends and radius in the scene's unit, its colour."""

    start: tuple[float, float, float]
    end: tuple[float, float, float]
    radius: float
    colour: int  # 0xRRGGBB


@dataclass(frozen=True)
class Scene:
    """Balls and sticks in space, to be turned: x to the right, y up, z towards who looks.

    Args:
        balls: The balls.
        sticks: The sticks.
        still: A picture of it, for where nothing can turn.
    """

    balls: Sequence[Ball]
    sticks: Sequence[Stick]
    still: Picture


@dataclass(frozen=True)
class Exhibit:
    """A sample as a report shows it.

    Args:
        parts: What is seen and heard of it, the most telling first.
        title: What it is, in a few words, or nothing.
        notes: What there is to say of it, a few words each.
    """

    parts: tuple[Picture | Sound | Scene, ...]
    title: str = ""
    notes: tuple[str, ...] = ()


class Modality(ABC):
    """What a plugin implements. ``config`` is always an instance of the class's ``Config``.

    Every method but :meth:`prepare` gets the ``facts`` that it reported. The abstract ones must be
    written; the others do what serves arrays of one shape, or nothing.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    api_version: ClassVar[int] = PLUGIN_API
    Config: ClassVar[type[Section]] = Section
    # Differences from the engine's own defaults, as in a YAML file: {"train": {"steps": 2000}}.
    defaults: ClassVar[Mapping[str, Any]] = {}
    # Keys of the section that say how samples are written. They change no training: they may
    # differ when a run is resumed, and ``gendiff sample RUN --set key=value`` sets them.
    output_keys: ClassVar[frozenset[str]] = frozenset()
    # The figures that say most, the first the most, of the modality's own and the engine's.
    headline: ClassVar[tuple[str, ...]] = ("frechet_distance",)

    @abstractmethod
    def prepare(self, config: Any) -> DataReport:
        """Finds, checks and caches the data, before anything else happens.

        Raises:
            DataError: The data is missing, empty or damaged; the message says where and the fix.
        """

    def settled(self, config: Any, facts: Mapping[str, Any]) -> Any:
        """The section for :meth:`prepare` of a run that goes on, given the facts of its beginning.

        A modality that chooses by what is installed puts what was chosen then in place of
        ``auto``; the section itself unless a modality says more.
        """
        return config

    @abstractmethod
    def dataset(self, config: Any, facts: Mapping[str, Any], split: str) -> Dataset[Any]:
        """The ``"train"`` or ``"test"`` split, map-style.

        ``dataset[index, seed]`` is an item; whatever is random about it (a flip, a crop) is a
        function of the given integer seed. The held-out split must not use the seed.
        """

    def collate(self, config: Any, facts: Mapping[str, Any], items: Sequence[Any]) -> Batch:
        r"""Makes a batch of items.

        Unless a modality says more, an item is an array x (C, \*), or such an array and its
        conditions, ``(x, {"label": 3})``; the batch is :class:`gendiff.Dense`.
        """
        from gendiff import arrays

        return arrays.stack(items)

    @abstractmethod
    def backbone(self, config: Any, facts: Mapping[str, Any]) -> nn.Module:
        """The network, ``(x, noise, cond, space) -> like x``.

        ``x`` is the input-scaled noisy state; ``noise`` (B,) or (B, P) the number that stands for
        the noise level (see :mod:`gendiff.denoiser`); ``cond`` a :class:`gendiff.spaces.Cond` or
        None; ``space`` the batch's space. The output may have twice the width on axis 1: the
        second half then is the learned reverse variance (Nichol & Dhariwal, 2021).
        """

    def categories(self, config: Any, facts: Mapping[str, Any]) -> tuple[Categories, ...]:
        """The columns of a state that hold one-hot codes; none unless a modality says so."""
        return ()

    def distance(
        self, config: Any, facts: Mapping[str, Any]
    ) -> Callable[[Tensor, Batch], Tensor] | None:
        """A loss of the modality's own: how far estimates x_hat are from a batch's data, (B,).

        It is added to the squared error at the weight ``diffusion.distance_weight``, and must be
        differentiable. None unless a modality has one, such as a distance of features.
        """
        return None

    def bin_width(self, config: Any, facts: Mapping[str, Any]) -> float | None:
        """The distance between neighbouring values of data that are discrete, in x's units.

        With it a likelihood is a probability of the data and is told in bits/dim. None, unless a
        modality says so, for data that are continuous, or whose columns differ.
        """
        return None

    @abstractmethod
    def templates(
        self, config: Any, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        """The space and the conditions of the samples to be made.

        What they hold for a sample may depend on its id and the seed only, not on its neighbours.

        Raises:
            ConfigError: The request names something unknown or out of range.
        """

    def conditions(self, config: Any, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        """The conditions that :meth:`templates` knows, each of which may be left out.

        None unless a modality says so; ``gendiff demo`` shows a field for each.
        """
        return ()

    def given(
        self, config: Any, facts: Mapping[str, Any], path: Path, keep: str | None, request: Request
    ) -> Given:
        """Reads a file of the kind that :meth:`write` makes, for ``gendiff edit``.

        A modality that writes files of its own must read them itself.

        Args:
            config: The section.
            facts: The data's facts.
            path: The file.
            keep: What of it is to be kept, in words of the modality's own; None for nothing. Of an
                array: slices of its axes, ``0:4,:``.
            request: Which samples to make of it, as for :meth:`templates`.

        Raises:
            ConfigError: The modality reads no files, or cannot meet what is asked.
            DataError: The file cannot be used.
        """
        if type(self).write is not Modality.write:
            raise ConfigError(f"modality '{self.name}' cannot edit: it reads no files")
        from gendiff import arrays

        return arrays.read(path, keep, *self.templates(config, facts, request))

    def property_named(
        self, config: Any, facts: Mapping[str, Any], name: str, cache: Path
    ) -> Property:
        """The property of this name, for ``--toward name=value``.

        ``cache`` is a folder in which a network that was trained for it may be kept.

        Raises:
            ConfigError: There is none of this name.
        """
        raise ConfigError(f"toward: modality '{self.name}' knows no property '{name}'")

    def check_output(self, config: Any, facts: Mapping[str, Any]) -> None:  # noqa: B027
        """Checks what :meth:`write` needs besides the samples, before there are any.

        Raises:
            ConfigError, CheckpointError: It is missing or does not fit.
        """

    def write(
        self,
        config: Any,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """Writes each sample to a file of its own in ``folder``, named after its id.

        Unless a modality says more: its state as ``00017.npy``.
        """
        from gendiff import arrays

        return arrays.write(batch, folder, ids)

    def preview(self, config: Any, facts: Mapping[str, Any], batch: Batch, path: Path) -> Path:
        """Draws the samples into one picture at ``path`` (a PNG).

        Unless a modality says more: a grey square for each number, a line for each sample.
        """
        from gendiff import arrays

        return arrays.picture(batch, path)

    def film(
        self, config: Any, facts: Mapping[str, Any], frames: Sequence[Batch], path: Path
    ) -> Path | None:
        """Draws how one sample came about as a moving picture at ``path`` (a GIF).

        ``frames`` are the estimates of the finished sample, one a step, each a batch of one.
        None from a modality that has no such picture.
        """
        return None

    def exhibits(
        self, config: Any, facts: Mapping[str, Any], batch: Batch, ids: Sequence[int]
    ) -> list[Exhibit]:
        """Each sample by itself, as ``gendiff report`` shows it; also those on their way.

        Unless a modality says more: the picture that :meth:`preview` draws of it.
        """
        with tempfile.TemporaryDirectory() as folder:
            paths = [
                self.preview(config, facts, batch.select([row]), Path(folder) / f"{row}.png")
                for row in range(len(ids))
            ]
            return [Exhibit((Picture(path.read_bytes()),)) for path in paths]

    def stages(
        self, config: Any, facts: Mapping[str, Any], frames: Sequence[Batch]
    ) -> list[Exhibit]:
        """How one sample came about, an exhibit a frame; ``frames`` are those of :meth:`film`.

        A modality overrides it where frames must not be shown each by itself: from one camera.
        """
        return [self.exhibits(config, facts, frame, [0])[0] for frame in frames]

    def metrics(
        self, config: Any, facts: Mapping[str, Any], samples: Batch, cache: Path, seed: int
    ) -> Iterable[Measure]:
        """Judges generated samples against held-out data, by what only the modality knows.

        What can be said of any data the engine says itself, by :meth:`features`. What takes long
        should come last: who wants :attr:`headline` alone takes no more than that.
        ``cache`` is a folder in which feature networks and statistics of the data may be kept.
        """
        return []

    def features(
        self,
        config: Any,
        facts: Mapping[str, Any],
        batches: Iterable[Batch],
        cache: Path,
        seed: int,
    ) -> Features:
        """Features of states on the CPU, generated or real, for :mod:`gendiff.metrics`.

        Those of a modality that has none of its own are
        :func:`gendiff.metrics.plain_features`. They must not depend on the batches' sizes.
        """
        from gendiff import metrics

        about = "the state itself, projected where it is wide, or its columns' moments"
        return metrics.joined([metrics.plain_features(batch) for batch in batches], about)

    def reference(self, config: Any, facts: Mapping[str, Any]) -> Sequence[int]:
        """Numbers of the held-out items that samples are compared with: all of them.

        Those from which the network behind :meth:`features` learnt should be left out.
        """
        return range(len(self.dataset(config, facts, "test")))  # type: ignore[arg-type]

    def together(self, config: Any, facts: Mapping[str, Any]) -> int:
        """How many samples a CPU draws together; one alone costs as much as all of them.

        Many small ones cost little more than one, and large ones their sum. The last bits of a
        sample depend on it.
        """
        return 16

    def sample_count(self, facts: Mapping[str, Any]) -> int:
        """How many samples ``gendiff evaluate`` makes when it is not told."""
        return 1000
