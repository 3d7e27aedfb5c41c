"""Does memory grow with a data set? Each modality trains on one, and on one four times as large.

The data are made here: noise in files of the kinds that people have. `gendiff train` runs for a
few steps with an empty cache. The memory that counts is anonymous: what a mapped file takes, the
system takes back when it is short. Peaks are of the command's process while it prepares, of it
with its workers, and while it trains.

    python benchmarks/larger_than_memory.py
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from gendiff import console

MIB = 1 << 20


def pictures(folder: Path, mib: int) -> list[str]:
    """PNG files of 64x64."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(mib * MIB // (64 * 64 * 3)):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((64, 64)).save(folder / f"{i:06d}.png", compress_level=1)
    return ["--modality", "image", "image.data=folder", f"image.path={folder}"]


def sounds(folder: Path, seconds: float) -> None:
    """WAV files of half a minute at 22.05 kHz."""
    import soundfile

    rng = np.random.default_rng(0)
    for i in range(max(2, round(seconds / 30))):
        wave = rng.standard_normal(30 * 22050) / 10
        soundfile.write(folder / f"{i:05d}.wav", wave, 22050)


def speech(folder: Path, mib: int) -> list[str]:
    """Sound whose mels, of 80 bands, take so much."""
    sounds(folder, mib * MIB / (80 * 4) * 256 / 22050)
    return ["--modality", "speech", "speech.data=folder", f"speech.path={folder}"]


def waves(folder: Path, mib: int) -> list[str]:
    """Sound whose samples, of 16 bits, take so much."""
    sounds(folder, mib * MIB / 2 / 22050)
    return ["--modality", "vocoder", f"vocoder.path={folder}"]


def molecules(folder: Path, mib: int) -> list[str]:
    """npz files of molecules of 30 atoms."""
    atoms, count = 30, 20_000
    shape = np.random.default_rng(0).standard_normal((atoms, 3)) + 5 * np.arange(atoms)[:, None]
    for i in range(max(1, round(mib * MIB / (atoms * count * 13)))):
        np.savez(
            folder / f"{i:04d}.npz",
            numbers=np.tile(np.array([6] * 20 + [1] * 10, np.uint8), count),
            positions=np.tile(shape.astype(np.float32), (count, 1)),
            offsets=np.arange(count + 1) * atoms,
            split=np.where(np.arange(count) % 10, 1, 3),
        )
    more = ["molecule.data=files", f"molecule.path={folder}", "molecule.hydrogens=explicit"]
    return ["--modality", "molecule", *more]


MADE: dict[str, Callable[[Path, int], list[str]]] = {
    "image": pictures,
    "speech": speech,
    "vocoder": waves,
    "molecule": molecules,
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modality", nargs="+", choices=MADE, default=list(MADE))
    parser.add_argument("--mib", type=int, default=128, help="of the smaller prepared set")
    args = parser.parse_args()
    rows = []
    for name in args.modality:
        for mib in (args.mib, 4 * args.mib):
            with TemporaryDirectory() as folder:
                rows.append([name, *measured(MADE[name], mib, Path(folder))])
    header = ["modality", "files MiB", "prepared MiB", "preparing", "with workers", "training"]
    header.append("seconds")
    console.table("", header, rows)


def measured(made: Callable[[Path, int], list[str]], mib: int, folder: Path) -> list[str]:
    """A row: sizes, peaks in MiB and time of a training of four steps."""
    (folder / "data").mkdir()
    command = [sys.executable, "-m", "gendiff", "train", *made(folder / "data", mib)]
    command += [
        "train.steps=4",
        "train.batch_size=4",
        "train.sample_every_steps=1000",
        "threads=1",
    ]
    start = time.monotonic()
    run = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"GENDIFF_CACHE": str(folder / "cache")},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    preparing = together = training = 0
    while run.poll() is None:
        held = anonymous(run.pid)
        if any(folder.glob("runs/*/*/run.json")):
            training = max(training, held.get(run.pid, 0))
        else:
            preparing = max(preparing, held.get(run.pid, 0))
            together = max(together, sum(held.values()))
        time.sleep(0.02)
    if run.returncode:
        sys.exit(f"{' '.join(command)} failed")
    sizes = [
        sum(f.stat().st_size for f in (folder / part).rglob("*") if f.is_file())
        for part in ("data", "cache")
    ]
    seconds = time.monotonic() - start
    return [f"{size / MIB:.0f}" for size in (*sizes, preparing, together, training)] + [
        f"{seconds:.0f}"
    ]


def anonymous(session: int) -> dict[int, int]:
    """Bytes of each process of a session that no file stands for."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")")[-1].split()[3]) == session:
                text = (folder / "status").read_text()
                found[int(folder.name)] = int(re.findall(r"RssAnon:\s+(\d+)", text)[0]) << 10
        except (OSError, IndexError, ValueError):  # it has ended
            continue
    return found


if __name__ == "__main__":
    main()
