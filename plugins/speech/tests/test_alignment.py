"""The alignment is the best of all, and finds segments that are known."""

from itertools import combinations

import numpy as np
import pytest
import torch

from gendiff.errors import DataError
from gendiff_speech import alignment
from gendiff_speech.alignment import _even, align, cepstra, monotonic_alignment_search
from gendiff_speech.espeak import speak
from gendiff_speech.mel import CONVENTIONS, log_mel


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


def test_phonemes_of_a_synthesiser_are_found_where_it_spoke_them() -> None:
    """Measured: 14.3 ms, where a frame lasts 11.6 ms; equal durations are off by 51 ms."""
    random = np.random.default_rng(0)
    convention = CONVENTIONS["22khz"]
    features, names, truth = [], [], []
    for _ in range(40):
        # Made words: where letters always follow each other, nothing tells them apart.
        pairs = random.choice(list("bdfgklmnprstvw"), 12), random.choice(list("aeiou"), 12)
        said = "".join(
            a + b + " " * (i % 3 == 2) for i, (a, b) in enumerate(zip(*pairs, strict=True))
        )
        try:
            spoken = speak(said, "en-us", rate=150)
        except DataError as error:
            pytest.skip(str(error))
        features.append(cepstra(log_mel(torch.from_numpy(spoken.wave), convention)))
        names.append(spoken.phonemes)
        truth.append(torch.tensor(spoken.starts[1:]) / spoken.rate_hz)
    known = sorted({name for spoken in names for name in spoken})
    tokens = [torch.tensor([known.index(name) for name in spoken]) for spoken in names]

    def error_ms(durations: list[torch.Tensor]) -> float:
        frame = convention.hop / convention.sample_rate_hz
        found = [d.cumsum(0)[:-1] * frame for d in durations]
        return 1000 * float((torch.cat(found) - torch.cat(truth)).abs().mean())

    assert error_ms(align(features, tokens, len(known))) < 18
    even = [_even(len(y), x.shape[1]) for x, y in zip(features, tokens, strict=True)]
    assert error_ms(even) > 40


def test_a_large_corpus_is_searched_with_what_a_part_taught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(2)
    means = 3 * torch.randn(6, 8, generator=generator)
    tokens = [torch.randperm(6, generator=generator) for _ in range(60)]
    truth = [torch.randint(2, 9, (6,), generator=generator) for _ in range(60)]
    x = [means[y.repeat_interleave(d)].T for y, d in zip(tokens, truth, strict=True)]
    x = [a + 0.5 * torch.randn(a.shape, generator=generator) for a in x]
    monkeypatch.setattr(alignment, "_LEARN", 20)
    found = align(x, tokens, 6)
    right = [torch.equal(a, b) for a, b in zip(found, truth, strict=True)]
    assert sum(right) >= 58
