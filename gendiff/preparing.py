"""Data sets larger than memory: worker processes that prepare them, and arrays that stay on disk.

A modality's ``prepare`` reads its source once, in pieces: :func:`spread` makes each in a worker
process, :class:`Rows` appends it to a ``.npy`` file, :class:`Told` says how far it is. Training
then reads from :class:`Mapped` arrays what it asks for. So memory holds a few pieces and a few
numbers an item, whatever the size of the set.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from gendiff import console
from gendiff.errors import DataError

A = TypeVar("A")
B = TypeVar("B")

_MOST_WORKERS = 32
_AHEAD = 2  # pieces in flight for each worker
_SILENCE_SECONDS = 15.0


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


def spread(function: Callable[[A], B], items: Iterable[A], few: int = 2) -> Iterator[B]:
    """``map(function, items)`` in order, in worker processes, with few items in memory at a time.

    Items are pieces of work of a tenth of a second or more: a process starts in seconds.

    Args:
        function: Of a module, so that a process can import it. torch has one thread there.
        items: What it is called with; read only as results are taken.
        few: That many items or fewer are done in this process.

    Raises:
        DataError: A process died.
        Exception: Whatever ``function`` raises.
    """
    left = iter(items)
    first = list(islice(left, few + 1))
    workers = min(cores(), _MOST_WORKERS)
    if len(first) <= few or workers == 1:
        yield from map(function, chain(first, left))
        return
    waiting: deque[Any] = deque()
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _begun) as pool:
            try:
                for item in chain(first, left):
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > _AHEAD * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except BrokenProcessPool as error:
        raise DataError(
            "data: a process that prepared them died. Free some memory; a script of your own must "
            "call gendiff below `if __name__ == '__main__':`."
        ) from error


def _begun() -> None:
    """What a worker does first."""
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # before torch is imported; there is a worker for each core
    )
    if torch := sys.modules.get("torch"):  # a script imports it: a worker runs its imports first
        torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells of it, once
    parent = parent_process()
    if parent is not None:
        # Else workers of a parent that was killed would wait for work for ever.
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


class Told:
    """Says now and then how far a preparation is: after a while, then every 15 seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic() - _SILENCE_SECONDS / 2

    def __call__(self, what: str, done: int, total: int) -> None:
        """``total`` 0 stands for one that is not known."""
        now = time.monotonic()
        if now - self._last >= _SILENCE_SECONDS:
            self._last = now
            console.say(f"preparing {what}: {done}" + (f" of {total}" if total else ""))


class Rows:
    """A ``.npy`` file to which rows are appended; its header tells their number once it is closed.

    Args:
        path: The file, which must not be there: others may have it mapped.
        dtype: Of the array.
        shape: Of a row.
    """

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...] = ()) -> None:
        self.dtype, self.shape, self.count = np.dtype(dtype), shape, 0
        self._file = path.open("xb")
        self._head()

    def _head(self) -> None:
        # numpy leaves room for any number of rows, so the header can be written over.
        told = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.count, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, told)

    def append(self, rows: Any) -> None:
        """Adds rows (n, \\*shape)."""
        array = np.ascontiguousarray(rows, self.dtype).reshape(-1, *self.shape)
        self._file.write(array.data if array.size else b"")
        self.count += len(array)

    def close(self) -> None:
        """Tells the number of rows, and closes the file."""
        if not self._file.closed:
            self._file.seek(0)
            self._head()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Mapped(np.ndarray[Any, Any]):
    """An array of a ``.npy`` file, read-only, of which only what is asked for is read.

    Its parts are plain arrays in the same mapping. It pickles as its path, so that a loader's
    workers map the file too.

    Raises:
        ValueError: The file is damaged.
        OSError: It cannot be read.
    """

    path: Path | None

    def __new__(cls, path: Path) -> Self:
        """Maps a file."""
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            if "empty" not in str(error):  # there is something, and the file is damaged
                raise
            array = np.load(path, allow_pickle=False)
        self: Self = array.view(cls)
        self.path = path
        return self

    def __array_finalize__(self, other: Any) -> None:
        self.path = None

    def __getitem__(self, key: Any) -> Any:
        return self.view(np.ndarray)[key]

    def __reduce__(self) -> Any:
        if self.path is not None:
            return Mapped, (self.path,)
        return self.view(np.ndarray).__reduce__()
