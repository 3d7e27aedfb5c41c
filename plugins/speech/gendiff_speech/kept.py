"""What is prepared, in the cache folder: rows in a ``.npy`` file and their index, an ``.npz``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from gendiff.runs import cache_folder


@dataclass(frozen=True)
class Files:
    """Both files of a corpus."""

    rows: Path
    index: Path

    def missing(self) -> Path | None:
        """One that is not there, if any: neither ever is before it is whole."""
        return next((path for path in (self.rows, self.index) if not path.exists()), None)


def files(kind: str, digest: str) -> Files:
    """Where a corpus of this digest is kept."""
    stem = cache_folder() / f"{kind}-{digest}"
    return Files(stem.with_suffix(".npy"), stem.with_suffix(".npz"))


@contextmanager
def made(wanted: Files) -> Iterator[Files]:
    """Files to write, which take their place at the end; after an error nothing is left."""
    folder = wanted.rows.parent
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="part-", dir=folder) as name:
        new = Files(Path(name) / wanted.rows.name, Path(name) / wanted.index.name)
        yield new
        new.rows.replace(wanted.rows)
        new.index.replace(wanted.index)
