"""Speech by rule from eSpeak NG, with the sample at which each phoneme begins.

The library is called through ctypes. It is taken from the package ``espeakng-loader``, which
brings its own voice data, and otherwise from the system. Both are GPL-3 and are loaded at run
time, never shipped with gendiff.

Source: speak_lib.h of eSpeak NG 1.52 (https://github.com/espeak-ng/espeak-ng).
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from gendiff.errors import DataError

VOICES = (
    "en-us",
    "en",
    "en-us+f3",
    "en-gb-scotland+m3",
    "en-gb-x-rp+f2",
    "en-029+m7",
    "en-us-nyc+f5",
    "en-gb-x-gbclan+m8",
)
"""English voices that differ in accent, sex and timbre: a language, then ``+`` and a variant."""

_FIX = "`pip install espeakng-loader` or `apt install espeak-ng`"
_SYSTEM = "libespeak-ng.so.1"
_SYNCHRONOUS = 2  # espeak_AUDIO_OUTPUT
_PHONEME_EVENTS, _DONT_EXIT = 0x1, 0x8000  # options of espeak_Initialize
_UTF8, _END_PAUSE = 0x1, 0x1000  # flags of espeak_Synth
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_LIST_TERMINATED, _PHONEME = 0, 7  # espeak_EVENT_TYPE

_lock = Lock()  # the library keeps one voice and one callback for the whole process


@dataclass(frozen=True)
class Spoken:
    """A spoken text.

    wave: float32 (samples,) in [-1, 1] at ``rate_hz``.
    rate_hz: Samples per second, 22050.
    phonemes: eSpeak's mnemonics with their stress marks, ``"_"`` for every pause; no two pauses
        follow each other.
    starts: The sample at which each phoneme begins, strictly increasing from 0. A phoneme ends
        where the next begins, the last one with the wave.
    """

    wave: NDArray[np.float32]
    rate_hz: int
    phonemes: tuple[str, ...]
    starts: tuple[int, ...]


def speak(text: str, voice: str, pitch: int = 50, rate: int = 160) -> Spoken:
    """Speak a text; the same arguments give the same samples, in any order and any process.

    Args:
        text: What is said, normally English.
        voice: One of ``VOICES``, or any other ``language`` or ``language+variant`` of eSpeak.
        pitch: The base pitch, from 0 to 99.
        rate: Words per minute, from 80 to 450.

    Raises:
        DataError: eSpeak NG is not installed, lacks the voice, or the text cannot be spoken.
    """
    library, rate_hz, voices = _library()
    variant = voice.partition("+")[2]
    chunks: list[NDArray[np.int16]] = []
    events: list[tuple[str, int]] = []

    def receive(wave: ctypes._Pointer[ctypes.c_short], count: int, event: Sequence[_Event]) -> int:
        if wave and count:
            chunks.append(np.ctypeslib.as_array(wave, (count,)).copy())
        index = 0
        while event[index].type != _LIST_TERMINATED:
            if event[index].type == _PHONEME:
                name = bytes(event[index].name).partition(b"\0")[0].decode()
                events.append((name, event[index].sample))
            index += 1
        return 0

    said = text.encode() + b"\0"
    callback = _CALLBACK(receive)
    with _lock:
        # eSpeak takes an unknown variant without a word and speaks as if none were given.
        known = not variant or (voices / "!v" / variant).is_file()
        if not known or library.espeak_SetVoiceByName(voice.encode()):
            raise DataError(
                f"eSpeak NG has no voice '{voice}'. Choose from: {', '.join(VOICES)}"
            )
        library.espeak_SetParameter(_PITCH, pitch, 0)
        library.espeak_SetParameter(_RATE, rate, 0)
        library.espeak_SetSynthCallback(callback)
        _seed(library)(1)
        flags = _UTF8 | _END_PAUSE
        status = library.espeak_Synth(said, len(said), 0, 1, 0, flags, None, None)
    if status or not chunks:
        raise DataError(f"eSpeak NG cannot speak {text!r} (status {status}): change the text")
    wave = np.concatenate(chunks).astype(np.float32) / 32768
    phonemes, starts = _spans(events, len(wave))
    return Spoken(wave, rate_hz, phonemes, starts)


def _spans(
    events: Sequence[tuple[str, int]], samples: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Phonemes and starts that cover all samples, every phoneme with at least one."""
    runs: list[tuple[list[str], int]] = [(["_"], 0)]
    for name, start in events:
        name = "_" if name.startswith("_") else name
        if start >= samples:
            break
        if name == runs[-1][0][-1] == "_":
            continue
        if start > runs[-1][1]:
            runs.append(([name], start))
        elif runs[-1][0] == ["_"]:
            runs[-1] = ([name], start)
        else:
            runs[-1][0].append(name)
    return runs, samples  # type: ignore


class _Event(ctypes.Structure):
    """espeak_EVENT; ``sample`` is the position from the beginning of the text."""

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
