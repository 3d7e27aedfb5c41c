"""Recordings for a vocoder: the waves of all files of a folder or zip, and stretches of them."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from gendiff.data import content_of
from gendiff.errors import ConfigError, DataError
from gendiff.modality import DataReport
from gendiff.noise import generator
from gendiff.runs import cache_folder
from gendiff_speech import audio
from gendiff_speech.mel import CONVENTIONS, MelConvention, log_mel

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
EVERY = 20  # each so many-th file is held out where the configuration names none
VERSION = 2  # of what is cached


class Stretch(NamedTuple):
    """A stretch of a recording."""

    wave: Tensor  # (frames * hop,), in units of facts["scale"]
    mel: Tensor  # (mels, frames), normalised


def sources(path: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Names and files, or their content, of the recordings of a folder or a zip, sorted."""
    if path.is_dir() and not any(p.suffix in SUFFIXES for p in path.rglob("*")):
        path = next(iter(sorted(path.glob("*.zip"))), path)
    if path.suffix == ".zip" and path.is_file():
        with audio.archive(path) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(SUFFIXES):
                    yield name, archive.read(name)
        return
    for file in sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES):
        yield str(file.relative_to(path)), file


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
    cached = _cached(digest)
    if not cached.exists():
        _save(config, path, cached)
    with np.load(cached, allow_pickle=False) as kept:
        facts = {
            "convention": config.convention,
            "digest": digest,
            "scale": float(kept["scale"]),
            "mean": kept["mean"].tolist(),
            "std": kept["std"].tolist(),
            "content": str(kept["content"]),
        }
        train, seconds = kept["train"], float(kept["lengths"].sum())
    minutes = seconds / CONVENTIONS[config.convention].sample_rate_hz / 60
    return DataReport(
        f"{len(train)} recordings, {minutes:.1f} min, {int((~train).sum())} of them held out",
        facts,
    )


def _cached(digest: str) -> Path:
    return cache_folder() / f"waves-{digest}.npz"


def _save(config: Any, path: Path, cached: Path) -> None:
    convention = CONVENTIONS[config.convention]
    waves: list[Tensor] = []
    train: list[bool] = []
    bad: list[str] = []
    for name, source in sources(path):
        try:
            wave = audio.resample(*audio.read(source, name), convention.sample_rate_hz)
        except DataError as error:
            line = error.args[0]
            bad.append(line if line.startswith(name) else f"{name}: {line}")
            continue
        waves.append(wave)
        held = (
            len(train) % EVERY == 0
            if config.held_out is None
            else (re.search(config.held_out, name) is not None)
        )
        train.append(not held)
    if bad:
        more = "" if len(bad) == 1 else f" (and {len(bad) - 1} more)"
        raise DataError(f"data: {bad[0]}{more}")
    if not waves:
        raise DataError(f"vocoder.path: no {', '.join(SUFFIXES)} in {path}.")
    if all(train) or not any(train):
        raise DataError(
            f"vocoder.held_out: {config.held_out!r} is found in the names of "
            f"{'none' if all(train) else 'all'} of {len(train)} files. Some must be held out."
        )
    used = [w for w, t in zip(waves, train, strict=True) if t]
    mels = torch.cat([log_mel(w, convention) for w in used[:: max(1, len(used) // 200)]], 1)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        waves=(torch.cat(waves).clamp(-1, 1) * 32767).round().numpy().astype(np.int16),
        lengths=np.array([len(w) for w in waves]),
        train=np.array(train),
        scale=torch.cat(used).std().numpy(),
        mean=mels.mean(1).numpy(),
        std=mels.std(1).clamp(min=1e-3).numpy(),
        content=np.array(content_of(part for named in sources(path) for part in named)),
    )
    cached.parent.mkdir(parents=True, exist_ok=True)
    part = cached.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(buffer.getvalue())
    part.replace(cached)


class Waves(Dataset[Stretch]):
    """A split of the prepared recordings, in stretches of one length.

    In training a stretch begins where the seed says, else in the middle. A recording that is
    shorter is followed by silence.
    """

    def __init__(self, facts: Mapping[str, Any], split: str, frames: int) -> None:
        path = _cached(facts["digest"])
        if not path.exists():
            raise DataError(f"data: {path} is missing. Run 'gendiff train' again, or train anew.")
        with np.load(path, allow_pickle=False) as kept:
            self.waves, self.lengths = kept["waves"], kept["lengths"]
            self.rows = np.flatnonzero(kept["train"] == (split == "train"))
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
