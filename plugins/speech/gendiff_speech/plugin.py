"""The speech modality, as the engine sees it. Imports no torch until a method is called."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from gendiff import hookimpl
from gendiff.errors import ConfigError
from gendiff.modality import (
    Condition,
    DataReport,
    Exhibit,
    Features,
    Given,
    Measure,
    Modality,
    Picture,
    Request,
    Section,
    Sound,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from gendiff.spaces import Batch, Cond, Space

Positive = Annotated[int, Field(gt=0, le=1 << 20)]
Depth = Annotated[int, Field(gt=0, le=1000)]  # layers, each of which is built


class SpeechConfig(Section):
    """The section ``speech`` of a configuration: the data, then the network."""

    data: Literal[
        "auto",
        "espeak",
        "formants",
        "fsdd",
        "ljspeech",
        "vctk",
        "libritts",
        "speechcommands",
        "folder",
    ] = Field(
        "auto",
        description="corpus or layout; auto is espeak, spoken on first use, or formants (buzzing "
        "digits, to try the code with) where eSpeak NG is not installed",
    )
    path: str | None = Field(None, description="folder of the recordings; FSDD's may be a zip")
    convention: Literal["auto", "8khz", "16khz", "22khz", "24khz"] = Field(
        "auto", description="of the mels, to whose sample rate all sound is brought"
    )
    tokens: Literal["auto", "characters", "phonemes"] = Field(
        "auto", description="of sentences; auto is phonemes where eSpeak NG is installed"
    )
    max_seconds: float = Field(
        15.0, gt=0, le=600, description="longer sentences are left out, sound without text is cut"
    )
    network: Literal["residual", "diff_tts"] = Field(
        "residual", description="residual blocks with attention, or Diff-TTS's gated ones"
    )
    channels: Positive = Field(160, description="width of the network")
    blocks: Depth = Field(8, description="how many blocks")
    dilations: tuple[Positive, ...] = Field(
        (1, 2, 4, 8),
        min_length=1,
        description="of the blocks' convolutions, gone round; attention comes after each round",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="in each block")
    vocoder: str = Field(
        "griffin_lim", description="or a vocoder run, or HiFi-GAN's or Vocos' weights: a path"
    )


class SpeechModality(Modality):
    """Log mel-spectrograms of spoken words, of any length, with tokens and speakers."""

    name: ClassVar[str] = "speech"
    summary: ClassVar[str] = "spoken words as mel-spectrograms, with text and speakers"
    Config: ClassVar[type[Section]] = SpeechConfig
    output_keys: ClassVar[frozenset[str]] = frozenset({"vocoder"})
    # For spoken digits, on one core; configs/speech/digits.yaml is the same recipe as a file.
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,
        "diffusion": {
            "data_std": 1.0,
            "times": {"name": "log_normal", "mean": -0.4, "std": 1.2},
        },
        "train": {
            "steps": 6000,
            "batch_size": 8,
            "lr": 1e-3,
            "lr_decay": "cosine",
            "ema_half_life_steps": 400,
            "ema_warmup": 0.1,
            "sample_every_steps": 1500,
            "checkpoint_every_steps": 1500,
        },
        "sample": {"guidance": 1.5, "preview": 20},
    }
    headline: ClassVar[tuple[str, ...]] = ("frechet_distance", "label_accuracy")

    def prepare(self, config: SpeechConfig) -> DataReport:
        """See :meth:`gendiff.Modality.prepare`.

        Raises:
            DataError: The corpus is missing or damaged, or there is no synthesiser.
            ConfigError, CheckpointError: The vocoder cannot be used.
        """
        from gendiff_speech import data

        report = data.prepare(config)
        self.check_output(config, report.facts)
        return report

    def settled(self, config: SpeechConfig, facts: Mapping[str, Any]) -> SpeechConfig:
        """``data`` and ``tokens`` that were ``auto`` are what they were then."""
        from gendiff_speech import data

        section: SpeechConfig = data.settled(config, facts)
        return section

    def dataset(self, config: SpeechConfig, facts: Mapping[str, Any], split: str) -> Dataset[Any]:
        """See :meth:`gendiff.Modality.dataset`. An item is :class:`gendiff_speech.data.Item`."""
        from gendiff_speech import data

        return data.dataset(config, facts, split)

    def collate(
        self, config: SpeechConfig, facts: Mapping[str, Any], items: Sequence[Any]
    ) -> Batch:
        """Pads mels to x (B, mels, T), and tokens and durations with zeros to (B, L)."""
        import torch

        from gendiff.spaces import Batch, Masked

        lengths = torch.tensor([item.mel.shape[1] for item in items])
        space = Masked(lengths, facts["mels"], int(lengths.max()))
        x = torch.zeros(space.shape)
        for row, item in enumerate(items):
            x[row, :, : item.mel.shape[1]] = item.mel
        cond = _cond(
            [item.tokens for item in items],
            [item.durations for item in items],
            [item.speaker for item in items],
            [item.text for item in items],
        )
        return Batch(x, space, cond)

    def backbone(self, config: SpeechConfig, facts: Mapping[str, Any]) -> nn.Module:
        """The network, see :mod:`gendiff_speech.network`."""
        from gendiff_speech.network import DiffTTS, MelNet

        return {"residual": MelNet, "diff_tts": DiffTTS}[config.network](
            mels=facts["mels"],
            tokens=len(facts["tokens"]),
            speakers=len(facts["speakers"]),
            channels=config.channels,
            blocks=config.blocks,
            dilations=config.dilations,
            dropout=config.dropout,
        )

    def templates(
        self, config: SpeechConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        """``text`` and ``speaker``: one, or a list that the ids go round; ``speed``: a number.

        Without them, sample i says text i modulo their number, and the speakers change when all
        texts were said. A speaker is a name or a number; a text is one of the corpus's words, or
        any text if the corpus is of sentences, whose held-out ones are said without it. Where
        nothing is known of what is said, there is ``seconds`` in place of ``text`` and ``speed``.

        Raises:
            ConfigError: No such condition, text or speaker, or a text that cannot be read.
            DataError: Phonemes are needed, and eSpeak NG is not installed.
        """
        import torch

        from gendiff.spaces import Masked
        from gendiff_speech import data

        values = request.values
        known = [condition.name for condition in self.conditions(config, facts)]
        for key in values:
            if key not in known:
                raise ConfigError(f"cond: unknown condition {key!r}. Known: {', '.join(known)}.")
        speed = _positive(values, "speed", ". 1 is the data's speed.") or 1.0
        seconds = _positive(values, "seconds", " of sound.")
        texts = _texts(values.get("text"), facts)
        speakers = _asked(values.get("speaker"), facts["speakers"], "speaker")
        said = [texts[i % len(texts)] for i in request.ids]
        turn = len(texts) if "text" not in values else 1
        speaker = [speakers[i // turn % len(speakers)] for i in request.ids]
        made = []
        for who, (word, sentence), i in zip(speaker, said, request.ids, strict=True):
            if "frames" in facts:
                lasts = data.sounding(facts, request.seed, i, seconds)
                made.append((torch.zeros(1, dtype=torch.int64), lasts))
            elif "reading" in facts:
                made.append(data.read_aloud(facts, who, sentence, request.seed, i, speed))
            else:
                made.append(data.spoken(facts, who, word, request.seed, i, speed))
        text = [word for word, _ in said]
        tokens, durations = [t for t, _ in made], [d for _, d in made]
        lengths = torch.stack([d.sum() for d in durations])
        space = Masked(lengths, facts["mels"], int(lengths.max()))
        return space, _cond(tokens, durations, speaker, text)

    def conditions(self, config: SpeechConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        """Those of :meth:`templates`."""
        speaker = Condition("speaker", "who speaks", facts["speakers"], closed=True)
        if "frames" in facts:
            return (speaker, Condition("seconds", "length of the sound, s", (1.0,)))
        speed = Condition("speed", "1 is the data's", (1.0,))
        if "reading" in facts:
            said = facts["texts"] or facts["reading"]["examples"]
            return (Condition("text", "what is said", said[:4]), speaker, speed)
        return (Condition("text", "what is said", facts["texts"], closed=True), speaker, speed)

    def given(
        self,
        config: SpeechConfig,
        facts: Mapping[str, Any],
        path: Path,
        keep: str | None,
        request: Request,
    ) -> Given:
        """A recording, whose tokens last as long as it does.

        ``keep`` is spans of seconds: ``0-0.25,0.4-``. What it says and who speaks are ``text``
        and ``speaker`` where they are asked for, as for voice conversion, and otherwise the
        recording's own; see :func:`gendiff_speech.editing.labels`.
        """
        import torch

        from gendiff.runs import cache_folder
        from gendiff.spaces import Batch, Cond, Masked
        from gendiff_speech import data, editing

        values = dict(request.values)
        if "speed" in values:
            raise ConfigError("speed: an edited recording keeps its length. Leave speed out.")
        if "reading" in facts and not facts["texts"] and "text" not in values:
            raise ConfigError(f"text: what does {path.name} say? Add --cond text='\"…\"'.")
        wave, mel = editing.recording(facts, path)
        if not {"text", "speaker"} <= values.keys():
            values = editing.labels(config, facts, path, mel, cache_folder()) | values
        count, frames = len(request.ids), mel.shape[1]
        template = self.templates(config, facts, Request(request.ids, request.seed, values))[1]
        assert template is not None
        durations = editing.fitted(template["durations"], frames)
        cond = Cond({**template.values, "durations": durations})
        space = Masked(torch.full((count,), frames), facts["mels"], frames)
        batch = Batch(mel.expand(space.shape), space, cond)
        if keep is None:
            return Given(batch)
        kept = editing.kept_frames(keep, frames, data.convention(facts))
        # For write(): the recording's own samples and frames, where they are kept.
        cond.values["source"] = wave.expand(count, -1)
        cond.values["kept"] = kept.expand(count, -1)
        return Given(batch, kept.expand(space.shape))

    def check_output(self, config: SpeechConfig, facts: Mapping[str, Any]) -> None:
        """Opens the vocoder.

        Raises:
            ConfigError, CheckpointError: It cannot be used; see
                :func:`gendiff_speech.vocoders.open_vocoder`.
        """
        from gendiff_speech import data, vocoders

        vocoders.open_vocoder(config.vocoder, data.convention(facts))

    def write(
        self,
        config: SpeechConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """A WAV by the vocoder (``00017.wav``) of each sample and its log mel (``00017.npy``).

        Where a part of a recording was kept, the log mel there is the recording's to the bit, and
        the WAV holds its samples; see :func:`gendiff_speech.editing.with_source`.
        """
        import numpy as np
        import torch

        from gendiff_speech import audio, data, editing, vocoders
        from gendiff_speech.mel import log_mel

        convention = data.convention(facts)
        vocoder = vocoders.open_vocoder(config.vocoder, convention)
        values = {} if batch.cond is None else batch.cond.values
        paths = []
        for row, (sample, mel) in enumerate(zip(ids, _mels(facts, batch), strict=True)):
            path = folder / f"{sample:05d}.wav"
            wave = vocoder(mel)
            if "kept" in values:
                kept, source = values["kept"][row].cpu(), values["source"][row].cpu()
                mel = torch.where(kept, log_mel(source, convention), mel)
                wave = editing.with_source(wave, source, kept, convention)
            paths.append(audio.write_wav(path, wave, convention.sample_rate_hz))
            np.save(path.with_suffix(".npy"), mel.numpy())
        return paths

    def preview(
        self, config: SpeechConfig, facts: Mapping[str, Any], batch: Batch, path: Path
    ) -> Path:
        """Mel-spectrograms with what they say, and who."""
        from gendiff_speech import data, pictures

        titles = [f"{text} ({speaker})" for text, speaker in _said(facts, batch)]
        return pictures.grid(_mels(facts, batch), titles, data.convention(facts), path)

    def exhibits(
        self, config: SpeechConfig, facts: Mapping[str, Any], batch: Batch, ids: Sequence[int]
    ) -> list[Exhibit]:
        """The mel-spectrogram, its sound by the vocoder, and what is said by whom."""
        import numpy as np

        from gendiff_speech import audio, data, pictures, vocoders

        convention = data.convention(facts)
        vocoder = vocoders.open_vocoder(config.vocoder, convention)
        rate = convention.sample_rate_hz
        mean, std = np.array(facts["mean"]), np.array(facts["std"])
        low, high = float((mean - 2.5 * std).min()), float((mean + 2.5 * std).max())
        shown = []
        for mel, (text, speaker) in zip(_mels(facts, batch), _said(facts, batch), strict=True):
            picture = Picture(pictures.png(mel, low, high))
            sound = Sound(audio.wav(vocoder(mel), rate))
            seconds = f"{mel.shape[1] * convention.hop / rate:.2f} s"
            shown.append(Exhibit((picture, sound), text, (speaker, seconds)))
        return shown

    def metrics(
        self,
        config: SpeechConfig,
        facts: Mapping[str, Any],
        samples: Batch,
        cache: Path,
        seed: int,
    ) -> Iterable[Measure]:
        """See :mod:`gendiff_speech.metrics`."""
        from gendiff_speech import metrics

        return metrics.measure(facts, config, samples, cache, seed)

    def features(
        self,
        config: SpeechConfig,
        facts: Mapping[str, Any],
        batches: Iterable[Batch],
        cache: Path,
        seed: int,
    ) -> Features:
        """Those of a recogniser, see :func:`gendiff_speech.metrics.features`."""
        from gendiff_speech import metrics

        return metrics.features(facts, config, batches, cache, seed)

    def reference(self, config: SpeechConfig, facts: Mapping[str, Any]) -> Sequence[int]:
        """The half of the held-out recordings from which the recogniser did not learn."""
        from gendiff_speech import metrics

        return metrics.reference_numbers(facts, config)

    def together(self, config: SpeechConfig, facts: Mapping[str, Any]) -> int:
        """4 words or 1 sentence: a sentence is work enough, and who types one waits for one."""
        return 4 if facts["texts"] else 1

    def sample_count(self, facts: Mapping[str, Any]) -> int:
        """500: every word by every speaker several times."""
        return 500


def _cond(
    tokens: Sequence[Tensor],
    durations: Sequence[Tensor],
    speaker: Sequence[int],
    text: Sequence[int],
) -> Cond:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from gendiff.spaces import Cond

    return Cond(
        {
            "tokens": pad_sequence(list(tokens), batch_first=True),
            "durations": pad_sequence(list(durations), batch_first=True),
            "speaker": torch.tensor(speaker),
            "text": torch.tensor(text),
        }
    )


def _mels(facts: Mapping[str, Any], batch: Batch) -> list[Tensor]:
    """Each sample's log mel (mels, T), with the data's mean and scale, without padding."""
    import torch

    mean, std = (torch.tensor(facts[key])[:, None] for key in ("mean", "std"))
    space: Any = batch.space
    x = batch.x.float().cpu()
    return [
        mel[:, :length] * std + mean for mel, length in zip(x, space.lengths.tolist(), strict=True)
    ]


def _said(facts: Mapping[str, Any], batch: Batch) -> list[tuple[str, str]]:
    """Each sample's text and speaker."""
    assert batch.cond is not None
    told = (batch.cond[name].tolist() for name in ("text", "tokens", "speaker"))
    return [
        (_title(facts, text, tokens), facts["speakers"][speaker])
        for text, tokens, speaker in zip(*told, strict=True)
    ]


def _title(facts: Mapping[str, Any], text: int, tokens: Sequence[int]) -> str:
    """The text, or the tokens where it is none of the corpus's words."""
    if text >= 0:
        return str(facts["texts"][text])
    said = "".join(facts["tokens"][token] for token in tokens).strip("_")
    return said if len(said) <= 32 else said[:31] + "…"


def _positive(values: Mapping[str, Any], key: str, meaning: str) -> float | None:
    value = values.get(key)
    if value is None and key not in values:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{key}: {value!r} is not a number above 0{meaning}")
    return float(value)


def _texts(wanted: Any, facts: Mapping[str, Any]) -> list[tuple[int, str]]:
    """What is to be said, as a number of the corpus's words, or -1, and as text."""
    words = facts["texts"]
    if "frames" in facts:
        return [(-1, "")]
    if "reading" not in facts:
        return [(number, words[number]) for number in _asked(wanted, words, "text")]
    if wanted is None:
        wanted = words or facts["reading"]["examples"]
    entries = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    if not entries:
        raise ConfigError("text: an empty list. Give at least one.")
    for entry in entries:
        if not isinstance(entry, str):
            raise ConfigError(f"text: {entry!r} is no text. Put it in quotes: text='\"…\"'.")
    return [(words.index(e) if e in words else -1, e) for e in entries]


def _asked(wanted: Any, names: Sequence[str], key: str) -> list[int]:
    """Numbers of what is asked for, by name or number; all if nothing is."""
    if wanted is None:
        return list(range(len(names)))
    entries = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    if not entries:
        raise ConfigError(f"{key}: an empty list. Give at least one.")
    numbers = []
    for entry in entries:
        word = str(entry).strip()
        if word in names:
            numbers.append(names.index(word))
        elif word.isdecimal() and not isinstance(entry, bool) and int(word) < len(names):
            numbers.append(int(word))
        else:
            near = difflib.get_close_matches(word, names, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            shown = ", ".join(names[:12]) + (", …" if len(names) > 12 else "")
            raise ConfigError(f"{key}: {entry!r} is unknown.{hint} Known: {shown}.")
    return numbers


@hookimpl
def gendiff_modality() -> Modality:
    """Hands the modality to the engine."""
    return SpeechModality()
