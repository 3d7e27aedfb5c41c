"""Training: plain torch, one generator, and nothing random that is not named by the step.

``Trainer.steps()`` yields after every optimiser step; whoever iterates decides when to log, to
sample, to save and to stop. :func:`train` is the iteration that the command line uses.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gendiff import checkpoint, console, distributed, plugins
from gendiff.config import TrainConfig
from gendiff.data import VisitOrder, loader
from gendiff.ema import EMA, PowerEMA, save_snapshot, snapshots
from gendiff.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    GendiffError,
    NonFiniteError,
    RunError,
    reason,
)
from gendiff.generate import (
    Model,
    check_guidance,
    make_denoiser,
    make_objective,
    pick_device,
    restore,
    said_calls,
    use_bf16,
)
from gendiff.noise import StepNoise, derive_seed
from gendiff.objective import Loss
from gendiff.pairs import Pairs
from gendiff.runs import MetricsLog, Run, locked
from gendiff.spaces import Batch, join

PATIENCE = 20  # non-finite steps in a row after which training stops


class StepResult(NamedTuple):
    """What a step gives to whoever iterates."""

    step: int  # counted from 1: the number of steps done
    loss: Loss  # of this process's samples
    grad_norm: Tensor
    skipped: bool


class Trainer:
    """Network, average, optimiser and data of a run, and the step that moves them.

    In a group of processes (:mod:`gendiff.distributed`) each has a trainer, all do the same
    steps, and each sees its share of every batch. :meth:`model`, :meth:`save` and :meth:`restore`
    are then called in all.

    Args:
        run: The run.

    Raises:
        ConfigError: The device is absent, or the batch cannot be dealt out.
        SamplingError: Its previews ask for guidance that the network will not learn.
    """

    def __init__(self, run: Run) -> None:
        config = run.config.train
        self.run, self.config = run, config
        self.world = distributed.present()
        self.slots = config.accumulate * self.world.size  # parts of a step's batch
        if config.batch_size % self.slots:
            raise ConfigError(
                f"train.batch_size: {config.batch_size} cannot be dealt out to {self.world.size} "
                f"processes in {config.accumulate} parts each. Use a multiple of {self.slots}"
            )
        check_guidance(run.config, run.config.sample.guidance, "sample.guidance")
        self.device = pick_device(run.config.device, run.config.threads)
        self.autocast = use_bf16(config.precision, self.device)
        torch.manual_seed(derive_seed("init", run.config.seed))
        self.network: nn.Module = run.modality.backbone(run.section, run.facts).to(self.device)
        self.ema = EMA(self.network, config.ema_half_life_steps, config.ema_warmup)
        self.power_emas = [PowerEMA(self.network, width) for width in config.ema_widths]
        if config.compile:
            self.network.compile()
        self.caller = self.network  # what the loss calls
        self.sharded = self.world.size > 1 and config.parallel == "fsdp"
        if self.sharded:
            for module in (self.network, self.ema.module, *(e.module for e in self.power_emas)):
                distributed.share_out(module, self.device)
        elif self.world.size > 1:
            self.caller = distributed.average_gradients(self.network)
        self.denoiser = make_denoiser(run, self.caller)
        self.objective = make_objective(run)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.history = self.objective.times.start()
        self.step = 0
        self.elapsed = 0.0
        self.skipped = 0  # non-finite steps in a row
        self.spoilt: set[int] = set()  # items of data that were found to be not finite

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
        """This process's data from the present step on; ``accumulate`` batches make a step.

        Raises:
            DataError: An item cannot be read any more.
        """
        config = self.config
        data, collate = self._source()
        order = self._order(len(data))
        try:
            for batch in loader(data, collate, order, config.workers):
                yield batch.to(self.device)
        except (OSError, DataError) as error:
            raise DataError(f"data cannot be read any more: {reason(error)}") from error

    def _source(self) -> tuple[Any, Callable[[Sequence[Any]], Batch]]:
        """The items to be learnt, and how they become a batch."""
        run = self.run
        if run.config.distill is not None:
            return Pairs(run.pairs, run.config.distill.pairs), join
        data = run.modality.dataset(run.section, run.facts, "train")
        return data, partial(run.modality.collate, run.section, run.facts)

    def _order(self, length: int) -> VisitOrder:
        size, first = self.config.batch_size // self.slots, self.step * self.config.accumulate
        return VisitOrder(length, size, self.run.config.seed, first, self.world)

    def advance(self, parts: list[Batch]) -> StepResult:
        """One optimiser step over this process's parts of a batch."""
        config, seed, step = self.config, self.run.config.seed, self.step
        self.network.train()
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * lr_factor(config, step)
        losses = []
        for index, batch in enumerate(parts):
            slot = index * self.world.size + self.world.rank
            first = slot * batch.space.batch_size  # in the step's whole batch
            torch.manual_seed(derive_seed("step", seed, step, first))  # dropout in the network
            noise = StepNoise(seed, first, self.device, batch.x.dtype)
            last = index == len(parts) - 1
            with nullcontext() if last else distributed.without_talk(self.caller):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    loss = self.objective(
                        self.denoiser,
                        batch,
                        noise,
                        history=self.history,
                        seed=seed,
                        step=step,
                        slot=slot,
                        slots=self.slots,
                    )
                (loss.mean / len(parts)).backward()
            losses.append(loss)
        norm = distributed.whole(
            torch.nn.utils.clip_grad_norm_(self.parameters, config.clip_norm or math.inf)
        )
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
            self.skipped = 0
        else:
            self.skipped += 1
            self._look_for_spoilt_items(parts)
        self.optimizer.zero_grad()
        self.step += 1
        for average in (self.ema, *self.power_emas):
            average.update(self.step)
        if self.skipped >= PATIENCE:
            cure = (
                f"Mend these items of the data: {sorted(self.spoilt)[:10]}"
                if self.spoilt
                else "Lower train.lr, or set train.precision=fp32"
            )
            raise NonFiniteError(
                f"the gradient was not finite {PATIENCE} times in a row, last at step {self.step} "
                f"(visits {step * config.batch_size} to {self.step * config.batch_size - 1}). "
                f"{cure}"
            )
        both = Loss(
            torch.stack([loss.mean.detach() for loss in losses]).mean(),
            torch.cat([loss.per_sample for loss in losses]),
            torch.cat([loss.log_snr for loss in losses]),
            torch.cat([loss.t for loss in losses]),
        )
        if self.history.numel():
            found = self._of_all(both.t), self._of_all(both.per_sample)
            self.history = self.objective.times.record(self.history, *found)
        return StepResult(self.step, both, norm, not finite)

    def _of_all(self, values: Tensor) -> Tensor:
        """The values of all samples of a step, in the order of the whole batch."""
        if self.world.size == 1:
            return values
        parts = distributed.gather(values).unflatten(1, (self.config.accumulate, -1))
        return parts.transpose(0, 1).flatten()

    def _look_for_spoilt_items(self, parts: list[Batch]) -> None:
        """Finds and names the data that made a step not finite, if it was the data."""
        if all(batch.x.isfinite().all() for batch in parts):
            return
        order = iter(self._order(len(self._source()[0])))
        found = set()
        for batch in parts:
            for row, (index, _) in enumerate(next(order)):
                if not batch.select([row]).x.isfinite().all():
                    found.add(index)
        if found - self.spoilt:
            console.warn(
                f"step {self.step + 1} is skipped: items {sorted(found)} of the data hold values "
                "that are not finite"
            )
        self.spoilt |= found

    def model(self) -> Model:
        """The averaged network, ready to sample; of a sharded one, in process 0."""
        network = self.ema.module
        if self.sharded:
            weights = distributed.state_of(network)
            network = self.run.modality.backbone(self.run.section, self.run.facts)
            network.to(self.device).requires_grad_(False)
            if self.world.first:
                network.load_state_dict(weights)
        return Model(self.run, network, self.device, self.autocast, self.step)

    def save(self) -> Path:
        """Writes a checkpoint of the present step.

        Raises:
            CheckpointError: It cannot be written; those before are as they were.
        """
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
            distributed.state_of(self.ema.module),
            metadata,
            self.config.keep_checkpoints,
        )

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Sets out from these weights, and so do the averages; they fit the network."""
        for module in (self.network, *(e.module for e in (self.ema, *self.power_emas))):
            distributed.load_state(module, weights)

    def restore(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            CheckpointError: It does not fit the configuration.
        """
        blank = distributed.blank_like(self.network) if self.sharded else None

        def act() -> None:
            with checkpoint.readable(path / checkpoint.STATE):
                self._restore(checkpoint.load_state(path, blank), path)

        distributed.together(act)

    def _restore(self, state: Mapping[str, Any], path: Path) -> None:
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
            if step > state["step"] and self.world.first:
                snapshot.unlink()
        try:
            distributed.load_optimizer(self.optimizer, state["optimizer"])
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


def train(run: Run, weights: Mapping[str, Tensor] | None = None) -> bool:
    """Trains a run to its last step, or until a signal to any process; True if it is complete.

    Goes on from the newest whole checkpoint; without one, from ``weights`` if given. Logs,
    previews and checkpoints go to the run.

    Raises:
        RunError: Another process trains the run, or its folder cannot be written any more.
        CheckpointError: A checkpoint cannot be read or written.
        DataError: The data cannot be read any more.
        NonFiniteError: See :meth:`Trainer.steps`.
    """
    trainer = Trainer(run)
    with ExitStack() as stack:

        def enter() -> str | None:
            stack.enter_context(locked(run.folder))
            found = checkpoint.newest(run.checkpoints, console.warn)
            return None if found is None else found.name

        name = distributed.by_first(enter)
        if name is not None:
            trainer.restore(run.checkpoints / name)
        elif weights is not None:
            trainer.begin(weights)
        begin = trainer.step
        try:
            return _train(trainer, name)
        except (OSError, DataError) as error:
            raise _told(trainer, begin, error) from error


def _told(trainer: Trainer, begin: int, error: Exception) -> GendiffError:
    """The finished steps are saved where that is still possible; then what is said of an error."""
    step, run = trainer.step, trainer.run
    if trainer.world.size == 1 and step > begin:
        trainer.save()
    saved = checkpoint.steps(run.checkpoints)
    kept = f"{saved[-1].name} is whole" if saved else "there is no checkpoint yet"
    end = f"at step {step}; {kept}, and the same command goes on from there"
    if isinstance(error, DataError):
        return DataError(f"{error} {end}")
    return RunError(f"{run.folder} cannot be written: {reason(error)} {end}")


def _train(trainer: Trainer, resumed: str | None) -> bool:
    run, world, config = trainer.run, trainer.world, trainer.config
    log = run.folder / "log.txt"
    if resumed is not None:
        console.say(f"resumed from {run.checkpoints / resumed}", log)
    size = sum(p.numel() for p in trainer.parameters)
    console.say(
        f"{size:,} parameters, {trainer.device}, "
        f"{'bf16' if trainer.autocast else 'fp32'}, {config.steps} steps of {config.batch_size}"
        + (f", {world.size} processes ({config.parallel})" if world.size > 1 else ""),
        log,
    )
    metrics = MetricsLog(run.folder, trainer.step) if world.first else None
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
                if metrics is not None:
                    metrics.write(step, line)
                console.say(_progress_line(line, step, config.steps), log)
                window, mark = [], (step, trainer.elapsed)
                bar(step, f"loss {line['loss']:.4f}")
            if trainer.power_emas and (last or step % config.ema_snapshot_steps == 0):
                save_snapshot(run.ema, step, trainer.power_emas)
            _preview(trainer, stop)
            stopping = distributed.agree(stop(), trainer.device)
            if last or stopping or step % config.checkpoint_every_steps == 0:
                saved = trainer.save()
                if stopping:
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
    """Means over a window of steps, without those that were skipped, and over all processes.

    The loss also by log-SNR, in bins of width 4.
    """
    done = [r for r in window if not r.skipped] or window
    loss, log_snr = (
        distributed.gather(torch.cat([v.float() for v in values])).flatten()
        for values in ([r.loss.per_sample for r in done], [r.loss.log_snr for r in done])
    )
    bins = {}
    for low in range(-12, 12, 4):
        inside = (log_snr >= low) & (log_snr < low + 4)
        if inside.any():
            bins[f"{low}..{low + 4}"] = round(loss[inside].mean().item(), 6)
    seconds = max(trainer.elapsed - mark[1], 1e-9)
    return {
        "loss": distributed.gather(torch.stack([r.loss.mean for r in done])).mean().item(),
        "grad_norm": torch.stack([r.grad_norm for r in done]).mean().item(),
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
    run, step = trainer.run, trainer.step
    path = run.samples / f"step-{step:08d}.png"
    if step != trainer.config.steps and not _due(step, trainer.config.sample_every_steps):
        return
    model = trainer.model()  # in all processes, which one shard may need
    if stop() or not trainer.world.first:
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
    plugins.observe_preview(str(run.folder), step, str(path))


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
        f"one sample: x {tuple(batch.x.shape)}, {said_calls(model.calls(settings))} at the run's "
        "settings",
    ]
    if trainer.device.type == "cuda":
        lines.append(f"memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    return lines
