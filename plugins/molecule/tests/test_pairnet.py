"""The default network's symmetries, alone and through the whole chain of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gendiff.denoiser import Denoiser
from gendiff.grids import Karras
from gendiff.noise import StepNoise, Streams
from gendiff.objective import EDMWeight, Objective, Uniform
from gendiff.samplers import DPMSolverPP2M, Euler, Sampler, sample
from gendiff.schedules import EDM
from gendiff.spaces import Batch, Categories, Cond, Ragged
from gendiff_molecule.pairnet import PairNet

KINDS = 4
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


def network(dtype: torch.dtype, groups: int = 2, **keys: Any) -> PairNet:
    """A small network whose every parameter matters: none is left at its initial zero."""
    torch.manual_seed(0)
    net = PairNet(KINDS, 32, 16, 4, 3, groups=groups, **keys).to(dtype)
    gen = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=gen, dtype=dtype)
    return net.eval().requires_grad_(False)


def state(sizes: Sequence[int], seed: int, dtype: torch.dtype) -> tuple[Tensor, Ragged]:
    space = Ragged(torch.tensor(sizes), 3 + KINDS, 3)
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(space.shape, generator=gen, dtype=torch.float64).to(dtype), space


def orthogonal(seed: int, reflect: bool, dtype: torch.dtype) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=gen, dtype=torch.float64))
    q[:, 0] *= q.det().sign() * (-1 if reflect else 1)
    return q.to(dtype)


def turned(x: Tensor, q: Tensor) -> Tensor:
    return torch.cat([x[:, :3] @ q, x[:, 3:]], 1)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, a.abs().max().item())
    assert (a - b).abs().max().item() < TOLERANCE[dtype] * scale


@DTYPES
@settings(max_examples=25, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 999), reflect=st.booleans())
def test_rotation_and_reflection(
    dtype: torch.dtype, sizes: list[int], seed: int, reflect: bool
) -> None:
    net, (x, space), q = (
        network(dtype),
        state(sizes, seed, dtype),
        orthogonal(seed, reflect, dtype),
    )
    noise = torch.linspace(-1, 1, len(sizes), dtype=dtype)
    out = net(x, noise, None, space)
    assert len(x) == 1 or out[:, :3].abs().max() > 0 or max(sizes) == 1
    close(turned(out, q), net(turned(x, q), noise, None, space), dtype)


@DTYPES
@settings(max_examples=15, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_translation_of_each_molecule(dtype: torch.dtype, sizes: list[int], seed: int) -> None:
    net, (x, space) = network(dtype), state(sizes, seed, dtype)
    noise = torch.zeros(len(sizes), dtype=dtype)
    gen = torch.Generator().manual_seed(seed)
    shift = torch.randn(len(sizes), 3, generator=gen, dtype=torch.float64).to(dtype)
    moved = torch.cat([x[:, :3] + shift[space.index], x[:, 3:]], 1)
    close(net(x, noise, None, space), net(moved, noise, None, space), dtype)


@DTYPES
@settings(max_examples=15, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 999))
def test_permutation_within_each_molecule(dtype: torch.dtype, sizes: list[int], seed: int) -> None:
    net, (x, space) = network(dtype), state(sizes, seed, dtype)
    noise = torch.zeros(len(sizes), dtype=dtype)
    gen = torch.Generator().manual_seed(seed)
    starts = torch.tensor([0, *sizes]).cumsum(0)
    order = torch.cat(
        [s + torch.randperm(n, generator=gen) for s, n in zip(starts[:-1], sizes, strict=True)]
    )
    close(net(x, noise, None, space)[order], net(x[order], noise, None, space), dtype)


@DTYPES
@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_molecule_does_not_see_its_neighbours(dtype: torch.dtype, groups: int) -> None:
    sizes = [5, 1, 17, 9, 9, 30]
    net, (x, space) = network(dtype, groups), state(sizes, 3, dtype)
    noise = torch.linspace(-1, 1, len(sizes), dtype=dtype)
    out = net(x, noise, None, space).split(sizes)
    for i, part in enumerate(x.split(sizes)):
        alone = net(part, noise[i : i + 1], None, Ragged(torch.tensor([sizes[i]]), 3 + KINDS, 3))
        close(out[i], alone, dtype)


@DTYPES
def test_the_graph_permutes_with_the_atoms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = PairNet(0, 32, 16, 4, 2, graph_types=KINDS, groups=1).to(dtype).requires_grad_(False)
    for p in net.parameters():
        p.data += 0.05 * torch.randn(p.shape, dtype=dtype)
    n = 7
    space = Ragged(torch.tensor([n]), 3, 3)
    x, noise = torch.randn(n, 3, dtype=dtype), torch.zeros(1, dtype=dtype)
    atoms, bonds = torch.randint(KINDS, (1, n)), torch.randint(5, (1, n, n)).triu(1)
    bonds = bonds + bonds.transpose(1, 2)
    order = torch.randperm(n)
    out = net(x, noise, Cond({"atoms": atoms, "bonds": bonds}), space)
    cond = Cond({"atoms": atoms[:, order], "bonds": bonds[:, order][:, :, order]})
    close(out[order], net(x[order], noise, cond, space), dtype)
    other = Cond({"atoms": atoms, "bonds": bonds.roll(1, 1).roll(1, 2)})
    assert (net(x, noise, other, space) - out).abs().max() > 1e-3  # and the graph matters


def test_coincident_atoms_have_finite_gradients() -> None:
    net = network(torch.float32).requires_grad_(True)
    x = torch.zeros(6, 3 + KINDS, requires_grad=True)
    out = net(x, torch.zeros(1), None, Ragged(torch.tensor([6]), 3 + KINDS, 3))
    out.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@dataclass(frozen=True)
class Turned:
    """A noise source whose first three columns are rotated."""

    source: Streams
    q: Tensor

    def normal(self, rows: Sequence[int], width: tuple[int, ...], draw: int) -> Tensor:
        return turned(self.source.normal(rows, width, draw), self.q)


@pytest.mark.parametrize("sampler", [DPMSolverPP2M(), Euler(churn=5)], ids=["ode", "churn"])
@pytest.mark.parametrize("reflect", [False, True])
def test_the_whole_chain_turns_with_its_noise(sampler: Sampler, reflect: bool) -> None:
    dtype, schedule = torch.float64, EDM(10)
    space = Ragged(torch.tensor([1, 6, 13]), 3 + KINDS, 3)
    denoiser = Denoiser(
        network(dtype), schedule, "edm", 1.2, categories=(Categories(3, KINDS, 0.5),)
    )
    times = Karras(sigma_min=0.05).times(schedule, 12)
    streams = Streams(4, (0, 1, 2), dtype=dtype)
    q = orthogonal(5, reflect, dtype)
    bound = denoiser.bind(space)
    x = sample(bound, space, schedule, sampler, times, streams)
    other = sample(bound, space, schedule, sampler, times, Turned(streams, q))
    assert x[:, :3].std() > 0.1
    assert (turned(x, q) - other).abs().max() < 1e-9


@settings(max_examples=10, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 999), reflect=st.booleans())
def test_the_loss_of_a_molecule_is_invariant(sizes: list[int], seed: int, reflect: bool) -> None:
    dtype, q = torch.float64, orthogonal(seed, reflect, torch.float64)
    code = Categories(3, KINDS, 0.5)
    x, space = state(sizes, seed, dtype)
    code.of(x).zero_()[:, 0] = code.scale
    denoiser = Denoiser(network(dtype), EDM(10), "edm", 1.2, categories=(code,))
    objective = Objective(Uniform(), EDMWeight())
    eps = space.noise(StepNoise(seed, dtype=dtype), 0)
    t = torch.full((len(sizes),), 0.1, dtype=dtype)
    batch = Batch(space.project(x), space)
    here = objective.at(denoiser, batch, t, eps).per_sample
    there = objective.at(denoiser, Batch(turned(batch.x, q), space), t, turned(eps, q)).per_sample
    assert (here - there).abs().max() < 1e-9


def test_positions_stay_in_full_precision_under_autocast() -> None:
    net, (x, space) = network(torch.float32), state([5, 12], 0, torch.float32)
    noise, q = torch.zeros(2), orthogonal(3, True, torch.float32)
    full = net(x, noise, None, space)
    with torch.autocast("cpu", torch.bfloat16):
        half, other = net(x, noise, None, space), net(turned(x, q), noise, None, space)
    assert half.dtype == torch.float32
    scale = full.abs().max().item()
    assert 0 < (half - full).abs().max().item() < 0.05 * scale  # bfloat16 has 8 bits
    # Directions come from full-precision differences: only the weights of the pulls are rounded.
    assert (turned(half, q) - other).abs().max().item() < 0.02 * scale
