from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gendiff.spaces import Cond, Ragged
from gendiff_molecule.egnn import EGNN

torch.set_num_threads(1)  # the tensors are small
K = 5
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative to the largest output


def network(dtype: torch.dtype = torch.float64, **options: int | bool) -> EGNN:
    torch.manual_seed(0)
    net = EGNN(K, 32, 3, **options)  # type: ignore[arg-type]
    for block in net.blocks:  # steps of the size of a trained network's
        block.step.weight.data *= 30  # type: ignore[operator, union-attr]
    return net.to(dtype)


def molecules(
    seed: int, sizes: list[int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Ragged]:
    space = Ragged(torch.tensor(sizes), 3 + K, 3)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(len(space.index), 3 + K, generator=random, dtype=torch.float64)
    x[:, :3] *= 2
    return x.to(dtype), torch.rand(len(sizes), generator=random).to(dtype), space


def orthogonal(seed: int, determinant: int, dtype: torch.dtype) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64)).Q
    return (matrix * (determinant * matrix.det()).sign()).to(dtype)  # -I has determinant -1


def close(a: Tensor, b: Tensor) -> None:
    scale = max(b.abs().max().item(), 1.0)
    assert (a - b).abs().max().item() / scale < TOLERANCE[a.dtype]


SIZES = [[1], [1, 2, 3], [40, 1, 17, 9, 23], list(range(1, 41, 3))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("seed", range(2))
def test_turns_with_the_molecule(
    dtype: torch.dtype, sizes: list[int], determinant: int, seed: int
) -> None:
    net, (x, noise, space) = network(dtype), molecules(seed, sizes, dtype)
    turn = orthogonal(seed, determinant, dtype)
    with torch.no_grad():
        out = net(x, noise, None, space)
        turned = net(torch.cat([x[:, :3] @ turn, x[:, 3:]], 1), noise, None, space)
    assert out.shape == x.shape
    close(turned[:, :3], out[:, :3] @ turn)
    close(turned[:, 3:], out[:, 3:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_does_not_see_translations(dtype: torch.dtype, sizes: list[int]) -> None:
    net, (x, noise, space) = network(dtype), molecules(0, sizes, dtype)
    shift = torch.tensor([0.5, -1.25, 2.0], dtype=dtype)
    with torch.no_grad():
        out = net(x, noise, None, space)
        close(net(torch.cat([x[:, :3] + shift, x[:, 3:]], 1), noise, None, space), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_order_of_atoms_does_not_matter(dtype: torch.dtype, sizes: list[int]) -> None:
    net, (x, noise, space) = network(dtype), molecules(0, sizes, dtype)
    random = torch.Generator().manual_seed(1)
    rows = torch.arange(len(x)).split(sizes)
    order = torch.cat([r[torch.randperm(len(r), generator=random)] for r in rows])
    with torch.no_grad():
        close(net(x[order], noise, None, space), net(x, noise, None, space)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_are_independent(dtype: torch.dtype) -> None:
    sizes = SIZES[2]
    net, (x, noise, space) = network(dtype), molecules(0, sizes, dtype)
    with torch.no_grad():
        out = net(x, noise, None, space).split(sizes)
        for i, (rows, expected) in enumerate(zip(x.split(sizes), out, strict=True)):
            alone = Ragged(space.sizes[i : i + 1], 3 + K, 3)
            close(net(rows, noise[i : i + 1], None, alone), expected)


@pytest.mark.parametrize("count", [1, 2, 16])
def test_groups_change_nothing(count: int) -> None:
    x, noise, space = molecules(0, list(range(1, 41)))
    with torch.no_grad():
        expected = network()(x, noise, None, space)
        close(network(groups=count)(x, noise, None, space), expected)


@pytest.mark.parametrize("attention", [True, False])
def test_matches_the_definition(attention: bool) -> None:
    """The module's three equations, edge by edge."""
    net, (x, noise, space) = network(attention=attention), molecules(0, [4])
    with torch.no_grad():
        h = net.embedding(torch.cat([x[:, 3:], noise.expand(4, 1)], 1))
        start = position = x[:, :3]
        for block in net.blocks:
            messages, moves = torch.zeros_like(h), torch.zeros_like(position)

            def edge(module, h, position, i, j):  # type: ignore[no-untyped-def]
                squares = [(p[i] - p[j]).square().sum() for p in (position, start)]
                v = torch.cat([h[i], h[j], torch.stack(squares)])
                silu = torch.nn.functional.silu
                return silu(module.second(silu(module.first(v))))

            edges = [(i, j) for i in range(4) for j in range(4) if i != j]
            for i, j in edges:
                m = edge(block.message, h, position, i, j)
                messages[i] += torch.sigmoid(block.gate(m)) * m if attention else m
            h = h + block.node(torch.cat([h, messages], 1))
            for i, j in edges:
                offset = position[i] - position[j]
                step = torch.tanh(block.step(edge(block.pull, h, position, i, j)))
                moves[i] += offset / ((offset.square().sum() + 1e-8).sqrt() + 1) * 15 * step
            position = position + moves
        expected = torch.cat([position - start, net.out(h)], 1)
        close(net(x, noise, None, space), expected)


def test_gradient_is_finite_where_atoms_coincide() -> None:
    net, (x, noise, space) = network(torch.float32), molecules(0, [3, 5, 1], torch.float32)
    x[3:8] = x[3]
    x.requires_grad_()
    net(x, noise, None, space).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_gradient_is_that_of_finite_differences() -> None:
    net, (x, noise, space) = network(), molecules(0, [3, 1, 2])
    assert torch.autograd.gradcheck(lambda v: net(v, noise, None, space), x.requires_grad_())


def test_nan_stays_visible_and_with_its_sample() -> None:
    net, (x, noise, space) = network(), molecules(0, [3, 4, 3])
    x[4, 0] = torch.nan
    with torch.no_grad():
        out = net(x, noise, None, space)
    assert out[3:7].isnan().all()
    assert out[:3].isfinite().all()
    assert out[7:].isfinite().all()


def test_context_is_seen_and_can_be_dropped() -> None:
    x, noise, space = molecules(0, [3, 4])
    net = network(context=2)
    cond = Cond({"context": torch.tensor([[0.5, -1.0], [2.0, 1.0]])})
    with torch.no_grad():
        free = net(x, noise, None, space)
        out = net(x, noise, cond, space)
        half = net(x, noise, cond.drop(torch.tensor([True, False])), space)
    assert (out - free).abs().max() > 1e-3
    close(half[:3], free[:3])
    close(half[3:], out[3:])


def test_noise_is_seen() -> None:
    net, (x, noise, space) = network(), molecules(0, [3, 4])
    with torch.no_grad():
        change = net(x, noise + torch.tensor([0.0, 0.5]), None, space)
        change -= net(x, noise, None, space)
    assert change[:3].abs().max() == 0
    assert change[3:].abs().max() > 1e-3


def test_positions_stay_precise_under_autocast() -> None:
    net, (x, noise, space) = network(torch.float32), molecules(0, [9, 12], torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = net(x, noise, None, space)
    with torch.no_grad():
        full = net(x, noise, None, space)
    assert half.dtype == torch.float32
    assert (half - full).abs().max() < 0.05 * full.abs().max()
