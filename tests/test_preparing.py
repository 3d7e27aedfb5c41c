"""Preparation in worker processes, and arrays on disk."""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gendiff import console, preparing
from gendiff.errors import DataError
from gendiff.preparing import Mapped, Rows, Told, spread, written


def squared(number: int) -> tuple[int, int]:
    return os.getpid(), number**2


def refused(number: int) -> int:
    if number == 7:
        raise DataError(f"data: {number} is no good.")
    return number


def killed(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "cores", lambda: 2)


@pytest.mark.usefixtures("two_cores")
class TestSpread:
    def test_is_a_map_in_order_in_other_processes_that_reads_no_further_than_it_must(self) -> None:
        read = []

        def numbers() -> Iterator[int]:
            for i in range(100):
                read.append(i)
                yield i

        found = spread(squared, numbers())
        first = next(found)
        assert len(read) <= 6  # two in flight for each of two workers, and one
        pids, squares = zip(first, *found, strict=True)
        assert squares == tuple(i**2 for i in range(100))
        assert os.getpid() not in pids

    def test_few_items_are_done_here(self) -> None:
        assert list(spread(squared, [3, 4], few=2)) == [(os.getpid(), 9), (os.getpid(), 16)]
        assert list(spread(squared, [])) == []

    def test_items_may_be_given_in_pieces(self) -> None:
        found = list(spread(squared, range(50), few=0, size=8))
        assert [square for _, square in found] == [i**2 for i in range(50)]
        assert len({pid for pid, _ in found[:8]}) == 1

    def test_an_error_is_the_callers(self) -> None:
        with pytest.raises(DataError, match="7 is no good"):
            list(spread(refused, range(20)))

    def test_a_worker_that_dies_is_one_line(self) -> None:
        with pytest.raises(DataError, match="process that prepared them died"):
            list(spread(killed, range(20)))


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time, pathlib\n"
        "from gendiff import preparing\n"
        "preparing.cores = lambda: 2\n"
        "def slow(i):\n"
        "    pathlib.Path(f'pid{os.getpid()}').touch()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(preparing.spread(slow, range(9)))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while len(pids := [int(p.name[3:]) for p in tmp_path.glob("pid*")]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_torch_has_one_thread_in_workers_of_a_script_that_imports_it(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from gendiff import preparing\n"
        "preparing.cores = lambda: 2\n"
        "def threads(i):\n"
        "    return torch.get_num_threads()\n"
        "if __name__ == '__main__':\n"
        "    print(set(preparing.spread(threads, range(3))))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert found.stdout.strip() == "{1}", found.stderr


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_rows_are_a_npy_file_and_mapped_they_pickle_as_its_path(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
    with Rows(tmp_path / "a.npy", np.float32, (3,)) as rows:
        for part in np.array_split(expected, 7):
            rows.append(part)
        rows.append(np.empty((0, 3)))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)
    mapped = Mapped(tmp_path / "a.npy")
    again = pickle.loads(pickle.dumps(mapped))
    assert len(pickle.dumps(mapped)) < 500
    for array in (mapped, again):
        np.testing.assert_array_equal(array[100:200], expected[100:200])
        assert type(array[0]) is np.ndarray
        assert not array.flags.writeable
    part = mapped.reshape(-1)  # of the file, not the file
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(part)), expected.reshape(-1))


def test_no_rows_are_an_empty_array(tmp_path: Path) -> None:
    Rows(tmp_path / "a.npy", np.int64, (2,)).close()
    assert Mapped(tmp_path / "a.npy").shape == (0, 2)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with Rows(tmp_path / "a.npy", np.int64) as rows:
        rows.append(np.arange(1000))
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(content[:4000])
    with pytest.raises(ValueError, match="greater than file size"):
        Mapped(tmp_path / "b.npy")


def test_a_mapped_array_is_no_memory_of_the_process(tmp_path: Path) -> None:
    with Rows(tmp_path / "a.npy", np.uint8) as rows:
        for _ in range(20):
            rows.append(np.ones(10 << 20, np.uint8))
    code = (
        "import resource, sys, pathlib\n"
        "from gendiff.preparing import Mapped\n"
        "held = [int(l.split()[1]) << 10 for l in open('/proc/self/status') if 'VmData' in l][0]\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (held + (60 << 20),) * 2)\n"
        "a = Mapped(pathlib.Path(sys.argv[1]))\n"
        "print(sum(int(a[i:i + 1000000].sum()) for i in range(0, len(a), 1000000)))\n"
    )
    if not hasattr(resource, "RLIMIT_DATA") or not Path("/proc/self/status").exists():
        pytest.skip("the limit is Linux's")
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.npy")], capture_output=True, text=True
    )
    assert found.stdout.strip() == str(200 << 20), found.stderr


def test_progress_is_told_after_a_while_and_then_every_fifteen_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, said = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(console, "say", said.append)
    told = Told()
    for second in range(1, 40):
        now[0] = 100.0 + second
        told("pictures", second, 0 if second > 30 else 50)
    assert said == [
        "preparing pictures: 8 of 50",
        "preparing pictures: 23 of 50",
        "preparing pictures: 38",
    ]


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "a"

    def half() -> None:
        with written(folder) as new:
            (new / "half").write_text("half")
            raise DataError("data: no good.")

    with pytest.raises(DataError, match="no good"):
        half()
    assert list((tmp_path / "cache").iterdir()) == []
    with written(folder) as new:
        (new / "whole").write_text("whole")
        assert not folder.exists()
    assert [p.name for p in (tmp_path / "cache").rglob("*")] == ["a", "whole"]
    with written(folder) as new:  # another process was faster
        (new / "whole").write_text("other")
    assert (folder / "whole").read_text() == "whole"
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DataError, match="GENDIFF_CACHE to a folder with space"),
        written(tmp_path / "file" / "a"),
    ):
        pass
    with pytest.raises(FileNotFoundError, match="source"), written(tmp_path / "cache" / "b"):
        (tmp_path / "source").read_text()


def test_what_killed_processes_left_is_removed_after_a_day(tmp_path: Path) -> None:
    for name, hours in {"new-old": 25, "new-young": 23, "other": 25}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.npy").touch()
        then = time.time() - 3600 * hours
        os.utime(tmp_path / name / "rows.npy", (then, then))
        os.utime(tmp_path / name, (then, then))
    with written(tmp_path / "a"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "new-young", "other"]


def test_a_folder_that_gets_its_name_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new-other").mkdir()
    (tmp_path / "new-other" / "rows.npy").touch()
    stat = Path.stat

    def renamed(self: Path, **how: bool) -> os.stat_result:
        if self.name == "rows.npy":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", renamed)
    with written(tmp_path / "a"):
        pass
    assert (tmp_path / "new-other").is_dir()


SLEEPING = """
import pathlib, sys, time
from gendiff import cli
from gendiff.preparing import written

@cli.main.command()
def sleep():
    with written(pathlib.Path(sys.argv[1]) / "a") as new:
        (new / "half").touch()
        time.sleep(60)

cli.main(["sleep"])
"""


def test_sigterm_leaves_nothing_half_written(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPING, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("new-*/half")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
