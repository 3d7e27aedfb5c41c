"""Drawing samples from a model: batched, seeded, reproducible.

Sample i depends on the model, the seed and i. Its noise is its own stream; and because a CPU's
matrix kernels round differently at different batch sizes, on the CPU the network always sees
whole blocks of consecutive ids (:meth:`gendiff.Modality.together`), whatever batch size is asked
for. So sample i is the same to the bit in any company, at one number of threads (the key
``threads``).
On an accelerator batches are of the size asked for, and samples agree up to its rounding.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gendiff import checkpoint, config, console, distributed, ema, runs
from gendiff.config import DrawConfig, RunConfig, SampleConfig
from gendiff.denoiser import Denoiser
from gendiff.editing import Kept, Translated, time_of_noise
from gendiff.errors import CheckpointError, ConfigError, SamplingError, escaped
from gendiff.guidance import Clipped, Guidance, NoClip, autoguidance, classifier_free
from gendiff.modality import Given, Property, Request
from gendiff.noise import Streams
from gendiff.objective import Objective
from gendiff.runs import Run
from gendiff.samplers import adds_noise, make_table, sample, start, states
from gendiff.schedules import Schedule
from gendiff.spaces import Batch, Cond, Space, join
from gendiff.steering import Matched
from gendiff.tables import State
from gendiff.world import from_environment


@dataclass(frozen=True)
class Wish:
    """What samples are to be.

    Args:
        cond: Conditions, as the modality understands them: ``{"label": 7}``.
        toward: Values of differentiable properties of the modality: ``{"logp": 2.0}``.
        source: A file to edit.
        keep: What of the file is kept, in the modality's words.
        noise: How much noise the file gets, as sigma / alpha; None: its part that is not kept
            is made from nothing.
        origin: What the file is, as ``cond`` says it: it is translated from this to ``cond``.
    """

    cond: Mapping[str, Any] = field(default_factory=dict)
    toward: Mapping[str, float] = field(default_factory=dict)
    source: Path | None = None
    keep: str | None = None
    noise: float | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.source is not None and self.keep is None and self.noise is None:
            raise ConfigError("edit: say what to keep (--keep) or how much to change (--noise)")
        if self.origin and self.noise is None:
            raise ConfigError("edit: --from needs the noise through which it goes. Add --noise 20")


@dataclass(frozen=True)
class Model:
    """A network with all that is needed to sample from it.

    Args:
        run: The run that it belongs to.
        network: The backbone, with the weights to use.
        device: Where it lives.
        autocast: Run the network in bfloat16.
        step: The training step of the weights.
        guide: A weaker model, for autoguidance in place of classifier-free guidance.
    """

    run: Run
    network: nn.Module
    device: torch.device
    autocast: bool = False
    step: int = 0
    guide: Model | None = None

    @property
    def name(self) -> str:
        """Run and step."""
        return f"{self.run.folder}@{self.step}"

    def identity(
        self, settings: SampleConfig, seed: int, wish: Wish, ema_width: float | None = None
    ) -> str:
        """All that a sample depends on but its id: equal texts mean equal samples.

        ``ema_width`` is what the model was loaded with.
        """
        parts = [settings.model_dump_json(exclude={"batch_size", "preview"}), str(ema_width)]
        parts += [str(seed), repr(wish)]
        if wish.source is not None and wish.source.is_file():
            parts.append(hashlib.sha256(wish.source.read_bytes()).hexdigest())
        models = [self] if self.guide is None else [self, self.guide]
        for model in models:
            path = checkpoint.at(model.run.checkpoints, model.step)
            parts += [model.name, checkpoint.manifest(path)]
        return "\n".join(parts)

    def guided_by(self, guide: Model) -> Model:
        """This model with a weaker one for autoguidance (Karras et al., 2024).

        Raises:
            SamplingError: The two are not models of the same data.
        """
        for what, ours, theirs in (
            ("modality", self.run.modality.name, guide.run.modality.name),
            ("data", self.run.facts, guide.run.facts),
            ("categories", self.denoiser.categories, guide.denoiser.categories),
        ):
            if ours != theirs:
                raise SamplingError(
                    f"{guide.run.folder} cannot guide {self.run.folder}: its {what} differ. "
                    "Use an earlier step of the same run, or a run on the same data"
                )
        return replace(self, guide=guide)

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

    def times(self, settings: DrawConfig, wish: Wish) -> list[float]:
        """The times at which a sampler stands, from the noise that is asked for.

        Raises:
            SamplingError: There is no such noise.
        """
        schedule = self.denoiser.schedule
        first = 1.0 if wish.noise is None else time_of_noise(schedule, wish.noise)
        return settings.grid.times(schedule, settings.steps, first)

    def calls(self, settings: DrawConfig, wish: Wish = Wish()) -> int | None:
        """Network calls for each sample; None where :meth:`batches` must count them."""
        times = self.times(settings, wish)
        return network_calls(settings, self.denoiser.schedule, times, bool(wish.origin))

    def trajectories(
        self, ids: Sequence[int], settings: SampleConfig, seed: int, wish: Wish
    ) -> Iterator[tuple[Batch, State]]:
        """Every state of one batch of samples, with the batch at that state."""
        given = self._given(Request(ids, seed, wish.cond), wish)
        space, cond = given.batch.space, given.batch.cond
        schedule = self.denoiser.schedule
        denoiser = self._guided(space, cond, settings)
        for name, target in wish.toward.items():
            found = self.property(name)
            denoiser = Matched(denoiser, space, schedule, found.function, target, found.tolerance)
        times = self.times(settings, wish)
        streams = Streams(seed, tuple(ids), self.device)
        if wish.origin:
            self._check_deterministic(settings, times)
            own = self._given(Request(ids, seed, wish.origin), wish).batch
            named = self.denoiser.bind(space, own.cond)
            z = space.noise(streams, 0)  # that of start()
            denoiser = Translated(denoiser, named, space, schedule, given.batch.x, z)
        if given.mask is not None:
            denoiser = Kept(denoiser, space, schedule, given.batch.x, given.mask)
        x = None
        if wish.source is not None:
            x = start(space, schedule, times[0], streams, self._first_estimate(given, wish))
        with self._precision():
            for state in states(denoiser, space, schedule, settings.sampler, times, streams, x):
                yield Batch(state.x, space, cond), state

    def _check_deterministic(self, settings: SampleConfig, times: list[float]) -> None:
        if adds_noise(settings.sampler, self.denoiser.schedule, times):
            raise SamplingError(
                "--from: this sampler adds noise on the way, which the file did not get. Use one "
                "that does not, as dpm++2m, heun or ddim"
            )

    def like(self, batch: Batch, settings: DrawConfig, streams: Streams) -> Tensor:
        """Samples in the space and under the condition of a batch on the model's device."""
        space, schedule = batch.space, self.denoiser.schedule
        self.network.eval()
        denoiser = self._guided(space, batch.cond, settings)
        times = self.times(settings, Wish())
        with self._precision():
            return sample(denoiser, space, schedule, settings.sampler, times, streams)

    def _guided(self, space: Space, cond: Cond | None, settings: DrawConfig) -> Any:
        """The denoiser of one batch, guided and clipped as the settings say."""
        denoiser: Any = self.denoiser.bind(space, cond)
        if settings.guidance.scale != 1 and self.guide is not None:
            denoiser = autoguidance(denoiser, self.guide.denoiser, settings.guidance)
        elif settings.guidance.scale != 1:
            if cond is not None:
                check_guidance(self.run.config, settings.guidance, "guidance")
            denoiser = classifier_free(denoiser, settings.guidance)
        return denoiser if settings.clip == NoClip() else Clipped(denoiser, space, settings.clip)

    def _precision(self) -> AbstractContextManager[Any]:
        if not self.autocast:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _given(self, request: Request, wish: Wish) -> Given:
        """The samples' space and conditions, and what a file says of them."""
        run = self.run
        if wish.source is None:
            space, cond = run.modality.templates(run.section, run.facts, request)
            return Given(Batch(torch.empty(0), space, cond).to(self.device))
        given = run.modality.given(run.section, run.facts, wish.source, wish.keep, request)
        mask = None if given.mask is None else given.mask.to(self.device)
        return Given(given.batch.to(self.device), mask)

    def _first_estimate(self, given: Given, wish: Wish) -> Tensor:
        """The data to which the first noise is added."""
        x, space = given.batch.x, given.batch.space
        if wish.noise is None:  # what is not kept starts from nothing
            assert given.mask is not None
            x = space.hold(torch.zeros_like(x), x, given.mask)
        elif not x.isfinite().all():
            raise ConfigError(
                f"noise: {wish.source} does not say what all of a sample is. Leave --noise out"
            )
        return x

    def property(self, name: str) -> Property:
        """A differentiable property of the modality.

        Raises:
            ConfigError: It has none of this name.
        """
        run = self.run
        return run.modality.property_named(run.section, run.facts, name, runs.cache_folder())

    def film(
        self,
        sample: int,
        settings: SampleConfig,
        seed: int = 0,
        wish: Wish = Wish(),
    ) -> list[Batch]:
        """The estimates of one finished sample on its way, a batch of one for each step."""
        self.network.eval()
        ((block, _),) = self._blocks([sample], 1)
        row = block.index(sample)
        return [
            Batch(state.x_hat, batch.space, batch.cond).select([row]).to("cpu")
            for batch, state in self.trajectories(block, settings, seed, wish)
        ]

    @cached_property
    def block(self) -> int:
        """How many consecutive ids go through the network together on a CPU."""
        return self.run.modality.together(self.run.section, self.run.facts)

    def _blocks(
        self, ids: Sequence[int], batch_size: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Ids that go through the network together, and those of them that are wanted."""
        if self.device.type != "cpu":
            for i in range(0, len(ids), batch_size):
                chunk = list(ids[i : i + batch_size])
                yield chunk, chunk
            return
        for number, group in itertools.groupby(ids, lambda i: i // self.block):
            first = number * self.block
            yield list(range(first, first + self.block)), list(group)

    def batches(
        self,
        ids: Sequence[int],
        settings: SampleConfig,
        seed: int = 0,
        wish: Wish = Wish(),
        poll: Callable[[], None] = lambda: None,
        counts: list[int] | None = None,
    ) -> Iterator[Batch]:
        """The samples of these ids, batch by batch, in order; ``poll`` is called at every step.

        ``counts`` gets the network calls of each sample where :meth:`calls` cannot tell them.
        """
        self.network.eval()
        schedule, extra = self.denoiser.schedule, bool(wish.origin)
        for block, wanted in self._blocks(ids, settings.batch_size):
            batch, asked = None, list[Tensor]()
            for batch, state in self.trajectories(block, settings, seed, wish):
                asked += state.asked
                poll()
            assert batch is not None
            rows = [block.index(i) for i in wanted]
            if asked and counts is not None:
                cost = torch.zeros(len(block), dtype=torch.int64)
                for t in asked:
                    live = ~t.isnan()
                    own = extra + settings.guidance.calls(schedule, t.where(live, t[live][0]))
                    cost += live * own
                counts += cost[rows].tolist()
            yield batch if rows == list(range(len(block))) else batch.select(rows)

    def sample(
        self,
        n: int = 16,
        *,
        steps: int | None = None,
        sampler: Any = None,
        grid: Any = None,
        guidance: Any = None,
        clip: Any = None,
        batch_size: int | None = None,
        seed: int = 0,
        ids: Sequence[int] | None = None,
        cond: Mapping[str, Any] | None = None,
        toward: Mapping[str, float] | None = None,
        source: str | Path | None = None,
        keep: str | None = None,
        noise: float | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> Batch:
        """Draws samples, from nothing or from a file.

        Args:
            n: How many; the ids are 0 … n - 1.
            steps, sampler, grid, guidance, clip, batch_size: In place of the run's settings.
            seed: The seed; sample i is a function of (model, seed, i).
            ids: Which samples, in place of the first n.
            cond, toward, source, keep, noise, origin: What to sample; see :class:`Wish`.

        Returns:
            A batch; ``.x`` is the tensor.

        Raises:
            ConfigError: A setting or a condition is wrong.
            SamplingError: They do not go together.
        """
        settings = self.settings(
            steps=steps,
            sampler=sampler,
            grid=grid,
            guidance=guidance,
            clip=clip,
            batch_size=batch_size,
        )
        chosen = list(range(n)) if ids is None else list(ids)
        if not chosen:
            raise ConfigError("n: at least 1 sample is needed, got 0")
        path = None if source is None else Path(source)
        wish = Wish(cond or {}, toward or {}, path, keep, noise, origin or {})
        return join(list(self.batches(chosen, settings, seed, wish)))


def check_guidance(run: RunConfig, guidance: Guidance, key: str) -> None:
    """Checks that a run's network can guide itself by hiding its condition.

    Raises:
        SamplingError: It never saw its condition hidden; the message begins with ``key``.
    """
    if guidance.scale != 1 and run.diffusion.cond_dropout == 0:
        raise SamplingError(
            f"{key}: {guidance.scale:g} asks for samples without their condition, which this "
            "network never learnt (diffusion.cond_dropout=0). Use guidance 1, or train a run with "
            "diffusion.cond_dropout=0.1"
        )


def network_calls(
    settings: DrawConfig, schedule: Schedule, times: list[float], translated: bool = False
) -> int | None:
    """Network calls for each sample, those of guidance and of a translation among them.

    None where the sampler chooses its steps on the way.
    """
    table = make_table(settings.sampler, schedule, times)
    if table is None:
        return None
    stages = [stage for step in table for stage in step.stages]
    return sum(translated + settings.guidance.calls(schedule, stage.t) for stage in stages)


def mean_calls(known: int | None, counts: Sequence[int]) -> float | None:
    """Network calls a sample: what is known beforehand, else the mean count; None without any."""
    return known if known is not None or not counts else round(statistics.mean(counts), 1)


def said_calls(calls: float | None) -> str:
    """``20 network calls``, ``on average 41.3 network calls``: for a sentence."""
    if calls is None:
        return "as many network calls as the tolerance takes"
    average = "" if calls == int(calls) else "on average "
    return f"{average}{calls:g} network call{'s' * (calls != 1)}"


def make_denoiser(run: Run, network: nn.Module) -> Denoiser:
    """The denoiser of a run's configuration around a network."""
    d = run.config.diffusion
    categories = run.modality.categories(run.section, run.facts)
    return Denoiser(network, d.schedule, d.prediction, d.data_std, d.noise_input, categories)


def make_objective(run: Run) -> Objective:
    """The objective of a run's configuration, with the modality's distance."""
    d = run.config.diffusion
    return Objective(
        d.times,
        d.weight,
        d.stratified,
        d.cond_dropout,
        d.vlb_weight,
        d.vlb_steps,
        d.category_weight,
        run.modality.distance(run.section, run.facts),
        d.distance_weight,
    )


_THREADS_A_CORE = 32


def pick_device(name: str, threads: int = 0) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; sets the CPU's threads where asked to.

    The number of threads is part of what a CPU's bits depend on. Of several processes on a
    machine each takes the GPU of its number.

    Raises:
        ConfigError: There is no such device, or there are more threads than may be started.
    """
    cores = os.cpu_count() or 1
    if threads > _THREADS_A_CORE * cores:  # where the system refuses one, OpenMP ends the process
        raise ConfigError(
            f"threads: {threads} are too many for {cores} cores. Use at most "
            f"{_THREADS_A_CORE * cores}, or 0 for as many as there are cores"
        )
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else ("mps" if torch.backends.mps.is_available() else "cpu")
        )
    if name == "cuda" and (world := from_environment()).size > 1:
        name = f"cuda:{world.local_rank}"
    if threads:
        torch.set_num_threads(threads)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has tensors, and no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: '{escaped(name)}' cannot be used here: {escaped(reason)}. Try device=cpu"
        ) from None
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the network runs in bfloat16: ``auto`` on GPUs that have it."""
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bf16"


def load(
    folder: str | Path,
    device: str | None = None,
    step: int | None = None,
    ema_width: float | None = None,
) -> Model:
    """Loads the newest whole checkpoint of a run, averaged weights, ready to sample.

    Args:
        folder: The run's folder.
        device: In place of the run's.
        step: The checkpoint of this step, in place of the newest.
        ema_width: sigma_rel of a power-function average, made from the run's snapshots up to that
            step, in place of the checkpoint's average.

    Raises:
        RunError, PluginError, ConfigError: The run cannot be opened.
        CheckpointError: It has no whole checkpoint, or the weights do not fit.
    """
    run = runs.load(Path(folder))
    path = checkpoint.newest(run.checkpoints, console.warn)
    if path is None:
        raise CheckpointError(f"{run.folder} has no checkpoint yet. Run 'gendiff train' first")
    if step is not None:
        path = checkpoint.at(run.checkpoints, step)
    with checkpoint.readable(path / checkpoint.WEIGHTS):
        # Not those of run.json: the data may have changed, and that file been damaged, since.
        run = replace(run, facts=dict(json.loads(checkpoint.metadata(path)["facts"])))
    place = pick_device(device or run.config.device, run.config.threads)
    network = run.modality.backbone(run.section, run.facts).to(place).eval().requires_grad_(False)
    at = checkpoint.step_of(path)
    if ema_width is None:
        restore(network, checkpoint.load_weights(path), path)
    else:
        restore(network, ema.reconstruct(run.ema, ema_width, at, network), run.ema)
    return Model(
        run,
        network,
        place,
        use_bf16(run.config.train.precision, place),
        at,
    )


def restore(network: nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Loads weights.

    Raises:
        CheckpointError: They do not fit the network.
    """
    try:
        distributed.load_state(network, weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise CheckpointError(
            f"checkpoint {path} does not fit the network of this configuration: {first[0].strip()}"
        ) from None
