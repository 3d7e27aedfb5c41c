"""The log-likelihood of a molecule depends on neither its orientation nor its atoms' order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gendiff.denoiser import Denoiser
from gendiff.likelihood import ode_log_likelihood
from gendiff.schedules import EDM
from gendiff.spaces import Batch, Ragged
from gendiff_molecule.egnn import EGNN
from gendiff_molecule.pairnet import PairNet

KINDS = 2


def perturbed(net: nn.Module) -> nn.Module:
    gen = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data = p.data.double() + 0.05 * torch.randn(p.shape, generator=gen, dtype=torch.float64)
    return net.double().eval().requires_grad_(False)


def log_likelihood(net: nn.Module, x: Tensor, space: Ragged) -> Tensor:
    schedule = EDM(10)
    denoiser = Denoiser(net, schedule, "edm", 1.0).bind(space)
    return ode_log_likelihood(denoiser, Batch(x, space), schedule, steps=4, sigma_min=0.1)


@pytest.mark.parametrize("name", ["pairnet", "egnn"])
def test_turns_and_permutations_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    net = perturbed(
        PairNet(KINDS, 16, 8, 2, 2, groups=1) if name == "pairnet" else EGNN(KINDS, 16, 2)
    )
    space = Ragged(torch.tensor([2, 5]), 3 + KINDS, 3)
    gen = torch.Generator().manual_seed(2)
    x = space.project(torch.randn(space.shape, generator=gen, dtype=torch.float64))
    found = log_likelihood(net, x, space)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=gen, dtype=torch.float64))
    turned = log_likelihood(net, torch.cat([x[:, :3] @ q, x[:, 3:]], 1), space)
    torch.testing.assert_close(turned, found, rtol=1e-9, atol=1e-9)
    order = torch.tensor([1, 0, 4, 6, 2, 5, 3])
    torch.testing.assert_close(log_likelihood(net, x[order], space), found, rtol=1e-9, atol=1e-9)
    assert (log_likelihood(net, space.project(1.5 * x), space) - found).abs().min() > 1e-3
