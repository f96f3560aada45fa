"""Operators at which channels cannot be followed: all that they touch keeps its size.

Each has its reason, which ``analyze`` prints. None of them has a PyTorch form.
"""

from morphgraph.ops.op import Description, Op, OpNode, UnsupportedFormError, op


class Barrier(Op):
    """An operator that is opaque for a ``reason``."""

    reason = ""

    @classmethod
    def describe(cls, n: OpNode) -> Description:
        raise UnsupportedFormError(f"{n.op_type} {cls.reason}")


@op(
    "Bernoulli",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
class Random(Barrier):
    reason = "draws random numbers, others for every size"
    foldable = False


@op("Compress", "NonZero", "Unique")
class SizedByData(Barrier):
    reason = "decides at run time how many positions it keeps"
    sized_by_data = True
    bounded = True


@op("NonMaxSuppression")
class NonMaxSuppression(SizedByData):
    foldable = False  # slow
    bounded = False


@op("If", "Loop", "Scan", "SequenceMap")
class WithBody(Barrier):
    reason = "has a body of its own, which is left as it is"
    sized_by_data = True


@op(
    "ConcatFromSequence",
    "Optional",
    "OptionalGetElement",
    "OptionalHasElement",
    "SequenceAt",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SplitToSequence",
)
class WithoutAxes(Barrier):
    reason = "deals with sequences or optional values, which have no axes"


@op("BlackmanWindow", "HammingWindow", "HannWindow", "MelWeightMatrix")
class Table(Barrier):
    reason = "makes numbers from numbers"


@op("ZipMap", domain="ai.onnx.ml")
class Named(Barrier):
    reason = "names every class"
