"""Predicted durations have the statistics they were fitted to."""

import pytest
import torch
from gendiff_speech.durations import fit, predict

from gendiff.errors import DataError


def test_the_draws_have_the_fitted_statistics_and_follow_the_seed() -> None:
    facts = {"durations": {"a": [3.0, 0.3], "b": [2.0, 0.0]}}
    tokens = ["a"] * 4000 + ["b"]
    d = predict(facts, tokens, seed=1, sample=7)
    mean, std = fit([tokens], [d])["a"]
    assert abs(mean - 3.0) < 0.02
    assert abs(std - 0.3) < 0.02
    assert d[-1] == 7
    assert torch.equal(d, predict(facts, tokens, seed=1, sample=7))
    assert not torch.equal(d, predict(facts, tokens, seed=1, sample=8))
    ratio = d.sum() / predict(facts, tokens, seed=1, sample=7, speed=2.0).sum()
    assert abs(float(ratio) - 2.0) < 0.02
    assert int(predict(facts, tokens, seed=1, sample=7, speed=100.0).min()) == 1


def test_unknown_tokens_and_speeds_are_refused() -> None:
    with pytest.raises(DataError, match="'c'"):
        predict({"durations": {}}, ["c"], seed=0, sample=0)
    with pytest.raises(DataError, match="speed"):
        predict({"durations": {"a": [1.0, 0.0]}}, ["a"], seed=0, sample=0, speed=0.0)
