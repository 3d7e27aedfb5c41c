"""The contract check passes for modalities that keep it, and fails for each way to break it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gendiff.errors import ConfigError, PluginError
from gendiff.modality import Condition, DataReport, Request
from gendiff.spaces import Batch, Cond, Space
from gendiff.testing import ToyModality, check_modality
from gendiff.testing.toy import ToyConfig, ToyData


@pytest.mark.parametrize("kind", ["dense", "masked", "ragged"])
def test_the_toy_keeps_the_contract(kind: str) -> None:
    assert len(list(check_modality(ToyModality(), [f"toy.kind={kind}"]))) == 7


class RandomItems(ToyModality):
    def dataset(self, config: ToyConfig, facts: Mapping[str, Any], split: str) -> Any:
        class Data(ToyData):
            def __getitem__(self, key: tuple[int, int]) -> Any:
                x, label = super().__getitem__(key)
                return x + torch.rand(()), label

        return Data(config, split)


class TupleFacts(ToyModality):
    def prepare(self, config: ToyConfig) -> DataReport:
        return DataReport("", {"size": (1, 2)})


class DeadParameter(ToyModality):
    def backbone(self, config: ToyConfig, facts: Mapping[str, Any]) -> nn.Module:
        network = super().backbone(config, facts)
        network.dead = nn.Parameter(torch.zeros(1))
        return network


class NeighbourTemplates(ToyModality):
    def templates(
        self, config: ToyConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        space, _ = super().templates(config, facts, request)
        return space, Cond({"label": torch.arange(len(request.ids)) % 3})


class NoFiles(ToyModality):
    def write(
        self,
        config: ToyConfig,
        facts: Mapping[str, Any],
        batch: Batch,
        folder: Path,
        ids: Sequence[int],
    ) -> list[Path]:
        return []


class Forgetful(ToyModality):
    """Its network counts its calls in a number that no state holds."""

    def backbone(self, config: ToyConfig, facts: Mapping[str, Any]) -> nn.Module:
        network: Any = super().backbone(config, facts)
        forward, calls = network.forward, [0]

        def counting(*args: Any) -> Any:
            calls[0] += 1
            return forward(*args) * (1 + 0.1 * calls[0])

        network.forward = counting
        return network


class WrongWidth(ToyModality):
    def bin_width(self, config: ToyConfig, facts: Mapping[str, Any]) -> float:
        return 0.125


class UnmetCondition(ToyModality):
    def conditions(self, config: ToyConfig, facts: Mapping[str, Any]) -> tuple[Condition, ...]:
        return (Condition("colour", "a colour", ["red"], closed=True),)

    def templates(
        self, config: ToyConfig, facts: Mapping[str, Any], request: Request
    ) -> tuple[Space, Cond | None]:
        if "colour" in request.values:
            raise ConfigError("cond: unknown condition 'colour'")
        return super().templates(config, facts, request)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (RandomItems, "function of its index and seed"),
        (TupleFacts, "survive JSON"),
        (DeadParameter, "reaches every parameter"),
        (Forgetful, "resumes to the bit"),
        (NeighbourTemplates, "depends on its id"),
        (NoFiles, "a file for each sample"),
        (UnmetCondition, "takes colour=red, as conditions.. says; found .*unknown condition"),
        (WrongWidth, "multiples of bin_width"),
    ],
)
def test_a_broken_promise_is_found(broken: type[ToyModality], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        list(check_modality(broken()))
