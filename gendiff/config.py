"""Configuration: pydantic models, YAML, ``key=value`` overrides, errors that name their source.

Precedence: command line, ``--config`` files (later wins), the modality's defaults, the defaults
written in the models below. The resolved configuration is kept in the run.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationError,
    create_model,
    model_validator,
)

from gendiff.errors import ConfigError, printable, suggest
from gendiff.modality import Modality, Section

# --- named parts: schedules, samplers, … --------------------------------------------------------


@cache
def registry(kind: str) -> dict[str, type[Any]]:
    """Classes by name: the engine's own and those of plugins (hook ``gendiff_parts``)."""
    from gendiff import grids, guidance, objective, plugins, samplers, schedules

    own: dict[str, Mapping[str, type[Any]]] = {
        "schedule": schedules.SCHEDULES,
        "sampler": samplers.SAMPLERS,
        "grid": grids.GRIDS,
        "times": objective.TIMES,
        "weight": objective.WEIGHTS,
        "clip": guidance.CLIPS,
    }
    return dict(own[kind]) | plugins.extra_parts(kind)


def build(kind: str, value: Any) -> Any:
    """Makes a part from its name, or from a mapping of ``name`` and parameters.

    Raises:
        ValueError: Unknown name or parameter, or a value out of range; one line.
    """
    if not isinstance(value, (str, Mapping)):
        if type(value) in registry(kind).values():
            return value
        raise ValueError(f"a name or a mapping with a name is needed, got {value!r}")
    params = {"name": value} if isinstance(value, str) else {str(k): v for k, v in value.items()}
    name = str(params.pop("name", None))
    classes = registry(kind)
    if name not in classes:
        raise ValueError(f"no {kind} '{name}'.{suggest(name, classes)}")
    return _make(classes[name], params, f"{kind} '{name}'")


def _make(cls: type[Any], params: Mapping[str, Any], what: str) -> Any:
    """A dataclass from its parameters, parts among them by their names; see :func:`build`."""
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in params:
        if key not in fields:
            raise ValueError(f"{what} has no '{key}'.{suggest(key, fields)}")
    try:
        checked = _model(cls).model_validate(dict(params))  # type: ignore[arg-type]
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc']))}: {_message(problem)}") from None
    return cls(**{field: getattr(checked, field) for field in fields})


@cache
def _model(cls: type[Any]) -> type[BaseModel]:
    """A dataclass's fields as pydantic checks them; a field that is a schedule is a part."""
    from gendiff.schedules import Schedule

    hints = get_type_hints(cls)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        needed = field.default is dataclasses.MISSING
        fields[field.name] = (
            Annotated[Any, *_named("schedule")] if kind is Schedule else kind,
            ... if needed else field.default,
        )
    return create_model(cls.__name__, **fields)


def describe(kind: str, part: Any) -> dict[str, Any]:
    """The mapping that makes this part again."""
    name = next(name for name, cls in registry(kind).items() if cls is type(part))
    return {"name": name} | {key: _plain(value) for key, value in vars(part).items()}


def _plain(value: Any) -> Any:
    from gendiff.schedules import Schedule

    return describe("schedule", value) if isinstance(value, Schedule) else value


def _named(kind: str) -> tuple[BeforeValidator, PlainSerializer]:
    return (
        BeforeValidator(lambda value: build(kind, value)),
        PlainSerializer(lambda part: describe(kind, part)),
    )


def guidance_of(value: Any) -> Any:
    """Guidance from its scale alone or a mapping of its parameters.

    Raises:
        ValueError: Unknown parameter, or a value out of range; one line.
    """
    from gendiff.guidance import Guidance

    if isinstance(value, Guidance):
        return value
    given = value if isinstance(value, Mapping) else {"scale": value}
    params = {str(key): inner for key, inner in given.items()}
    guidance = _make(Guidance, params, "guidance")
    if guidance.scale < 0:
        raise ValueError(f"scale={guidance.scale:g}: a number of at least 0 is needed")
    return guidance


def _describe_guidance(guidance: Any) -> Any:
    """The scale alone where the rest is as by default."""
    changed = {k: v for k, v in vars(guidance).items() if v != getattr(type(guidance), k)}
    return changed if changed.keys() - {"scale"} else guidance.scale


# --- the models ---------------------------------------------------------------------------------


def _option(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, validate_default=True, **limits)


class DiffusionConfig(Section):
    """The process, the prediction and the loss."""

    schedule: Annotated[Any, *_named("schedule")] = _option(
        "edm", "the noise schedule: t -> alpha, sigma"
    )
    prediction: Literal["eps", "x", "v", "flow", "edm"] = _option(
        "edm", "what the network puts out"
    )
    data_std: float = _option(0.5, "standard deviation of the data", gt=0)
    noise_input: Literal["log_snr", "time"] = _option("log_snr", "what the network embeds")
    times: Annotated[Any, *_named("times")] = _option("log_normal", "density of training times")
    weight: Annotated[Any, *_named("weight")] = _option("edm", "weight on x_hat's squared error")
    stratified: bool = _option(True, "spread each step's times evenly")
    cond_dropout: float = _option(
        0.1, "share of training samples whose condition is hidden, for guidance", ge=0, le=1
    )
    vlb_weight: float = _option(0.001, "weight of the bound that trains a learned variance", ge=0)
    vlb_steps: int = _option(1000, "steps of the chain of this bound", ge=2, le=10**6)
    category_weight: float = _option(1.0, "weight of the categories' cross-entropy", ge=0)
    distance_weight: float = _option(1.0, "weight of the modality's own distance, if any", ge=0)

    @model_validator(mode="after")
    def _eps_needs_signal(self) -> DiffusionConfig:
        import torch

        end = self.schedule.log_snr(torch.ones(1, dtype=torch.float64))
        if self.prediction == "eps" and end.min().item() == -math.inf:
            raise ValueError(
                "prediction 'eps' says nothing of x where the schedule has no signal, at t=1. "
                "Use prediction=v or flow, or a schedule that keeps some signal"
            )
        return self


class TrainConfig(Section):
    """The optimisation."""

    steps: int = _option(10_000, "optimiser steps", ge=1)
    batch_size: int = _option(128, "samples of a step", ge=1, le=2**24)
    accumulate: int = _option(1, "parts into which a step's batch is cut to save memory", ge=1)
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp", "under torchrun: ddp copies the network to every process, fsdp shards it"
    )
    lr: float = _option(1e-3, "AdamW's learning rate", gt=0)
    lr_decay: Literal["constant", "cosine", "linear"] = _option(
        "constant", "how the rate falls after the warm-up: not, or to 0 at the last step"
    )
    warmup_steps: int = _option(100, "steps of linear warm-up", ge=0)
    betas: tuple[float, float] = _option((0.9, 0.999), "AdamW's betas")
    weight_decay: float = _option(0.0, "AdamW's weight decay", ge=0)
    clip_norm: float = _option(1.0, "largest norm of the gradient; 0 for no limit", ge=0)
    ema_half_life_steps: float = _option(500.0, "half-life of the weights' average", ge=0)
    ema_warmup: float = _option(0.05, "half-life at most this share of the steps so far", gt=0)
    ema_widths: tuple[Annotated[float, Field(gt=0, lt=12**-0.5)], ...] = _option(
        (), "widths sigma_rel of power-function averages, for --ema-width; [0.05, 0.1] serves"
    )
    ema_snapshot_steps: int = _option(500, "steps between snapshots of these averages", ge=1)
    precision: Literal["auto", "fp32", "bf16"] = _option("auto", "auto: bf16 on capable GPUs")
    compile: bool = _option(False, "compile the network (torch.compile, in place)")
    workers: int = _option(0, "processes that load data", ge=0, le=1024)
    log_every_steps: int = _option(100, "steps between log lines", ge=1)
    sample_every_steps: int = _option(1000, "steps between previews; 0 for the last only", ge=0)
    checkpoint_every_steps: int = _option(1000, "steps between checkpoints", ge=1)
    keep_checkpoints: int = _option(2, "how many of the newest checkpoints stay", ge=1)

    @model_validator(mode="after")
    def _parts_are_equal(self) -> TrainConfig:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be cut into accumulate={self.accumulate} "
                "equal parts"
            )
        return self


class DrawConfig(Section):
    """How samples are drawn."""

    sampler: Annotated[Any, *_named("sampler")] = _option("dpm++2m", "the sampling method")
    grid: Annotated[Any, *_named("grid")] = _option("karras", "where the sampler's times lie")
    steps: int = _option(20, "steps of the grid", ge=1, le=100_000)
    guidance: Annotated[Any, BeforeValidator(guidance_of), PlainSerializer(_describe_guidance)] = (
        _option(1.0, "scale of guidance, 1 for none; or {scale, interval, rescale, …}")
    )
    clip: Annotated[Any, *_named("clip")] = _option(
        "none", "keeps estimates in the data's range: none, static, dynamic"
    )
    batch_size: int = _option(64, "samples at a time", ge=1, le=2**20)


class SampleConfig(DrawConfig):
    """The defaults of sampling, for previews, ``sample`` and ``evaluate``."""

    preview: int = _option(64, "samples of a preview in training", ge=1, le=2**16)


class DistillConfig(DrawConfig):
    """Of a student: the run that it learns from, and how that draws the pairs to be learnt."""

    grid: Annotated[Any, *_named("grid")] = _option("flow", "where the sampler's times lie")
    teacher: str = Field(description="the teacher's run folder")
    checkpoint: int = Field(description="the step of its weights", ge=0)
    pairs: int = _option(10_000, "pairs of noise and the teacher's sample", ge=1, le=2**40)


class RunConfig(Section):
    """Everything a run is made from; a modality adds its section under its own name."""

    name: str = _option("default", "name of the run's folder", pattern=r"^[\w-][\w.-]*$")
    out: str = _option("runs", "folder that holds the runs")
    seed: int = _option(0, "names every random number of the run", ge=0, lt=2**63)
    device: str = _option(
        "auto", "auto, cpu, cuda, cuda:1 or mps; auto: the first GPU, else the CPU"
    )
    threads: int = _option(0, "CPU threads; 0 as many as there are cores", ge=0, le=4096)
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    distill: DistillConfig | None = _option(None, "what a student learns from; null: the data")


# These may differ when a run is resumed: they do not change what is computed.
VOLATILE = (
    "out",
    "device",
    "distill.teacher",
    "train.workers",
    "train.parallel",
    "train.log_every_steps",
    "train.keep_checkpoints",
    "train.checkpoint_every_steps",
)


# --- resolving ----------------------------------------------------------------------------------


def resolve(
    modality: Modality,
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The configuration of a run; ``base`` takes the place of the modality's defaults.

    Raises:
        ConfigError: A line for each problem, with the key, its source and a suggestion.
    """
    layers = [("command line", parse_override(text)) for text in overrides]
    return resolve_layers(modality, files, layers, base)


def resolve_layers(
    modality: Modality,
    files: Sequence[Path],
    more: Sequence[tuple[str, Mapping[str, Any]]],
    base: Mapping[str, Any] | None = None,
) -> RunConfig:
    """As :func:`resolve`, with (source, plain data) over the files."""
    layers: list[tuple[str, Mapping[str, Any]]] = [
        (f"{modality.name} defaults", dict(modality.defaults))
        if base is None
        else ("the run that it is based on", dict(base))
    ]
    layers += [(str(path), read_yaml(path)) for path in files]
    layers += more
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        merged = merge(merged, layer)
        sources.update(dict.fromkeys(flatten(layer), source))
    return validate(modality, merged, sources)


def validate(
    modality: Modality, data: Mapping[str, Any], sources: Mapping[str, str] | None = None
) -> RunConfig:
    """Checks plain data against the models; see :func:`resolve`."""
    model = run_config_model(modality)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        valid = list(_keys(model))
        lines = [problem_line(problem, valid, sources or {}) for problem in error.errors()]
        raise ConfigError(*dict.fromkeys(lines)) from None


def run_config_model(modality: Modality) -> type[RunConfig]:
    """RunConfig with the modality's section."""
    return _with_section(modality.name, modality.Config)


@cache
def _with_section(name: str, section: type[Section]) -> type[RunConfig]:
    fields: dict[str, Any] = {name: (section, Field(default_factory=section))}
    return create_model("RunConfig", __base__=RunConfig, **fields)


DEEPEST = 32  # no configuration is nested deeper; some parsers recurse
LONGEST = 1 << 20  # characters of YAML


class _Loader(yaml.SafeLoader):
    """Plain data of no great depth, without aliases: a few of them can stand for terabytes."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            mark = event.start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not read", problem_mark=mark)
        if self.depth == DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {DEEPEST}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if not _is_text(value):
            problem = "a NUL or half a character, which no name and no path may hold"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8, and be a name."""
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def parse_yaml(text: str, what: str) -> Any:
    """Plain data: nothing is built that YAML's tags may ask for.

    Raises:
        ConfigError: It is not YAML, too long or too deep, or has aliases; begins with ``what``.
    """
    if len(text) > LONGEST:
        raise ConfigError(f"{what}: {len(text)} characters, more than {LONGEST}")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise ConfigError(f"{what}{where}: invalid YAML: {problem}") from None
    # What its constructors raise for !!int x, 2001-99-99 or a number of 5000 digits.
    except (ValueError, KeyError, AttributeError, OverflowError) as error:
        raise ConfigError(f"{what}: invalid YAML: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: It is missing, unreadable, or holds something else.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"config file {path}: not a text file") from None
    data = parse_yaml(text, f"config file {path}")
    if not isinstance(data or {}, dict):
        raise ConfigError(f"config file {path}: keys and values are needed, got {data!r}")
    return data or {}


def parse_override(text: str) -> dict[str, Any]:
    """``train.steps=10`` as {"train": {"steps": 10}}; the value is YAML.

    Raises:
        ConfigError: There is no ``=``, or the value is not YAML.
    """
    if not _is_text(text):
        raise ConfigError(f"'{printable(text)}' is not UTF-8 text (command line)")
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ConfigError(
            f"'{printable(text)}': overrides are written key=value, as in train.steps=1000"
        )
    if key.count(".") > DEEPEST:
        raise ConfigError(f"unknown key '{key}' (command line): no key has so many parts")
    return nested(key, parse_yaml(value, printable(f"{key}: the value '{value}' (command line)")))


def nested(key: str, value: Any) -> dict[str, Any]:
    """A dotted key and its value as nested mappings."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def merge(base: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of a configuration over another, key by key."""
    return dict(base) | {key: _merged(base.get(key), value) for key, value in new.items()}


def _merged(base: Any, new: Any) -> Any:
    """Mappings are merged, but a part of another name replaces the old one with its parameters."""
    if not isinstance(new, Mapping):
        return new
    if isinstance(base, str) and "name" not in new:
        base = {"name": base}  # diffusion.schedule.sigma_max=40 over "schedule: edm"
    if isinstance(base, float | int) and new:
        base = {"scale": base}  # sample.guidance.rescale=0.7 over "guidance: 2"
    if not isinstance(base, Mapping) or (
        "name" in base and "name" in new and base["name"] != new["name"]
    ):
        base = {}
    return merge(base, new)


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(data, Mapping):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any], modality: Modality) -> list[str]:
    """``key: old -> new`` for each key that matters to a run."""
    a, b = flatten(old), flatten(new)
    volatile = {*VOLATILE, *(f"{modality.name}.{key}" for key in modality.output_keys)}
    lines = []
    for key in sorted(a.keys() | b.keys()):
        if key not in volatile and a.get(key) != b.get(key):
            lines.append(f"{key}: {a.get(key)} -> {b.get(key)}")
    return lines


def dump(config: RunConfig) -> dict[str, Any]:
    """Plain data that :func:`validate` turns into the same configuration."""
    return config.model_dump(mode="json")


def commented(config: RunConfig) -> Iterator[str]:
    """The configuration as YAML, with each option's description behind it."""
    meaning = dict(help_lines(type(config)))
    yield from _commented(dump(config), meaning, "", "")


def _commented(
    data: Mapping[str, Any], meaning: Mapping[str, str], prefix: str, indent: str
) -> Iterator[str]:
    for key, value in data.items():
        path = prefix + key
        note = f"  # {meaning[path]}" if meaning.get(path) else ""
        if isinstance(value, dict) and any(known.startswith(f"{path}.") for known in meaning):
            yield f"{indent}{key}:{note}"
            yield from _commented(value, meaning, path + ".", indent + "  ")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False)
            yield f"{indent}{key}: {text.removesuffix('...' + chr(10)).strip()}{note}"


def help_lines(model: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, description) of every option."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        inner = [a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, Section)]
        if inner:  # a section that may be absent
            yield prefix + name, field.description or ""
            annotation = inner[0]
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield from help_lines(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.description or ""


def _keys(model: type[Section]) -> Iterator[str]:
    return (key for key, _ in help_lines(model))


def _message(problem: Any) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    return text if problem["type"] == "value_error" else f"{text}, got {problem['input']!r}"


def problem_line(problem: Any, valid: Sequence[str], sources: Mapping[str, str]) -> str:
    """One of pydantic's problems as a line with the key, its source and a suggestion."""
    key = printable(".".join(str(part) for part in problem["loc"]))
    # The source of the longest known key that this one continues, or that continues this one.
    related = [
        k for k in sources if k == key or key.startswith(k + ".") or k.startswith(key + ".")
    ]
    source = f" ({sources[max(related, key=len)]})" if related else ""
    if problem["type"] == "extra_forbidden":
        sections = {k.rpartition(".")[0] for k in valid} - {""}
        return f"unknown key '{key}'{source}.{suggest(key, [*valid, *sections])}"
    return f"{key}: {_message(problem)}{source}"
