"""The speech modality, as the engine sees it. Imports no torch until a method is called."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from gendiff import hookimpl
from gendiff.errors import ConfigError
from gendiff.modality import DataReport, Features, Measure, Modality, Request, Section

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from gendiff.spaces import Batch, Cond, Space

Positive = Annotated[int, Field(gt=0)]


class SpeechConfig(Section):
    """The section ``speech`` of a configuration: the data, then the network."""

    data: Literal["espeak", "fsdd"] = Field(
        "espeak", description="corpus; espeak is spoken by eSpeak NG on first use"
    )
    path: str | None = Field(None, description="folder or zip with FSDD's recordings")
    channels: Positive = Field(160, description="width of the network")
    blocks: Positive = Field(8, description="gated residual blocks")
    dilations: tuple[Positive, ...] = Field(
        (1, 2, 4, 8), min_length=1, description="of the blocks' convolutions, gone round"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="before each convolution")


class SpeechModality(Modality):
    """Log mel-spectrograms of spoken words, of any length, with tokens and speakers."""

    name: ClassVar[str] = "speech"
    summary: ClassVar[str] = "spoken words as mel-spectrograms, with text and speakers"
    Config: ClassVar[type[Section]] = SpeechConfig
    # For spoken digits, on one core; configs/speech/digits.yaml is the same recipe as a file.
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,
        "diffusion": {
            "data_std": 1.0,
            "times": {"name": "log_normal", "mean": -0.4, "std": 1.2},
        },
        "train": {
            "steps": 1200,
            "batch_size": 32,
            "lr": 2e-3,
            "lr_decay": "cosine",
            "ema_half_life_steps": 50,
            "sample_every_steps": 500,
            "checkpoint_every_steps": 500,
        },
        "sample": {"preview": 20},
    }
    headline: ClassVar[tuple[str, ...]] = ("frechet_distance", "label_accuracy")

    def prepare(self, config: SpeechConfig) -> DataReport:
        """See :meth:`gendiff.Modality.prepare`.

        Raises:
            DataError: The corpus is missing or damaged, or there is no synthesiser.
        """
        from gendiff_speech import data

        return data.prepare(config)

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
        from gendiff_speech.network import MelNet

        return MelNet(
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
        texts were said. A speaker is a name or a number.

        Raises:
            ConfigError: No such condition, text or speaker.
        """
        import torch

        from gendiff.spaces import Masked
        from gendiff_speech import data

        for key in request.values:
            if key not in ("text", "speaker", "speed"):
                raise ConfigError(f"cond: unknown condition {key!r}. Known: text, speaker, speed.")
        speed = request.values.get("speed", 1.0)
        if isinstance(speed, bool) or not isinstance(speed, (int, float)) or not speed > 0:
            raise ConfigError(f"speed: {speed!r} is not a number above 0. 1 is the data's speed.")
        texts = _asked(request.values.get("text"), facts["texts"], "text")
        speakers = _asked(request.values.get("speaker"), facts["speakers"], "speaker")
        text = [texts[i % len(texts)] for i in request.ids]
        turn = len(texts) if "text" not in request.values else 1
        speaker = [speakers[i // turn % len(speakers)] for i in request.ids]
        made = [
            data.spoken(facts, s, w, request.seed, i, speed)
            for s, w, i in zip(speaker, text, request.ids, strict=True)
        ]
        tokens, durations = [t for t, _ in made], [d for _, d in made]
        lengths = torch.stack([d.sum() for d in durations])
        space = Masked(lengths, facts["mels"], int(lengths.max()))
        return space, _cond(tokens, durations, speaker, text)

    def write(
        self,
        config: SpeechConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """A WAV by Griffin-Lim (``00017.wav``) of each sample and its log mel (``00017.npy``)."""
        import numpy as np

        from gendiff_speech import audio, data
        from gendiff_speech.mel import griffin_lim

        convention = data.convention(facts)
        paths = []
        for sample, mel in zip(ids, _mels(facts, batch), strict=True):
            path = folder / f"{sample:05d}.wav"
            wave = griffin_lim(mel, convention)
            paths.append(audio.write_wav(path, wave, convention.sample_rate_hz))
            np.save(path.with_suffix(".npy"), mel.numpy())
        return paths

    def preview(
        self, config: SpeechConfig, facts: Mapping[str, Any], batch: Batch, path: Path
    ) -> Path:
        """Mel-spectrograms with what they say, and who."""
        from gendiff_speech import data, pictures

        assert batch.cond is not None
        titles = [
            f"{facts['texts'][text]} ({facts['speakers'][speaker]})"
            for text, speaker in zip(
                batch.cond["text"].tolist(), batch.cond["speaker"].tolist(), strict=True
            )
        ]
        return pictures.grid(_mels(facts, batch), titles, data.convention(facts), path)

    def metrics(
        self,
        config: SpeechConfig,
        facts: Mapping[str, Any],
        samples: Batch,
        cache: Path,
        seed: int,
    ) -> list[Measure]:
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
