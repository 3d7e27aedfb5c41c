"""The mel networks: padding and neighbours change nothing, and what it is told reaches it."""

from __future__ import annotations

import pytest
import torch

from gendiff.denoiser import Denoiser
from gendiff.grids import Karras
from gendiff.likelihood import ode_log_likelihood
from gendiff.noise import Streams
from gendiff.samplers import sample
from gendiff.schedules import EDM
from gendiff.singlestep import DDIM
from gendiff.spaces import Batch, Cond, Masked
from gendiff_speech.network import DiffTTS, MelNet, token_of_frame

Network = MelNet | DiffTTS
both = pytest.mark.parametrize("kind", [MelNet, DiffTTS])


def network(kind: type[Network]) -> Network:
    torch.manual_seed(0)
    net = kind(8, 5, 3, 16, 3, (1, 2), 0.0)
    for parameter in net.parameters():
        if not parameter.any():  # begin as nothing
            torch.nn.init.normal_(parameter, std=0.5)
    return net.double()


def cond(dropped: bool | None = None) -> Cond:
    values = {
        "tokens": torch.tensor([[1, 2, 3], [4, 1, 0]]),
        "durations": torch.tensor([[4, 2, 5], [3, 4, 0]]),
        "speaker": torch.tensor([0, 2]),
        "text": torch.tensor([0, 1]),
    }
    return Cond(values, None if dropped is None else torch.tensor([dropped, dropped]))


def test_frames_find_their_tokens() -> None:
    place, position = token_of_frame(torch.tensor([[2, 1, 3], [1, 1, 0]]), 6)
    assert place.tolist()[0] == [0, 0, 1, 2, 2, 2]
    assert place.tolist()[1][:2] == [0, 1]
    assert torch.allclose(position[0], torch.tensor([0.25, 0.75, 0.5, 1 / 6, 0.5, 5 / 6]))


@both
def test_padding_and_neighbours_change_nothing(kind: type[Network]) -> None:
    net, lengths = network(kind), torch.tensor([11, 7])
    x, noise = torch.randn(2, 8, 30, dtype=torch.double), torch.tensor([0.3, -0.5]).double()
    wide, tight = Masked(lengths, 8, 30), Masked(lengths, 8, 11)
    x = wide.project(x)
    out = net(x, noise, cond(), wide)
    assert out.std() > 0.1
    assert torch.allclose(out[..., :11], net(x[..., :11], noise, cond(), tight), atol=1e-12)
    assert out[0, :, 11:].abs().max() == 0
    alone = net(x[1:, :, :7], noise[1:], cond().select([1]), Masked(lengths[1:], 8, 7))
    assert torch.allclose(out[1:, :, :7], alone, atol=1e-12)


@both
def test_samples_and_likelihood_do_not_know_of_padding_and_company(kind: type[Network]) -> None:
    """In single precision, as it is used: to 1e-5, per dimension for the likelihood."""
    net, schedule = network(kind).float(), EDM(sigma_max=20)
    lengths, ids = torch.tensor([11, 7]), (4, 9)
    times = Karras().times(schedule, 8)
    found = []
    for rows, frames in (([0, 1], 11), ([0, 1], 30), ([1], 7), ([1, 0], 16)):
        space, told = Masked(lengths[rows], 8, frames), cond().select(rows)
        model = Denoiser(net, schedule, "edm", 1.0, "log_snr", ()).bind(space, told)
        noise = Streams(5, tuple(ids[row] for row in rows))
        x = sample(model, space, schedule, DDIM(1.0), times, noise)
        batch = Batch(x, space, told)
        likely = ode_log_likelihood(model, batch, schedule, steps=2, probes="sphere", noise=noise)
        per_dim = likely / space.dof()
        found.append(
            {
                row: (x[at, :, : lengths[row]], per_dim[at], x[at, :, lengths[row] :])
                for at, row in enumerate(rows)
            }
        )
    for other in found[1:]:
        for row, (x, likely, padding) in other.items():
            assert (x - found[0][row][0]).abs().max() < 1e-5
            assert (likely - found[0][row][1]).abs() < 1e-5
            assert not padding.any()
    assert found[0][0][0].std() > 0.3
    assert (found[0][0][1] - found[0][1][1]).abs() > 1e-3


@both
def test_what_is_told_matters_and_what_is_hidden_does_not(kind: type[Network]) -> None:
    net, space = network(kind), Masked(torch.tensor([11, 7]), 8, 11)
    x, noise = space.project(torch.randn(2, 8, 11).double()), torch.zeros(2).double()

    def changed(key: str, dropped: bool | None) -> bool:
        told = cond(dropped)
        other = Cond({**told.values, key: told[key].roll(1, 0)}, told.dropped)
        return not torch.allclose(net(x, noise, told, space), net(x, noise, other, space))

    for key in ("tokens", "durations", "speaker"):
        assert changed(key, None)
        assert not changed(key, True)
    assert not changed("text", None)  # what is said reaches it by its tokens


def test_frames_of_one_sample_hear_of_each_other_however_far() -> None:
    net, space = network(MelNet), Masked(torch.tensor([90, 90]), 8, 90)
    told = Cond({**cond().values, "durations": torch.tensor([[30, 30, 30], [45, 45, 0]])})
    x, noise = torch.randn(2, 8, 90).double(), torch.zeros(2).double()
    other = x.clone()
    other[0, :, 60:] += 1
    change = (net(other, noise, told, space) - net(x, noise, told, space)).abs()
    assert change[0, :, 0].max() > 1e-6  # convolutions alone reach 24 frames
    assert change[1].max() == 0


@both
def test_every_parameter_has_a_gradient(kind: type[Network]) -> None:
    net, space = network(kind), Masked(torch.tensor([11, 7]), 8, 11)
    out = net(
        space.project(torch.randn(2, 8, 11).double()), torch.zeros(2).double(), cond(), space
    )
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_neighbouring_bands_soon_take_noise_away() -> None:
    """Without ``Fine`` a hundred steps teach nothing at low noise, where it is all."""
    space = Masked(torch.tensor([24, 24]), 32, 24)
    kernel = torch.ones(1, 1, 7, 5) / 35**0.5
    sigma, late = 0.3, {}
    for fine in (True, False):
        torch.manual_seed(0)
        net = MelNet(32, 5, 3, 48, 2, (1, 2), 0.0)
        net.fine.requires_grad_(fine)
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        losses = []
        for _ in range(100):
            x = torch.nn.functional.conv2d(torch.randn(2, 1, 38, 28), kernel)[:, 0]
            eps = torch.randn_like(x)
            scale = (1 + sigma**2) ** 0.5
            noise = torch.full((2,), sigma).log() / 4
            target = (sigma * x - eps) / scale
            loss = (net((x + sigma * eps) / scale, noise, cond(), space) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        late[fine] = sum(losses[-20:]) / 20
    assert late[True] < 0.7 * late[False]
