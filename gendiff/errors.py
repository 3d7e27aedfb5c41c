"""Errors meant for the person at the keyboard: one line that names what is wrong and the fix.

The command line prints them without a traceback and exits with code 2; ``--debug`` shows all.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class GendiffError(Exception):
    """Base of every error that a user can mend: a line for each problem, ``str`` has them all.

    What a line quotes may hold line breaks and whatever a terminal obeys; ``str`` escapes it.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(map(escaped, self.args))


class ConfigError(GendiffError):
    """A configuration key or value is wrong."""


class DataError(GendiffError):
    """A data set is missing, empty or damaged."""


class PluginError(GendiffError):
    """A plugin is unknown, ambiguous, too new, or fails to load."""


class RunError(GendiffError):
    """A run folder is missing, unwritable, or was made with another configuration."""


class CheckpointError(GendiffError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class SamplingError(GendiffError):
    """A sampler, grid or guidance cannot be used with this schedule or denoiser."""


class NonFiniteError(GendiffError):
    """Training produced non-finite losses or gradients several times in a row."""


class OtherProcessError(GendiffError):
    """Another process of the group failed, and has said why."""


def reason(error: BaseException) -> str:
    """What an error says, in one line: of an OSError the file and what is wrong with it."""
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return name + error.strerror
    # A data loader's worker puts the traceback before what it says.
    from_worker = any(str(part).startswith("Caught ") for part in error.args)
    text = Exception.__str__(error) if from_worker else str(error)
    said = (text.strip().splitlines() or [type(error).__name__])[-1]
    kind, _, text = said.partition(": ")
    return text if text and kind.endswith("Error") and " " not in kind else said


def explained(error: BaseException) -> str | None:
    """What a person is told of an error, nothing where another process tells it; None: a bug."""
    if isinstance(error, OtherProcessError):
        return ""
    if isinstance(error, GendiffError):
        return str(error)
    if isinstance(error, OSError):
        return None if isinstance(error, BrokenPipeError) else escaped(reason(error))
    if any(word in str(error) for word in _PEER_GONE):
        return "another process of the group has ended. Start all again: they go on together"
    if isinstance(error, MemoryError) or any(word in str(error) for word in _OUT_OF_MEMORY):
        return (
            f"out of memory ({escaped(reason(error))}). Ask for less: a smaller batch_size, "
            "network, data set or number of samples"
        )
    return None


_PEER_GONE = "Connection closed by peer", "Connection reset by peer"  # gloo's RuntimeError
# Of torch's allocators, which raise RuntimeError, and of sizes that no integer holds.
_OUT_OF_MEMORY = (
    "allocate memory", "out of memory", "calculation overflowed", "multiplication overflow",
)  # fmt: skip

LONGEST = 600  # characters of a line that a person reads


def escaped(text: str) -> str:
    """A text in one line, with what a terminal would obey, or no UTF-8 can hold, escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable(text: str) -> str:
    """A text in one line, escaped, and without its middle where it is long."""
    line = escaped(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 200]} … {line[-200:]}"


def suggest(word: str, valid: Collection[str]) -> str:
    """`` Did you mean 'x'?`` or the list of what is valid, to be put behind a message."""
    close = difflib.get_close_matches(word, list(valid), 1, 0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Choose from: {', '.join(valid)}" if len(valid) <= 20 else ""
