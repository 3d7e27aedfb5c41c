"""Text of any kind to tokens: letters, or phonemes, and the pauses between words.

A sentence is ``_``, the tokens of its words with one pause between each two of them, and a mark
at its end. A pause is a space, or the mark that stands there: ``,`` ``.`` ``?`` ``!``. What stands
for these (``;`` ``:`` and dashes for a comma) is brought to them; quotes and brackets go. So
silence has tokens of its own, at the ends and wherever a reader may pause.

``characters``: the letters a to z and the apostrophe, without accents, in lower case.
``phonemes``: eSpeak NG's mnemonics of American English with their stress marks; numbers and
abbreviations are read out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence

from gendiff_speech import espeak

START = "_"
MARKS = (",", ".", "?", "!")
PAUSES = (START, " ", *MARKS)
LETTERS = "abcdefghijklmnopqrstuvwxyz'"

_SAME = str.maketrans({"’": "'", "‘": "'", "`": "'", ";": ",", ":": ",", "…": ".", "-": " "})
_DASH = re.compile(r"\s*(?:--+|[–—])\s*|\s-\s")
_SILENT = re.compile(r"[\"“”„«»()\[\]{}*_]")


class Unreadable(Exception):
    """A text has something that is no token; the message goes on from ``the text``."""


Words = list[tuple[str, ...]]


def clauses(text: str) -> list[tuple[str, str]]:
    """The parts of a text between its pauses, in lower case, each with the mark behind it."""
    plain = unicodedata.normalize("NFC", text)
    plain = _SILENT.sub(" ", _DASH.sub(", ", plain)).translate(_SAME).lower()
    found: list[tuple[str, str]] = []
    for said, marks in re.findall(r"((?:[^,.?!]|[,.](?=\d))*)([,.?!\s]*)", plain):
        mark = next((m for m in "?!.," if m in marks), ".")
        if re.search(r"\w", said):
            found.append((" ".join(said.split()), mark))
    return found


def _wrong(parts: Sequence[tuple[str, str]], kind: str) -> str | None:
    """What is wrong with a text, if anything is."""
    said = "".join(part for part, _ in parts)
    odd = {c for c in said if c != " " and _plain(c) not in LETTERS}
    if kind == "phonemes":  # which reads out figures and signs
        odd = {c for c in odd if c.isalpha()}
    if odd:
        shown = " ".join(sorted(odd))
        return f"cannot read {shown!r}: write words with the letters a to z and apostrophes"
    if not any(_plain(c) in LETTERS or c.isdigit() for c in said):
        return "has nothing to read: write some words"
    return None


def _letters(parts: Sequence[str]) -> list[Words]:
    return [[tuple(_plain(letter) for letter in word) for word in part.split()] for part in parts]


def _plain(letter: str) -> str:
    """A letter without its accent; what is no letter stays, to be named."""
    base = unicodedata.normalize("NFD", letter)[0]
    return base if base in LETTERS else letter


KINDS: dict[str, Callable[[Sequence[str]], list[Words]]] = {
    "characters": _letters,
    "phonemes": espeak.phonemes_of,
}


def kind_of(wanted: str) -> str:
    """What ``auto`` stands for: phonemes where eSpeak NG is installed, else characters."""
    if wanted != "auto":
        return wanted
    return "characters" if espeak.missing() else "phonemes"


def sentences(texts: Sequence[str], kind: str) -> list[tuple[str, ...] | Unreadable]:
    """The tokens of each text, or what is wrong with it.

    Raises:
        DataError: Phonemes are wanted, and eSpeak NG is not installed.
    """
    split = [clauses(text) for text in texts]
    wrong = [_wrong(parts, kind) for parts in split]
    good = [parts for parts, problem in zip(split, wrong, strict=True) if problem is None]
    read = iter(KINDS[kind]([said for parts in good for said, _ in parts]))
    found: list[tuple[str, ...] | Unreadable] = []
    for parts, problem in zip(split, wrong, strict=True):
        if problem is not None:
            found.append(Unreadable(problem))
            continue
        tokens = [START]
        for _, mark in parts:
            for word in next(read):
                tokens += [*word, " "]
            tokens[-1] = mark if len(tokens) > 1 else START
        found.append(tuple(tokens))
    return found


def numbers(text: str, kind: str, known: Sequence[str]) -> list[int]:
    """The tokens of a new text as numbers of ``known``.

    A stressed phoneme that never occurred is read without stress.

    Raises:
        Unreadable: It has something that is no token, or a token that never occurred.
        DataError: Phonemes are wanted, and eSpeak NG is not installed.
    """
    (tokens,) = sentences([text], kind)
    if isinstance(tokens, Unreadable):
        raise tokens
    place = {token: number for number, token in enumerate(known)}
    plain = [t if t in place or t in PAUSES else t.lstrip("',") for t in tokens]
    # A mark that was never heard is a pause like any other.
    plain = [t if t in place or t not in MARKS else _other_mark(place) for t in plain]
    missing = sorted({t for t in plain if t not in place})
    if missing:
        raise Unreadable(f"has the {kind[:-1]} {missing[0]!r}, which the training data lack")
    return [place[t] for t in plain]


def _other_mark(known: Collection[str]) -> str:
    return next((mark for mark in (".", ",", "?", "!") if mark in known), " ")
