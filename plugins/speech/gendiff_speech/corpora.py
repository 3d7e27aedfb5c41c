"""Recordings as people keep them: where they are, who speaks and what is said.

Each layout reads the folder of ``speech.path``, which must be there; nothing is downloaded.

======================  =========================================================================
``ljspeech``            ``metadata.csv`` of lines ``id|text`` or ``id|text|normalised text``
                        (more columns are passed over), sound ``id.wav`` or ``id.flac`` in the
                        folder, in ``wavs``, in ``flac`` or in a zip beside the table
``vctk``                VCTK 0.92: ``txt/p225/p225_001.txt`` and
                        ``wav48_silence_trimmed/p225/p225_001_mic1.flac``
``libritts``            ``reader/chapter/name.wav`` beside ``name.normalized.txt``, in any folder
``speechcommands``      ``word/speaker_nohash_take.wav``; ``testing_list.txt`` is the held-out part
``folder``              any sound, without text; the first folder below is the speaker
======================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gendiff.errors import DataError
from gendiff.preparing import Told, spread
from gendiff_speech import audio
from gendiff_speech.mel import MelConvention, log_mel

SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".aif")
READER = "reader"  # the speaker's name where there is one, who has none
_HELD_OUT = 100  # recordings at most, unless there are more speakers
_PIECE_BYTES = 1 << 20  # of files that a process reads at a time: some tenths of a second
_FEW_BYTES = 32 << 20  # of files that are read in this process, as another takes seconds to start

T = TypeVar("T")


@dataclass(frozen=True)
class Recording:
    """A sound file that is not read yet.

    Args:
        name: What to call it in messages.
        path: The file, or the zip that holds it.
        member: Its name in the zip.
        speaker: Who speaks.
        text: What is said, if it is known.
        test: Whether it is held out, where the corpus says so.
    """

    name: str
    path: Path
    member: str | None
    speaker: str
    text: str | None
    test: bool | None = None


Found = tuple[list[Recording], list[str]]  # and a line for each that cannot be used


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path} is not UTF-8 text ({error.reason}). Convert it.") from None


def _ljspeech(folder: Path) -> Found:
    table = folder / "metadata.csv"
    if not table.is_file():
        raise DataError(f"speech.path: no metadata.csv in {folder}. Give LJSpeech's layout.")
    sounds: dict[str, tuple[Path, str | None]] = {}
    for archive in sorted(folder.glob("*.zip")):
        with audio.archive(archive) as kept:
            for member in kept.namelist():
                if member.lower().endswith(SOUNDS):
                    sounds[Path(member).stem] = archive, member
    for place in (folder, folder / "flac", folder / "wavs"):
        for path in sorted(place.glob("*")):
            if path.suffix.lower() in SOUNDS:
                sounds[path.stem] = path, None
    recordings, bad, seen = [], [], set()
    for number, line in enumerate(_read_text(table).splitlines(), 1):
        if not line.strip():
            continue
        name, *columns = line.split("|")
        name = name.strip()
        where = f"metadata.csv line {number}"
        if not columns:
            bad.append(f"{where}: {line[:40]!r} is not id|text")
        elif name in seen:
            bad.append(f"{where}: {name!r} is there twice")
        elif name not in sounds:
            bad.append(f"{where}: no recording {name}.wav or {name}.flac")
        else:
            # The third column is the second with numbers and abbreviations written out.
            text = columns[1] if len(columns) == 2 and columns[1].strip() else columns[0]
            recordings.append(Recording(name, *sounds[name], READER, text))
        seen.add(name)
    return recordings, bad


def _vctk(folder: Path) -> Found:
    root = folder / "VCTK-Corpus-0.92" if (folder / "VCTK-Corpus-0.92").is_dir() else folder
    recordings, bad = [], []
    # Speaker p315 has no texts, and p280 no second microphone: the first is the corpus.
    for path in sorted((root / "wav48_silence_trimmed").glob("*/*_mic1.flac")):
        speaker, name = path.parent.name, path.name.removesuffix("_mic1.flac")
        said = root / "txt" / speaker / f"{name}.txt"
        if said.is_file():
            recordings.append(Recording(name, path, None, speaker, _read_text(said).strip()))
        elif said.parent.is_dir():
            bad.append(f"{name}: no text {said.relative_to(root)}")
    return recordings, bad


def _libritts(folder: Path) -> Found:
    recordings, bad = [], []
    for path in sorted(folder.rglob("*.wav")):
        said = path.with_suffix(".normalized.txt")
        if said.is_file():
            speaker = path.parent.parent.name
            recordings.append(Recording(path.stem, path, None, speaker, _read_text(said).strip()))
        else:
            bad.append(f"{path.relative_to(folder)}: no text {said.name}")
    return recordings, bad


def _speechcommands(folder: Path) -> Found:
    listed = folder / "testing_list.txt"
    held_out = set(_read_text(listed).split()) if listed.is_file() else None
    recordings = []
    for path in sorted(folder.glob("*/*.wav")):
        word, name = path.parent.name, path.relative_to(folder).as_posix()
        if not word.startswith("_"):  # _background_noise_
            test = None if held_out is None else name in held_out
            recordings.append(Recording(name, path, None, READER, word, test))
    return recordings, []


def _folder(folder: Path) -> Found:
    recordings = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in SOUNDS and not path.name.startswith("."):
            speaker = inside.parts[0] if len(inside.parts) > 1 else READER
            recordings.append(Recording(inside.as_posix(), path, None, speaker, None))
    return recordings, []


LAYOUTS: dict[str, Callable[[Path], Found]] = {
    "ljspeech": _ljspeech,
    "vctk": _vctk,
    "libritts": _libritts,
    "speechcommands": _speechcommands,
    "folder": _folder,
}


def find(layout: str, path: str | None) -> Found:
    """The recordings of a layout, and a line for each that is missing a part.

    Raises:
        DataError: There is no such folder, or nothing of this layout in it.
    """
    if path is None:
        raise DataError(f"speech.path: not set. Give the folder of the {layout} recordings.")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"speech.path: no folder {folder}. Give that of the {layout} recordings.")
    recordings, bad = LAYOUTS[layout](folder)
    if not recordings and not bad:
        raise DataError(f"speech.path: no recordings in {folder} of the layout '{layout}'.")
    return recordings, bad


def held_out(speakers: Sequence[str]) -> list[bool]:
    """Which are the test split: the last of each speaker.

    A tenth, but of all speakers together no more than 100, and of each one who has two, one.
    """
    count = {speaker: speakers.count(speaker) for speaker in set(speakers)}
    most = max(1, _HELD_OUT // max(1, len(count)))
    train = {who: n - min(n - 1, most, max(1, n // 10)) for who, n in count.items()}
    found = []
    for speaker in speakers:
        train[speaker] -= 1
        found.append(train[speaker] < 0)
    return found


def by_pieces(work: Callable[[Recording], T], recordings: Sequence[Recording]) -> Iterator[T]:
    """``map(work, recordings)`` in order, in worker processes where they are worth it."""
    sizes = [audio.size_of(r.path, r.member) for r in recordings]
    pieces: list[list[Recording]] = []
    room = 0
    for recording, size in zip(recordings, sizes, strict=True):
        if size > room or not pieces:
            pieces.append([])
            room = _PIECE_BYTES
        pieces[-1].append(recording)
        room -= size
    few = len(pieces) if sum(sizes) <= _FEW_BYTES else 0
    told, done = Told(), 0
    for found in spread(partial(_each, work), pieces, few):
        yield from found
        done += len(found)
        told("recordings", done, len(recordings))


def _each(work: Callable[[Recording], T], piece: Sequence[Recording]) -> list[T]:
    return [work(recording) for recording in piece]


def named(recording: Recording, error: DataError) -> DataError:
    """The error with the recording's name in front, if it does not stand there."""
    line = error.args[0]
    return error if line.startswith(recording.name) else DataError(f"{recording.name}: {line}")


@dataclass(frozen=True)
class Heard:
    """A recording's log mel (T, mels), and the rate in Hz at which it was recorded."""

    mel: NDArray[np.float32]
    rate_hz: int


def hear(
    recordings: Sequence[Recording], convention: MelConvention, trim: bool = True
) -> Iterator[Heard | DataError]:
    """Log mels of recordings in their order, resampled; trimmed: without silence at their ends."""
    return by_pieces(partial(_heard, convention=convention, trim=trim), recordings)


def _heard(recording: Recording, convention: MelConvention, trim: bool) -> Heard | DataError:
    source = audio.content(recording.path, recording.member)  # a damaged zip is the end of all
    try:
        wave, rate = audio.read(source, recording.name)
        if trim:
            wave = audio.trim(wave, rate, recording.name)
        wave = audio.resample(wave, rate, convention.sample_rate_hz)
        return Heard(log_mel(wave, convention).T.contiguous().numpy(), rate)
    except DataError as error:
        return named(recording, error)
