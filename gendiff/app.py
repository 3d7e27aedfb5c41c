"""``gendiff demo``: a web page on this machine that samples a run, by Gradio.

The page knows a modality by its contract alone: a field for each of ``Modality.conditions``, and
samples as ``gendiff report`` shows them. It is served here and not by Gradio's launcher, which
would call home: nothing is sent anywhere, and a header forbids the page whatever is not ours.
"""

from __future__ import annotations

import html
import json
import math
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gendiff import config, console, generate, panels
from gendiff.errors import ConfigError, GendiffError
from gendiff.generate import Model, Wish
from gendiff.modality import Condition
from gendiff.spaces import join

MOST = 64  # samples of a page
KEPT = 8  # pages of samples that are held for browsers
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; form-action 'self'"
)
STYLE = """
.gradio-container { max-width: 80rem !important; margin-inline: auto; }
#about h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
#about *, #told * { overflow-wrap: anywhere; }
#about p, #told p { margin: 0; }
#about p, #told code { opacity: .7; }
#told code { font-size: .82rem; background: none; border: 0; padding: 0; }
#told .wrong { color: var(--error-text-color, #b91c1c); font-weight: 600; }
#shown iframe { display: block; width: 100%; height: 12rem; border: 0; border-radius: 12px; }
"""


@dataclass(frozen=True)
class Form:
    """What a person filled in; None, or no entry, where it is left to the run.

    Args:
        count: How many samples.
        seed: Their seed.
        sampler: A method's name.
        steps: Steps of the grid.
        guidance: Scale.
        cond: Conditions by name.
    """

    count: int = 16
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    cond: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of a form.

    Args:
        page: A page of the samples.
        calls: Network calls a sample.
        seconds: That sampling took.
        command: The command line that makes the same samples.
    """

    page: str
    calls: float | None
    seconds: float
    command: str


def sample(
    model: Model, form: Form, plotly: str, told: Callable[[float], None] = lambda share: None
) -> Answer:
    """Draws what a form asks for.

    Args:
        model: The model.
        form: The form.
        plotly: The source of plotly.js.
        told: Is called with the share of the steps that are done, in [0, 1].

    Raises:
        ConfigError, SamplingError, DataError, CheckpointError: As for ``gendiff sample``.
    """
    run = model.run
    run.modality.check_output(run.section, run.facts)
    settings = model.settings(sampler=form.sampler, steps=form.steps, guidance=form.guidance)
    wish = Wish(form.cond)
    together = model.block if model.device.type == "cpu" else settings.batch_size
    steps = -(-form.count // together) * (len(model.times(settings, wish)) - 1)
    done = 0

    def poll() -> None:
        nonlocal done
        done += 1
        told(min(1.0, done / steps))

    ids = list(range(form.count))
    begun = time.perf_counter()
    counts: list[int] = []
    parts = model.batches(ids, settings, form.seed, wish, poll, counts)
    batch = join([b.to("cpu") for b in parts])
    seconds = time.perf_counter() - begun
    exhibits = run.modality.exhibits(run.section, run.facts, batch, ids)
    page = panels.gallery(exhibits, plotly)
    calls = generate.mean_calls(model.calls(settings, wish), counts)
    return Answer(page, calls, seconds, command(run.folder, form))


def command(folder: Path, form: Form) -> str:
    """The command line that makes the samples of a form."""
    parts = ["gendiff", "sample", str(folder), "-n", str(form.count), "--seed", str(form.seed)]
    for option in ("sampler", "steps", "guidance"):
        if (value := getattr(form, option)) is not None:
            parts += [f"--{option}", str(value)]
    for name, value in form.cond.items():
        parts += ["--cond", f"{name}={_yaml(value)}"]
    return shlex.join(parts)


def _yaml(value: Any) -> str:
    """A value as the command line reads it: a text may need quotes to stay one."""
    text = yaml.safe_dump(value, allow_unicode=True, width=math.inf)
    if text.startswith("'"):  # a shell has its own use for these
        return json.dumps(value, ensure_ascii=False)
    return text.removesuffix("...\n").strip()  # the end of a document that is one word


def filled(conditions: Sequence[Condition], values: Sequence[Any]) -> dict[str, Any]:
    """The conditions that were asked for: a field that was left empty asks for none."""
    cond = {}
    for condition, value in zip(conditions, values, strict=True):
        if isinstance(value, str):
            value = value.strip()
        if value == "" or value is None:
            continue
        cond[condition.name] = _read(value) if _is_number(condition) else value
    return cond


def _is_number(condition: Condition) -> bool:
    return not condition.closed and any(not isinstance(v, str) for v in condition.values)


def _read(text: str) -> int | float | str:
    """The number; what is none stays a text, for the modality to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Pages:
    """The newest pages of samples, by an address that cannot be guessed."""

    def __init__(self) -> None:
        self._pages: dict[str, str] = {}

    def add(self, page: str) -> str:
        """Keeps a page, forgets the oldest, and returns its address."""
        while len(self._pages) >= KEPT:
            self._pages.pop(next(iter(self._pages)))
        address = f"/samples/{secrets.token_urlsafe(12)}"
        self._pages[address] = page
        return address

    def get(self, address: str) -> str | None:
        """The page, or None if it is forgotten."""
        return self._pages.get(address)


def blocks(model: Model, pages: Pages, plotly: str) -> Any:
    """The page's fields and what its buttons do, a ``gradio.Blocks``."""
    import gradio as gr

    run, own = model.run, model.run.config.sample
    conditions = run.modality.conditions(run.section, run.facts)
    name = "/".join(run.folder.resolve().parts[-2:])
    parameters = sum(p.numel() for p in model.network.parameters())

    def answer(given: dict[Any, Any], progress: Any = gr.Progress()) -> tuple[str, str]:  # noqa: B008
        form = Form(
            given[count],
            given[seed] or 0,
            given[sampler] or None,
            None if given[steps] == own.steps else given[steps],
            None if given[guidance] == own.guidance.scale else given[guidance],
            filled(conditions, [given[field] for field in fields]),
        )
        try:
            made = sample(model, form, plotly, lambda share: progress(share, "sampling"))
        except GendiffError as error:
            lines = [f"error: {line}" for line in str(error).splitlines()]
            return "".join(f'<p class="wrong">{html.escape(line)}</p>' for line in lines), ""
        calls = generate.said_calls(made.calls)
        line = f"{form.count} samples, {calls} each, {made.seconds:.1f} s"
        frame = f'<iframe src="{pages.add(made.page)}" title="samples"></iframe>'
        return f"<p>{line}</p><p><code>{html.escape(made.command)}</code></p>", frame

    with gr.Blocks(analytics_enabled=False, title=f"{name} – gendiff") as page:
        gr.HTML(
            f"<h1>{html.escape(name)}</h1><p>{html.escape(run.modality.summary)}. "
            f"{parameters:,} parameters, training step {model.step:,}, {model.device}</p>",
            elem_id="about",
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                fields = [_field(gr, condition) for condition in conditions]
                count = gr.Slider(1, MOST, min(16, MOST), step=1, label="samples")
                with gr.Row():
                    steps = gr.Number(own.steps, label="steps", precision=0, min_width=90)
                    guidance = gr.Number(own.guidance.scale, label="guidance", min_width=90)
                    seed = gr.Number(0, label="seed", precision=0, min_width=90)
                sampler = gr.Dropdown(
                    [(f"{_name(own.sampler)} (the run's)", ""), *config.registry("sampler")],
                    value="",
                    label="sampler",
                )
                with gr.Row():
                    make = gr.Button("Sample", variant="primary", min_width=90)
                    other = gr.Button("Next seed", min_width=90)
            with gr.Column(scale=3, min_width=320):
                told = gr.HTML("<p>Nothing is sampled yet.</p>", elem_id="told")
                shown = gr.HTML(elem_id="shown", min_height=120)
        call: dict[str, Any] = {
            "fn": answer,
            "inputs": {count, seed, sampler, steps, guidance, *fields},
            "outputs": [told, shown],
            "show_progress_on": shown,
            "concurrency_limit": 1,  # samples of one browser after those of another
        }
        make.click(**call)
        other.click(lambda value: (value or 0) + 1, seed, seed, show_progress="hidden").then(
            **call
        )
    return page


def _name(sampler: Any) -> str:
    return str(config.describe("sampler", sampler)["name"])


def _field(gr: Any, condition: Condition) -> Any:
    """A field for a condition; empty, it leaves the condition to the modality."""
    hint = str(condition.values[0]) if condition.values else None
    if condition.closed:
        choices = [("any", ""), *((str(value), value) for value in condition.values)]
        return gr.Dropdown(choices, value="", label=condition.name, info=condition.about)
    # Not gr.Number, which makes a 0 of nothing.
    return gr.Textbox(label=condition.name, info=condition.about, placeholder=hint)


def installed() -> str:
    """Sees to it that all is there, and returns the source of plotly.js.

    Raises:
        ConfigError: The extra ``app`` is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise panels.missing("app", error) from None
    return panels.plotly("app")


def web(model: Model, plotly: str) -> Any:
    """The whole page as an ASGI application."""
    import fastapi
    import gradio as gr
    from starlette.responses import HTMLResponse

    pages = Pages()
    app = fastapi.FastAPI(openapi_url=None)

    def samples(name: str) -> Any:
        page = pages.get(f"/samples/{name}")
        gone = "These samples are gone. Make them again."
        return HTMLResponse(page or gone, 200 if page else 404)

    app.add_api_route("/samples/{name}", samples, response_class=HTMLResponse)
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="zinc",
        font=("system-ui", "sans-serif"),  # none is fetched
        font_mono=("ui-monospace", "monospace"),
    )
    gr.mount_gradio_app(
        app,
        blocks(model, pages, plotly),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        theme=theme,
        css=STYLE,
    )
    return _Guarded(app)


class _Guarded:
    """An ASGI application whose answers let a browser ask nobody else."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, guarded)


def serve(folder: Path, host: str, port: int, device: str | None) -> None:
    """Loads a run and serves its page until it is stopped.

    Args:
        folder: The run.
        host: The address to listen at.
        port: The port; 0 for any that is free.
        device: In place of the run's.

    Raises:
        RunError, PluginError, CheckpointError: The run cannot be opened.
        ConfigError: The extra ``app`` is not installed, or the address cannot be had.
    """
    plotly = installed()  # what is missing is said before anything is loaded
    import uvicorn

    try:
        listening = socket.create_server((host, port), reuse_port=False)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # of a host that is no name
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"demo: cannot listen at {host}:{port}: {reason}. Choose another --port or --host"
        ) from None
    with listening:
        app = web(generate.load(folder, device), plotly)
        console.say(f"demo: http://{host}:{listening.getsockname()[1]} (Ctrl-C stops it)")
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        with suppress(KeyboardInterrupt):  # which uvicorn may keep to itself
            uvicorn.Server(settings).run(sockets=[listening])
        console.say("stopped")
