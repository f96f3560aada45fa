"""One training in several processes: ``torchrun -m morphgraph morph ...``.

Every process runs the whole program on its share of every batch. Gradients are averaged by
DistributedDataParallel, so that weights agree after every step; from equal weights all processes
decide alike. What is decided is taken from the first process all the same, and so is the state at
the end of every epoch: sums on a GPU may differ in their last digit from one process to another.
Only the first process writes files and messages.

In a program of one process everything here does nothing. :class:`~morphgraph.train.loop.Iteration`
and what follows from it are the same on all processes, also where a user's own ``fit`` trains.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel

from morphgraph.errors import ArgumentError, MorphError
from morphgraph.train.phases import ResumablePenalty

State = dict[str, Any]
_T = TypeVar("_T")


@contextmanager
def launched() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started, if it has: nccl on GPUs, gloo on CPUs.

    Raises:
        ArgumentError: there are more processes on this machine than GPUs.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not started or dist.is_initialized():
        yield
        return
    gpus = torch.cuda.device_count()
    if gpus:
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if place >= gpus:
            raise ArgumentError(
                f"process {place} of this machine has no GPU of its own, there are {gpus}; give "
                f"torchrun --nproc-per-node {gpus}"
            )
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
        dist.barrier()  # a process that leaves closes what others may still read from
    finally:
        dist.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and messages."""
    return rank() == 0


def own_share(count: int) -> slice:
    """This process's part of ``count`` images; parts differ by one at most.

    >>> own_share(128)
    slice(0, 128, None)
    """
    return slice(count * rank() // size(), count * (rank() + 1) // size())


def from_first(make: Callable[[], _T]) -> _T:
    """The first process's result on all processes; a ``MorphError`` is raised on all, too."""
    if size() == 1:
        return make()
    packet: list[Any] = [None, None]  # the result, or the error
    if is_first():
        try:
            packet[0] = make()
        except MorphError as error:
            packet[1] = error
    dist.broadcast_object_list(packet)
    if packet[1] is not None:
        raise packet[1]
    result: _T = packet[0]
    return result


def state_from_first(make: Callable[[], State | None], device: torch.device) -> State | None:
    """The same for plain data and tensors; the tensors are moved to ``device``."""
    if size() == 1:
        return make()

    def packed() -> bytes:
        buffer = io.BytesIO()
        torch.save(make(), buffer)
        return buffer.getvalue()

    content = io.BytesIO(from_first(packed))
    state: State | None = torch.load(content, map_location=device, weights_only=True)
    return state


def require_equal(what: str, value: str) -> None:
    """Refuse processes that were given different things.

    Raises:
        ArgumentError: on all processes; names the first that differs.
    """
    if size() == 1:
        return
    values: list[Any] = [None] * size()
    dist.all_gather_object(values, value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise ArgumentError(
                f"process {process} has other {what} than process 0; start all of them with the "
                "same arguments and the same files"
            )


def total(value: float, device: torch.device) -> float:
    """The sum of a number over all processes."""
    if size() == 1:
        return value
    summed = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return float(summed)


def variance(values: Tensor) -> Tensor:
    """The variance of all numbers that the processes hold together; a scalar.

    Parts are merged exactly (Chan, Golub, LeVeque 1979), however unequal they are. Every process
    must come here.

    >>> float(variance(torch.tensor([1.0, 3.0])))
    1.0
    """
    if size() == 1:
        return values.var(unbiased=False)
    spread, mean = torch.var_mean(values, unbiased=False)
    count = values.new_tensor(values.numel())
    parts = gathered(torch.stack([count, mean, spread]) if values.numel() else values.new_zeros(3))
    counts, means, spreads = parts.T
    centre = (counts * means).sum() / counts.sum()
    whole: Tensor = (counts * (spreads + (means - centre).square())).sum() / counts.sum()
    return whole


def shared(net: nn.Module) -> nn.Module:
    """The network, with gradients averaged over all processes; weights become the first one's."""
    if size() == 1:
        return net
    device = next(net.parameters()).device
    return DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)


@torch.no_grad()
def broadcast_state(net: nn.Module, penalty: ResumablePenalty) -> None:
    """Give all processes the first one's weights and penalty: last digits may have differed."""
    if size() == 1:
        return
    for tensor in net.state_dict().values():
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)
    device: torch.device = next(net.parameters()).device
    state = state_from_first(penalty.state_dict, device)
    assert state is not None
    penalty.load_state_dict(state)


def gathered(row: Tensor) -> Tensor:
    """A tensor of every process, ``[processes, *shape]``."""
    rows = [torch.empty_like(row) for _ in range(size())]
    dist.all_gather(rows, row)
    return torch.stack(rows)
