"""Tensors that processes hold in shares, written and read by torch.distributed.checkpoint.

A state is a tree of dicts, lists and values. :func:`split` takes the sharded tensors (DTensors)
out of it and leaves a tensor without values (of torch's device ``meta``) in the place of each, so
that shape, type and structure stay. Every process writes its share of those that were taken to
safetensors files of its own, whose headers tell where each piece belongs. DCP's usual format has
a pickle and is not used; and as only tensors are handed to it, this writer pickles nothing.

Whoever reads takes from the files the pieces that it needs: its share of another division, or
all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gendiff.distributed import local, sharded
from gendiff.errors import CheckpointError

FILE_BYTES = 2**27  # about; the writer holds a file twice in main memory


def _changed(tree: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """The tree with each leaf replaced by what ``change`` makes of its path and value."""
    if isinstance(tree, Mapping):
        return {k: _changed(v, change, f"{path}/{k}" if path else str(k)) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_changed(v, change, f"{path}/{i}") for i, v in enumerate(tree)]
    return change(path, tree)


def split(tree: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The tree without the values of its sharded tensors, and those tensors by their paths."""
    taken: dict[str, Tensor] = {}

    def take(path: str, value: Any) -> Any:
        if not sharded(value):
            return value
        taken[path] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return _changed(tree, take), taken


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes this process's share of sharded tensors, flushed to disk; in all processes.

    Raises:
        OSError, SafetensorError: It cannot be written, in this process or another.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    number, size = {}, 0
    for path, tensor in tensors.items():
        number[path] = 1 + size // FILE_BYTES
        size += local(tensor).nbytes
    writer = HuggingFaceStorageWriter(str(folder), number, save_distributed=True)
    try:
        save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise _first(error) from None


def own(folder: Path, rank: int) -> list[Path]:
    """The files that a process has written; none where it had nothing to write."""
    return list(folder.glob(f"shard-{rank + 1:05d}-*"))


def read(
    folder: Path, tree: Mapping[str, Any], blank: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The tree with the values of its sharded tensors. Processes read without talk.

    Args:
        folder: What :func:`write` wrote, by any number of processes.
        tree: What :func:`split` left.
        blank: Makes the place for a tensor: whole, or this process's share of it.

    Raises:
        CheckpointError: The files do not hold the whole of each tensor.
    """
    wanted: dict[str, Any] = {}

    def want(path: str, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_meta:
            wanted[path] = value
        return value

    _changed(tree, want)
    if not wanted:
        return dict(tree)
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(folder))
    held: Any = reader.read_metadata().state_dict_metadata
    for path, value in wanted.items():
        if path not in held or not _complete(held[path].chunks, value.shape):
            raise CheckpointError(f"{folder} does not hold the whole of '{path}'. Remove it")
    places = {path: blank(value) for path, value in wanted.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it reads without talk
            load(places, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _first(error) from None
    return _changed(tree, lambda path, value: places.get(path, value))


def _complete(pieces: Iterable[Any], shape: torch.Size) -> bool:
    """Whether pieces cut along the first dimension, as FSDP2 cuts, leave no gap; DCP skips it."""
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.offsets):
        if (*piece.offsets, *piece.sizes[1:]) != (end, *[0] * (len(shape) - 1), *shape[1:]):
            return False
        end += piece.sizes[0]
    return end == shape[0]


def _first(error: Any) -> BaseException:
    """DCP tells the failures of all processes in one exception, which is no Exception."""
    return next(iter(error.failures.values()))[0]
