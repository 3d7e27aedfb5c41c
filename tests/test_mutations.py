"""A wrong sign or factor in the engine must make a check fail: the tests' own test.

Each mutant is a copy of the engine under another name with one piece of its text replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from exactness import CHECKS, engine

import gendiff

PARTS = (
    "errors", "noise", "levels", "chains", "schedules", "spaces", "denoiser", "grids",
    "tables", "singlestep", "multistep", "samplers", "objective", "likelihood", "guidance",
    "adaptive", "ema", "steering", "editing", "pairs", "metrics", "modality",
    "distributed", "world", "checkpoint",
)  # fmt: skip
MUTATIONS = [
    ("pairs", "return z - space", "return z + space"),
    ("pairs", "(alpha / sigma).to(x)", "alpha.to(x)"),
    ("objective", "torch.logit(u * self._last(schedule))", "torch.logit(u)"),
    ("objective", "math.log(2) + self._last(schedule).log()", "math.log(2)"),
    ("objective", "log_density(half) + log_density(-half)", "log_density(half)"),
    ("ema", "(1 - 1 / step) ** (self.gamma + 1)", "(1 - 1 / step) ** self.gamma"),
    ("ema", "(gamma + 1) / (gamma + 3)", "(gamma + 1) / (gamma + 2)"),
    ("ema", "(t_a / t_b) ** gamma_b", "(t_a / t_b) ** gamma_a"),
    ("ema", "(gamma_a + gamma_b + 1)", "(gamma_a + gamma_b + 2)"),
    ("ema", "if t_a > t_b:", "if t_a < t_b:"),
    ("ema", "inner(*a, t, gamma)", "inner(*a, t, gamma + 1)"),
    ("singlestep", "share * sigma_s**2).log()", "share * sigma_s).log()"),
    ("singlestep", "beta = share * sigma_t**2", "beta = share * sigma_s**2"),
    ("singlestep", "beta.log(), alpha_s * share", "beta.log(), share"),
    ("singlestep", "(end.sigma / now.sigma) ** 2", "(end.sigma / now.sigma)"),
    ("singlestep", "now.alpha / end.alpha *", "end.alpha / now.alpha *"),
    ("singlestep", "(v + 1) / 2 * high + (1 - v)", "(1 - v) / 2 * high + (v + 1)"),
    ("multistep", "return [-math.expm1(start - end)]", "return [math.expm1(end - start)]"),
    ("multistep", "np.exp(points - end)", "np.exp(end - points)"),
    ("singlestep", "math.sqrt(1 - self.eta**2 * share)", "math.sqrt(1 - self.eta * share)"),
    ("singlestep", "self.eta * end.sigma * math.sqrt(share)", "self.eta * end.sigma * share"),
    ("singlestep", "half = (last - first) / 2", "half = last - first"),
    ("singlestep", "newest = -half / last", "newest = half / last"),
    ("singlestep", "- 1 / first)", "+ 1 / first)"),
    ("singlestep", "2 * math.log1p(gamma)", "math.log1p(gamma)"),
    ("singlestep", "self.churn / (len(times) - 1)", "self.churn / len(times)"),
    ("singlestep", "self.churn_noise * added", "added"),
    ("singlestep", "*(again * self.restarts)", "*(again * 1)"),
    ("singlestep", "forward_noise(levels[last], levels[first])",
     "forward_noise(levels[last], levels[first - 1])"),
    ("singlestep", "*steps[last:]]", "*steps[last - 1 :]]"),
    ("singlestep", "(gain * alpha,)", "(gain,)"),
    ("singlestep", "2 * self.r * sigma", "self.r * sigma"),
    ("singlestep", "gain = 2 * self.r**2", "gain = self.r**2"),
    ("tables", "new.sigma**2 - (scale * now.sigma)", "new.sigma**2 - (now.sigma)"),
    ("tables", "scale = new.alpha / now.alpha", "scale = 1.0"),
    ("multistep", "slope = -math.expm1(-h), h / (2 * step)", "slope = -math.expm1(-h), h / step"),
    ("multistep", "return [total * (1 + slope)", "return [total * (1 - slope)"),
    ("multistep", "keep = (1 / now.sigma, -now", "keep = (1 / now.sigma, now"),
    ("multistep", "Stage(t, end.alpha / now.alpha,", "Stage(t, 1.0,"),
    ("multistep", "width = noise_scale(schedule.level(s)) - rho[0]", "width = rho[0] / 2"),
    ("multistep", "-width * np.exp(-points)", "width * np.exp(-points)"),
    ("multistep", "inverse(torch.from_numpy(2 * points))", "inverse(torch.from_numpy(points))"),
    ("multistep", "37 / 24, -9 / 24", "37 / 24, 9 / 24"),
    ("multistep", "-math.expm1(nodes[1] - nodes[0]) / 2", "-math.expm1(nodes[1] - nodes[0])"),
    ("multistep", "now.sigma / last.sigma, tuple", "last.sigma / now.sigma, tuple"),
    ("multistep", "nodes[: count + 1]", "nodes[: count + 2]"),
    ("samplers", "[(a, previous),", "[(a, anchor),"),
    ("samplers", "[(stage.keep[0], x), (", "[(stage.keep[0], anchor), (-"),
    ("samplers", "history = [kept, *", "history = [x_hat, *"),
    ("multistep", "before = lam(now) if", "before = lam(now) - 1 if"),
    ("samplers", "history = [kept, *history[: keep - 1]]", "history = [*history[:1], kept]"),
    ("samplers", "anchor = anchor, x\n", "anchor = anchor, x if index == 0 else anchor\n"),
    ("samplers", "(stage.a, anchor)", "(stage.a, x)"),
    ("samplers", "[(scale, x), (std,", "[(1 / scale, x), (std,"),
    ("multistep", "rate, h = 1 + self.eta,", "rate, h = 1 - self.eta / 2,"),
    ("multistep", "end.sigma * math.sqrt(1 - decay**2)", "end.sigma * math.sqrt(1 - decay)"),
    ("singlestep", "nodes = [lam(middle), lam(now)]", "nodes = [lam(now), lam(middle)]"),
    ("singlestep", "lam(middle), lam(end))[::-1]", "lam(middle), lam(end))"),
    ("singlestep", "first_order(u, now, end)._", "first_order(t, now, end)._"),
    ("singlestep", "[1] * (first + rest) + [2] * pairs", "[2] * pairs + [1] * (first + rest)"),
    ("multistep", "[lam(now), *nodes[:2]]", "[lam(now), *nodes[:2][::-1]]"),
    ("multistep", "nodes = nodes[:2]", "nodes = nodes[:1]"),
    ("multistep", "w - moment / 2 / gap", "w - moment / gap"),
    ("multistep", "(node - nodes[0]) ** 2 for", "(node - nodes[1]) ** 2 for"),
    ("multistep", "i == last - 1:", "i == last:"),
    ("multistep", "min(end, start + _FAR)", "min(end, start + 9)"),
    ("multistep", "for t in past], points", "for t in past], points / 2"),
    ("multistep", "\"log_rho\" and end == math.inf", "\"log_rho\" and end == -math.inf"),
    ("multistep", "now.alpha + now.sigma, end.alpha", "now.alpha + now.sigma / 2, end.alpha"),
    ("multistep", "-(1 + now.alpha / now.sigma)", "-(1 - now.alpha / now.sigma)"),
    ("multistep", "b = tuple(last * w for", "b = tuple(w for"),
    ("multistep", "end.sigma / last - past[0]", "end.sigma / first - past[0]"),
    ("denoiser", "return -sigma / r, alpha / r", "return sigma / r, alpha / r"),
    ("denoiser", "determinant = q * alpha - sigma * p", "determinant = q * alpha + sigma * p"),
    ("denoiser", "-sigma / determinant", "sigma / determinant"),
    ("denoiser", "return 0 * alpha - 1,", "return 0 * alpha + 1,"),
    ("denoiser", "return sigma / std / scale", "return sigma * std / scale"),
    ("denoiser", "_LOG_SNR_RANGE), _LOG_SNR_RANGE) / -8", "99.0), 99.0) / -4"),
    ("denoiser", "out * c_out, x_t, c_skip", "out, x_t, c_skip"),
    ("denoiser", "(out * c_out).add_(x_t, alpha=c_skip)", "(out * c_out).add_(x_t)"),
    ("denoiser", "d.network(c_in * x_t,", "d.network(x_t,"),
    ("objective", ".exp() * scales.c_out**2", ".exp() * scales.c_out"),
    ("objective", "2 * torch.nn.functional.softplus(log_snr / 2)",
     "torch.nn.functional.softplus(log_snr)"),
    ("objective", "(-2 * math.log(data_std))", "(2 * math.log(data_std))"),
    ("objective", "(low - log_variance).exp()", "(log_variance - low).exp()"),
    ("objective", "offset.square() *", "offset *"),
    ("objective", "(k - 1) / steps", "k / steps - 1e-9"),
    ("objective", "/ math.log(2)", ""),
    ("objective", "- self.gamma * torch.logaddexp(", "- torch.logaddexp(2 * "),
    ("objective", "return log_snr - math.log(2)", "return log_snr"),
    ("objective", "logsigmoid(self.bias - log_snr)", "logsigmoid(log_snr - self.bias)"),
    ("objective", "log_w = log_w - self.times", "log_w = log_w + self.times"),
    ("objective", "- (t * (1 - t)).log()", "+ (t * (1 - t)).log()"),
    ("objective", "self.mean, self.std) - math.log(2)", "self.mean, self.std)"),
    ("objective", "loss.to(history).square()", "loss.to(history)"),
    ("objective", "history.mean(1).sqrt()", "history.mean(1)"),
    ("objective", "history.isnan().any()", "history.isnan().all()"),
    ("objective", "])[-self.kept :]", "])[: self.kept]"),
    ("objective", "kept: ClassVar[int] = 10", "kept: ClassVar[int] = 9"),
    ("objective", "uniform_share: ClassVar[float] = 0.001", "uniform_share: ClassVar[float] = 0"),
    ("objective", "(u - ends[k] + p[k])", "(u - ends[k])"),
    ("objective", "1 / (self.bins * p[k])", "self.bins * p[k]"),
    ("objective", "t * self.bins - 1e-9)", "t * self.bins)"),
    ("objective", ".clamp(min=1) - 1", ".clamp(max=self.bins - 1)"),
    ("objective", "self.distance_weight * self.distance(", "self.distance("),
    ("objective", "rows(scales.c_skip) * x_t + rows(scales.c_out) * out", "x_t + out"),
    ("objective", "x_hat = space.project(x_hat)", "x_hat = x_hat"),
    ("objective", "copy_(part.scale * logits.softmax(1))", "copy_(logits.softmax(1))"),
    ("likelihood", "(alpha * x / sigma).square()).double() / 2",
     "(alpha * x / sigma).square()).double()"),
    ("likelihood", "torch.expm1(low - log_variance)", "torch.expm1(log_variance - low)"),
    ("likelihood", "* (-log_variance).exp()", "* log_variance.exp()"),
    ("likelihood", "(sigma / alpha).expand_as(x), bins)", "sigma.expand_as(x), bins)"),
    ("likelihood", "math.inf, (x + half - x_hat) / std", "math.inf, (x - x_hat) / std"),
    ("likelihood", "torch.where(flip, -high, low)", "torch.where(flip, high, low)"),
    ("likelihood", "cos**2 * dof - alpha * scale * trace", "cos**2 * dof - scale * trace"),
    ("likelihood", "cos**2 * z - cos * x_hat", "cos * z - cos * x_hat"),
    ("likelihood", "h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)", "h / 6 * (d1 + d2 + d3 + d4)"),
    ("likelihood", "+ gained + dof * math.log(cos)", "+ gained"),
    ("likelihood", "log(2 * math.pi * variance)", "log(2 * math.pi)"),
    ("objective", "u[slot * count :][:count]", "u[slot::slots]"),
    ("objective", "chance[slot * count :][:count]", "chance[:count]"),
    ("noise", "draw, self.first + i)", "draw, i)"),
    ("spaces", "value[:, : self.centred]) / self.sizes", "value[:, : self.centred])"),
    ("guidance", "torch.lerp(worse, better,", "torch.lerp(better, worse,"),
    ("guidance", "(self.scale - 1) * change", "self.scale * change"),
    ("guidance", "- (1 - self.parallel) *", "- self.parallel *"),
    ("guidance", "self.threshold / _rms(change, space)", "_rms(change, space)"),
    ("guidance", "_rms(better, space).square()", "_rms(better, space)"),
    ("guidance", "_std(better, space) / _std(x_hat, space)",
     "_std(x_hat, space) / _std(better, space)"),
    ("guidance", "1 + self.rescale * (ratio - 1)", "ratio"),
    ("guidance", "least <= schedule.level(t)", "schedule.level(t)"),
    ("guidance", "(log_snr < most)", "(log_snr > most)"),
    ("editing", "alpha * self.x + sigma * self.z", "self.x + sigma * self.z"),
    ("editing", "sigma * self.z, t) - self.x", "sigma * self.z, t) + self.x"),
    ("editing", "(x_t, t) - error", "(x_t, t) + error"),
    ("editing", "-2 * math.log(noise)", "-math.log(noise)"),
    ("guidance", "clamp(min=self.limit)", "clamp(max=self.limit)"),
    ("guidance", "space.expand(self.limit / size) * x_hat", "space.expand(1 / size) * x_hat"),
    ("guidance", "return shrunk.clamp(-self.limit, self.limit)", "return shrunk"),
    ("guidance", "return x_hat.clamp(-self.limit, self.limit)", "return x_hat.clamp(-1, 1)"),
    ("spaces", "keepdim=True).double() - 1)", "keepdim=True).double())"),
    ("spaces", "value.masked_fill(~self.mask, math.inf).flatten", "value.flatten"),
    ("spaces", "most, self.columns), math.inf)", "most, self.columns), 0.0)"),
    ("adaptive", "(alpha + sigma).to(z)) * z", "(alpha).to(z)) * z"),
    ("adaptive", "(2 * (torch.log1p(-tau)", "((torch.log1p(-tau)"),
    ("adaptive", "return (z - x_hat) / space", "return (z + x_hat) / space"),
    ("adaptive", "(h / 2, k1)), now + h / 2", "(h / 2, k1)), now + h"),
    ("adaptive", "(3 * h / 4, k2)), now", "(h / 2, k2)), now"),
    ("adaptive", "now + 3 * h / 4, active", "now + h / 2, active"),
    ("adaptive", "(2 * h / 9, k1)", "(h / 9, k1)"),
    ("adaptive", "(h / 3, k2)", "(h / 2, k2)"),
    ("adaptive", "change, (-h, k2)", "change, (-h, k1)"),
    ("adaptive", "(1 + space.mean(z.square()).sqrt())", "space.mean(z.square()).sqrt()"),
    ("adaptive", "(0.9 * size", "(1.1 * size"),
    ("adaptive", "** (-1 / 3)", "** (-1 / 2)"),
    ("adaptive", "h, told, paths = -tau / 10", "h, told, paths = -tau / 9"),
    ("adaptive", "c - c**2 * (5 / 3 - 8", "c - c**2 * (5 / 3 - 7"),
    ("adaptive", "c**2 * (16 / 9 * c - 4", "c**2 * (16 / 9 * c - 3"),
    ("adaptive", "c * (16 / 3 * c - 8 / 3)", "c * (16 / 3 * c - 4 / 3)"),
    ("adaptive", "return z, z - stop * v", "return z, z + stop * v"),
    ("adaptive", "scales[told] * state", "scales[0] * state"),
    ("adaptive", "if fresh.any():", "if active.any():"),
    ("chains", "q / 2 - q**2 / 12", "q**2 / 12"),
    ("chains", "q / 2 - q**2 / 12", "q / 2 + q**2 / 12"),
    ("chains", "- h * (a - b) / 2", "+ h * (a - b) / 2"),
    ("chains", "(da - db) / 12", "(da - db) / 6"),
    ("chains", "return sqrt(1 - t), sqrt(t)", "return sqrt(1 - t**2), t"),
    ("chains", "torch.log1p(-t) - torch.log(t)", "2 * (torch.log1p(-t) - torch.log(t))"),
    ("levels", "value.sigmoid().sqrt().to(log_snr)", "value.sigmoid().to(log_snr)"),
    ("schedules", "self.of.log_snr(t) + self.shift", "self.of.log_snr(t) - self.shift"),
    ("schedules", "inverse(log_snr - self.shift)", "inverse(log_snr + self.shift)"),
    ("schedules", "(alpha - end.alpha) / rest", "(alpha - end.alpha)"),
    ("schedules", "/ rest * (1 + moved)", "* (1 + moved)"),
    ("schedules", "/ (1 + moved) * (1 + alpha)", "/ (1 + moved)"),
    ("schedules", "rest * moved", "moved"),
    ("metrics", "cov_b.trace() - 2 * cross", "cov_b.trace() - cross"),
    ("metrics", "values.clamp(min=0).sqrt()) @", "values.clamp(min=0)) @"),
    ("metrics", "kthvalue(k + 1)", "kthvalue(k)"),
    ("metrics", "held.double().sum() / (k * len(fake))", "held.double().sum() / len(fake)"),
    ("metrics", "held.any(0).double()", "held.any(1).double()"),
    ("metrics", "inside(fake, real, k).any(1)", "inside(real, fake, k).any(0)"),
    ("metrics", "/ (size * NEAREST[1])", "/ (size * NEAREST[0])"),
    ("metrics", "inside(few, reference, NEAREST[0])", "inside(few, reference, NEAREST[1])"),
    ("metrics", "pairs / (size * (size - 1))", "pairs / size**2"),
    ("metrics", "gaps < floors.copy_distance", "gaps > floors.copy_distance"),
    ("metrics", "copies * (1 - copies)", "copies"),
    ("metrics", "known.quantile(COPY_QUANTILE)", "known.quantile(1 - COPY_QUANTILE)"),
    ("metrics", "m.value + 2 * m.error >=", "m.value - 2 * m.error >="),
    ("metrics", 'below("density", 0.5)', 'below("density", 0.75)'),
    ("metrics", 'below("pairwise_distance", 0.5)', 'below("pairwise_distance", 0.75)'),
    ("metrics", "covered is not None and not untrained", "covered is not None"),
    ("metrics", "copies.value - 2 * copies.error", "copies.value + 2 * copies.error"),
]  # fmt: skip


@pytest.fixture
def mutant(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an importable package: the engine with a mutation, (module, old, new)."""
    name = f"mutant_{request.param_index}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    for path in Path(gendiff.__file__).parent.glob("*.py"):
        if path.stem in PARTS:
            text = path.read_text(encoding="utf-8")
            if request.param and path.stem == request.param[0]:
                assert text.count(request.param[1]) == 1, "the text to mutate is not there, once"
                text = text.replace(*request.param[1:])
            (folder / path.name).write_text(
                text.replace("from gendiff.", f"from {name}."), encoding="utf-8"
            )
    sys.path.insert(0, str(tmp_path))
    yield name
    sys.path.remove(str(tmp_path))
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        del sys.modules[module]


@pytest.mark.parametrize("mutant", [None], indirect=True)
def test_the_copy_passes(mutant: str) -> None:
    for check in CHECKS:
        check(engine(mutant))


@pytest.mark.parametrize(
    "mutant", MUTATIONS, indirect=True, ids=[f"{m}: {new or old}" for m, old, new in MUTATIONS]
)
def test_a_check_fails(mutant: str) -> None:
    package = engine(mutant)
    assert package.samplers.__name__ == f"{mutant}.samplers"
    failed = 0
    for check in CHECKS:
        try:
            check(package)
        except AssertionError:
            failed += 1
    assert failed, "no check noticed"
