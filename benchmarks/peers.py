"""The peers' environment: made once, away from gendiff's own. ``python benchmarks/peers.py``."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-peers"
REQUIREMENTS = ROOT / "benchmarks" / "peers.txt"


def peers_python(folder: Path = FOLDER, requirements: Path = REQUIREMENTS) -> Path:
    """The interpreter with the packages of a file installed; installs them if missing."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-r", requirements], check=True)
    return python


if __name__ == "__main__":
    print(peers_python())
