"""The four surfaces: each makes the arguments of one command, and the files that it reads."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import files
import hostile
import yaml

from gendiff import checkpoint, config, plugins
from gendiff.cli import main

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "benchmark")
SUITE = """
samples: 4
calls: [2, 3]
guidance: [1, 2]
samplers: [{sampler: dpm++2m, grid: karras}, {sampler: {name: heun, churn: 4.0}}]
entries:
  - modality: toy
    overrides: {train.steps: 2, sample.preview: 2, toy.items: 8}
"""
MODALITIES = ("toy", "image", "molecule", "speech", "vocoder")
SMALL = {
    "toy": ["toy.hidden=8"],
    "image": ["image.channels=4", "image.channel_multipliers=[1]", "image.attention_levels=[]"],
    "molecule": ["molecule.width=8", "molecule.pair_width=4", "molecule.layers=1",
                 "molecule.heads=2", "molecule.data=files"],
    "speech": ["speech.channels=8", "speech.blocks=1", "speech.data=folder"],
    "vocoder": ["vocoder.dim=8", "vocoder.hidden=8", "vocoder.layers=1", "vocoder.frames=16"],
}  # fmt: skip
FEW = ["train.steps=4", "train.batch_size=2", "sample.steps=2", "sample.preview=2", "threads=1"]


@dataclass(frozen=True)
class Box:
    """The sandbox: ``out`` and ``cache`` may be written, all else below ``top`` may not."""

    top: Path

    def __post_init__(self) -> None:
        for name in ("home", "work", "out", "cache", "tmp", "whole"):
            object.__setattr__(self, name, self.top / "a" / "b" / "c" / name)

    home: Path = Path()
    work: Path = Path()
    out: Path = Path()
    cache: Path = Path()
    tmp: Path = Path()
    whole: Path = Path()

    @property
    def writable(self) -> tuple[Path, ...]:
        return self.out, self.cache, self.tmp, self.work / "runs"

    def make(self) -> None:
        for path in (self.home, self.work, self.out, self.cache, self.tmp, self.whole):
            path.mkdir(parents=True)

    def clear(self) -> None:
        """What one input wrote is gone before the next."""
        for path in self.writable:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()


@dataclass(frozen=True)
class Pools:
    """Odd values, and the keys of each modality's configuration."""

    values: list[Any]
    keys: dict[str, list[str]]


def pools(seed: int) -> Pools:
    keys = {}
    for name in MODALITIES:
        model = config.run_config_model(plugins.modality(name))
        keys[name] = [key for key, _ in config.help_lines(model)]
    return Pools(hostile.values(seed), keys)


def make_whole(box: Box, run: Callable[[list[str]], Any]) -> None:
    """Runs that are whole, and data for each modality."""
    for name in ("image", "molecule", "speech", "vocoder"):
        files.MAKERS[name](box.whole / "data" / name)
    for name in MODALITIES:
        given = [*SMALL[name], *FEW, f"out={box.whole / 'runs'}", *_path_of(name, box.whole)]
        if name == "toy":
            given += ["train.ema_widths=[0.1]", "train.ema_snapshot_steps=2",
                      "train.checkpoint_every_steps=2"]  # fmt: skip
        done = run(["train", "--modality", name, *given])
        if done.exit_code:
            raise SystemExit(f"{name}: {done.output}{done.exception!r}")


def _path_of(name: str, folder: Path) -> list[str]:
    return [] if name in ("toy", "image") else [f"{name}.path={folder / 'data' / name}"]


# --- configurations ----------------------------------------------------------------------------


def _mutated(data: Any, dice: random.Random, pool: list[Any]) -> Any:
    """Plain data with one part, wherever it lies, changed, lost or renamed."""
    if isinstance(data, dict) and data and dice.random() < 0.85:
        key = dice.choice(list(data))
        found = dict(data)
        match dice.randrange(8):
            case 0:
                del found[key]
            case 1:
                found[dice.choice(hostile.TEXTS)] = found.pop(key)
            case 2:
                found[dice.choice(hostile.TEXTS)] = dice.choice(pool)
            case _:
                found[key] = _mutated(data[key], dice, pool)
        return found
    return dice.choice(hostile.TEXTS) if dice.random() < 0.3 else dice.choice(pool)


def _yaml_file(dice: random.Random, box: Box, pools: Pools) -> tuple[str, Path]:
    recipe = dice.choice(RECIPES)
    name, text, path = recipe.parent.name, recipe.read_text(), box.out / "given.yaml"
    if dice.random() < 0.1:
        name, text = "benchmark", SUITE
    match dice.randrange(12):
        case 0:
            path = box.out / dice.choice(("missing.yaml", "a" * 300, "folder"))
            (box.out / "folder").mkdir()
        case 1:
            path.write_text(
                dice.choice((hostile.BOMB, "[" * 100_000, "{a: " * 20_000, "- " * 50_000))
            )
        case 2 | 3:
            path.write_bytes(hostile.damaged(text.encode(), dice))
        case 4 | 5:
            path.write_bytes(hostile.damaged_text(text, dice))
        case 6:
            path.write_bytes(dice.randbytes(dice.randrange(200)))
        case 7:
            loop = "&l [*l]" if dice.random() < 0.5 else dice.choice(hostile.TEXTS)
            path.write_bytes(f"train: {loop}\n".encode("utf-8", "surrogatepass"))
        case _:
            data = yaml.safe_load(text)
            for _ in range(dice.randrange(1, 4)):
                data = _mutated(data, dice, pools.values)
            path.write_text(yaml.safe_dump(data))
    return name, path


def _override(dice: random.Random, name: str, pools: Pools) -> str:
    key = dice.choice(pools.keys[name])
    if dice.random() < 0.2:
        key = dice.choice((
            "", ".", key + ".", "." + key, key + ".x", key.replace(".", ".."), key + ".name", "__class__",
            key.upper(), "a.b.c", dice.choice(hostile.TEXTS), ".".join("a" * 5000), key + "\0",
        ))  # fmt: skip
    sign = "=" if dice.random() < 0.97 else dice.choice(("", "==", " = "))
    return key + sign + hostile.odd(dice, (), pools.values)


def _runnable(dice: random.Random, box: Box, pools: Pools) -> list[str]:
    """A training of the toy or of digits with odd settings of all but its paths."""
    name = "toy" if dice.random() < 0.85 else "image"
    paths = {"out", "name", "image.path", "image.download"}
    slow = {"train.steps", "train.workers", "train.compile"}
    keys = [key for key in pools.keys[name] if key not in paths | slow]
    odd = []
    for _ in range(dice.choice((1, 1, 2, 3))):
        key = dice.choice(keys)
        if key.partition(".")[0] in ("diffusion", "sample") and dice.random() < 0.4:
            value = _part(dice, key)
        else:
            value = hostile.odd(
                dice, ("0", "1", "2", "3", "0.5", "true", "1e9", "4096"), pools.values
            )
        odd.append(f"{key}={value}")
    rest = [*SMALL[name], *FEW, f"out={box.out}"]
    return ["train", "--modality", name, *rest, *odd, *dice.choice(([], ["--dry-run"]))]


def _part(dice: random.Random, key: str) -> str:
    """A named part with odd parameters."""
    import dataclasses

    kind = key.rpartition(".")[2]
    try:
        classes = config.registry(kind)
    except KeyError:
        return dice.choice(hostile.TEXTS)
    name = dice.choice(list(classes))
    fields = [field.name for field in dataclasses.fields(classes[name])]
    chosen = dice.sample(fields, min(len(fields), dice.randrange(3)))
    numbers = ("0", "1", "-1", "0.5", ".nan", ".inf", "1e-320", "1e300", "2", "1000000000000", "edm",
               "[]", "[0.5]", "[1, 0]", "[.nan, 1]", "null", "true", "x", "40")  # fmt: skip
    return (
        "{" + ", ".join([f"name: {name}", *(f"{f}: {dice.choice(numbers)}" for f in chosen)]) + "}"
    )


def configs(dice: random.Random, box: Box, pools: Pools) -> list[str]:
    """``config show`` and ``check`` of damaged recipes and overrides, and trainings with them."""
    if dice.random() < 0.06:
        return _runnable(dice, box, pools)
    name, given = dice.choice(MODALITIES), []
    if dice.random() < 0.6:
        name, path = _yaml_file(dice, box, pools)
        if name == "benchmark":
            return ["benchmark", str(path), "--out", str(box.out / "bench")]
        given = ["--config", str(path)]
    given += [_override(dice, name, pools) for _ in range(dice.choice((0, 1, 1, 2, 4)))]
    return ["config", dice.choice(("show", "check")), "--modality", name, *given]


# --- command lines -----------------------------------------------------------------------------


def _commands(
    group: click.Group, before: tuple[str, ...] = ()
) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += _commands(command, (*before, name))
        else:
            found.append(((*before, name), command))
    return found


USUAL = {
    "steps": ["2", "3", "1", "17"], "count": ["2", "3", "17", "64"], "seed": ["0", "1", "7"],
    "guidance": ["1", "2", "{scale: 2, interval: [0.2, 3]}"], "clip": ["static", "none", "dynamic"],
    "batch_size": ["1", "3", "64"], "device": ["cpu", "auto"], "ema_width": ["0.1", "0.2"],
    "share": ["0/2", "1/2", "0/1"], "targets": ["level=0.3", "logp=2"], "noise": ["0.5", "2", "20"],
    "conditions": ["label=1", "label=7", "label=99", "text=hello", "smiles=CCO", "mel=x.npy"],
    "outputs": ["decimals=3", "vocoder=griffin_lim"], "keep": ["2", "0:4,:", "0", "0.1:0.2"],
    "origins": ["label=1"], "modality": ["toy", "image"], "tries": ["0", "2"], "items": ["2"],
    "ode_steps": ["1", "2"], "sampler": ["heun", "ddim", "dpm++2m", "euler", "restart"],
    "grid": ["karras", "flow", "log_snr"], "name": ["toy", "nosuch", "seismic"],
}  # fmt: skip


def commands(dice: random.Random, box: Box, pools: Pools) -> list[str]:
    """Any command with any options, over whole runs."""
    chain, command = dice.choice(_commands(main))
    name = dice.choice(("toy",) * 12 + ("image", "molecule", "vocoder"))
    run = box.out / "runs" / name / "default"
    shutil.copytree(box.whole / "runs" / name / "default", run)
    if dice.random() < 0.5:
        source = box.out / "given.json"
        source.write_text("[[0.1, 0.2, 0.3, 0.4]]")
    else:
        source = dice.choice(sorted(p for p in (box.whole / "data").rglob("*") if p.is_file()))

    def paths(key: str) -> str:
        if key in ("folder", "folders", "guide_run"):
            usual = [str(run)] * 6 + [f"{run}@4", f"{run}@99", str(box.out), str(run / "run.json")]
        elif key == "source":
            usual = [str(source)]
        elif key == "out":  # what is named may be written: nothing else is to be named
            taken = box.out / "taken"
            taken.touch()
            return dice.choice(
                [str(box.out / "made")] * 3 + [str(box.out / "a" / "b"), str(taken)]
            )
        else:
            usual = [str(source), str(box.out / "none.yaml")]
        odd = [t for t in hostile.TEXTS if not t.startswith(("/", "."))]
        return dice.choice(usual) if dice.random() < 0.8 else dice.choice(odd)

    def value(key: str) -> str:
        if key in ("folder", "folders", "guide_run", "source", "out", "files", "suite"):
            return paths(key)
        if key == "overrides":
            return _override(dice, name, pools)
        text = hostile.odd(dice, USUAL.get(key, []), pools.values)
        if key in ("conditions", "targets", "outputs", "origins") and dice.random() < 0.4:
            text = f"{dice.choice(USUAL[key]).partition('=')[0]}={text}"
        return text

    args = list(chain)
    if chain == ("plugins", "new"):
        return [*chain, value("name"), "--folder", str(box.out)]
    dear = {"count": "2", "steps": "2", "tries": "2"}  # or an input takes minutes
    for parameter in command.params:
        key = parameter.name
        if isinstance(parameter, click.Argument):
            if key == "overrides":
                args += [*FEW, f"out={box.out}"] if chain in (("train",), ("distill",)) else []
                args += ["distill.pairs=2"] if chain == ("distill",) else []
                args += [value(key)] if dice.random() < 0.4 else []
            elif dice.random() < 0.97:
                args.append(value(key))
        elif dice.random() < (0.95 if parameter.required else 0.2):
            args.append(parameter.opts[0])
            if not parameter.is_flag:
                args.append(value(key))
        elif key in dear:
            args += [parameter.opts[0], dear[key]]
        elif key == "out":
            args += ["--out", str(box.out / "made")]
    if dice.random() < 0.03:
        args.insert(dice.randrange(len(args)), dice.choice(hostile.TEXTS))
    return args


def installed_command(dice: random.Random, box: Box, pools: Pools) -> list[str]:
    """As :func:`commands`, of what a new process knows: no toy."""
    args = commands(dice, box, pools)
    return ["image" if a == "toy" else a.replace("/toy/", "/image/") for a in args]


# --- data files --------------------------------------------------------------------------------


def data(dice: random.Random, box: Box, pools: Pools) -> list[str]:
    """A dry run over a data set one of whose files is damaged."""
    name = dice.choice(("image", "image", "molecule", "molecule", "speech", "vocoder", "edit"))
    if name == "edit":
        return _edit(dice, box)
    folder = box.out / "data"
    settings = files.DAMAGERS[name](dice, folder, box.whole / "data" / name)
    given = [*SMALL[name], *FEW, f"out={box.out}", f"{name}.path={folder}", *settings]
    return ["train", "--modality", name, "--dry-run", *given]


def _edit(dice: random.Random, box: Box) -> list[str]:
    """A damaged file to be edited, or one of another kind."""
    name = dice.choice(("image", "molecule", "speech"))
    made = box.whole / "data" / dice.choice((name, name, name, "image", "vocoder"))
    source = dice.choice(sorted(p for p in made.rglob("*") if p.is_file()))
    path = box.out / source.name
    path.write_bytes(hostile.damaged(source.read_bytes(), dice))
    how = dice.choice(
        (["--noise", "0.5"], ["--keep", "0:4,:"], ["--keep", "0"], ["--keep", "0.1:0.2"])
    )
    run = box.whole / "runs" / name / "default"
    out = ["--out", str(box.out / "made")]
    return ["edit", str(run), str(path), *how, "-n", "2", "--steps", "2", *out]


# --- run folders -------------------------------------------------------------------------------


class Payload:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return exec, ("import pathlib; pathlib.Path('PWNED').touch()",)


def _forged(path: Path, dice: random.Random) -> None:
    """A pickle that runs code in place of a file of a checkpoint."""
    import pickle

    import torch

    if dice.random() < 0.5:
        path.write_bytes(pickle.dumps(Payload()))
    else:
        torch.save({"step": 4, "network": Payload(), "ema": {}, "optimizer": {}}, path)


def _restated(path: Path, dice: random.Random, pool: list[Any]) -> None:
    """A JSON or YAML file with parts of other kinds."""
    load, dump = (
        (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    )
    text = path.read_text(errors="replace")  # it may have been damaged before
    try:
        changed = _mutated(load(text), dice, pool)
        path.write_text(dump(changed))
    except (ValueError, yaml.YAMLError):  # what JSON cannot say, or what was damaged before
        path.write_bytes(hostile.damaged(text.encode(), dice))


def checkpoints(dice: random.Random, box: Box, pools: Pools) -> list[str]:
    """A command on a run with a damaged file; often with a manifest that says it is whole."""
    name = dice.choice(("toy", "toy", "toy", "image", "molecule", "speech", "vocoder"))
    run = box.out / name / "default"
    shutil.copytree(box.whole / "runs" / name / "default", run)
    for _ in range(dice.choice((1, 1, 1, 2))):
        path = dice.choice(sorted(p for p in run.rglob("*") if p.is_file() and p.suffix != ".png"))
        match dice.randrange(8):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(b"")
            case 2 if path.suffix in (".pt", ".safetensors"):
                _forged(path, dice)
            case 3 | 4 if path.suffix in (".json", ".yaml"):
                _restated(path, dice, pools.values)
            case 5:
                path.unlink()
                path.mkdir()
            case 6:
                path.rename(path.with_name(dice.choice(("step-x", "step-99999999", "x", "lock"))))
            case _:
                path.write_bytes(hostile.damaged(path.read_bytes(), dice))
        if dice.random() < 0.7:
            _sign(path.parent)
    out = ["--out", str(box.out / "made")]
    match dice.randrange(10):
        case 0 | 1 | 2:
            return ["sample", str(run), "-n", "2", "--steps", "2", *out]
        case 3 if name == "toy":
            return ["sample", str(run), "-n", "2", "--ema-width", "0.2", *out]
        case 4 if name == "toy":
            return ["evaluate", str(run), "-n", "4", "--steps", "2"]
        case 5 if name == "toy":
            return ["report", str(run), "-n", "2", "--out", str(box.out / "report.html")]
        case 6:
            return ["distill", str(run), "distill.pairs=2", *FEW]
        case _:
            given = [*SMALL[name], *FEW, f"out={box.out}", *_path_of(name, box.whole)]
            if name == "toy":
                given += ["train.ema_widths=[0.1]", "train.ema_snapshot_steps=2"]
            given += dice.choice(([], ["train.steps=6"]))
            return ["train", "--modality", name, "--accept-changes", *given]


def _sign(folder: Path) -> None:
    """Gives a checkpoint the manifest of what it now holds."""
    if (folder / checkpoint.MANIFEST).is_file():
        manifest = {n: checkpoint._fingerprint(folder / n) for n in checkpoint.files(folder)}
        (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


SURFACES: dict[str, Callable[[random.Random, Box, Pools], list[str]]] = {
    "config": configs,
    "command": commands,
    "data": data,
    "checkpoint": checkpoints,
}
