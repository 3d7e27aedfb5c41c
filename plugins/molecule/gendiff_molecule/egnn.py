r"""EDM's equivariant graph network (Satorras et al., 2021, https://arxiv.org/abs/2102.09844;
Hoogeboom et al., 2022, https://arxiv.org/abs/2203.17003, appendix B), on dense groups of samples.

Atoms have positions :math:`x_i` and features :math:`h_i`; every pair of a molecule's atoms is an
edge. With :math:`\phi` perceptrons of two layers, d the distance at the block's input and
:math:`d^0` that at the network's, a block is

.. math::

    m_{ij} &= \phi_e(h_i, h_j, d_{ij}^2, (d_{ij}^0)^2), \\
    h_i &\leftarrow h_i + \phi_h(h_i, \textstyle\sum_{j \ne i} \sigma(w^T m_{ij} + b)\, m_{ij}), \\
    x_i &\leftarrow x_i + \textstyle\sum_{j \ne i} \frac{x_i - x_j}{d_{ij} + 1}\,
        r \tanh \phi_x(h_i, h_j, d_{ij}^2, (d_{ij}^0)^2).

The first layer of an edge's perceptron is linear in :math:`(h_i, h_j, d^2, (d^0)^2)`, so its
products with the features are taken per atom, not per edge: this is the same function at a third
of the multiplications.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gendiff.spaces import Cond, Ragged
from gendiff_molecule.padding import gather, groups, scatter


class Pairs(nn.Module):
    """The hidden part of an edge's perceptron, up to and with the second activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * width + 2, width)
        self.second = nn.Linear(width, width)

    def forward(self, h: Tensor, squares: Tensor) -> Tensor:
        """(b, n, W) and squared distances (b, n, n, 2), now and at first, to (b, n, n, W)."""
        width = h.shape[-1]
        here, there, distance = self.first.weight.split([width, width, 2], 1)
        receiver = nn.functional.linear(h, here, self.first.bias)
        sender = nn.functional.linear(h, there)
        edges = nn.functional.linear(squares, distance)
        edges += receiver[:, :, None]
        edges += sender[:, None]
        return silu(self.second(silu(edges)))


class Block(nn.Module):
    """A layer of messages, then an update of the positions."""

    def __init__(
        self, width: int, attention: bool, coordinate_range: float, normalization: float
    ) -> None:
        super().__init__()
        self.coordinate_range, self.normalization = coordinate_range, normalization
        self.message = Pairs(width)
        self.gate = nn.Linear(width, 1) if attention else None
        self.node = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width))
        self.pull = Pairs(width)
        self.step = nn.Linear(width, 1, bias=False)
        # Positions begin by hardly moving: sums over neighbours easily explode.
        nn.init.xavier_uniform_(self.step.weight, gain=0.001)

    def forward(
        self, h: Tensor, x: Tensor, initial: Tensor, edges: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updates h (b, n, W) and x (b, n, 3).

        Args:
            initial: Squared distances at the network's input, (b, n, n).
            edges: 1 between two atoms of a molecule, 0 elsewhere and on the diagonal, (b, n, n).
        """
        offset, square = offsets(x)
        squares = torch.stack([square, initial], -1)
        messages = self.message(h, squares)
        weight = edges if self.gate is None else torch.sigmoid(self.gate(messages)[..., 0]) * edges
        # The sum over j of weight_ij m_ij as a matrix product: no gated copy of the messages.
        total = (weight[:, :, None] @ messages)[:, :, 0] / self.normalization
        h = h + self.node(torch.cat([h, total], -1))
        step = torch.tanh(self.step(self.pull(h, squares))[..., 0].to(x.dtype))
        # Within the root so that the gradient is finite where atoms coincide.
        distance = (square + 1e-8).sqrt()
        weight = step * edges * self.coordinate_range / (distance + 1) / self.normalization
        return h, x + (weight[..., None] * offset).sum(2)


class EGNN(nn.Module):
    """Noisy atoms to displacements, which turn with the molecule, and features, which do not.

    The defaults are EDM's for QM9. The noise level is one more input feature.

    Args:
        features: Number K of feature columns.
        width: Width of all hidden layers.
        depth: Number of blocks, with one layer of messages each.
        attention: Whether messages pass a gate.
        coordinate_range: The most that one neighbour may move an atom in one block.
        normalization: What the sums over neighbours are divided by.
        context: Width of the condition ``context``, 0 for none.
        groups: Into how many groups of similar size a batch is cut, see
            :mod:`gendiff_molecule.padding`. It changes the speed only.
    """

    def __init__(
        self,
        features: int,
        width: int = 256,
        depth: int = 9,
        *,
        attention: bool = True,
        coordinate_range: float = 15.0,
        normalization: float = 1.0,
        context: int = 0,
        groups: int = 4,
    ) -> None:
        super().__init__()
        self.context, self.groups = context, groups
        self.embedding = nn.Linear(features + 1 + context, width)
        self.blocks = nn.ModuleList(
            Block(width, attention, coordinate_range, normalization) for _ in range(depth)
        )
        self.out = nn.Linear(width, features)

    def forward(self, x: Tensor, noise: Tensor, cond: Cond | None, space: Ragged) -> Tensor:
        """Atoms (R, 3 + K) and noise numbers (B,) to (R, 3 + K)."""
        inputs = [x[:, 3:], noise[space.index, None].to(x.dtype)]
        if self.context:
            inputs.append(self.context_rows(cond, space).to(x.dtype))
        inputs = self.embedding(torch.cat(inputs, 1))
        multiple = 4 if x.is_cuda else 1  # few shapes: compiled code and kernels are reused
        cut = groups(space, self.groups, multiple)
        parts = []
        for group in cut:
            h, start = gather(inputs, group), gather(x[:, :3], group)
            live = group.mask.to(x.dtype)
            edges = live[:, :, None] * live[:, None]
            edges = edges - torch.diag_embed(live)
            position, initial = start, offsets(start)[1]
            for block in self.blocks:
                h, position = block(h, position, initial, edges)
            parts.append(torch.cat([position - start, self.out(h).to(x.dtype)], -1))
        return scatter(parts, cut, len(x))

    def context_rows(self, cond: Cond | None, space: Ragged) -> Tensor:
        """Each atom's context, (R, C): its molecule's ``cond["context"]``, zero where dropped."""
        if cond is None:
            return self.out.weight.new_zeros(len(space.index), self.context)
        context = cond["context"]
        if cond.dropped is not None:
            context = context.masked_fill(cond.dropped[:, None], 0)
        return context[space.index]


def offsets(x: Tensor) -> tuple[Tensor, Tensor]:
    """x_i - x_j, (b, n, n, 3), and its squared length, (b, n, n), of positions (b, n, 3)."""
    offset = x[:, :, None] - x[:, None]
    return offset, offset.square().sum(-1)
