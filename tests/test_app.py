"""``gendiff demo``: what the page asks, what it answers, and what it looks like to a browser."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_report import run_of

from gendiff import app, generate, plugins
from gendiff.cli import _pairs, main
from gendiff.errors import ConfigError
from gendiff.modality import Condition
from gendiff.testing import ToyModality

PLOTLY = "/* plotly */"


class Asking(ToyModality):
    """A toy with a condition of each kind."""

    name = "asking"

    def conditions(self, config: Any, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        return (
            *super().conditions(config, facts),
            Condition("size", "length in metres", (1.5,)),
            Condition("words", "what is <said>"),
        )


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = dict(plugins._REGISTERED)
    yield run_of(Asking(), tmp_path_factory.mktemp("runs"))
    plugins._REGISTERED.clear()
    plugins._REGISTERED.update(before)


def test_a_form_s_calls_may_be_known_afterwards_only(toy: Path) -> None:
    form = app.Form(count=18, seed=4, steps=3, sampler="adaptive", cond={"label": 2})
    shares: list[float] = []
    made = app.sample(generate.load(toy), form, PLOTLY, shares.append)
    assert made.calls is not None
    assert made.calls >= 9
    assert shares == [k / 6 for k in range(1, 7)]


def test_a_form_gets_what_the_command_line_makes(toy: Path, tmp_path: Path) -> None:
    model = generate.load(toy)
    form = app.Form(count=18, seed=4, steps=3, sampler="ddim", cond={"label": 2})
    shares: list[float] = []
    made = app.sample(model, form, PLOTLY, shares.append)
    assert made.calls == 3
    assert shares == [k / 6 for k in range(1, 7)]  # two blocks of three steps
    given = f"{toy} -n 18 --seed 4 --sampler ddim --steps 3 --cond label=2"
    assert made.command == f"gendiff sample {given}"
    done = CliRunner().invoke(main, [*shlex.split(made.command)[1:], "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    pictures = re.findall(r'<img src="([^"]+)"', made.page)
    assert len(pictures) == 18
    drawn = model.sample(18, seed=4, steps=3, sampler="ddim", cond={"label": 2})
    files = [Path(path).read_text() for path in sorted(tmp_path.glob("*.json"))]
    model.run.modality.write(model.run.section, model.run.facts, drawn, tmp_path / "..", range(18))
    assert files == [p.read_text() for p in sorted((tmp_path / "..").glob("*.json"))]


def test_a_bad_form_gets_the_command_line_s_words(toy: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        app.sample(generate.load(toy), app.Form(steps=0), PLOTLY)
    done = CliRunner().invoke(main, ["sample", str(toy), "--steps", "0"])
    assert done.output.splitlines() == [
        f"error: {line}" for line in str(caught.value).splitlines()
    ]


@pytest.mark.parametrize(
    "text", ["seven", "7", "a: b", "it's “so”", "[1", "no", "a\nb", "x=1 y", "-"]
)
def test_the_command_says_a_text_as_it_was_typed(text: str) -> None:
    said = app.command(Path("runs/a b"), app.Form(cond={"words": text, "size": 1e-5, "label": 1}))
    conditions = [part for part in shlex.split(said) if "=" in part]
    assert _pairs(tuple(conditions)) == {"words": text, "size": 1e-5, "label": 1}


def test_an_empty_field_asks_nothing(toy: Path) -> None:
    run = generate.load(toy).run
    conditions = run.modality.conditions(run.section, run.facts)
    assert app.filled(conditions, ["", None, "  "]) == {}
    asked = {"label": 0, "size": 2.5, "words": "3"}
    assert app.filled(conditions, [0, " 2.5", " 3 "]) == asked
    assert app.filled(conditions, ["", "[long", ""]) == {"size": "[long"}


def test_old_pages_are_forgotten() -> None:
    pages = app.Pages()
    addresses = [pages.add(str(k)) for k in range(app.KEPT + 1)]
    assert pages.get(addresses[0]) is None
    assert [pages.get(a) for a in addresses[1:]] == [str(k) for k in range(1, app.KEPT + 1)]


def test_what_to_install_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(main, ["demo", str(tmp_path)])
    assert done.exit_code == 2
    assert done.output == "error: gradio is not installed. pip install 'gendiff[app]'\n"


def test_help_does_without_gradio() -> None:
    code = (
        "import sys; from gendiff.cli import main; main(['--help'], standalone_mode=False); "
        "sys.exit(bool({'gradio', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def need_gradio() -> None:
    pytest.importorskip("gradio", reason="needs the extra app: pip install 'gendiff[app]'")


def test_each_condition_has_its_field(toy: Path) -> None:
    need_gradio()
    page = app.blocks(generate.load(toy), app.Pages(), PLOTLY)
    fields = {b.label: b for b in page.blocks.values() if getattr(b, "label", None)}
    kinds = {name: type(fields[name]).__name__ for name in ("label", "size", "words")}
    assert kinds == {"label": "Dropdown", "size": "Textbox", "words": "Textbox"}
    assert fields["label"].choices == [("any", ""), ("0", 0), ("1", 1), ("2", 2)]
    assert fields["size"].placeholder == "1.5"
    assert fields["steps"].value == 4


def test_a_taken_port_is_one_line(toy: Path) -> None:
    need_gradio()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["demo", str(toy), "--port", str(port)])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: demo: cannot listen at 127.0.0.1:{port}: Address alr")
    assert done.output.count("\n") == 1
    done = CliRunner().invoke(main, ["demo", str(toy), "--host", "\udcff"])
    assert done.output.startswith(r"error: demo: cannot listen at \udcff:7860: encoding of")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a page of digits, by the command, and the run."""
    need_gradio()
    pytest.importorskip("gendiff_image", reason="the page shows pictures")
    out = tmp_path_factory.mktemp("served")
    small = ["image.channels=16", "image.head_channels=16", "train.steps=5", "sample.steps=3"]
    command = [sys.executable, "-m", "gendiff"]
    train = [*command, "train", "--modality", "image", f"out={out}", "device=cpu", *small]
    subprocess.run(train, check=True, capture_output=True)
    folder = out / "image" / "default"
    demo = subprocess.Popen(
        [*command, "demo", str(folder), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert demo.stdout is not None
    try:
        first = demo.stdout.readline()
        found = re.fullmatch(r"demo: (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n", first)
        assert found, first + demo.stdout.read()
        yield found[1], folder
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
        assert demo.stdout.read() == "stopped\n"  # and nothing in between: no warning, no advice
    finally:
        demo.kill()


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed: apt-get install chromium")


def launched(playwright: Any) -> Any:
    return playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_samples(served: tuple[str, Path], width: int) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    url, folder = served
    errors, requests = [], []
    with api.sync_playwright() as playwright:
        chromium = launched(playwright)
        tab = chromium.new_page(viewport={"width": width, "height": 800})
        tab.set_default_timeout(240_000)  # a slow machine is no failure
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: requests.append(r.url))
        tab.goto(url)
        tab.get_by_label("label", exact=False).first.click()
        tab.get_by_role("option", name="7", exact=True).click()
        sample = tab.get_by_role("button", name="Sample", exact=True)
        sample.click()
        pictures = tab.frame_locator("#shown iframe").locator("img")
        pictures.first.wait_for()
        assert pictures.count() == 16
        assert pictures.evaluate_all("els => els.every(e => e.naturalWidth === 8)")
        captions = tab.frame_locator("#shown iframe").locator("figcaption").all_inner_texts()
        assert captions == ["7"] * 16
        told = tab.locator("#told")
        assert "16 samples, 3 network calls each, " in told.inner_text()
        assert f"gendiff sample {folder} -n 16 --seed 0 --cond" in told.inner_text()
        frame = tab.locator("#shown iframe")
        inside = frame.content_frame.locator("body").evaluate("e => e.offsetHeight")
        box = frame.bounding_box()
        assert box is not None
        assert abs(box["height"] - inside) <= 1  # no bar to scroll inside
        assert tab.evaluate("document.documentElement.scrollWidth") <= width

        tab.get_by_label("steps", exact=True).fill("0")
        sample.click()
        tab.locator("#told .wrong").wait_for()
        wrong = told.inner_text().strip()
        assert frame.count() == 0
        chromium.close()
    done = CliRunner().invoke(main, ["sample", str(folder), "--steps", "0"])
    assert wrong == done.output.strip()
    assert errors == []
    assert requests
    assert [r for r in requests if not r.startswith((url, "data:", "blob:"))] == []


def test_fields_that_are_left_empty_ask_nothing(toy: Path) -> None:
    need_gradio()
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    browser()
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening, api.sync_playwright() as playwright:
        settings = uvicorn.Config(app.web(generate.load(toy), PLOTLY), log_level="warning")
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            chromium = launched(playwright)
            tab = chromium.new_page()
            tab.set_default_timeout(240_000)
            tab.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
            tab.get_by_role("button", name="Sample", exact=True).click()
            tab.frame_locator("#shown iframe").locator("img").first.wait_for()
            assert "--cond" not in tab.locator("#told").inner_text()
            tab.get_by_label("size").fill("1e-3")
            tab.get_by_role("button", name="Next seed").click()
            tab.get_by_text("--seed 1 --cond size=0.001").wait_for()
            chromium.close()
        finally:
            server.should_exit = server.force_exit = True
            thread.join()
