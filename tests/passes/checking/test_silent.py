"""Faults and results that outputs do not show: silent channels, sizes that depend on data, and
results that are no arrays."""

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.errors import VerificationError
from morphgraph.passes.rewrite.resize import resize
from morphgraph.plans import make_plan
from morphgraph.testing import model_from_text, prove, random_plan
from morphgraph.testing.prove import wrong_slices

CONV = """a = Conv(x, w1)  s = Sigmoid(a)  b = Conv(s, w2)"""
WEIGHTS = "float[1,3,4,4] x, float[6,3,1,1] w1, float[5,6,1,1] w2"


def graph_of(tail: str, outputs: str) -> mg.ChannelGraph:
    head = f"net ({WEIGHTS}, float[2,5,1,1] w3) => ({outputs})"
    return mg.lift(model_from_text(f"{head} {{ {CONV} {tail} }}"))


# -- channels that are silent on the inputs of the check -----------------------------------------

SILENT = [
    "r = Relu(b)  y = Conv(r, w3)",
    "r = Clip(b, low, high)  y = Conv(r, w3)",
    "t = Sub(b, low)  n = Neg(t)  q = Neg(n)  r = Relu(q)  y = Conv(r, w3)",
    "o = Exp(b)  r = Floor(o)  y = Conv(r, w3)",
]


@pytest.mark.parametrize("tail", SILENT)
def test_a_wrong_kernel_in_front_of_a_silent_channel_is_rejected(tail: str) -> None:
    """Of channels that are never positive, any kernel gives the same outputs behind a ReLU."""
    constants = "<float low = {0}, float high = {6}>"
    text = f"net ({WEIGHTS}, float[2,5,1,1] w3) => (float[1,2,4,4] y) {constants}"
    model = model_from_text(f"{text} {{ {CONV} {tail} }}")
    kernel = model.graph.initializers["w2"]
    assert kernel.const_value is not None
    array = kernel.const_value.numpy().copy()
    array[:2] = -np.abs(array[:2]) - 0.5
    kernel.const_value = ir.Tensor(array, name="w2")
    graph = mg.lift(model)
    keep = {next(g.index for g in graph.groups if g.width == 5): np.array([0, 2, 4])}
    plan = make_plan(graph, keep, {}, [mg.cost(graph, "flops")])
    small = resize(graph, keep)
    wrong = small.clone()
    wrong.graph.initializers["w2"].const_value = ir.Tensor(array[[1, 2, 4]], name="w2")
    assert mg.verify(graph, plan, small).ok
    report = mg.verify(graph, plan, wrong)
    assert report.worst.relative <= report.tolerance
    assert not report.ok
    assert report.values is not None
    with pytest.raises(VerificationError, match=r"value '.*', computed from the same operands"):
        report.require()


# -- outputs whose sizes depend on data ----------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*cannot be known")
@pytest.mark.parametrize(
    "tail",
    [
        "c = Conv(b, w3)  q = Relu(c)  z = NonZero(q)",
        "c = Conv(b, w3)  q = Relu(c)  k = Cast<to=9>(q)  f = Flatten<axis=0>(k) "
        "g = Squeeze(f)  z = Compress(c, g)",
        "c = Conv(b, w3)  q = Round(c)  z = Unique<sorted=1>(q)",
        "c = Conv(b, w3)  q = Relu(c)  p = NonZero(q)  z = Shape(p)",
    ],
    ids=["nonzero", "compress", "unique", "count"],
)
def test_outputs_whose_sizes_depend_on_data(tail: str) -> None:
    kinds = {"Compress": "float[n] z", "Unique": "float[n] z", "Shape": "int64[2] z"}
    output = next((o for op, o in kinds.items() if op in tail), "int64[4,n] z")
    graph = graph_of(tail, output)
    for seed in range(3):
        plan = random_plan(graph, seed)
        keep = plan.keep_channels(graph)
        small = resize(graph, keep)
        assert mg.verify(graph, plan, small).ok
        planted = list(wrong_slices(graph, keep, small))
        assert len(planted) > 4
        for fault, broken in planted:
            assert not mg.verify(graph, plan, broken).ok, fault


# -- results that are no arrays ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tail", "outputs"),
    [
        ("c = Conv(b, w3)  z = SequenceConstruct(c, c)", "seq(float[1,2,4,4]) z"),
        ("c = Conv(b, w3)  z = SplitToSequence<axis=2>(c)", "seq(float[1,2,1,4]) z"),
        ("c = Conv(b, w3)  z = Optional(c)", "optional(float[1,2,4,4]) z"),
        ("y = Conv(b, w3)  k = ArgMax<axis=1>(y)  z = Cast<to=8>(k)", "string[1,1,4,4] z"),
    ],
    ids=["sequence", "parts", "optional", "text"],
)
def test_outputs_that_are_no_arrays_of_numbers(tail: str, outputs: str) -> None:
    graph = graph_of(tail, outputs)
    prove(graph, seeds=(0, 1))
