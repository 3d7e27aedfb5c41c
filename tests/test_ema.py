from __future__ import annotations

import pytest
import torch
from exactness import near
from oracle_tools import normal
from torch import nn

from gendiff.ema import EMA

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("half_life", "warmup"), [(3.0, 1e9), (50.0, 0.05), (4.0, 0.3)])
def test_weighted_sum(half_life: float, warmup: float) -> None:
    """theta_bar_n = sum_k (1 - d_k) d_{k+1} ... d_n theta_k + d_1 ... d_n theta_0."""
    steps = 30
    path = normal(steps + 1, 6)
    net = nn.Linear(2, 3, bias=False)
    net.weight.data.copy_(path[0].reshape(3, 2))
    ema = EMA(net, half_life, warmup)
    decays = [0.5 ** (1 / min(half_life, warmup * k)) for k in range(1, steps + 1)]
    for step in range(1, steps + 1):
        net.weight.data.copy_(path[step].reshape(3, 2))
        ema.update(step)
        weights = [torch.tensor(decays[:step]).prod()]
        for k in range(1, step + 1):
            weights.append((1 - decays[k - 1]) * torch.tensor([*decays[k:step], 1.0]).prod())
        near(ema.module.weight.flatten(), torch.stack(weights) @ path[: step + 1], 1e-13)


def test_half_life() -> None:
    """After h steps half of the weight of the start is left."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    ema = EMA(net, 10, warmup=1e9)
    net.weight.data.fill_(0.0)
    for step in range(1, 11):
        ema.update(step)
    near(ema.module.weight, [[0.5]], 1e-14)


def test_warmup() -> None:
    ema = EMA(nn.Linear(1, 1), 100.0, warmup=0.05)
    near(ema.decay(40), 0.5 ** (1 / 2), 1e-15)  # half-life 0.05 * 40 steps
    near(ema.decay(2000), 0.5 ** (1 / 100), 1e-15)
    near(ema.decay(9000), 0.5 ** (1 / 100), 1e-15)


def test_no_half_life_copies() -> None:
    net = nn.Linear(3, 2)
    ema = EMA(net, 0)
    net.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    ema.update(1)
    assert torch.equal(ema.module.weight, net.weight)


def test_buffers_are_copied() -> None:
    net = nn.BatchNorm1d(2)
    ema = EMA(net, 1000.0)
    net(normal(8, 2) + 3)
    ema.update(1)
    assert torch.equal(ema.module.running_mean, net.running_mean)
    assert ema.module.num_batches_tracked == 1


def test_the_average_is_apart_from_the_network() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    before = net[0].weight.detach().clone()
    ema = EMA(net, 5.0)
    assert net.training
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net[0].weight.add_(1)
    assert torch.equal(ema.module[0].weight, before)
    ema.update(1)
    assert torch.equal(net[0].weight, before + 1)
