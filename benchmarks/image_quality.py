"""Time to quality on scikit-learn's 8x8 digits: gendiff, diffusers, denoising-diffusion-pytorch.

Each side trains for the same CPU time on one thread, on the same training images, in batches of
64, with a learning rate that falls to 0 (cosine) at the end of the budget: a step's cost is
measured first, on a network that is thrown away, and gives the number of steps. Then it draws 5000
samples in 20 network calls each from its averaged weights. gendiff's image metrics judge them all
alike, in one process: Fréchet distance (and its floor, real training images in the samples'
place), precision and recall against the held-out images.

    python benchmarks/image_quality.py --budgets 60 120 240 --out quality.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peers import ROOT, peers_python

# Two sets of 1000 samples of one network are 0.09 apart, as far as the sides are; 5000 tell.
SAMPLES, CALLS, BATCH = 5000, 20, 64
PROBE = (3, 20)  # steps that warm up, and steps whose cost is measured
# gendiff runs on its plugin's defaults. Of the peers' options only the spacing of the times of
# diffusers' sampler was tried (100 steps: Fréchet distance 19.27 with "linspace", 19.33 with
# "trailing"); for learning rate, schedule and prediction repeat with --choice.
CHOICES: dict[str, dict[str, Any]] = {
    "gendiff": {},
    "diffusers": {
        "channels": [24, 48],
        "lr": 3e-3,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "sampling": {"timestep_spacing": "linspace"},
    },
    "lucidrains": {"lr": 3e-3, "ema_update_every": 1},
}
SIDES = tuple(CHOICES)
Draw = Callable[[int], Any]  # a seed to samples (SAMPLES, C, H, W)


class Trainer:
    """A side in training: ``steps()`` yields after every step, ``draw`` samples."""

    parameters: int
    draw: Draw

    def steps(self) -> Iterator[Any]:
        """Trains to the last step."""
        raise NotImplementedError


class Gendiff(Trainer):
    """The image plugin's defaults, but for the number of steps."""

    def __init__(self, data: dict[str, Any], steps: int, choice: dict[str, Any]) -> None:
        from gendiff import config, plugins, runs, train

        modality = plugins.modality("image")
        overrides = [
            f"train.steps={steps}",
            "device=cpu",
            "threads=1",
            *(f"{key}={value}" for key, value in choice.items()),
        ]
        resolved = config.resolve(modality, overrides=overrides)
        facts = modality.prepare(getattr(resolved, modality.name)).facts
        run = runs.Run(runs.folder_of(modality, resolved), modality, resolved, dict(facts))
        self.trainer = train.Trainer(run)
        self.parameters = sum(p.numel() for p in self.trainer.parameters)

    def steps(self) -> Iterator[Any]:
        """See :class:`Trainer`."""
        return self.trainer.steps()

    def draw(self, seed: int) -> Any:
        """The run's own sampling settings."""
        model = self.trainer.model()
        if model.calls(model.settings()) > CALLS:
            raise SystemExit(f"the defaults take more than {CALLS} network calls")
        return model.sample(SAMPLES, seed=seed).x


class Peer(Trainer):
    """The loop of both peers; they differ in network, loss, optimiser, average and sampler."""

    network: Any
    optimizer: Any

    def __init__(self, data: dict[str, Any], steps: int, choice: dict[str, Any]) -> None:
        import torch

        torch.manual_seed(0)
        self.data, self.count, self.choice = data, steps, choice
        self.build()
        self.parameters = sum(p.numel() for p in self.network.parameters())

    def build(self) -> None:
        """Makes network, optimizer and average."""
        raise NotImplementedError

    def loss(self, x: Any, labels: Any) -> Any:
        """The training loss of a batch."""
        raise NotImplementedError

    def average(self) -> None:
        """Updates the average."""
        raise NotImplementedError

    def rows(self) -> Iterator[Any]:
        """Which images are in a batch: whole passes, each in a new order."""
        import torch

        while True:
            yield from torch.randperm(len(self.data["x"])).split(BATCH)[:-1]

    def steps(self) -> Iterator[Any]:
        """The learning rate: a cosine, after warm-up over a twentieth of the steps."""
        import torch

        parameters = list(self.network.parameters())
        warm = min(100, self.count // 20) + 1
        for step, rows in zip(range(self.count), self.rows(), strict=False):
            factor = (1 + math.cos(math.pi * step / self.count)) / 2 * min(1, (step + 1) / warm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.choice["lr"] * factor
            self.loss(self.data["x"][rows], self.data["labels"][rows]).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.average()
            yield step


class Diffusers(Peer):
    """UNet2DModel with the class, as the library's example of unconditional training."""

    def build(self) -> None:
        """See :class:`Peer`."""
        import torch
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.training_utils import EMAModel

        self.network = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=tuple(self.choice["channels"]),
            norm_num_groups=8,
            num_class_embeds=10,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        self.scheduler = DDPMScheduler(
            beta_schedule=self.choice["beta_schedule"],
            prediction_type=self.choice["prediction_type"],
        )
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), betas=(0.95, 0.999), weight_decay=1e-6, fused=True
        )
        self.ema = EMAModel(self.network.parameters(), use_ema_warmup=True, power=0.75)

    def loss(self, x: Any, labels: Any) -> Any:
        """See :class:`Peer`."""
        import torch

        noise, t = torch.randn_like(x), torch.randint(0, 1000, (len(x),))
        x_t = self.scheduler.add_noise(x, noise, t)
        out = self.network(x_t, t, labels, return_dict=False)[0]
        v = self.choice["prediction_type"] == "v_prediction"
        target = self.scheduler.get_velocity(x, noise, t) if v else noise
        return torch.nn.functional.mse_loss(out, target)

    def average(self) -> None:
        """See :class:`Peer`."""
        self.ema.step(self.network.parameters())

    def draw(self, seed: int) -> Any:
        """DPM-Solver++(2M); sample i is of class i modulo 10, as gendiff's."""
        import torch
        from diffusers import DPMSolverMultistepScheduler

        self.ema.store(self.network.parameters())
        self.ema.copy_to(self.network.parameters())
        self.network.eval()
        solver = DPMSolverMultistepScheduler.from_config(
            self.scheduler.config, **self.choice["sampling"]
        )
        solver.set_timesteps(CALLS)
        x = torch.randn(SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(SAMPLES) % 10
        for t in solver.timesteps:
            out = self.network(solver.scale_model_input(x, t), t, labels, return_dict=False)[0]
            x = solver.step(out, t, x, return_dict=False)[0]
        self.ema.restore(self.network.parameters())
        self.network.train()
        return x


class Lucidrains(Peer):
    """denoising-diffusion-pytorch's Unet and GaussianDiffusion, without classes; DDIM."""

    def build(self) -> None:
        """See :class:`Peer`."""
        import torch
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        unet = Unet(dim=20, dim_mults=(1, 2), channels=1)
        self.network = GaussianDiffusion(
            unet, image_size=8, sampling_timesteps=CALLS, objective="pred_v"
        )
        self.optimizer = torch.optim.Adam(self.network.parameters(), betas=(0.9, 0.99), fused=True)
        self.ema = EMA(self.network, beta=0.995, update_every=self.choice["ema_update_every"])

    def loss(self, x: Any, labels: Any) -> Any:
        """See :class:`Peer`. It takes images in [0, 1]."""
        return self.network((x + 1) / 2)

    def average(self) -> None:
        """See :class:`Peer`."""
        self.ema.update()

    def draw(self, seed: int) -> Any:
        """See :class:`Trainer`."""
        import torch

        torch.manual_seed(seed)
        self.ema.ema_model.eval()
        return self.ema.ema_model.sample(batch_size=SAMPLES) * 2 - 1


TRAINERS: dict[str, type[Any]] = {
    "gendiff": Gendiff,
    "diffusers": Diffusers,
    "lucidrains": Lucidrains,
}


def step_cost(trainer: Trainer) -> float:
    """Seconds of CPU per step, on a trainer that is then thrown away."""
    steps = trainer.steps()
    for _ in range(PROBE[0]):
        next(steps)
    begin = time.process_time()
    for _ in range(PROBE[1]):
        next(steps)
    return (time.process_time() - begin) / PROBE[1]


def worker(args: argparse.Namespace) -> None:
    """Trains one side for one budget; writes samples and facts to ``--out``."""
    import torch

    torch.set_num_threads(1)
    data = torch.load(args.data, weights_only=True)
    side, budget = args.worker, args.budgets[0]
    choice = CHOICES[side] | json.loads(args.choice)
    cost = step_cost(TRAINERS[side](data, 1000, choice))
    count = max(1, round(budget / cost))
    trainer = TRAINERS[side](data, count, choice)
    begin = time.process_time()
    for _ in trainer.steps():
        pass
    facts = {
        "side": side,
        "budget": budget,
        "steps": count,
        "choice": choice,
        "cpu_seconds": time.process_time() - begin,
        "parameters": trainer.parameters,
    }
    with torch.no_grad():
        x = trainer.draw(args.seed)
    torch.save({"facts": facts, "x": x.float().clone()}, args.out)


def train(side: str, budget: float, args: argparse.Namespace, folder: Path, data: Path) -> Path:
    """Runs a worker in the side's environment; the file of its samples."""
    out = folder / f"{side}-{budget:g}.pt"
    python = sys.executable if side == "gendiff" else peers_python()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if side == "gendiff":
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "plugins" / "image")])
    command = [
        python,
        __file__,
        "--worker",
        side,
        "--budgets",
        str(budget),
        "--data",
        data,
        "--out",
        out,
        "--seed",
        str(args.seed),
        "--choice",
        args.choice,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{side}, {budget:g} s:\n{result.stderr}")
    return out


def training_data() -> dict[str, Any]:
    """The training images of gendiff's split, and their classes."""
    import torch

    from gendiff import config, plugins

    modality = plugins.modality("image")
    section = getattr(config.resolve(modality), modality.name)
    facts = modality.prepare(section).facts
    items = modality.dataset(section, facts, "train")
    images, labels = zip(*(items[i, 0] for i in range(facts["train"])), strict=True)
    return {"x": torch.stack(images), "labels": torch.tensor(labels)}


def judge(path: Path, seed: int) -> dict[str, Any]:
    """gendiff's figures of a file of samples."""
    import torch

    from gendiff import config, plugins
    from gendiff.evaluate import Judge
    from gendiff.runs import Run, cache_folder
    from gendiff.spaces import Batch, Dense

    torch.set_num_threads(1)
    modality = plugins.modality("image")
    resolved = config.resolve(modality)
    facts = modality.prepare(getattr(resolved, modality.name)).facts
    run = Run(path.parent, modality, resolved, facts)
    file = torch.load(path, weights_only=True)
    batch = Batch(file["x"], Dense(tuple(file["x"].shape)))
    measures = {m.name: m for m in Judge(run, cache_folder(), seed).measures(batch)}
    distance = measures["frechet_distance"]
    floor = distance.floor or math.nan
    return {
        **file["facts"],
        "frechet_distance": distance.value,
        "floor": floor,
        "ratio": distance.value / floor,
        "precision": measures["precision"].value,
        "recall": measures["recall"].value,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each side and budget; FD is the Fréchet distance."""
    lines = [
        "| side | budget s | CPU s | parameters | steps | FD | floor | FD / floor | "
        "precision | recall |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['side']} | {r['budget']:g} | {r['cpu_seconds']:.0f} | {r['parameters']:,} | "
            f"{r['steps']} | {r['frechet_distance']:.3f} | {r['floor']:.3f} | {r['ratio']:.2f} | "
            f"{r['precision']:.3f} | {r['recall']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Trains, judges and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--budgets",
        nargs="+",
        type=float,
        default=[60, 120, 240],
        help="seconds of CPU time of the training loop",
    )
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--seed", type=int, default=0, help="of samples and metrics")
    parser.add_argument("--choice", default="{}", help="JSON over CHOICES, for trials")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    import torch

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(training_data(), folder / "train.pt")
        jobs = [(side, budget) for budget in args.budgets for side in args.sides]
        with ThreadPoolExecutor(args.parallel) as pool:
            paths = pool.map(lambda job: train(*job, args, folder, folder / "train.pt"), jobs)
            rows = []
            for path in paths:
                rows.append(judge(path, args.seed))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    rows.sort(key=lambda row: (row["budget"], args.sides.index(row["side"])))
    print(table(rows))
    if args.out:
        args.out.write_text(
            json.dumps({"seed": args.seed, "samples": SAMPLES, "rows": rows}, indent=2) + "\n"
        )
    return None


if __name__ == "__main__":
    main()
