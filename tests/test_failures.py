"""A disk that fills, a folder in use, data that go bad: one clear line, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from gendiff import checkpoint, config, console, generate, plugins, runs, train
from gendiff.cli import main
from gendiff.errors import CheckpointError, DataError, NonFiniteError, RunError, explained
from gendiff.modality import DataReport
from gendiff.testing import ToyModality
from gendiff.testing.toy import ToyData


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plugins._REGISTERED, "toy", ToyModality())


def make_run(out: Path, *overrides: str) -> runs.Run:
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"out={out}", *overrides])
    return runs.start(modality, resolved, {"classes": 3})


def cli(*args: str) -> Result:
    return CliRunner().invoke(main, ["train", "--modality", "toy", *args])


def one_line(done: Result, *parts: str) -> None:
    """One line on standard error, exit code 2."""
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    for part in parts:
        assert part in line


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def same_as_never(out: Path, reference: Path) -> None:
    """A run that went on after a failure is bit-equal to one that had none."""
    assert cli(f"out={out}").exit_code == 0
    assert cli(f"out={reference}").exit_code == 0
    a, b = (
        checkpoint.load_state(path / "toy/default/checkpoints/step-00000020")
        for path in (out, reference)
    )
    for name, weight in a["network"].items():
        assert torch.equal(weight, b["network"][name])


@pytest.mark.parametrize("where", ["torch.save", "save_file", "_flush"])
def test_a_full_disk_at_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """At the second checkpoint: the first stays whole, no leftover, and the run goes on."""
    target = torch if where == "torch.save" else checkpoint
    name = where.removeprefix("torch.")
    work, calls = getattr(target, name), [0]

    def fails(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        full() if calls[0] > 5 else work(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(target, name, fails)
        given = f"out={tmp_path / 'a'}", "train.checkpoint_every_steps=2", "train.steps=20"
        one_line(cli(*given), "cannot be written: No space left on device", "were: make room")
    folder = tmp_path / "a" / "toy" / "default" / "checkpoints"
    found = checkpoint.steps(folder)
    assert found
    for path in found:
        checkpoint.check(path)
    assert not list(folder.glob("*.tmp"))
    same_as_never(tmp_path / "a", tmp_path / "b")


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """No mock: the system refuses to write more than 64 KiB to a file."""
    weights = {"w": torch.zeros(100_000)}
    checkpoint.save(tmp_path, 1, {"step": 1}, {"w": torch.zeros(3)}, {}, 2)
    code = (
        "import resource, signal, sys, torch\nfrom pathlib import Path\n"
        "from gendiff import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "big = {'w': torch.zeros(100_000)}\n"
        "small = {'w': torch.zeros(3)}\n"
        "for state, weights in ((big, small), (small, big)):\n"
        "    try:\n"
        "        checkpoint.save(Path(sys.argv[1]), 2, state, weights, {}, 2)\n"
        "    except checkpoint.CheckpointError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 2
    assert all("step-00000002 cannot be written: " in line for line in lines)
    assert "File too large" in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path, print) == tmp_path / "step-00000001"
    del weights


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_log_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The finished steps are saved, where that is still possible."""

    def fails(self: runs.MetricsLog, step: int, metrics: Any) -> None:
        if step > 10:
            raise OSError(code, os.strerror(code), "metrics.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(runs.MetricsLog, "write", fails)
        done = cli(f"out={tmp_path / 'a'}", "train.checkpoint_every_steps=7", "train.steps=20")
    one_line(done, "cannot be written: metrics.jsonl: " + os.strerror(code), "at step 15",
             "step-00000015 is whole")  # fmt: skip
    same_as_never(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("x: DefaultCPUAllocator: can't allocate memory: 8 bytes"), "Ask for less"),
        (torch.OutOfMemoryError("CUDA out of memory."), "Ask for less"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a.txt"), "a.txt: Permission"),
        (DataError("a\x1b[31mb\0" + "c" * 5000 + "end"), "data: a\\x1b[31mb\\x00ccc"),
    ],
)
def test_what_no_option_is_to_blame_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fails(*_: Any) -> None:
        raise DataError(f"data: {error}") if isinstance(error, DataError) else error

    monkeypatch.setattr(ToyModality, "prepare", fails)
    done = cli()
    one_line(done, said)
    assert len(done.stderr) < 700


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.say("a\udcff.png\x1b[31m", tmp_path / "log.txt")
    console.warn("b\udcfe")
    said = capsys.readouterr()
    assert said.out == "a\\udcff.png\\x1b[31m\n"
    assert said.err == "warning: b\\udcfe\n"
    assert (tmp_path / "log.txt").read_text().endswith(said.out)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(ToyModality, "prepare", fails)
    assert isinstance(cli().exception, RuntimeError)


def test_a_network_larger_than_the_memory(tmp_path: Path) -> None:
    """The system refuses to give the tebibytes of it."""
    from torch import nn

    class Large(ToyModality):
        def backbone(self, *_: Any) -> nn.Module:
            return nn.Linear(2**20, 2**22)

    plugins.register(Large())
    one_line(cli(f"out={tmp_path}"), "out of memory", "Ask for less")


def test_a_run_json_that_is_damaged(tmp_path: Path) -> None:
    """What the weights were trained on is beside them; a file that is no record is named."""
    assert cli(f"out={tmp_path}").exit_code == 0
    record = tmp_path / "toy" / "default" / "run.json"
    was = record.read_text()
    record.write_text(was.replace('"classes": 3', '"classes": [4]'))
    assert record.read_text() != was
    assert generate.load(record.parent).run.facts == {"classes": 3}
    record.write_text("[" * 100_000)
    done = CliRunner().invoke(main, ["sample", str(record.parent), "-n", "1"])
    one_line(done, "run.json is damaged. 'gendiff train' writes it anew")


def test_a_damaged_log_of_metrics_is_gone_on_with(tmp_path: Path) -> None:
    assert cli(f"out={tmp_path}", "train.steps=10").exit_code == 0
    log = tmp_path / "toy" / "default" / "metrics.jsonl"
    log.write_bytes(b"\xbb\xff\n" + log.read_bytes())
    done = cli(f"out={tmp_path}", "train.steps=20", "--accept-changes")
    assert done.exit_code == 0
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10, 15, 20]


def test_a_read_only_folder_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(runs, "write_atomically", refuses)
    one_line(cli(f"out={tmp_path}"), "Read-only file system", "Choose another with out=")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_file_that_disappears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The steps that are done are saved; when the file is back the run goes on, bit-equal."""
    get, calls = ToyData.__getitem__, [0]

    def gone(self: ToyData, key: tuple[int, int]) -> Any:
        calls[0] += 1
        if calls[0] > 16 * 7:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a/17.png")
        return get(self, key)

    with monkeypatch.context() as patch:
        patch.setattr(ToyData, "__getitem__", gone)
        done = cli(f"out={tmp_path / 'a'}", f"train.workers={workers}")
    one_line(done, "data cannot be read any more: ", "a/17.png", "at step 7", "step-00000007")
    same_as_never(tmp_path / "a", tmp_path / "b")


def test_an_item_that_is_not_finite_is_named_and_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """An epoch of 64 items in steps of 16: one step of four is skipped, the rest train."""
    get = ToyData.__getitem__

    def spoilt(self: ToyData, key: tuple[int, int]) -> Any:
        x, label = get(self, key)
        return (x * float("nan"), label) if key[0] in (5, 21) else (x, label)

    monkeypatch.setattr(ToyData, "__getitem__", spoilt)
    run = make_run(tmp_path)
    assert train.train(run)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert 5 <= sum(line["skipped"] for line in lines) <= 10
    assert all(line["loss"] < 10 and line["grad_norm"] < 100 for line in lines)  # no NaN
    said = [line for line in capfd.readouterr().err.splitlines() if "not finite" in line]
    assert 1 <= len(said) <= 2  # each item once
    assert "5" in said[0] or "21" in said[0]


def test_data_that_are_all_spoilt_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = ToyData.__getitem__
    monkeypatch.setattr(ToyData, "__getitem__", lambda s, k: (get(s, k)[0] / 0, get(s, k)[1]))
    with pytest.raises(NonFiniteError, match=r"Mend these items of the data: \[0, 1, 2"):
        train.train(make_run(tmp_path, "train.steps=100", "train.checkpoint_every_steps=100"))


def test_one_run_folder_one_process(tmp_path: Path) -> None:
    """The second is told who the first is, and changes nothing."""
    run = make_run(tmp_path)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom gendiff.runs import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(run.folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "in\n"
        before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        begin = time.monotonic()
        one_line(cli(f"out={tmp_path}"), str(run.folder), f"process {other.pid} on ", "name=")
        with pytest.raises(RunError, match=f"process {other.pid} on"):
            train.train(run)
        assert time.monotonic() - begin < runs.ORPHANS_END_SECONDS
        after = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
        assert after == before
    finally:
        other.kill()
        other.wait()
    assert train.train(run)  # the lock has ended with the process


def test_a_dead_process_s_worker_holds_the_lock_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "ORPHANS_END_SECONDS", 0.3)
    monkeypatch.setattr(runs, "_alive", lambda pid: False)
    with runs.locked(tmp_path):
        begin = time.monotonic()
        with pytest.raises(RunError, match="is in use"), runs.locked(tmp_path):
            pass
        assert time.monotonic() - begin >= 0.3


def test_a_clock_that_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the times in the log depends on it; checkpoints are ordered by their step."""
    assert cli(f"out={tmp_path / 'b'}").exit_code == 0
    now = [2e9]

    def back(*_: Any) -> float:
        now[0] -= 3600
        return now[0]

    for name in ("time", "perf_counter"):
        monkeypatch.setattr(time, name, back)
    run = make_run(tmp_path / "a")
    trainer = train.Trainer(run)
    for result in trainer.steps():
        if result.step % 5 == 0:
            path = trainer.save()
            os.utime(path, (back(), back()))
    newest = checkpoint.newest(run.checkpoints, print)
    assert newest is not None
    assert newest.name == "step-00000020"
    assert train.train(run)
    reference = tmp_path / "b" / "toy" / "default" / "checkpoints" / newest.name
    a, b = checkpoint.load_state(newest), checkpoint.load_state(reference)
    for name, weight in a["network"].items():
        assert torch.equal(weight, b["network"][name])


def test_errors_are_told_in_one_line() -> None:
    from gendiff.errors import reason

    assert reason(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert reason(FileNotFoundError(2, "No such file", "x.png")) == "x.png: No such file"
    worker = "Caught DataError in worker\nTraceback\n  file\ngendiff.errors.DataError: x is cut"
    assert reason(DataError(worker)) == "x is cut"
    assert reason(RuntimeError()) == "RuntimeError"
    assert isinstance(CheckpointError("a"), Exception)


def test_a_process_that_loses_its_peer_says_so_in_one_line() -> None:
    gloo = "[gloo/transport/tcp/pair.cc:538] Read error [127.0.0.1]:1: Connection reset by peer"
    said = explained(RuntimeError(gloo))
    assert said is not None
    assert said.startswith("another process of the group has ended")
    assert explained(RuntimeError("shapes differ")) is None


def test_a_run_does_not_go_on_with_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [f"out={tmp_path}", "train.steps=2", "train.sample_every_steps=0", "sample.preview=1"]

    def trained(facts: dict[str, Any], *more: str) -> Result:
        report = DataReport("toy items", {"classes": 3, **facts})
        monkeypatch.setattr(ToyModality, "prepare", lambda *_: report)
        return cli(*few, *more)

    record = tmp_path / "toy" / "default" / "run.json"
    assert trained({"items": 7}).exit_code == 0
    one_line(trained({"items": 8}), "with other data", "another items", "--accept-changes")
    assert trained({"items": 7, "content": "a"}).exit_code == 0  # as an older plugin did not say
    before = record.read_bytes()
    one_line(trained({"items": 7, "content": "b"}, "train.steps=2"), "another content", "name=…")
    assert record.read_bytes() == before
    assert trained({"items": 9, "content": "a"}).exit_code == 0  # the content is what counts
    assert trained({"items": 7, "content": "b"}, "--accept-changes").exit_code == 0
    assert trained({"items": 7, "content": "b"}).exit_code == 0
    one_line(trained({"items": 7, "content": "a"}), "another content")
