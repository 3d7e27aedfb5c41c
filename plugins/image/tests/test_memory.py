"""Pictures of several times the memory that preparing and reading them may take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MARGIN = 32 << 20
LIMITED = """
import resource, sys
import gendiff_image.folders
from gendiff_image.plugin import ImageModality

gendiff_image.folders._FEW_BYTES = 1 << 40  # here, where the limit is
small, large, margin = sys.argv[1:]
modality = ImageModality()

def first_batch(path):
    config = modality.Config(data="folder", path=path)
    facts = modality.prepare(config).facts
    data = modality.dataset(config, facts, "train")
    batch = modality.collate(config, facts, [data[i, 0] for i in range(2)])
    return len(data), float(batch.x.mean())

first_batch(small)  # what is imported late is no part of the margin
held = [int(l.split()[1]) << 10 for l in open("/proc/self/status") if "VmData" in l][0]
resource.setrlimit(resource.RLIMIT_DATA, (held + int(margin),) * 2)
print(*first_batch(large))
"""


def pictures(folder: Path, count: int) -> Path:
    """Of 768 KiB decoded, some kilobytes in their files."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (count + 32, 8, 3), np.uint8)
    for i in range(count):
        picture = Image.fromarray(noise[i : i + 8]).resize((512, 512), Image.Resampling.NEAREST)
        picture.save(folder / f"{i}.png", compress_level=1)
    return folder


def test_a_folder_may_be_larger_than_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("the limit is Linux's")
    small, large = pictures(tmp_path / "small", 8), pictures(tmp_path / "large", 150)
    environment = {
        **os.environ,
        "GENDIFF_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",  # else malloc keeps what is freed, as it likes
    }
    found = subprocess.run(
        [sys.executable, "-c", LIMITED, str(small), str(large), str(MARGIN)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    count, mean = found.stdout.split()[-2:]
    assert 100 < int(count) < 150
    assert abs(float(mean)) < 0.2
    kept = max(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy"))
    assert kept > 3 * MARGIN
