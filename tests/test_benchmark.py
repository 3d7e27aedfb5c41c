"""Suites: what is refused, what is skipped, what the table and the plot say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from gendiff import benchmark, plugins
from gendiff.errors import ConfigError
from gendiff.modality import Measure
from gendiff.testing import ToyModality

SUITE = """
samples: 24
calls: [2, 4]
samplers: [{sampler: dpm++2m, grid: karras}, {sampler: heun}]
guidance: [1, 2.0]
entries:
  - modality: toy
    overrides: {out: OUT, toy.items: 60, train.steps: 30, train.sample_every_steps: 0}
  - modality: toy
    overrides: {out: OUT, name: other, toy.kind: ragged, toy.items: 60, train.steps: 5}
    guidance: [1]
    calls: [3]
    samplers: [{sampler: {name: euler, churn: 2.0}}]
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(plugins, "modality", lambda name: ToyModality())
    monkeypatch.setenv("GENDIFF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.yaml"
    path.write_text(SUITE.replace("OUT", str(tmp_path / "runs")))
    return path


def run(path: Path, out: Path) -> Any:
    from gendiff.cli import main

    return CliRunner().invoke(main, ["benchmark", str(path), "--out", str(out)])


def test_a_suite_is_made_once_and_goes_on_where_it_stopped(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    measured = []
    real = benchmark._measured

    def stopping(*args: Any) -> dict[str, Any]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(args[1])
        return real(*args)

    monkeypatch.setattr(benchmark, "_measured", stopping)
    assert run(suite, out).exit_code == 130
    assert len(json.loads((out / "results.json").read_text())["cells"]) == 3
    before = (out / "results.json").read_text()
    monkeypatch.setattr(benchmark, "_measured", lambda *a: (measured.append(a[1]), real(*a))[1])
    done = run(suite, out)
    assert done.exit_code == 0, done.stderr
    cells = json.loads((out / "results.json").read_text())["cells"]
    assert cells[:3] == json.loads(before)["cells"]
    # dpm++2m at 2 and 4 calls, once guided; Heun at 2n - 1, at guidance 2 within 2 and 4 calls
    calls = [cell["network_calls"] for cell in cells]
    assert calls == [2, 4, 2, 4, 1, 3, 2, 3]
    assert len(measured) == len(cells)
    monkeypatch.setattr(benchmark, "_model", None)  # a third time nothing is even loaded
    again = run(suite, out)
    assert again.exit_code == 0, again.stderr
    text = (out / "results.md").read_text()
    shown = again.stdout.splitlines()
    # heun at guidance 2 takes 2 calls a step, so that 2 and 3 stay within 2 and 4
    assert shown[0].split("|")[6:-1] == [" 2 calls ", " 3 calls ", " 4 calls ", " ms a call "]
    assert len(shown[2:7]) == len([row for row in shown if row.startswith("| toy")])
    first = cells[0]["figures"][0]
    assert shown[2].split("|")[4:7] == [
        " frechet_distance ",
        f" {first['floor']:.3g} ",
        f" {first['value']:.3g} ",
    ]
    rows = [row for row in text.splitlines() if row.startswith("| toy")]
    assert len(rows) == len(cells)
    assert "euler(churn=2)" in rows[-1]
    assert "- toy frechet_distance: distance of the fitted" in text
    assert "; seed 0, step 30" in text
    with Image.open(out / "pareto.png") as picture:
        assert picture.width > 400


def test_calls_that_are_known_afterwards_make_one_cell(suite: Path, tmp_path: Path) -> None:
    first = suite.read_text().index("  - modality", suite.read_text().index("  - modality") + 1)
    text = suite.read_text()[:first].replace("train.steps: 30", "train.steps: 5")
    loose, tight = "{name: adaptive, tolerance: 0.1}", "{name: adaptive, tolerance: 0.001}"
    ways = f"samplers: [{{sampler: {loose}}}, {{sampler: {tight}}}]"
    suite.write_text(text.replace(text.splitlines()[3], ways))
    done = run(suite, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    calls = [cell["network_calls"] for cell in cells]
    assert len(calls) == 4  # whatever the suite's calls; each of the two at guidance 1 and 2
    assert 9 <= calls[0] < calls[2]
    assert 18 <= calls[1] < calls[3]
    assert re.search(rf"adaptive\(tolerance=0.1\) .*\| 1 \| {calls[0]} \|", done.stdout)
    assert f" ({calls[3]:g} calls) |" in done.stdout  # beyond the suite's largest budget


def test_cells_say_what_they_are_of(suite: Path, tmp_path: Path) -> None:
    suite.write_text(suite.read_text().replace("guidance: [1, 2.0]", "guidance: [1]"))
    cells = benchmark.benchmark(suite, tmp_path / "out")
    for cell in cells:
        (figure,) = cell["figures"]
        assert figure["name"] == "frechet_distance"
        assert figure["ratio"] == pytest.approx(figure["value"] / figure["floor"])
        assert figure["error"] > 0
        assert cell["seconds_per_sample"] > 0
        if Path("/proc/self/clear_refs").exists():
            assert 50 < cell["peak_memory_mib"] < 20_000
    # another seed, another cell; the first are kept
    suite.write_text(suite.read_text() + "seed: 1\n")
    more = benchmark.benchmark(suite, tmp_path / "out")
    assert [c["key"]["seed"] for c in more] == [1] * len(cells)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    assert len(kept) == 2 * len(cells)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("samples: 24", "sample: 24", ["unknown key 'sample'", "Did you mean 'samples'?"]),
        ("samples: 24", "samples: 3", ["samples: should be greater than or equal to 20, got 3"]),
        ("samples: 24", f"samples: {10**30}", ["should be less than or equal to 100000000"]),
        ("kind: ragged", "kind: rigged", ["toy.kind", "rigged", "entries.1"]),
        ("sampler: heun", "sampler: hein", ["Did you mean 'heun'?", "entries.0"]),
        ("sampler: heun", "samplr: heun", ["samplers.1.sampler"]),
        ("guidance: [1, 2.0]", "guidance: [-1]", ["guidance", "at least 0", "entries.0"]),
        ("    calls: [3]", "    call: [3]", ["entries.1.call", "entries.1.calls"]),
        ("calls: [2, 4]", "calls: [1, 4]", ["calls: 1 are not possible", "entries.0"]),
        ("entries:", "entires:", ["unknown key 'entires'", "Did you mean 'entries'?"]),
        ("train.steps: 30", "train.step: 30", ["Did you mean 'train.steps'?", "entries.0"]),
    ],
)
def test_a_wrong_suite_is_refused_before_anything_is_made(
    suite: Path, tmp_path: Path, old: str, new: str, parts: list[str]
) -> None:
    assert old in suite.read_text()
    suite.write_text(suite.read_text().replace(old, new))
    done = run(suite, tmp_path / "out")
    assert done.exit_code == 2
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "out").exists()


def test_a_trained_run_is_taken_as_it_is(suite: Path, tmp_path: Path) -> None:
    text = (
        "samples: 20\ncalls: [2]\nentries: [{modality: toy, overrides: {out: %s, train.steps: 4}}]"
    )
    suite.write_text(text % tmp_path)
    made = benchmark.benchmark(suite, tmp_path / "out")
    suite.write_text("samples: 20\ncalls: [2]\nentries: [{run: toy/benchmark-small}]")
    assert benchmark.benchmark(suite, tmp_path / "out") == made  # the cell is the same
    for entry, part in (
        ("{run: toy/none}", "toy/none is not a run"),
        ("{run: toy/benchmark-small, modality: toy}", "either modality or run"),
        ("{run: toy/benchmark-small, overrides: {name: x}}", "neither config nor overrides"),
        ("{}", "either modality or run"),
    ):
        suite.write_text(f"samples: 20\ncalls: [2]\nentries: [{entry}]")
        with pytest.raises(ConfigError, match=part):
            benchmark.benchmark(suite, tmp_path / "out")


def test_damaged_results_are_said(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[1")
    done = run(suite, tmp_path)
    assert done.exit_code == 2
    assert "results.json is damaged. Remove it" in done.stderr
    missing = run(tmp_path / "none.yaml", tmp_path)
    assert "none.yaml: No such file" in missing.stderr


def test_ratio_is_above_one_for_what_is_worse() -> None:
    assert benchmark.ratio(Measure("d", 3.0, "lower", 2.0)) == 1.5
    assert benchmark.ratio(Measure("p", 0.5, "higher", 0.9)) == pytest.approx(1.8)
    assert benchmark.ratio(Measure("p", 0.0, "higher", 0.9)) is None
    assert benchmark.ratio(Measure("p", 0.5, "higher")) is None


def test_peak_memory_is_that_of_the_block() -> None:
    device = torch.device("cpu")
    with benchmark.peak_memory(device) as before:
        pass
    if not before:
        pytest.skip("the peak is known on Linux and CUDA alone")
    with benchmark.peak_memory(device) as found:
        torch.ones(100 << 18).sum()  # 100 MiB
    with benchmark.peak_memory(device) as after:
        pass
    assert found[0] - max(before[0], after[0]) > 80


def test_a_suite_s_files_are_seen_from_its_folder(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("train: {steps: 7}")
    suite.write_text(
        suite.read_text().replace("train.steps: 30, ", "") + "    config: [part.yaml]"
    )
    plan = benchmark.plans(benchmark.read(suite), suite)[1]
    assert plan.config.train.steps == 5  # overrides are over files
    text = suite.read_text().replace(", train.steps: 5", "")
    suite.write_text(text)
    assert benchmark.plans(benchmark.read(suite), suite)[1].config.train.steps == 7
    suite.write_text(text.replace("part.yaml", "parts.yaml"))
    with pytest.raises(ConfigError, match="parts.yaml: No such file"):
        benchmark.plans(benchmark.read(suite), suite)


def test_the_default_suite_is_valid() -> None:
    path = Path(__file__).parent.parent / "configs/benchmark/default.yaml"
    suite = benchmark.read(path)
    for entry in suite.entries:
        pytest.importorskip(f"gendiff_{entry.modality}", reason="pip install -e '.[all]' first")
    plans = benchmark.plans(suite, path, "cpu")
    assert [plan.modality.name for plan in plans] == ["image", "speech", "molecule"]
    assert [len(plan.cells) for plan in plans] == [12, 24, 12]
    assert all(cell.calls <= 50 for plan in plans for cell in plan.cells)
