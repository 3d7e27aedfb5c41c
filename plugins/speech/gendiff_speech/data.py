"""Corpora, brought to normalised mels with tokens, durations and speakers.

``espeak`` is spoken by eSpeak NG on first use, which knows each phoneme's time, and ``formants``
by :mod:`gendiff_speech.formants`, which needs nothing and only tries the code; ``auto`` is the
first where eSpeak NG is installed, else the second, and a run keeps to what it began with.
``fsdd`` is the Free Spoken Digit Dataset (real recordings), whose words are spelled in letters of
equal length.
For people's own recordings (:mod:`gendiff_speech.corpora`) the text becomes tokens
(:mod:`gendiff_speech.text`), whose durations are searched for (:mod:`gendiff_speech.alignment`),
and a small network learns the durations of new text (:mod:`gendiff_speech.durations`).

What is prepared is in the cache, in the folder ``speech/DIGEST``: all frames as float32 (frames,
mels), which are mapped and never read as a whole, and their index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gendiff.data import content_of
from gendiff.errors import ConfigError, DataError
from gendiff.modality import DataReport
from gendiff.noise import derive_seed
from gendiff.preparing import Mapped, Rows, Told, spread, written
from gendiff.runs import cache_folder
from gendiff_speech import alignment, audio, corpora, durations, espeak, formants, text
from gendiff_speech.mel import CONVENTIONS, MelConvention, log_mel

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CONVENTION = {"fsdd": "8khz", "speechcommands": "16khz", "libritts": "24khz"}  # others: 22khz
TAKES = {"train": 24, "test": 6}  # of each word and voice
VERSION = 5  # of what is cached; a change of its numbers must change it
ROWS, INDEX = "frames.npy", "index.npz"
_FEW = 100  # different texts at most in a corpus of words; sentences are not counted
_FEW_TAKES = 600  # that are spoken in this process, as another takes seconds to start
_SHOWN = 20  # bad files that are named
_BY_RULE = ("espeak", "formants")  # what ``auto`` may be
_TOY = "a formant synthesiser: buzzing vowels and noise, to try the code with"


class Item(NamedTuple):
    """One utterance."""

    mel: Tensor  # (mels, T), normalised
    tokens: Tensor  # (L,), int64, numbers of facts["tokens"]
    durations: Tensor  # (L,), int64 frames, at least 1, adding to T
    speaker: int
    text: int


@dataclass(frozen=True)
class Take:
    """One utterance before it has numbers.

    Args:
        split: ``train`` or ``test``; None for the last of each speaker's.
        speaker: Who speaks.
        text: What is said; None if that is not known.
        mel: (T, mels), float32.
        tokens: Of the text; none if that is not known.
        durations: Of the tokens in frames, (L,); None where they are to be found.
    """

    split: str | None
    speaker: str
    text: str | None
    mel: np.ndarray
    tokens: tuple[str, ...]
    durations: np.ndarray | None


def frames_of(starts: Sequence[int], hop: int, frames: int) -> np.ndarray:
    """Durations in frames, at least 1, adding to ``frames``, of tokens from these samples on."""
    count = len(starts)
    edges = np.round(np.asarray([*starts, frames * hop]) / hop).astype(int)
    edges[0] = 0
    for i in range(1, count + 1):  # every token has a frame, and leaves one for each that follows
        edges[i] = min(max(edges[i], edges[i - 1] + 1), frames - (count - i))
    edges[-1] = frames
    return np.diff(edges)


def _convention(config: Any) -> str:
    if config.convention != "auto":
        return str(config.convention)
    return CONVENTION.get(config.data, "22khz")


def _espeak(config: Any, notes: list[str]) -> Iterator[Take]:
    if why := espeak.missing():
        raise DataError(
            f"speech.data=espeak: {why}, or try the code with speech.data=formants, a toy"
        )
    return _by_rule(espeak.speak, espeak.VOICES, config)


def _formants(config: Any, notes: list[str]) -> Iterator[Take]:
    return _by_rule(formants.speak, formants.VOICES, config)


def _by_rule(
    speak: Callable[..., espeak.Spoken], voices: Sequence[str], config: Any
) -> Iterator[Take]:
    """Digits of a synthesiser; the held-out ones have other pitches and rates."""
    words = [
        (split, takes, voice, word)
        for split, takes in TAKES.items()
        for voice in voices
        for word in WORDS
    ]
    total = sum(takes for _, takes, _, _ in words)
    told, done = Told(), 0
    few = len(words) if total <= _FEW_TAKES else 0
    for takes in spread(partial(_said, speak, _convention(config)), words, few):
        yield from takes
        done += len(takes)
        told("words", done, total)


def _said(
    speak: Callable[..., espeak.Spoken],
    convention_name: str,
    asked: tuple[str, int, str, str],
) -> list[Take]:
    """All takes of a split's voice and word."""
    convention = CONVENTIONS[convention_name]
    split, takes, voice, word = asked
    found = []
    for take in range(takes):
        draw = derive_seed(split, voice, word, take)
        pitch, rate = 20 + draw % 61, 120 + draw // 61 % 81
        spoken = speak(word, voice, pitch=pitch, rate=rate)
        wave = torch.from_numpy(spoken.wave)
        wave = audio.resample(wave, spoken.rate_hz, convention.sample_rate_hz)
        mel = log_mel(wave, convention).T.contiguous().numpy()
        scale = convention.sample_rate_hz / spoken.rate_hz
        starts = [round(start * scale) for start in spoken.starts]
        lasts = frames_of(starts, convention.hop, len(mel))
        found.append(Take(split, voice, word, mel, spoken.phonemes, lasts))
    return found


def _fsdd_files(config: Any) -> dict[str, tuple[Path, str | None]]:
    """Names to the files of a folder, or to members of a zip."""
    path = Path(config.path).expanduser()
    if path.is_dir() and not list(path.glob("*.wav")):
        zips = list(path.glob("*.zip"))
        path = zips[0] if zips else path / "recordings"
    if path.suffix == ".zip" and path.is_file():
        with audio.archive(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(".wav")]
            return {Path(n).name: (path, n) for n in names}
    return {p.name: (p, None) for p in sorted(path.glob("*.wav"))}


def _fsdd(config: Any, notes: list[str]) -> Iterator[Take]:
    if config.path is None:
        raise DataError("speech.path: not set. Give the folder with FSDD's recordings.")
    files = _fsdd_files(config)
    if not files:
        raise DataError(f"speech.path: no .wav file in {config.path}. Give FSDD's recordings.")
    bad: list[str] = []
    recordings = []
    for name, place in files.items():
        match = re.fullmatch(r"(\d)_([a-z]+)_(\d+)\.wav", name)
        if match is None:
            bad.append(f"{name}: is not named digit_speaker_index.wav")
            continue
        digit, speaker, index = match.groups()
        word = WORDS[int(digit)]
        recordings.append(corpora.Recording(name, *place, speaker, word, int(index) < 5))
    convention = CONVENTIONS[_convention(config)]
    # Untrimmed: the recordings are short, and cut.
    for heard, r in zip(corpora.hear(recordings, convention, trim=False), recordings, strict=True):
        if isinstance(heard, DataError):
            bad.append(heard.args[0])
            continue
        word, frames = str(r.text), len(heard.mel)
        if frames < len(word):
            bad.append(f"{r.name}: {frames} frames are fewer than the letters of {word!r}")
            continue
        starts = [round(i * frames * convention.hop / len(word)) for i in range(len(word))]
        lasts = frames_of(starts, convention.hop, frames)
        yield Take("test" if r.test else "train", r.speaker, word, heard.mel, tuple(word), lasts)
    _refuse(bad)


def _refuse(bad: Sequence[str]) -> None:
    """Raises DataError with a line for each that is bad, if any is."""
    if len(bad) == 1:
        raise DataError(f"data: {bad[0]}")
    if bad:
        lines = [*bad[:_SHOWN]]
        if len(bad) > _SHOWN:
            lines.append(f"and {len(bad) - _SHOWN} more")
        raise DataError(
            f"data: {len(bad)} recordings cannot be used:", *(f"  {line}" for line in lines)
        )


def _recorded(config: Any, notes: list[str]) -> Iterator[Take]:
    """People's recordings; what is wrong with any is told when all are read."""
    name = _convention(config)
    convention = CONVENTIONS[name]
    recordings, bad = corpora.find(config.data, config.path)
    spoken: list[tuple[str, ...]] = [()] * len(recordings)
    if config.data != "folder":
        read = text.sentences([r.text or "" for r in recordings], text.kind_of(config.tokens))
        for i, said in enumerate(read):
            if isinstance(said, text.Unreadable):
                bad.append(f"{recordings[i].name}: its text {said}")
            else:
                spoken[i] = said
    second = convention.sample_rate_hz / convention.hop
    longest = int(config.max_seconds * second)
    slow, long = 0, 0
    for heard, r, tokens in zip(
        corpora.hear(recordings, convention), recordings, spoken, strict=True
    ):
        if isinstance(heard, DataError):
            bad.append(heard.args[0])
            continue
        slow += heard.rate_hz < 2 * convention.high_hz
        frames = len(heard.mel)
        split = None if r.test is None else "test" if r.test else "train"
        if config.data == "folder":
            for piece in torch.from_numpy(heard.mel).chunk(-(-frames // longest)):
                yield Take(split, r.speaker, None, piece.numpy(), (), None)
        elif frames > longest:
            long += 1
        elif tokens and frames < len(tokens):
            bad.append(f"{r.name}: its {frames} frames are fewer than its text's tokens")
        elif tokens:
            yield Take(split, r.speaker, r.text, heard.mel, tokens, None)
    _refuse(bad)
    if slow:
        notes.append(
            f"data: {slow} recordings have a sample rate below {2 * convention.high_hz:.0f} Hz, "
            f"so the upper mel bands are empty. Choose another speech.convention than {name}."
        )
    if long:
        notes.append(
            f"data: {long} recordings are left out that last longer than speech.max_seconds="
            f"{config.max_seconds:g}"
        )


TAKEN = {
    "espeak": _espeak,
    "formants": _formants,
    "fsdd": _fsdd,
    **dict.fromkeys(corpora.LAYOUTS, _recorded),
}


def settled(config: Any, facts: Mapping[str, Any]) -> Any:
    """The section with what ``auto`` was when the data of these facts were prepared."""
    update = {}
    if config.data == "auto" and facts.get("data") in _BY_RULE:
        update["data"] = facts["data"]
    if config.tokens == "auto" and "reading" in facts:
        update["tokens"] = facts["reading"]["kind"]
    return config.model_copy(update=update)


def _digest(config: Any) -> str:
    key = (
        f"{VERSION}|{config.data}|{_convention(config)}|{espeak.VOICES}|{formants.VOICES}|{TAKES}"
    )
    if config.data in corpora.LAYOUTS:
        key += f"|{config.max_seconds}|{text.kind_of(config.tokens)}"
    if config.data not in _BY_RULE and config.path is not None:
        path = Path(config.path).expanduser().resolve()
        parts = sorted(path.rglob("*")) if path.is_dir() else [path]
        key += "|".join(
            f"{p}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in parts if p.exists()
        )
    return hashlib.sha256(os.fsencode(key)).hexdigest()[:16]


def _content(config: Any) -> str:
    """A name of what is read of the files."""
    if config.data in _BY_RULE:
        return content_of([_digest(config)])
    if config.data == "fsdd":
        files = _fsdd_files(config).items()
        return content_of(p for name, place in files for p in (name, audio.content(*place)))
    recordings, _ = corpora.find(config.data, config.path)
    sources = dict.fromkeys(r.path for r in recordings)  # a zip holds many
    told = [f"{r.name} {r.member} {r.speaker} {r.test} {r.text}" for r in recordings]
    return content_of([*told, *sources])


def _folder(digest: str) -> Path:
    return cache_folder() / "speech" / digest


def prepare(config: Any) -> DataReport:
    """Makes or reads the corpus, and caches it.

    Raises:
        DataError: It is missing, or some of its files are damaged: all are read, then told.
    """
    warnings: tuple[str, ...] = ()
    if config.data == "auto":
        why = espeak.missing()
        config = config.model_copy(update={"data": "formants" if why else "espeak"})
        if why:
            warnings = (
                f"data: eSpeak NG cannot be used, so the words are those of {_TOY}. "
                "For speech: `pip install espeakng-loader`, then a new run (name=…)",
            )
    digest = _digest(config)
    folder = _folder(digest)
    if not folder.exists():
        notes: list[str] = []
        _save(TAKEN[config.data](config, notes), config, digest, notes)
    with np.load(folder / INDEX, allow_pickle=False) as index:
        report = DataReport(**json.loads(str(index["report"])))
    return replace(report, warnings=(*warnings, *report.warnings))


def _save(takes: Iterable[Take], config: Any, digest: str, notes: list[str]) -> None:
    """Writes the frames as they come, then the index."""
    found: list[Take] = []
    lengths = []
    with written(_folder(digest)) as new:
        with Rows(new / ROWS, np.float32, (CONVENTIONS[_convention(config)].mels,)) as rows:
            for take in takes:
                rows.append(take.mel)
                lengths.append(len(take.mel))
                found.append(replace(take, mel=take.mel[:0].copy()))
        arrays, report = _numbered(found, lengths, new / ROWS, config, digest)
        report["facts"]["content"] = _content(config)
        report["warnings"] = notes
        np.savez(new / INDEX, allow_pickle=False, report=np.array(json.dumps(report)), **arrays)


def _numbered(
    takes: Sequence[Take], lengths: Sequence[int], path: Path, config: Any, digest: str
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The index's arrays and the report of a corpus whose frames lie in a file."""
    last = corpora.held_out([take.speaker for take in takes])
    told = [t.split == "test" if t.split else held for t, held in zip(takes, last, strict=True)]
    train = ~np.array(told, dtype=bool)
    if train.all() or not train.any():
        raise DataError(
            "data: needs recordings of both splits, train and test. Two of one speaker do; "
            "FSDD's index 0 to 4 is its test split."
        )
    tokens = ["", *sorted({token for take in takes for token in take.tokens})]
    place = {token: number for number, token in enumerate(tokens)}
    speakers = sorted({take.speaker for take in takes})
    texts = sorted({take.text for take in takes if take.text is not None})
    if config.data in (*_BY_RULE, "fsdd"):
        texts = [word for word in WORDS if word in texts]
    elif len(texts) > min(_FEW, len(takes) // 5):
        texts = []
    name = _convention(config)
    frames = Mapped(path)
    edges = np.cumsum([0, *lengths])
    mean, std = _moments(frames, edges, train)
    numbers = [np.array([place[t] for t in take.tokens] or [0]) for take in takes]
    speaker = np.array([speakers.index(take.speaker) for take in takes])
    facts: dict[str, Any] = {
        "data": config.data,
        "convention": name,
        "mels": CONVENTIONS[name].mels,
        "tokens": tokens,
        "speakers": speakers,
        "texts": texts,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "digest": digest,
        "count": len(takes),
    }
    summary = f"{len(takes)} utterances of {len(texts) or 'any'} words by {len(speakers)} speakers"
    if len(tokens) == 1:  # nothing is known of what is said
        lasts = [np.array([length]) for length in lengths]
        facts["frames"] = np.quantile(np.array(lengths)[train], np.linspace(0, 1, 101)).tolist()
        summary = f"{len(takes)} pieces of sound by {len(speakers)} speakers, without text"
    elif takes[0].durations is None:
        y = [torch.from_numpy(number) for number in numbers]
        found = alignment.align(_Cepstra(frames, edges, speaker), y, len(tokens))
        facts["reading"], error = _reading(y, found, speaker, train, facts, config)
        facts["reading"]["examples"] = [
            take.text for take, known in zip(takes, train, strict=True) if not known
        ][:_FEW]
        lasts = [d.numpy() for d in found]
        hours = sum(lengths) * CONVENTIONS[name].hop / CONVENTIONS[name].sample_rate_hz / 3600
        summary = (
            f"{len(takes)} utterances ({hours:.2f} h) by {len(speakers)} speakers in "
            f"{len(tokens) - 1} {facts['reading']['kind']}; durations from their text are right "
            f"to {error:.0%} of a held-out utterance"
        )
    else:
        if config.data == "formants":
            summary += f", by {_TOY}; not speech to learn from"
        lasts = [take.durations for take in takes if take.durations is not None]
    text_of = np.array([texts.index(t.text) if t.text in texts else -1 for t in takes])
    arrays = {
        "lengths": np.array(lengths),
        "tokens": np.concatenate(numbers),
        "durations": np.concatenate(lasts),
        "counts": np.array([len(number) for number in numbers]),
        "speaker": speaker,
        "text": text_of,
        "train": train,
        "mean": mean,
        "std": std,
    }
    facts["spoken"] = {} if takes[0].durations is None else _spoken(arrays)
    return arrays, {"summary": summary, "facts": facts}


def _moments(
    frames: np.ndarray, edges: np.ndarray, train: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each band over the training split."""
    total, square = np.zeros((2, frames.shape[1]))
    count = 0
    for i in np.flatnonzero(train):
        part = frames[edges[i] : edges[i + 1]].astype(np.float64)
        total, square, count = total + part.sum(0), square + (part**2).sum(0), count + len(part)
    mean = total / count
    return mean, np.sqrt((square / count - mean**2).clip(min=1e-6))


class _Cepstra(Sequence[Tensor]):
    """What is aligned: each utterance's cepstra less its speaker's mean, read when asked for."""

    def __init__(self, frames: np.ndarray, edges: np.ndarray, speaker: np.ndarray) -> None:
        self.frames, self.edges, self.speaker = frames, edges, speaker
        self.mean = {}
        for who in np.unique(speaker).tolist():
            rows = np.flatnonzero(speaker == who)[:_FEW]
            self.mean[who] = np.concatenate([self._mel(i) for i in rows]).mean(0)

    def _mel(self, i: int) -> np.ndarray:
        return self.frames[self.edges[i] : self.edges[i + 1]]

    def __len__(self) -> int:
        return len(self.speaker)

    def __getitem__(self, i: Any) -> Any:
        mel = self._mel(i) - self.mean[int(self.speaker[i])]
        return alignment.cepstra(torch.from_numpy(mel.T.copy()))


def _reading(
    tokens: Sequence[Tensor],
    lasts: Sequence[Tensor],
    speaker: np.ndarray,
    train: np.ndarray,
    facts: Mapping[str, Any],
    config: Any,
) -> tuple[dict[str, Any], float]:
    """How new text is read, and the mean error of held-out sentences' lengths, as a share."""
    counts = (len(facts["tokens"]), len(facts["speakers"]))

    def part(rows: np.ndarray) -> tuple[list[Tensor], list[Tensor], Tensor]:
        x, d = ([values[i] for i in rows] for values in (tokens, lasts))
        return x, d, torch.from_numpy(speaker[rows])

    x, d, who = part(np.flatnonzero(train))
    predictor = durations.fit(x, d, who, counts)
    found = durations.predict(predictor, x, who)
    rate = [float((b.log() - a).mean()) for a, b in zip(found, d, strict=True)]
    x, d, who = part(np.flatnonzero(~train))
    found = durations.predict(predictor, x, who)
    totals = [float(a.exp().sum()) / int(b.sum()) for a, b in zip(found, d, strict=True)]
    reading = {
        "kind": text.kind_of(config.tokens),
        "durations": durations.to_text(predictor),
        "spread": float(np.std(rate)),
    }
    return reading, float(np.abs(np.array(totals) - 1).mean())


def _spoken(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Tokens and mean durations of each speaker's training takes of each text."""
    spoken: dict[str, Any] = {}
    counts, tokens, lasts = (arrays[key] for key in ("counts", "tokens", "durations"))
    ends = counts.cumsum()
    groups: dict[tuple[int, int], list[int]] = {}
    for i in np.flatnonzero(arrays["train"]):
        groups.setdefault((int(arrays["speaker"][i]), int(arrays["text"][i])), []).append(int(i))
    for (speaker, said), members in sorted(groups.items()):
        spans = [slice(ends[i] - counts[i], ends[i]) for i in members]
        first = tokens[spans[0]].tolist()
        same = [s for s in spans if tokens[s].tolist() == first]
        logs = np.log(np.stack([lasts[s] for s in same]))
        spoken[f"{speaker} {said}"] = {
            "tokens": first,
            "log_frames": logs.mean(0).tolist(),
            "spread": float(logs.mean(1).std()),
        }
    return spoken


class Utterances(Dataset[Item]):
    """A split of the prepared corpus."""

    def __init__(self, folder: Path, split: str) -> None:
        self.frames = Mapped(folder / ROWS)
        with np.load(folder / INDEX, allow_pickle=False) as index:
            self.index = {name: index[name] for name in index.files if name != "report"}
        self.rows = np.flatnonzero(self.index["train"] == (split == "train"))
        self.ends, self.stops = self.index["lengths"].cumsum(), self.index["counts"].cumsum()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        i = self.rows[key[0]]
        index = self.index
        frames = self.frames[self.ends[i] - index["lengths"][i] : self.ends[i]]
        mel = torch.from_numpy(
            ((frames - index["mean"]) / index["std"]).T.astype(np.float32).copy()
        )
        span = slice(self.stops[i] - index["counts"][i], self.stops[i])
        tokens, lasts = (torch.from_numpy(index[k][span].copy()) for k in ("tokens", "durations"))
        return Item(mel, tokens, lasts, int(index["speaker"][i]), int(index["text"][i]))


def dataset(config: Any, facts: Mapping[str, Any], split: str) -> Utterances:
    """A split of the prepared corpus.

    Raises:
        DataError: It was prepared elsewhere, and the cache is gone.
    """
    folder = _folder(facts["digest"])
    if not folder.exists():
        prepare(settled(config, facts))
    if not folder.exists():
        raise DataError(f"data: {folder} is missing and the corpus has changed. Train a new run.")
    return Utterances(folder, split)


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
    logs = torch.tensor(entry["log_frames"], dtype=torch.float64)
    return torch.tensor(entry["tokens"]), _lasting(logs, entry["spread"], seed, sample, speed)


def _lasting(logs: Tensor, spread: float, seed: int, sample: int, speed: float) -> Tensor:
    """Frames (L,), at least 1, all longer or shorter by one draw of (seed, sample)."""
    generator = torch.Generator().manual_seed(derive_seed("rate", seed, sample))
    draw = torch.randn((), generator=generator, dtype=torch.float64)
    return ((logs.double() + spread * draw).exp() / speed).round().long().clamp(min=1)


def read_aloud(
    facts: Mapping[str, Any], speaker: int, said: str, seed: int, sample: int, speed: float
) -> tuple[Tensor, Tensor]:
    """Tokens and durations, (L,) int64 each, of any text as this speaker would say it.

    Durations are predicted from the text, then drawn and divided as in :func:`spoken`.

    Raises:
        ConfigError: The text has something that cannot be read.
        DataError: It is read as phonemes, and eSpeak NG is not installed.
    """
    reading = facts["reading"]
    try:
        tokens = torch.tensor(text.numbers(said, reading["kind"], facts["tokens"]))
    except text.Unreadable as error:
        raise ConfigError(f"text: {said!r} {error}") from None
    counts = (len(facts["tokens"]), len(facts["speakers"]))
    predictor = durations.from_text(reading["durations"], counts)
    (logs,) = durations.predict(predictor, [tokens], torch.tensor([speaker]))
    return tokens, _lasting(logs, reading["spread"], seed, sample, speed)


def sounding(facts: Mapping[str, Any], seed: int, sample: int, seconds: float | None) -> Tensor:
    """The one duration (1,) of sound without text: the training pieces' own, or so long."""
    if seconds is None:
        generator = torch.Generator().manual_seed(derive_seed("length", seed, sample))
        frames = facts["frames"][int(torch.randint(len(facts["frames"]), (), generator=generator))]
    else:
        frames = seconds * convention(facts).sample_rate_hz / convention(facts).hop
    return torch.tensor([max(1, round(frames))])
