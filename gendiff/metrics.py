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


class Parts(NamedTuple):
    """What the figures of M samples are sums of; kept, as every resample is made of the same.

    Args:
        precise: Whether each sample is in the manifold, (M,).
        found: Whether each sample's ball holds each reference point, (M, N).
        held: Whether each reference point's ball holds each sample, (M, N).
        apart: Distances between samples, (M, M).
        copied: Whether each sample is nearer to a training item than held-out items are, (M',).
    """

    precise: Tensor
    found: Tensor
    held: Tensor
    apart: Tensor
    copied: Tensor


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

    @property
    def enough(self) -> bool:
        """Whether anything can be compared with them."""
        return min(len(self.held_out), len(self.train)) >= 2

    def copy_distance(self) -> tuple[float, Tensor]:
        """Below what distance to a training item a sample is a copy; and the held-out items'."""
        known = nearest_distance(self.held_out, self.train)
        return float(known.double().quantile(COPY_QUANTILE)), known

    def parts(self, fake: Tensor, copy_distance: float = 0.0) -> Parts:
        """What the figures of samples (M, F) are made of."""
        reference, few = _thinned(self.held_out), _thinned(fake)
        return Parts(
            inside(reference, few, NEAREST[0]).any(1),
            inside(few, reference, NEAREST[0]).T,
            inside(reference, few, NEAREST[1]),
            torch.cat(list(_distances(few, few))),
            nearest_distance(fake, self.train) < copy_distance,
        )

    def floors(self, count: int) -> dict[str, float]:
        """The figures of ``count`` training items in the samples' place, mean of several sets."""
        gen = generator("floor", self.seed)
        found: list[dict[str, float]] = []
        for _ in range(DRAWS):
            draw = self.train[torch.randperm(len(self.train), generator=gen)[:count]]
            found.append(_values(self.parts(draw), torch.ones(1, len(_thinned(draw)))))
            found[-1]["frechet_distance"] = frechet_distance(self.held_out, draw)
        means = {name: sum(one[name] for one in found) / DRAWS for name in found[0]}
        return means | {"training_copies": COPY_QUANTILE}

    def measures(self, fake: Tensor, floors: Mapping[str, float] | None = None) -> list[Measure]:
        """All figures of samples (M, F) beside their floors; none if there are fewer than two.

        ``floors`` spares finding them again for the same number of samples.
        """
        if len(fake) < 2 or not self.enough:
            return []
        fake = fake.nan_to_num(0.0, 1e4, -1e4).clamp(-1e4, 1e4)  # what diverged is far away
        floors = self.floors(len(fake)) if floors is None else floors
        limit, known = self.copy_distance()
        parts = self.parts(fake, limit)
        values = _values(parts, torch.ones(1, len(parts.precise)))
        values["frechet_distance"] = frechet_distance(self.held_out, fake)
        values["training_copies"] = float(parts.copied.double().mean())
        errors = self.errors(fake, parts)
        medians = [float(d.median()) for d in (nearest_distance(fake, self.train), known)]
        notes = self._notes(len(fake), limit, medians)
        return [
            Measure(name, values[name], better, floors[name], notes[name], errors[name])
            for name, better in BETTER.items()
        ]

    def errors(self, fake: Tensor, parts: Parts) -> dict[str, float]:
        """The bootstrap's standard errors.

        The balls of recall keep their radii: a sample that is drawn twice is no neighbour.
        """
        gen = generator("bootstrap", self.seed)
        few = len(parts.precise)
        counts = torch.zeros(RESAMPLES, few)
        drawn = torch.randint(few, (RESAMPLES, few), generator=gen)
        counts.scatter_add_(1, drawn, torch.ones(RESAMPLES, few))
        spreads = {name: _spread(v, few, len(fake)) for name, v in _resampled(parts, counts)}
        distances = [
            frechet_distance(
                self.held_out, fake[torch.randint(len(fake), (len(fake),), generator=gen)]
            )
            for _ in range(RESAMPLES)
        ]
        spreads["frechet_distance"] = float(torch.tensor(distances, dtype=torch.float64).std())
        share = float(parts.copied.double().mean())  # of a mean the bootstrap's limit is known
        spreads["training_copies"] = math.sqrt(share * (1 - share) / len(fake))
        return spreads

    def _notes(self, count: int, limit: float, medians: Sequence[float]) -> dict[str, str]:
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
            "density": f"balls of held-out items that hold a sample, over k={near5}",
            "coverage": f"share of the held-out items' balls that hold a sample, k={near5}",
            "pairwise_distance": "mean distance of two samples: too far as wrong as too near",
        }
        notes = {k: f"{v}; {self.about}; {counts}, {floor}" for k, v in what.items()}
        notes["training_copies"] = (
            f"share of samples nearer to a training item than {1 - COPY_QUANTILE:.0%} of "
            f"{held_out} held-out items are, {limit:.4g}; median distance {medians[0]:.4g}, of "
            f"held-out items {medians[1]:.4g}; {self.about}; {count} samples against {train} "
            "training items, floor: by definition"
        )
        return notes


def _thinned(points: Tensor) -> Tensor:
    """At most ``MANIFOLD`` points, evenly spaced."""
    count = min(len(points), MANIFOLD)
    return points[torch.arange(count) * len(points) // count]


def _values(parts: Parts, counts: Tensor) -> dict[str, float]:
    return {name: float(value[0]) for name, value in _resampled(parts, counts)}


def _resampled(parts: Parts, counts: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each figure (R,) of R sets that hold each sample so often as ``counts`` (R, M) says."""
    size = counts.shape[1]
    yield "precision", counts @ parts.precise.float() / size
    yield "recall", (counts @ parts.found.float() > 0).float().mean(1)
    yield "density", counts @ parts.held.float().sum(1) / (size * NEAREST[1])
    yield "coverage", (counts @ parts.held.float() > 0).float().mean(1)
    pairs = ((counts @ parts.apart) * counts).sum(1)
    yield "pairwise_distance", pairs / (size * (size - 1))


def _spread(values: Tensor, few: int, count: int) -> float:
    """Standard deviation, of as many samples as there are."""
    return float(values.double().std()) * math.sqrt(few / count)


# --- verdicts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What figures mean, in words.

    Args:
        name: ``"untrained"``, ``"collapsed"`` or ``"memorised"``.
        text: Why, with the figure and its threshold.
    """

    name: str
    text: str


def verdicts(measures: Sequence[Measure]) -> list[Verdict]:
    """What is plainly wrong with samples; none where nothing is."""
    return []


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
