"""Killed at a random step and started again with the same command: bit-equal to never killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gendiff import checkpoint, config, runs, train
from gendiff.errors import CheckpointError, ConfigError, NonFiniteError, RunError
from gendiff.testing import ToyModality

STEPS = 60
SCRIPT = """
import sys, time
import torch
torch.set_num_threads(1)
from gendiff import config, runs, train
from gendiff.testing import ToyModality
modality = ToyModality()
resolved = config.resolve(modality, overrides=sys.argv[2:])
run = runs.start(modality, resolved, modality.prepare(resolved.toy).facts)
advance = train.Trainer.advance
def slow(self, parts):
    time.sleep(float(sys.argv[1]))
    return advance(self, parts)
train.Trainer.advance = slow
train.train(run)
"""


KINDS = {
    "dense": ["toy.kind=dense"],
    "ragged": ["toy.kind=ragged"],
    "following the losses": ["diffusion.times={name: loss_second_moment, bins: 4}"],
}


def command(folder: Path, kind: str, delay: float) -> list[str]:
    overrides = [
        f"out={folder}",
        *KINDS[kind],
        f"train.steps={STEPS}",
        "train.checkpoint_every_steps=7",
        "train.sample_every_steps=20",
    ]
    return [sys.executable, "-c", SCRIPT, str(delay), *overrides]


def final_state(folder: Path) -> tuple[dict[str, object], bytes]:
    path = checkpoint.newest(folder / "toy" / "default" / "checkpoints", print)
    assert path is not None
    picture = folder / "toy" / "default" / "samples" / f"step-{STEPS:08d}.png"
    return checkpoint.load_state(path), picture.read_bytes()


def assert_equal(a: object, b: object) -> None:
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a.keys() - {"elapsed"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_equal(left, right)
    elif isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("dense", signal.SIGKILL),
        ("dense", signal.SIGTERM),
        ("ragged", signal.SIGKILL),
        ("ragged", signal.SIGTERM),
        ("following the losses", signal.SIGKILL),
    ],
)
def test_killed_and_resumed_is_bit_equal(tmp_path: Path, kind: str, number: int) -> None:
    subprocess.run(command(tmp_path / "whole", kind, 0), check=True, capture_output=True)
    chance = random.Random(f"{kind} {number}")
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(
            command(tmp_path / "killed", kind, 0.02), stdout=subprocess.PIPE, text=True
        )
        metrics = tmp_path / "killed" / "toy" / "default" / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        deadline = time.monotonic() + 60
        while (
            time.monotonic() < deadline
            and process.poll() is None
            and (not metrics.exists() or metrics.stat().st_size <= before)
        ):
            time.sleep(0.01)  # until it trains
        time.sleep(chance.uniform(0.1, 0.6))
        if process.poll() is None:
            kills += 1
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=60)
        if number == signal.SIGTERM and process.returncode == 0 and "stopped" in out:
            assert "The same command goes on from there" in out
    assert kills, "every process ended before it was killed: the test tested nothing"
    done = subprocess.run(
        command(tmp_path / "killed", kind, 0), check=True, capture_output=True, text=True
    )
    assert "resumed from" in done.stdout
    whole, killed = final_state(tmp_path / "whole"), final_state(tmp_path / "killed")
    assert_equal(whole[0], killed[0])
    assert whole[1] == killed[1]


def make_run(tmp_path: Path, *overrides: str, accept: bool = False) -> runs.Run:
    modality = ToyModality()
    resolved = config.resolve(modality, overrides=[f"out={tmp_path}", *overrides])
    return runs.start(modality, resolved, {"classes": 3}, accept)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_losses_that_times_follow_are_resumed(tmp_path: Path, accumulate: int) -> None:
    """Bit-equal, from a step where they already move the times; a new density starts anew."""
    given = ["diffusion.times={name: loss_second_moment, bins: 4}",
             f"train.accumulate={accumulate}"]  # fmt: skip
    whole = train.Trainer(make_run(tmp_path / "whole", *given))
    assert len(list(whole.steps())) == 20
    first = train.Trainer(make_run(tmp_path / "cut", *given))
    for result in first.steps():
        if result.step == 10:
            break
    times = first.objective.times
    u = first.objective.draw(16, 0, 0)
    assert times.draw(u, first.denoiser.schedule, first.history)[1].std() > 0.01
    path = first.save()
    second = train.Trainer(make_run(tmp_path / "cut", *given))
    second.restore(path)
    assert len(list(second.steps())) == 10
    assert_equal(checkpoint.load_state(whole.save()), checkpoint.load_state(second.save()))
    other = train.Trainer(make_run(tmp_path / "cut", "diffusion.times=uniform", accept=True))
    other.restore(path)
    assert other.history.shape == (0,)


def test_sigterm_saves_and_exits_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(command(tmp_path, "dense", 0.05), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "step 5/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped on request at step" in out
    saved = checkpoint.newest(tmp_path / "toy" / "default" / "checkpoints", print)
    assert saved is not None
    assert 5 <= checkpoint.load_state(saved)["step"] < STEPS


def test_a_damaged_newest_checkpoint_falls_back_and_ends_bit_equal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    assert train.train(run)
    newest = checkpoint.steps(run.checkpoints)[-1]
    reference = checkpoint.load_state(newest)
    (newest / checkpoint.STATE).write_bytes(b"cut off")
    assert train.train(make_run(tmp_path))
    assert "falling back to the one before" in capfd.readouterr().err
    assert_equal(reference, checkpoint.load_state(newest))


def test_a_changed_configuration_is_refused_with_its_keys(tmp_path: Path) -> None:
    train.train(make_run(tmp_path))
    with pytest.raises(RunError) as error:
        make_run(tmp_path, "train.lr=0.5", "toy.hidden=8")
    assert "toy.hidden: 32 -> 8" in str(error.value)
    assert "train.lr: 0.01 -> 0.5" in str(error.value)
    assert "--accept-changes" in str(error.value)
    longer = make_run(tmp_path, "train.steps=25", accept=True)
    assert train.train(longer)
    assert checkpoint.steps(longer.checkpoints)[-1].name == "step-00000025"
    with pytest.raises(CheckpointError, match="does not fit the network"):
        train.train(make_run(tmp_path, "train.steps=30", "toy.hidden=8", accept=True))


def test_metrics_are_rewound_to_the_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    train.train(run)
    log = run.folder / "metrics.jsonl"
    assert [line.split(",")[0] for line in log.read_text().splitlines()] == [
        f'{{"step": {step}' for step in (5, 10, 15, 20)
    ]
    with log.open("a") as file:
        file.write('{"step": 25, "loss"')  # cut short by a kill
    runs.MetricsLog(run.folder, 10)
    assert len(log.read_text().splitlines()) == 2


def test_accumulation_is_a_matter_of_memory_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size=16 cannot be cut into accumulate=3"):
        make_run(tmp_path / "a", "train.accumulate=3")
    run = make_run(tmp_path / "b", "train.accumulate=4")
    trainer = train.Trainer(run)
    result = next(trainer.steps())
    assert result.loss.per_sample.shape == (16,)
    # The parts' times are stratified together: one in each sixteenth.
    objective = trainer.objective
    drawn = torch.cat([objective.draw(4, 0, 0, slot, 4) for slot in range(4)])
    assert (drawn * 16).floor().sort().values.tolist() == list(range(16))


def test_persistent_non_finite_gradients_stop_the_training(tmp_path: Path) -> None:
    trainer = train.Trainer(make_run(tmp_path, "train.steps=100"))
    before = [p.clone() for p in trainer.network.parameters()]
    data = trainer.run.modality.dataset(trainer.run.section, {}, "train")
    batch = trainer.run.modality.collate(trainer.run.section, trainer.run.facts, [data[0, 0]] * 16)
    batch.x.fill_(float("nan"))
    skips = 0
    for _ in range(19):
        skips += trainer.advance([batch]).skipped
    assert skips == 19
    with pytest.raises(NonFiniteError, match="20 times in a row"):
        trainer.advance([batch])
    assert all(
        torch.equal(p, q) for p, q in zip(before, trainer.network.parameters(), strict=True)
    )


def test_data_are_prepared_as_the_run_there_had_them(tmp_path: Path) -> None:
    """A new run, and one whose record is damaged, choose anew."""

    class Choosing(ToyModality):
        def settled(self, config: Any, facts: Any) -> Any:
            return config.model_copy(update={"items": facts["items"]})

    toy = Choosing()
    resolved = config.resolve(toy, (), (f"out={tmp_path}", "device=cpu", "toy.items=20"))
    assert runs.prepare(toy, resolved).summary == "20 toy items, dense"
    run = runs.start(toy, resolved, {"items": 30})
    assert runs.prepare(toy, resolved).summary == "30 toy items, dense"
    (run.folder / "run.json").write_text("{")
    assert runs.prepare(toy, resolved).summary == "20 toy items, dense"
