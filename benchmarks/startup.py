"""Whole processes that need no torch, in seconds of wall and CPU time: median of five."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

for command in (["--help"], ["plugins"]):
    wall, cpu = [], []
    for _ in range(5):
        begin, before = time.perf_counter(), os.times()
        subprocess.run(
            [sys.executable, "-m", "gendiff", *command], check=True, stdout=subprocess.DEVNULL
        )
        wall.append(time.perf_counter() - begin)
        cpu.append(sum(os.times()[2:4]) - sum(before[2:4]))
    print(
        f"gendiff {command[0]}: {statistics.median(wall):.2f} s wall, "
        f"{statistics.median(cpu):.2f} s CPU"
    )
