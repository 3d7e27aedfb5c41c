r"""How samples compare with data, in the features of a modality: every modality has these figures.

Of a reference X of N held-out items, of M samples Y and of the training items, all as features
(:meth:`gendiff.Modality.features`). Each figure comes with its *floor*, the same figure for as
many training items in the samples' place, and with a standard error from the bootstrap: the
standard deviation over sets of M samples drawn from the M with replacement (Efron, 1979,
https://doi.org/10.1214/aos/1176344552).

``frechet_distance``: of the normal distributions with the means :math:`m_i` and covariances
:math:`S_i` of two sets (Heusel et al., 2017, https://arxiv.org/abs/1706.08500, eq. 6; it is called
FID with Inception's features alone),

.. math:: |m_1 - m_2|^2 + \operatorname{tr}(S_1 + S_2 - 2 (S_1 S_2)^{1/2}).

``precision``, ``recall``: share of the samples in the manifold of the reference and of the
reference in the samples' one; a manifold is the union of the balls :math:`B` about its points that
reach to their k-th neighbours (Kynkäänniemi et al., 2019, https://arxiv.org/abs/1904.06991, eq. 1
and 2).

``density``, ``coverage``: how many of the reference's balls hold a sample, and the share of the
balls that hold any (Naeem et al., 2020, https://arxiv.org/abs/2002.09797, eq. 4 and 5),

.. math:: \frac1{kM} \sum_j \sum_i 1[Y_j \in B(X_i)], \qquad
    \frac1N \sum_i 1[\exists j: Y_j \in B(X_i)].

``pairwise_distance``: mean distance of two samples.

``training_copies``: share of the samples that are nearer to a training item than all but 5 % of
the held-out items are. A threefold comparison of distances, as in Meehan et al. (2020,
https://arxiv.org/abs/2004.05675), but by the near tail, where copies are, and not by ranks: these
also blame samples that are merely a little smoother than data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gendiff.modality import Features, Measure
from gendiff.noise import generator
from gendiff.spaces import Batch, Dense

DRAWS = 8  # sets of training items over which a floor is averaged
RESAMPLES = 200  # of the bootstrap
NEAREST = 3, 5  # k of precision and recall, and of density and coverage, as in the papers
MANIFOLD = 3000  # points of a manifold, evenly spaced ones if there are more
WIDEST = 64  # of the default features
COPY_QUANTILE = 0.05
BETTER = {
    "frechet_distance": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
    "pairwise_distance": "higher",
    "training_copies": "lower",
}
_EXACT = "donot_use_mm_for_euclid_dist"  # equal points are then exactly 0 apart


# --- two sets of points --------------------------------------------------------------------------


def frechet_distance(a: Tensor, b: Tensor) -> float:
    r"""Fréchet distance of the normal distributions fitted to a (N, F) and b (M, F), in float64.

    The trace of :math:`(S_1 S_2)^{1/2}` is the sum of the singular values of
    :math:`S_1^{1/2} S_2^{1/2}`, the square roots taken of the symmetric matrices' eigenvalues.
    Unlike a general matrix square root this is real, and stays accurate for singular covariances.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.cov(f.T).reshape(f.shape[1], f.shape[1]) for f in (a, b))
    cross = torch.linalg.svdvals(_root(cov_a) @ _root(cov_b)).sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + cov_a.trace() + cov_b.trace() - 2 * cross))


def _root(cov: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix; rounding below 0 counts as 0."""
    values, vectors = torch.linalg.eigh(cov)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def inside(manifold: Tensor, points: Tensor, k: int) -> Tensor:
    """Whether each point (M, F) lies in each k-th neighbour ball of manifold (N, F), (M, N)."""
    k = min(k, len(manifold) - 1)
    # kthvalue counts from 1, and the nearest is the point itself.
    radius = torch.cat([rows.kthvalue(k + 1).values for rows in _distances(manifold, manifold)])
    return torch.cat([rows <= radius for rows in _distances(points, manifold)])


def precision_recall(real: Tensor, fake: Tensor, k: int = NEAREST[0]) -> tuple[float, float]:
    """Improved precision and recall of ``fake`` (M, F) for ``real`` (N, F)."""
    precision, recall = inside(real, fake, k).any(1), inside(fake, real, k).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def density_coverage(real: Tensor, fake: Tensor, k: int = NEAREST[1]) -> tuple[float, float]:
    """Density and coverage of ``fake`` (M, F) for ``real`` (N, F)."""
    held = inside(real, fake, k)
    return float(held.double().sum() / (k * len(fake))), float(held.any(0).double().mean())


def nearest_distance(points: Tensor, others: Tensor) -> Tensor:
    """Distance of each point (M, F) to the nearest of the others (N, F), (M,)."""
    return torch.cat([rows.amin(1) for rows in _distances(points, others)])


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Distances (m, N) of a part of the points after the other."""
    for rows in points.split(max(1, min(1000, (1 << 26) // max(1, len(others))))):
        yield torch.cdist(rows, others, compute_mode=_EXACT)


# --- samples beside data -------------------------------------------------------------------------


class Floors(NamedTuple):
    """What real data reach, to be found once for any number of sets of as many samples.

    Args:
        figures: Each figure of training items in the samples' place, mean of several sets.
        copy_distance: Nearer to a training item a sample is a copy.
        median: The median distance of a held-out item to the nearest training item.
    """

    figures: Mapping[str, float]
    copy_distance: float
    median: float


class Parts(NamedTuple):
    """What the figures of M samples are sums of; kept, as every resample is made of the same.

    Args:
        precise: Whether each sample is in the manifold, (M,).
        found: Whether each sample's ball holds each reference point, (M, N).
        held: Whether each reference point's ball holds each sample, (M, N).
        apart: Distances between samples, (M, M).
    """

    precise: Tensor
    found: Tensor
    held: Tensor
    apart: Tensor


@dataclass(frozen=True, eq=False)
class Reals:
    """Real data as features, to compare samples with.

    Args:
        held_out: The reference, (N, F).
        train: Training items, (T, F).
        about: What the features are.
        seed: Names the draws of training items, and the resamples.
    """

    held_out: Tensor
    train: Tensor
    about: str
    seed: int

    def floors(self, count: int) -> Floors | None:
        """What ``count`` training items reach in the samples' place; None if there are too few."""
        if min(count, len(self.held_out), len(self.train)) < 2:
            return None
        gen = generator("floor", self.seed)
        found = []
        for _ in range(DRAWS):
            draw = self.train[torch.randperm(len(self.train), generator=gen)[:count]]
            found.append(self._figures(draw, self._parts(draw)))
        means = {name: sum(one[name] for one in found) / DRAWS for name in found[0]}
        known = nearest_distance(self.held_out, self.train).double()
        near = float(known.quantile(COPY_QUANTILE))
        return Floors(means | {"training_copies": COPY_QUANTILE}, near, float(known.median()))

    def measures(self, fake: Tensor, floors: Floors | None = None) -> list[Measure]:
        """All figures of samples (M, F) beside their floors; none where there are none."""
        floors = floors or self.floors(len(fake))
        if floors is None:
            return []
        fake = fake.nan_to_num(0.0, 1e4, -1e4).clamp(-1e4, 1e4)  # what diverged is far away
        parts, gaps = self._parts(fake), nearest_distance(fake, self.train)
        copies = float((gaps < floors.copy_distance).double().mean())
        values = self._figures(fake, parts) | {"training_copies": copies}
        errors = self._errors(fake, parts)
        errors["training_copies"] = math.sqrt(copies * (1 - copies) / len(fake))
        notes = self._notes(len(fake), floors, float(gaps.median()))
        return [
            Measure(name, values[name], better, floors.figures[name], notes[name], errors[name])
            for name, better in BETTER.items()
        ]

    def _parts(self, fake: Tensor) -> Parts:
        reference, few = _thinned(self.held_out), _thinned(fake)
        return Parts(
            inside(reference, few, NEAREST[0]).any(1).float(),
            inside(few, reference, NEAREST[0]).T.float(),
            inside(reference, few, NEAREST[1]).float(),
            torch.cat(list(_distances(few, few))),
        )

    def _figures(self, fake: Tensor, parts: Parts) -> dict[str, float]:
        once = torch.ones(1, len(parts.precise))
        values = {name: float(value) for name, value in _resampled(parts, once).items()}
        return values | {"frechet_distance": frechet_distance(self.held_out, fake)}

    def _errors(self, fake: Tensor, parts: Parts) -> dict[str, float]:
        """The bootstrap's standard errors.

        The balls of recall keep their radii: a sample that is drawn twice is no neighbour.
        """
        gen = generator("bootstrap", self.seed)
        few, every = len(parts.precise), len(fake)
        drawn = torch.randint(few, (RESAMPLES, few), generator=gen)
        counts = torch.zeros(RESAMPLES, few).scatter_add_(1, drawn, torch.ones(RESAMPLES, few))
        scale = math.sqrt(few / every)  # of as many samples as there are
        spreads = {k: scale * float(v.std()) for k, v in _resampled(parts, counts).items()}
        distances = [
            frechet_distance(self.held_out, fake[torch.randint(every, (every,), generator=gen)])
            for _ in range(RESAMPLES)
        ]
        return spreads | {"frechet_distance": float(torch.tensor(distances).std())}

    def _notes(self, count: int, floors: Floors, median: float) -> dict[str, str]:
        """Definition, reference set and counts of each figure."""
        near, near5 = NEAREST
        held_out, train = len(self.held_out), len(self.train)
        counts = f"{count} samples against {held_out} held-out items"
        if max(count, held_out) > MANIFOLD:
            counts += f" (manifolds: {MANIFOLD} of each at most)"
        floor = f"floor: {min(count, train)} training items, mean of {DRAWS} draws"
        what = {
            "frechet_distance": "distance of the fitted normal distributions",
            "precision": f"share of samples in the held-out items' manifold, k={near}",
            "recall": f"share of held-out items in the samples' manifold, k={near}",
            "density": f"held-out items' balls that hold a sample, over k={near5}",
            "coverage": f"share of the held-out items' balls that hold a sample, k={near5}",
            "pairwise_distance": "mean distance of two samples; above real data's is no merit",
        }
        notes = {k: f"{v}; {self.about}; {counts}, {floor}" for k, v in what.items()}
        notes["training_copies"] = (
            f"share of samples nearer to a training item than {1 - COPY_QUANTILE:.0%} of "
            f"{held_out} held-out items are, which is {floors.copy_distance:.4g}; median distance "
            f"{median:.4g}, of held-out items {floors.median:.4g}; {self.about}; {count} samples "
            f"against {train} training items, floor: by definition"
        )
        return notes


def _thinned(points: Tensor) -> Tensor:
    """At most ``MANIFOLD`` points, evenly spaced."""
    count = min(len(points), MANIFOLD)
    return points[torch.arange(count) * len(points) // count]


def _resampled(parts: Parts, counts: Tensor) -> dict[str, Tensor]:
    """Figures (R,) of R sets that hold each sample so often as ``counts`` (R, M) says."""
    size = counts.shape[1]
    pairs = ((counts @ parts.apart) * counts).sum(1)
    return {
        "precision": counts @ parts.precise / size,
        "recall": (counts @ parts.found > 0).double().mean(1),
        "density": counts @ parts.held.sum(1) / (size * NEAREST[1]),
        "coverage": (counts @ parts.held > 0).double().mean(1),
        "pairwise_distance": pairs / (size * (size - 1)),
    }


# --- verdicts ------------------------------------------------------------------------------------


FEWEST = 20  # samples from which on there is a verdict


@dataclass(frozen=True)
class Verdict:
    """What figures mean, in words.

    Args:
        name: ``"untrained"``, ``"collapsed"`` or ``"memorised"``.
        text: Why, with the figures and their thresholds.
    """

    name: str
    text: str


def verdicts(measures: Sequence[Measure], count: int) -> list[Verdict]:
    """What is plainly wrong with ``count`` samples; nothing where they are fewer than ``FEWEST``.

    The thresholds are of what real data reach in the samples' place, the floors, and a figure
    must pass them by two standard errors.

    - *untrained*: few samples are where data are: density below half of its floor and precision
      below three quarters. Samples that repeat one item can have a low density, but are precise.
    - *collapsed*: the samples are alike, their mean distance below half of its floor; or they are
      where data are and yet cover less than half of what real data cover, or recall less.
    - *memorised*: over five times as many samples as held-out items are near to training items.
    """
    figures = {measure.name: measure for measure in measures}
    if count < FEWEST or not BETTER.keys() <= figures.keys():
        return []

    def below(name: str, share: float) -> str | None:
        """The figure in words, where it is below a share of its floor."""
        m = figures[name]
        assert m.floor is not None
        assert m.error is not None
        if m.value + 2 * m.error >= share * m.floor:
            return None
        text = f"{name} {m.value:.3g} is below {share * m.floor:.3g}, "
        return text + f"{share:.0%} of the real data's {m.floor:.3g}"

    found = []
    density, precision = below("density", 0.5), below("precision", 0.75)
    untrained = density is not None and precision is not None
    if untrained:
        text = f"the samples are not like the data: {density}; {precision}"
        found.append(Verdict("untrained", text))
    spread, covered = (
        below("pairwise_distance", 0.5),
        below("coverage", 0.5) or below("recall", 0.5),
    )
    if spread is not None:
        found.append(Verdict("collapsed", f"the samples are alike: {spread}"))
    elif covered is not None and not untrained:
        text = f"the samples are of a small part of the data: {covered}"
        found.append(Verdict("collapsed", text))
    copies = figures["training_copies"]
    limit = 5 * COPY_QUANTILE
    if copies.error is not None and copies.value - 2 * copies.error > limit:
        text = (
            f"the samples are copies of training items: training_copies {copies.value:.3g} is "
            f"above {limit:.3g}, 5 times the held-out items' {COPY_QUANTILE:.3g}"
        )
        found.append(Verdict("memorised", text))
    return found


# --- features ------------------------------------------------------------------------------------


def plain_features(batch: Batch) -> Tensor:
    """Features (B, F) of states of any kind, for modalities that offer none of their own.

    Of a dense space the state itself, by a fixed random projection where it is wider than
    ``WIDEST`` (Johnson & Lindenstrauss, 1984); of others each column's mean and standard
    deviation over the rows of a sample, and the logarithm of its degrees of freedom.
    """
    x, space = batch.x.float(), batch.space
    if isinstance(space, Dense):
        flat = x.flatten(1)
        width = flat.shape[1]
        if width <= WIDEST:
            return flat
        gen = generator("projection", width)
        return flat @ torch.randn(width, WIDEST, generator=gen) / math.sqrt(WIDEST)
    columns = x.shape[1]
    found = []
    for column in range(columns):
        only = torch.zeros(columns).index_fill(0, torch.tensor(column), float(columns))
        only = only.reshape(1, columns, *[1] * (x.ndim - 2))
        mean = space.mean(x * only)
        square = space.mean(x.square() * only)
        found += [mean, (square - mean.square()).clamp(min=0).sqrt()]
    return torch.stack([*found, space.dof().float().log()], 1)


def joined(parts: Sequence[Tensor], about: str) -> Features:
    """The features of several batches as one."""
    return Features(torch.cat([part.detach().float().cpu() for part in parts]), about)


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiny layers gain nothing from threads and lose up to tenfold on a busy machine.

    What is trained then does not depend on the number of cores either.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
