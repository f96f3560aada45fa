"""A runtime whose times are known beforehand, as a user's own class would be written."""

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from morphgraph.arrays import Arrays
from morphgraph.runtimes import Executed, Input, Operator, Runtime, Session, Source, Spent

SECONDS = {"quick": 0.001, "slow": 0.002}


class Phone(Runtime):
    """Takes so long as the model's name says; a shared load doubles every other round's times."""

    name = "phone"
    clock = "wall"
    factor = 1.0

    def session(self, model: Source, threads: int = 1, *, name: str = "model") -> "OnPhone":
        """A session that knows how long it takes."""
        assert not isinstance(model, bytes)
        seconds = SECONDS[name.split(" ")[0].removesuffix(".onnx")] * self.factor / threads
        return OnPhone(seconds)


class FastPhone(Phone):
    """Four times as fast."""

    name = "fast phone"
    factor = 0.25


class OnPhone(Session):
    """A model there."""

    def __init__(self, seconds: float) -> None:
        """Start with no load."""
        self._seconds, self._turn = seconds, count()

    @property
    def inputs(self) -> Sequence[Input]:
        """One of them."""
        return [Input("x", np.dtype(np.float32), (-1, 4))]

    def run(self, feeds: Arrays) -> Sequence[Any]:
        """What it is fed."""
        return [feeds["x"]]

    def timed_run(self, feeds: Arrays) -> Spent:
        """The time that is known."""
        self.run(feeds)
        return Spent(0.0, self._seconds * (1 + next(self._turn) % 2))

    def operators(self) -> Sequence[Operator]:
        """Three convolutions."""
        return [
            Operator("a", "Conv", layer="conv1", layout="blocked"),
            Operator("b", "Conv", layer="conv2", layout="plain"),
            Operator("c", "Conv", layout="plain"),
            Operator("d", "Relu"),
        ]

    def executed(self, feeds: Arrays, runs: int = 1) -> Sequence[Executed]:
        """One kernel."""
        assert feeds["x"].shape[1] == 4
        assert runs >= 1
        return [
            Executed("a", "Conv", origins=("n1",), layer="n1", microseconds=1e6 * self._seconds)
        ]


class Silent(Session):
    """A session that tells nothing."""

    inputs = OnPhone.inputs
    run = OnPhone.run


class Mute(Runtime):
    """A runtime that tells nothing."""

    name = "mute"

    def session(self, model: Source, threads: int = 1, *, name: str = "model") -> Silent:
        """A silent one."""
        return Silent()
