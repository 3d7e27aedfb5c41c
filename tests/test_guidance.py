from __future__ import annotations

import pytest
import torch
from exactness import near
from oracle_tools import SPACES, ExactNetwork, normal, streams
from torch import Tensor

from gendiff.denoiser import BoundDenoiser, Denoiser
from gendiff.errors import SamplingError
from gendiff.grids import UniformTime
from gendiff.guidance import ClassifierFree
from gendiff.samplers import DPMSolverPP2M, sample
from gendiff.schedules import Cosine
from gendiff.spaces import Cond, Dense, Space
from gendiff.testing import Gaussian, Mixture

pytestmark = pytest.mark.usefixtures("float64")
SCHEDULE, VARIANCE = Cosine(), 0.3


class Two:
    """The exact eps network of two laws: one with the condition, one where it is hidden."""

    def __init__(self, seen: object, hidden: object) -> None:
        self.seen = ExactNetwork("eps", SCHEDULE, seen, 1.0)  # type: ignore[arg-type]
        self.hidden = ExactNetwork("eps", SCHEDULE, hidden, 1.0)  # type: ignore[arg-type]
        self.calls = 0

    def __call__(self, x: Tensor, noise: Tensor, cond: Cond, space: Space) -> Tensor:
        self.calls += 1
        dropped = (
            torch.zeros(len(noise), dtype=torch.bool) if cond.dropped is None else (cond.dropped)
        )
        mask = space.expand(dropped)
        both = (net(x, noise, cond, space) for net in (self.hidden, self.seen))
        return torch.where(mask, *both)


def gaussians(space: Space, means: tuple[Tensor, Tensor]) -> tuple[BoundDenoiser, Two]:
    net = Two(*(Gaussian(SCHEDULE, space, mean, VARIANCE) for mean in means))
    cond = Cond({"label": torch.arange(space.batch_size)})
    return Denoiser(net, SCHEDULE, "eps").bind(space, cond), net


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 1.0, 3.5])
def test_two_gaussians(space: Space, scale: float) -> None:
    """Of N(mu_1, v) away from N(mu_0, v): the estimate, and the samples, of mean
    mu_0 + w (mu_1 - mu_0)."""
    seen, hidden = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    bound, net = gaussians(space, (seen, hidden))
    guided = ClassifierFree(bound, scale)
    law = Gaussian(SCHEDULE, space, hidden + scale * (seen - hidden), VARIANCE)
    x_t = space.noise(streams(space), 0)
    for t in (0.95, 0.5, 0.02):
        near(guided(x_t, t), law(x_t, t), 1e-9)  # eps_hat / alpha near the noise
    assert net.calls == (3 if scale == 1 else 6)
    times = UniformTime().times(SCHEDULE, 8)
    ours, theirs = (
        sample(d, space, SCHEDULE, DPMSolverPP2M(), times, streams(space)) for d in (guided, law)
    )
    near(ours, theirs, 1e-8)


def test_scale_one_is_the_model_itself() -> None:
    space = SPACES["ragged"]
    bound, net = gaussians(space, (torch.zeros(space.shape), torch.zeros(space.shape)))
    x_t = space.noise(streams(space), 0)
    assert torch.equal(ClassifierFree(bound, 1.0)(x_t, 0.3), bound(x_t, 0.3))
    assert net.calls == 2


def test_scale_zero_is_unconditional() -> None:
    """Bit for bit: the mixture that the classes add up to."""
    space = Dense((6, 2))
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.2]])
    whole = Mixture(SCHEDULE, means, torch.full((2,), 0.4), torch.tensor([0.3, 0.7]))
    one = Gaussian(SCHEDULE, space, means[:1].expand(6, 2), 0.16)
    bound = Denoiser(Two(one, whole), SCHEDULE, "eps").bind(
        space, Cond({"label": torch.zeros(6).long()})
    )
    guided = ClassifierFree(bound, 0.0)
    x_t = normal(6, 2)
    assert torch.equal(guided(x_t, 0.4), guided.unconditional(x_t, 0.4))
    near(guided(x_t, 0.4), whole(x_t, 0.4), 1e-12)


def test_two_times_at_once() -> None:
    space = SPACES["dense"]
    bound, _ = gaussians(space, (normal(3, 5, seed=1), normal(3, 5, seed=2)))
    guided, x_t = ClassifierFree(bound, 2.0), normal(3, 5)
    t = torch.tensor([0.2, 0.5, 0.8])
    alone = torch.stack([guided(x_t, time)[i] for i, time in enumerate(t.tolist())])
    near(guided(x_t, t), alone, 1e-12)


def test_variance_is_the_conditional_models() -> None:
    def net(x: Tensor, noise: Tensor, cond: Cond, space: Space) -> Tensor:
        shift = 0.0 if cond.dropped is None else 9.0
        return torch.cat([x + shift, x - 1 + shift], 1)

    bound = Denoiser(net, SCHEDULE, "x").bind(Dense((2, 3)), Cond({"label": torch.zeros(2)}))
    x_t = normal(2, 3)
    x_hat, variance = ClassifierFree(bound, 2.0).with_variance(x_t, 0.5)
    near(variance, x_t - 1, 1e-12)
    near(x_hat, x_t - 9, 1e-12)  # 2 x - (x + 9)


def test_no_condition() -> None:
    space = Dense((2, 3))
    with pytest.raises(SamplingError, match="needs a condition"):
        ClassifierFree(Denoiser(lambda *_: torch.zeros(2, 3), SCHEDULE).bind(space), 2.0)
