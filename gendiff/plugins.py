"""Finding plugins by entry point, loading them by name, and keeping the broken ones apart.

``gendiff.modalities``: the entry point's name is the modality's; it is loaded when it is asked
for. ``gendiff.plugins``: loaded whenever parts or observers are needed, each on its own.
"""

from __future__ import annotations

import importlib.metadata
import keyword
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pluggy

from gendiff import PLUGIN_API
from gendiff.errors import ConfigError, PluginError, suggest
from gendiff.modality import Modality

MODALITIES = "gendiff.modalities"
PLUGINS = "gendiff.plugins"


@dataclass(frozen=True)
class Found:
    """A plugin that is installed, loaded or not.

    Args:
        name: Entry-point name.
        group: Entry-point group.
        distribution: ``name version`` of the package that brings it.
        error: One line if it failed to load, else None.
        trace: The traceback of that failure.
        modality: The loaded modality.
    """

    name: str
    group: str
    distribution: str
    error: str | None = None
    trace: str = ""
    modality: Modality | None = None


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager, with no plugin registered yet."""
    from gendiff import hookspecs

    pm = pluggy.PluginManager("gendiff")
    pm.add_hookspecs(hookspecs)
    return pm


def _entry_points(group: str) -> dict[str, list[importlib.metadata.EntryPoint]]:
    points: dict[str, list[importlib.metadata.EntryPoint]] = {}
    seen = set()
    for point in importlib.metadata.entry_points(group=group):
        # An editable install may be seen twice through sys.path: same package, same value.
        identity = (point.name, point.value, _distribution(point))
        if identity not in seen:
            seen.add(identity)
            points.setdefault(point.name, []).append(point)
    return points


def _distribution(point: importlib.metadata.EntryPoint) -> str:
    dist = point.dist
    return f"{dist.metadata['Name']} {dist.version}" if dist is not None else "unknown"


def modality_names() -> list[str]:
    """Names of the installed modalities, from metadata alone."""
    return sorted(_entry_points(MODALITIES))


def distributions(group: str) -> list[str]:
    """``name version`` of the packages that bring plugins of a group, from metadata alone."""
    return sorted({_distribution(p) for points in _entry_points(group).values() for p in points})


_REGISTERED: dict[str, Modality] = {}


def register(found: Modality) -> None:
    """Makes a modality known in this process, without a package: for notebooks and tests."""
    _REGISTERED[found.name] = _checked(found.name, found, "registered in this process")


def modality(name: str) -> Modality:
    """The modality of this name, registered in this process or installed.

    Raises:
        PluginError: It is unknown, offered twice, too new, or fails to load.
    """
    return _REGISTERED.get(name) or _installed(name)


@cache
def _installed(name: str) -> Modality:
    points = _entry_points(MODALITIES)
    if name not in points:
        raise PluginError(_unknown(name, sorted(points)))
    if len(points[name]) > 1:
        owners = " and ".join(_distribution(point) for point in points[name])
        raise PluginError(f"modality '{name}' is offered by {owners}. Uninstall one of them")
    point = points[name][0]
    try:
        plugin = point.load()
        # A manager of its own: the first-result hook must be answered by this plugin alone.
        pm = pluggy.PluginManager("gendiff")
        from gendiff import hookspecs

        pm.add_hookspecs(hookspecs)
        pm.register(plugin)
        found = pm.hook.gendiff_modality()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PluginError(
            f"modality '{name}' ({_distribution(point)}) failed to load: {reason}. "
            "'gendiff doctor' shows the traceback"
        ) from error
    return _checked(name, found, _distribution(point))


def _checked(name: str, found: Any, distribution: str) -> Modality:
    if not isinstance(found, Modality):
        raise PluginError(
            f"modality '{name}' ({distribution}): gendiff_modality() returned {found!r}, "
            "a gendiff.Modality is needed"
        )
    if found.api_version > PLUGIN_API:
        raise PluginError(
            f"modality '{name}' ({distribution}) needs plugin API {found.api_version}, this "
            f"gendiff has {PLUGIN_API}. Upgrade gendiff: pip install -U gendiff"
        )
    if found.name != name:
        raise PluginError(
            f"modality '{name}' ({distribution}) calls itself '{found.name}'. Its entry point "
            "and its name must agree"
        )
    return found


def _unknown(name: str, installed: list[str]) -> str:
    if not installed:
        return (
            f"no modality '{name}', and none is installed. From a clone: pip install -e '.[all]'"
        )
    close = suggest(name, installed)
    hint = close if close.startswith(" Did") else ""
    return f"no modality '{name}'.{hint} Installed: {', '.join(installed)}"


def find(group: str = MODALITIES) -> list[Found]:
    """Every installed plugin of a group, loaded, with its failure if it has one."""
    result = []
    for name, points in sorted(_entry_points(group).items()):
        distribution = ", ".join(_distribution(point) for point in points)
        try:
            loaded = modality(name) if group == MODALITIES else points[0].load()
        except Exception as error:
            reason = (
                str(error)
                if isinstance(error, PluginError)
                else (f"{type(error).__name__}: {error}".splitlines()[0])
            )
            trace = "".join(traceback.format_exception(error))
            result.append(Found(name, group, distribution, reason, trace))
        else:
            found = loaded if group == MODALITIES else None
            result.append(Found(name, group, distribution, modality=found))
    return result


@cache
def _extras() -> pluggy.PluginManager:
    """The manager with every plugin of ``gendiff.plugins`` that loads."""
    pm = manager()
    for name, points in _entry_points(PLUGINS).items():
        try:
            pm.register(points[0].load(), name)
        except Exception as error:  # one broken plugin must not harm the rest
            print(
                f"warning: plugin '{name}' failed to load and is ignored: {error}. "
                "'gendiff doctor' shows the traceback",
                file=sys.stderr,
            )
    return pm


def extra_parts(kind: str) -> dict[str, type[Any]]:
    """Parts of a kind that plugins bring."""
    parts: dict[str, type[Any]] = {}
    for result in _extras().hook.gendiff_parts():
        parts |= result.get(kind, {})
    return parts


def observe(run: str, step: int, metrics: dict[str, float]) -> None:
    """Tells the observers what a run logs."""
    _tell("gendiff_metrics", run=run, step=step, metrics=metrics)


def observe_preview(run: str, step: int, path: str) -> None:
    """Tells the observers of a picture that a run has drawn."""
    _tell("gendiff_preview", run=run, step=step, path=path)


_SILENT: set[tuple[str, str]] = set()  # hooks and the plugins that failed in them


def _tell(hook: str, **what: Any) -> None:
    """Calls a hook of each observer; one that fails is left out from then on."""
    pm = _extras()
    for name, observer in pm.list_name_plugin():
        if (hook, name) in _SILENT:
            continue
        others = [plugin for plugin in pm.get_plugins() if plugin is not observer]
        try:
            pm.subset_hook_caller(hook, others)(**what)
        except Exception as error:  # hours of training must not end for a tracker
            _SILENT.add((hook, name))
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            print(
                f"warning: plugin '{name}' failed in {hook} and is not called there again: "
                f"{reason}",
                file=sys.stderr,
            )


@contextmanager
def without_torch() -> Iterator[None]:
    """Makes ``import torch`` fail inside: a plugin's entry-point module must not need it."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def write_new(name: str, parent: Path) -> Path:
    """Writes the package ``gendiff-NAME`` of a new modality, which trains as it is, into a folder.

    Raises:
        ConfigError: The name cannot be one, is taken, or the folder is there or cannot be made.
    """
    from gendiff.config import RunConfig

    if not (name.isidentifier() and name.isascii() and name == name.lower()) or (
        keyword.iskeyword(name) or name in RunConfig.model_fields
    ):
        raise ConfigError(
            f"NAME: '{name}' cannot name a modality. Use lower-case letters, digits and '_'; "
            "a section of the configuration cannot be one either"
        )
    if name in modality_names():
        raise ConfigError(f"NAME: modality '{name}' is installed already. Choose another name")
    template = Path(__file__).parent / "template"
    package = parent / f"gendiff-{name}"
    try:
        package.mkdir(parents=True)
        for source in sorted(template.rglob("*.*")):
            if source.suffix in (".py", ".toml", ".md"):
                path = package / str(source.relative_to(template)).replace("NAME", name)
                path.parent.mkdir(exist_ok=True)
                path.write_text(source.read_text().replace("NAME", name))
    except FileExistsError:
        raise ConfigError(f"{package}: is there already. Remove it, or choose --folder") from None
    except OSError as error:
        raise ConfigError(f"{package}: cannot be written: {error.strerror}") from None
    return package
