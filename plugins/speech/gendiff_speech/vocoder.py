"""The vocoder modality: waves of recorded sound, given their log mels. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from gendiff import hookimpl
from gendiff.errors import ConfigError
from gendiff.modality import Condition, DataReport, Measure, Modality, Request, Section

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from gendiff.generate import Model
    from gendiff.spaces import Batch, Cond, Space

Positive = Annotated[int, Field(gt=0, le=1 << 20)]
Depth = Annotated[int, Field(gt=0, le=1000)]  # layers, each of which is built


class VocoderConfig(Section):
    """The section ``vocoder``: the recordings, then the network."""

    path: str | None = Field(None, description="folder or zip of recordings")
    convention: Literal["8khz", "16khz", "22khz", "24khz", "vocos24khz"] = Field(
        "22khz", description="of the mels; files of other rates are resampled"
    )
    held_out: str | None = Field(
        None, description="regular expression of held-out files' names; else every 20th"
    )
    frames: int = Field(32, ge=16, le=1 << 16, description="length of a training item in frames")

    @field_validator("held_out")
    @classmethod
    def _is_an_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from None
        return value

    dim: Positive = Field(192, description="width of the network")
    hidden: Positive = Field(576, description="width inside its blocks")
    layers: Depth = Field(6, description="ConvNeXt blocks")


class VocoderModality(Modality):
    """Waves as frames of ``hop`` samples, given their mels.

    The diffusion is of one step, from pure noise: a regression by the distance of spectrograms,
    trained by the engine's trainer as any run is. Networks that also saw noisy waves were worse
    after equal training, with one call and with more.
    """

    name: ClassVar[str] = "vocoder"
    summary: ClassVar[str] = "sound from mel-spectrograms, learned from any recordings"
    Config: ClassVar[type[Section]] = VocoderConfig
    defaults: ClassVar[Mapping[str, Any]] = {
        "threads": 1,
        "diffusion": {
            "schedule": "flow",
            "prediction": "x",
            "data_std": 1.0,
            # One noise level, without signal: the squared error weighs nothing there.
            "times": {"name": "uniform", "steps": 1},
            "weight": "eps",
            "cond_dropout": 0.0,
        },
        "train": {
            "steps": 1000,
            "batch_size": 16,
            "lr": 3e-3,
            "lr_decay": "cosine",
            "betas": [0.8, 0.99],
            "ema_half_life_steps": 50,
            "sample_every_steps": 500,
            "checkpoint_every_steps": 500,
        },
        "sample": {"sampler": "ddim", "grid": "flow", "steps": 1, "preview": 5},
    }

    def prepare(self, config: VocoderConfig) -> DataReport:
        """See :meth:`gendiff.Modality.prepare`.

        Raises:
            DataError: There are no recordings, or some cannot be read.
        """
        from gendiff_speech import waves

        return waves.prepare(config)

    def dataset(self, config: VocoderConfig, facts: Mapping[str, Any], split: str) -> Dataset[Any]:
        """See :meth:`gendiff.Modality.dataset`. An item is :class:`waves.Stretch`."""
        from gendiff_speech import waves

        return waves.Waves(facts, split, config.frames)

    def collate(
        self, config: VocoderConfig, facts: Mapping[str, Any], items: Sequence[Any]
    ) -> Batch:
        """Frames of waves x (B, hop, T), in units of the data's scale, and mels (B, T, mels)."""
        import torch

        from gendiff.spaces import Batch

        space, cond = _given([item.mel for item in items], facts)
        x = torch.stack([item.wave for item in items])
        return Batch(x.reshape(len(x), config.frames, -1).transpose(1, 2), space, cond)

    def backbone(self, config: VocoderConfig, facts: Mapping[str, Any]) -> nn.Module:
        """The network, see :mod:`gendiff_speech.vocos`."""
        from gendiff_speech.mel import CONVENTIONS
        from gendiff_speech.vocos import OneStepVocos

        return OneStepVocos(
            CONVENTIONS[facts["convention"]],
            facts["mean"],
            facts["std"],
            facts["scale"],
            config.dim,
            config.hidden,
            config.layers,
        )

    def distance(
        self, config: VocoderConfig, facts: Mapping[str, Any]
    ) -> Callable[[Tensor, Batch], Tensor]:
        """Of spectrograms, see :mod:`gendiff_speech.spectral`."""
        from gendiff_speech.mel import CONVENTIONS
        from gendiff_speech.spectral import spectral_distance

        convention = CONVENTIONS[facts["convention"]]

        def distance(x_hat: Tensor, batch: Batch) -> Tensor:
            wave_hat, wave = (v.float().transpose(1, 2).flatten(1) for v in (x_hat, batch.x))
            return spectral_distance(wave_hat, wave, convention, facts["scale"])

        return distance

    def templates(
        self, config: VocoderConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        """``mel``: a log mel (.npy, bands by frames) or a recording, or a list of such files.

        Sample i is of the i-th, going round; without any, of the i-th held-out recording.

        Raises:
            ConfigError: Another condition, or a file that is no mel of the run's convention.
            DataError: A recording cannot be read, or the prepared ones are gone.
        """
        from gendiff_speech import waves
        from gendiff_speech.mel import log_mel

        for key in request.values:
            if key != "mel":
                raise ConfigError(f"cond: unknown condition {key!r}. Known: mel.")
        wanted = request.values.get("mel")
        if wanted is None:
            data = waves.Waves(facts, "test", config.frames)
            convention = data.convention
            mels = [log_mel(data.whole(i % len(data)), convention) for i in request.ids]
        else:
            files = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
            if not files:
                raise ConfigError("mel: an empty list. Give at least one file.")
            given = [waves.mel_of_file(facts, str(file)) for file in files]
            mels = [given[i % len(given)] for i in request.ids]
        return _given([waves.normalised(facts, mel) for mel in mels], facts)

    def conditions(self, config: VocoderConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        """``mel``, as :meth:`templates` says."""
        return (Condition("mel", "file of a log mel (.npy) or of a recording"),)

    def write(
        self,
        config: VocoderConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        """A WAV (``00017.wav``) of each sample."""
        from gendiff_speech import audio
        from gendiff_speech.mel import CONVENTIONS

        rate = CONVENTIONS[facts["convention"]].sample_rate_hz
        return [
            audio.write_wav(folder / f"{sample:05d}.wav", wave, rate)
            for sample, wave in zip(ids, _waves(batch, facts), strict=True)
        ]

    def preview(
        self, config: VocoderConfig, facts: Mapping[str, Any], batch: Batch, path: Path
    ) -> Path:
        """The mels that were given, each above that of the wave that was made of it."""
        from gendiff_speech import pictures
        from gendiff_speech.mel import CONVENTIONS, log_mel

        convention = CONVENTIONS[facts["convention"]]
        columns = min(5, batch.space.batch_size)
        given = _mels(batch, facts)[:columns]
        made = [log_mel(wave, convention) for wave in _waves(batch, facts)[:columns]]
        titles = [f"{i} {what}" for what in ("given", "made") for i in range(columns)]
        return pictures.grid([*given, *made], titles, convention, path, columns)

    def metrics(
        self,
        config: VocoderConfig,
        facts: Mapping[str, Any],
        samples: Batch,
        cache: Path,
        seed: int,
    ) -> list[Measure]:
        """How far the made waves' mels are from the given ones, beside Griffin-Lim's."""
        from gendiff_speech.mel import CONVENTIONS, griffin_lim, log_mel, log_spectral_distance

        convention = CONVENTIONS[facts["convention"]]
        mels = _mels(samples, facts)

        def distance(waves: Sequence[Tensor]) -> float:
            pairs = zip(waves, mels, strict=True)
            found = [log_spectral_distance(log_mel(w, convention), mel) for w, mel in pairs]
            return sum(map(float, found)) / len(found)

        note = f"RMS over bands in dB, mean over frames and {len(mels)} recordings"
        return [
            Measure("mel_distance_db", distance(_waves(samples, facts)), "lower", None, note),
            Measure(
                "griffin_lim_mel_distance_db",
                distance([griffin_lim(mel, convention) for mel in mels]),
                "lower",
                None,
                "the same by 60 iterations of Griffin-Lim: what there is without this run",
            ),
        ]

    def together(self, config: VocoderConfig, facts: Mapping[str, Any]) -> int:
        """1: a recording is work enough."""
        return 1

    def sample_count(self, facts: Mapping[str, Any]) -> int:
        """As many as one batch on a CPU."""
        return 16


def sound(model: Model, mel: Tensor) -> Tensor:
    """The wave (T * hop,), in [-1, 1], of a log mel (mels, T), by a run's vocoder."""
    import torch

    from gendiff.spaces import Batch
    from gendiff_speech.waves import normalised

    space, cond = _given([normalised(model.run.facts, mel)], model.run.facts)
    space, cond = space.to(model.device), cond.to(model.device)
    with torch.inference_mode():
        x = model.denoiser.bind(space, cond)(torch.zeros(space.shape, device=model.device), 1.0)
    return _waves(Batch(x.clone(), space, cond), model.run.facts)[0]


def _waves(batch: Batch, facts: Mapping[str, Any]) -> list[Tensor]:
    """Each sample's wave (T * hop,), in [-1, 1], see :mod:`gendiff_speech.refine`."""
    from gendiff_speech.mel import CONVENTIONS
    from gendiff_speech.refine import refined

    convention = CONVENTIONS[facts["convention"]]
    x = batch.x.float().cpu() * facts["scale"]
    return [
        refined(frames[:, : mel.shape[1]].T.reshape(-1), mel, convention)
        for frames, mel in zip(x, _mels(batch, facts), strict=True)
    ]


def _mels(batch: Batch, facts: Mapping[str, Any]) -> list[Tensor]:
    """Each sample's log mel (mels, T), as it was given."""
    import torch

    assert batch.cond is not None
    mean, std = (torch.tensor(facts[key])[:, None] for key in ("mean", "std"))
    space: Any = batch.space
    return [
        mel[:length].T.cpu() * std + mean
        for mel, length in zip(batch.cond["mel"], space.lengths.tolist(), strict=True)
    ]


def _given(mels: Sequence[Tensor], facts: Mapping[str, Any]) -> tuple[Space, Cond]:
    """The space of waves with these normalised mels (mels, T), and the mels as condition."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from gendiff.spaces import Cond, Masked
    from gendiff_speech.mel import CONVENTIONS

    lengths = torch.tensor([mel.shape[1] for mel in mels])
    space = Masked(lengths, CONVENTIONS[facts["convention"]].hop, int(lengths.max()))
    return space, Cond({"mel": pad_sequence([mel.T for mel in mels], batch_first=True)})


@hookimpl
def gendiff_modality() -> Modality:
    """Hands the modality to the engine."""
    return VocoderModality()
