"""The command line as a person meets it: quick, offline, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import gendiff as library
from gendiff.errors import ConfigError, DataError
from gendiff.modality import DataReport
from gendiff.testing import ToyModality

gendiff_image = pytest.importorskip("gendiff_image", reason="pip install -e '.[image]' first")
TINY = [
    "image.channels=8",
    "image.channel_multipliers=[1,1]",
    "image.head_channels=8",
    "image.blocks=1",
    "train.batch_size=8",
    "train.sample_every_steps=0",
    "sample.steps=2",
    "sample.preview=4",
    "train.log_every_steps=2",
]


def gendiff(*args: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "gendiff", *args],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if ok:
        assert done.returncode == 0, done.stderr
    return done


def train(*args: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    return gendiff("train", "--modality", "image", *TINY, *args, cwd=cwd, ok=ok)


def refuses(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """One line on standard error, exit code 2, no traceback."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1, done.stderr
    for part in parts:
        assert part in errors[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train("train.steps=4", "train.checkpoint_every_steps=2", cwd=folder)
    return folder


@pytest.mark.parametrize("command", [["--help"], ["plugins"], ["train", "--help"]])
def test_help_and_plugins_import_no_torch(command: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom gendiff.cli import main\n"
        f"sys.argv = ['gendiff', *{command!r}]\n"
        "try:\n    main()\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_train_sample_evaluate_and_load(trained: Path) -> None:
    run = trained / "runs" / "image" / "default"
    assert (run / "samples" / "step-00000004.png").stat().st_size > 0
    done = gendiff(
        "sample",
        str(run),
        "-n",
        "5",
        "--cond",
        "label=7",
        "--steps",
        "3",
        "--out",
        "pictures",
        "--film",
        cwd=trained,
    )
    assert "5 samples" in done.stdout
    assert sorted(p.name for p in (trained / "pictures").iterdir()) == [
        *(f"{i:05d}.png" for i in range(5)),
        "film.gif",
        "preview.png",
    ]
    with Image.open(trained / "pictures" / "film.gif") as film:
        assert film.size == (256, 256)
    batch = library.load(run).sample(5, cond={"label": 7}, steps=3)
    assert batch.x.shape == (5, 1, 8, 8)
    options = ["-n", "20", "--likelihood", "4", "--ode-steps", "2"]
    done = gendiff("evaluate", str(run), *options, cwd=trained)
    assert "bits/dim" in done.stdout
    result = json.loads((run / "evaluation.json").read_text())
    assert {m["name"] for m in result["measures"]} >= {"frechet_distance", "label_accuracy"}
    assert result["samples"] == 20
    assert result["heldout_likelihood"]["items"] == 4
    assert result["heldout_likelihood"]["bin_width"] == 1 / 8


def here(*args: str) -> Result:
    """A command in this process, which spares it importing torch."""
    from gendiff.cli import main

    return CliRunner().invoke(main, args)


def test_a_fitted_grid_is_printed_as_it_is_given(trained: Path) -> None:
    run = str(trained / "runs" / "image" / "default")
    fit = ["fit-grid", run, "--steps", "3", "-n", "4", "--tries", "12"]
    noisy = here(*fit)
    assert noisy.exit_code == 2
    assert "adds no noise" in noisy.stderr
    free = here(*fit, "--sampler", "adaptive")
    assert free.exit_code == 2
    assert "chooses its times itself" in free.stderr
    done = here(*fit, "--sampler", "dpm++2m")
    options = shlex.split(done.stdout.splitlines()[-1])
    assert options[:5] == ["--sampler", "dpm++2m", "--steps", "3", "--grid"]
    again = here("sample", run, "-n", "2", "--out", str(trained / "fitted"), *options)
    assert "(3 network calls each)" in again.stdout.replace("\n", " ")
    other = here("sample", run, *options, "--steps", "4")
    assert other.exit_code == 2
    assert "Use --steps 3" in other.stderr


def test_calls_are_counted_where_they_are_known_afterwards_only(trained: Path) -> None:
    run, out = str(trained / "runs" / "image" / "default"), trained / "adaptive"
    options = ["-n", "5", "--sampler", "{name: adaptive, tolerance: 0.02}", "--out", str(out)]
    done = here("sample", run, *options, "--steps", "3", "--film")
    assert done.exit_code == 0, done.stderr
    said = re.search(
        r"\((?:on average )?([\d.]+) network calls each\)", " ".join(done.stdout.split())
    )
    assert 9 <= float(said[1]) < 200  # type: ignore[index]
    with Image.open(out / "film.gif") as film:
        assert film.n_frames >= 3
    wrong = here("sample", run, "--sampler", "{name: adaptive, rtol: 0.1}")
    assert wrong.exit_code == 2
    assert "sampler 'adaptive' has no 'rtol'" in wrong.stderr
    never = here("sample", run, "--sampler", "{name: adaptive, tolerance: 1e-9, max_steps: 4}")
    assert never.exit_code == 2
    assert "4 steps did not reach" in never.stderr


def test_guidance_by_its_parts_and_by_an_earlier_step(trained: Path) -> None:
    run = str(trained / "runs" / "image" / "default")
    some = ["-n", "2", "--steps", "3", "--out", str(trained / "guided")]
    limited = here("sample", run, *some, "--guidance", "{scale: 2, interval: [0.1, 3]}")
    calls = int(re.search(r"\((\d+)\s+network", limited.stdout)[1])  # type: ignore[index]
    assert 3 < calls < 6
    assert here("sample", run, *some, "--clip", "{name: dynamic, limit: 1}").exit_code == 0
    done = here("sample", run, *some, "--guide-run", f"{run}@2", "--guidance", "2")
    assert "(6 network calls each)" in done.stdout.replace("\n", " ")
    for wrong, message in (
        (["--guide-run", f"{run}@2"], "--guide-run: at guidance 1"),
        (["--guide-run", f"{run}@3", "--guidance", "2"], "It has 2, 4"),
        (["--guide-run", "nowhere", "--guidance", "2"], "nowhere is not a run"),
        (["--guidance", "{scale: 2, fi: 1}"], "guidance has no 'fi'"),
        (["--clip", "dynamc"], "Did you mean 'dynamic'"),
    ):
        refused = here("sample", run, *some, *wrong)
        assert refused.exit_code == 2
        assert len(refused.stderr.splitlines()) == 1
        assert message in refused.stderr


def test_the_same_command_again_says_that_it_is_done(trained: Path) -> None:
    done = train("train.steps=4", "train.checkpoint_every_steps=2", cwd=trained)
    assert "resumed from" in done.stdout
    assert "step-00000004" in done.stdout


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = train("--dry-run", cwd=tmp_path)
    assert "one step: loss" in done.stdout
    assert not list(tmp_path.iterdir())


def test_config_show_and_check(tmp_path: Path) -> None:
    shown = gendiff("config", "show", "--modality", "image", "train.steps=7", cwd=tmp_path).stdout
    assert "  steps: 7  # optimiser steps" in shown
    (tmp_path / "a.yaml").write_text(shown)  # what is shown is a valid file
    checked = gendiff("config", "check", "--modality", "image", "--config", "a.yaml", cwd=tmp_path)
    assert checked.stdout.strip() == "valid"


def test_doctor_reports_the_plugin(tmp_path: Path) -> None:
    assert "image (gendiff-image" in gendiff("doctor", cwd=tmp_path).stdout


CORES = os.cpu_count() or 1


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--modality", "imge"], ["no modality 'imge'. Did you mean 'image'? Installed: "]),
        (["--modality", "image", "train.step=5"], ["'train.step'", "Did you mean 'train.steps'?"]),
        (["--modality", "image", "train.lr=-1"], ["train.lr: should be greater than 0, got -1"]),
        (["--modality", "image", "--config", "no.yaml"], ["no.yaml: No such file"]),
        (["--modality", "image", "--config", "bad.yaml"], ["bad.yaml, line 1: invalid YAML"]),
        (["--modality", "image", "image.data=folder", "image.path=empty"], ["empty", "data"]),
        (["--modality", "image", "image.data=mnist", "image.path=empty"], ["empty"]),
        (["--modality", "image", "image.data=folder", "image.path=nowhere"], ["nowhere"]),
        (["--modality", "image", "device=meta"], ["device: 'meta' cannot be used here"]),
        (["--modality", "image", "device=tpu"], ["device: 'tpu' cannot be used here"]),
        (["--modality", "image", f"threads={32 * CORES + 1}"], [f"too many for {CORES} cores"]),
        (["--modality", "image", "image.channel_multipliers=[1,1,1,1,1]"], ["not divisible by"]),
        (["--modality", "image", "out=file"], ["cannot be written", "out="]),
    ],
)
def test_bad_input_is_one_line(args: list[str], parts: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("train: [1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    refuses(gendiff("train", *args, cwd=tmp_path, ok=False), *parts)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_truncated_picture_among_many_is_named(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "pictures").mkdir()
    for i in range(30):
        Image.new("L", (8, 8), i).save(tmp_path / "pictures" / f"{i:02d}.png")
    bad = tmp_path / "pictures" / "17.png"
    bad.write_bytes(bad.read_bytes()[:40])
    done = train(
        "image.data=folder", "image.path=pictures", "train.steps=2", cwd=tmp_path, ok=False
    )
    refuses(done, "1 of 30", "17.png", "image.skip_bad=true")
    done = train(
        "image.data=folder",
        "image.path=pictures",
        "image.skip_bad=true",
        "train.steps=2",
        cwd=tmp_path,
    )
    assert "17.png" in done.stderr


def test_an_unwritable_run_folder(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        (tmp_path / "locked").write_text("root may write anywhere, but not below a file")
    else:
        (tmp_path / "locked").mkdir()
        (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    refuses(train("out=locked", cwd=tmp_path, ok=False), "locked", "cannot be written")


def test_a_changed_configuration_lists_its_keys(trained: Path) -> None:
    done = train("train.steps=4", "train.lr=0.5", "image.channels=16", cwd=trained, ok=False)
    refuses(done, "train.lr: ", "-> 0.5", "image.channels: 8 -> 16", "name=")


def test_sampling_what_is_no_run(tmp_path: Path) -> None:
    refuses(gendiff("sample", ".", cwd=tmp_path, ok=False), "is not a run")
    refuses(gendiff("sample", "nowhere", cwd=tmp_path, ok=False), "no such folder")


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--cond", "label=11"], "label"),
        (["--cond", "colour=red"], "colour"),
        (["--sampler", "hein"], "Did you mean 'heun'?"),
        (["--steps", "0"], "sample.steps"),
        (["--sampler", "{name: ddpm, variance: learned}"], "variance head"),
    ],
)
def test_bad_sampling_options(trained: Path, args: list[str], part: str) -> None:
    run = "runs/image/default"
    before = sorted(trained.rglob("*"))
    refuses(gendiff("sample", run, "-n", "2", *args, cwd=trained, ok=False), part)
    assert sorted(trained.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "no such command 'trian'. Did you mean 'train'?"),
        (["plugins", "chek"], "no such command 'chek'. Did you mean 'check'?"),
        (["--debgu"], "no such option '--debgu'. Did you mean '--debug'?"),
        (["train"], "missing option '--modality'. See 'gendiff train --help'"),
        (["train", "--modality"], "option '--modality' requires an argument"),
        (["sample", "r", "-n", "0"], "-n"),
        (["sample"], "missing argument 'RUN'. See 'gendiff sample --help'"),
        (["a\nb"], r"no such command 'a\nb'"),
        (["sample", "a\nb"], r"a\nb is not a run"),
        (["sample", "r", "--seed", "a\nb"], r"'a\nb'"),
        (["config", "check", "--modality", "image", 'image.flip=["a\\nb"]'], r"a\nb"),
        (["config", "check", "--modality", "image", "a\nb=1"], r"'a\nb'"),
        (["config", "check", "--modality", "image", 'sample.sampler="a\\nb"'], r"'a\nb'"),
        (["train", "--modality", "image", "image.data=folder", 'image.path="a\\nb"'], r"a\nb"),
    ],
)
def test_a_misuse_is_told_in_one_line(args: list[str], said: str, tmp_path: Path) -> None:
    from gendiff.cli import main

    done = CliRunner().invoke(main, args, prog_name="gendiff")
    assert done.exit_code == 2
    (line,) = done.stderr.rstrip("\n").split("\n")
    assert line.startswith("error: ")
    assert said in line


def test_every_problem_has_a_line_and_what_it_quotes_adds_none() -> None:
    done = here("config", "check", "--modality", "image", 'image.x="a\\nb"', 'train.lr="a\\nb"')
    assert done.exit_code == 2
    lines = done.stderr.rstrip("\n").split("\n")
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = gendiff("--debug", "sample", "nowhere", cwd=tmp_path, ok=False)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


class Checked(ToyModality):
    """The toy, whose files need a number of decimals that is not 4."""

    name = "checked"

    def check_output(self, config: Any, facts: Any) -> None:
        if config.decimals == 4:
            raise ConfigError("checked.decimals: not 4, please")


def test_how_samples_are_written_is_set_when_sampling(tmp_path: Path) -> None:
    library.register(Checked())
    steps = ["train.steps=2", "train.sample_every_steps=0", "sample.preview=1"]
    train = ["train", "--modality", "checked", f"out={tmp_path}", *steps]
    assert here(*train).exit_code == 0
    resumed = here(*train, "checked.decimals=3")
    assert resumed.exit_code == 0, resumed.stderr
    run, out = str(tmp_path / "checked" / "default"), tmp_path / "files"
    made = ["sample", run, "-n", "2", "--steps", "2", "--out", str(out)]
    found = []
    for options in ([], ["--set", "decimals=1"]):
        done = here(*made, *options)
        assert done.exit_code == 0, done.stderr
        found.append(json.loads((out / "00001.json").read_text())[0])
    fine, coarse = found
    assert fine == [round(value, 3) for value in fine] != coarse
    assert coarse == [round(value, 1) for value in fine]
    for wrong, message in (
        ("decimals=9", "checked.decimals"),
        ("decimals=4", "checked.decimals: not 4, please"),
        ("hidden=8", "--set hidden: cannot be set when sampling. Known: decimals"),
    ):
        refused = here(*made[:-1], str(tmp_path / "none"), "--set", wrong)
        assert refused.exit_code == 2
        assert message in refused.stderr
        assert not (tmp_path / "none").exists()


class Unprepared(ToyModality):
    """The toy, whose data must not be asked for a second time."""

    name = "unprepared"
    prepared = 0

    def prepare(self, config: Any) -> DataReport:
        type(self).prepared += 1
        assert self.prepared < 2, "the data were prepared before the settings were checked"
        return super().prepare(config)


def test_settings_are_checked_before_the_data_are_prepared(tmp_path: Path) -> None:
    library.register(Unprepared())
    train = ["train", "--modality", "unprepared", f"out={tmp_path}", "train.steps=2"]
    train += ["sample.preview=1", "diffusion.cond_dropout=0"]
    assert here(*train).exit_code == 0
    for more, part in (
        (["unprepared.hiden=8"], "Did you mean 'unprepared.hidden'"),
        (["train.lr=1"], "made with another configuration (train.lr: 0.01 -> 1.0)"),
        (["sample.guidance=2"], "sample.guidance: 2 asks for samples without their condition"),
        (["device=cuda:99"], "device: 'cuda:99' cannot be used here"),
    ):
        done = here(*train, *more)
        assert done.exit_code == 2, done.output
        assert part in done.stderr
        assert len(done.stderr.splitlines()) == 1

    run = str(tmp_path / "unprepared" / "default")
    before = sorted(tmp_path.rglob("*"))
    for command in (["sample", run, "-n", "2"], ["evaluate", run], ["distill", run]):
        guide = ["distill.guidance=2"] if command[0] == "distill" else ["--guidance", "2"]
        done = here(*command, *guide)
        assert done.exit_code == 2, done.output
        assert "guidance: 2 asks for samples without their condition" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert here("sample", run, "-n", "2", "--guidance", "2", "--guide-run", run).exit_code == 0


class Wordy(ToyModality):
    """The toy, whose message ends as its author likes."""

    name = "wordy"

    def prepare(self, config: Any) -> DataReport:
        raise DataError("wordy: no data here. Bring some.")


def test_a_plugin_s_message_ends_like_the_engine_s() -> None:
    library.register(Wordy())
    done = here("train", "--modality", "wordy")
    assert done.exit_code == 2
    assert done.stderr == "error: wordy: no data here. Bring some\n"
