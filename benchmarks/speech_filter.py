"""The held-out loss of a speech network beside that of a linear filter of 5 bands by 5 frames.

    python benchmarks/speech_filter.py runs/speech/default

The filter is fitted by least squares to 150 training recordings with noise, once for each noise
level sigma, and knows neither text nor speaker. Printed is the mean squared error of x_hat on
held-out recordings, times (1 + sigma^2) / sigma^2: the loss of an ``edm`` prediction of data of
unit variance, of which a network that puts out nothing has 1. A network above the filter leaves
noise in its samples that 25 numbers would remove, most audibly between the harmonics of a voice.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import unfold

import gendiff
from gendiff import console
from gendiff.noise import generator

HELD_OUT, LEARNT = 48, 150  # recordings
VALUES = 800  # of each recording, from which the filter learns


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--sigma", nargs="*", type=float, default=[0.1, 0.2, 0.4, 0.8, 1.6])
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = gendiff.load(args.run)
    run = model.run
    train, test = (spread(run.modality.dataset(run.section, run.facts, split), count)
                   for split, count in (("train", LEARNT), ("test", HELD_OUT)))  # fmt: skip
    rows = []
    for sigma in args.sigma:
        w = fit([item.mel for item in train], sigma)
        filtered, network = [], []
        for i, item in enumerate(test):
            batch = run.modality.collate(run.section, run.facts, [item])
            noisy = batch.x + sigma * torch.randn(batch.x.shape, generator=generator("test", i))
            time = model.denoiser.schedule.inverse(-2 * torch.tensor([sigma]).double().log())
            with torch.no_grad():
                x_hat = model.denoiser.bind(batch.space, batch.cond)(noisy, time.float())
            network.append(float((x_hat - batch.x).square().mean()))
            x_hat = (patches(noisy[0]) @ w).view(batch.x.shape)
            filtered.append(float((x_hat - batch.x).square().mean()))
        scale = (1 + sigma**2) / sigma**2 / len(test)
        rows.append({"sigma": sigma, "filter": scale * sum(filtered), "run": scale * sum(network)})
    cells = [[f"{value:.3f}" for value in row.values()] for row in rows]
    console.table(f"step {model.step}", list(rows[0]), cells)
    if args.out:
        args.out.write_text(json.dumps({"step": model.step, "rows": rows}, indent=1))


def spread(data: Any, count: int) -> list[Any]:
    """At most so many items, spread evenly over the data."""
    count = min(count, len(data))
    return [data[i * len(data) // count, 0] for i in range(count)]


def patches(mel: Tensor) -> Tensor:
    """The 5 by 5 surroundings of each value of (C, T), and 1, (C * T, 26)."""
    found = unfold(mel[None, None], 5, padding=2)[0].T
    return torch.cat([found, torch.ones(len(found), 1)], 1)


def fit(mels: list[Tensor], sigma: float) -> Tensor:
    """The filter's numbers, (26, 1)."""
    gen = generator("fit", 0)
    seen, wanted = [], []
    for mel in mels:
        some = torch.randperm(mel.numel(), generator=gen)[:VALUES]
        seen.append(patches(mel + sigma * torch.randn(mel.shape, generator=gen))[some])
        wanted.append(mel.flatten()[some])
    solution: Tensor = torch.linalg.lstsq(torch.cat(seen), torch.cat(wanted)[:, None]).solution
    return solution


if __name__ == "__main__":
    main()
