"""Sound files: read with what is wrong with them said in one line, and written."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor

from gendiff.errors import DataError

LONGEST_SECONDS = 600


def read(source: Path | bytes, name: str) -> tuple[Tensor, int]:
    """A file's wave, (T,) float32 in [-1, 1], channels averaged, and its rate in Hz.

    Args:
        source: A path, or the file's content.
        name: What to call it in messages.

    Raises:
        DataError: It cannot be decoded, holds nothing, lasts too long or is not finite.
    """
    import soundfile

    def opened() -> soundfile.SoundFile:
        return soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)

    try:
        with opened() as file:
            rate, frames = file.samplerate, file.frames
            if frames > LONGEST_SECONDS * rate:
                raise DataError(
                    f"{name}: lasts {frames / rate:.0f} s. At most {LONGEST_SECONDS} s: cut it "
                    "into utterances."
                )
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise DataError(f"{name}: cannot be decoded ({error}). Remove or replace it.") from error
    if len(samples) == 0:
        raise DataError(f"{name}: holds no sound. Remove it.")
    if len(samples) < frames:
        raise DataError(f"{name}: truncated, {len(samples)} of {frames} samples. Replace it.")
    wave = torch.from_numpy(samples).mean(1)
    if not wave.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite samples. Remove or replace it.")
    return wave, rate


def resample(wave: Tensor, rate: int, to_rate: int) -> Tensor:
    """The wave at another rate, by torchaudio's windowed sinc."""
    if rate == to_rate:
        return wave
    from torchaudio.functional import resample as windowed_sinc

    out: Tensor = windowed_sinc(wave, rate, to_rate)
    return out


def write_wav(path: Path, wave: Tensor, rate: int) -> Path:
    """16-bit PCM; a wave that passes 1 is scaled down to it, so nothing clips."""
    import soundfile

    peak = float(wave.abs().max())
    soundfile.write(path, (wave / max(1.0, peak)).cpu().numpy(), rate, subtype="PCM_16")
    return path
