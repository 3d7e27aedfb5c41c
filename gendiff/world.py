"""Which of several processes this one is; no torch is needed to know.

``torchrun`` names each process by the variables RANK, WORLD_SIZE and LOCAL_RANK. Work that needs
no talk between processes, as sampling, is divided by them alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from gendiff.errors import ConfigError


@dataclass(frozen=True)
class World:
    """One of several processes.

    Args:
        rank: Its number, from 0.
        size: How many there are.
        local_rank: Its number on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that writes what is written once."""
        return self.rank == 0

    def owns(self, block: int) -> bool:
        """Whether a block of samples is its own: they are dealt out in turn."""
        return block % self.size == self.rank


ALONE = World()


def from_environment() -> World:
    """What torchrun says; alone where it says nothing.

    Raises:
        ConfigError: It says something that cannot be.
    """
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE")]
    if None in given:
        return ALONE
    try:
        rank, size, local = (int(v or "") for v in (*given, os.environ.get("LOCAL_RANK", "0")))
    except ValueError:
        rank, size, local = 0, 0, 0
    if not 0 <= rank < size:
        raise ConfigError(
            f"RANK={given[0]} and WORLD_SIZE={given[1]} in the environment name no process. "
            "Let torchrun set them, or unset both"
        )
    return World(rank, size, local)


def parse_shard(text: str) -> World:
    """``2/8`` as the third of eight processes.

    Raises:
        ConfigError: It is no share.
    """
    rank, _, size = text.partition("/")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"--shard: '{text}' is no share. The shares of three are 0/3, 1/3, 2/3")
    return World(int(rank), int(size))
