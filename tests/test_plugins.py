"""Plugins as third parties ship them: distributions of their own, installed with pip."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gendiff import hookimpl, plugins
from gendiff.errors import ConfigError, PluginError
from gendiff.modality import Modality
from gendiff.testing import ToyModality

PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "{package}"
version = "0.3"
[project.entry-points."{group}"]
{entry} = "{module}"
"""
POINTS = '''
"""Points on two rings, written without reading the engine's code."""
import json
import gendiff
from gendiff.modality import DataReport, Measure, Modality, Section
from pydantic import Field


class Config(Section):
    radius: float = Field(1.0, gt=0, description="of the outer ring")


class Points(Modality):
    name = "points"
    summary = "points on two rings"
    Config = Config
    defaults = {"train": {"steps": 20, "batch_size": 16, "log_every_steps": 10},
                "sample": {"steps": 4, "preview": 8}}

    def prepare(self, config):
        return DataReport("512 points", {"count": 512})

    def dataset(self, config, facts, split):
        import math
        class Data:
            def __len__(self):
                return facts["count"]
            def __getitem__(self, key):
                import torch
                angle = key[0] * 2.399963 + (split == "test")
                radius = config.radius * (1 if key[0] % 2 else 0.5)
                return torch.tensor([radius * math.cos(angle), radius * math.sin(angle)])
        return Data()

    def collate(self, config, facts, items):
        import torch
        x = torch.stack(list(items))
        return gendiff.Batch(x, gendiff.Dense(tuple(x.shape)))

    def backbone(self, config, facts):
        import torch
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(),
                                                  torch.nn.Linear(32, 2))
            def forward(self, x, noise, cond, space):
                return self.layers(torch.cat([x, noise[:, None]], 1))
        return Net()

    def templates(self, config, facts, request):
        return gendiff.Dense((len(request.ids), 2)), None

    def write(self, config, facts, batch, folder, ids):
        paths = [folder / f"{i}.json" for i in ids]
        for path, row in zip(paths, batch.x.tolist()):
            path.write_text(json.dumps(row))
        return paths

    def preview(self, config, facts, batch, path):
        path.write_bytes(json.dumps(batch.x.tolist()).encode())
        return path

    def metrics(self, config, facts, samples, cache, seed):
        radius = samples.x.norm(dim=1).mean().item()
        return [Measure("mean_radius", radius, "higher", 0.75 * config.radius)]


@gendiff.hookimpl
def gendiff_modality():
    return Points()
'''


class Environment:
    """A virtual environment that sees this one's packages, so that pip can fill and empty it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.create(folder / "venv", with_pip=False, symlinks=True)
        self.python = folder / "venv" / "bin" / "python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = folder / "venv" / "lib" / version / "site-packages"
        parent = sysconfig.get_paths()["purelib"]
        (site / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n")

    def install(
        self, package: str, module: str, code: str, entry: str, group: str = "gendiff.modalities"
    ) -> None:
        project = self.folder / package
        (project / module).mkdir(parents=True)
        (project / module / "__init__.py").write_text(code)
        (project / "pyproject.toml").write_text(
            PROJECT.format(package=package, module=module, entry=entry, group=group)
            + f'[tool.hatch.build.targets.wheel]\npackages = ["{module}"]\n'
        )
        self.pip("install", "--no-deps", "--no-build-isolation", str(project))

    def pip(self, *args: str) -> None:
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *args]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def gendiff(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.python), "-m", "gendiff", *args],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


def test_a_third_party_modality_is_found_trained_sampled_and_removed(
    environment: Environment,
) -> None:
    environment.install("acme-points", "acme_points", POINTS, "points")
    environment.install(
        "acme-broken", "acme_broken", "raise RuntimeError('half written')", "broken"
    )
    environment.install(
        "acme-extra", "acme_extra", "raise OSError('no such thing')", "extra", "gendiff.plugins"
    )

    listed = environment.gendiff("plugins")
    assert listed.returncode == 0, listed.stderr
    row = next(line for line in listed.stdout.splitlines() if line.startswith("points"))
    assert "acme-points 0.3" in row
    assert "ok" in row
    row = next(line for line in listed.stdout.splitlines() if line.startswith("broken"))
    assert "failed" in row
    assert "half written" in listed.stdout

    checked = environment.gendiff("plugins", "check", "points")
    assert checked.returncode == 0, checked.stderr
    trained = environment.gendiff("train", "--modality", "points", "points.radius=2")
    assert trained.returncode == 0, trained.stderr
    assert "trained: runs/points/default" in trained.stdout
    assert "plugin 'extra' failed to load and is ignored" in trained.stderr
    sampled = environment.gendiff("sample", "runs/points/default", "-n", "3")
    assert sampled.returncode == 0, sampled.stderr
    judged = environment.gendiff("evaluate", "runs/points/default", "-n", "8")
    assert "mean_radius" in judged.stdout, judged.stderr

    refused = environment.gendiff("train", "--modality", "broken")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(
        "error: modality 'broken' (acme-broken 0.3) failed to load: RuntimeError: half written"
    )
    doctor = environment.gendiff("doctor")
    assert doctor.returncode == 1
    assert "Traceback" in doctor.stdout

    environment.pip("uninstall", "-y", "acme-points", "acme-broken", "acme-extra")
    assert "points" not in environment.gendiff("plugins").stdout
    gone = environment.gendiff("sample", "runs/points/default", "-n", "3")
    assert gone.returncode == 2
    assert "no modality 'points'" in gone.stderr


def test_two_packages_of_one_name_are_both_named(environment: Environment) -> None:
    for package in ("twin-a", "twin-b"):
        environment.install(package, package.replace("-", "_"), POINTS, "twin")
    done = environment.gendiff("train", "--modality", "twin")
    assert done.returncode == 2
    assert "modality 'twin' is offered by" in done.stderr
    assert "twin-a 0.3" in done.stderr
    assert "twin-b 0.3" in done.stderr
    environment.pip("uninstall", "-y", "twin-a", "twin-b")


def test_a_plugin_for_a_newer_engine_is_refused_with_the_fix() -> None:
    class Newer(ToyModality):
        name = "newer"
        api_version = 99

    with pytest.raises(PluginError, match="needs plugin API 99.*pip install -U gendiff"):
        plugins.register(Newer())


def test_an_observer_that_fails_is_left_out_and_harms_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    class Broken:
        @hookimpl
        def gendiff_metrics(self, run: str, step: int) -> None:
            raise OSError("the disk is full\nand more")

        @hookimpl
        def gendiff_preview(self, step: int) -> None:
            seen.append(("preview", step))

    class Whole:
        @hookimpl
        def gendiff_metrics(self, step: int, metrics: dict[str, float]) -> None:
            seen.append(("metrics", step))

    monkeypatch.setattr(plugins, "_SILENT", set())
    manager, observers = plugins._extras(), {"broken": Broken(), "whole": Whole()}
    for name, observer in observers.items():
        manager.register(observer, name)
    try:
        for step in (1, 2):
            plugins.observe(str(tmp_path), step, {})
        plugins.observe_preview(str(tmp_path), 2, "none.png")
    finally:
        for observer in observers.values():
            manager.unregister(observer)
    assert seen == [("metrics", 1), ("metrics", 2), ("preview", 2)]
    warnings = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
    assert warnings == [
        "warning: plugin 'broken' failed in gendiff_metrics and is not called there again: "
        "OSError: the disk is full"
    ]


def test_what_is_no_modality_is_refused() -> None:
    class Unfinished(Modality):
        name = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()  # type: ignore[abstract]


@pytest.mark.parametrize("package", ["a new one", "examples/points"])
def test_whole_packages_are_installed_checked_and_trained(
    environment: Environment, package: str
) -> None:
    name, key = ("points", "points.width=16") if "/" in package else ("waves", "waves.hidden=8")
    project = Path(__file__).parent.parent / package
    if name == "waves":
        made = environment.gendiff("plugins", "new", name)
        assert made.returncode == 0, made.stderr
        project = environment.folder / "gendiff-waves"
    environment.pip("install", "--no-deps", "--no-build-isolation", str(project))
    checked = environment.gendiff("plugins", "check", name)
    assert checked.returncode == 0, checked.stderr
    trained = environment.gendiff("train", "--modality", name, "train.steps=20", "out=whole", key)
    assert trained.returncode == 0, trained.stderr
    judged = environment.gendiff("evaluate", f"whole/{name}/default", "-n", "8")
    assert "_accuracy" in judged.stdout, judged.stderr
    environment.pip("uninstall", "-y", f"gendiff-{name}")


def requirements(names: Iterable[str]) -> set[str]:
    """The distributions that these need, and those that these need, as pip would install them."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        need = Requirement(waiting.pop())
        name = canonicalize_name(need.name)
        if name not in found and (need.marker is None or need.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += metadata.requires(name) or []
    return found


def bare(folder: Path, project: Path) -> Environment:
    """A virtual environment that holds gendiff, one plugin, and what the two declare to need.

    gendiff and the plugin are installed in it from wheels. Of what they need, and what that needs,
    the installed packages of this environment are linked in, so that torch is not installed twice;
    nothing else of this environment can be imported there or offers entry points: no other plugin,
    no torchvision, RDKit or pytest. Shared with this environment are the interpreter, the standard
    library, the shared libraries of the system, and the versions of the packages that are linked.
    """
    environment = Environment(folder)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "parent.pth").unlink()
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, "-w", str(wheels), str(root), str(project)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    needed = [
        need
        for path in (root, project)
        for need in tomllib.loads((path / "pyproject.toml").read_text())["project"]["dependencies"]
    ]
    for name in requirements(need for need in needed if need != "gendiff"):
        for file in metadata.distribution(name).files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(metadata.distribution(name).locate_file(top))
    environment.pip("install", "--no-deps", "--no-index", *map(str, wheels.iterdir()))
    return environment


@pytest.mark.parametrize("name", ["points", "waves"])
def test_a_plugin_keeps_its_contract_where_there_is_no_other(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example, and a package as ``gendiff plugins new`` writes it; see :func:`bare`."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    project = Path(__file__).parent.parent / "examples/points"
    if name == "waves":
        project = plugins.write_new(name, tmp_path)
    environment = bare(tmp_path, project)
    absent = [
        "gendiff_image",
        "gendiff_molecule",
        "gendiff_speech",
        "gendiff_tensorboard",
        "torchvision",
    ]
    absent += ["torchaudio", "torch_geometric", "rdkit", "pytest", "hatchling"]
    absent += ["sklearn", "scipy"] if name == "waves" else []
    code = f"from importlib.util import find_spec as f; print([n for n in {absent!r} if f(n)])"
    seen = subprocess.run(
        [str(environment.python), "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert seen.stdout == "[]\n", seen.stderr
    rows = environment.gendiff("plugins").stdout.splitlines()[2:]
    assert [row.split()[0] for row in rows] == [name]
    checked = environment.gendiff("plugins", "check", name)
    assert checked.returncode == 0, checked.stderr
    assert "figures" in checked.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "why"),
    [("3d", "cannot name"), ("train", "cannot name"), ("Shapes", "cannot name"), ("is", "cannot")],
)
def test_a_new_modality_s_name_is_checked(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' {why}"):
        plugins.write_new(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_new_modality_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "gendiff-mine").mkdir()
    with pytest.raises(ConfigError, match="gendiff-mine: is there already"):
        plugins.write_new("mine", tmp_path)
