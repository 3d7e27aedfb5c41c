"""Two gloo processes train as one: the same weights, one writer, one stop for all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import group
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gendiff import checkpoint, config, distributed, runs, sharded, train
from gendiff.errors import CheckpointError, ConfigError
from gendiff.testing import ToyModality
from gendiff.world import World, from_environment, parse_shard

# All columns free: where a gradient is 0 up to rounding, AdamW makes a whole step of the rounding.
SETTING = [
    "toy.kind=ragged",
    "toy.centred=0",
    "train.steps=20",
    "train.ema_widths=[0.1]",
    "train.batch_size=48",
]
FOLLOWING = ["diffusion.times={name: loss_second_moment, bins: 4}"]
VARIANTS = {
    "ddp": [],
    "ddp in parts": ["train.accumulate=2"],
    "fsdp": ["train.parallel=fsdp"],
    "following the losses": [*FOLLOWING, "train.accumulate=2"],
}


def folder(out: Path) -> Path:
    return out / "toy" / "default"


def alone(out: Path, *overrides: str) -> runs.Run:
    modality = ToyModality()
    given = [f"out={out}", *SETTING, *overrides]
    return runs.start(modality, config.resolve(modality, overrides=given), {"classes": 3})


def final(out: Path) -> dict:
    path = checkpoint.newest(folder(out) / "checkpoints", print)
    assert path is not None
    return checkpoint.load_state(path)


def losses(out: Path) -> list[float]:
    lines = (folder(out) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def difference(a: object, b: object) -> float:
    """The largest between two states of one structure; what took time is left out."""
    if isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        return max((difference(a[k], b[k]) for k in a.keys() - {"elapsed"}), default=0.0)
    if isinstance(a, (list, tuple)):
        assert isinstance(b, (list, tuple))
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert a.shape == b.shape
        return float((a.double() - b.double()).nan_to_num().abs().max()) if a.numel() else 0.0
    assert a == b
    return 0.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every variant trained by two processes, in one group."""
    out = tmp_path_factory.mktemp("pair")
    jobs = [[f"out={out / name}", *SETTING, *more] for name, more in VARIANTS.items()]
    assert group.finish(group.start(2, jobs)) == [0, 0]
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_are_one(trained: Path, tmp_path: Path, name: str) -> None:
    """Weights, averages, moments, losses that times follow, and the logged losses: to 1e-5."""
    more = FOLLOWING if FOLLOWING[0] in VARIANTS[name] else []
    assert train.train(alone(tmp_path, *more))
    assert difference(final(trained / name), final(tmp_path)) < 1e-5
    for ours, theirs in zip(losses(trained / name), losses(tmp_path), strict=True):
        assert abs(ours - theirs) < 1e-5
    log = (folder(trained / name) / "log.txt").read_text()
    assert log.count("step 20/20") == 1  # one process writes
    assert "2 processes" in log
    assert (folder(trained / name) / "samples" / "step-00000020.png").stat().st_size > 0


@pytest.mark.parametrize("parts", [2, 16])
def test_a_batch_in_parts_gives_the_same_weights(tmp_path: Path, parts: int) -> None:
    train.train(alone(tmp_path / "whole"))
    train.train(alone(tmp_path / "parts", f"train.accumulate={parts}"))
    assert difference(final(tmp_path / "whole"), final(tmp_path / "parts")) < 1e-5


def test_another_seed_is_far_from_it(tmp_path: Path) -> None:
    """So that the tolerance of 1e-5 says something."""
    train.train(alone(tmp_path / "a"))
    train.train(alone(tmp_path / "b", "seed=1"))
    assert difference(final(tmp_path / "a"), final(tmp_path / "b")) > 1e-2


def test_one_process_goes_on_from_a_sharded_run(trained: Path, tmp_path: Path) -> None:
    """Five steps more from FSDP's checkpoint and from DDP's: the same to 1e-5."""
    ends = []
    for name in ("fsdp", "ddp"):
        trainer = train.Trainer(alone(tmp_path / name, "train.steps=25"))
        path = checkpoint.newest(folder(trained / name) / "checkpoints", print)
        assert path is not None
        trainer.restore(path)
        assert [result.step for result in trainer.steps()] == [21, 22, 23, 24, 25]
        ends.append(checkpoint.load_state(trainer.save()))
    assert difference(*ends) < 1e-5


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_and_killed_the_pair_ends_bit_equal(
    trained: Path, tmp_path: Path, parallel: str
) -> None:
    """SIGTERM to process 1 stops both after one step; SIGKILL to one; then on to the end."""
    job = [[f"out={tmp_path}", *SETTING, f"train.parallel={parallel}"]]
    members = group.start(2, job, delay=0.1)
    group.wait_for(folder(tmp_path) / "metrics.jsonl", members)
    group.send(members[1], signal.SIGTERM)
    assert group.finish(members) == [0, 0]
    log = (folder(tmp_path) / "log.txt").read_text()
    assert "stopped on request at step" in log
    step = final(tmp_path)["step"]
    assert 5 <= step < 20
    members = group.start(2, job, delay=0.1)
    group.wait_for(folder(tmp_path) / "checkpoints" / "step-00000015", members)
    group.send(members[0], signal.SIGKILL)
    assert set(group.finish(members)) != {0}
    assert group.finish(group.start(2, job)) == [0, 0]
    assert difference(final(tmp_path), final(trained / parallel)) == 0


def cut_short(source: Path, out: Path) -> list[str]:
    """A copy of a run without its last checkpoint, and the overrides that make it go on."""
    shutil.copytree(source, out)
    shutil.rmtree(folder(out) / "checkpoints" / "step-00000020")
    return [f"out={out}", *SETTING]


def test_any_company_goes_on_from_any_checkpoint(trained: Path, tmp_path: Path) -> None:
    """FSDP of two to DDP and to FSDP of three, DDP to FSDP: as if nothing had changed, to 1e-5.

    With three processes the shares are uneven, and some empty.
    """
    to_ddp = [*cut_short(trained / "fsdp", tmp_path / "ddp"), "train.parallel=ddp"]
    to_fsdp = [*cut_short(trained / "ddp", tmp_path / "fsdp"), "train.parallel=fsdp"]
    to_three = [*cut_short(trained / "fsdp", tmp_path / "three"), "train.parallel=fsdp"]
    assert group.finish(group.start(2, [to_ddp, to_fsdp])) == [0, 0]
    assert group.finish(group.start(3, [to_three])) == [0, 0, 0]
    for name, source, shards in (("ddp", "fsdp", 0), ("fsdp", "ddp", 2), ("three", "fsdp", 3)):
        assert "resumed from" in (folder(tmp_path / name) / "log.txt").read_text()
        assert difference(final(tmp_path / name), final(trained / source)) < 1e-5
        path = folder(tmp_path / name) / "checkpoints" / "step-00000020"
        assert len(list((path / checkpoint.SHARDS).glob("*"))) == shards


def test_each_process_writes_its_share(trained: Path) -> None:
    """Half of each large tensor to each file, none of them in state.pt, no pickle but that."""
    path = folder(trained / "fsdp") / "checkpoints" / "step-00000020"
    state = torch.load(path / checkpoint.STATE, weights_only=True)
    moments = [m for of_one in state["optimizer"]["state"].values() for m in of_one.values()]
    sections = [state["network"], state["ema"], state["power_emas"]["0.1"]]
    tensors = [value for section in sections for value in section.values()]
    assert all(m.is_meta for m in tensors)
    assert all(m.is_meta == (m.ndim > 0) for m in moments)
    names = [name for name in checkpoint.files(path) if name.startswith(checkpoint.SHARDS)]
    assert len(names) == 2
    for name in names:
        held = load_file(path / name)
        assert len(held) == len(tensors) + 2 * len(moments) // 3
        assert all(len(held[f"ema/{k}"]) == len(v) / 2 for k, v in state["ema"].items())


def test_a_large_share_goes_to_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None larger than what the writer may hold twice and one tensor; all is read back."""
    monkeypatch.setattr(sharded, "FILE_BYTES", 1000)
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        dealt = {
            str(i): distribute_tensor(torch.full((10 * i, 3), float(i)), mesh, [Shard(0)])
            for i in range(1, 9)
        }
        tree, taken = sharded.split({"moments": [dealt, {"step": 7}]})
        sharded.write(tmp_path, taken)
    finally:
        torch.distributed.destroy_process_group()
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in sharded.own(tmp_path, 0)]
    assert len(sizes) == 4
    assert max(sizes) < 1000 + dealt["8"].nbytes
    whole = sharded.read(tmp_path, tree, lambda t: torch.zeros_like(t, device="cpu"))
    read, rest = whole["moments"]
    assert rest == {"step": 7}
    assert all(torch.equal(read[k], v.to_local()) for k, v in dealt.items())


def sign(path: Path) -> None:
    """Gives a checkpoint the manifest of what it now holds."""
    held = {name: checkpoint._fingerprint(path / name) for name in checkpoint.files(path)}
    (path / checkpoint.MANIFEST).write_text(json.dumps(held))


FORGED = {
    "removed": lambda a, b: a.unlink(),
    "empty": lambda a, b: a.write_bytes(b""),
    "cut": lambda a, b: a.write_bytes(a.read_bytes()[:-100]),
    "a pickle": lambda a, b: a.write_bytes(pickle.dumps(Path())),
    "no offsets": lambda a, b: save_file(load_file(b), b),
    "the other": lambda a, b: shutil.copy(b, a),
    "one more": lambda a, b: shutil.copy(a, a.with_name("shard-3.safetensors")),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_damaged_shard(trained: Path, tmp_path: Path, name: str) -> None:
    """The checkpoint before serves; with a manifest that was made to fit it is one error."""
    shutil.copytree(trained / "fsdp", tmp_path / "run")
    good, bad = checkpoint.steps(folder(tmp_path / "run") / "checkpoints")[-2:]
    FORGED[name](*sorted((bad / checkpoint.SHARDS).iterdir()))
    said: list[str] = []
    assert checkpoint.newest(bad.parent, said.append) == good
    (line,) = said
    assert "shards/shard-" in line
    assert "is not what was written; falling back" in line
    sign(bad)
    checkpoint.check(bad)
    with pytest.raises(CheckpointError, match="damaged|whole of") as error:
        checkpoint.load_state(bad)
    assert "\n" not in str(error.value)
    assert str(bad) in str(error.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_under_one_process(tmp_path: Path, rank: int) -> None:
    """Both end, one tells the system's reason, and no half is left."""
    job = [f"out={tmp_path}", *SETTING, "train.parallel=fsdp", "train.checkpoint_every_steps=20"]
    members = group.start(2, [job], limits={rank: 8192}, told=tmp_path)
    for process in members:
        process.join(60)
    assert [process.exitcode for process in members] == [2, 2]
    (line,) = [text for r in (0, 1) if (text := (tmp_path / f"{r}.txt").read_text())]
    assert "step-00000020 cannot be written: File too large" in line
    assert "\n" not in line
    assert not list((folder(tmp_path) / "checkpoints").iterdir())


def test_what_is_sharded_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a list, the inner before the outer, then the root; none twice, none empty."""
    inner = torch.nn.Sequential(torch.nn.Linear(2, 2))
    outer = torch.nn.Module()
    outer.blocks = torch.nn.ModuleList([inner, torch.nn.SiLU()])
    net = torch.nn.Module()
    net.lists = torch.nn.ModuleList([torch.nn.ModuleList([outer, inner]), torch.nn.Linear(3, 3)])
    found: list[torch.nn.Module] = []
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda *_: None)
    monkeypatch.setattr("torch.distributed.fsdp.fully_shard", lambda m, **_: found.append(m))
    distributed.share_out(net, torch.device("cpu"))
    assert [id(m) for m in found] == [id(m) for m in (inner, outer, net.lists[1], net)]


SLOW = """
import datetime, time
import torch
import torch.distributed as dist
from gendiff import distributed

with distributed.joined(torch.device("cpu")) as world:
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=2))
    start = time.monotonic()
    waited = distributed.one_before_the_others(
        lambda: [time.sleep(0 if world.rank else 4), time.monotonic() - start][1]
    )
    print(waited > 3)
"""


def test_a_long_preparation_is_waited_for_beyond_the_timeout_of_collectives() -> None:
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(group.free_port())}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW],
            env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    assert [process.communicate(timeout=90)[0].strip() for process in pair] == ["True", "True"]


def test_the_batch_must_be_dealt_out_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = alone(tmp_path, "train.accumulate=2", "train.batch_size=16")
    monkeypatch.setattr(distributed, "present", lambda: World(0, 3))
    with pytest.raises(
        ConfigError, match="16 cannot be dealt out to 3 processes .* multiple of 6"
    ):
        train.Trainer(run)


def test_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_environment() == World()
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert from_environment() == World(3, 4, 1)
    assert parse_shard("2/8") == World(2, 8)
    for wrong in ("3/3", "1", "a/b", "-1/3", "1/0"):
        with pytest.raises(ConfigError, match="The shares of three are 0/3, 1/3, 2/3"):
            parse_shard(wrong)
    for rank in ("4", "x", "-1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigError, match="Let torchrun set them"):
            from_environment()
    assert sorted(b for r in range(3) for b in range(10) if World(r, 3).owns(b)) == [*range(10)]
