"""Several processes that train as one: torch's DDP and FSDP2, started by ``torchrun``.

What is random is named by a sample's position in the step's whole batch, so processes need to
talk of three things only: gradients (torch's part), whether to stop, and what is to be logged.

- DDP (``train.parallel=ddp``): every process holds the whole network and averages the gradients.
- FSDP2 (``train.parallel=fsdp``, ``torch.distributed.fsdp.fully_shard``): every process holds a
  share of each parameter, of its gradient, of AdamW's moments and of the averages; Zhao et al.,
  2023, https://arxiv.org/abs/2304.11277. Each writes its share of a checkpoint
  (:mod:`gendiff.sharded`).

Any number of processes, of either kind, can go on from any checkpoint.

In a process that has joined no group, all of this is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gendiff.errors import GendiffError, OtherProcessError
from gendiff.world import ALONE, World, from_environment

T = TypeVar("T")
_PATIENCE = timedelta(days=7)


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


def together(action: Callable[[], T]) -> T:
    """All processes act and wait for each other; each gets what its own action returns.

    Raises:
        GendiffError: What the action raised in this process, if it is the first where it failed;
            in the others an :class:`OtherProcessError`. So a fault is told once and ends all.
    """
    world = present()
    if world.size == 1:
        return action()
    error, result = None, None
    try:
        result = action()
    except GendiffError as problem:
        error = problem
    failed = gather(torch.tensor(error is not None)).nonzero()
    if len(failed):
        first = int(failed[0])
        if error is not None and world.rank == first:
            raise error
        raise OtherProcessError(f"process {first} failed; see its message")
    return cast(T, result)


def by_first(action: Callable[[], T]) -> T:
    """Process 0 acts, the others wait; all get what it returns, which must be plain.

    Raises:
        GendiffError: As :func:`together`.
    """
    world = present()
    answer: list[Any] = [together(lambda: action() if world.first else None)]
    if world.size > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def one_before_the_others(action: Callable[[], T]) -> T:
    """Acts on each machine once alone, then elsewhere: who comes later finds what is cached."""
    world = present()
    if world.size == 1:
        return action()
    # A group of its own: preparing a large set takes longer than a collective may.
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    result = action() if world.local_rank == 0 else None
    dist.barrier(patient)
    dist.destroy_process_group(patient)
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


def sharded(value: Any) -> bool:
    """Whether it is a tensor of which each process holds a share."""
    return hasattr(value, "full_tensor")


def _deal(value: Any, like: Any) -> Any:
    """A whole tensor's share, where ``like`` is sharded; anything else as it is. No talk."""
    if not sharded(like) or sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    share = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return share.clone()  # else a view keeps the whole alive


def blank_like(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """Zeros of a tensor's whole shape and type, sharded as the parameters of a network are."""
    from torch.distributed.tensor import zeros

    like: Any = next(network.parameters())
    place = {"device_mesh": like.device_mesh, "placements": like.placements}
    return lambda tensor: zeros(tensor.shape, dtype=tensor.dtype, **place)


def state_of(network: nn.Module) -> dict[str, Any]:
    """The whole state of a network; of a sharded one in process 0 alone, on the CPU.

    It is gathered tensor by tensor.
    """
    if not any(map(sharded, network.parameters())):
        return network.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(network, options=options)


def load_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """Loads a state, whole in every process or sharded as the network is.

    Raises:
        RuntimeError: It does not fit.
    """
    own = network.state_dict()
    network.load_state_dict({name: _deal(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a state of an optimiser, whole in every process or sharded as its parameters are.

    Raises:
        ValueError: It does not fit.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {
        # What has no dimension counts steps, and every process holds it.
        i: {k: _deal(v, parameters[i]) if v.ndim else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
