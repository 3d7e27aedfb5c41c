"""A teacher, its student, and what both are worth at few network calls: any modality.

Trains the modality's default recipe, or goes on with it, distils it, and judges both by the
modality's own metrics: the teacher by its own sampler on its grid, the student as its run says.

    python benchmarks/distilled.py --modality image --figures frechet_distance label_accuracy
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import gendiff
from gendiff import config, distillation, plugins, runs, train
from gendiff.evaluate import Judge
from gendiff.generate import Model
from gendiff.spaces import join


def teach(args: argparse.Namespace) -> tuple[runs.Run, runs.Run, dict[str, float]]:
    """The teacher's run, the student's, and the CPU-seconds that this call spent on each part."""
    modality = plugins.modality(args.modality)
    fixed = [f"out={args.runs}", "threads=1", "device=cpu"]
    resolved = config.resolve(modality, args.config, [*fixed, *args.set])
    facts = modality.prepare(getattr(resolved, modality.name)).facts
    teacher = runs.start(modality, resolved, facts)
    marks = [time.process_time()]
    train.train(teacher)
    marks.append(time.process_time())
    lesson = distillation.prepare(teacher.folder, [], args.student)
    student = runs.start(modality, lesson.config, teacher.facts)
    distillation.make_pairs(lesson, student)
    marks.append(time.process_time())
    distillation.distill(lesson, student)
    marks.append(time.process_time())
    parts = ("teacher", "pairs", "student")
    return teacher, student, {p: marks[i + 1] - marks[i] for i, p in enumerate(parts)}


def judged(model: Model, calls: int, judge: Judge, args: argparse.Namespace) -> dict[str, Any]:
    """The modality's measures of samples of so many steps."""
    settings, run = model.settings(steps=calls), model.run
    samples = join(list(model.batches(list(range(args.count)), settings, args.seed)))
    measures = judge.measures(samples.to("cpu"))
    return {
        "run": run.config.name,
        "calls": model.calls(settings),
        "measures": {m.name: [m.value, m.floor] for m in measures},
    }


def main() -> None:
    """Trains, distils, judges and prints a line for each number of calls."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--modality", default="image")
    parser.add_argument("--config", type=Path, action="append", default=[])
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the teacher's run")
    parser.add_argument("--student", nargs="*", default=[], help="overrides of the student's run")
    parser.add_argument("--teacher-calls", type=int, nargs="*", default=[50, 4, 2, 1])
    parser.add_argument("--calls", type=int, nargs="*", default=[4, 2, 1])
    parser.add_argument("--count", type=int, default=1000, help="samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", nargs="*", default=[], help="measures to print; all if none")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    teacher, student, seconds = teach(args)
    print("CPU-seconds: " + ", ".join(f"{part} {s:.0f}" for part, s in seconds.items()))
    rows = []
    for run, all_calls in ((teacher, args.teacher_calls), (student, args.calls)):
        model = gendiff.load(run.folder)
        judge = Judge(model.run, runs.cache_folder(), args.seed)
        for calls in all_calls:
            rows.append(judged(model, calls, judge, args))
            shown = "  ".join(
                f"{name} {value:.4g}" + ("" if floor is None else f" (real data {floor:.4g})")
                for name, (value, floor) in rows[-1]["measures"].items()
                if not args.figures or name in args.figures
            )
            print(f"{rows[-1]['run']:20} {rows[-1]['calls']:3} calls  {shown}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"cpu_seconds": seconds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
