"""Recordings for a vocoder: the waves of all files of a folder or zip, and stretches of them.

They are in the cache, in the folder ``waves/DIGEST``: all samples as int16, which are mapped and
never read as a whole, and their index.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from gendiff.data import content_of
from gendiff.errors import ConfigError, DataError
from gendiff.modality import DataReport
from gendiff.noise import generator
from gendiff.preparing import Mapped, Rows, written
from gendiff.runs import cache_folder
from gendiff_speech import audio
from gendiff_speech.corpora import READER, Recording, by_pieces, named
from gendiff_speech.mel import CONVENTIONS, MelConvention, log_mel

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
EVERY = 20  # each so many-th file is held out where the configuration names none
VERSION = 2  # of what is cached; a change of its numbers must change it
ROWS, INDEX = "samples.npy", "index.npz"
_MELS = 200  # recordings, of which the mels' mean and deviation are taken; up to twice as many


class Stretch(NamedTuple):
    """A stretch of a recording."""

    wave: Tensor  # (frames * hop,), in units of facts["scale"]
    mel: Tensor  # (mels, frames), normalised


def found(path: Path) -> list[Recording]:
    """The recordings of a folder or a zip, by their names."""
    if path.is_dir() and not any(p.suffix in SUFFIXES for p in path.rglob("*")):
        path = next(iter(sorted(path.glob("*.zip"))), path)
    if path.suffix == ".zip" and path.is_file():
        with audio.archive(path) as archive:
            names = sorted(n for n in archive.namelist() if n.endswith(SUFFIXES))
        return [Recording(name, path, name, READER, None) for name in names]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
    return [Recording(str(f.relative_to(path)), f, None, READER, None) for f in files]


def _digest(config: Any, path: Path) -> str:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files if p.exists()]
    key = "|".join([str(VERSION), config.convention, str(config.held_out), *stats])
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:16]


def prepare(config: Any) -> DataReport:
    """Reads every recording, brings it to the convention's rate, and caches the waves.

    Raises:
        DataError: There is none, or some cannot be used: all are read, then told.
    """
    if config.path is None:
        raise DataError("vocoder.path: not set. Give a folder or zip of recordings.")
    path = Path(config.path).expanduser().resolve()
    digest = _digest(config, path)
    folder = _folder(digest)
    if not folder.exists():
        _save(config, path, folder)
    with np.load(folder / INDEX, allow_pickle=False) as index:
        facts = {
            "convention": config.convention,
            "digest": digest,
            "scale": float(index["scale"]),
            "mean": index["mean"].tolist(),
            "std": index["std"].tolist(),
            "content": str(index["content"]),
        }
        train, samples = index["train"], float(index["lengths"].sum())
    minutes = samples / CONVENTIONS[config.convention].sample_rate_hz / 60
    return DataReport(
        f"{len(train)} recordings, {minutes:.1f} min, {int((~train).sum())} of them held out",
        facts,
    )


def _folder(digest: str) -> Path:
    return cache_folder() / "waves" / digest


def _save(config: Any, path: Path, folder: Path) -> None:
    """Writes the samples as they come, then the index."""
    convention = CONVENTIONS[config.convention]
    recordings = found(path)
    if not recordings:
        raise DataError(f"vocoder.path: no {', '.join(SUFFIXES)} in {path}.")
    train = np.array(
        [
            i % EVERY > 0 if config.held_out is None else not re.search(config.held_out, r.name)
            for i, r in enumerate(recordings)
        ]
    )
    bad: list[str] = []
    lengths: list[int] = []
    sums, mel_sums = np.zeros(3), np.zeros((3, convention.mels))
    used = np.flatnonzero(train)
    with_mel = frozenset(recordings[i].name for i in used[:: max(1, len(used) // _MELS)])
    hear = partial(_heard, convention=convention, with_mel=with_mel)
    with written(folder) as new:
        with Rows(new / ROWS, np.int16) as rows:
            for heard, trains in zip(by_pieces(hear, recordings), train, strict=True):
                if isinstance(heard, DataError):
                    bad.append(heard.args[0])
                    continue
                rows.append(heard.samples)
                lengths.append(len(heard.samples))
                sums += heard.sums * trains
                mel_sums += heard.mel_sums
        if bad:
            more = "" if len(bad) == 1 else f" (and {len(bad) - 1} more)"
            raise DataError(f"data: {bad[0]}{more}")
        if train.all() or not train.any():
            raise DataError(
                f"vocoder.held_out: {config.held_out!r} is found in the names of "
                f"{'none' if train.all() else 'all'} of {len(train)} files. Some must be held out."
            )
        np.savez(
            new / INDEX,
            allow_pickle=False,
            lengths=np.array(lengths),
            train=train,
            scale=_deviation(sums),
            mean=mel_sums[1] / mel_sums[0],
            std=_deviation(mel_sums).clip(min=1e-3),
            content=np.array(content_of(_parts(recordings))),
        )


class _Heard(NamedTuple):
    """A recording as it is kept, and the sums of it and of its log mel."""

    samples: NDArray[np.int16]
    sums: NDArray[np.float64]  # (3,), see _sums
    mel_sums: NDArray[np.float64]  # (3, mels); 0 of one whose mel is not looked at


def _heard(
    recording: Recording, convention: MelConvention, with_mel: frozenset[str]
) -> _Heard | DataError:
    source = audio.content(recording.path, recording.member)  # a damaged zip is the end of all
    try:
        wave = audio.resample(*audio.read(source, recording.name), convention.sample_rate_hz)
        mel = wave.new_zeros(convention.mels, 0)
        if recording.name in with_mel:
            mel = log_mel(wave, convention)
    except DataError as error:
        return named(recording, error)
    samples = (wave.clamp(-1, 1) * 32767).round().numpy().astype(np.int16)
    return _Heard(samples, _sums(wave), _sums(mel))


def _sums(x: Tensor) -> NDArray[np.float64]:
    """How many there are along the last axis, their sum and that of their squares, (3, *)."""
    y = x.numpy().astype(np.float64)
    return np.stack([np.full(y.shape[:-1], y.shape[-1]), y.sum(-1), (y**2).sum(-1)])


def _deviation(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    count, total, square = sums
    return np.sqrt((square - total**2 / count).clip(min=0) / (count - 1))


def _parts(recordings: Sequence[Recording]) -> Iterator[str | Path | bytes]:
    for recording in recordings:
        yield recording.name
        yield audio.content(recording.path, recording.member)


class Waves(Dataset[Stretch]):
    """A split of the prepared recordings, in stretches of one length.

    In training a stretch begins where the seed says, else in the middle. A recording that is
    shorter is followed by silence.
    """

    def __init__(self, facts: Mapping[str, Any], split: str, frames: int) -> None:
        folder = _folder(facts["digest"])
        if not folder.exists():
            raise DataError(
                f"data: {folder} is missing. Run 'gendiff train' again, or train anew."
            )
        self.waves = Mapped(folder / ROWS)
        with np.load(folder / INDEX, allow_pickle=False) as index:
            self.lengths = index["lengths"]
            self.rows = np.flatnonzero(index["train"] == (split == "train"))
        self.ends = self.lengths.cumsum()
        self.facts, self.split, self.frames = facts, split, frames
        self.convention = CONVENTIONS[facts["convention"]]

    def __len__(self) -> int:
        return len(self.rows)

    def whole(self, index: int) -> Tensor:
        """A recording (T,), in [-1, 1]."""
        i = self.rows[index]
        samples = self.waves[self.ends[i] - self.lengths[i] : self.ends[i]]
        return torch.from_numpy(samples.astype(np.float32) / 32767)

    def __getitem__(self, key: tuple[int, int]) -> Stretch:
        index, seed = key
        wave, hop = self.whole(index), self.convention.hop
        wave = F.pad(wave, (0, max(0, self.frames * hop - len(wave))))
        room = len(wave) // hop - self.frames
        begin = room // 2
        if self.split == "train":
            begin = int(torch.randint(room + 1, (), generator=generator("stretch", seed)))
        mel = mel_of_stretch(wave, begin, self.frames, self.convention)
        wave = wave[begin * hop : (begin + self.frames) * hop]
        return Stretch(wave / self.facts["scale"], normalised(self.facts, mel))


def mel_of_stretch(wave: Tensor, begin: int, frames: int, convention: MelConvention) -> Tensor:
    """Frames ``begin`` to ``begin + frames`` of a wave's log mel, from no more than they need."""
    reach = -(-convention.n_fft // convention.hop)
    low = max(0, begin - reach)
    high = begin + frames + reach
    mel = log_mel(wave[low * convention.hop : high * convention.hop], convention)
    return mel[:, begin - low : begin - low + frames]


def normalised(facts: Mapping[str, Any], mel: Tensor) -> Tensor:
    """A log mel (mels, T) with the data's mean taken off, in units of its deviation."""
    mean, std = (torch.tensor(facts[key])[:, None] for key in ("mean", "std"))
    return (mel - mean) / std


def mel_of_file(facts: Mapping[str, Any], name: str) -> Tensor:
    """The log mel (mels, T) in a .npy file, or of a recording.

    Raises:
        ConfigError: There is no such file, or it holds no mel of the convention.
        DataError: The recording cannot be read.
    """
    convention = CONVENTIONS[facts["convention"]]
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"mel: {name} does not exist. Give a .npy of a log mel, or a recording.")
    if path.suffix != ".npy":
        wave, rate = audio.read(path, name)
        return log_mel(audio.resample(wave, rate, convention.sample_rate_hz), convention)
    try:
        mel = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"mel: {name} is no .npy file ({error}).") from None
    real = mel.dtype.kind in "iuf"
    if not real or mel.ndim != 2 or len(mel) != convention.mels or not np.isfinite(mel).all():
        raise ConfigError(
            f"mel: {name} holds {mel.dtype} {mel.shape}. A finite log mel of {convention.mels} "
            "bands by frames is needed."
        )
    return torch.from_numpy(mel.astype(np.float32))
