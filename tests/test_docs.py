"""What the documentation shows runs, and what it names exists."""

from __future__ import annotations

import inspect
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gendiff import hookspecs
from gendiff.modality import Modality
from gendiff.testing import check_modality

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tutorial_s_stand_alone_code_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tutorial.md").read_text(), re.S)
    code = "".join(block for block in blocks if "from gendiff.testing" in block)
    code += "\nassert x.shape == (256, 2) and 0.8 < x[:, 0].abs().mean() < 1.2\n"
    code += "\nassert abs(steered.sum(1).mean() - 3) < 0.05\n"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_principles_code_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/principles.md").read_text(), re.S)
    assert blocks
    done = subprocess.run(
        [sys.executable, "-c", "".join(blocks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_documented_sampler_is_found(tmp_path: Path) -> None:
    """Installed as a package with an entry point, it is a part like the engine's own."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/samplers.md").read_text(), re.S)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/renoise.py").write_text(next(b for b in blocks if "gendiff_parts" in b))
    info = tmp_path / "mine-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[gendiff.plugins]\nrenoise = mine.renoise\n")
    code = """
import torch
from gendiff import Dense, config
from gendiff.noise import Streams
from gendiff.samplers import states
from gendiff.schedules import EDM
from gendiff.testing import ToyModality

given = ["sample.sampler={name: renoise, scale: 0.5}"]
sampler = config.resolve(ToyModality(), overrides=given).sample.sampler
assert config.describe("sampler", sampler) == {"name": "renoise", "scale": 0.5}
args = lambda x, t: 0 * x + 1, Dense((4000, 1)), EDM(80.0), sampler, [1.0, 0.05, 0.0]
first, last = states(*args, Streams(0, tuple(range(4000))))
assert abs(first.x.mean() - 1) < 0.2 and abs(first.x.std() - 0.5 * 4) < 0.2
assert (last.x == 1).all()
try:
    config.build("sampler", {"name": "renoise", "scales": 1})
except ValueError as error:
    assert "Did you mean 'scale'" in str(error), error
"""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"`((?:gendiff|tests|configs|benchmarks|plugins)/[\w./]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_the_contract_and_the_hooks_are_documented() -> None:
    """Each has a row of its own in a table, a hook with its arguments."""
    rows = [line for line in (ROOT / "docs/plugins.md").read_text().splitlines() if "|" in line]
    named = set(re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in rows)))
    contract = {name for name in [*vars(Modality), *Modality.__annotations__] if name[0] != "_"}
    assert named == contract
    bold = set(re.findall(r"\*\*`(\w+)`", " ".join(rows)))
    assert bold == Modality.__abstractmethods__ | {"name", "summary"}
    hooks = [f for f in vars(hookspecs).values() if hasattr(f, "gendiff_spec")]
    for hook in hooks:
        told = f"| `{hook.__name__}({', '.join(inspect.signature(hook).parameters)})` |"
        assert sum(row.startswith(told) for row in rows) == 1, told
    assert len(re.findall(r"^\| `gendiff_", "\n".join(rows), re.M)) == len(hooks)


def test_the_page_of_the_configuration_is_current() -> None:
    for package in ("gendiff_image", "gendiff_molecule", "gendiff_speech"):
        pytest.importorskip(package)
    made = runpy.run_path(str(ROOT / "docs/configuration.py"))["page"]()
    kept = (ROOT / "docs/configuration.md").read_text()
    assert made == kept, "run python docs/configuration.py"
    keys = [row for row in kept.splitlines() if re.match(r"\| `[\w.]+` \|", row)]
    assert len(keys) > 100
    assert [row for row in keys if row.endswith("|  |") and row.count("|") == 5] == []


def test_the_smallest_modality_of_the_docs_keeps_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a package with an entry point, so that its import is light too."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(), re.S)
    assert code is not None
    lines = [line for line in code[1].splitlines() if line.strip()]
    assert len(lines) < 60
    pytest.importorskip("sklearn", reason="the wines are scikit-learn's")
    (tmp_path / "gendiff_wine.py").write_text(code[1])
    info = tmp_path / "gendiff_wine-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gendiff-wine\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[gendiff.modalities]\nwine = gendiff_wine\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    assert len(list(check_modality("wine"))) == 11
