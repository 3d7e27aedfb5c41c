"""What a change of a recipe does at equal cost: any modality, its own metrics.

Each variant is a string of overrides. It is trained for the same CPU-seconds of one thread (the
step's cost is measured first, and the number of steps set so that the learning rate ends where it
should), then judged by the modality's own metrics on samples of the run's sampler.

    python benchmarks/recipe.py --modality molecule --seconds 300 --figures connected \\
        "" "train.lr=1e-3" "molecule.type_scale=1.0" --out recipe.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gendiff import config, plugins, runs
from gendiff.evaluate import Judge, heldout_loss
from gendiff.runs import cache_folder
from gendiff.spaces import join
from gendiff.train import Trainer

WARM, TIMED = 10, 30  # steps before the cost is measured, and those it is measured over


def steps_for(
    modality: Any, files: list[Path], overrides: list[str], facts: dict[str, Any], seconds: float
) -> int:
    """How many steps a variant can do in these CPU-seconds."""
    with TemporaryDirectory() as folder:
        resolved = config.resolve(modality, files, [*overrides, f"out={folder}"])
        trainer = Trainer(runs.start(modality, resolved, facts))
        begin = 0.0
        for result in trainer.steps():
            if result.step == WARM:
                begin = time.process_time()
            if result.step == WARM + TIMED:
                break
        return max(1, round(seconds * TIMED / (time.process_time() - begin)))


def row(
    modality: Any, files: list[Path], variant: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Trains and judges one variant."""
    overrides = [*args.set, *shlex.split(variant), "threads=1", "device=cpu"]
    resolved = config.resolve(modality, files, overrides)
    facts = modality.prepare(getattr(resolved, modality.name)).facts
    steps = steps_for(modality, files, overrides, facts, args.seconds)
    with TemporaryDirectory() as folder:
        more = [f"train.steps={steps}", f"out={folder}"]
        resolved = config.resolve(modality, files, [*overrides, *more])
        trainer = Trainer(runs.start(modality, resolved, facts))
        begin = time.process_time()
        for _ in trainer.steps():
            pass
        spent = time.process_time() - begin
        model = trainer.model()
        samples = join(list(model.batches(list(range(args.count)), resolved.sample, args.seed)))
        names = set(args.figures) or None
        measures = Judge(model.run, cache_folder(), args.seed).measures(samples, names)
        loss = heldout_loss(model)
    return {
        "variant": variant or "(as it is)",
        "steps": steps,
        "parameters": sum(p.numel() for p in model.network.parameters()),
        "cpu_seconds": round(spent),
        "measures": {
            m.name: [m.value, m.floor] for m in measures if names is None or m.name in names
        },
        "heldout_loss": loss,
    }


def main() -> None:
    """Prints a row for each variant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modality", required=True)
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--set", action="append", default=[], help="an override of every variant")
    parser.add_argument("--seconds", type=float, default=300, help="CPU-seconds of training")
    parser.add_argument("--count", type=int, default=1000, help="samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", nargs="*", default=[], help="measures to print; all if none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("variants", nargs="+", help="overrides, separated by blanks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    modality = plugins.modality(args.modality)
    rows = []
    for variant in args.variants:
        rows.append(row(modality, args.config, variant, args))
        shown = {name: round(value, 4) for name, (value, _) in rows[-1]["measures"].items()}
        print(f"{rows[-1]['variant']:50} {rows[-1]['steps']:6} steps  {shown}", flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
