"""Checkpoints are whole or absent, and a damaged one never hides the one before."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from gendiff import checkpoint
from gendiff.errors import CheckpointError


def save(folder: Path, step: int, keep: int = 3) -> Path:
    state = {"step": step, "network": {"w": torch.full((3,), float(step))}}
    return checkpoint.save(folder, step, state, state["network"], {"step": str(step)}, keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert checkpoint.newest(tmp_path, print) == path
    assert checkpoint.load_state(path)["step"] == 7
    assert torch.equal(checkpoint.load_weights(path)["w"], torch.full((3,), 7.0))


def test_the_newest_stay(tmp_path: Path) -> None:
    for step in (9, 10, 11, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000011", "step-00000100"]


@pytest.mark.parametrize("name", [checkpoint.STATE, checkpoint.WEIGHTS, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    tmp_path: Path, name: str, damage: str
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((bad / name).read_bytes())
    if damage == "remove":
        (bad / name).unlink()
    else:
        data[len(data) // 2] ^= 0xFF
        (bad / name).write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    warnings: list[str] = []
    assert checkpoint.newest(tmp_path, warnings.append) == good
    assert len(warnings) == 1
    assert str(bad) in warnings[0]


def test_a_write_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002.tmp").mkdir()
    newest = checkpoint.newest(tmp_path, print)
    assert newest is not None
    assert newest.name == "step-00000001"
    save(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp"))


def test_when_all_are_damaged_nothing_starts_anew_silently(tmp_path: Path) -> None:
    (save(tmp_path, 1) / checkpoint.STATE).write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 1 checkpoints"):
        checkpoint.newest(tmp_path, lambda text: None)


def test_no_checkpoint_is_no_error(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, print) is None


def test_a_state_cannot_carry_code(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save({"step": Path("x")}, path / checkpoint.STATE)
    with pytest.raises(CheckpointError, match="state.pt is damaged, or not what its name says"):
        checkpoint.load_state(path)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8 + b"{}", b"\x80\x04."])
def test_what_cannot_be_read_is_one_error(tmp_path: Path, content: bytes) -> None:
    """Also where the manifest was made to fit it."""
    path = save(tmp_path, 1)
    for name, load in (
        (checkpoint.STATE, checkpoint.load_state),
        (checkpoint.WEIGHTS, checkpoint.load_weights),
        (checkpoint.WEIGHTS, checkpoint.metadata),
    ):
        (path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} is damaged") as error:
            load(path)
        assert "\n" not in str(error.value)


def test_other_names_and_manifests_are_no_checkpoints(tmp_path: Path) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    (bad / checkpoint.MANIFEST).write_text("[1]")
    (tmp_path / "step-x").mkdir()
    assert checkpoint.newest(tmp_path, lambda text: None) == good


def test_a_pickle_that_torch_warns_of_is_refused_without_the_warning(tmp_path: Path) -> None:
    torch.save({"step": 4}, tmp_path / checkpoint.STATE, pickle_protocol=4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load_state(tmp_path)
    assert not seen
