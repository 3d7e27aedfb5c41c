"""Files of many samples: made by any number of processes, whole or absent, each once.

Samples are dealt out in blocks of consecutive ids, so a process needs to know only its number and
how many there are. A modality writes into a folder of the process's own, from which its files are
moved; a ledger then says which ids are done. Who is killed and started again, in the same company
or another, goes on with what no ledger names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gendiff.errors import ConfigError, RunError, reason
from gendiff.world import World

LEDGERS = ".ledgers"


@dataclass(frozen=True)
class Files:
    """The files of samples in a folder, and one process's part in them.

    Args:
        folder: Where they go.
        world: Which process of how many.
        made_from: All that the samples depend on but their ids, as text.
        block: How many consecutive ids a process makes together.
    """

    folder: Path
    world: World
    made_from: str
    block: int = 1

    @property
    def _key(self) -> str:
        return hashlib.sha256(self.made_from.encode()).hexdigest()[:16]

    @property
    def _ledger(self) -> Path:
        name = f"{self._key}-{self.world.rank}-of-{self.world.size}.jsonl"
        return self.folder / LEDGERS / name

    def missing(self, count: int) -> list[int]:
        """This process's ids below ``count`` that no ledger says are done.

        Raises:
            ConfigError: Several processes would share the folder with samples that were made
                otherwise.
        """
        if self._foreign() and self.world.size > 1:
            raise ConfigError(
                f"--out {self.folder} holds samples of another model, step, seed or setting. "
                "Choose another folder, or remove this one"
            )
        done: set[int] = set()
        if self.folder.is_dir():
            present = {entry.name for entry in os.scandir(self.folder)}
            for path in self._ledger.parent.glob(f"{self._key}-*.jsonl"):
                done |= _done(path, present)
        return [i for i in range(count) if self.world.owns(i // self.block) and i not in done]

    def _foreign(self) -> list[Path]:
        """Ledgers of samples that were made otherwise."""
        ledgers = self._ledger.parent.glob("*.jsonl")
        return [path for path in ledgers if not path.name.startswith(self._key)]

    def add(self, ids: Sequence[int], write: Callable[[Path], object]) -> None:
        """Writes the files of these ids by ``write(folder)``, then moves them here.

        Raises:
            ConfigError: The folder cannot be made.
            RunError: They cannot be written; no file is left half.
        """
        staging = self.folder / LEDGERS / f"{self._ledger.stem}.tmp"
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        except OSError as error:
            raise ConfigError(f"--out {self.folder} cannot be made: {reason(error)}") from None
        try:
            for path in self._foreign():  # what they name is about to be overwritten
                path.unlink()
            write(staging)
            names = sorted(path.name for path in staging.iterdir())
            for name in names:
                os.replace(staging / name, self.folder / name)
            staging.rmdir()
            with self._ledger.open("a") as file:
                file.write(json.dumps({"ids": list(ids), "files": names}) + "\n")
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise RunError(
                f"samples cannot be written to {self.folder}: {reason(error)}. Those before are "
                "whole: the same command goes on from there"
            ) from error

    def close(self) -> None:
        """Forgets what is done, once all is: the same command then makes all anew.

        One of several processes cannot know that, and keeps its ledger.
        """
        if self.world.size == 1:
            shutil.rmtree(self.folder / LEDGERS, ignore_errors=True)


def _done(ledger: Path, present: set[str]) -> set[int]:
    """The ids of a ledger whose files are there; a line cut short by a kill does not count."""
    done: set[int] = set()
    for line in ledger.read_text().splitlines(keepends=True):
        # A ledger goes on after a line that was cut short, on the same line.
        try:
            entry = json.loads(line) if line.endswith("\n") else {"ids": [], "files": []}
        except ValueError:
            continue
        if present.issuperset(entry["files"]):
            done |= set(entry["ids"])
    return done
