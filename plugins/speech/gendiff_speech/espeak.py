"""Speech by rule from eSpeak NG, with the sample at which each phoneme begins.

The library is called through ctypes. It is taken from the package ``espeakng-loader``, which
brings its own voice data, and otherwise from the system. Both are GPL-3 and are loaded at run
time, never shipped with gendiff.

Source: speak_lib.h of eSpeak NG 1.52 (https://github.com/espeak-ng/espeak-ng).
"""

from __future__ import annotations

import _ctypes
import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gendiff.errors import DataError

VOICES: tuple[str, ...] = (
    "en-us",
    "en+m5",
    "en-us+f3",
    "en-gb-scotland+m3",
    "en-gb-x-rp+f2",
    "en-029+m7",
    "en-us-nyc+f5",
    "en-gb-x-gbclan+m8",
)
"""English voices that differ in accent, sex and timbre: a language, then ``+`` and a variant."""

_SYSTEM = "libespeak-ng.so.1"
_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT: samples go to the callback, the call returns at the end
_PHONEME_EVENTS, _DONT_EXIT = 0x1, 0x8000  # options of espeak_Initialize
_BY_CHARACTER = 1  # espeak_POSITION_TYPE
_UTF8 = 0x1  # flag of espeak_Synth; without 0x1000 no pause of a third of a second follows
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_SEPARATOR = ord("|") << 8  # of espeak_TextToPhonemes: between the mnemonics of a word
_LIST_TERMINATED, _PHONEME = 0, 7  # espeak_EVENT_TYPE
_PAUSE = "_"

_lock = Lock()  # the library keeps one voice and one callback for the whole process


@dataclass(frozen=True)
class Spoken:
    """A spoken text.

    wave: float32 (samples,) in [-1, 1] at ``rate_hz``.
    rate_hz: Samples per second, 22050.
    phonemes: Mnemonics, eSpeak's with their stress marks, ``"_"`` for every pause; no two pauses
        follow each other.
    starts: The sample at which each phoneme begins, strictly increasing from 0. A phoneme ends
        where the next begins, the last one with the wave.
    """

    wave: NDArray[np.float32]
    rate_hz: int
    phonemes: tuple[str, ...]
    starts: tuple[int, ...]


def missing() -> str | None:
    """Why eSpeak NG cannot be used, and what to install; None if it can."""
    try:
        with _lock, _fresh_library():
            return None
    except DataError as error:
        return str(error)


def speak(text: str, voice: str, pitch: int = 50, rate: int = 160) -> Spoken:
    """Speak a text; the same arguments give the same samples, in any order and any process.

    Args:
        text: What is said, normally English.
        voice: One of ``VOICES``, or any other ``language`` or ``language+variant`` of eSpeak.
        pitch: The base pitch, from 0 to 99.
        rate: Words per minute, from 80 to 450.

    Raises:
        DataError: eSpeak NG is not installed, lacks the voice, or cannot speak the text.
    """
    chunks: list[NDArray[np.int16]] = []
    events: list[tuple[str, int]] = []

    def receive(samples: Any, count: int, event: Any) -> int:
        if samples and count:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        index = 0
        while event[index].type != _LIST_TERMINATED:
            if event[index].type == _PHONEME:
                name = bytes(event[index].name).partition(b"\0")[0].decode()
                events.append((name, event[index].sample))
            index += 1
        return 0

    said = text.encode() + b"\0"
    callback = _CALLBACK(receive)
    with _lock, _fresh_library() as (library, rate_hz):
        if not _has_variant(library, voice) or library.espeak_SetVoiceByName(voice.encode()):
            raise DataError(f"eSpeak NG has no voice '{voice}'. Choose from: {', '.join(VOICES)}")
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_SetParameter(_RATE, rate, 0)
        library.espeak_SetSynthCallback(callback)
        status = library.espeak_Synth(said, len(said), 0, _BY_CHARACTER, 0, _UTF8, None, None)
    if status or not chunks:
        raise DataError(f"eSpeak NG cannot speak {text!r} (status {status}): change the text")
    wave = np.concatenate(chunks).astype(np.float32) / np.float32(32768)
    phonemes, starts = _cover(events, len(wave))
    return Spoken(wave, rate_hz, phonemes, starts)


def phonemes_of(clauses: Sequence[str], voice: str = VOICES[0]) -> list[list[tuple[str, ...]]]:
    """The words of each clause as eSpeak's mnemonics with their stress marks, without sound.

    Little words may be one with their neighbour (``of the``), and numbers are read out.

    Args:
        clauses: Texts without punctuation.
        voice: One of ``VOICES``: accents differ in their phonemes.

    Raises:
        DataError: eSpeak NG is not installed or lacks the voice.
    """
    found = []
    with _lock, _fresh_library() as (library, _):
        if library.espeak_SetVoiceByName(voice.encode()):
            raise DataError(f"eSpeak NG has no voice '{voice}'. Choose from: {', '.join(VOICES)}")
        library.espeak_TextToPhonemes.restype = ctypes.c_char_p
        for clause in clauses:
            text = ctypes.create_string_buffer(clause.encode())
            at = ctypes.c_void_p(ctypes.addressof(text))
            read = ""
            while at.value:  # it reads up to what it takes for the end of a clause
                part = library.espeak_TextToPhonemes(ctypes.byref(at), _UTF8, _SEPARATOR)
                read += " " + (part or b"").decode()
            read = re.sub(r"\([a-z-]+\)", "", read)  # marks of another language's word
            words = ([p for p in w.split("|") if p.strip("_:;-'%=,")] for w in read.split())
            found.append([tuple(word) for word in words if word])
    return found


def _cover(
    events: Sequence[tuple[str, int]], samples: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Phonemes and starts that cover the wave from sample 0 to its end, each with time of its own.

    Pauses without a sample are left out and neighbouring pauses made one. A phoneme without a
    sample was sounded within the one before it (the ``l`` of ``all``): they get equal shares.
    """
    marks = [(_PAUSE, 0)] + [(_PAUSE if n.startswith(_PAUSE) else n, s) for n, s in events]
    ends = [start for _, start in marks[1:]] + [samples]
    kept: list[tuple[str, int, int]] = []
    for (name, start), end in zip(marks, ends, strict=True):
        if name != _PAUSE or (end > start and not (kept and kept[-1][0] == _PAUSE)):
            kept.append((name, start, end))
    known = [(index, start) for index, (_, start, end) in enumerate(kept) if end > start]
    at, times = zip(*known, (len(kept), samples), strict=True)
    starts = np.interp(np.arange(len(kept)), at, times).astype(int)
    return tuple(name for name, _, _ in kept), tuple(starts.tolist())


@contextmanager
def _fresh_library() -> Iterator[tuple[ctypes.CDLL, int]]:
    """The library just loaded, and its samples per second; unloaded at the end.

    The pitch flutter and the phase of the wave live in static variables that nothing resets, so
    what is said would depend on all that was said before. Loading takes about a millisecond.
    """
    try:
        import espeakng_loader  # type: ignore[import-untyped, import-not-found]

        path, data = espeakng_loader.get_library_path(), espeakng_loader.get_data_path()
    except ImportError:
        path, data = _SYSTEM, None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise DataError(
            f"eSpeak NG cannot be loaded ({error}): "
            "`pip install espeakng-loader` or `apt install espeak-ng`"
        ) from error
    try:
        rate_hz = library.espeak_Initialize(
            _SYNCHRONOUS, 0, data and str(data).encode(), _PHONEME_EVENTS | _DONT_EXIT
        )
        if rate_hz <= 0:
            raise DataError(
                "eSpeak NG does not find its voice data: "
                "`pip install espeakng-loader` or `apt install espeak-ng`"
            )
        if hasattr(library, "espeak_ng_SetRandSeed"):
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        ctypes.CDLL(None).srand(1)  # the noise of some voices, and of all before 1.52
        yield library, rate_hz
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)


def _has_variant(library: ctypes.CDLL, voice: str) -> bool:
    """False if what follows the ``+`` is not there; eSpeak itself would go on without it."""
    variant = voice.partition("+")[2]
    data = ctypes.c_char_p()
    library.espeak_Info(ctypes.byref(data))
    folder = Path((data.value or b"").decode()) / "voices" / "!v"
    return not variant or (folder / variant).is_file()


class _Event(ctypes.Structure):
    """espeak_EVENT; ``sample`` counts from the beginning of the text."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_ubyte * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)
