"""The U-Net: shapes, conditioning, and independence of the images in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gendiff.spaces import Cond
from gendiff_image.unet import Attention, UNet, attend, group_norm

CLASSES = 4


def labels(values: list[int], dropped: list[bool] | None = None) -> Cond:
    mask = None if dropped is None else torch.tensor(dropped)
    return Cond({"label": torch.tensor(values)}, mask)


def network(*, perturb: bool = True, **changes: Any) -> UNet:
    """A small network in eval mode; its zeroed layers get weights unless told otherwise."""
    torch.manual_seed(0)
    options = {
        "channels": 8,
        "channel_multipliers": (1, 2),
        "attention_levels": (1,),
        "head_channels": 8,
        "classes": CLASSES,
        **changes,
    }
    net = UNet(**options)
    if perturb:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def images(count: int = 4, channels: int = 1, height: int = 8, width: int = 8) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(1))


def levels(count: int = 4) -> Tensor:
    return torch.linspace(-2, 1, count)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [(8, 8), (4, 12), (18, 2)])
@pytest.mark.parametrize("learned_variance", [False, True])
def test_shapes(channels: int, size: tuple[int, int], learned_variance: bool) -> None:
    net = network(image_channels=channels, learned_variance=learned_variance)
    out = net(images(2, channels, *size), levels(2), labels([0, 1]), None)
    assert out.shape == (2, channels * (1 + learned_variance), *size)
    assert out.std() > 0


@pytest.mark.parametrize("multipliers", [(1,), (1, 2, 2), (2, 1, 3)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_levels_and_blocks(multipliers: tuple[int, ...], blocks: int) -> None:
    net = network(channel_multipliers=multipliers, blocks=blocks, attention_levels=(0,))
    assert net.stride == 2 ** (len(multipliers) - 1)
    x = images(2, 1, 8, 12)
    assert net(x, levels(2), None, None).shape == x.shape


def test_starts_at_zero() -> None:
    net = network(perturb=False, image_channels=3)
    assert torch.equal(net(images(channels=3), levels(), labels([0, 1, 2, 3])), images(4, 3) * 0)


def test_every_image_sees_its_noise_level_and_class() -> None:
    net, x = network(), images(1).expand(4, -1, -1, -1)
    same_class = net(x, levels(), labels([0] * 4))
    same_level = net(x, torch.zeros(4), labels([0, 1, 2, 3]))
    for out in (same_class, same_level):
        for i in range(3):
            assert (out[i] - out[i + 1]).abs().max() > 1e-4


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_noise_levels_are_told_apart(scale: float) -> None:
    """Neighbouring levels get different embeddings, as log(sigma) / 4 and as 1000 * t."""
    net = network(channels=32)
    noise = scale * torch.linspace(0, 1, 51)
    embedding = net.embed(noise, None)
    gaps = (embedding[1:] - embedding[:-1]).norm(dim=1) / embedding.norm(dim=1).mean()
    assert gaps.min() > 1e-4


def test_dropped_label_is_no_label() -> None:
    net, x, noise = network(), images(), levels()
    none = net(x, noise, None, None)
    torch.testing.assert_close(net(x, noise, labels([0, 1, 2, 3], [True] * 4)), none)
    some = net(x, noise, labels([0, 1, 2, 3], [True, False, True, False]))
    kept = net(x, noise, labels([0, 1, 2, 3]))
    torch.testing.assert_close(some[::2], none[::2])
    torch.testing.assert_close(some[1::2], kept[1::2])
    assert (none - kept).abs().amax((1, 2, 3)).min() > 1e-4


def test_unconditional_network_ignores_labels() -> None:
    net, x, noise = network(classes=None), images(), levels()
    assert torch.equal(net(x, noise, labels([0, 1, 2, 3])), net(x, noise, None))


def test_size_must_fit() -> None:
    net = network(channel_multipliers=(1, 1, 2))
    with pytest.raises(ValueError, match="6x8 is not divisible by 4") as caught:
        net(images(1, 1, 6, 8), levels(1), None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"attention_levels": (2,)}, "Levels are 0 to 1"), ({"head_channels": 5}, "does not divide")],
)
def test_options_must_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        network(**changes)


def test_gradient_reaches_every_parameter() -> None:
    net = network(dropout=0.1).train()
    out = net(images(), levels(), labels([0, 1, 2, 3], [False, False, False, True]))
    out.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_dropout_is_off_in_eval() -> None:
    net, x, noise = network(dropout=0.5), images(), levels()
    assert torch.equal(net(x, noise), net(x, noise))
    net.train()
    assert not torch.equal(net(x, noise), net(x, noise))


def test_images_do_not_see_each_other() -> None:
    net, x, noise = network(blocks=2), images(16), levels(16)
    cond = labels([i % CLASSES for i in range(16)])
    out = net(x, noise, cond)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    permuted = net(x[order], noise[order], labels(cond["label"][order].tolist()))
    torch.testing.assert_close(permuted, out[order])
    alone = torch.cat(
        [net(x[i : i + 1], noise[i : i + 1], labels([i % CLASSES])) for i in range(16)]
    )
    # Other batch sizes take other kernels: equal up to the rounding of float32.
    torch.testing.assert_close(alone, out, rtol=1e-4, atol=1e-5)


def test_attention_is_attention() -> None:
    """Against the definition, with an explicit softmax."""
    torch.manual_seed(0)
    layer = Attention(16, 2, 8)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 16, 3, 5)
    h = layer.norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
    q, k, v = layer.qkv(h).chunk(3, dim=-1)
    heads = []
    for part in (slice(0, 8), slice(8, 16)):
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 8**0.5).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = x + layer.out(torch.cat(heads, -1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_attention_in_bfloat16_is_attention() -> None:
    """On a CPU by products of its own; to the number type's precision, gradients too."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 40, 8) for _ in range(3)]
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.clone().to(dtype).requires_grad_() for x in given)
        out = attend(q, k, v)
        (out.float() * torch.arange(8)).sum().backward()
        found.append([out.float(), *(x.grad.float() for x in (q, k, v))])  # type: ignore[union-attr]
        assert out.dtype == dtype
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("channels", "groups"), [(8, 1), (16, 2), (40, 5), (64, 8), (6, 6)])
def test_groups_fill_vector_registers(channels: int, groups: int) -> None:
    assert group_norm(channels, 8).num_groups == groups


def test_weights_survive_a_round_trip() -> None:
    net = network()
    other = network(perturb=False)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(images(), levels()), other(images(), levels()))


def test_no_graph_breaks() -> None:
    net = network()
    x, noise, cond = images(), levels(), labels([0, 1, 2, 3], [False, True, False, True])
    seen: list[Any] = []

    def record(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(net, fullgraph=True, backend=record)
    torch.testing.assert_close(compiled(x, noise, cond), net(x, noise, cond))
    assert len(seen) == 1
