r"""Distillation by reflow: a student of a run that needs one to four network calls.

A teacher's trajectories from noise z to sample x bend, so that few steps along them miss. Reflow
(Liu et al., 2023, "Flow Straight and Fast", https://arxiv.org/abs/2209.03003, section 2.2) draws
pairs (z, x) once with the teacher's deterministic sampler and trains the same network anew, from
the teacher's weights, on the straight lines between what belongs together:

.. math:: \min_\theta\; \mathbb E_{(z, x),\, t}\; w_t
          \lVert \hat x_\theta(\alpha_t x + \sigma_t \epsilon,\, t) - x \rVert^2, \qquad
          \epsilon = z - \tfrac{\alpha_1}{\sigma_1} x

with t uniform in rectified flow's time and the weight of its velocity. That is the training
objective itself with the noise coupled to the data (:class:`gendiff.Batch`'s ``eps``). In
:math:`x_t / (\alpha_t + \sigma_t)` over that time, every schedule's path is the same straight
line, and DDIM moves along it without error; so the schedule, the prediction and every sampler
stay as they are. Where lines do not cross, the student's only call at t = 1 gives the teacher's
sample, and each further call mends what the network could not tell there.

The teacher's guidance is in its samples: the student is not guided, and is told its condition
always. Its conditions are the training data's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gendiff import checkpoint, config, console, generate, pairs, runs
from gendiff.config import RunConfig
from gendiff.data import VisitOrder, loader
from gendiff.errors import CheckpointError, ConfigError
from gendiff.generate import Model, Wish
from gendiff.noise import Streams, derive_seed
from gendiff.runs import Run
from gendiff.samplers import adds_noise
from gendiff.spaces import Batch
from gendiff.train import stop_flag, train


@dataclass(frozen=True)
class Lesson:
    """A teacher and the configuration of its student."""

    teacher: Model
    config: RunConfig
    fingerprint: str  # of the teacher's weights


def student_of(run: Run, step: int) -> dict[str, Any]:
    """A student's configuration as it is by default: its teacher's, with these changes."""
    base = config.dump(run.config)
    train_steps, lr = run.config.train.steps, run.config.train.lr
    changes = {
        "name": f"{run.config.name}-distilled",
        "out": str(run.folder.parent.parent),
        "diffusion": {"times": "flow", "weight": "flow", "cond_dropout": 0.0, "vlb_weight": 0.0},
        "train": {"steps": max(train_steps // 2, 1), "lr": lr / 2, "lr_decay": "cosine"},
        "sample": {"sampler": "ddim", "grid": "flow", "steps": 4, "guidance": 1.0},
    }
    base["distill"] = {
        "teacher": str(run.folder),
        "checkpoint": step,
        "guidance": base["sample"]["guidance"],
        "batch_size": run.config.sample.batch_size,
    }
    return config.merge(base, changes)


def prepare(folder: Path, files: Sequence[Path] = (), overrides: Sequence[str] = ()) -> Lesson:
    """Loads a teacher and resolves its student's configuration.

    Raises:
        ConfigError: A key is wrong or must be the teacher's, or its sampler is not deterministic.
        CheckpointError: The teacher has no such checkpoint, or its weights do not fit the student.
        RunError, PluginError: The teacher cannot be opened.
    """
    run = runs.load(folder)
    newest = checkpoint.newest(run.checkpoints, console.warn)
    if newest is None:
        raise CheckpointError(f"{run.folder} has no checkpoint yet. Run 'gendiff train' first")
    base = student_of(run, checkpoint.step_of(newest))
    resolved = config.resolve(run.modality, files, overrides, base)
    settings = resolved.distill
    if settings is None:
        raise ConfigError("distill: null leaves nothing to learn from. Leave the key out")
    if runs.folder_of(run.modality, resolved).resolve() == run.folder.resolve():
        raise ConfigError(f"name: '{resolved.name}' is the teacher's own. Give another")
    for key in ("schedule", "prediction", "data_std", "noise_input"):
        if getattr(resolved.diffusion, key) != getattr(run.config.diffusion, key):
            raise ConfigError(f"diffusion.{key}: a student keeps its teacher's. Leave the key out")
    teacher = generate.load(folder, resolved.device, settings.checkpoint)
    generate.check_guidance(run.config, settings.guidance, "distill.guidance")
    path = checkpoint.at(run.checkpoints, settings.checkpoint)
    section = getattr(resolved, run.modality.name)
    student = run.modality.backbone(section, teacher.run.facts)
    generate.restore(student, teacher.network.state_dict(), path)
    if resolved.diffusion.prediction == "eps":
        console.warn(
            "prediction eps says little of x near pure noise, where a student must know all of it "
            "(Salimans & Ho, 2022, section 4). A teacher with edm, v, x or flow serves better"
        )
    times = teacher.times(settings, Wish())
    if adds_noise(settings.sampler, teacher.denoiser.schedule, times):
        raise ConfigError(
            "distill.sampler: it adds noise on the way, and a pair needs a sampler that does not. "
            "Try dpm++2m or heun, without churn"
        )
    return Lesson(teacher, resolved, checkpoint.fingerprint(path))


def make_pairs(lesson: Lesson, run: Run, stop: Callable[[], bool] = lambda: False) -> bool:
    """Makes the pairs that the run lacks; True when all are there, False if stopped.

    Pair i has the space and the condition of visit i of the training data, and its noise is its
    own stream: it depends on the teacher, the settings, the seed and the blocks' size alone.
    """
    teacher, settings = lesson.teacher, run.config.distill
    assert settings is not None
    size, seed = settings.batch_size, derive_seed("pairs", run.config.seed)
    told = settings.model_dump(mode="json", exclude={"teacher", "pairs"})
    origin = json.dumps({"weights": lesson.fingerprint, "seed": seed, **told})
    blocks = range(math.ceil(settings.pairs / size))
    lacking = [b for b in blocks if pairs.made_from(pairs.path(run.pairs, b)) != origin]
    data: Any = run.modality.dataset(run.section, run.facts, "train")
    visits = VisitOrder(len(data), size, seed)
    ids = [tuple(range(b * size, (b + 1) * size)) for b in lacking]
    order = [[visits.key(i) for i in block] for block in ids]
    collate = partial(run.modality.collate, run.section, run.facts)
    schedule = teacher.denoiser.schedule
    with console.progress(len(blocks), len(blocks) - len(lacking), "blocks of pairs") as bar:
        for done, batch in enumerate(loader(data, collate, order)):
            if stop():
                return False
            batch = batch.to(teacher.device)
            streams = Streams(seed, ids[done], teacher.device)
            x = teacher.like(batch, settings, streams)
            eps = pairs.coupled(batch.space.noise(streams, 0), x, batch.space, schedule)
            made = Batch(x, batch.space, batch.cond, eps)
            pairs.save(pairs.path(run.pairs, lacking[done]), made, origin)
            bar(len(blocks) - len(lacking) + done + 1)
    return True


def distill(lesson: Lesson, run: Run) -> bool:
    """Makes the pairs and trains the student; True if complete, False if stopped by a signal."""
    log = run.folder / "log.txt"
    settings = run.config.distill
    assert settings is not None
    calls = generate.said_calls(lesson.teacher.calls(settings))
    console.say(f"{settings.pairs} pairs of {lesson.teacher.name}, {calls} each", log)
    with stop_flag() as stop:
        if not make_pairs(lesson, run, stop):
            console.say("stopped on request. The same command goes on from there", log)
            return False
    return train(run, lesson.teacher.network.state_dict())
