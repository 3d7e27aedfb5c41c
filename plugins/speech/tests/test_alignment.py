"""The alignment is the best of all, and finds segments that are known."""

from itertools import combinations

import pytest
import torch

from gendiff.errors import DataError
from gendiff_speech.alignment import align, monotonic_alignment_search


def test_the_search_finds_the_best_of_all_alignments() -> None:
    generator = torch.Generator().manual_seed(0)
    L, T = torch.tensor([1, 3, 4, 5, 2]), torch.tensor([4, 7, 4, 9, 9])
    log_p = torch.randn(5, 5, 9, generator=generator, dtype=torch.float64)
    found = monotonic_alignment_search(log_p, L, T)
    for b, (tokens, frames) in enumerate(zip(L.tolist(), T.tolist(), strict=True)):
        best, durations = -torch.inf, None
        for cuts in combinations(range(1, frames), tokens - 1):
            d = torch.diff(torch.tensor([0, *cuts, frames]))
            path = torch.repeat_interleave(torch.arange(tokens), d)
            score = float(log_p[b, path, torch.arange(frames)].sum())
            if score > best:
                best, durations = score, d
        assert durations is not None
        assert found[b, :tokens].tolist() == durations.tolist()
        assert not found[b, tokens:].any()


def test_known_segments_are_recovered() -> None:
    generator = torch.Generator().manual_seed(1)
    means = 2 * torch.randn(12, 16, generator=generator)
    mels, tokens, truth = [], [], []
    for _ in range(80):
        y = torch.cat(
            [torch.tensor([1]), torch.randint(2, 12, (8,), generator=generator), torch.tensor([1])]
        )
        d = torch.randint(2, 12, (10,), generator=generator)
        x = means[torch.repeat_interleave(y, d)].T
        mels.append(x + torch.randn(x.shape, generator=generator))
        tokens.append(y)
        truth.append(d)
    found = align(mels, tokens, 12)
    # Between two equal tokens nothing in the sound marks a boundary.
    errors = torch.cat(
        [
            (a.cumsum(0) - b.cumsum(0)).abs()[:-1][y[1:] != y[:-1]]
            for a, b, y in zip(found, truth, tokens, strict=True)
        ]
    ).double()
    assert errors.mean() < 0.1, f"the boundaries are off by {errors.mean():.3f} frames"
    assert (errors <= 1).double().mean() > 0.99
    assert all(int(d.min()) >= 1 for d in found)
    again = align(mels, tokens, 12)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_too_few_frames_are_refused() -> None:
    with pytest.raises(DataError, match="fewer frames than tokens"):
        align([torch.zeros(4, 2)], [torch.tensor([1, 2, 3])], 4)
