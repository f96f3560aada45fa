"""Mixtures of experts: the original with the router's logits of removed experts at minus infinity.

Units inside experts are removed by hand in the original: their weights are zero there.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.arrays import Arrays
from morphgraph.errors import BudgetError, PlanError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import scores_of
from morphgraph.shrinker import Shrinker

TOKENS, HIDDEN, EXPERTS, INNER, TAKEN = 9, 8, 5, 6, 2


def weights(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    generator = np.random.default_rng(seed)
    return {k: generator.normal(size=s).astype(np.float32) for k, s in shapes.items()}


COMMON = {"inw": (3, HIDDEN), "gate": (HIDDEN, EXPERTS), "head": (HIDDEN, 4)}
STACKS = {"w1": (EXPERTS, INNER, HIDDEN), "w2": (EXPERTS, HIDDEN, INNER)}


def model(nodes: list[onnx.NodeProto], arrays: Arrays, *outputs: str) -> onnx.ModelProto:
    """A stem and a router in front, a sum and a head behind; ``m`` is what the mixture adds."""
    node = helper.make_node
    every = [
        node("MatMul", ["x", "inw"], ["h"], name="stem"),
        node("MatMul", ["h", "gate"], ["logits"], name="gate"),
        node("Add", ["logits", "mask"], ["router"], name="masked"),
        *nodes,
        node("Add", ["h", "m"], ["s"], name="sum"),
        node("MatMul", ["s", "head"], ["y"], name="head"),
    ]
    arrays = {**arrays, "mask": np.zeros(EXPERTS, np.float32)}
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (TOKENS, 3))
    kinds = [TensorProto.FLOAT, TensorProto.INT64]
    made = [
        helper.make_tensor_value_info(name, kinds[name == "taken"], None)
        for name in ("y", *outputs)
    ]
    held = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(every, "mixture", [x], made, held)
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def gathered(form: str) -> onnx.ModelProto:
    """Stacks of weights that are gathered by the router's choice, as transformers exports them."""
    node = helper.make_node
    arrays = weights(0, **COMMON, **STACKS)
    constants = {
        "k": np.array([TAKEN]),
        "flat": np.array([TOKENS * TAKEN]),
        "rows": np.array([TOKENS * TAKEN, 1]),
        "column": np.array([TOKENS * TAKEN, 1]),
        "apart": np.array([TOKENS, TAKEN, HIDDEN]),
        "last": np.array([-1]),
        "one": np.array([1]),
        "twice": np.array([TOKENS, TAKEN, HIDDEN]),
        "upright": np.array([TOKENS * TAKEN, HIDDEN, 1]),
    }
    arrays |= {name: array.astype(np.int64) for name, array in constants.items()}
    if form == "softmax of those taken":
        ranked = "router"
        scores = [node("Softmax", ["best"], ["shares"], axis=-1)]
    elif form == "scores read by number":  # the ranking has a bias that the shares do not have
        ranked = "biased"
        arrays |= weights(7, bias=(EXPERTS,))
        scores = [
            node("Softmax", ["router"], ["p"], axis=-1),
            node("GatherElements", ["p", "taken"], ["shares"], axis=1),
        ]
    else:
        ranked = "p"
        scores = [
            node("ReduceSum", ["best", "one"], ["total"]),
            node("Div", ["best", "total"], ["shares"]),
        ]
    down = [node("Squeeze", ["d", "last"], ["flatd"])]
    up = [node("MatMul", ["k1", "each"], ["u"], name="up")]
    if form == "biases":  # of every expert, as gpt-oss has them
        arrays |= weights(8, b1=(EXPERTS, INNER), b2=(EXPERTS, HIDDEN))
        down = [
            node("Squeeze", ["d", "last"], ["plain"]),
            node("Gather", ["b2", "small"], ["second"], axis=0),
            node("Add", ["plain", "second"], ["flatd"]),
        ]
        up = [
            node("MatMul", ["k1", "each"], ["product"], name="up"),
            node("Gather", ["b1", "small"], ["short"], axis=0),
            node("Unsqueeze", ["short", "last"], ["first"]),
            node("Add", ["product", "first"], ["u"]),
        ]
    first = [node("Softmax", ["router"], ["p"], axis=-1)] if ranked == "p" else []
    first += [node("Add", ["router", "bias"], ["biased"])] if ranked == "biased" else []
    if form == "tuples":
        read = [
            node("Reshape", ["taken", "rows"], ["number"]),
            node("GatherND", ["w1", "number"], ["k1"]),
            node("GatherND", ["w2", "number"], ["k2"]),
        ]
    else:
        read = [
            node("Reshape", ["taken", "flat"], ["number"]),
            node("Cast", ["number"], ["small"], to=TensorProto.INT32),
            node("Gather", ["w1", "small"], ["k1"], axis=0),
            node("Gather", ["w2", "small"], ["k2"], axis=0),
        ]
    nodes = [
        *first,
        node("TopK", [ranked, "k"], ["best", "taken"], axis=-1, name="choose"),
        *scores,
        *read,
        node("Unsqueeze", ["h", "one"], ["h1"]),
        node("Expand", ["h1", "twice"], ["h2"]),
        node("Reshape", ["h2", "upright"], ["each"]),
        *up,
        node("Relu", ["u"], ["r"]),
        node("MatMul", ["k2", "r"], ["d"], name="down"),
        *down,
        node("Reshape", ["shares", "column"], ["share"]),
        node("Mul", ["flatd", "share"], ["scaled"]),
        node("Reshape", ["scaled", "apart"], ["parts"]),
        node("ReduceSum", ["parts", "one"], ["m"], keepdims=0),
    ]
    return model(nodes, arrays)


def fused(form: str, biased: bool = True) -> onnx.ModelProto:
    """ONNX Runtime's own node; ``biased``: with a bias behind the units."""
    rows = 2 * INNER if form == "swiglu" else INNER
    shapes = STACKS | {
        "w1": (EXPERTS, rows, HIDDEN),
        "b1": (EXPERTS, rows),
        "b2": (EXPERTS, HIDDEN),
    }
    arrays = weights(1, **COMMON, **shapes)
    attributes: dict[str, Any] = {"k": TAKEN, "activation_type": form}
    attributes |= {"swiglu_fusion": 1} if form == "swiglu" else {"normalize_routing_weights": 1}
    operands = ["h", "router", "w1", "b1", "w2", *(["b2"] if biased else [])]
    if not biased:
        del arrays["b2"]
    mixture = helper.make_node(
        "MoE", operands, ["m"], name="moe", domain="com.microsoft", **attributes
    )
    return model([mixture], arrays)


def packed(bits: int) -> onnx.ModelProto:
    """ONNX Runtime's own node with weights in few bits."""
    generator, wide, ratio = np.random.default_rng(2), 32, 8 // bits
    arrays = weights(1, inw=(3, wide), gate=(wide, EXPERTS), head=(wide, 4))
    for name in ("w1", "w2"):
        stack = generator.integers(0, 256, (EXPERTS, wide, wide // ratio)).astype(np.uint8)
        scales = generator.uniform(0.01, 0.02, (EXPERTS, wide)) / 16 ** (bits > 4)
        arrays |= {name: stack, f"{name}_scales": scales.astype(np.float32)}
    operands = ["h", "router", "w1", "w1_scales", "", "w2", "w2_scales", ""]
    mixture = helper.make_node(
        "QMoE",
        operands,
        ["m"],
        name="moe",
        domain="com.microsoft",
        k=TAKEN,
        activation_type="silu",
        normalize_routing_weights=1,
        expert_weight_bits=bits,
    )
    return model([mixture], arrays)


FORMS = {
    "softmax first": lambda: gathered("softmax first"),
    "softmax of those taken": lambda: gathered("softmax of those taken"),
    "scores read by number": lambda: gathered("scores read by number"),
    "tuples": lambda: gathered("tuples"),
    "biases": lambda: gathered("biases"),
    "relu": lambda: fused("relu"),
    "silu": lambda: fused("silu"),
    "swiglu": lambda: fused("swiglu"),
}
PACKED = {"4 bits": lambda: packed(4), "8 bits": lambda: packed(8)}


def outputs(proto: Any, x: np.ndarray) -> np.ndarray:
    raw = proto if isinstance(proto, bytes) else proto.SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    return np.asarray(y)


def changed(proto: onnx.ModelProto, **arrays: np.ndarray) -> onnx.ModelProto:
    """The same with other weights."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in arrays:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return copy


def arrays_of(proto: onnx.ModelProto) -> Arrays:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def group_on(graph: ChannelGraph, value: str, axis: int) -> Any:
    (index,) = graph.groups_on(graph.dim(value, axis))
    return graph.groups[index]


@pytest.mark.parametrize("form", FORMS | PACKED)
def test_experts_go_as_if_the_router_never_took_them(form: str) -> None:
    proto = (FORMS | PACKED)[form]()
    graph = mg.lift(proto)
    experts = group_on(graph, "w1", 0)
    assert experts.resizable
    assert {(m.value, m.axis) for m in experts.members} >= {("gate", 1), ("w1", 0), ("w2", 0)}
    x = np.random.default_rng(3).normal(size=(TOKENS, 3)).astype(np.float32)
    made = mg.plan(graph, {}, widths={experts.id: 3})
    (kept,) = made.keep_channels(graph).values()
    small = mg.apply(graph, made)  # and checked against the masked original
    never = np.full(EXPERTS, -np.inf, np.float32)
    never[kept] = 0
    expected = outputs(changed(proto, mask=never), x)
    found = outputs(_saved(small), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(outputs(proto, x) - expected).max() > 1e-2 * np.abs(expected).max()
    sizes = {name: tuple(value.shape or ()) for name, value in small.graph.initializers.items()}
    assert [sizes["w1"][0], sizes["w2"][0], sizes["gate"][1]] == [3, 3, 3]


def _saved(small: Any) -> bytes:
    import onnx_ir as ir

    raw: bytes = ir.to_proto(small).SerializeToString()
    return raw


@pytest.mark.parametrize("form", FORMS)
def test_units_inside_all_experts_go_as_if_their_weights_were_zero(form: str) -> None:
    proto = FORMS[form]()
    graph, arrays = mg.lift(proto), arrays_of(proto)
    inner = group_on(graph, "w2", 2)
    assert inner.width == INNER
    x = np.random.default_rng(4).normal(size=(TOKENS, 3)).astype(np.float32)
    made = mg.plan(graph, {}, widths={inner.id: 4})
    (kept,) = made.keep_channels(graph).values()
    small = mg.apply(graph, made)
    gone = np.setdiff1d(np.arange(INNER), kept)
    silent = arrays["w2"].copy()
    silent[:, :, gone] = 0
    expected = outputs(changed(proto, w2=silent), x)
    found = outputs(_saved(small), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(outputs(proto, x) - expected).max() > 1e-2 * np.abs(expected).max()


WHOLE = {
    **FORMS,
    "no bias behind": lambda: fused("silu", biased=False),
    "swiglu, no bias behind": lambda: fused("swiglu", biased=False),
    **PACKED,
}


@pytest.mark.parametrize("form", WHOLE)
def test_a_mixture_goes_whole_with_its_router(form: str) -> None:
    """Without experts, and without units in them, it adds nothing; biases go with the experts."""
    proto = WHOLE[form]()
    graph = mg.lift(proto)
    every = WidthBounds(min_width=0, depth="branches").on(graph)
    (branch,) = every.parts
    inner, experts = group_on(graph, "w2", 2), group_on(graph, "w1", 0)
    assert {inner.index, experts.index} <= set(branch.groups)
    made = mg.plan(graph, {}, widths={inner.id: 0, experts.id: 0}, min_width=0)
    small = mg.apply(graph, made)  # and checked against the masked original
    x = np.random.default_rng(5).normal(size=(TOKENS, 3)).astype(np.float32)
    arrays = arrays_of(proto)
    expected = x @ arrays["inw"] @ arrays["head"]
    np.testing.assert_allclose(
        outputs(_saved(small), x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )
    assert np.abs(outputs(proto, x) - expected).max() > 1e-2 * np.abs(expected).max()
    assert {node.op_type for node in small.graph} == {"MatMul"}
    assert set(small.graph.initializers) == {"inw", "head"}


def test_biases_behind_the_units_stay_where_experts_do() -> None:
    """Each expert adds its own, which the router weights; a fused node cannot do that alone."""
    graph = mg.lift(FORMS["silu"]())
    inner = group_on(graph, "w2", 2)
    with pytest.raises(PlanError, match="MoE 'moe' reads"):
        mg.plan(graph, {}, widths={inner.id: 0}, min_width=0)
    proto = FORMS["biases"]()
    graph = mg.lift(proto)
    inner = group_on(graph, "w2", 2)
    small = mg.apply(graph, mg.plan(graph, {}, widths={inner.id: 0}, min_width=0))
    x = np.random.default_rng(5).normal(size=(TOKENS, 3)).astype(np.float32)
    expected = outputs(changed(proto, w2=np.zeros_like(arrays_of(proto)["w2"])), x)
    found = outputs(_saved(small), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert "b2" in small.graph.initializers


@pytest.mark.parametrize("form", ["softmax first", "silu"])
def test_a_budget_takes_experts_units_and_hidden_width_together(form: str) -> None:
    graph = mg.lift(FORMS[form]())
    made = mg.plan(graph, {"params": "25%"}, round_to=1)
    widths = {graph.groups[k].width: w for k, w in enumerate(made.widths(graph).tolist())}
    assert TAKEN <= widths[EXPERTS] < EXPERTS
    assert widths[INNER] < INNER
    assert widths[HIDDEN] < HIDDEN
    mg.apply(graph, made)


@pytest.mark.parametrize("form", ["softmax first", "silu"])
def test_as_many_experts_stay_as_a_token_takes(form: str) -> None:
    graph = mg.lift(FORMS[form]())
    experts = group_on(graph, "w1", 0)
    with pytest.raises(PlanError, match="keeps 1 of 5 channels, but the network chooses 2"):
        mg.plan(graph, {}, widths={experts.id: 1})
    with pytest.raises(BudgetError):
        mg.plan(graph, {"params": "1%"}, include=[experts.id])
    low = mg.plan(graph, {"params": "62%"}, include=[experts.id], min_width=0)
    assert int(low.widths(graph)[experts.index]) >= TAKEN


def test_units_are_ranked_by_the_weights_of_all_experts() -> None:
    proto = FORMS["softmax first"]()
    arrays = arrays_of(proto)
    less = np.where(np.arange(INNER) == 2, np.float32(0.01), np.float32(1))
    w1, w2 = arrays["w1"] * less[:, None], arrays["w2"] * less
    graph = mg.lift(changed(proto, w1=w1, w2=w2))
    inner = group_on(graph, "w2", 2)
    assert int(np.argmin(scores_of(graph, "l2")[inner.channels])) == 2


@pytest.mark.parametrize("reader", ["output", "arithmetic", "nobody"])
def test_what_is_ranked_keeps_its_size_where_others_read_the_numbers(reader: str) -> None:
    node = helper.make_node
    arrays = weights(2, **COMMON) | {"k": np.array([TAKEN]), "table": np.ones((EXPERTS, HIDDEN))}
    arrays["table"] = arrays["table"].astype(np.float32)
    arrays["two"] = np.array(1)
    nodes = [node("TopK", ["router", "k"], ["best", "taken"], axis=-1)]
    if reader == "nobody":
        nodes += [node("ReduceSum", ["best", "k1"], ["m"])]
        arrays["k1"] = np.array([1])
    else:
        number = "taken" if reader == "output" else "other"
        nodes += [node("Sub", ["taken", "two"], ["other"])] if reader == "arithmetic" else []
        nodes += [
            node("Gather", ["table", number], ["rows"]),
            node("ReduceSum", ["rows", "k1"], ["m"], keepdims=0),
        ]
        arrays["k1"] = np.array([1])
    graph = mg.lift(model(nodes, arrays, *(["taken"] if reader == "output" else [])))
    assert group_on(graph, "gate", 1).reason == "ranked by TopK"


@pytest.mark.parametrize("form", ["softmax first", "softmax of those taken", "silu"])
def test_experts_that_inputs_choose_least_go_first(form: str) -> None:
    """Whatever the rows of the router are: that of the one that goes first is the largest."""
    proto = FORMS[form]()
    arrays = arrays_of(proto)
    rare = np.array([0, -3, -1, -6, -2], np.float32)
    gate = arrays["gate"] * np.array([1, 1, 1, 1.5, 0.2], np.float32)
    graph = mg.lift(changed(proto, mask=rare, gate=gate))
    experts = group_on(graph, "w1", 0)
    x = np.random.default_rng(5).normal(size=(50 * TOKENS, 3)).astype(np.float32)
    logits = x @ arrays["inw"] @ gate + rare
    times = np.bincount(np.argsort(-logits, axis=1)[:, :TAKEN].ravel(), minlength=EXPERTS)
    shrinker = Shrinker(graph, x)
    chosen = shrinker.calibration.chosen[experts.index]
    assert chosen.sum() == TAKEN * shrinker.fitted.count
    assert np.argsort(times).tolist() == np.argsort(chosen).tolist()
    scores = shrinker.scores("data")[experts.channels]
    assert np.argsort(times).tolist() == np.argsort(scores).tolist()
