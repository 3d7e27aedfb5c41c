"""Sound files: read with what is wrong with them said in one line, and written."""

from __future__ import annotations

import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from gendiff.errors import DataError

LONGEST_SECONDS = 600
LARGEST_BYTES = 256 << 20  # of a file in a zip: 10 minutes of 48 kHz, stereo, 32 bits
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, KeyError)
DEAREST_RATES = 50_000_000  # of resampling: the product of both rates, without common factors


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
        # As bytes: libsndfile takes a name that is no text, soundfile's own encoding does not.
        return soundfile.SoundFile(
            io.BytesIO(source) if isinstance(source, bytes) else os.fsencode(source)
        )

    if isinstance(source, Path) and not source.is_file():  # a pipe would be waited for
        raise DataError(f"{name}: cannot be decoded (no file). Remove or replace it.")
    try:
        if _cut_short(source):
            raise DataError(f"{name}: truncated, its header tells of more. Replace it.")
        with opened() as file:
            rate, frames = file.samplerate, file.frames
            if frames > LONGEST_SECONDS * rate:
                raise DataError(
                    f"{name}: lasts {frames / rate:.0f} s. At most {LONGEST_SECONDS} s: cut it "
                    "into utterances."
                )
            samples = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        why = getattr(error, "error_string", str(error)).rstrip(".")  # without the path
        raise DataError(f"{name}: cannot be decoded ({why}). Remove or replace it.") from error
    if len(samples) == 0:
        raise DataError(f"{name}: holds no sound. Remove it.")
    if len(samples) < frames:
        raise DataError(f"{name}: truncated, {len(samples)} of {frames} samples. Replace it.")
    wave = torch.from_numpy(samples).mean(1)
    if not wave.isfinite().all():
        raise DataError(f"{name}: holds NaN or infinite samples. Remove or replace it.")
    return wave, rate


@contextmanager
def archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip of recordings, which is read in memory: nothing is unpacked to its names.

    Raises:
        DataError: It is damaged, encrypted or of an unknown compression, or a file of it is
            larger than any recording may be.
    """
    with _damage_told(path), zipfile.ZipFile(path) as opened:
        for member in opened.infolist():
            if member.file_size > LARGEST_BYTES:
                size = f"{member.file_size / 2**20:.0f} MiB"
                raise DataError(f"data: {path}: {member.filename} is of {size}. Remove it.")
        yield opened


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"data: {path} cannot be read: {error or 'it is cut short'}.") from error


@lru_cache(maxsize=4)
def _kept_open(path: Path, changed_ns: int) -> zipfile.ZipFile:
    """A zip that a process opens once: to read its table takes as long as many recordings."""
    return zipfile.ZipFile(path)


def content(path: Path, member: str | None) -> Path | bytes:
    """What :func:`read` takes: the file, or what a zip holds by the name ``member``.

    Raises:
        DataError: The zip is damaged.
    """
    if member is None:
        return path
    with _damage_told(path):
        return _kept_open(path, path.stat().st_mtime_ns).read(member)


def size_of(path: Path, member: str | None) -> int:
    """Bytes of what :func:`content` gives; 0 where there is none, as its reader will say."""
    try:
        if member is None:
            return path.stat().st_size
        return _kept_open(path, path.stat().st_mtime_ns).getinfo(member).file_size
    except _DAMAGE:
        return 0


def _cut_short(source: Path | bytes) -> bool:
    """Whether a WAV holds less than its header says, which libsndfile passes over."""
    if isinstance(source, bytes):
        head, size = source[:8], len(source)
    else:
        with source.open("rb") as file:
            head, size = file.read(8), source.stat().st_size
    told = int.from_bytes(head[4:], "little")
    # Both ends of the range stand for a length that was not known when writing began.
    return head[:4] == b"RIFF" and 0 < told < 2**32 - 1 and told + 8 > size + 1


def resample(wave: Tensor, rate: int, to_rate: int) -> Tensor:
    """The wave at another rate, by torchaudio's windowed sinc.

    Raises:
        DataError: The rates have so little in common that its filters would fill the memory.
    """
    if rate == to_rate:
        return wave
    if rate < 1000 or rate * to_rate // math.gcd(rate, to_rate) ** 2 > DEAREST_RATES:
        raise DataError(f"a rate of {rate} Hz cannot be brought to {to_rate}. Resample it first.")
    from torchaudio.functional import resample as windowed_sinc

    out: Tensor = windowed_sinc(wave, rate, to_rate)
    return out


def trim(wave: Tensor, rate: int, name: str) -> Tensor:
    """The wave (T,) from 50 ms before the first sound to 50 ms behind the last.

    Sound is a stretch of 10 ms within 45 dB of the loudest.

    Raises:
        DataError: There is no sound at all.
    """
    step = max(1, rate // 100)
    blocks = torch.nn.functional.pad(wave, (0, -len(wave) % step)).view(-1, step)
    power = blocks.double().square().mean(1)
    if not power.max() > 0:
        raise DataError(f"{name}: holds only silence. Remove it.")
    loud = (power > 10**-4.5 * power.max()).nonzero()[:, 0]
    return wave[max(0, int(loud[0]) - 5) * step : (int(loud[-1]) + 6) * step]


def write_wav(path: Path, wave: Tensor, rate: int) -> Path:
    """16-bit PCM; a wave that passes 1 is scaled down to it, so nothing clips."""
    path.write_bytes(wav(wave, rate))
    return path


def wav(wave: Tensor, rate: int) -> bytes:
    """The content of the file that :func:`write_wav` writes."""
    import soundfile

    peak = float(wave.abs().max())
    file = io.BytesIO()
    scaled = (wave / max(1.0, peak)).cpu().numpy()
    soundfile.write(file, scaled, rate, subtype="PCM_16", format="WAV")
    return file.getvalue()
