"""Samples by any number of processes, killed at will: the same files, each once."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from gendiff import config, plugins, runs, train
from gendiff.cli import main
from gendiff.errors import ConfigError, RunError
from gendiff.shards import Files
from gendiff.testing import ToyModality
from gendiff.world import World

COUNT = 2000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plugins._REGISTERED, "toy", ToyModality())
        out = tmp_path_factory.mktemp("run")
        modality = ToyModality()
        resolved = config.resolve(modality, overrides=[f"out={out}", "sample.steps=2"])
        made = runs.start(modality, resolved, {"classes": 3})
        train.train(made)
        yield made.folder


def sample(run: Path, out: Path, *args: str) -> Result:
    return CliRunner().invoke(main, ["sample", str(run), "--out", str(out), *args])


def files(out: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.json")}


class Killed(BaseException):
    """Ends a process as SIGKILL would: nothing catches it."""


def killed_after(patch: pytest.MonkeyPatch, writes: int, half: bool) -> None:
    """The process ends in its write number ``writes``, with half of the files or all written."""
    work, calls = ToyModality.write, [0]

    def write(self: Any, section: Any, facts: Any, batch: Any, folder: Path, ids: Any) -> Any:
        calls[0] += 1
        if calls[0] < writes:
            return work(self, section, facts, batch, folder, ids)
        some = ids[: len(ids) // 2] if half else ids
        work(self, section, facts, batch.select(range(len(some))), folder, some)
        raise Killed

    patch.setattr(ToyModality, "write", write)


def test_samples_by_one_two_and_three_processes(run: Path, tmp_path: Path) -> None:
    n = str(COUNT)
    assert sample(run, tmp_path / "one", "-n", n).exit_code == 0
    one = files(tmp_path / "one")
    assert sorted(one) == [f"{i:05d}.json" for i in range(COUNT)]
    assert len(set(one.values())) == COUNT
    assert not (tmp_path / "one" / ".ledgers").exists()
    for size in (2, 3):
        out = tmp_path / str(size)
        for rank in range(size):
            shard = ("-n", n, "--shard", f"{rank}/{size}")
            for writes, half in ((10, True), (15, False)):
                with pytest.MonkeyPatch.context() as patch:
                    killed_after(patch, writes, half)
                    with pytest.raises(Killed):
                        sample(run, out, *shard)
            before = {p: p.stat().st_mtime_ns for p in out.glob("*.json")}
            assert len(before) > COUNT // 10
            done = sample(run, out, *shard)
            assert done.exit_code == 0, done.output
            assert all(p.stat().st_mtime_ns == t for p, t in before.items())  # not made again
        assert files(out) == one
        pictures = [tmp_path / name / "preview.png" for name in ("one", str(size))]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_killed_in_three_finished_by_one(run: Path, tmp_path: Path) -> None:
    """Another company finds what the first has left; a file that was deleted is made again."""
    with pytest.MonkeyPatch.context() as patch:
        killed_after(patch, 3, True)
        with pytest.raises(Killed):
            sample(run, tmp_path / "a", "-n", "200", "--shard", "1/3")
    done = files(tmp_path / "a")
    assert sorted(done) == [f"{i:05d}.json" for i in [*range(16, 32), *range(64, 80)]]
    (tmp_path / "a" / "00070.json").unlink()
    assert sample(run, tmp_path / "a", "-n", "200").exit_code == 0
    assert sample(run, tmp_path / "b", "-n", "200").exit_code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert done.items() <= files(tmp_path / "b").items()


def test_torchrun_s_environment_is_the_share(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert f"share {rank}/2" in sample(run, tmp_path, "-n", "40").output
    assert len(files(tmp_path)) == 40


def test_samples_made_otherwise_are_not_taken_for_done(run: Path, tmp_path: Path) -> None:
    assert sample(run, tmp_path / "a", "-n", "40", "--shard", "0/2").exit_code == 0
    refused = sample(run, tmp_path / "a", "-n", "40", "--shard", "1/2", "--steps", "3")
    assert refused.exit_code == 2
    assert "holds samples of another model, step, seed or setting" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert sample(run, tmp_path / "a", "-n", "40", "--steps", "3").exit_code == 0
    assert sample(run, tmp_path / "b", "-n", "40", "--steps", "3").exit_code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert sample(run, tmp_path / "c", "-n", "40", "--shard", "2/2").exit_code == 2
    assert not (tmp_path / "c").exists()
    assert sample(run, tmp_path / "c", "-n", "4", "--cond", "label=1").exit_code == 0


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written stays, nothing half is left, and the rest is still missing."""
    mine = Files(tmp_path, World(), "made so")

    def write(folder: Path) -> None:
        (folder / "00016.txt").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mine.add(range(16), lambda folder: [(folder / f"{i:05d}.txt").touch() for i in range(16)])
    with pytest.raises(RunError, match="No space left on device. Those before are whole"):
        mine.add(range(16, 32), write)
    assert len(list(tmp_path.glob("*.txt"))) == 16
    assert mine.missing(40) == list(range(16, 40))
    assert Files(tmp_path, World(), "made otherwise").missing(20) == list(range(20))
    (ledger,) = (tmp_path / ".ledgers").glob("*.jsonl")
    ledger.write_text(ledger.read_text()[:-1])  # cut short by a kill
    assert mine.missing(40) == list(range(40))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made: .*Not a directory"):
        Files(tmp_path / "file" / "x", World(), "").add([0], lambda folder: None)
