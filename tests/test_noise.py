from __future__ import annotations

import itertools
import math

import pytest
import torch

from gendiff.noise import StepNoise, Streams, derive_seed, generator


def test_names_do_not_run_together() -> None:
    names = [
        ("a", "bc"), ("ab", "c"), ("abc",), ("abc", ""), ("", "abc"),
        (1,), (1, 0), (0, 1), ("1",), (1, "0"), (-1,), (256,), (0,), (),
    ]  # fmt: skip
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    grid = {derive_seed("sample", *name) for name in itertools.product(range(20), repeat=3)}
    assert len(grid) == 8000


def test_seeds_do_not_change_between_versions() -> None:
    """BLAKE2b of length-prefixed little-endian names, computed by hand with hashlib."""
    import hashlib

    data = b"\x01\x00\x00\x00a" + b"\x08\x00\x00\x00" + (7).to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8).digest()
    assert derive_seed("a", 7) == int.from_bytes(digest, "little") >> 1


def test_generator_is_a_function_of_its_names() -> None:
    first, second = (torch.rand(4, generator=generator("times", 3, 5)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.rand(4, generator=generator("times", 5, 3)))


@pytest.mark.parametrize("ids", [(7,), (7, 8), (8, 7), (0, 1, 2, 3, 7, 100), (7, 7)])
@pytest.mark.parametrize("others", [1, 5])
def test_a_sample_does_not_see_its_neighbours(ids: tuple[int, ...], others: int) -> None:
    rows = [3 if i == 7 else others for i in ids]
    noise = Streams(0, ids).normal(rows, (2, 2), 4)
    alone = Streams(0, (7,)).normal([3], (2, 2), 4)
    for i, piece in zip(ids, noise.split(rows), strict=True):
        if i == 7:
            assert torch.equal(piece, alone)


def test_all_names_matter() -> None:
    """5 seeds, ids and draws: 125 different noises, pairwise uncorrelated at 5 sigma."""
    n = 400
    noise = torch.stack(
        [
            Streams(seed, (i,), dtype=torch.float64).normal([n], (), draw)
            for seed, i, draw in itertools.product(range(5), repeat=3)
        ]
    )
    correlation = (noise @ noise.T / n).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / math.sqrt(n)  # the largest of 7750 pairs


@pytest.mark.parametrize("source", [Streams(1, tuple(range(500))), StepNoise(1)])
def test_moments(source: Streams | StepNoise) -> None:
    """Five standard errors of each moment, over 200 000 numbers."""
    x = source.normal([40] * 500, (10,), 0).double().flatten()
    n = len(x)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - expected) < 5 * math.sqrt(variance / n)


def test_step_noise_names() -> None:
    base = StepNoise(0).normal([2, 3], (4,), 1)
    assert torch.equal(base, StepNoise(0).normal([2, 3], (4,), 1))
    for source, draw in ((StepNoise(1), 1), (StepNoise(0, first=1), 1), (StepNoise(0), 2)):
        assert not torch.equal(base, source.normal([2, 3], (4,), draw))


@pytest.mark.parametrize("cut", [[4, 4], [1, 6, 1], [8]])
def test_step_noise_does_not_depend_on_how_a_batch_is_cut(cut: list[int]) -> None:
    rows = [1, 3, 2, 5, 1, 1, 4, 2]
    whole = StepNoise(3).normal(rows, (2,), 9)
    parts, first = [], 0
    for size in cut:
        parts.append(StepNoise(3, first).normal(rows[first : first + size], (2,), 9))
        first += size
    assert torch.equal(torch.cat(parts), whole)


def test_one_stream_for_each_sample() -> None:
    with pytest.raises(ValueError, match="2 streams for 3 samples"):
        Streams(0, (1, 2)).normal([1, 1, 1], (2,), 0)
