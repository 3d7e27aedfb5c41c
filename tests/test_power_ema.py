"""Power-function averages: closed forms, reconstruction after training, resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from exactness import near

from gendiff import checkpoint, config, ema, generate, plugins, runs
from gendiff.errors import CheckpointError
from gendiff.testing.toy import ToyModality
from gendiff.train import Trainer, train


def _run(folder: Path, *overrides: str) -> runs.Run:
    toy = ToyModality()
    keys = ["train.ema_widths=[0.05, 0.1]", "train.ema_snapshot_steps=10", *overrides]
    resolved = config.resolve(toy, (), (f"out={folder}", "device=cpu", *keys))
    return runs.start(toy, resolved, toy.prepare(resolved.toy).facts, accept_changes=True)


def _quadrature(t_a: float, g_a: float, t_b: float, g_b: float) -> torch.Tensor:
    n = 200_000
    tau = (torch.arange(n, dtype=torch.float64) + 0.5) * min(t_a, t_b) / n
    p = [(g + 1) * tau**g / t ** (g + 1) for t, g in ((t_a, g_a), (t_b, g_b))]
    return (p[0] * p[1]).sum() * min(t_a, t_b) / n


def test_closed_forms() -> None:
    for a, b in (((3.0, 2.0), (5.0, 6.9)), ((7.0, 16.9), (4.0, 1.5)), ((2.0, 3.0), (2.0, 3.0))):
        near(torch.tensor(ema.inner(*a, *b)).double(), _quadrature(*a, *b), 1e-6)
    for width in (0.02, 0.05, 0.1, 0.25):
        gamma = ema.gamma_of(width)
        n = 200_000
        tau = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        p = (gamma + 1) * tau**gamma / n
        mean = (p * tau).sum()
        assert ((p * (tau - mean) ** 2).sum().sqrt() - width).abs() < 1e-7
    for width in (0.0, 0.3):
        with pytest.raises(ValueError, match="EMA width"):
            ema.gamma_of(width)


def test_reconstruction_is_the_tracked_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "modality", lambda name: ToyModality())
    run = _run(tmp_path, "train.steps=200", "train.checkpoint_every_steps=200")
    trainer = Trainer(run)
    truth = ema.PowerEMA(trainer.network, 0.07)
    for result in trainer.steps():
        truth.update(result.step)
    assert train(run)
    model = generate.load(run.folder, ema_width=0.07)
    plain = generate.load(run.folder)
    want, got, other = (
        torch.cat([p.flatten() for p in m.parameters()])
        for m in (truth.module, model.network, plain.network)
    )
    assert (got - want).norm() < 1e-3 * want.norm()
    assert (other - want).norm() > 1e-2 * want.norm()
    with pytest.raises(CheckpointError, match="no snapshot"):
        ema.reconstruct(run.ema, 0.07, 5, truth.module)


def test_resume_is_exact(tmp_path: Path) -> None:
    whole, cut = _run(tmp_path / "a"), _run(tmp_path / "b")
    assert train(whole)
    trainer = Trainer(cut)
    for result in trainer.steps():
        if result.step == 10:
            ema.save_snapshot(cut.ema, 10, trainer.power_emas)
            trainer.save()
            break
    ema.save_snapshot(cut.ema, 15, trainer.power_emas)  # later than the checkpoint: goes
    assert train(cut)
    assert list(ema.snapshots(cut.ema)) == [10, 20]
    for step, path in ema.snapshots(whole.ema).items():
        assert path.read_bytes() == ema.snapshots(cut.ema)[step].read_bytes()
    states = [
        checkpoint.load_state(checkpoint.at(r.checkpoints, 20))["power_emas"] for r in (whole, cut)
    ]
    for width in ("0.05", "0.1"):
        for name, value in states[0][width].items():
            assert torch.equal(value, states[1][width][name])


def test_buffers_are_the_newest(tmp_path: Path) -> None:
    net = torch.nn.BatchNorm1d(2)
    average = ema.PowerEMA(net, 0.1)
    for step in (1, 2, 3):
        net.running_mean.fill_(step)
        average.update(step)
        ema.save_snapshot(tmp_path, step, [average])
    found = ema.reconstruct(tmp_path, 0.2, 3, net)
    assert torch.equal(found["running_mean"], torch.full((2,), 3.0))
