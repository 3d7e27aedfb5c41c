"""Feeds hostile input to the command line and tells what it did with it.

    python tests/fuzz/run.py --surface all --inputs 2000 --seconds 600 --seed 0

Four surfaces: ``config`` (YAML and overrides), ``command`` (every command and option), ``data``
(the files of every plugin) and ``checkpoint`` (run folders). Each input must end with exit code 0,
or with 2 and an ``error:`` line; within 10 s of processor time; with nothing written but where
it was asked for; with
no code of a file run. Input i of a surface and seed is always the same:
``--surface S --seed K --only I`` runs that one and shows what it was.

The process has an address space limit, so that what asks for absurd memory is refused by the
system and not given the machine's.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import surfaces
import torch
import uvicorn
from click.testing import CliRunner

from gendiff import console, plugins
from gendiff.cli import main
from gendiff.testing import ToyModality
from gendiff_speech import durations

LIMIT_SECONDS = 10.0  # of processor time: the machine may be busy
WAITING_SECONDS = 60.0  # for what waits without computing
STUCK_SECONDS = 120.0  # for what no signal reaches, in libraries
MEMORY_BYTES = 3 << 30  # beyond what is in use at the start
LONGEST_LINE = 2000
LOADED = (
    "sklearn.datasets", "sklearn.model_selection", "soundfile", "torchaudio.functional",
    "gendiff_image.data", "gendiff_image.unet", "gendiff_image.metrics", "gendiff_molecule.task",
    "gendiff_molecule.metrics", "gendiff_molecule.pictures", "gendiff_speech.data",
    "gendiff_speech.network", "gendiff_speech.pictures", "gendiff_speech.vocoders",
    "gendiff.train", "gendiff.evaluate", "gendiff.report", "gendiff.benchmark", "gendiff.fitting",
    "gendiff.distillation", "gendiff.testing.conformance", "matplotlib.pyplot",
)  # fmt: skip
CONTEXT = multiprocessing.get_context("fork")


class Hang(BaseException):
    """Raised in the middle of what takes too long."""


def _alarm(number: int, frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, 1.0)  # again, where something swallows this one
    if time.process_time() - _BEGAN[0] > LIMIT_SECONDS or (
        time.monotonic() - _BEGAN[1] > WAITING_SECONDS
    ):
        raise Hang


_BEGAN = [0.0, 0.0]  # processor time and time of day at which the input began


def limited() -> None:
    """Sets the limits of a process that runs inputs."""
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _alarm)
    durations._STEPS = 3  # enough to go through
    for _, observer in plugins._extras().list_name_plugin():
        plugins._extras().unregister(observer)  # they keep a writer for each run of a process
    plugins.register(ToyModality())
    uvicorn.Server.run = lambda *_, **__: None  # would serve for ever


def enter(box: surfaces.Box) -> None:
    """Home, caches and working directory in the sandbox."""
    for name, folder in (("HOME", box.home), ("TMPDIR", box.tmp), ("GENDIFF_CACHE", box.cache)):
        os.environ[name] = str(folder)
    tempfile.tempdir = None
    os.chdir(box.work)


def listing(box: surfaces.Box) -> dict[str, int]:
    """Every file that nothing may touch, with its size."""
    found = {}
    for folder, names, files in os.walk(box.top):
        names[:] = [n for n in names if Path(folder, n) not in box.writable]
        files = [n for n in files if not n.endswith(".jsonl") or Path(folder) != box.top]
        for name in [*names, *files]:
            path = Path(folder, name)
            found[str(path)] = path.lstat().st_size if name in files else -1
    return found


def leftovers(box: surfaces.Box) -> list[str]:
    """Files half written."""
    found = [p for folder in (box.out, box.cache, box.tmp) for p in folder.rglob("*")]
    own = ("torchinductor", "gradio")  # of libraries
    return [
        p.name
        for p in found
        if p.name.endswith((".tmp", ".part"))
        or (p.parent == box.tmp and not p.name.startswith(own))
    ]


def possible(argument: str) -> str:
    """An argument as a shell can give it: no NUL, and of surrogates those that stand for bytes."""
    try:
        raw = argument.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = argument.encode("utf-8", "replace")
    return raw.replace(b"\0", b"").decode("utf-8", "surrogateescape")


def place_of(error: BaseException) -> str:
    """The innermost line of ours that an error passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "gendiff" in Path(f.filename).parent.name]
    last = ours[-1] if ours else frames[-1]
    return f"{Path(last.filename).name}:{last.name}"


def judged(
    result: Any, seconds: float, box: surfaces.Box, before: dict[str, int], args: list[str]
) -> str | None:
    """What is wrong with how an input ended, or None."""
    if list(box.top.rglob("PWNED")):
        return "code of a file was run"
    error = result.exception
    if error is not None and not isinstance(error, SystemExit):
        return f"{type(error).__name__} at {place_of(error)}"
    if seconds > LIMIT_SECONDS:
        return "slow"
    if result.exit_code not in (0, 2):
        return f"exit code {result.exit_code}"
    lines = result.stderr.split("\n")
    errors = [line for line in lines if re.match("error: .*[a-z]", line)]
    if result.exit_code == 2 and not errors:
        return "refused without a word"
    if result.exit_code == 2 and any(not re.match("(error|warning): |$", line) for line in lines):
        return "a refusal that goes on in another line"
    if result.exit_code == 2 and any(len(line.split()) < 4 for line in errors):
        return f"says too little: {errors[0][:40]}"
    if "Traceback" in result.output:
        return "traceback in the output"
    if any(len(line) > LONGEST_LINE for line in errors):
        return f"a line of {max(map(len, errors))} characters"
    if any(not c.isprintable() for line in errors for c in line):
        return "control characters"
    asked = [box.work / a.removeprefix("out=") for a in args if a.startswith("out=")]
    after = {k for k, v in listing(box).items() if before.get(k) != v}
    if after := {k for k in after if not any(Path(k).is_relative_to(a) for a in asked)}:
        return f"written outside: {sorted(after)[0]}"
    if left := leftovers(box):
        return f"left behind: {re.sub('[0-9a-z_]{8}$|[0-9]{4,}', '…', left[0])}"
    return None


def run_one(surface: str, seed: int, index: int, box: surfaces.Box, pools: Any) -> dict[str, Any]:
    """Makes an input, runs it and says how it ended."""
    box.clear()
    dice = random.Random(f"{surface}/{seed}/{index}")
    args = [possible(a) for a in surfaces.SURFACES[surface](dice, box, pools)]
    before, begin = listing(box), time.process_time()
    _BEGAN[:] = begin, time.monotonic()
    console.out.quiet = False
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        result = CliRunner().invoke(main, args)
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.process_time() - begin
        wrong = judged(result, seconds, box, before, args)
        code, said = result.exit_code, result.stderr
        if isinstance(error := result.exception, Exception):
            said = "".join(traceback.format_exception(error))[-2000:]
    except Hang as error:
        seconds = time.process_time() - begin
        wrong, code, said = f"hang at {place_of(error)}", -1, ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
    return {
        "index": index, "args": args, "exit": code, "seconds": round(seconds, 3),
        "wrong": wrong, "said": said[-2000:],
    }  # fmt: skip


def worker(surface: str, seed: int, begin: int, end: int, box: surfaces.Box, log: Path) -> None:
    """Runs inputs, a line each to the log; the number of each is written before it is run."""
    limited()
    enter(box)
    pools = surfaces.pools(seed)
    gc.callbacks.clear()  # hypothesis's own, which would swallow a hang
    with log.open("a") as file:
        parent = os.getppid()
        for index in range(begin, end):
            if os.getppid() != parent:
                return  # nobody watches any more
            file.write(f"{index}\n")
            file.flush()
            file.write(json.dumps(run_one(surface, seed, index, box, pools)) + "\n")
            file.flush()


def last_line(log: Path) -> str:
    return log.read_text().rstrip("\n").rpartition("\n")[2] if log.exists() else ""


def watched(surface: str, seed: int, inputs: int, seconds: float, top: Path) -> list[Any]:
    """Runs a surface's inputs in a process that is replaced when one ends or stops it."""
    box, log = surfaces.Box(top), top / f"{surface}.jsonl"
    begin, deadline = 0, time.monotonic() + seconds
    while begin < inputs and time.monotonic() < deadline:
        process = CONTEXT.Process(target=worker, args=(surface, seed, begin, inputs, box, log))
        process.start()
        seen, since = "", time.monotonic()
        while process.is_alive():
            process.join(0.5)
            if (now := last_line(log)) != seen:
                seen, since = now, time.monotonic()
            if time.monotonic() - since > STUCK_SECONDS or time.monotonic() > deadline:
                process.kill()
        process.join()
        line = last_line(log)
        if line.isdecimal():
            wrong = "killed: stuck in a library" if process.exitcode == -9 else "crash"
            if time.monotonic() < deadline:
                end = {"exit": process.exitcode, "seconds": time.monotonic() - since, "said": ""}
                with log.open("a") as file:
                    record = {"index": int(line), "args": [], "wrong": wrong, **end}
                    file.write(json.dumps(record) + "\n")
            begin = int(line) + 1
        else:
            begin = json.loads(line)["index"] + 1 if line else inputs
    lines = [line for line in log.read_text().splitlines() if not line.isdecimal()]
    return [json.loads(line) for line in lines]


def in_child(work: Callable[..., None], *args: Any) -> None:
    """Does something in a process, as this one must stay fit to be forked."""
    process = CONTEXT.Process(target=work, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit("the sandbox could not be made")


def prepare(box: surfaces.Box) -> None:
    """Makes the sandbox, with runs and data that are whole."""
    limited()
    box.make()
    enter(box)
    surfaces.make_whole(box, lambda args: CliRunner().invoke(main, args))


def table(found: dict[str, list[Any]], seed: int) -> str:
    """What happened, for people."""
    lines = [
        "| surface | inputs | exit 0 | exit 2 | other | failures | slowest |",
        "|" + "---|" * 7,
    ]
    for surface, records in found.items():
        codes = Counter(r["exit"] for r in records)
        bad = sum(r["wrong"] is not None for r in records)
        slowest = max((r["seconds"] for r in records), default=0)
        other = len(records) - codes[0] - codes[2]
        row = [surface, len(records), codes[0], codes[2], other, bad, f"{slowest:.1f} s"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    for surface, records in found.items():
        kinds: dict[str, list[int]] = {}
        for r in records:
            if r["wrong"]:
                kinds.setdefault(r["wrong"], []).append(r["index"])
        for kind, indices in sorted(kinds.items(), key=lambda item: -len(item[1])):
            lines.append(
                f"{len(indices):5d}  {surface}: {kind}   "
                f"--surface {surface} --seed {seed} --only {indices[0]}"
            )
    return "\n".join(lines) + "\n"


def in_processes(top: Path, count: int, seed: int) -> list[Any]:
    """Some of the command surface's inputs as a shell would give them, each a new process."""
    box = surfaces.Box(top)
    enter(box)
    plugins.register(ToyModality())  # for its keys: the processes do not know it
    records, pools = [], surfaces.pools(seed)
    for index in range(count):
        box.clear()
        dice = random.Random(f"process/{seed}/{index}")
        args = surfaces.installed_command(dice, box, pools)
        command = [sys.executable, "-m", "gendiff", *map(possible, args)]
        begin = time.monotonic()
        done = subprocess.run(command, capture_output=True, timeout=120)
        said, wrong = done.stderr.decode(errors="replace"), None
        if done.returncode not in (0, 2) or "Traceback" in said:
            wrong = f"exit code {done.returncode}: {(said.splitlines() or [''])[-1][:80]}"
        seconds = round(time.monotonic() - begin, 3)
        records.append({
            "index": index, "args": args, "exit": done.returncode, "seconds": seconds,
            "wrong": wrong, "said": said[-2000:],
        })  # fmt: skip
    return records


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--surface", choices=[*surfaces.SURFACES, "all"], default="all")
    parser.add_argument("--inputs", type=int, default=1000, help="of each surface")
    parser.add_argument("--seconds", type=float, default=600, help="for each surface")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--processes", type=int, default=0, help="inputs in processes of their own"
    )
    parser.add_argument("--only", type=int, help="run this input alone and show it")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="table and records")
    return parser.parse_args()


def show(surface: str, seed: int, index: int, top: Path) -> None:
    """Runs one input and prints all of it."""
    limited()
    box = surfaces.Box(top)
    enter(box)
    record = run_one(surface, seed, index, box, surfaces.pools(seed))
    print("gendiff", *(repr(a) for a in record["args"]))
    print(record.pop("said"))
    print(json.dumps({k: v for k, v in record.items() if k != "args"}))


def run() -> int:
    """Exit code 1 if anything failed."""
    given = arguments()
    out = given.out.resolve()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        top = Path(folder).resolve()
        for name in LOADED:  # once, not in each process; hypothesis's values depend on it
            importlib.import_module(name)
        in_child(prepare, surfaces.Box(top))
        if given.only is not None:
            in_child(show, given.surface, given.seed, given.only, top)
            return 0
        chosen = list(surfaces.SURFACES) if given.surface == "all" else [given.surface]
        out.mkdir(parents=True, exist_ok=True)
        found = {}
        for surface in chosen:
            found[surface] = watched(surface, given.seed, given.inputs, given.seconds, top)
            shutil.copy(top / f"{surface}.jsonl", out)
        if given.processes:
            found["process"] = in_processes(top, given.processes, given.seed)
        text = table(found, given.seed)
        (out / "table.md").write_text(text)
        print(text, end="")
        os.chdir("/")
    return int(any(r["wrong"] for records in found.values() for r in records))


if __name__ == "__main__":
    sys.exit(run())
