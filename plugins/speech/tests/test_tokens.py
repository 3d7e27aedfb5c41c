"""The listener hears which token is spoken when, and what is said wrongly or late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gendiff.spaces import Batch, Cond, Masked
from gendiff_speech import tokens
from gendiff_speech.recogniser import pad
from gendiff_speech.tokens import Listener, Told, frames, token_accuracy

MELS, TOKENS = 16, 5


def spoken(seed: int) -> Told:
    """Six tokens of 3 to 9 frames, each a ridge in bands of its own."""
    gen = torch.Generator().manual_seed(seed)
    said = torch.randint(1, TOKENS, (6,), generator=gen)
    said = said.repeat_interleave(torch.randint(3, 10, (6,), generator=gen))
    band = torch.arange(MELS)[:, None]
    ridge = 3 * torch.exp(-((band - 3.5 * said) ** 2) / 4)
    return ridge - 1 + 0.3 * torch.randn(MELS, len(said), generator=gen), said


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def accuracy(
    samples: list[Told], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[float, float]:
    monkeypatch.setattr(tokens, "_STEPS", 80)
    told, held_out = ([spoken(i) for i in range(*span)] for span in ((0, 40), (40, 60)))
    found = token_accuracy("made", TOKENS, told, held_out, samples, cache, 0)
    assert found.floor is not None
    return found.value, found.floor


def test_other_recordings_reach_the_floor(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, floor = accuracy([spoken(i) for i in range(60, 80)], cache, monkeypatch)
    assert floor > 0.95
    assert abs(value - floor) < 0.03


def test_wrong_and_late_tokens_are_called_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = [spoken(i) for i in range(60, 80)]
    wrong = [(mel, said % (TOKENS - 1) + 1) for mel, said in right]
    late = [(mel.roll(3, 1), said) for mel, said in right]
    assert accuracy(wrong, cache, monkeypatch)[0] < 0.05
    assert 0.3 < accuracy(late, cache, monkeypatch)[0] < 0.8
    noise = [(torch.randn_like(mel), said) for mel, said in right]
    assert accuracy(noise, cache, monkeypatch)[0] < 0.5


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    network = Listener(MELS, TOKENS).eval()
    mels = [spoken(i)[0] for i in range(3)]
    together = network(*pad(mels))
    for row, mel in zip(together, mels, strict=True):
        alone = network(*pad([mel]))[0]
        assert torch.allclose(row[:, : mel.shape[1]], alone, atol=1e-5)


def test_frames_of_a_batch_know_their_tokens() -> None:
    x = torch.arange(10.0).expand(2, MELS, -1)
    cond = Cond(
        {"tokens": torch.tensor([[3, 1], [2, 0]]), "durations": torch.tensor([[4, 6], [7, 0]])}
    )
    (long, first), (short, second) = frames(
        Batch(x, Masked(torch.tensor([10, 7]), MELS, 10), cond)
    )
    assert first.tolist() == [3] * 4 + [1] * 6
    assert second.tolist() == [2] * 7
    assert (long.shape[1], short.shape[1]) == (10, 7)
