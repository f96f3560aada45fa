"""Operators at which channels cannot be followed: all that they touch keeps its size.

Each has its reason, which ``analyze`` prints. None of them has a PyTorch form.
"""

from morphgraph.ops.op import Description, Op, OpNode, UnsupportedFormError, op

_REASONS = {
    "draws random numbers, others for every size": (
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    ),
    "decides at run time how many positions it keeps": (
        "Compress",
        "NonMaxSuppression",
        "NonZero",
        "Unique",
    ),
    "has a body of its own, which is left as it is": ("If", "Loop", "Scan", "SequenceMap"),
    "deals with sequences or optional values, which have no axes": (
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
    ),
    "makes numbers from numbers": (
        "BlackmanWindow",
        "HammingWindow",
        "HannWindow",
        "MelWeightMatrix",
    ),
}


def _barrier(reason: str) -> type[Op]:
    def describe(n: OpNode) -> Description:
        raise UnsupportedFormError(f"{n.op_type} {reason}")

    return type("Barrier", (Op,), {"describe": staticmethod(describe), "__doc__": reason})


for _reason, _names in _REASONS.items():
    op(*_names)(_barrier(_reason))

BARRIERS = frozenset(name for names in _REASONS.values() for name in names)
