"""The command line; bodies import late, so that ``--help`` needs neither torch nor a plugin.

A user's mistake ends with one line and exit code 2; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import click

from gendiff import __version__
from gendiff.errors import ConfigError, GendiffError, explained, printable

MOST = 100_000_000  # samples of a command: their ids are held in memory
SEED = click.IntRange(-(2**63), 2**63 - 1)


class Misuse(click.ClickException):
    """What click says of a command line, in one line that ends with the fix."""

    exit_code = 2

    def __init__(self, error: click.UsageError) -> None:
        said = error.format_message().strip().removesuffix(".")
        if error.ctx is not None and not said.endswith(("?", "?)")):  # a suggestion is the fix
            said += f". See '{error.ctx.command_path} --help'"
        super().__init__(printable(said[:1].lower() + said[1:]))

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file, err=True)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        raise Misuse(error) from None


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM leaves the program by its doors, so that what is half-written is removed.

    While it trains, training has a handler of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Commands(click.Group):
    """Formats errors, and keeps the commands in the order of use.

    What no file, key or option is to blame for (a missing right, a full disk, too little memory)
    is caught here alone.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        with _in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _in_one_line(), _ended_by_sigterm():
                return super().invoke(ctx)
        except (GendiffError, OSError, MemoryError, RuntimeError) as error:
            said = explained(error)
            if said is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            for line in said.split("\n") if said else ():
                text = printable(line).removesuffix(".")  # as a plugin may end it
                click.echo(f"error: {text}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gendiff")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """One diffusion engine for every modality.

    \b
    gendiff train --modality NAME            train on its embedded data
    gendiff sample runs/NAME/default -n 64   draw samples
    gendiff evaluate runs/NAME/default       judge them
    """


def _overridable(function: Any) -> Any:
    for decorator in (
        click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]..."),
        click.option(
            "--config",
            "files",
            multiple=True,
            type=click.Path(path_type=Path),
            help="A YAML file; may be given again, later ones win.",
        ),
        click.option("--modality", required=True, help="What to generate; see 'gendiff plugins'."),
    ):
        function = decorator(function)
    return function


@main.command()
@_overridable
@click.option("--dry-run", is_flag=True, help="Check everything, do one step, leave nothing.")
@click.option("--accept-changes", is_flag=True, help="Resume although the configuration changed.")
def train(
    modality: str,
    files: tuple[Path, ...],
    overrides: tuple[str, ...],
    dry_run: bool,
    accept_changes: bool,
) -> None:
    """Train; the same command again goes on where it stopped.

    \b
    gendiff train --modality NAME --config my.yaml train.lr=1e-3
    gendiff train --modality NAME train.steps=500 name=short
    """
    from gendiff import config, console, plugins

    chosen = plugins.modality(modality)
    resolved = config.resolve(chosen, files, overrides)
    from gendiff import distributed, generate, runs
    from gendiff import train as training

    # What is wrong with device and settings is said before minutes of work on the data.
    device = generate.pick_device(resolved.device, resolved.threads)
    generate.check_guidance(resolved, resolved.sample.guidance, "sample.guidance")
    if not (dry_run or accept_changes):
        runs.check_unchanged(chosen, resolved)
    with distributed.joined(device) as world:
        console.out.quiet = not world.first
        report = distributed.one_before_the_others(lambda: runs.prepare(chosen, resolved))
        console.say(f"data: {report.summary}")
        for line in report.warnings if world.first else ():
            console.warn(line)
        if dry_run:
            run = runs.Run(runs.folder_of(chosen, resolved), chosen, resolved, report.facts)
            for line in training.dry_run(run):
                console.say(line)
            console.say("dry run: all is well, nothing was written")
            return
        run = runs.start(chosen, resolved, report.facts, accept_changes)
        complete = training.train(run)
    if complete:
        console.say(f"trained: {run.folder}")
        pictures = sorted(run.samples.glob("step-*.png"))
        if pictures:
            console.say(f"newest preview: {pictures[-1]}")


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--config",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A YAML file; may be given again, later ones win.",
)
@click.option("--accept-changes", is_flag=True, help="Resume although the configuration changed.")
def distill(
    folder: Path, overrides: tuple[str, ...], files: tuple[Path, ...], accept_changes: bool
) -> None:
    """Train a student that samples in 1 to 4 calls. The method is reflow.

    It is a run of its own, RUN-distilled, with its teacher's guidance built in; the same command
    again goes on where it stopped.

    \b
    gendiff distill runs/NAME/default distill.pairs=20000 distill.guidance=2
    gendiff sample runs/NAME/default-distilled --steps 1
    """
    from gendiff import console, distillation, runs

    lesson = distillation.prepare(folder, files, overrides)
    teacher = lesson.teacher.run
    if not accept_changes:
        runs.check_unchanged(teacher.modality, lesson.config)
    section = getattr(lesson.config, teacher.modality.name)
    report = teacher.modality.prepare(teacher.modality.settled(section, teacher.facts))
    console.say(f"data: {report.summary}")
    for line in report.warnings:
        console.warn(line)
    run = runs.start(teacher.modality, lesson.config, teacher.facts, accept_changes)
    if distillation.distill(lesson, run):
        console.say(f"distilled: {run.folder}")


def _sampling(function: Any) -> Any:
    for decorator in (
        click.argument("folder", metavar="RUN", type=click.Path(path_type=Path)),
        click.option("--sampler", help="Method, in place of the run's: ddim, heun, dpm++2m, …"),
        click.option("--grid", help="Where its times lie: karras, log_normal, log_snr, flow, …"),
        click.option("--steps", type=int, help="Steps of the grid."),
        click.option(
            "--guidance", help="Scale, 1 for none; or '{scale: 2, interval: [0.2, 3]}', YAML."
        ),
        click.option(
            "--clip", help="Keep estimates in the data's range: static, dynamic, '{name: …}'."
        ),
        click.option(
            "--guide-run",
            metavar="RUN[@STEP]",
            help="Guide by this weaker model (autoguidance), not by hiding the condition.",
        ),
        click.option(
            "--ema-width",
            type=float,
            help="Average of this width sigma_rel, from the snapshots of train.ema_widths.",
        ),
        click.option("--batch-size", type=int, help="Samples at a time; changes no sample."),
        click.option("--seed", type=SEED, default=0, show_default=True, help="Seed."),
        click.option("--device", help="In place of the run's: cpu, cuda, …"),
    ):
        function = decorator(function)
    return function


def _settings(model: Any, options: dict[str, Any]) -> Any:
    """The run's settings with the options given; a part may be written as YAML."""
    from gendiff import config

    changes = {
        k: options[k] for k in ("sampler", "grid", "steps", "guidance", "clip", "batch_size")
    }
    for key in ("sampler", "grid", "guidance", "clip"):
        if changes[key] is not None:
            changes[key] = config.parse_yaml(changes[key], printable(f"--{key}: '{changes[key]}'"))
    settings = model.settings(**changes)
    if model.guide is not None and settings.guidance.scale == 1:
        raise ConfigError("--guide-run: at guidance 1 the guide is not asked. Add --guidance 2")
    return settings


def _load(folder: Path, options: dict[str, Any]) -> Any:
    """The model of a run, with its guide."""
    from gendiff import generate

    model = generate.load(folder, options["device"], ema_width=options["ema_width"])
    if options["guide_run"] is None:
        return model
    path, _, step = options["guide_run"].rpartition("@")
    if not step.isdecimal():
        path, step = options["guide_run"], ""
    guide = generate.load(path, options["device"], int(step) if step else None)
    return model.guided_by(guide)


def _making(function: Any) -> Any:
    for decorator in (
        click.option(
            "--shard",
            "share",
            metavar="I/N",
            help="Make share I of N, 0/N to N-1/N; under torchrun each process makes its own.",
        ),
        click.option("--film", is_flag=True, help="Also draw how sample 0 came about, as a GIF."),
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help="Folder for the files.  [default: in RUN/generated]",
        ),
        click.option(
            "--toward",
            "targets",
            multiple=True,
            metavar="NAME=VALUE",
            help="Steer to a value of a differentiable property of the modality.",
        ),
        click.option(
            "--cond",
            "conditions",
            multiple=True,
            metavar="NAME=VALUE",
            help="What to sample, as the modality understands it: label=7.",
        ),
        click.option(
            "--set",
            "outputs",
            multiple=True,
            metavar="KEY=VALUE",
            help="A key of the modality's section that says how samples are written.",
        ),
        click.option("-n", "count", type=click.IntRange(1, MOST), help="How many."),
    ):
        function = decorator(function)
    return _sampling(function)


@main.command()
@_making
def sample(folder: Path, count: int | None, **options: Any) -> None:
    """Draw samples, a file each, and a preview. It shows up to 1024.

    Killed, the same command goes on with the files that are missing.

    \b
    gendiff sample runs/NAME/default -n 100 --steps 20 --cond label=7
    gendiff sample runs/NAME/default --sampler '{name: heun, churn: 40}'
    """
    _make_samples(folder, count or 64, options)


@main.command()
@_making
@click.argument("source", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--keep", help="What of the file stays, in the modality's words; the rest is made.")
@click.option("--noise", type=float, help="Vary: noise on the file first, as sigma / alpha.")
@click.option(
    "--from",
    "origins",
    multiple=True,
    metavar="NAME=VALUE",
    help="Translate: what the file is now, as --cond says what it is to be.",
)
def edit(folder: Path, count: int | None, **options: Any) -> None:
    """Edit a file: keep a part, vary, translate. What is not kept is made anew.

    \b
    gendiff edit RUN FILE --keep PART        inpainting
    gendiff edit RUN FILE --noise 0.5        variations, the wilder the more noise
    gendiff edit RUN FILE --noise 20 --from NAME=OLD --cond NAME=NEW
    """
    _make_samples(folder, count or 16, options)


def _make_samples(folder: Path, count: int, options: dict[str, Any]) -> None:
    from gendiff import generate, production, runs
    from gendiff.world import from_environment, parse_shard

    model = _load(folder, options)
    run = runs.writing(model.run, _pairs(options["outputs"]))
    run.modality.check_output(run.section, run.facts)
    settings = _settings(model, options)
    wish = generate.Wish(
        _pairs(options["conditions"]),
        {k: _number(k, v) for k, v in _pairs(options["targets"]).items()},
        options.get("source"),
        options.get("keep"),
        options.get("noise"),
        _pairs(options.get("origins", ())),
    )
    seed = options["seed"]
    name = f"seed-{seed}" if wish.source is None else f"{wish.source.stem}-seed-{seed}"
    share = options.get("share")
    order = production.Order(
        model,
        run,
        settings,
        wish,
        seed,
        options["ema_width"],
        options["out"] or model.run.folder / "generated" / name,
    )
    world = from_environment() if share is None else parse_shard(share)
    production.produce(order, count, world)
    if options["film"] and world.first:
        production.film(order)


def _pairs(texts: tuple[str, ...]) -> dict[str, Any]:
    from gendiff import config

    values: dict[str, Any] = {}
    for text in texts:
        values |= config.parse_override(text)
    return values


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"--toward {name}: a number is needed, got {value!r}")
    return float(value)


@main.command()
@_sampling
@click.option(
    "-n",
    "count",
    type=click.IntRange(2, MOST),
    help="Samples to judge.  [default: the modality's]",
)
@click.option(
    "--likelihood",
    "items",
    metavar="N",
    type=click.IntRange(min=2),
    help="Also the log-likelihood of N held-out items, by the probability-flow ODE.",
)
@click.option(
    "--ode-steps",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Steps of that ODE, each of four network calls and their gradients.",
)
def evaluate(
    folder: Path, count: int | None, items: int | None, ode_steps: int, **options: Any
) -> None:
    """Judge a run beside real data. Figures, a verdict, and the held-out loss.

    The verdict says whether samples look untrained, collapsed to a part of the data, or memorised.
    """
    from gendiff import console, distributed, runs
    from gendiff import evaluate as judging

    model = _load(folder, options)
    settings = _settings(model, options)
    n = count or model.run.modality.sample_count(model.run.facts)
    with distributed.joined(model.device) as world:
        console.out.quiet = not world.first
        result = judging.evaluate(
            model, settings, n, options["seed"], runs.cache_folder(), items or 0, ode_steps
        )
        if not world.first:
            return
    judging.show(result)
    click.echo(f"written to {model.run.folder / 'evaluation.json'}")


@main.command()
@click.argument(
    "folders", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path)
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="The file.  [default: RUN/report.html]"
)
@click.option(
    "-n", "count", type=click.IntRange(1, 1024), default=16, show_default=True, help="Samples."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed.")
@click.option("--device", help="In place of the run's: cpu, cuda, …")
def report(
    folders: tuple[Path, ...], out: Path | None, count: int, seed: int, device: str | None
) -> None:
    """Tell all of a run in one HTML file, or compare several.

    \b
    gendiff report runs/NAME/default
    gendiff report runs/NAME/a runs/NAME/b --out comparison.html
    """
    from gendiff import console
    from gendiff import report as telling

    path = telling.write(folders, out, count, seed, device)
    console.say(f"report: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


@main.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=7860,
    show_default=True,
    help="Port; 0 for any that is free.",
)
@click.option("--device", help="In place of the run's: cpu, cuda, …")
def demo(folder: Path, host: str, port: int, device: str | None) -> None:
    """Sample a run in the browser. The page is on this machine, for this machine alone.

    \b
    gendiff demo runs/NAME/default
    """
    from gendiff import app

    app.serve(folder, host, port, device)


@main.command()
@click.argument("suite", metavar="SUITE.yaml", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for table, JSON and plot.  [default: runs/benchmark/SUITE]",
)
@click.option("--device", help="In place of the runs': cpu, cuda, …")
def benchmark(suite: Path, out: Path | None, device: str | None) -> None:
    """Compare samplers and calls over modalities. The same command again goes on.

    \b
    gendiff benchmark configs/benchmark/default.yaml
    """
    from gendiff import benchmark as comparing
    from gendiff import console, runs, standings

    out = out or Path("runs") / "benchmark" / suite.stem
    cells = comparing.benchmark(suite, out, device)
    if not cells:
        return
    click.echo(standings.summary(cells, comparing.budgets(comparing.read(suite))))
    table = out / "results.md"
    runs.write_atomically(table, standings.table(cells))
    click.echo(
        f"errors, time, memory, verdicts and definitions: {table}, {table.with_suffix('.json')}"
    )
    try:
        click.echo(f"plot: {standings.plot(cells, out / 'pareto.png')}")
    except GendiffError as error:
        console.warn(str(error))


@main.command("fit-grid")
@_sampling
@click.option(
    "-n", "count", type=click.IntRange(2, MOST), default=128, show_default=True, help="Samples."
)
@click.option(
    "--tries", type=click.IntRange(min=0), default=150, show_default=True, help="Grids to try."
)
def fit_grid(folder: Path, count: int, tries: int, **options: Any) -> None:
    """Fit a time grid to a run, for few steps; prints it for --grid.

    \b
    gendiff fit-grid runs/NAME/default --sampler dpm++2m --steps 8
    """
    from gendiff import console, fitting

    model = _load(folder, options)
    settings = _settings(model, options)
    fitted = fitting.fit_model(model, settings, count, options["seed"], tries)
    console.say(
        f"error {fitted.error:.4g}; of the best standard grid, {fitted.standard}: "
        f"{fitted.standard_error:.4g} ({count} samples, seed {options['seed']})"
    )
    times = ", ".join(f"{t:.6g}" for t in fitted.times)
    sampler = f"--sampler {shlex.quote(options['sampler'])} " if options["sampler"] else ""
    grid = f"--grid '{{name: explicit, at: [{times}]}}'"
    click.echo(f"{sampler}--steps {settings.steps} {grid}")


@main.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def plugins(ctx: click.Context) -> None:
    """List, begin or check plugins. 'new NAME' begins a modality, 'check NAME' tests it."""
    if ctx.invoked_subcommand is None:
        _list_plugins()


def _list_plugins() -> None:
    from gendiff import console, doctor

    rows = doctor.plugin_rows()
    if not rows:
        console.say("no plugin is installed. From a clone: pip install -e '.[all]'")
        return
    console.table("", ["name", "kind", "package", "status", ""], rows)


@plugins.command("list")
def plugins_list() -> None:
    """List what is installed."""
    _list_plugins()


@plugins.command("check")
@click.argument("name")
def plugins_check(name: str) -> None:
    """Test that a modality keeps its contract with the engine."""
    from gendiff.testing import check_modality

    for line in check_modality(name):
        click.echo(line)


@plugins.command("new")
@click.argument("name")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Where the package is put.  [default: here]",
)
def plugins_new(name: str, folder: Path) -> None:
    """Write the package of a new modality, which trains as it is."""
    from gendiff import plugins as finder

    package = finder.write_new(name, folder)
    click.echo(f"{package} is written. Go on with:")
    click.echo(f"  pip install -e {package}")
    click.echo(f"  gendiff plugins check {name}")
    click.echo(f"  gendiff train --modality {name}")


@main.group(cls=Commands)
def config() -> None:
    """Show or check a configuration."""


@config.command()
@_overridable
def show(modality: str, files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Print the resolved configuration with each key's meaning."""
    from gendiff import config as configuration
    from gendiff import plugins as finder

    chosen = finder.modality(modality)
    resolved = configuration.resolve(chosen, files, overrides)
    for line in configuration.commented(resolved):
        click.echo(line)


@config.command()
@_overridable
def check(modality: str, files: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Check configuration files; prints every problem at once."""
    from gendiff import config as configuration
    from gendiff import plugins as finder

    configuration.resolve(finder.modality(modality), files, overrides)
    click.echo("valid")


@main.command()
def doctor() -> None:
    """Tell versions, devices and plugins. To be pasted; with tracebacks of those that fail."""
    from gendiff.doctor import examine

    healthy = True
    for line, fine in examine():
        click.echo(line)
        healthy &= fine
    sys.exit(0 if healthy else 1)
