"""Reflow: exact where the flow map is known, and a student is a run like any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from oracle_tools import SCHEDULES, SPACES, normal, streams
from torch import Tensor, nn

import gendiff
from gendiff import checkpoint, config, distillation, pairs, runs, train
from gendiff.denoiser import Denoiser
from gendiff.errors import CheckpointError, ConfigError, RunError
from gendiff.grids import FlowTime
from gendiff.noise import Streams
from gendiff.objective import FlowMatching, Objective, UniformFlowTime
from gendiff.samplers import sample
from gendiff.singlestep import DDIM
from gendiff.spaces import Batch, Cond, Space, join
from gendiff.testing import Gaussian, ToyModality


class Affine(nn.Module):
    """x_hat = gain x + bias, with a gain and a bias of its own for each of some noise numbers."""

    def __init__(self, numbers: Tensor, columns: int) -> None:
        super().__init__()
        self.numbers = numbers
        self.gain = nn.Parameter(torch.ones(len(numbers), columns))
        self.bias = nn.Parameter(torch.zeros(len(numbers), columns))

    def forward(self, x: Tensor, noise: Tensor, cond: object, space: Space) -> Tensor:
        at = (noise[:, None] - self.numbers).abs().argmin(1)
        shape = (*space.shape[:1], *[1] * (len(space.shape) - 1))
        row = space.expand(at.double()).expand(space.shape).long().reshape(-1, *space.shape[1:])
        assert row.shape[0] == shape[0]
        column = torch.arange(space.shape[1]).reshape(1, -1, *[1] * (len(space.shape) - 2))
        return self.gain[row, column] * x + self.bias[row, column]


@pytest.mark.parametrize("name", ["flow", "edm", "vp_linear"])
@pytest.mark.parametrize("kind", ["dense", "masked", "ragged_free"])
@pytest.mark.usefixtures("float64")
def test_a_linear_student_reaches_a_gaussian_s_flow_map(name: str, kind: str) -> None:
    """In one step and in two, to 1e-6, where one step of the exact teacher is far off."""
    schedule, space = SCHEDULES[name], replace(SPACES[kind], parts=())
    means = torch.tensor([0.8, -0.3, 0.1, 0.5, -1.0])
    mean = torch.zeros(space.shape) + (means[:, None] if kind == "masked" else means)
    law = Gaussian(schedule, space, space.project(mean), 0.3)
    z = space.noise(streams(space), 0)
    start = schedule.level(1.0).sigma * z
    x = space.project(law.flow(start, 1.0, 0.0))
    batch = Batch(x, space, None, pairs.coupled(z, x, space, schedule))

    two = FlowTime().times(schedule, 2)
    times = torch.tensor(two[:2])
    student = Affine(schedule.log_snr(times) / -8, 5)
    if name == "flow":  # no signal at t = 1: the embedded number is cut off
        student.numbers[0] = 5.0
    denoiser = Denoiser(student, schedule, "x")
    objective = Objective(UniformFlowTime(), FlowMatching())
    optimizer = torch.optim.LBFGS(
        student.parameters(), max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-14,
        tolerance_change=1e-18,
    )  # fmt: skip

    def loss() -> Tensor:
        optimizer.zero_grad()
        eps = batch.eps
        assert eps is not None
        total = sum(
            objective.at(denoiser, batch, t.expand(space.batch_size), eps).mean for t in times
        )
        total.backward()  # type: ignore[union-attr]
        return total  # type: ignore[return-value]

    optimizer.step(loss)

    def error(found: Tensor) -> float:
        return space.mean((found - x).square()).mean().sqrt().item()

    source = streams(space)
    for grid in ([1.0, 0.0], two):
        drawn = sample(denoiser.bind(space), space, schedule, DDIM(), grid, source)
        assert error(drawn) < 1e-6
    teacher = sample(law, space, schedule, DDIM(), [1.0, 0.0], source)
    assert error(teacher) > 0.2


def saved(space: Space, cond: Cond | None) -> Batch:
    return Batch(normal(*space.shape, seed=1), space, cond, normal(*space.shape, seed=2))


@pytest.mark.parametrize("kind", SPACES)
def test_a_block_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    cond = Cond({"label": torch.arange(3), "text": normal(3, 4, 2)}, torch.arange(3) == 1)
    for given in (cond, None):
        batch = saved(SPACES[kind], given)
        file = pairs.path(tmp_path, 0)
        pairs.save(file, batch, "that")
        assert pairs.made_from(file) == "that"
        again = pairs.read(file)
        assert type(again.space) is type(batch.space)
        assert vars(again.space).keys() == vars(batch.space).keys()
        for key, value in vars(batch.space).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(vars(again.space)[key]))
        assert again.eps is not None
        assert torch.equal(again.x, batch.x)
        assert torch.equal(again.eps, saved(SPACES[kind], None).eps)  # type: ignore[arg-type]
        if given is None:
            assert again.cond is None
        else:
            assert again.cond is not None
            assert again.cond.values.keys() == given.values.keys()
            assert torch.equal(again.cond["text"], given["text"])
            assert torch.equal(again.cond.dropped, given.dropped)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SPACES)
def test_the_coupled_noise_goes_where_its_sample_goes(kind: str) -> None:
    batch = saved(SPACES[kind], Cond({"label": torch.arange(3)}))
    batch = replace(batch, x=batch.space.project(batch.x), eps=2 * batch.space.project(batch.x))
    one, two = batch.select([2]), batch.select([0, 1])
    assert one.eps is not None
    assert torch.equal(2 * one.x, one.eps)
    back = join([two, one]).to("cpu")
    assert back.eps is not None
    assert torch.equal(back.x, batch.x)
    assert torch.equal(back.eps, 2 * batch.x)


SMALL = ["threads=1", "train.sample_every_steps=0", "train.log_every_steps=50", "train.lr=2e-2"]


@pytest.fixture(scope="module", autouse=True)
def toy() -> None:
    """A run is opened by its modality's name."""
    gendiff.register(ToyModality())


def teacher_of(folder: Path, *overrides: str) -> runs.Run:
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"out={folder}", *SMALL, *overrides])
    facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    run = runs.start(modality, resolved, facts)
    train.train(run)
    return run


def student_of(
    run: runs.Run, *overrides: str, accept: bool = False
) -> tuple[distillation.Lesson, runs.Run]:
    lesson = distillation.prepare(run.folder, [], overrides)
    return lesson, runs.start(run.modality, lesson.config, run.facts, accept)


@pytest.mark.parametrize("kind", ["kind=masked", "kind=ragged", "types=true"])
def test_a_student_needs_fewer_calls(tmp_path: Path, kind: str) -> None:
    """It is half as far from the teacher's samples as the teacher's own two steps, or nearer."""
    run = teacher_of(tmp_path, f"toy.{kind}", "train.steps=100", "train.batch_size=64")
    lesson, made = student_of(run, "distill.pairs=1024", "train.steps=120", "train.lr=2e-2")
    assert distillation.distill(lesson, made)
    student, teacher = gendiff.load(made.folder), lesson.teacher
    assert made.folder == run.folder.with_name("default-distilled")
    truth = teacher.sample(64, sampler="dpm++2m", grid="flow", steps=32)

    def error(found: Batch) -> float:
        return found.space.mean((found.x - truth.x).square()).mean().sqrt().item()

    direct = error(teacher.sample(64, sampler="ddim", grid="flow", steps=2))
    assert error(student.sample(64, steps=2)) < 0.75 * direct
    assert student.calls(student.settings()) == 4


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    return teacher_of(tmp_path_factory.mktemp("taught"), "toy.kind=ragged", "sample.guidance=2")


def test_a_pair_is_the_teacher_s_guided_sample(taught: runs.Run, tmp_path: Path) -> None:
    """As ``sample`` draws it where space and condition are the same, from the same noise."""
    given = ["distill.batch_size=16", "distill.pairs=4"]
    lesson, made = student_of(taught, f"out={tmp_path}", *given)
    settings = made.config.distill
    assert settings is not None
    assert settings.guidance.scale == 2
    assert made.config.sample.guidance.scale == 1
    assert made.config.diffusion.cond_dropout == 0
    teacher = lesson.teacher
    drawn = teacher.sample(16, seed=5, grid="flow", steps=settings.steps)
    streams = Streams(5, tuple(range(16)))
    assert torch.equal(teacher.like(drawn, settings, streams), drawn.x)
    assert distillation.make_pairs(lesson, made)
    block = pairs.read(pairs.path(made.pairs, 0))
    origin = json.loads(pairs.made_from(pairs.path(made.pairs, 0)) or "")
    again = Streams(origin["seed"], tuple(range(16)))
    assert torch.equal(teacher.like(block, settings, again), block.x)
    data = taught.modality.dataset(taught.section, taught.facts, "train")
    items = pairs.Pairs(made.pairs, 4)
    assert len(items) == 4
    labels = {int(label) for label in block.cond["label"]}  # type: ignore[index]
    assert labels <= {label for _, label in (data[i, 0] for i in range(len(data)))}  # type: ignore[arg-type]


def test_pairs_go_on_where_they_stopped_and_are_made_anew_for_other_settings(
    taught: runs.Run, tmp_path: Path
) -> None:
    given = ["distill.pairs=40", "distill.batch_size=16"]
    lesson, whole = student_of(taught, f"out={tmp_path / 'whole'}", *given)
    assert distillation.make_pairs(lesson, whole)
    _, cut = student_of(taught, f"out={tmp_path / 'cut'}", *given)
    asked = iter([False, True])
    assert not distillation.make_pairs(lesson, cut, lambda: next(asked))
    assert [p.name for p in cut.pairs.iterdir()] == ["000000.safetensors"]
    first = pairs.path(cut.pairs, 0)
    stamp = first.stat().st_mtime_ns
    pairs.path(cut.pairs, 1).write_bytes(b"cut off")
    with pytest.raises(RunError, match="000001.safetensors is missing or damaged"):
        pairs.Pairs(cut.pairs, 40)
    assert distillation.make_pairs(lesson, cut)
    assert first.stat().st_mtime_ns == stamp
    files = sorted(p.name for p in whole.pairs.iterdir())
    assert files == sorted(p.name for p in cut.pairs.iterdir())
    for name in files:
        a, b = pairs.read(whole.pairs / name), pairs.read(cut.pairs / name)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.eps, b.eps)  # type: ignore[arg-type]
    other, cut = student_of(
        taught, f"out={tmp_path / 'cut'}", *given, "distill.steps=3", accept=True
    )
    assert distillation.make_pairs(other, cut)
    assert first.stat().st_mtime_ns != stamp


def test_a_student_s_training_is_resumed_to_the_bit(taught: runs.Run, tmp_path: Path) -> None:
    """It begins as its teacher's average, and what a step learns is a function of its number."""
    given = ["distill.pairs=32", "train.steps=8"]
    lesson, run = student_of(taught, f"out={tmp_path / 'a'}", *given)
    assert distillation.make_pairs(lesson, run)
    weights = lesson.teacher.network.state_dict()

    def trainer() -> train.Trainer:
        new = train.Trainer(run)
        new.begin(weights)
        for module in (new.network, new.ema.module):
            for name, value in module.state_dict().items():
                assert torch.equal(value, weights[name])
        return new

    whole, first = trainer(), trainer()
    assert len(list(whole.steps())) == 8
    for result in first.steps():
        if result.step == 4:
            break
    second = train.Trainer(run)
    second.restore(first.save())
    assert len(list(second.steps())) == 4
    for a, b in zip(whole.network.parameters(), second.network.parameters(), strict=True):
        assert torch.equal(a, b)
    distillation.distill(lesson, run)  # goes on from the checkpoint of step 4
    path = checkpoint.newest(run.checkpoints, print)
    assert path is not None
    for name, value in checkpoint.load_weights(path).items():
        assert torch.equal(value, whole.ema.module.state_dict()[name])


def test_what_cannot_be_distilled_is_said(taught: runs.Run, tmp_path: Path) -> None:
    for wrong, error, message in (
        (["name=default"], ConfigError, "name: 'default' is the teacher's own"),
        (["distill.sampler=ddpm"], ConfigError, "distill.sampler: it adds noise"),
        (["diffusion.schedule=flow"], ConfigError, "diffusion.schedule: a student keeps"),
        (["diffusion.data_std=3"], ConfigError, "diffusion.data_std: a student keeps"),
        (["distill=null"], ConfigError, "nothing to learn from"),
        (["distill.pair=3"], ConfigError, "Did you mean 'distill.pairs'"),
        (["distill.checkpoint=3"], CheckpointError, "no checkpoint of step 3"),
        (["toy.hidden=8"], CheckpointError, "does not fit the network"),
    ):
        with pytest.raises(error, match=message):
            distillation.prepare(taught.folder, [], wrong)
    empty = runs.start(
        taught.modality,
        config.resolve(taught.modality, overrides=[f"out={tmp_path}"]),
        taught.facts,
    )
    with pytest.raises(CheckpointError, match="Run 'gendiff train' first"):
        distillation.prepare(empty.folder)
    assert not (taught.folder.parent / "default-distilled").exists()
    _, run = student_of(taught, f"out={tmp_path / 'none'}")
    with pytest.raises(RunError, match="'gendiff distill' makes the pairs anew"):
        next(train.Trainer(run).steps())


def test_a_teacher_that_predicts_eps_is_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = teacher_of(tmp_path, "diffusion.prediction=eps", "train.steps=1")
    distillation.prepare(run.folder)
    assert "prediction eps says little of x near pure noise" in " ".join(
        capfd.readouterr().err.split()
    )


def test_the_command(taught: runs.Run, tmp_path: Path) -> None:
    from gendiff.cli import main

    def here(*args: str) -> str:
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 0, done.output
        return done.output.replace("\n", " ")

    folder, out = str(taught.folder), f"out={tmp_path}"
    given = [out, "distill.pairs=32", "train.steps=6", "name=quick"]
    said = here("distill", folder, *given)
    assert "20 network calls each" not in said
    assert "40 network calls each" in said  # guided
    student = str(tmp_path / "toy" / "quick")
    assert "resumed from" in here("distill", folder, *given)
    said = here("sample", student, "-n", "3", "--steps", "1", "--out", str(tmp_path / "some"))
    assert "(1 network call each)" in said
    source = str(tmp_path / "some" / "00000.json")
    edited = here("edit", student, source, "--keep", "2", "-n", "2", "--out", str(tmp_path / "e"))
    assert "2 samples" in edited
    assert "4 network calls each" in here("evaluate", student, "-n", "8")
    other = CliRunner().invoke(main, ["distill", folder, *given, "distill.steps=3"])
    assert other.exit_code == 2
    assert "distill.steps: 20 -> 3" in other.output
