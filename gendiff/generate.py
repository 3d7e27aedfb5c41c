"""Drawing samples from a model: batched, seeded, reproducible.

Sample i depends on the model, the seed and i. Its noise is its own stream; and because a CPU's
matrix kernels round differently at different batch sizes, on the CPU the network always sees
whole blocks of ``BLOCK`` consecutive ids, whatever batch size is asked for. So sample i is the
same to the bit in any company, at one number of threads (the key ``threads``).
On an accelerator batches are of the size asked for, and samples agree up to its rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gendiff import checkpoint, config, console, runs
from gendiff.config import SampleConfig
from gendiff.denoiser import Denoiser
from gendiff.errors import CheckpointError, ConfigError
from gendiff.guidance import ClassifierFree
from gendiff.modality import Request
from gendiff.noise import Streams
from gendiff.runs import Run
from gendiff.samplers import State, network_calls, states
from gendiff.spaces import Batch, join

BLOCK = 16  # rows from which oneDNN's and MKL's kernels treat every row of a batch alike


@dataclass(frozen=True)
class Model:
    """A network with all that is needed to sample from it.

    Args:
        run: The run that it belongs to.
        network: The backbone, with the weights to use.
        device: Where it lives.
        autocast: Run the network in bfloat16.
        step: The training step of the weights.
    """

    run: Run
    network: nn.Module
    device: torch.device
    autocast: bool = False
    step: int = 0

    @property
    def denoiser(self) -> Denoiser:
        """The network as a denoiser under the run's schedule."""
        return make_denoiser(self.run, self.network)

    def settings(self, **changes: Any) -> SampleConfig:
        """The run's sampling settings with changes (those that are not None).

        Raises:
            ConfigError: A value is wrong.
        """
        base = config.dump(self.run.config)
        layer = {"sample": {k: v for k, v in changes.items() if v is not None}}
        sources = {f"sample.{k}": "sampling option" for k in layer["sample"]}
        return config.validate(self.run.modality, config.merge(base, layer), sources).sample

    def calls(self, settings: SampleConfig) -> int:
        """Network calls for each sample."""
        times = settings.grid.times(self.denoiser.schedule, settings.steps)
        calls = network_calls(settings.sampler, self.denoiser.schedule, times)
        return calls * (1 if settings.guidance == 1 else 2)

    def trajectories(
        self, ids: Sequence[int], settings: SampleConfig, seed: int, values: Mapping[str, Any]
    ) -> Iterator[tuple[Batch, State]]:
        """Every state of one batch of samples, with the batch at that state."""
        run = self.run
        space, cond = run.modality.templates(run.section, run.facts, Request(ids, seed, values))
        space = space.to(self.device)
        cond = None if cond is None else cond.to(self.device)
        denoiser: Any = self.denoiser.bind(space, cond)
        if settings.guidance != 1:
            denoiser = ClassifierFree(denoiser, settings.guidance)
        schedule = self.denoiser.schedule
        times = settings.grid.times(schedule, settings.steps)
        streams = Streams(seed, tuple(ids), self.device)
        context = (
            torch.autocast(self.device.type, torch.bfloat16) if self.autocast else (nullcontext())
        )
        with context:
            for state in states(denoiser, space, schedule, settings.sampler, times, streams):
                yield Batch(state.x, space, cond), state

    def film(
        self,
        sample: int,
        settings: SampleConfig,
        seed: int = 0,
        values: Mapping[str, Any] | None = None,
    ) -> list[Batch]:
        """The estimates of one finished sample on its way, a batch of one for each step."""
        self.network.eval()
        ((block, _),) = _blocks([sample], 1, self.device.type == "cpu")
        row = block.index(sample)
        return [
            Batch(state.x_hat, batch.space, batch.cond).select([row]).to("cpu")
            for batch, state in self.trajectories(block, settings, seed, values or {})
        ]

    def batches(
        self,
        ids: Sequence[int],
        settings: SampleConfig,
        seed: int = 0,
        values: Mapping[str, Any] | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> Iterator[Batch]:
        """The samples of these ids, batch by batch, in order; ``poll`` is called at every step."""
        self.network.eval()
        for block, wanted in _blocks(ids, settings.batch_size, self.device.type == "cpu"):
            batch = None
            for batch, _ in self.trajectories(block, settings, seed, values or {}):
                poll()
            assert batch is not None
            rows = [block.index(i) for i in wanted]
            yield batch if rows == list(range(len(block))) else batch.select(rows)

    def sample(
        self,
        n: int = 16,
        *,
        steps: int | None = None,
        sampler: Any = None,
        grid: Any = None,
        guidance: float | None = None,
        batch_size: int | None = None,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        cond: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Draws samples.

        Args:
            n: How many; the ids are 0 … n - 1.
            steps, sampler, grid, guidance, batch_size: In place of the run's settings.
            seed: The seed; sample i is a function of (model, seed, i).
            ids: Which samples, in place of the first n.
            cond: What to sample, as the modality understands it: ``{"label": 7}``.

        Returns:
            A batch; ``.x`` is the tensor.

        Raises:
            ConfigError: A setting or a condition is wrong.
            SamplingError: They do not go together.
        """
        settings = self.settings(
            steps=steps, sampler=sampler, grid=grid, guidance=guidance, batch_size=batch_size
        )
        chosen = list(range(n)) if ids is None else list(ids)
        if not chosen:
            raise ConfigError("n: at least 1 sample is needed, got 0")
        return join(list(self.batches(chosen, settings, seed, cond)))


def _blocks(
    ids: Sequence[int], batch_size: int, fixed: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids that go through the network together, and those of them that are wanted."""
    if not fixed:
        for i in range(0, len(ids), batch_size):
            chunk = list(ids[i : i + batch_size])
            yield chunk, chunk
        return
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] // BLOCK != ids[start] // BLOCK:
            first = ids[start] // BLOCK * BLOCK
            yield list(range(first, first + BLOCK)), list(ids[start:i])
            start = i


def make_denoiser(run: Run, network: nn.Module) -> Denoiser:
    """The denoiser of a run's configuration around a network."""
    d = run.config.diffusion
    categories = run.modality.categories(run.section, run.facts)
    return Denoiser(network, d.schedule, d.prediction, d.data_std, d.noise_input, categories)


def pick_device(name: str, threads: int = 0) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; sets the CPU's threads where asked to.

    The number of threads is part of what a CPU's bits depend on.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else ("mps" if torch.backends.mps.is_available() else "cpu")
        )
    if threads:
        torch.set_num_threads(threads)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: '{name}' cannot be used here: {reason}. Try device=cpu"
        ) from None
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the network runs in bfloat16: ``auto`` on GPUs that have it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def load(folder: str | Path, device: str | None = None) -> Model:
    """Loads the newest whole checkpoint of a run, averaged weights, ready to sample.

    Args:
        folder: The run's folder.
        device: In place of the run's.

    Raises:
        RunError, PluginError, ConfigError: The run cannot be opened.
        CheckpointError: It has no whole checkpoint, or the weights do not fit.
    """
    run = runs.load(Path(folder))
    path = checkpoint.newest(run.checkpoints, console.warn)
    if path is None:
        raise CheckpointError(f"{run.folder} has no checkpoint yet. Run 'gendiff train' first")
    place = pick_device(device or run.config.device, run.config.threads)
    network = run.modality.backbone(run.section, run.facts).to(place).eval().requires_grad_(False)
    restore(network, checkpoint.load_weights(path), path)
    return Model(
        run,
        network,
        place,
        use_bf16(run.config.train.precision, place),
        int(path.name.removeprefix("step-")),
    )


def restore(network: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Loads weights.

    Raises:
        CheckpointError: They do not fit the network.
    """
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"checkpoint {path} does not fit the network of this configuration: {first[0].strip()}"
        ) from None
