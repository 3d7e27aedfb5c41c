"""Checkpoints that are whole or absent.

A checkpoint is a folder ``step-00002000`` with ``state.pt`` (everything that resuming needs),
``model.safetensors`` (the averaged weights, for sampling) and ``manifest.json`` (size and SHA-256
of each file). Of a sharded training a folder ``shards`` holds the large tensors of the state, in
files of each process (:mod:`gendiff.sharded`). All is written under a temporary name, flushed to
disk and renamed; old ones are deleted only afterwards. Loading never unpickles code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gendiff import distributed, sharded
from gendiff.errors import CheckpointError, GendiffError, reason

STATE, WEIGHTS, MANIFEST = "state.pt", "model.safetensors", "manifest.json"
SHARDS = "shards"


def save(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    keep: int,
) -> Path:
    """Writes the checkpoint of a step and deletes all but the newest ``keep``.

    In a group all processes call it: each writes its share of what is sharded, process 0 the rest.

    Args:
        folder: Of the checkpoints.
        step: Names it.
        state: A tree of dicts and lists; its tensors may be sharded.
        weights: Whole, in process 0.
        metadata: Kept beside the weights.
        keep: How many stay.

    Raises:
        CheckpointError: It cannot be written; those before are as they were.
    """
    final = folder / f"step-{step:08d}"
    temporary = final.with_suffix(".tmp")
    small, shares = sharded.split(state)

    def begin() -> None:
        with _told(final):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("*.tmp"):
                shutil.rmtree(leftover)
            temporary.mkdir()

    def write_share() -> dict[str, Any]:
        with _told(final):
            sharded.write(temporary / SHARDS, shares)
            paths = sharded.own(temporary / SHARDS, distributed.present().rank)
            return {f"{SHARDS}/{path.name}": _fingerprint(path) for path in paths}

    def finish() -> None:
        with _told(final):
            _write(temporary, small, weights, metadata, prints)
            if final.exists():  # the same step, saved again after a resume from an older one
                _discard(final)
            temporary.rename(final)
            _flush(folder)
            for old in steps(folder)[:-keep]:
                _discard(old)

    try:
        distributed.by_first(begin)
        own = distributed.together(write_share) if shares else {}
        prints = {name: one for part in distributed.collect(own) for name, one in part.items()}
        distributed.by_first(finish)
    except GendiffError:  # raised in all: nobody writes any more, and nobody leaves before this
        distributed.by_first(lambda: shutil.rmtree(temporary, ignore_errors=True))
        raise
    return final


@contextmanager
def _told(final: Path) -> Iterator[None]:
    """What keeps a checkpoint from being written, in one line."""
    try:
        yield
    # torch and safetensors have errors of their own for a disk that is full.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {final} cannot be written: {_why(error)}. Those before it are as they "
            "were: make room there, then give the same command again"
        ) from error


def _why(error: BaseException) -> str:
    """The reason of the system, which torch's own error may hide."""
    system: BaseException | None = error
    while system is not None and not isinstance(system, OSError):
        system = system.__context__
    return reason(system or error)


def _discard(path: Path) -> None:
    """Deletes a checkpoint so that no half of it is ever seen under its name."""
    aside = path.with_name(f"{path.name}.old.tmp")
    path.rename(aside)
    shutil.rmtree(aside)


def _write(
    temporary: Path,
    state: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    prints: Mapping[str, Any],
) -> None:
    with (temporary / STATE).open("wb") as file:
        torch.save(dict(state), file)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, temporary / WEIGHTS, dict(metadata))
    whole = {name: _fingerprint(temporary / name) for name in (STATE, WEIGHTS)}
    (temporary / MANIFEST).write_text(json.dumps({**whole, **prints}, indent=1))
    for path in temporary.iterdir():
        _flush(path)  # of the shards the folder, whose files have been
    _flush(temporary)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal())


def check(path: Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    try:
        manifest = dict(json.loads((path / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"checkpoint {path} is damaged: no readable {MANIFEST}") from None
    there = files(path)
    for name in {**dict.fromkeys((STATE, WEIGHTS)), **dict.fromkeys(there), **manifest}:
        if name not in there or _fingerprint(path / name) != manifest.get(name):
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")


def files(path: Path) -> list[str]:
    """The names of a checkpoint's files, but for the manifest."""
    shards = [f"{SHARDS}/{p.name}" for p in sorted((path / SHARDS).glob("*"))]
    return [name for name in (STATE, WEIGHTS, *shards) if (path / name).is_file()]


def manifest(path: Path) -> str:
    """Sizes and fingerprints of a checkpoint's files, as text: other weights, another text."""
    return (path / MANIFEST).read_text()


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; damaged newer ones are skipped with a warning.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """
    found = steps(folder)
    for path in reversed(found):
        try:
            check(path)
        except CheckpointError as error:
            warn(f"{error}; falling back to the one before")
        else:
            return path
    if found:
        raise CheckpointError(
            f"all {len(found)} checkpoints in {folder} are damaged. Remove it to start anew"
        )
    return None


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def fingerprint(path: Path) -> str:
    """The SHA-256 of a whole checkpoint's averaged weights."""
    return str(json.loads((path / MANIFEST).read_text())[WEIGHTS]["sha256"])


def at(folder: Path, step: int) -> Path:
    """The checkpoint of a step.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        found = ", ".join(str(step_of(p)) for p in steps(folder))
        raise CheckpointError(
            f"{folder} has no checkpoint of step {step}. It has {found or 'none'}; "
            "train.keep_checkpoints says how many stay"
        )
    check(path)
    return path


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever torch, safetensors or json raise inside, of a file that is not what it should be.

    Raises:
        CheckpointError: They did.
    """
    try:
        yield
    except (GendiffError, MemoryError):
        raise
    except Exception as error:  # anything may come out of a damaged file
        said = reason(error).removesuffix(".")
        raise CheckpointError(
            f"{path} is damaged, or not what its name says: {said}. Remove it"
        ) from error


def load_state(path: Path, blank: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """What ``save`` was given as ``state``, on the CPU.

    Args:
        path: The checkpoint.
        blank: Makes the place for a tensor that was sharded; by default all of it, on the CPU.

    Raises:
        CheckpointError: It is something else.
    """
    with readable(path / STATE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, of a pickle that is not its own
        state = dict(torch.load(path / STATE, map_location="cpu", weights_only=True))
    with readable(path / SHARDS):
        return sharded.read(path / SHARDS, state, blank or _whole)


def _whole(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu")


def load_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights.

    Raises:
        CheckpointError: They cannot be read.
    """
    with readable(path / WEIGHTS):
        return load_file(path / WEIGHTS)


def metadata(path: Path) -> dict[str, str]:
    """What ``save`` was given beside the weights.

    Raises:
        CheckpointError: It cannot be read.
    """
    with readable(path / WEIGHTS), safe_open(path / WEIGHTS, "pt") as file:
        return dict(file.metadata())
