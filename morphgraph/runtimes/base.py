"""What a runtime is to this program: two small classes that a user's own derive from.

A runtime builds sessions; a session runs one model, and tells what it executes. One on another
device, or in another process, overrides :meth:`Session.timed_run`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter, process_time
from typing import Any, Literal, NamedTuple

import numpy as np

from morphgraph.arrays import Arrays, Shape
from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import ModelLike

Clock = Literal["cpu", "wall"]
Layout = Literal["blocked", "plain"]

Source = ModelLike | bytes
"""What a session is built from; bytes are a serialized ONNX model."""


class Spent(NamedTuple):
    """Seconds of one run by both clocks."""

    cpu: float
    wall: float


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model as the runtime declares it; open sizes are names, -1 or ``None``."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True, slots=True)
class Operator:
    """One kernel of a model as the runtime has rewritten it.

    Attributes:
        name: what the runtime calls it.
        op_type: its type there, such as ``"FusedConv"``.
        domain: of the type; empty for ONNX's own, and where the runtime has none.
        origins: names of the model's nodes that it computes, in order (``output 'y'`` for a node
            without a name); empty for what the runtime has added, and where it cannot be told.
        layer: the one of them that it is for, or that a step on the way to its result is for; empty
            where there is none.
        layout: of a convolution or a pooling, whether its channels lie in blocks; else ``None``.
        activation: that it applies to what it makes, by the name of its operator; empty for none,
            and where the runtime does not tell.
    """

    name: str
    op_type: str
    domain: str = ""
    origins: tuple[str, ...] = ()
    layer: str = ""
    layout: Layout | None = None
    activation: str = ""


@dataclass(frozen=True, slots=True)
class Executed(Operator):
    """A kernel that ran: the sizes that it got and made, and how long it took.

    ``inputs`` are those of its tensors in order, weights included, as the runtime holds them (a
    blocked layout may have padded them). ``microseconds`` is the mean of the middle half of the
    profiled runs; a kernel in a loop counts with all its turns.
    """

    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    microseconds: float = 0.0


class Session(ABC):
    """A model that is ready to run."""

    @property
    @abstractmethod
    def inputs(self) -> Sequence[Input]:
        """What it wants to be fed."""

    @abstractmethod
    def run(self, feeds: Arrays) -> Sequence[Any]:
        """Run once; the results in the order of the model's outputs."""

    def timed_run(self, feeds: Arrays) -> Spent:
        """Run once, and take the time of it."""
        wall, cpu = perf_counter(), process_time()
        self.run(feeds)
        cpu_end, wall_end = process_time(), perf_counter()
        return Spent(cpu_end - cpu, wall_end - wall)

    def operators(self) -> Sequence[Operator]:
        """What it executes after its own optimizations, in no promised order.

        Raises:
            UnsupportedError: the runtime does not tell.
        """
        raise UnsupportedError(f"{type(self).__name__} does not tell what it executes")

    def executed(
        self,
        feeds: Arrays,  # noqa: ARG002 - of those that override it
        runs: int = 1,  # noqa: ARG002
    ) -> Sequence[Executed]:
        """The kernels of a run in the order of their execution, from the runtime's profile.

        Args:
            feeds: inputs by name.
            runs: how many are profiled, after one to warm up; times are means of the middle half.

        Raises:
            UnsupportedError: the runtime does not tell.
        """
        raise UnsupportedError(f"{type(self).__name__} has no profile of its kernels")


class Runtime(ABC):
    """Builds sessions.

    Attributes:
        name: how results call it.
        clock: whether the process's CPU time says what a run at one thread costs. It does not where
            another device or another process computes.
    """

    name: str
    clock: Clock = "cpu"

    @abstractmethod
    def session(self, model: Source, threads: int = 1, *, name: str = "model") -> Session:
        """A session with all optimizations and so many threads, which sleep when idle.

        Args:
            model: a path, a model, or a serialized one.
            threads: within an operator.
            name: how errors call the model.

        Raises:
            FileError: there is no such file.
            UnsupportedError: the runtime does not take the model; carries its words.
        """
