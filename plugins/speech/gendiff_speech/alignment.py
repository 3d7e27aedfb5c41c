"""How many frames each token of a sentence lasts, found from the sound alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gendiff.errors import DataError

_VARIANCE_FLOOR = 0.05  # of the corpus's own variance, per mel bin
_BATCH = 64
_LEARN = 512  # sentences
_CEPSTRA = 13


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


def cepstra(mel: Tensor) -> Tensor:
    r"""The first 13 cepstra (13, T) of a log mel (N, T), the level among them.

    :math:`c_d = \sum_n x_n \cos(\pi d (n + 1/2) / N)`, d = 0 to 12 (Davis & Mermelstein, 1980,
    https://doi.org/10.1109/TASSP.1980.1163420): nearly uncorrelated, as a diagonal Gaussian wants
    it, where neighbouring bands are not.
    """
    bands = mel.shape[0]
    d = torch.arange(_CEPSTRA, dtype=torch.float64)[:, None]
    n = torch.arange(bands, dtype=torch.float64)
    return torch.cos(math.pi * d * (n + 0.5) / bands).to(mel) @ mel


def align(
    features: Sequence[Tensor], tokens: Sequence[Tensor], count: int, iterations: int = 20
) -> list[Tensor]:
    """The durations (L,), int64 frames, of each sentence's tokens.

    Hard EM: ``monotonic_alignment_search`` alternates with re-estimating one diagonal
    Gaussian per token (the prior of Popov et al. 2021, Grad-TTS, with a table of ``count``
    tokens for an encoder), from equal durations until none changes. The Gaussians are learnt
    from at most 512 sentences, evenly spaced; a large corpus is then searched once.
    ``features`` are (C, T), best ``cepstra``; they may be read as they are asked for.
    ``tokens`` are (L,) below ``count``. Tokens may repeat: a caller who knows of silence puts
    one silence token at both ends and wherever a pause may fall; it lasts at least one frame.
    Raises DataError as the search does.
    """
    if not tokens:
        return []
    chosen = range(0, len(tokens), -(-len(tokens) // _LEARN))
    x = [features[i].double() for i in chosen]
    y = [tokens[i] for i in chosen]
    durations = [_even(len(b), a.shape[1]) for a, b in zip(x, y, strict=True)]
    frames = torch.cat(x, 1).T
    floor = _VARIANCE_FLOOR * frames.var(0, correction=0) + 1e-8
    for _ in range(iterations):
        spoken = torch.cat([b.repeat_interleave(d) for b, d in zip(y, durations, strict=True)])
        n = torch.bincount(spoken, minlength=count).clamp(min=1)[:, None]
        mean = frames.new_zeros(count, len(floor)).index_add_(0, spoken, frames) / n
        apart = (frames - mean[spoken]) ** 2
        variance = (frames.new_zeros(count, len(floor)).index_add_(0, spoken, apart) / n).clamp(
            min=floor
        )
        found = _search(x, y, mean, variance)
        if all(torch.equal(a, b) for a, b in zip(found, durations, strict=True)):
            break
        durations = found
    return durations if len(y) == len(tokens) else _search(features, tokens, mean, variance)


def _even(L: int, T: int) -> Tensor:
    if not 1 <= L <= T:
        raise DataError("a sentence has no token or fewer frames than tokens: leave it out")
    return torch.diff(torch.arange(L + 1) * T // L)


def _search(
    features: Sequence[Tensor], tokens: Sequence[Tensor], mean: Tensor, variance: Tensor
) -> list[Tensor]:
    """The search, for sentences of like lengths together."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    found: dict[int, Tensor] = {}
    precision = 1 / variance
    constant = (precision * mean**2 + variance.log()).sum(1, keepdim=True)
    for at in range(0, len(order), _BATCH):
        rows = order[at : at + _BATCH]
        x = [features[i].double() for i in rows]
        L = torch.tensor([len(tokens[i]) for i in rows])
        T = torch.tensor([a.shape[1] for a in x])
        log_p = mean.new_zeros(len(rows), int(L.max()), int(T.max()))
        for b, i in enumerate(rows):
            every = precision @ x[b] ** 2 - 2 * (precision * mean) @ x[b] + constant
            log_p[b, : L[b], : T[b]] = -0.5 * every[tokens[i]]
        durations = monotonic_alignment_search(log_p, L, T)
        found |= {i: d[:n] for i, d, n in zip(rows, durations, L.tolist(), strict=True)}
    return [found[i] for i in range(len(tokens))]
