"""The contract check passes for modalities that keep it, and fails for each way to break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gendiff.errors import ConfigError, PluginError
from gendiff.modality import Condition, DataReport, Features, Given, Measure, Modality, Request
from gendiff.spaces import Batch, Categories, Cond, Dense, Space
from gendiff.testing import ToyModality, check_modality
from gendiff.testing.toy import ToyData


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_the_toy_keeps_the_contract(kind: str) -> None:
    lines = list(check_modality(ToyModality(), [f"toy.kind={kind}", "toy.types=true"]))
    assert len(lines) == 11 + (kind == "ragged")


def test_an_entry_point_that_imports_torch_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy.py").write_text(
        "import gendiff, torch\nfrom gendiff.testing import ToyModality\n"
        "class Heavy(ToyModality):\n    name = 'heavy'\n"
        "@gendiff.hookimpl\ndef gendiff_modality():\n    return Heavy()\n"
    )
    info = tmp_path / "heavy-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[gendiff.modalities]\nheavy = heavy\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(PluginError, match="loads without importing torch; found 'torch was"):
        next(check_modality("heavy"))


Method = Callable[..., Any]


def broken(method: str, change: Callable[[Any], Any]) -> ToyModality:
    """A toy of which one method's result is changed."""
    own: Method = getattr(ToyModality, method)

    def changed(self: ToyModality, *args: Any) -> Any:
        return change(own(self, *args))

    return type("Broken", (ToyModality,), {method: changed})()


def network(change: Callable[[Any, tuple[Any, ...]], Any], **parts: Any) -> ToyModality:
    """A toy whose network puts out something else; ``change`` gets the output and the inputs."""

    class Changed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            for name, part in parts.items():
                setattr(self, name, part())

        def forward(self, *args: Any) -> Any:
            return change(self.inner(*args), (self, *args))

    return broken("backbone", Changed)


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(1))


def noisy_items(data: ToyData) -> Any:
    class Data:
        def __len__(self) -> int:
            return len(data)

        def __getitem__(self, key: tuple[int, int]) -> Any:
            x, label = data[key]
            return x + torch.rand(()), label

    return Data()


def counted(now: Callable[[Any, Any], bool]) -> Callable[[Any, tuple[Any, ...]], Any]:
    """A network that counts some of its calls in a number that no state holds."""

    def change(out: Any, inputs: tuple[Any, ...]) -> Any:
        net, x = inputs[:2]
        if now(net, x):
            net.calls = getattr(net, "calls", 0) + 1
            return out * (1 + 0.1 * net.calls)
        return out

    return change


def hidden_number(out: Any, inputs: tuple[Any, ...]) -> Any:
    net = inputs[0]
    if not hasattr(net, "secret"):
        net.secret = torch.randn(()).item()
    return out + net.secret


def placed(out: Any, inputs: tuple[Any, ...]) -> Any:
    """Each row's place in its sample is added to it."""
    space = inputs[4]
    first = (space.sizes.cumsum(0) - space.sizes)[space.index]
    return out + (torch.arange(len(out)) - first)[:, None]


class BatchWise(ToyModality):
    def features(self, config: Any, facts: Any, batches: Any, cache: Path, seed: int) -> Features:
        found = [batch.x - batch.x.mean() for batch in batches]
        return Features(torch.cat(found), "")


def with_measures(*more: Measure) -> ToyModality:
    return broken("metrics", lambda found: [*found, *more])


class UnmetCondition(ToyModality):
    def conditions(self, config: Any, facts: Any) -> tuple[Condition, ...]:
        return (Condition("colour", "a colour", ["red"], closed=True),)

    def templates(self, config: Any, facts: Any, request: Request) -> tuple[Space, Cond | None]:
        if "colour" in request.values:
            raise ConfigError("cond: unknown condition 'colour'")
        return super().templates(config, facts, request)


CASES: dict[str, tuple[Modality, str, list[str]]] = {
    # data
    "facts": (broken("prepare", lambda r: DataReport("", {"n": (1, 2)})), "survive JSON", []),
    "report": (broken("prepare", lambda r: {}), "returns a DataReport", []),
    "items": (broken("dataset", noisy_items), "function of its index and seed", []),
    "empty": (broken("dataset", lambda data: []), "split has items", []),
    "shape": (
        broken("collate", lambda b: Batch(b.x, Dense((2, 5)), b.cond)), "its space's shape", []
    ),
    "finite": (broken("collate", lambda b: Batch(b.x / 0, b.space, b.cond)), "are finite", []),
    "lost": (broken("collate", lambda b: b.select([0])), "two items make two samples", []),
    "subspace": (
        broken("collate", lambda b: Batch(b.x + 1, b.space, b.cond)),
        "in the space's subspace", ["toy.kind=ragged"],
    ),
    "bins": (broken("bin_width", lambda width: 0.125), "multiples of bin_width", []),
    "codes": (broken("categories", lambda c: (Categories(0, 2),)), "hold one-hot codes", []),
    # training
    "output": (network(lambda out, i: out[:, :2]), "output is of x's shape", []),
    "unused": (network(lambda out, i: out, dead=parameter), "reaches every parameter", []),
    "zero": (
        network(lambda out, i: out + 0 * i[0].dead, dead=parameter), "every parameter", []
    ),
    "uphill": (network(lambda out, i: 2 * out.detach() - out), "lower its loss", []),
    "unsaved": (network(hidden_number), "gives what the saved one gave", []),
    "state": (network(counted(lambda net, x: net.training)), "resumes to the bit", []),
    # the network and its space
    "company": (network(lambda out, i: out + i[1].mean()), "alone and among others", []),
    "padding": (
        network(lambda out, i: out + out.cumsum(2).flip(2)), "alone and among others",
        ["toy.kind=masked"],
    ),
    "order": (network(placed), "order of a sample's rows", ["toy.kind=ragged"]),
    # samples
    "neighbours": (
        broken("templates", lambda t: (t[0], Cond({"label": torch.arange(t[0].batch_size) % 3}))),
        "depends on its id", [],
    ),
    "conditions": (broken("templates", lambda t: (t[0], None)), "the data's conditions", []),
    "unmet": (UnmetCondition(), "takes colour=red, as conditions.. says; found .*unknown", []),
    "space": (
        broken("templates", lambda t: (Dense((t[0].batch_size, 5)), t[1])), "the data's space", []
    ),
    "sample": (
        network(counted(lambda net, x: not net.training and len(x) == 16)),
        "the same alone and among others", ["train.batch_size=8"],
    ),
    "files": (broken("write", lambda paths: []), "a file for each sample", []),
    "preview": (
        broken("preview", lambda path: path.write_bytes(b"") or path), "makes a picture", []
    ),
    "exhibits": (broken("exhibits", lambda found: found[:1]), "shows each sample", []),
    "one start": (
        broken("given", lambda g: Given(g.batch.select([0]))), "a state for each sample", []
    ),
    "other start": (
        broken("given", lambda g: Given(Batch(g.batch.x + 1, g.batch.space))), "read back", []
    ),
    # figures
    "measures": (broken("metrics", lambda found: [0.5]), "returns Measures", []),
    "twice": (with_measures(Measure("recall", 1, "lower")), "one name", []),
    "nan": (with_measures(Measure("a", float("nan"), "lower")), "figures .* are finite", []),
    "floor": (with_measures(Measure("a", 1, "lower", float("inf"))), "figures .* finite", []),
    "better": (with_measures(Measure("a", 1, "best")), "lower or higher is better", []),
    "features": (BatchWise(), "batches' sizes", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_broken_promise_is_found(case: str) -> None:
    modality, message, overrides = CASES[case]
    with pytest.raises(PluginError, match=message):
        list(check_modality(modality, overrides))


def test_a_headline_without_a_floor_is_found() -> None:
    class Boasting(ToyModality):
        headline = ("beauty",)

    with pytest.raises(PluginError, match="of \\('beauty',\\) has a floor"):
        list(check_modality(Boasting()))
