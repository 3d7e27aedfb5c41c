"""Training: plain torch, one generator, and nothing random that is not named by the step.

``Trainer.steps()`` yields after every optimiser step; whoever iterates decides when to log, to
sample, to save and to stop. :func:`train` is the iteration that the command line uses.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gendiff import checkpoint, console
from gendiff.config import TrainConfig
from gendiff.data import VisitOrder, loader
from gendiff.ema import EMA, PowerEMA, save_snapshot, snapshots
from gendiff.errors import CheckpointError, NonFiniteError
from gendiff.generate import Model, make_denoiser, pick_device, restore, use_bf16
from gendiff.noise import StepNoise, derive_seed
from gendiff.objective import Loss, Objective
from gendiff.runs import MetricsLog, Run
from gendiff.spaces import Batch, join

PATIENCE = 20  # non-finite steps in a row after which training stops


class StepResult(NamedTuple):
    """What a step gives to whoever iterates."""

    step: int  # counted from 1: the number of steps done
    loss: Loss
    grad_norm: Tensor
    skipped: bool


class Trainer:
    """Network, average, optimiser and data of a run, and the step that moves them.

    Args:
        run: The run.

    Raises:
        ConfigError: The device is absent.
    """

    def __init__(self, run: Run) -> None:
        config = run.config.train
        self.run, self.config = run, config
        self.device = pick_device(run.config.device, run.config.threads)
        self.autocast = use_bf16(config.precision, self.device)
        torch.manual_seed(derive_seed("init", run.config.seed))
        self.network: nn.Module = run.modality.backbone(run.section, run.facts).to(self.device)
        self.ema = EMA(self.network, config.ema_half_life_steps, config.ema_warmup)
        self.power_emas = [PowerEMA(self.network, width) for width in config.ema_widths]
        if config.compile:
            self.network.compile()
        self.denoiser = make_denoiser(run, self.network)
        d = run.config.diffusion
        self.objective = Objective(
            d.times,
            d.weight,
            d.stratified,
            d.cond_dropout,
            d.vlb_weight,
            d.vlb_steps,
            d.category_weight,
        )
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.history = d.times.start()
        self.step = 0
        self.elapsed = 0.0
        self.skipped = 0  # non-finite steps in a row

    def steps(self) -> Iterator[StepResult]:
        """Trains from where the trainer stands to the last step.

        Raises:
            NonFiniteError: The gradient was not finite ``PATIENCE`` times in a row.
        """
        batches = self.batches()
        while self.step < self.config.steps:
            begin = time.perf_counter()
            result = self.advance([next(batches) for _ in range(self.config.accumulate)])
            self.elapsed += time.perf_counter() - begin
            yield result

    def batches(self) -> Iterator[Batch]:
        """The data from the present step on; ``accumulate`` batches make a step."""
        config, run = self.config, self.run
        data: Any = run.modality.dataset(run.section, run.facts, "train")
        size = config.batch_size // config.accumulate
        order = VisitOrder(len(data), size, run.config.seed, self.step * config.accumulate)
        collate = partial(run.modality.collate, run.section, run.facts)
        for batch in loader(data, collate, order, config.workers):
            yield batch.to(self.device)

    def advance(self, parts: list[Batch]) -> StepResult:
        """One optimiser step over the parts of a batch."""
        config, seed, step = self.config, self.run.config.seed, self.step
        torch.manual_seed(derive_seed("step", seed, step))  # dropout inside the network
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(config, step)
        losses = []
        for slot, batch in enumerate(parts):
            noise = StepNoise(seed, slot, self.device, batch.x.dtype)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.objective(
                    self.denoiser,
                    batch,
                    noise,
                    history=self.history,
                    seed=seed,
                    step=step,
                    slot=slot,
                    slots=len(parts),
                )
            (loss.mean / len(parts)).backward()
            losses.append(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm or math.inf)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
        self.optimizer.zero_grad()
        self.step += 1
        for average in (self.ema, *self.power_emas):
            average.update(self.step)
        if self.skipped >= PATIENCE:
            raise NonFiniteError(
                f"the gradient was not finite {PATIENCE} times in a row, last at step {self.step} "
                f"(visits {step * config.batch_size} to {self.step * config.batch_size - 1}). "
                "Lower train.lr, or set train.precision=fp32"
            )
        both = Loss(
            torch.stack([loss.mean.detach() for loss in losses]).mean(),
            torch.cat([loss.per_sample for loss in losses]),
            torch.cat([loss.log_snr for loss in losses]),
            torch.cat([loss.t for loss in losses]),
        )
        self.history = self.objective.times.record(self.history, both.t, both.per_sample)
        return StepResult(self.step, both, norm, not finite)

    def model(self) -> Model:
        """The averaged network, ready to sample."""
        return Model(self.run, self.ema.module, self.device, self.autocast, self.step)

    def save(self) -> Path:
        """Writes a checkpoint of the present step."""
        state = {
            "step": self.step,
            "elapsed": self.elapsed,
            "skipped": self.skipped,
            "history": self.history,
            "network": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "power_emas": {str(e.width): e.module.state_dict() for e in self.power_emas},
            "optimizer": self.optimizer.state_dict(),
        }
        metadata = {
            "modality": self.run.modality.name,
            "step": str(self.step),
            "facts": json.dumps(self.run.facts),
        }
        return checkpoint.save(
            self.run.checkpoints,
            self.step,
            state,
            self.ema.module.state_dict(),
            metadata,
            self.config.keep_checkpoints,
        )

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: It does not fit the configuration.
        """
        state = checkpoint.load_state(path)
        restore(self.network, state["network"], path)
        restore(self.ema.module, state["ema"], path)
        for average in self.power_emas:
            if str(average.width) not in state.get("power_emas", {}):
                raise CheckpointError(
                    f"checkpoint {path} has no average of width {average.width:g}. "
                    "Leave train.ema_widths as it was, or give the run a new name"
                )
            restore(average.module, state["power_emas"][str(average.width)], path)
        for step, snapshot in snapshots(self.run.ema).items():
            if step > state["step"]:
                snapshot.unlink()
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit the optimiser: {error}"
            ) from None
        self.step, self.elapsed = state["step"], state["elapsed"]
        self.skipped = state["skipped"]
        history = state.get("history", self.history)  # runs begun before there was one go on
        if history.shape == self.history.shape:  # else the density of times has changed
            self.history = history


def lr_factor(config: TrainConfig, step: int) -> float:
    """The learning rate at a step (from 0), as a share of ``lr``: warm-up times decay."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    progress = step / config.steps
    decay = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return warm * decay[config.lr_decay]


class Stopped(Exception):
    """Raised inside long work when a signal asked to stop."""


@contextmanager
def stop_flag() -> Iterator[Callable[[], bool]]:
    """While inside, SIGTERM and SIGINT set a flag instead of ending the process."""
    asked: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means it
        asked.append(number)

    old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def train(run: Run) -> bool:
    """Trains a run to its last step, or until a signal; True if it is complete.

    Goes on from the newest whole checkpoint. Logs, previews and checkpoints go to the run.
    """
    log = run.folder / "log.txt"
    config = run.config.train
    trainer = Trainer(run)
    path = checkpoint.newest(run.checkpoints, console.warn)
    if path is not None:
        trainer.restore(path)
        console.say(f"resumed from {path}", log)
    size = sum(p.numel() for p in trainer.parameters)
    console.say(
        f"{size:,} parameters, {trainer.device}, "
        f"{'bf16' if trainer.autocast else 'fp32'}, {config.steps} steps of "
        f"{config.batch_size}",
        log,
    )
    metrics = MetricsLog(run.folder, trainer.step)
    window: list[StepResult] = []
    mark = (trainer.step, trainer.elapsed)
    with stop_flag() as stop, console.progress(config.steps, trainer.step, "steps") as bar:
        _preview(trainer, stop)  # a stop may have cut short the preview of the step we resume from
        for result in trainer.steps():
            window.append(result)
            step = result.step
            last = step == config.steps
            if step % config.log_every_steps == 0 or last:
                line = summarise(window, trainer, mark)
                metrics.write(step, line)
                console.say(_progress_line(line, step, config.steps), log)
                window, mark = [], (step, trainer.elapsed)
                bar(step, f"loss {line['loss']:.4f}")
            if trainer.power_emas and (last or step % config.ema_snapshot_steps == 0):
                save_snapshot(run.ema, step, trainer.power_emas)
            _preview(trainer, stop)
            if last or stop() or step % config.checkpoint_every_steps == 0:
                saved = trainer.save()
                if stop():
                    console.say(
                        f"stopped on request at step {step}, saved {saved}. "
                        "The same command goes on from there",
                        log,
                    )
                    return last
    return True


def _due(step: int, every: int) -> bool:
    """At every multiple, and at doublings before the first."""
    return every > 0 and (
        step % every == 0 or (step < every and step >= 100 and step & (step - 1) == 0)
    )


def summarise(
    window: list[StepResult], trainer: Trainer, mark: tuple[int, float]
) -> dict[str, Any]:
    """Means over a window of steps; the loss also by log-SNR, in bins of width 4."""
    loss = torch.cat([r.loss.per_sample for r in window]).float().cpu()
    log_snr = torch.cat([r.loss.log_snr for r in window]).float().cpu()
    bins = {}
    for low in range(-12, 12, 4):
        inside = (log_snr >= low) & (log_snr < low + 4)
        if inside.any():
            bins[f"{low}..{low + 4}"] = round(loss[inside].mean().item(), 6)
    seconds = trainer.elapsed - mark[1]
    return {
        "loss": torch.stack([r.loss.mean for r in window]).mean().item(),
        "grad_norm": torch.stack([r.grad_norm for r in window]).mean().item(),
        "skipped": sum(r.skipped for r in window),
        "lr": trainer.config.lr * lr_factor(trainer.config, trainer.step - 1),
        "samples_per_second": (trainer.step - mark[0]) * trainer.config.batch_size / seconds,
        "elapsed_seconds": trainer.elapsed,
        "loss_by_log_snr": bins,
    }


def _progress_line(line: dict[str, Any], step: int, total: int) -> str:
    left = (total - step) * line["elapsed_seconds"] / max(step, 1)
    text = (
        f"step {step}/{total}  loss {line['loss']:.4f}  {line['samples_per_second']:.0f} "
        f"samples/s  {console.duration(left)} left"
    )
    if line["skipped"]:
        text += f"  {line['skipped']} non-finite steps skipped"
    if torch.cuda.is_available():
        text += f"  {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


def _preview(trainer: Trainer, stop: Callable[[], bool]) -> None:
    """Draws the same samples each time, from the averaged weights, if the step is due for it."""
    run, model, step = trainer.run, trainer.model(), trainer.step
    path = run.samples / f"step-{step:08d}.png"
    due = step == trainer.config.steps or _due(step, trainer.config.sample_every_steps)
    if not due or stop():
        return

    def poll() -> None:
        if stop():
            raise Stopped

    try:
        ids = list(range(run.config.sample.preview))
        batch = join(list(model.batches(ids, run.config.sample, run.config.seed, poll=poll)))
    except Stopped:
        return
    run.modality.preview(run.section, run.facts, batch.to("cpu"), path)


def dry_run(run: Run) -> list[str]:
    """Two steps and one sample without leaving a checkpoint; what was seen, line by line."""
    trainer = Trainer(run)
    batches = trainer.batches()
    parts = [next(batches) for _ in range(run.config.train.accumulate)]
    trainer.advance(parts)  # the first step also pays for what is set up once
    begin = time.perf_counter()
    result = trainer.advance(parts)
    seconds = time.perf_counter() - begin
    size = sum(p.numel() for p in trainer.parameters)
    settings = run.config.sample
    short = settings.model_copy(update={"steps": min(settings.steps, 4), "batch_size": 2})
    model = trainer.model()
    batch = next(iter(model.batches([0, 1], short)))
    # weights, gradients, two moments and the average, 4 bytes each
    lines = [
        f"batch: x {tuple(parts[0].x.shape)} {parts[0].x.dtype}, std "
        f"{parts[0].x.std().item():.3f} (diffusion.data_std={run.config.diffusion.data_std:g})",
        f"network: {size:,} parameters, about {5 * 4 * size / 2**20:.0f} MiB with optimiser and "
        f"average, on {trainer.device}",
        f"one step: loss {result.loss.mean.item():.4f} in {seconds:.2f} s; "
        f"{run.config.train.steps} steps take about "
        f"{console.duration(seconds * run.config.train.steps)}",
        f"one sample: x {tuple(batch.x.shape)}, {model.calls(settings)} network calls at the "
        "run's settings",
    ]
    if trainer.device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return lines
