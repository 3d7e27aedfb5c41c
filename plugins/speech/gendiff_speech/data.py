"""Corpora of spoken words, brought to normalised mels with tokens, durations and speakers.

``espeak`` is spoken by eSpeak NG on first use, which knows each phoneme's time; ``fsdd`` is the
Free Spoken Digit Dataset (real recordings), whose words are spelled in letters of equal length.
What is prepared is one ``.npz`` in the cache folder.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gendiff.errors import ConfigError, DataError
from gendiff.modality import DataReport
from gendiff.noise import derive_seed
from gendiff.runs import cache_folder
from gendiff_speech import audio, espeak
from gendiff_speech.mel import CONVENTIONS, MelConvention, log_mel

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONVENTION = {"espeak": "22khz", "fsdd": "8khz"}
TAKES = {"train": 24, "test": 6}  # of each word and voice
VERSION = 2  # of what is cached; a change of this file's numbers must change it


class Item(NamedTuple):
    """One utterance."""

    mel: Tensor  # (mels, T), normalised
    tokens: Tensor  # (L,), int64, numbers of facts["tokens"]
    durations: Tensor  # (L,), int64 frames, at least 1, adding to T
    speaker: int
    text: int


@dataclass(frozen=True)
class Take:
    """One utterance before it has numbers."""

    split: str
    speaker: str
    text: str
    mel: Tensor
    tokens: tuple[str, ...]
    durations: np.ndarray


def frames_of(starts: Sequence[int], hop: int, frames: int) -> np.ndarray:
    """Durations in frames, at least 1, adding to ``frames``, of tokens from these samples on."""
    count = len(starts)
    edges = np.round(np.asarray([*starts, frames * hop]) / hop).astype(int)
    edges[0] = 0
    for i in range(1, count + 1):  # every token has a frame, and leaves one for each that follows
        edges[i] = min(max(edges[i], edges[i - 1] + 1), frames - (count - i))
    edges[-1] = frames
    return np.diff(edges)


def _espeak(config: Any) -> Iterator[Take]:
    convention = CONVENTIONS[CONVENTION["espeak"]]
    for split, takes in TAKES.items():
        for voice in espeak.VOICES:
            for word in WORDS:
                for take in range(takes):
                    draw = derive_seed(split, voice, word, take)
                    pitch, rate = 20 + draw % 61, 120 + draw // 61 % 81
                    spoken = espeak.speak(word, voice, pitch=pitch, rate=rate)
                    wave = torch.from_numpy(spoken.wave)
                    wave = audio.resample(wave, spoken.rate_hz, convention.sample_rate_hz)
                    mel = log_mel(wave, convention)
                    scale = convention.sample_rate_hz / spoken.rate_hz
                    starts = [round(start * scale) for start in spoken.starts]
                    lasts = frames_of(starts, convention.hop, mel.shape[1])
                    yield Take(split, voice, word, mel, spoken.phonemes, lasts)


def _files(path: Path) -> dict[str, Any]:
    """Names to the content of WAV files, in a folder or a zip."""
    if path.is_dir() and not list(path.glob("*.wav")):
        zips = list(path.glob("*.zip"))
        path = zips[0] if zips else path / "recordings"
    if path.suffix == ".zip" and path.is_file():
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".wav")]
            return {Path(n).name: archive.read(n) for n in names}
    return {p.name: p for p in sorted(path.glob("*.wav"))}


def _fsdd(config: Any) -> Iterator[Take]:
    if config.path is None:
        raise DataError("speech.path: not set. Give the folder with FSDD's recordings.")
    convention = CONVENTIONS[CONVENTION["fsdd"]]
    files = _files(Path(config.path).expanduser())
    if not files:
        raise DataError(f"speech.path: no .wav file in {config.path}. Give FSDD's recordings.")
    bad: list[str] = []
    for name, source in files.items():
        match = re.fullmatch(r"(\d)_([a-z]+)_(\d+)\.wav", name)
        if match is None:
            bad.append(f"{name}: is not named digit_speaker_index.wav")
            continue
        digit, speaker, index = match.groups()
        try:
            wave = audio.resample(*audio.read(source, name), convention.sample_rate_hz)
            mel = log_mel(wave, convention)
        except DataError as error:
            text = str(error)
            bad.append(text if text.startswith(name) else f"{name}: {text}")
            continue
        word = WORDS[int(digit)]
        frames = mel.shape[1]
        if frames < len(word):
            bad.append(f"{name}: {frames} frames are fewer than the letters of {word!r}")
            continue
        starts = [round(i * frames * convention.hop / len(word)) for i in range(len(word))]
        lasts = frames_of(starts, convention.hop, frames)
        yield Take("test" if int(index) < 5 else "train", speaker, word, mel, tuple(word), lasts)
    if bad:
        more = "" if len(bad) == 1 else f" (and {len(bad) - 1} more)"
        raise DataError(f"data: {bad[0]}{more}. Remove or replace what is named.")


def _digest(config: Any) -> str:
    key = f"{VERSION}|{config.data}|{espeak.VOICES}|{TAKES}"
    if config.data == "fsdd" and config.path is not None:
        path = Path(config.path).expanduser().resolve()
        parts = sorted(path.rglob("*")) if path.is_dir() else [path]
        key += "|".join(
            f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in parts if p.exists()
        )
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def prepare(config: Any) -> DataReport:
    """Makes or reads the corpus, and caches it.

    Raises:
        DataError: It is missing, or some of its files are damaged: all are read, then told.
    """
    digest = _digest(config)
    path = cache_folder() / f"speech-{digest}.npz"
    if not path.exists():
        takes = list({"espeak": _espeak, "fsdd": _fsdd}[config.data](config))
        _save(takes, path)
    with np.load(path, allow_pickle=False) as kept:
        facts = _facts(kept, config, digest)
    count = facts["count"]
    return DataReport(
        f"{count} utterances of {len(facts['texts'])} words by {len(facts['speakers'])} speakers",
        facts,
    )


def _save(takes: list[Take], path: Path) -> None:
    if {take.split for take in takes} != {"train", "test"}:
        raise DataError("data: needs recordings of both splits (FSDD: index 0 to 4 is the test's)")
    tokens = ["", *sorted({token for take in takes for token in take.tokens})]
    speakers, texts = (sorted({getattr(t, k) for t in takes}) for k in ("speaker", "text"))
    texts = [word for word in WORDS if word in texts]
    train = np.concatenate([take.mel.numpy() for take in takes if take.split == "train"], 1)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        frames=np.concatenate([take.mel.numpy() for take in takes], 1).T.astype(np.float32),
        lengths=np.array([take.mel.shape[1] for take in takes]),
        tokens=np.concatenate([[tokens.index(t) for t in take.tokens] for take in takes]),
        durations=np.concatenate([take.durations for take in takes]),
        counts=np.array([len(take.tokens) for take in takes]),
        speaker=np.array([speakers.index(take.speaker) for take in takes]),
        text=np.array([texts.index(take.text) for take in takes]),
        train=np.array([take.split == "train" for take in takes]),
        names=np.array(tokens),
        speakers=np.array(speakers),
        texts=np.array(texts),
        mean=train.mean(1),
        std=train.std(1).clip(min=1e-3),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(buffer.getvalue())
    part.replace(path)


def _facts(kept: Any, config: Any, digest: str) -> dict[str, Any]:
    convention = CONVENTION[config.data]
    spoken: dict[str, Any] = {}
    ends = kept["counts"].cumsum()
    tokens, durations = kept["tokens"], kept["durations"]
    groups: dict[tuple[int, int], list[int]] = {}
    for i in np.flatnonzero(kept["train"]):
        groups.setdefault((int(kept["speaker"][i]), int(kept["text"][i])), []).append(int(i))
    for (speaker, text), members in sorted(groups.items()):
        spans = [slice(ends[i] - kept["counts"][i], ends[i]) for i in members]
        first = tokens[spans[0]].tolist()
        same = [s for s in spans if tokens[s].tolist() == first]
        logs = np.log(np.stack([durations[s] for s in same]))
        spoken[f"{speaker} {text}"] = {
            "tokens": first,
            "log_frames": logs.mean(0).tolist(),
            "spread": float(logs.mean(1).std()),
        }
    return {
        "convention": convention,
        "mels": CONVENTIONS[convention].mels,
        "tokens": kept["names"].tolist(),
        "speakers": kept["speakers"].tolist(),
        "texts": kept["texts"].tolist(),
        "spoken": spoken,
        "mean": kept["mean"].tolist(),
        "std": kept["std"].tolist(),
        "digest": digest,
        "count": len(kept["lengths"]),
    }


class Utterances(Dataset[Item]):
    """A split of the prepared corpus."""

    def __init__(self, path: Path, split: str) -> None:
        with np.load(path, allow_pickle=False) as kept:
            self.kept = {name: kept[name] for name in kept.files}
        self.rows = np.flatnonzero(self.kept["train"] == (split == "train"))
        self.ends, self.stops = self.kept["lengths"].cumsum(), self.kept["counts"].cumsum()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        i = self.rows[key[0]]
        kept = self.kept
        frames = kept["frames"][self.ends[i] - kept["lengths"][i] : self.ends[i]]
        mel = torch.from_numpy(((frames - kept["mean"]) / kept["std"]).T.astype(np.float32).copy())
        span = slice(self.stops[i] - kept["counts"][i], self.stops[i])
        tokens, durations = (
            torch.from_numpy(kept[k][span].copy()) for k in ("tokens", "durations")
        )
        return Item(mel, tokens, durations, int(kept["speaker"][i]), int(kept["text"][i]))


def dataset(config: Any, facts: Mapping[str, Any], split: str) -> Utterances:
    """A split of the prepared corpus.

    Raises:
        DataError: It was prepared elsewhere, and the cache is gone.
    """
    path = cache_folder() / f"speech-{facts['digest']}.npz"
    if not path.exists():
        prepare(config)
    if not path.exists():
        raise DataError(f"data: {path} is missing and the corpus has changed. Train a new run.")
    return Utterances(path, split)


def convention(facts: Mapping[str, Any]) -> MelConvention:
    """What the run's mels mean."""
    return CONVENTIONS[facts["convention"]]


def spoken(
    facts: Mapping[str, Any], speaker: int, text: int, seed: int, sample: int, speed: float
) -> tuple[Tensor, Tensor]:
    """Tokens and durations, (L,) int64 each, of a word as this speaker says it.

    Durations are the speaker's mean log frames, all longer or shorter by one normal draw of
    (seed, sample), as the corpus's are; divided by ``speed``.
    """
    entry = facts["spoken"].get(f"{speaker} {text}")
    if entry is None:
        raise ConfigError(
            f"speaker: {facts['speakers'][speaker]!r} never said {facts['texts'][text]!r} in the "
            "training data. Ask another speaker."
        )
    generator = torch.Generator().manual_seed(derive_seed("rate", seed, sample))
    draw = torch.randn((), generator=generator, dtype=torch.float64)
    logs = torch.tensor(entry["log_frames"], dtype=torch.float64) + entry["spread"] * draw
    durations = (logs.exp() / speed).round().long().clamp(min=1)
    return torch.tensor(entry["tokens"]), durations
