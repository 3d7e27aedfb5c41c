r"""Exponential moving averages of a network's parameters.

.. math:: \bar\theta \leftarrow \bar\theta + (1 - d)(\theta - \bar\theta), \qquad
          d = 2^{-1 / \min(h,\, r k)}

with half-life h in steps, and warm-up: at step k the half-life is at most the share r of the
training so far, so that early averages are of use (Karras et al., 2022, appendix F). Buffers are
copied, not averaged.

The power-function average (Karras et al., 2024, EDM2, arXiv 2312.02696, section 3.2) has
d = (1 - 1/k)^(gamma + 1), so that its profile over past steps keeps its shape as training goes on:

.. math:: p_\gamma(\tau; t) = \frac{(\gamma + 1)\, \tau^\gamma}{t^{\gamma + 1}}, \qquad
          \sigma_{rel} = \frac{(\gamma + 1)^{1/2}}{(\gamma + 2) (\gamma + 3)^{1/2}}

From its snapshots, any other width is found after training by least squares (appendix C).
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gendiff.checkpoint import readable
from gendiff.distributed import local, present, state_of
from gendiff.errors import CheckpointError

LARGEST_WIDTH = 12**-0.5  # sigma_rel at gamma = 0


class EMA:
    """The average of one network with one half-life.

    Args:
        module: The network in training.
        half_life_steps: h; 0 copies the parameters.
        warmup: r.
    """

    def __init__(self, module: nn.Module, half_life_steps: float, warmup: float = 0.05) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.half_life_steps = half_life_steps
        self.warmup = warmup
        self._source = module

    def decay(self, step: int) -> float:
        """D at step ``step``, counted from 1."""
        half_life = min(self.half_life_steps, self.warmup * step)
        return 0.5 ** (1 / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after step ``step``."""
        # Asked anew each time: sharding puts other tensors in the place of the parameters.
        averages, sources = (
            [local(p) for p in module.parameters()] for module in (self.module, self._source)
        )
        torch._foreach_lerp_(averages, sources, 1 - self.decay(step))
        for average, source in zip(self.module.buffers(), self._source.buffers(), strict=True):
            average.copy_(source)


class PowerEMA(EMA):
    """The power-function average of one network.

    Args:
        module: The network in training.
        width: sigma_rel, the profile's standard deviation as a share of the training so far.
    """

    def __init__(self, module: nn.Module, width: float) -> None:
        super().__init__(module, 0)
        self.width = width
        self.gamma = gamma_of(width)

    def decay(self, step: int) -> float:
        """(1 - 1/k)^(gamma + 1) at step k = ``step``, counted from 1."""
        return float((1 - 1 / step) ** (self.gamma + 1))


def width_of(gamma: float) -> float:
    """sigma_rel of an exponent."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(width: float) -> float:
    """The exponent gamma > 0 of a width sigma_rel, by bisection: the width falls with gamma.

    Raises:
        ValueError: The width is not between 0 and 12^(-1/2).
    """
    if not 0 < width < LARGEST_WIDTH:
        raise ValueError(f"EMA width {width:g}: choose one above 0 and below {LARGEST_WIDTH:.4f}")
    low, high = 0.0, 1 / width  # the width is below 1 / gamma
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if width_of(middle) > width else (low, middle)
    return (low + high) / 2


def inner(t_a: float, gamma_a: float, t_b: float, gamma_b: float) -> float:
    """The inner product of two profiles over tau (EDM2, appendix C)."""
    if t_a > t_b:
        t_a, gamma_a, t_b, gamma_b = t_b, gamma_b, t_a, gamma_a
    scale = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * t_b)
    return float(scale * (t_a / t_b) ** gamma_b)


def mixture(profiles: Sequence[tuple[float, float]], t: float, gamma: float) -> Tensor:
    """Weights [len(profiles)], float64, of profiles (t_i, gamma_i) that best make (t, gamma)."""
    gram = [[inner(*a, *b) for b in profiles] for a in profiles]
    goal = [[inner(*a, t, gamma)] for a in profiles]
    a, b = (torch.tensor(rows, dtype=torch.float64) for rows in (gram, goal))
    return torch.linalg.lstsq(a, b, driver="gelsd").solution[:, 0]


def save_snapshot(folder: Path, step: int, averages: Sequence[PowerEMA]) -> None:
    """Writes the averages of a step, whole or not at all; process 0 does."""
    tensors = {
        f"{i}.{name}": value.detach().cpu().contiguous()
        for i, average in enumerate(averages)
        for name, value in state_of(average.module).items()
    }
    if not present().first:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    temporary = path.with_suffix(".tmp")
    widths = json.dumps([average.width for average in averages])
    save_file(tensors, temporary, {"widths": widths})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots of a folder by step, oldest first."""
    paths = sorted(folder.glob("step-*.safetensors"))
    steps = [path.stem.removeprefix("step-") for path in paths]
    return {int(n): path for n, path in zip(steps, paths, strict=True) if n.isdecimal()}


def reconstruct(folder: Path, width: float, step: int, network: nn.Module) -> dict[str, Tensor]:
    """The state that :class:`PowerEMA` of ``width`` would have, nearly, at the newest snapshot.

    Parameters are mixed, in float64; buffers are the newest snapshot's.

    Args:
        folder: The snapshots.
        width: sigma_rel.
        step: Later snapshots are ignored.
        network: Tells which names are buffers.

    Raises:
        CheckpointError: There is no snapshot, or the width is out of range.
    """
    kept = {t: path for t, path in snapshots(folder).items() if t <= step}
    if not kept:
        raise CheckpointError(
            f"{folder} has no snapshot up to step {step}. Train with train.ema_widths=[0.05,0.1]"
        )
    try:
        gamma = gamma_of(width)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    profiles: list[tuple[float, float]] = []
    for t, path in kept.items():
        with readable(path), safe_open(path, "pt") as file:
            profiles += [(t, gamma_of(w)) for w in json.loads(file.metadata()["widths"])]
    weights = iter(mixture(profiles, max(kept), gamma).tolist())
    buffers = {name for name, _ in network.named_buffers(remove_duplicate=False)}
    total: dict[str, Tensor] = {}
    for path in kept.values():
        with readable(path), safe_open(path, "pt") as file:
            names = file.keys()
            for i in range(len(json.loads(file.metadata()["widths"]))):
                weight = next(weights)
                for key in (n for n in names if n.startswith(f"{i}.")):
                    name, value = key.partition(".")[2], file.get_tensor(key)
                    if name in buffers:
                        total[name] = value
                    else:
                        total[name] = total.get(name, 0) + weight * value.double()
    return total
