"""Editing: what is kept stays, and tells the rest what it should, by closed forms."""

from __future__ import annotations

import json
from pathlib import Path

import exactness
import pytest
import torch
from exactness import near
from oracle_tools import SCHEDULES, SPACES, normal, streams
from torch import Tensor

from gendiff import config, runs
from gendiff.editing import Kept, Translated, time_of_noise
from gendiff.errors import ConfigError, SamplingError
from gendiff.generate import Model, Wish
from gendiff.grids import Karras
from gendiff.multistep import DPMSolverPP2M
from gendiff.noise import StepNoise
from gendiff.samplers import sample, start, states
from gendiff.schedules import EDM, Parts, Schedule, VPLinear
from gendiff.singlestep import DDIM, DDPM, Euler, Heun
from gendiff.spaces import Dense, Masked, Ragged, Space
from gendiff.testing import Gaussian, ToyModality
from gendiff.train import Trainer

exact = pytest.mark.usefixtures("float64")


def some(space: Space) -> Tensor:
    """A mask that keeps about half of a state; of centred columns, whole rows."""
    mask = normal(*space.shape, seed=9) > 0
    if isinstance(space, Ragged) and space.centred:
        mask[:, : space.centred] = mask[:, :1]
    return mask if not isinstance(space, Masked) else mask & space.mask


@exact
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_hold_is_the_nearest_valid_state_that_agrees(space: Space) -> None:
    """Against least squares on the subspace, where centred columns are known up to a shift."""
    x, known = (space.project(normal(*space.shape, seed=i)) for i in (1, 2))
    mask = some(space)
    held = space.hold(x, known, mask)
    near(space.project(held), held, 1e-12)
    near(space.part(held - known, mask), torch.zeros(space.shape), 1e-12)
    # What hold adds lies in the range of the projection that part is: no nearer one agrees.
    change = space.part(known - x, mask)
    near(space.part(change, mask), change, 1e-12)
    near(space.project(x + change), held, 1e-12)
    if not (isinstance(space, Ragged) and space.centred):
        assert torch.equal(held[mask], known[mask])
        assert torch.equal(held[~mask], x[~mask])


@exact
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_kept_is_the_posterior_of_a_gaussian(space: Space, schedule: Schedule) -> None:
    """E[x | x_t, what is known], by a pseudo-inverse on the whole batch's coordinates."""
    data = Gaussian(schedule, space, space.project(normal(*space.shape, seed=1)), 0.4)
    known, x_t = (space.project(normal(*space.shape, seed=i)) for i in (2, 3))
    mask, count = some(space), torch.Size(space.shape).numel()
    basis = torch.eye(count).unflatten(1, space.shape)
    to_valid = torch.stack([space.project(v).flatten() for v in basis], 1)
    to_known = torch.stack([space.part(v, mask).flatten() for v in basis], 1)
    for t in (0.9, 0.3):
        alpha, sigma = (float(v) for v in schedule(torch.tensor(t)))
        covariance = 0.4 * sigma**2 / (0.4 * alpha**2 + sigma**2) * to_valid
        x_hat = data(x_t, t).flatten()
        gain = covariance @ to_known.T @ torch.linalg.pinv(to_known @ covariance @ to_known.T)
        truth = x_hat + gain @ to_known @ (known.flatten() - x_hat)
        near(Kept(data, space, schedule, known, mask)(x_t, t).flatten(), truth, 1e-7)


class Correlated:
    """Data N(0, S) of two columns, S = [[1, r], [r, 1]]."""

    def __init__(self, schedule: Schedule, r: float) -> None:
        self.schedule, self.cov = schedule, torch.tensor([[1.0, r], [r, 1.0]])

    def __call__(self, x_t: Tensor, t: float | Tensor) -> Tensor:
        alpha, sigma = self.schedule(torch.as_tensor(t))
        noisy = alpha**2 * self.cov + sigma**2 * torch.eye(2)
        return x_t @ (alpha * self.cov @ torch.linalg.inv(noisy)).T


@exact
@pytest.mark.parametrize("sampler", [DDIM(1.0), DDPM(), Euler(churn=60)], ids=str)
def test_the_rest_has_its_conditional_law(sampler: DDIM | DDPM | Euler) -> None:
    """One column of a correlated pair is known: the other is N(r y, 1 - r^2)."""
    count, r, y = 1500, 0.8, 1.5
    space, schedule = Dense((count, 2)), EDM(sigma_max=20)
    known = torch.tensor([y, torch.nan]).expand(count, 2)
    mask = torch.tensor([True, False]).expand(count, 2)
    kept = Kept(Correlated(schedule, r), space, schedule, known, mask)
    held = space.hold(torch.zeros(count, 2), known, mask)
    noise = StepNoise(0, dtype=torch.float64)
    first = start(space, schedule, 1.0, noise, held)
    times = Karras(sigma_min=0.01).times(schedule, 1000)
    x = sample(kept, space, schedule, sampler, times, noise, first)
    assert torch.equal(x[:, 0], known[:, 0])
    spread = 1 - r**2
    assert abs(float(x[:, 1].mean()) - r * y) < 5 * (spread / count) ** 0.5 + 0.01
    assert float(x[:, 1].var()) == pytest.approx(spread, rel=0.12)  # 1000 steps are not infinite


@exact
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_what_is_known_follows_the_forward_process(space: Space) -> None:
    """At every time the known elements are alpha x + sigma z with the z of the start (DDIM)."""
    schedule = VPLinear()
    known, mask = space.project(normal(*space.shape, seed=2)), some(space)
    data = Gaussian(schedule, space, torch.zeros(space.shape), 0.4)
    kept = Kept(data, space, schedule, known, mask)
    first = start(space, schedule, 1.0, streams(space), space.hold(0 * known, known, mask))
    z = space.noise(streams(space), 0)
    times = [1.0, 0.8, 0.5, 0.2, 0.0]
    for state in states(kept, space, schedule, DDIM(), times, streams(space), first):
        alpha, sigma = schedule(torch.tensor(state.t))
        near(
            space.part(state.x, mask),
            space.part(alpha * known + sigma * z, mask),
            1e-9,
        )


@exact
def test_a_bad_jacobian_moves_the_rest_by_no_more_than_the_known_was_wrong() -> None:
    """Where noise drowns the data, a network's small error times sigma^2 would be the sample."""
    space, schedule = Dense((6, 5)), EDM(sigma_max=80)
    error = 1e-2 * normal(5, 5, seed=3)
    known, mask = normal(6, 5, seed=2), some(space)

    def network(x_t: Tensor, t: float | Tensor) -> Tensor:
        return (x_t @ error).tanh()

    x_t = 80 * normal(6, 5, seed=4)
    x_hat = network(x_t, 1.0)
    moved = Kept(network, space, schedule, known, mask)(x_t, 1.0) - x_hat
    rest, wrong = (space.sum(moved.masked_fill(m, 0).square()) for m in (mask, ~mask))
    assert (rest <= wrong * (1 + 1e-9)).all()
    assert (rest > 0.1 * wrong).any()  # the limit is at work


def test_translation_formula() -> None:
    exactness.translation(exactness.engine())


@exact
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES.keys())
def test_translation_between_gaussians(space: Space, schedule: Schedule) -> None:
    r"""x moves by the difference of the means, but for what noise of K leaves of it:
    :math:`x' = x + (\mu' - \mu)(1 - \sqrt{v / (v + K^2)})`, whatever z is."""
    v, K = 0.4, 5.0
    x, mean, other = (space.project(normal(*space.shape, seed=i)) for i in (1, 2, 3))
    own, wanted = (Gaussian(schedule, space, m, v) for m in (mean, other))
    times = Karras(sigma_min=0.01).times(schedule, 48, time_of_noise(schedule, K))
    noise = streams(space)
    z = space.noise(noise, 0)
    model = Translated(wanted, own, space, schedule, x, z)
    first = start(space, schedule, times[0], noise, x)
    found = sample(model, space, schedule, Heun(), times, noise, first)
    near(found, x + (other - mean) * (1 - (v / (v + K**2)) ** 0.5), 3e-3)


@exact
@pytest.mark.parametrize("sampler", [DDIM(), Heun(), DPMSolverPP2M()], ids=str)
def test_translated_to_what_it_is_a_file_comes_back(sampler: DDIM | Heun | DPMSolverPP2M) -> None:
    """In a few steps, under a network that is no denoiser at all."""
    space, schedule = SPACES["masked"], EDM(sigma_max=5)

    def network(x_t: Tensor, t: float | Tensor) -> Tensor:
        return space.project(torch.sin(x_t))

    x, noise = space.project(normal(*space.shape, seed=1)), streams(space)
    model = Translated(network, network, space, schedule, x, space.noise(noise, 0))
    times = Karras().times(schedule, 5)
    first = start(space, schedule, 1.0, noise, x)
    near(sample(model, space, schedule, sampler, times, noise, first), x, 1e-10)


def test_time_of_noise() -> None:
    for schedule in (EDM(sigma_max=5), VPLinear()):
        level = schedule.level(time_of_noise(schedule, 0.7))
        assert level.sigma / level.alpha == pytest.approx(0.7, rel=1e-6)
    for noise, match in ((0.0, "positive"), (-1.0, "positive"), (6.0, "up to 5")):
        with pytest.raises(SamplingError, match=match):
            time_of_noise(EDM(sigma_max=5), noise)
    with pytest.raises(SamplingError, match="of their own"):
        time_of_noise(Parts((EDM(), EDM())), 1.0)


# --- the way through a run ---------------------------------------------------------------------


@pytest.fixture(params=["dense", "masked", "ragged"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    modality = ToyModality()
    keys = [f"toy.kind={request.param}", f"out={tmp_path}", "sample.steps=20"]
    resolved = config.resolve(modality, overrides=keys)
    facts = modality.prepare(resolved.toy).facts  # type: ignore[attr-defined]
    trainer = Trainer(runs.start(modality, resolved, facts))
    batches = trainer.batches()
    for _ in range(150):
        trainer.advance([next(batches)])
    return trainer.model()


def test_a_file_is_varied_the_less_the_less_noise(model: Model, tmp_path: Path) -> None:
    (path,) = _written(model, tmp_path)
    source = torch.tensor(json.loads(path.read_text()))
    distances = []
    for noise in (0.01, 0.3, 3.0):
        batch = model.sample(8, source=path, noise=noise, cond={"label": 2})
        rows = batch.x.reshape(8, *source.shape[1:]) if batch.x.ndim > 2 else batch.x
        distances.append(float((rows - source.repeat(8, *[1] * (source.ndim - 1))).std()))
    assert distances[0] < 0.05 < distances[1] < distances[2]


@pytest.mark.parametrize("keep", ["0:4,:", "", "0", "99", "9" * 5000])
def test_the_toy_keeps_a_number_of_columns(model: Model, tmp_path: Path, keep: str) -> None:
    (path,) = _written(model, tmp_path)
    run = model.run
    with pytest.raises(ConfigError, match="is no number of columns. Give 1 to"):
        run.modality.given(run.section, run.facts, path, keep, _request(model, 1))


def test_a_kept_part_stays(model: Model, tmp_path: Path) -> None:
    (path,) = _written(model, tmp_path)
    given = model.run.modality.given(
        model.run.section, model.run.facts, path, "2", _request(model, 5)
    )
    assert given.mask is not None
    batch = model.sample(5, source=path, keep="2", sampler={"name": "euler", "churn": 4})
    space = batch.space
    near(space.part(batch.x - given.batch.x, given.mask), torch.zeros(space.shape), 1e-6)
    free = ~given.mask
    assert float((batch.x - given.batch.x)[free].abs().max()) > 0.01


def test_a_file_is_translated_to_another_class(model: Model, tmp_path: Path) -> None:
    """The columns that are not centred move by the classes' distance, 2, and nothing else does."""
    (path,) = _written(model, tmp_path)
    for label, level in ((2, 0.0), (0, -2.0)):
        batch = model.sample(4, source=path, noise=20, cond={"label": label}, origin={"label": 2})
        given = model.run.modality.given(
            model.run.section, model.run.facts, path, None, _request(model, 4)
        )
        moved = batch.x - given.batch.x
        assert float(moved[:, 3].mean()) == pytest.approx(level, abs=0.5 * bool(level) + 1e-5)
    wish = Wish(source=path, noise=20, origin={"label": 2})
    settings = model.settings()
    assert model.calls(settings, wish) == 2 * model.calls(settings, Wish(source=path, noise=20))
    with pytest.raises(SamplingError, match="this sampler adds noise"):
        model.sample(
            1, source=path, noise=20, origin={"label": 2}, sampler={"name": "euler", "churn": 4}
        )


def test_steered_samples_are_where_they_were_asked_to_be(model: Model) -> None:
    """The last column is N(label - 1, 0.04) of rows; its mean is asked to be 0.3 higher."""
    found = model.property("level")
    levels = {}
    for target in (0.0, 0.3):
        batch = model.sample(64, toward={"level": target}, cond={"label": 1})
        levels[target] = float(found.function(batch.x, batch.space).mean())
    assert levels[0.3] - levels[0.0] > 0.15


def test_a_sample_of_a_file_is_the_same_in_any_company(model: Model, tmp_path: Path) -> None:
    (path,) = _written(model, tmp_path)
    for keys in ({"keep": "2"}, {"noise": 0.5}, {"noise": 0.5, "toward": {"level": 0.1}}):
        many = model.sample(20, source=path, **keys)  # type: ignore[arg-type]
        one = model.sample(ids=[17], source=path, batch_size=3, **keys)  # type: ignore[arg-type]
        assert torch.equal(many.select([17]).x, one.x)


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match="--keep"):
        Wish(source=Path("x"))
    with pytest.raises(ConfigError, match="--from needs the noise"):
        Wish(source=Path("x"), keep="2", origin={"label": 1})


def _written(model: Model, folder: Path) -> list[Path]:
    batch = model.sample(1, cond={"label": 2}, seed=4)
    return model.run.modality.write(model.run.section, model.run.facts, batch, folder, [0])


def _request(model: Model, count: int):  # type: ignore[no-untyped-def]
    from gendiff.modality import Request

    return Request(list(range(count)))
