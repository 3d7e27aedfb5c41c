"""Work in processes of its own, one for each core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import TypeVar

from gendiff.errors import DataError

A = TypeVar("A")
B = TypeVar("B")


def spread(function: Callable[[A], B], items: Sequence[A], chunk: int = 16) -> Iterator[B]:
    """``map(function, items)`` over all cores, in order.

    Raises:
        DataError: A process died.
    """
    try:
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            yield from pool.map(function, items, chunksize=chunk)
    except BrokenProcessPool as error:
        raise DataError(
            "data: a process that made molecules died. Free some memory; a script of your own "
            "must call gendiff below `if __name__ == '__main__':`."
        ) from error
