"""Data sets larger than memory: worker processes that prepare them, and arrays that stay on disk.

A modality's ``prepare`` reads its source once, in pieces: :func:`spread` makes each in a worker
process, :class:`Rows` appends it to a ``.npy`` file of a folder that is :func:`written` whole or
not at all, :class:`Told` says how far it is. Training then reads from :class:`Mapped` arrays what
it asks for. So memory holds a few pieces and a few numbers an item, whatever the size of the set.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import chain, islice
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
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
_NEW = "new-"
_ABANDONED = 86400  # seconds in which a process that is alive writes something


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS, Windows


def spread(
    function: Callable[[A], B], items: Iterable[A], few: int = 2, size: int = 1
) -> Iterator[B]:
    """``map(function, items)`` in order, in worker processes, with few items in memory at a time.

    Args:
        function: Of a module, so that a process can import it. torch has one thread there.
        items: What it is called with; read only as results are taken.
        few: That many items or fewer are done in this process: others start in seconds.
        size: Items that a process is given at once; work of a tenth of a second or more.

    Raises:
        DataError: A process died.
        Exception: Whatever ``function`` raises.
    """
    workers = min(cores(), _MOST_WORKERS)
    left = iter(items)
    first = deque(islice(left, few + 1 if workers > 1 else 0))
    here = len(first) <= few
    left = chain(_emptied(first), left)
    if here:
        yield from map(function, left)
        return
    waiting: deque[Future[list[B]]] = deque()
    try:
        with ProcessPoolExecutor(workers, get_context("spawn"), _begun) as pool:
            try:
                while piece := list(islice(left, size)):
                    waiting.append(pool.submit(_each, function, piece))
                    if len(waiting) > _AHEAD * workers:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except BrokenProcessPool as error:
        raise DataError(
            "data: a process that prepared them died. Free some memory; a script of your own must "
            "call gendiff below `if __name__ == '__main__':`."
        ) from error


def _emptied(items: deque[A]) -> Iterator[A]:
    while items:
        yield items.popleft()  # none is held longer than it is needed


def _each(function: Callable[[A], B], items: list[A]) -> list[B]:
    return [function(item) for item in items]


def _begun() -> None:
    """What a worker does first."""
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
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


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A new folder, which gets its name once all in it is written; else nothing of it stays.

    What processes that were killed left beside it is removed after a day.

    Raises:
        DataError: It cannot be written.
    """
    parent = folder.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f"{_NEW}*"):
            with suppress(OSError):  # another process's may get its name at any moment
                last = max(path.stat().st_mtime for path in [old, *old.rglob("*")])
                if time.time() - last > _ABANDONED:
                    shutil.rmtree(old)
        new = Path(tempfile.mkdtemp(prefix=_NEW, dir=parent))
    except OSError as error:
        raise _unwritable(parent, error) from error
    try:
        yield new
        if not folder.exists():  # another process may have been faster
            new.rename(folder)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(parent)):
            raise  # of what is read
        if not folder.exists():
            raise _unwritable(parent, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"data: cannot write to the cache folder {folder} ({error}). "
        "Set the environment variable GENDIFF_CACHE to a folder with space."
    )


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

    def __exit__(self, *_: object) -> None:
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
