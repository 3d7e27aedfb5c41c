"""The page that ``gendiff report`` writes: what it tells, and how it looks to a browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
import wave
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

import gendiff
from gendiff import config, panels, plugins, report, runs
from gendiff.cli import main
from gendiff.errors import RunError
from gendiff.modality import Ball, Exhibit, Measure, Picture, Scene, Sound, Stick
from gendiff.spaces import Batch
from gendiff.testing import ToyModality
from gendiff.train import train

pytest.importorskip("plotly", reason="needs the extra report")

HOSTILE = "</script><img src=https://example.org/x onerror=alert(1)>&\u2028'\""
BALLS = [Ball((0.0, 1.0, -2.0), 0.4, 0xE33A32), Ball((0.5, 0.0, 0.25), 0.3, 0x0000FF)]
STICKS = [Stick((0.0, 1.0, -2.0), (0.5, 0.0, 0.25), 0.1, 0x56595E)]


def sound() -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(b"\x00\x10\x00\xf0" * 2000)
    return file.getvalue()


class Rich(ToyModality):
    """A toy whose samples are seen, heard and turned, and whose words are ill-meant."""

    name = "rich"

    def exhibits(
        self, config: Any, facts: Mapping[str, Any], batch: Batch, ids: Sequence[int]
    ) -> list[Exhibit]:
        plain = super().exhibits(config, facts, batch, ids)
        still = plain[0].parts[0]
        assert isinstance(still, Picture)
        scene = Scene(BALLS, STICKS, still)
        return [Exhibit((*e.parts, Sound(sound()), scene), HOSTILE, ("a note",)) for e in plain]


class Element(NamedTuple):
    tag: str
    attributes: dict[str, str]


class Page(HTMLParser):
    """Elements, scripts' texts, and all other text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {k: v or "" for k, v in attrs}))
        self._inside = tag
        self.text += " "
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def of(self, tag: str, kind: str | None = None) -> list[dict[str, str]]:
        found = [e.attributes for e in self.elements if e.tag == tag]
        return [a for a in found if kind is None or kind in a.get("class", "").split()]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def run_of(modality: ToyModality, out: Path, *overrides: str) -> Path:
    gendiff.register(modality)
    resolved = config.resolve(modality, overrides=[f"out={out}", "sample.steps=4", *overrides])
    facts = modality.prepare(getattr(resolved, modality.name)).facts
    run = runs.start(modality, resolved, facts)
    assert train(run)
    return run.folder


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before = dict(plugins._REGISTERED)
    yield
    plugins._REGISTERED.clear()
    plugins._REGISTERED.update(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, lr in (("a", 0.01), ("b", 0.002)):
        run_of(ToyModality(), folder, f"name={name}", f"train.lr={lr}", "toy.kind=ragged")
    return run_of(Rich(), folder, "name=c").parent.parent


@pytest.fixture
def toys(trained: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(trained, tmp_path / "runs"))


def evaluated(folder: Path, *measures: Measure, **more: Any) -> None:
    data = {
        "step": 20, "samples": 8, "seed": 3, "network_calls": 4,
        "measures": [m.__dict__ for m in measures],
        "heldout_loss_by_log_snr": {"-4": 0.5, "0": 0.25}, **more,
    }  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(data))


def told(*folders: Path, n: int = 3) -> Page:
    out = folders[0].parent / "page.html"
    return Page(report.write(folders, out, n).read_text(encoding="utf-8"))


def test_a_modality_that_says_nothing_is_shown_by_its_previews(toys: Path) -> None:
    folder = toys / "toy" / "a"
    page = told(folder, n=3)
    model = gendiff.load(folder)
    run = model.run
    samples = next(model.batches([0, 1, 2], run.config.sample))
    expected = []
    for row in range(3):
        path = run.modality.preview(
            run.section, run.facts, samples.select([row]), toys / f"{row}.png"
        )
        expected.append(panels.uri("image/png", path.read_bytes()))
    history = [panels.uri("image/png", p.read_bytes()) for p in sorted(run.samples.iterdir())]
    shown = [image["src"] for image in page.of("img") if "src" in image]
    film = shown[3 : -len(history)]
    assert shown[:3] == expected
    assert len(film) == 4  # the steps of the run's sampler
    assert film[-1] == expected[0] != film[0]
    assert shown[-len(history) :] == history
    assert len(history) == len(list(run.samples.glob("step-*.png"))) > 1


def test_the_page_tells_the_run(toys: Path) -> None:
    folder = toys / "toy" / "a"
    evaluated(folder, Measure("mean_offset", 0.5, "lower", 0.04, "<of> the means"))
    page, model = told(folder), gendiff.load(folder)
    parameters = sum(p.numel() for p in model.network.parameters())
    record = json.loads((folder / "run.json").read_text())
    for text in (
        f"{parameters:,}", record["command"], *record["versions"].values(),
        "sampler: dpm++2m (rule exact)", "mean offset", "lower is better", "<of> the means",
        "8 samples of step 20, seed 3", "ema_half_life_steps",
    ):  # fmt: skip
        assert text in page.text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (one,) = page.data["runs"]
    assert one["steps"] == [row["step"] for row in rows] == [5, 10, 15, 20]
    assert one["series"]["loss"] == [row["loss"] for row in rows]
    assert list(one["bins"]) == sorted(one["bins"], key=lambda n: float(n.split("..")[0]))
    assert {k: v[-1] for k, v in one["bins"].items() if v[-1] is not None} == (
        rows[-1]["loss_by_log_snr"]
    )
    assert one["heldout"] == [[-4, 0.5], [0, 0.25]]
    widths = [bar["style"] for bar in page.of("i") if "style" in bar]
    assert widths == ["width:100.0%", "width:8.0%"]


def test_sounds_and_scenes_arrive_whole_and_words_stay_words(toys: Path) -> None:
    folder = toys / "rich" / "c"
    with (folder / "metrics.jsonl").open("a") as file:
        row = {"step": 25, "loss": float("nan"), "loss_by_log_snr": {"8..12": 1.0}}
        file.write(json.dumps(row) + "\n")
        file.write('{"step": 30, "lo')  # cut short by a kill
    page = told(folder, n=2)
    sounds = [a["src"] for a in page.of("audio") if a.get("src")]
    assert [base64.b64decode(s.partition(",")[2]) for s in sounds] == [sound()] * 2
    scenes = page.data["scenes"]
    assert len(scenes) == 2 + 4
    assert scenes[0] == {
        "balls": [[*b.centre, b.radius, b.colour] for b in BALLS],
        "sticks": [[*s.start, *s.end, s.radius, s.colour] for s in STICKS],
    }
    assert page.text.count(HOSTILE) == 2
    assert not [e for e in page.elements if "onerror" in e.attributes]
    assert len(page.scripts) == 3
    assert page.data["runs"][0]["series"]["loss"][-1] is None
    assert page.data["runs"][0]["steps"][-1] == 25


def test_nothing_is_fetched(toys: Path) -> None:
    page = told(toys / "rich" / "c", toys / "toy" / "a")
    (policy,) = [m["content"] for m in page.of("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none';")
    assert "http" not in policy
    for tag, attributes in page.elements:
        for key in ("src", "href", "data-sound"):
            assert attributes.get(key, "#").startswith(("data:", "#")), (tag, attributes)
    assert not page.of("iframe") + page.of("object") + page.of("base")


def test_runs_are_compared_where_they_differ(toys: Path) -> None:
    a, b = toys / "toy" / "a", toys / "toy" / "b"
    tie = Measure("tie", 1.0, "higher")
    evaluated(a, Measure("offset", 0.5, "lower", 0.1), Measure("share", 0.8, "higher", 1.0), tie)
    evaluated(b, Measure("offset", 0.25, "lower", 0.1), Measure("share", 0.4, "higher", 1.0), tie)
    page = told(a, b)
    rows = " ".join(page.text.split()).partition("Where they differ")[2].split("gendiff")[0]
    assert "train.lr 0.01 0.002" in rows
    assert "run.name a b" in rows
    assert "train.steps" not in rows
    assert [one["name"] for one in page.data["runs"]] == ["toy/a", "toy/b"]
    offset, share, equal = report._measures([report._told(f, f.name, 1, 0, None) for f in (a, b)])
    assert [bar["best"] for bar in offset["bars"]] == [False, True, False]
    assert [bar["percent"] for bar in offset["bars"]] == [100, 50, 20]
    assert [bar["best"] for bar in share["bars"]] == [True, False, False]
    assert [bar["best"] for bar in equal["bars"]] == [False, False]


def test_runs_of_one_name_are_told_apart_by_their_paths(toys: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(toys / "toy" / "a", tmp_path / "elsewhere" / "toy" / "a"))
    names = report._names([toys / "toy" / "a", other])
    assert names == [str(toys / "toy" / "a"), str(other)]


def test_the_same_run_makes_the_same_page(toys: Path) -> None:
    paths = [report.write([toys / "toy" / "a"], toys / f"{k}.html", 2) for k in "xy"]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_run_without_a_checkpoint_is_told_without_samples(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = toys / "toy" / "a"
    shutil.rmtree(folder / "checkpoints")
    page = told(folder)
    assert "no checkpoint yet" in capsys.readouterr().err
    assert "From noise to sample" not in page.text
    assert "The same noise through training" in page.text


def call(*args: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(main, ["report", *map(str, args)])
    return result.exit_code, result.stderr.splitlines()


def test_the_command_writes_into_the_run(toys: Path) -> None:
    folder = toys / "toy" / "a"
    assert call(folder, "-n", 2)[0] == 0
    assert "<!doctype html>" in (folder / "report.html").read_text()[:20]
    assert not list(folder.glob("*.tmp"))


def test_mistakes_are_one_line_and_leave_nothing(
    toys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = toys / "toy" / "a"
    code, errors = call(folder, "--out", folder / "run.json" / "x.html")
    assert code == 2
    assert "cannot be written" in errors[-1]
    code, errors = call(toys)
    assert code == 2
    assert "is not a run" in errors[-1]
    (folder / "evaluation.json").write_text('{"measures": [{"name":')
    with pytest.raises(RunError, match=r"evaluation.json is damaged"):
        told(folder)
    for step in (folder / "checkpoints").glob("step-*/state.pt"):
        step.write_bytes(b"")
        step.with_name("model.safetensors").write_bytes(b"")
    code, errors = call(folder)
    assert code == 2, errors
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.delitem(sys.modules, "plotly.offline", raising=False)
    code, errors = call(folder)
    assert code == 2
    assert errors == ["error: plotly is not installed. pip install 'gendiff[report]'"]
    assert not (folder / "report.html").exists()


def test_a_picture_that_is_none_is_left_out() -> None:
    shown = panels.exhibit(Exhibit((Picture(b"[1, 2]"),), "a title"), [])
    assert shown["pictures"] == []
    assert shown["title"] == "a title"


def test_the_templates_are_in_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [n for n in names if n.endswith("METADATA")]
        text = archive.read(metadata).decode()
    for suffix in ("html", "css", "js"):
        assert f"gendiff/templates/report.{suffix}" in names
    assert "extra == 'report'" in text
    everything = [line for line in text.splitlines() if "extra == 'all'" in line]
    assert any("plotly" in line for line in everything)
    assert not any("tensorboard" in line for line in everything)


# --- a browser ---------------------------------------------------------------------------------


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium is installed: apt-get install chromium")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_all(toys: Path, scheme: Any) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    executable = browser()
    page = report.write([toys / "rich" / "c", toys / "toy" / "a"], toys / "page.html", 2)
    errors, requests = [], []
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        width = 1280 if scheme == "light" else 390
        tab = chromium.new_page(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        tab.set_default_timeout(240_000)  # a slow machine is no failure
        tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("request", lambda r: requests.append(r.url))
        tab.goto(page.as_uri())
        charts = tab.locator(".chart")
        assert charts.count() > 5
        for i in range(charts.count()):
            box = charts.nth(i).bounding_box()
            assert box is not None
            assert box["width"] > 250
        drawn = "els => els.filter(e => e.querySelector('path.js-line')).length"
        assert charts.evaluate_all(drawn) == charts.count()
        tab.locator(".stage .view").scroll_into_view_if_needed()
        tab.wait_for_selector(".stage canvas")
        tab.wait_for_function("document.querySelector('.stage .view').data[0].x.length > 300")
        eye = "Object.values(document.querySelector('.stage .view').layout.scene.camera.eye)"
        far = tab.evaluate(eye)
        tab.locator(".stage [data-do=closer]").click()
        assert tab.evaluate(eye) == pytest.approx([0.8 * part for part in far])
        tab.wait_for_function(
            "[...document.querySelectorAll('audio[src]')].every(a => a.duration > 0.4)"
        )
        assert tab.locator("audio[src]").count() == 3
        first = tab.locator(".player").first
        first.locator(".frame").first.click()
        assert first.locator("output").inner_text() == "step 1 of 4"
        assert first.locator("input").input_value() == "0"
        loaded = "els => els.every(e => !e.src || e.naturalWidth > 0)"
        assert tab.locator("img").evaluate_all(loaded)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        chromium.close()
    assert errors == []
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
