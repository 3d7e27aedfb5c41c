r"""The default network: E(3)-equivariant, with attention over pairs of atoms in a narrow space.

Every layer makes one narrow feature of each pair,

.. math:: z_{ij} = silu(A h_i + B h_j + C\, rbf(d_{ij}) + D\, e_{ij} + noise) \in R^p,

and one linear map of it gives the attention's logits, the pair's update and the weight
:math:`w^l_{ij}` of a bounded pull along the pair's direction. The displacement is

.. math:: \Delta x_i = \sum_j \frac{x_i - x_j}{d_{ij} + 1}\, \frac gn \sum_l \tanh w^l_{ij} .

The cost over pairs does not see the width of h (the idea is of SemlaFlow, Irwin et al., 2025,
https://arxiv.org/abs/2406.07266; the bounded pull is EGNN's and EDM's). Positions do not move
between layers, unlike there: distances are computed once, nothing is differentiated with respect
to them, and the held-out loss at equal training time is lower. Positions enter through distances
and leave through differences, so the network commutes with rotation, reflection and permutation,
and ignores translation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gendiff.spaces import Cond, Ragged
from gendiff_molecule.padding import gather, groups, scatter

PULL = 10.0  # the largest pull of one layer along a pair, in units of the network's input
BONDS = 5  # none, single, double, triple, aromatic


def _zero(linear: nn.Linear) -> nn.Linear:
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Fourier(nn.Module):
    """Sines and cosines of a number, (B,) to (B, width)."""

    frequencies: Tensor

    def __init__(self, width: int = 32, highest: float = 4.0) -> None:
        super().__init__()
        rate = torch.logspace(-2, math.log2(highest), width // 2, base=2) * 2 * math.pi
        self.register_buffer("frequencies", rate, persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        angle = value[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], 1)


class Radial(nn.Module):
    """Gaussians of exp(-d), dense where bonds are (Unke & Meuwly, 2019, eq. 7), and d itself.

    Distances (…, 1) to (…, count + 1).
    """

    centres: Tensor

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.register_buffer("centres", torch.linspace(0.02, 1, count), persistent=False)

    def forward(self, distance: Tensor) -> Tensor:
        scaled = ((-distance).exp() - self.centres) * self.count
        return torch.cat([(-scaled * scaled).exp(), distance], -1)


class Layer(nn.Module):
    """One round of attention and pair update; if it is ``final``, it only weighs the pulls."""

    def __init__(self, width: int, pair: int, heads: int, final: bool = False) -> None:
        super().__init__()
        self.width, self.heads, self.pair, self.final = width, heads, pair, final
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = _zero(nn.Linear(width, (2 if final else 4) * width + pair))
        self.ends = nn.Linear(width, 2 * pair, bias=False)
        self.edge = nn.Linear(pair, pair)
        self.out = nn.Linear(pair, 1 if final else heads + pair + 1)
        with torch.no_grad():
            self.out.weight[-1] *= 1e-2  # no displacement at first
        if final:
            return
        self.value = nn.Linear(width, width, bias=False)
        self.merge = nn.Linear(width + pair, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.wide = nn.Linear(width, 3 * width)
        self.narrow = _zero(nn.Linear(3 * width, width))

    def forward(
        self, h: Tensor, e: Tensor, near: Tensor, level: Tensor, share: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """New h (B, N, D) and e (B, N, N, P), and the weights of the pulls, (B, N, N).

        Args:
            h, e: Features of atoms and pairs.
            near: The layer's own view of the distances, (B, N, N, P).
            level: What is known of the whole molecule, (B, D).
            share: 1/n for each live atom, 0 for padding, (B, N).
            bias: Added to the attention's logits, -1e4 for padding, (B, 1, N, 1).
        """
        shift, scale, pairs, *rest = self.modulate(level)[:, None].split(
            [self.width, self.width, self.pair, *([] if self.final else [self.width] * 2)], -1
        )
        normed = torch.addcmul(shift, self.norm(h), 1 + scale)
        to, fro = self.ends(normed).chunk(2, -1)
        z = F.silu(self.edge(e) + near + (to + pairs)[:, :, None] + fro[:, None])
        if self.final:
            return h, e, self.out(z)[..., 0]
        logits, update, weight = self.out(z).split([self.heads, self.pair, 1], -1)
        attention = (logits + bias).softmax(2)  # over j
        value = self.value(normed).unflatten(-1, (self.heads, -1))
        seen = torch.einsum("bijh,bjhd->bihd", attention, value).flatten(-2)
        update = F.silu(update)
        pooled = torch.einsum("bijp,bj->bip", update, share)
        h = h + self.merge(torch.cat([seen, pooled], -1))
        shift, scale = rest
        normed = torch.addcmul(shift, self.norm2(h), 1 + scale)
        h = h + self.narrow(F.silu(self.wide(normed)))
        return h, e + update, weight[..., 0]


class PairNet(nn.Module):
    """See the module.

    Args:
        types: Columns of the state behind the three of the positions; 0 if it has none.
        width, pair, heads, layers: D, P, attention heads, and how many layers.
        radial: Radial functions of the distance.
        context: Width of the condition ``context`` (B, context), or 0.
        graph_types: How many kinds of atoms the condition ``atoms`` (B, N) counts, where the
            graph is given; then ``bonds`` (B, N, N) holds the orders. 0: there is no graph.
        groups: Into how many groups of like size a batch is cut.
        outputs: Columns of the output behind the three of the positions; ``types`` if None.
    """

    def __init__(
        self,
        types: int,
        width: int = 96,
        pair: int = 32,
        heads: int = 8,
        layers: int = 5,
        radial: int = 24,
        context: int = 0,
        graph_types: int = 0,
        groups: int = 4,
        outputs: int | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: {width} is not divisible by heads={heads}")
        outputs = types if outputs is None else outputs
        self.types, self.pair, self.context = types, pair, context
        self.graph_types, self.groups = graph_types, groups
        self.fourier = Fourier()
        self.level = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.atom = nn.Linear(types + 1, width)
        self.radial = Radial(radial)
        if context:
            self.asked = nn.Linear(context + 1, width)  # the last input: nothing is asked
        if graph_types:
            self.kind = nn.Embedding(graph_types, width)
            self.bond = nn.Embedding(BONDS, pair)
        self.near = nn.Linear(radial + 1, pair * (layers + 1))  # for e at first, and each layer
        # Where nothing is said of the atoms, nobody would read what the last layer does to them.
        self.layers = nn.ModuleList(
            Layer(width, pair, heads, final=not outputs and i == layers - 1) for i in range(layers)
        )
        if outputs:
            self.head = nn.Sequential(nn.LayerNorm(width), _zero(nn.Linear(width, outputs)))

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Ragged) -> Tensor:
        """The displacement and the types' logits, (R, 3 + types).

        Args:
            x: Scaled noisy state, (R, 3 + types).
            noise: The noise number, (B,).
            cond: See the class.
            space: Which rows form a molecule.
        """
        level = self.level(self.fourier(noise))
        if self.context:
            assert cond is not None
            asked = cond["context"].to(x.dtype)
            hidden = asked.new_zeros(len(asked), 1)
            if cond.dropped is not None:
                hidden = cond.dropped[:, None].to(asked)
            level = level + self.asked(torch.cat([asked * (1 - hidden), hidden], 1))
        level = F.silu(level)
        multiple = 4 if x.is_cuda else 1  # few shapes, so that compiled code is reused
        cut = groups(space, self.groups, multiple)
        parts = []
        for group in cut:
            rows = gather(x, group)
            graph = None
            if self.graph_types:
                assert cond is not None
                n = rows.shape[1]
                graph = cond["atoms"][group.samples, :n], cond["bonds"][group.samples, :n, :n]
            parts.append(self._dense(rows, level[group.samples], group.mask, graph))
        return scatter(parts, cut, x.shape[0])

    def _dense(
        self, x: Tensor, level: Tensor, mask: Tensor, graph: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """The network on molecules padded to one size, (B, N, 3 + types)."""
        live = mask.to(x.dtype)
        size = live.sum(1)
        position = x[..., :3]
        difference = position[:, :, None] - position[:, None]
        # The root's derivative must exist where atoms coincide, as each does with itself.
        distance = (difference.square().sum(-1, keepdim=True) + 1e-8).sqrt()
        e, *near = self.near(self.radial(distance)).split(self.pair, -1)
        count = (size / 10)[:, None, None].expand(-1, x.shape[1], 1)
        h = self.atom(torch.cat([x[..., 3:], count], -1))
        if graph is not None:
            h = h + self.kind(graph[0])
            e = e + self.bond(graph[1])
        bias = torch.zeros_like(live).masked_fill(~mask, -1e4)[:, None, :, None]
        share = live / size[:, None]
        pull = torch.zeros_like(distance[..., 0])
        for layer, seen in zip(self.layers, near, strict=True):
            h, e, weight = layer(h, e, seen, level, share, bias)
            pull = pull + torch.tanh(weight.to(x.dtype))
        pull = pull * (PULL * share[:, None] / (distance[..., 0] + 1))
        moved = (pull[..., None] * difference).sum(2)
        if self.layers[-1].final:
            return moved
        return torch.cat([moved, self.head(h).to(moved.dtype)], -1)
