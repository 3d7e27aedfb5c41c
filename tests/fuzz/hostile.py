"""Values, texts and bytes that nobody should give."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

T = TypeVar("T")

# What earlier rounds found, and what lies beside it.
TEXTS = (
    "", " ", "~", "null", "yes", "[]", "{}", "=", "==", "a=b", ".", "..", "/", "//", "../x", "-", "--",
    "nan", ".nan", ".inf", "-.inf", "1e999", "1e-320", "-0.0", "0", "-1", "1", "2", "7", "0.5",
    str(2**31), str(2**63 - 1), str(2**63), str(2**64), str(-(2**63) - 1), "9" * 400, "9" * 5000,
    "1e18", "1_000", "0x10", "12:30:45", "2001-01-01", "2001-99-99", "9999999999-01-01",
    "a\0b", "\0", "\x1b[31mred", "a\nb", "a\r", "a" * 300, "a" * 5000, "\ud800", "\udcff", "\ufeff",
    "é", "²", "٣", "💥", "'", '"', "{", "[" * 3000, "{a: " * 3000, "&a [*a]", "*x", "<<: 1", "? x", "!x",
    "!!python/object/apply:os.system ['touch PWNED']", "!!python/name:os.system", "!!binary aGk=",
    "!!set {a, b}", "!!timestamp x", "!!int x", "{[a]: b}", "{1: 2}", "{null: 1}", "{name: x}",
    "{name: heun, churn: .nan}", "{name: heun, churn: 1e300}", "{name: ddim, eta: -1}",
    "{name: karras, rho: 0}", "{name: karras, rho: 1e-300}", "{name: explicit, at: []}",
    "{name: explicit, at: [1, 0.5, .nan]}", "{name: edm, sigma_max: .inf}", "{name: vp_linear}",
    "{name: vp_linear, steps: 1000000000000}", "{name: shifted, schedule: {name: shifted}}",
    "{name: uniform, steps: 1000000000000}", "{scale: .nan}", "{scale: 1e300, interval: [3, 1]}",
    "edm", "flow", "cosine", "heun", "ddim", "ddpm", "dpm++2m", "restart", "pndm", "time", "log_snr",
    "cuda:99", "cpu", "meta", "mps", "xla", "cpu:7", "os.system", "gendiff.cli:main",
)  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)  # fmt: skip


def drawn(strategy: st.SearchStrategy[T], count: int, key: int) -> list[T]:
    """Values of a hypothesis strategy, the same for the same key."""
    found: list[T] = []

    @seed(key)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: T) -> None:
        found.append(value)

    collect()
    return found


def values(key: int) -> list[Any]:
    """Plain data: scalars, and lists and mappings of them."""
    scalars = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
        | st.sampled_from(TEXTS) | st.sampled_from([2**31, 2**63, 2**64, 10**30, 1e-320, 1e300])
    )  # fmt: skip
    nested = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
        max_leaves=8,
    )
    return drawn(nested, 1000, key)


def as_yaml(value: Any) -> str:
    """A value as it may be written behind ``key=``."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("\n...\n")


def damaged(data: bytes, dice: random.Random) -> bytes:
    """Some bytes flipped, overwritten, cut out, doubled or added."""
    found = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16))):
        at = dice.randrange(len(found) + 1)
        if dice.random() < 0.5:  # headers are where it hurts
            at = min(at, dice.randrange(64))
        match dice.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << dice.randrange(8)
            case 1:
                found[at : at + 4] = dice.choice((b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f"))
            case 2:
                del found[at:]
            case 3:
                del found[at : at + dice.randrange(1, 64)]
            case 4:
                found[at:at] = found[: dice.randrange(1, 256)]
            case _:
                found[at:at] = dice.randbytes(dice.randrange(1, 32))
    return bytes(found)


def damaged_text(text: str, dice: random.Random) -> bytes:
    """A text with words replaced by hostile ones, or lines lost, or its bytes damaged."""
    if dice.random() < 0.3:
        return damaged(text.encode(errors="surrogatepass"), dice)
    lines = text.split("\n")
    for _ in range(dice.choice((1, 1, 2, 5))):
        at = dice.randrange(len(lines))
        words = lines[at].split(" ")
        match dice.randrange(4):
            case 0:
                del lines[at]
                lines = lines or [""]
            case 1:
                lines[at:at] = lines[at : at + 3]
            case _:
                words[dice.randrange(len(words))] = dice.choice(TEXTS)
                lines[at] = " ".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def odd(dice: random.Random, usual: Sequence[str], pool: Sequence[Any]) -> str:
    """A text, in half the cases a usual one."""
    if usual and dice.random() < 0.5:
        return dice.choice(usual)
    return dice.choice(TEXTS) if dice.random() < 0.6 else as_yaml(dice.choice(pool))
