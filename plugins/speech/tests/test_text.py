"""Text becomes letters or phonemes with the pauses between words, or a reason why not."""

from __future__ import annotations

import sys

import pytest

from gendiff.errors import DataError
from gendiff_speech import espeak, text


def usable() -> bool:
    return text.kind_of("auto") == "phonemes"


needs_espeak = pytest.mark.skipif(not usable(), reason="eSpeak NG is not installed")


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        ("Lord, but I'm glad.", "_lord,but i'm glad."),
        ("  Naïve  “café”\n(twice) ", "_naive cafe twice."),
        ("well-known — or not?!", "_well known,or not?"),
        ("one; two: three…", "_one,two,three."),
        ("...and so", "_and so."),
        ("I’d go -- now", "_i'd go,now."),
    ],
)
def test_letters_and_pauses(said: str, tokens: str) -> None:
    assert text.sentences([said], "characters") == [tuple(tokens)]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("3 cats & a dog", "cannot read '& 3': write words with the letters a to z"),
        ("Привет", "cannot read 'в е и п р т'"),
        ("", "has nothing to read"),
        (" ?! ", "has nothing to read"),
    ],
)
def test_what_cannot_be_read_is_said(said: str, reason: str) -> None:
    good, bad = text.sentences(["a good one", said], "characters")
    assert good == tuple("_a good one.")
    assert isinstance(bad, text.Unreadable)
    assert str(bad).startswith(reason)


def test_numbers_of_tokens_that_are_known() -> None:
    known = ["", " ", ",", "_", "a", "b"]
    assert text.numbers("a, b!", "characters", known) == [3, 4, 2, 5, 2]
    with pytest.raises(text.Unreadable, match="has the character 'c', which the training data"):
        text.numbers("a c", "characters", known)


@needs_espeak
def test_phonemes_read_numbers_and_keep_pauses() -> None:
    (tokens,) = text.sentences(["I've 3 cats, really?"], "phonemes")
    assert " ".join(tokens) == "_ aI v   T r 'i:   k 'a t s , r 'i@ l i ?"
    (decimal,) = text.sentences(["3.5 miles"], "phonemes")
    assert decimal.count(".") == 1
    assert decimal[-1] == "."
    (bad,) = text.sentences(["мир"], "phonemes")
    assert isinstance(bad, text.Unreadable)


@needs_espeak
def test_phonemes_are_those_that_are_spoken() -> None:
    for said in ("the old man saw seven green birds", "author of the danger trail"):
        ((words),) = espeak.phonemes_of([said])
        heard = [p for p in espeak.speak(said, "en-us").phonemes if p not in "_;"]
        assert [p for word in words for p in word] == heard


@needs_espeak
def test_a_stress_that_never_occurred_is_left_out() -> None:
    known = ["", ".", "_", "k", "a", "t", "s"]
    assert text.numbers("cats", "phonemes", known) == [2, 3, 4, 5, 6, 1]


def test_without_espeak_the_tokens_are_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    monkeypatch.setattr(espeak, "_SYSTEM", "libespeak-ng-that-is-not-there.so.1")
    assert text.kind_of("auto") == "characters"
    with pytest.raises(DataError, match="pip install espeakng-loader"):
        text.sentences(["cats"], "phonemes")
