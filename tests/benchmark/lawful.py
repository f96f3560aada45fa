"""ONNX Runtime's kernels with times that follow a law: what is predicted can be checked exactly."""

import math
from collections.abc import Sequence
from dataclasses import replace

from morphgraph.arrays import Arrays
from morphgraph.device import Kernel
from morphgraph.passes.analysis.measured import kernel_of
from morphgraph.runtimes import Executed, Source, Spent
from morphgraph.runtimes.ort import OnnxRuntime, OrtSession

BLOCK = 16


def law(kernel: Kernel) -> float:
    """Microseconds: a start, arithmetic on whole blocks of channels, and what is moved.

    Convolutions outside of the blocked layout take twice the time, poolings ten times. Fused
    activations but Relu go over the results once more.
    """

    def blocks(width: int) -> int:
        return -(-width // BLOCK) * BLOCK

    moved = sum(map(math.prod, (*kernel.inputs, *kernel.outputs)))
    time = 4.0 + moved / 2e3
    if kernel.op_type.endswith("Pool") and kernel.layout == "plain":
        time *= 10.0
    if "Conv" in kernel.op_type:
        weight, result = kernel.inputs[1], kernel.outputs[0]
        inner = blocks(weight[1]) if weight[1] > 1 else 1
        macs = blocks(result[1]) * inner * math.prod(weight[2:]) * math.prod(result[2:])
        time += macs / 5e3 * (2.0 if kernel.layout == "plain" else 1.0)
        if kernel.activation not in ("", "Relu"):
            time += math.prod(result) / 1e2
    elif kernel.op_type in ("Gemm", "FusedGemm", "MatMul", "FusedMatMul"):
        time += math.prod(kernel.outputs[0]) * kernel.inputs[0][-1] / 5e3
    return time


class Lawful(OnnxRuntime):
    """Times by the law."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.name = "lawful:Lawful"

    def session(self, model: Source, threads: int = 1, *, name: str = "model") -> "LawfulSession":
        """A session that takes so long."""
        return LawfulSession(model, self.providers, threads, name)


class LawfulSession(OrtSession):
    """A model there."""

    _lawful: Sequence[Executed] | None = None

    def executed(self, feeds: Arrays, runs: int = 1) -> Sequence[Executed]:
        """ONNX Runtime's kernels, with other times; the same in every run."""
        if self._lawful is None:
            kernels = super().executed(feeds, 1)
            self._lawful = [replace(each, microseconds=law(kernel_of(each))) for each in kernels]
        return self._lawful

    def timed_run(self, feeds: Arrays) -> Spent:
        """The sum over them."""
        seconds = sum(each.microseconds for each in self.executed(feeds)) / 1e6
        return Spent(seconds, seconds)
