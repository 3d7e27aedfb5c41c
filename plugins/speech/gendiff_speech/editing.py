"""A recording as the start of others: which of its seconds stay, what it says, and who speaks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gendiff.errors import ConfigError, DataError
from gendiff_speech import audio, data
from gendiff_speech.mel import MelConvention, log_mel

_SPAN = re.compile(r"(\d+\.?\d*|\.\d+)?-(\d+\.?\d*|\.\d+)?")


def recording(facts: Mapping[str, Any], path: Path) -> tuple[Tensor, Tensor]:
    """A sound file's wave (T * hop,), at the data's rate, and its normalised log mel (mels, T).

    Raises:
        DataError: The file cannot be read or is too short.
    """
    convention = data.convention(facts)
    if not path.is_file():
        raise DataError(f"edit: {path} is no file")
    wave = audio.resample(*audio.read(path, path.name), convention.sample_rate_hz)
    wave = wave[: len(wave) // convention.hop * convention.hop]
    try:
        mel = log_mel(wave, convention)
    except DataError as error:
        raise DataError(f"edit: {path.name} is {error}") from None
    mean, std = (torch.tensor(facts[key])[:, None] for key in ("mean", "std"))
    return wave, (mel - mean) / std


def kept_frames(keep: str, frames: int, convention: MelConvention) -> Tensor:
    """Which frames are kept, (frames,) bool: those whose middle lies in a span.

    Args:
        keep: Spans of seconds, ``0-0.25,0.4-``; an end that is left out is the recording's.
        frames: How many frames the recording has.
        convention: What a frame is.

    Raises:
        ConfigError: These are no spans, or they keep all or nothing.
    """
    middle = (torch.arange(frames) + 0.5) * convention.hop / convention.sample_rate_hz
    kept = torch.zeros(frames, dtype=torch.bool)
    for text in keep.replace(" ", "").split(","):
        span = _SPAN.fullmatch(text)
        if span is None or text == "-":
            raise ConfigError(
                f"keep: '{keep}' is not spans of seconds, as in 0-0.25,0.4- for all but the time "
                "from 0.25 s to 0.4 s"
            )
        begin, end = span.groups()
        kept |= (middle >= float(begin or 0)) & (middle < float(end or "inf"))
    if kept.all() or not kept.any():
        length = frames * convention.hop / convention.sample_rate_hz
        what = "all" if kept.all() else "none"
        raise ConfigError(f"keep: '{keep}' keeps {what} of the recording's {length:.2f} s")
    return kept


def fitted(durations: Tensor, frames: int) -> Tensor:
    """Durations (B, L) in the same proportions that add to ``frames``; zeros stay zeros.

    Raises:
        DataError: There are fewer frames than tokens.
    """
    rows = torch.zeros_like(durations)
    for row, lasts in zip(rows, durations, strict=True):
        live = lasts > 0
        count = int(live.sum())
        if count > frames:
            raise DataError(
                f"edit: the recording's {frames} frames are fewer than the text's {count} tokens"
            )
        starts = (lasts[live].cumsum(0) - lasts[live]) * frames / lasts.sum()
        row[live] = torch.from_numpy(data.frames_of(starts.tolist(), 1, frames))
    return rows


def labels(
    config: Any, facts: Mapping[str, Any], path: Path, mel: Tensor, cache: Path
) -> dict[str, int]:
    """The numbers of a recording's ``text`` and ``speaker``, as far as they can be told.

    They are read from a file name of FSDD's form (``7_theo_3.wav``); what is not there is heard
    by the recogniser of :mod:`gendiff_speech.metrics`, which is trained on first use.
    """
    found = {}
    name = re.fullmatch(r"(\d)_([a-z]+)_\d+", path.stem)
    if name is not None:
        for key, value in (("text", data.WORDS[int(name[1])]), ("speaker", name[2])):
            if value in facts[f"{key}s"]:
                found[key] = facts[f"{key}s"].index(value)
    if len(found) < 2:
        from gendiff_speech.metrics import listener
        from gendiff_speech.recogniser import hear

        network, _, _ = listener(config, facts, cache, 0)
        heard = None if network is None else hear(network, [mel])
        for key in ("text", "speaker"):
            numbers = None if heard is None else getattr(heard, key)
            if numbers is not None:
                found.setdefault(key, int(numbers[0]))
    return found


def with_source(wave: Tensor, source: Tensor, kept: Tensor, convention: MelConvention) -> Tensor:
    """A made wave with the source's own samples well inside what is kept of it.

    Frames near the end of a kept span share samples with what was made, so the source's samples
    begin (n_fft - hop) / 2 further in and are faded in over one hop.

    Args:
        wave, source: (T * hop,).
        kept: (T,) bool.
        convention: What a frame is.
    """
    hop, margin = convention.hop, (convention.n_fft - convention.hop) // 2
    made = (~kept).repeat_interleave(hop)[None].float()
    made = F.max_pool1d(made, 2 * margin + 1, 1, margin)
    weight = F.avg_pool1d(made, hop + 1, 1, hop // 2, count_include_pad=False)[0]
    return torch.where(weight > 0, weight * wave + (1 - weight) * source, source)
