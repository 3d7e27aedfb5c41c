"""How many frames each token of a sentence lasts, found from the sound alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gendiff.errors import DataError

_VARIANCE_FLOOR = 0.05  # of the corpus's own variance, per mel bin
_BATCH = 64


def monotonic_alignment_search(
    log_p: Tensor, token_lengths: Tensor, frame_lengths: Tensor
) -> Tensor:
    """The durations (B, L), int64 frames, of the likeliest monotonic alignment.

    ``log_p`` (B, L, T) is each frame's log density under each token. Every token lasts at
    least one frame: Q[j, t] = max(Q[j, t-1], Q[j-1, t-1]) + log_p[j, t] (Kim et al. 2020,
    Glow-TTS, eq. 7). Padding lasts 0 frames. Raises DataError where a sentence has no token
    or fewer frames than tokens.
    """
    if bool(((token_lengths < 1) | (frame_lengths < token_lengths)).any()):
        raise DataError("a sentence has no token or fewer frames than tokens: leave it out")
    B, L, T = log_p.shape
    Q = log_p.new_full((B, L), -torch.inf)
    Q[:, 0] = log_p[:, 0, 0]
    start = log_p.new_full((B, 1), -torch.inf)
    moved = []
    for t in range(1, T):
        before = torch.cat([start, Q[:, :-1]], dim=1)
        moved.append(before > Q)
        Q = torch.maximum(Q, before) + log_p[:, :, t]
    durations = torch.zeros(B, L, dtype=torch.int64, device=log_p.device)
    j = (token_lengths.to(log_p.device).long() - 1)[:, None]
    frames = frame_lengths.to(log_p.device)[:, None]
    for t in range(T - 1, -1, -1):
        inside = (t < frames).long()
        durations.scatter_add_(1, j, inside)
        if t:
            j = j - inside * moved[t - 1].gather(1, j).long()
    return durations


def align(
    mels: Sequence[Tensor], tokens: Sequence[Tensor], count: int, iterations: int = 20
) -> list[Tensor]:
    """The durations (L,), int64 frames, of each sentence's tokens.

    Hard EM: ``monotonic_alignment_search`` alternates with re-estimating one diagonal
    Gaussian per token (the prior of Popov et al. 2021, Grad-TTS, with a table of ``count``
    tokens for an encoder), from equal durations until none changes. ``mels`` are (C, T),
    ``tokens`` (L,) below ``count``. Tokens may repeat: a caller who knows of silence puts one
    silence token at both ends and wherever a pause may fall; it lasts at least one frame.
    Raises DataError as the search does.
    """
    durations = [_even(len(y), x.shape[1]) for x, y in zip(mels, tokens, strict=True)]
    if not durations:
        return durations
    x = torch.cat([mel.T for mel in mels]).double()
    floor = _VARIANCE_FLOOR * x.var(0, correction=0) + 1e-8
    for _ in range(iterations):
        y = torch.cat(
            [torch.repeat_interleave(a, d) for a, d in zip(tokens, durations, strict=True)]
        )
        n = torch.bincount(y, minlength=count).clamp(min=1)[:, None]
        mean = x.new_zeros(count, x.shape[1]).index_add_(0, y, x) / n
        square = x.new_zeros(count, x.shape[1]).index_add_(0, y, (x - mean[y]) ** 2) / n
        variance = torch.maximum(square, floor)
        found: list[Tensor] = []
        for at in range(0, len(mels), _BATCH):
            found += _search(mels[at : at + _BATCH], tokens[at : at + _BATCH], mean, variance)
        if all(torch.equal(a, b) for a, b in zip(found, durations, strict=True)):
            break
        durations = found
    return durations


def _even(L: int, T: int) -> Tensor:
    if not 1 <= L <= T:
        raise DataError("a sentence has no token or fewer frames than tokens: leave it out")
    return torch.diff(torch.arange(L + 1) * T // L)


def _search(
    mels: Sequence[Tensor], tokens: Sequence[Tensor], mean: Tensor, variance: Tensor
) -> list[Tensor]:
    L = torch.tensor([len(y) for y in tokens])
    T = torch.tensor([x.shape[1] for x in mels])
    log_p = mean.new_zeros(len(mels), int(L.max()), int(T.max()))
    for b, (mel, y) in enumerate(zip(mels, tokens, strict=True)):
        x, precision = mel.double(), 1 / variance[y]
        quadratic = precision @ x**2 - 2 * (precision * mean[y]) @ x
        constant = (precision * mean[y] ** 2 + variance[y].log()).sum(1, keepdim=True)
        log_p[b, : len(y), : x.shape[1]] = -0.5 * (quadratic + constant)
    durations = monotonic_alignment_search(log_p, L, T)
    return [d[:n] for d, n in zip(durations, L.tolist(), strict=True)]
