"""Several processes that train as one: torch's DDP and FSDP2, started by ``torchrun``.

What is random is named by a sample's position in the step's whole batch, so processes need to
talk of three things only: gradients (torch's part), whether to stop, and what is to be logged.

- DDP (``train.parallel=ddp``): every process holds the whole network and averages the gradients.
- FSDP2 (``train.parallel=fsdp``, ``torch.distributed.fsdp.fully_shard``): every process holds a
  share of each parameter, of its gradient, of AdamW's moments and of the averages; Zhao et al.,
  2023, https://arxiv.org/abs/2304.11277. Checkpoints hold the whole, so that any number of
  processes can go on from them.

In a process that has joined no group, all of this is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gendiff.errors import GendiffError, OtherProcessError
from gendiff.world import ALONE, World, from_environment

T = TypeVar("T")


@contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Inside, the processes that torchrun started form a group: gloo on CPUs, NCCL on GPUs."""
    world = from_environment()
    if world.size == 1:
        yield world
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield world
    # Not after an error, where others may never arrive. Gloo aborts a process whose peer has left
    # while it still listens to it, so none leaves before all are here.
    dist.barrier()
    dist.destroy_process_group()


def present() -> World:
    """This process in its group; alone where there is none."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), from_environment().local_rank)
    return ALONE


def agree(flag: bool, device: torch.device) -> bool:
    """Whether any process says so."""
    if present().size == 1:
        return flag
    votes = torch.tensor(int(flag), dtype=torch.int32, device=device)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


def gather(value: Tensor) -> Tensor:
    """The tensors of all processes, (size, *), on the CPU; they must be of one shape."""
    value = value.detach().cpu()
    if present().size == 1:
        return value[None]
    parts = [torch.empty_like(value) for _ in range(present().size)]
    dist.all_gather(parts, value.contiguous())
    return torch.stack(parts)


def by_first(action: Callable[[], T]) -> T:
    """Process 0 acts, the others wait; all get what it returns, which must be plain.

    Raises:
        GendiffError: What the action raised; in the others an :class:`OtherProcessError`.
    """
    world = present()
    if world.size == 1:
        return action()
    answer: list[Any] = [None, False]
    error = None
    if world.first:
        try:
            answer[0] = action()
        except GendiffError as problem:
            error, answer[1] = problem, True
    dist.broadcast_object_list(answer)
    if answer[1]:
        raise error or OtherProcessError("process 0 failed; see its message")
    return answer[0]


def one_before_the_others(action: Callable[[], T]) -> T:
    """Acts on each machine once alone, then elsewhere: who comes later finds what is cached."""
    world = present()
    if world.size == 1:
        return action()
    result = action() if world.local_rank == 0 else None
    dist.barrier()
    return action() if result is None else result


def collect(value: T) -> list[T]:
    """The values of all processes in process 0, by rank; an empty list in the others."""
    world = present()
    if world.size == 1:
        return [value]
    found: list[Any] = [None] * world.size
    dist.gather_object(value, found if world.first else None)
    return found if world.first else []


def share_out(network: nn.Module, device: torch.device) -> nn.Module:
    """Shards a network in place by FSDP2: each element of a ModuleList, then what is left."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (present().size,))
    for parameter in network.parameters():  # fully_shard refuses channels-last weights
        parameter.data = parameter.data.contiguous()
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList)]
    # What is inside comes before what holds it, as fully_shard asks.
    for block in dict.fromkeys(child for many in reversed(lists) for child in many):
        called = not isinstance(block, (nn.ModuleList, nn.ModuleDict))
        if called and next(block.parameters(), None) is not None:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The root too is resharded after a forward pass that no backward pass follows.
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    return network


def average_gradients(network: nn.Module) -> nn.Module:
    """The network whose backward pass averages the gradients over the processes (DDP)."""
    return DistributedDataParallel(network)


def without_talk(network: nn.Module) -> AbstractContextManager[None]:
    """Inside, a DDP network keeps its gradients to itself: for all but a step's last part."""
    if isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return nullcontext()


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor, as a view; any other tensor as it is."""
    share: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered in every process; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def _sharded(network: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in network.parameters())


def _full() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True)


def state_of(network: nn.Module) -> dict[str, Any]:
    """The whole state of a network; of a sharded one in process 0 alone, on the CPU."""
    if not _sharded(network):
        return network.state_dict()
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return get_model_state_dict(network, options=_full())


def load_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads what :func:`state_of` gave, which every process must have.

    Raises:
        RuntimeError: It does not fit.
    """
    if not _sharded(network):
        network.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(network, dict(state), options=_full())


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state of an optimiser as ``optimizer.state_dict()`` in one process would be."""
    if not _sharded(network):
        return optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    state: Any = get_optimizer_state_dict(network, optimizer, options=_full())
    if not present().first:
        return {}
    number = _numbers(network)
    moments = {number[name]: value for name, value in state["state"].items()}
    groups = [g | {"params": [number[n] for n in g["params"]]} for g in state["param_groups"]]
    return {"state": moments, "param_groups": groups}


def load_optimizer(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Loads what :func:`optimizer_state` gave, which every process must have.

    Raises:
        ValueError: It does not fit.
    """
    if not _sharded(network):
        optimizer.load_state_dict(dict(state))
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    name = {i: n for n, i in _numbers(network).items()}
    moments = {name[i]: value for i, value in state["state"].items()}
    groups = [g | {"params": [name[i] for i in g["params"]]} for g in state["param_groups"]]
    full: dict[str, Any] = {"state": moments, "param_groups": groups}
    set_optimizer_state_dict(network, optimizer, full, options=_full())


def _numbers(network: nn.Module) -> dict[str, int]:
    """An optimiser numbers the parameters in the network's order."""
    return {name: i for i, (name, _) in enumerate(network.named_parameters())}
