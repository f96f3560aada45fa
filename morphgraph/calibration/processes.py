"""A calibration that several processes share: ``torchrun -m morphgraph shrink ...``.

Each runs the network over its share of the inputs; what they have seen is summed, so that all know
the same, and decide alike. In a program of one process there is nobody to ask. Torch is imported
only where its launcher has started the program.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from morphgraph.arrays import FloatArray

_Item = TypeVar("_Item")


class Processes:
    """One process, which has all inputs.

    Attributes:
        rank: which of the processes this is.
        count: how many there are.
    """

    rank = 0
    count = 1

    def total(self, array: FloatArray) -> FloatArray:
        """The sum of an array over all processes, the same on all."""
        return array

    def gather(self, item: _Item) -> list[_Item]:
        """What each process has, in their order, on all."""
        return [item]

    def share(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The part of something that this process has to do.

        >>> list(Processes().share("abc"))
        ['a', 'b', 'c']
        """
        return (item for place, item in enumerate(items) if place % self.count == self.rank)

    def place(self, number: int) -> int:
        """Where one of the shared items stands among all."""
        return number * self.count + self.rank


ALONE = Processes()


class Launched(Processes):
    """The processes of a launcher, which torch.distributed joins."""

    def __init__(self) -> None:
        from torch import distributed

        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def total(self, array: FloatArray) -> FloatArray:
        """The sum of an array over all processes, the same on all."""
        import torch
        from torch import distributed

        summed = torch.from_numpy(np.array(array, dtype=np.float64))
        distributed.all_reduce(summed)
        found: FloatArray = summed.numpy()
        return found

    def gather(self, item: _Item) -> list[_Item]:
        """What each process has, in their order, on all."""
        from torch import distributed

        found: list[_Item | None] = [None] * self.count
        distributed.all_gather_object(found, item)
        return [each for each in found if each is not None]


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that ``torchrun`` has started, if it has; else this one.

    >>> with joined() as processes:
    ...     processes.count
    1
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield ALONE
        return
    from torch import distributed

    if distributed.is_initialized():
        yield Launched()
        return
    distributed.init_process_group("gloo")
    try:
        yield Launched()
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
