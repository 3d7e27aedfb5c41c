"""How long each token of a text is spoken, where no recording says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gendiff.errors import DataError
from gendiff.noise import derive_seed


def fit(tokens: Sequence[Sequence[str]], durations: Sequence[Tensor]) -> dict[str, list[float]]:
    """The mean and standard deviation of each token's log frames, ready for JSON.

    ``durations`` are (L,) int64 frames, at least 1, beside each sentence's L ``tokens``.
    """
    logs: dict[str, list[float]] = {}
    for sentence, lasts in zip(tokens, durations, strict=True):
        for token, log in zip(sentence, lasts.double().log().tolist(), strict=True):
            logs.setdefault(token, []).append(log)
    values = {token: torch.tensor(logs[token], dtype=torch.float64) for token in sorted(logs)}
    return {t: [float(v.mean()), float(v.std(correction=0))] for t, v in values.items()}


def predict(
    facts: Mapping[str, Any],
    tokens: Sequence[str],
    seed: int,
    sample: int | str,
    speed: float = 1.0,
) -> Tensor:
    """Log-normal durations (L,), int64 frames of at least 1, divided by ``speed``.

    One draw per token from ``facts["durations"]``, the same for the same ``seed`` and
    ``sample``. Raises DataError for a token that was never heard or a speed not above 0.
    """
    table = facts["durations"]
    unknown = sorted(set(tokens) - set(table))
    if unknown:
        raise DataError(f"no recording has the token {unknown[0]!r}: leave it out of the text")
    if not speed > 0:
        raise DataError(f"speed must be above 0, not {speed}")
    generator = torch.Generator().manual_seed(derive_seed("durations", seed, sample))
    z = torch.randn(len(tokens), generator=generator, dtype=torch.float64)
    mean, std = torch.tensor([table[t] for t in tokens], dtype=torch.float64).view(-1, 2).T
    return ((mean + std * z).exp() / speed).round().long().clamp(min=1)
