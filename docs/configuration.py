"""Writes docs/configuration.md from the configuration's models: python docs/configuration.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from gendiff import config, plugins
from gendiff.benchmark import Entry, Sampling, Suite
from gendiff.guidance import Guidance
from gendiff.modality import Section

MODALITIES = ("image", "molecule", "speech", "vocoder")
PARTS = ("schedule", "times", "weight", "sampler", "grid", "clip")
HEAD = """# Configuration

Every key, as `python docs/configuration.py` wrote them down from the code; `gendiff config show
--modality NAME` prints those of a modality with their present values. Keys come from the command
line (`train.steps=500`), then `--config` files (the later wins), then the modality's defaults,
then those below. Unknown keys and values out of range are refused, all at once.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_engine(), *_parts(), *_modalities(), *_suite()]).rstrip() + "\n"


def _engine() -> Iterator[str]:
    top = config.RunConfig
    plain = [name for name, field in top.model_fields.items() if _section(field) is None]
    yield from ("## Of every run", "", *_table(top, "", plain))
    for name, field in top.model_fields.items():
        if section := _section(field):
            yield f"## `{name}`"
            yield from ("", _first(section), "", *_table(section, f"{name}.", None))


def _parts() -> Iterator[str]:
    yield "## Parts by name"
    yield ""
    yield "A part is its name, `diffusion.schedule=flow`, or a mapping of its name and parameters,"
    yield "`'diffusion.schedule={name: edm, sigma_max: 40}'`. Plugins may add more of each kind."
    yield ""
    for kind in PARTS:
        yield from (f"### {kind}", "", "| name | is | parameters |", "|---|---|---|")
        for name, cls in config.registry(kind).items():
            yield f"| `{name}` | {_first(cls)} | {_parameters(cls)} |"
        yield ""
    yield from ("### guidance", "", "| parameter | default | meaning |", "|---|---|---|")
    meaning = _arguments(Guidance)
    for field in dataclasses.fields(Guidance):
        yield f"| `{field.name}` | `{_plain(field.default)}` | {meaning[field.name]} |"
    yield ""


def _modalities() -> Iterator[str]:
    for name in MODALITIES:
        modality = plugins.modality(name)
        yield f"## `{name}`"
        yield from ("", f"The modality of this name: {modality.summary}.")
        yield from ("", *_table(modality.Config, f"{name}.", None))
        yield "What it sets of the engine's keys:"
        yield ""
        yield "```yaml"
        yield yaml.safe_dump(dict(modality.defaults), sort_keys=False).rstrip()
        yield "```"
        if modality.output_keys:
            keys = ", ".join(f"`{key}`" for key in sorted(modality.output_keys))
            yield from ("", f"`gendiff sample RUN --set KEY=VALUE` sets: {keys}.")
        yield ""


def _suite() -> Iterator[str]:
    yield from ("## A suite of `gendiff benchmark`", "", *_table(Suite, "", None))
    yield from ("Of an entry:", "", *_table(Entry, "entries.N.", None))
    yield from ("Of a sampler:", "", *_table(Sampling, "samplers.N.", None))


def _section(field: Any) -> type[Section] | None:
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _table(model: type[Section], prefix: str, only: Sequence[str] | None) -> Iterator[str]:
    schema = model.model_json_schema(mode="validation")
    yield "| key | default | takes | meaning |"
    yield "|---|---|---|---|"
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        default = "needed"
        if not field.is_required():
            default = f"`{_plain(field.get_default(call_default_factory=True))}`"
        takes = _takes(schema["properties"][name])
        yield f"| `{prefix}{name}` | {default} | {takes} | {_cell(field.description or '')} |"
    yield ""


def _plain(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        value = _named(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, Section):
        return "{" + ", ".join(f"{k}: {_plain(v)}" for k, v in value if v is not None) + "}"
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
    )


def _named(part: Any) -> Any:
    for kind in PARTS:
        if type(part) in config.registry(kind).values():
            return config.describe(kind, part)["name"]
    return part.scale  # guidance


def _takes(schema: dict[str, Any]) -> str:
    """A value's kind and limits, in words."""
    if "anyOf" in schema:
        return " or ".join(_takes(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        items = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_takes(items)}"
    kinds = {"integer": "whole number", "number": "number", "boolean": "true or false"}
    kinds |= {"string": "text", "null": "null", "object": "mapping"}
    signs = dict(minimum="≥", exclusiveMinimum=">", maximum="≤", exclusiveMaximum="<")
    limits = [
        f"{sign} {schema[k]:.4g}" for k, sign in signs.items() if schema.get(k, 2**62) < 2**62
    ]
    return " ".join([kinds.get(schema.get("type", ""), "see below"), *limits])


def _first(cls: type[Any]) -> str:
    """The first paragraph of a class's docstring in one line."""
    return _cell(" ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].splitlines()))


def _arguments(cls: type[Any]) -> dict[str, str]:
    """What a class's docstring, or that of its parent, says of each argument."""
    text = inspect.cleandoc(cls.__doc__ or "")
    if "\nArgs:\n" not in text:
        return _arguments(cls.__bases__[0]) if cls.__bases__ else {}
    told = text.partition("\nArgs:\n")[2].split("\n\n")[0]
    found = re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", told, re.M)
    return {
        name: _cell(" ".join(line.strip() for line in meaning.splitlines()))
        for names, meaning in found
        for name in names.split(", ")
    }


def _parameters(cls: type[Any]) -> str:
    meaning = _arguments(cls)
    told = []
    for field in dataclasses.fields(cls):
        default = "" if field.default is dataclasses.MISSING else f" = {_plain(field.default)}"
        told.append(f"`{field.name}{default}`: {meaning.get(field.name, 'MISSING ' + str(cls))}")
    return "<br>".join(told)


def _cell(text: str) -> str:
    """Text as a cell of a table: docstrings' marks for formulas and code as Markdown has them."""
    text = re.sub(r":(?:class|func|mod|meth|math):`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page())
