"""The folder of a run: what it is made from, where its files lie.

``runs/<modality>/<name>/`` holds ``config.yaml`` (resolved), ``run.json`` (modality, data facts,
versions, command line), ``log.txt``, ``metrics.jsonl``, ``samples/`` and ``checkpoints/``.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

import gendiff
from gendiff import config as configuration
from gendiff import distributed, plugins
from gendiff.config import RunConfig
from gendiff.errors import ConfigError, RunError, reason
from gendiff.modality import DataReport, Modality


@dataclass(frozen=True)
class Run:
    """A run: its folder, its modality, its configuration and the facts of its data."""

    folder: Path
    modality: Modality
    config: RunConfig
    facts: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def samples(self) -> Path:
        """The folder of the previews made in training."""
        return self.folder / "samples"

    @property
    def ema(self) -> Path:
        """The folder of the snapshots of power-function averages."""
        return self.folder / "ema"

    @property
    def pairs(self) -> Path:
        """The folder of a student's pairs."""
        return self.folder / "pairs"

    @property
    def section(self) -> Any:
        """The modality's own section of the configuration."""
        return getattr(self.config, self.modality.name)


def writing(run: Run, values: Mapping[str, Any]) -> Run:
    """The run with other values of the keys that say how its samples are written.

    Raises:
        ConfigError: The modality has no such key to be set, or a value is wrong.
    """
    name, keys = run.modality.name, run.modality.output_keys
    for key in values:
        if key not in keys:
            known = ", ".join(sorted(keys)) or f"none for modality '{name}'"
            raise ConfigError(f"--set {key}: cannot be set when sampling. Known: {known}")
    layer = {name: dict(values)}
    sources = {f"{name}.{key}": "--set" for key in values}
    data = configuration.merge(configuration.dump(run.config), layer)
    return replace(run, config=configuration.validate(run.modality, data, sources))


def folder_of(modality: Modality, config: RunConfig) -> Path:
    """Where the run of a configuration lives."""
    return Path(config.out) / modality.name / config.name


def check_unchanged(modality: Modality, config: RunConfig) -> None:
    """Checks, before any data are prepared, that a run there is of this configuration.

    Raises:
        RunError: It is of another.
    """
    folder = folder_of(modality, config)
    if not (folder / "run.json").exists():
        return
    now = configuration.dump(config)
    if changes := configuration.differences(_read_config(folder), now, modality):
        raise RunError(
            f"{folder} was made with another configuration ({'; '.join(changes)}). "
            "Give the new run a name (name=…), or go on with --accept-changes"
        )


def prepare(modality: Modality, config: RunConfig) -> DataReport:
    """The data of a configuration; a run there keeps to what was chosen for it.

    Raises:
        DataError: They are missing or damaged, as :meth:`gendiff.Modality.prepare` has it.
    """
    section, folder = getattr(config, modality.name), folder_of(modality, config)
    try:
        _, facts = _record(folder)
    except _UNREADABLE:  # a new run, or a damaged record, which is written anew
        return modality.prepare(section)
    return modality.prepare(modality.settled(section, facts))


def start(
    modality: Modality, config: RunConfig, facts: Mapping[str, Any], accept_changes: bool = False
) -> Run:
    """Makes the folder of a new run, or opens that of a run to be resumed; process 0 does.

    Raises:
        RunError: The folder cannot be written, is in use by another process, or holds a run of
            another configuration or of other data.
    """
    folder = folder_of(modality, config)
    run = Run(folder, modality, config, json.loads(json.dumps(dict(facts))))
    distributed.by_first(lambda: _make(run, accept_changes))
    return run


def _make(run: Run, accept_changes: bool) -> None:
    folder = run.folder
    if not accept_changes:
        check_unchanged(run.modality, run.config)
        _check_same_data(run)
    try:
        run.samples.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            write_atomically(folder / "config.yaml", _config_text(run))
            write_atomically(folder / "run.json", json.dumps(_provenance(run), indent=1))
    except OSError as error:
        raise RunError(
            f"run folder {folder} cannot be written: {reason(error)}. Choose another with out=…"
        ) from None


def _check_same_data(run: Run) -> None:
    """Refuses to go on with other data than those that a run began with."""
    try:
        _, before = _record(run.folder)
    except _UNREADABLE:  # a new run, or a damaged record, which is written anew
        return
    both = before.keys() & run.facts.keys()
    told = {"content"} if "content" in both else both
    if changed := [key for key in sorted(told) if before[key] != run.facts[key]]:
        raise RunError(
            f"{run.folder} was made with other data (run.json has another {', '.join(changed)}). "
            "Restore them, give the new run a name (name=…), or go on with --accept-changes"
        )


ORPHANS_END_SECONDS = 60.0  # a killed process's data workers hold its lock until they notice


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, this process alone may write the run; the lock ends with the process.

    Raises:
        RunError: Another process holds it.
        OSError: The folder cannot be written.
    """
    with (folder / "lock").open("a+") as file:
        deadline = time.monotonic() + ORPHANS_END_SECONDS
        while not _take(file.fileno()):
            file.seek(0)
            owner, _, host = file.read().strip().partition(" on ")
            gone = host == platform.node() and not _alive(owner)
            if not gone or time.monotonic() > deadline:
                raise RunError(
                    f"{folder} is in use: process {owner or 'unknown'} on {host or 'unknown'} "
                    "trains it. Stop that one, or give the new run a name (name=…)"
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:  # closing is not enough: data workers that outlive a failure hold the file open
            _release(file.fileno())


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise  # else a file system without locks, which is no reason not to train
    return True


def _release(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # it is, and another person's
        return True
    return True


def load(folder: Path) -> Run:
    """Opens the folder of a run.

    Raises:
        RunError: It is no run.
        ConfigError: Its configuration does not fit the installed plugin.
        PluginError: Its modality is not installed.
    """
    if not (folder / "run.json").is_file() or not (folder / "config.yaml").is_file():
        hint = "no such folder" if not folder.exists() else "no run.json and config.yaml in it"
        raise RunError(
            f"{folder} is not a run ({hint}). Give the folder that 'gendiff train' made"
        )
    try:
        name, facts = _record(folder)
    except _UNREADABLE:
        raise RunError(
            f"{folder / 'run.json'} is damaged. 'gendiff train' writes it anew, with the settings "
            "of config.yaml"
        ) from None
    modality = plugins.modality(name)
    data = _read_config(folder)
    sources = dict.fromkeys(configuration.flatten(data), str(folder / "config.yaml"))
    return Run(folder, modality, configuration.validate(modality, data, sources), facts)


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RecursionError)  # of _record


def _record(folder: Path) -> tuple[str, dict[str, Any]]:
    """The name of a run's modality and the facts of its data."""
    record = json.loads((folder / "run.json").read_text())
    return str(record["modality"]), dict(record["facts"])


def _read_config(folder: Path) -> dict[str, Any]:
    return configuration.read_yaml(folder / "config.yaml")


def _config_text(run: Run) -> str:
    text = yaml.safe_dump(configuration.dump(run.config), sort_keys=False)
    return f"# resolved configuration; run.json has versions and command line\n{text}"


def _provenance(run: Run) -> dict[str, Any]:
    return {
        "modality": run.modality.name,
        "facts": run.facts,
        "command": shlex.join(["gendiff", *sys.argv[1:]]),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, gendiff, torch and the installed modalities."""
    import torch

    found = {
        "python": sys.version.split()[0],
        "gendiff": gendiff.__version__,
        "torch": torch.__version__,
    }
    for group in (plugins.MODALITIES, plugins.PLUGINS):
        for distribution in plugins.distributions(group):
            name, _, version = distribution.rpartition(" ")
            found[name] = version
    return found


def cache_folder() -> Path:
    """Where derived data are kept: ``GENDIFF_CACHE``, or gendiff in the user's cache."""
    if folder := os.environ.get("GENDIFF_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gendiff"


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that readers see the old text or the new, never a half."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


class MetricsLog:
    """``metrics.jsonl``: a JSON object a line; rewound to the step from which a run goes on."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        self._run = str(folder)
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomically(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends the metrics of a step and tells the observers."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        plugins.observe(self._run, step, _numbers(metrics))


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers alone; those of an inner mapping get its name: ``loss_by_log_snr/-4..0``."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return float("inf")  # a line cut short by a kill
