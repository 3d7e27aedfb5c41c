"""Corpora of several times the memory that preparing and reading them may take."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

MARGIN = 32 << 20
LIMITED = """
import resource, sys
from gendiff_speech import corpora
from gendiff_speech.plugin import SpeechModality
from gendiff_speech.vocoder import VocoderModality

corpora._FEW_BYTES = 1 << 40  # here, where the limit is
kind, small, large, margin = sys.argv[1:]
modality = {"speech": SpeechModality, "vocoder": VocoderModality}[kind]()
more = {"data": "fsdd"} if kind == "speech" else {"convention": "8khz"}

def first_batch(path):
    config = modality.Config(path=path, **more)
    facts = modality.prepare(config).facts
    data = modality.dataset(config, facts, "train")
    batch = modality.collate(config, facts, [data[i, 0] for i in range(0, len(data), 50)])
    return len(data), float(batch.x.std())

first_batch(small)  # what is imported late is no part of the margin
held = [int(l.split()[1]) << 10 for l in open("/proc/self/status") if "VmData" in l][0]
resource.setrlimit(resource.RLIMIT_DATA, (held + int(margin),) * 2)
print(*first_batch(large))
"""


def recordings(folder: Path, count: int) -> Path:
    """A zip of recordings of 10 s each, 156 KiB, in FSDD's names."""
    noise = np.random.default_rng(0).normal(0, 3000, 90_000).astype(np.int16)
    folder.mkdir()
    with zipfile.ZipFile(folder / "recordings.zip", "w") as archive:
        for i in range(count):
            file = io.BytesIO()
            soundfile.write(file, noise[i : i + 80_000], 8000, format="WAV")
            archive.writestr(f"{i % 10}_ann_{i}.wav", file.getvalue())
    return folder


@pytest.mark.parametrize("kind", ["speech", "vocoder"])
def test_a_corpus_may_be_larger_than_memory(kind: str, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the limit is Linux's")
    small, large = recordings(tmp_path / "small", 30), recordings(tmp_path / "large", 640)
    environment = {
        **os.environ,
        "GENDIFF_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",  # else malloc keeps what is freed, as it likes
    }
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(small), str(large), str(MARGIN)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    count, deviation = found.stdout.split()[-2:]
    assert int(count) == {"speech": 635, "vocoder": 608}[kind]
    assert float(deviation) == pytest.approx(1, rel=0.1)
    kept = max(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy"))
    assert kept > 2.9 * MARGIN
