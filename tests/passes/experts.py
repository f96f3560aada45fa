"""Small mixtures of experts in ONNX, by the forms in which they are written, and what runs them."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from morphgraph.arrays import Arrays
from morphgraph.graph import ChannelGraph

TOKENS, HIDDEN, EXPERTS, INNER, TAKEN = 9, 8, 5, 6, 2


def weights(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    generator = np.random.default_rng(seed)
    return {k: generator.normal(size=s).astype(np.float32) for k, s in shapes.items()}


COMMON = {"inw": (3, HIDDEN), "gate": (HIDDEN, EXPERTS), "head": (HIDDEN, 4)}
STACKS = {"w1": (EXPERTS, INNER, HIDDEN), "w2": (EXPERTS, HIDDEN, INNER)}


def model(nodes: list[onnx.NodeProto], arrays: Arrays, *outputs: str) -> onnx.ModelProto:
    """A stem and a router in front, a sum and a head behind; ``m`` is what the mixture adds.

    ``mask`` is added to the router's logits: one number for each that ``gate`` makes.
    """
    node = helper.make_node
    every = [
        node("MatMul", ["x", "inw"], ["h"], name="stem"),
        node("MatMul", ["h", "gate"], ["logits"], name="gate"),
        node("Add", ["logits", "mask"], ["router"], name="masked"),
        *nodes,
        node("Add", ["h", "m"], ["s"], name="sum"),
        node("MatMul", ["s", "head"], ["y"], name="head"),
    ]
    mask = np.zeros(arrays["gate"].shape[1], np.float32)
    return bare(every, {**arrays, "mask": mask}, *outputs)


def bare(nodes: list[onnx.NodeProto], arrays: Arrays, *outputs: str) -> onnx.ModelProto:
    """Nodes from ``x`` to ``y``, and these outputs beside."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (TOKENS, 3))
    kinds = [TensorProto.FLOAT, TensorProto.INT64]
    made = [
        helper.make_tensor_value_info(name, kinds[name == "taken"], None)
        for name in ("y", *outputs)
    ]
    held = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "mixture", [x], made, held)
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
    chosen = [node("TopK", [ranked, "k"], ["best", "taken"], axis=-1, name="choose")]
    if form == "argmax":
        arrays["least"] = np.full((TOKENS, 1), -np.inf, np.float32)
        chosen = [
            node("ArgMax", ["p"], ["first"], axis=-1, name="choose"),
            node("ScatterElements", ["p", "first", "least"], ["others"], axis=-1),
            node("ArgMax", ["others"], ["second"], axis=-1, name="then"),
            node("Concat", ["first", "second"], ["taken"], axis=-1),
            node("GatherElements", ["p", "taken"], ["best"], axis=-1),
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
        *chosen,
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


def three_kernels(form: str) -> onnx.ModelProto:
    """ONNX Runtime's own node where a third kernel makes what the units are multiplied with."""
    shapes = STACKS | {"w3": (EXPERTS, INNER, HIDDEN), "b1": (EXPERTS, INNER)}
    shapes |= {"b2": (EXPERTS, HIDDEN), "b3": (EXPERTS, INNER)}
    mixture = helper.make_node(
        "MoE",
        ["h", "router", "w1", "b1", "w2", "b2", "w3", "b3"],
        ["m"],
        name="moe",
        domain="com.microsoft",
        k=TAKEN,
        activation_type=form,
        normalize_routing_weights=1,
    )
    return model([mixture], weights(1, **COMMON, **shapes))


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


#: How tokens are repeated for every expert.
SIDE_BY_SIDE = {
    "side by side": [helper.make_node("Expand", ["h", "repeated"], ["each"])],
    "side by side, copies": [
        helper.make_node("Unsqueeze", ["h", "first"], ["one"]),
        helper.make_node("Tile", ["one", "often"], ["each"]),
    ],
    "side by side, copies in a row": [
        helper.make_node("Tile", ["h", "twice"], ["row"]),
        helper.make_node("Reshape", ["row", "behind"], ["each"]),
    ],
}


def dense(form: str) -> onnx.ModelProto:
    """All experts compute every token; a mask of ones, or scattered shares, leaves those taken."""
    node = helper.make_node
    arrays = weights(3, **COMMON, **STACKS)
    arrays |= {"k": np.array([TAKEN]), "last": np.array([-1]), "inside": np.array([1])}
    marked = {
        "one-hot": [node("OneHot", ["taken", "depth", "off_on"], ["marked"], axis=-1)],
        "compared": [
            node("Unsqueeze", ["taken", "last"], ["column"]),
            node("Equal", ["column", "count"], ["same"]),
            node("Cast", ["same"], ["marked"], to=TensorProto.FLOAT),
        ],
        "compared, the other way": [
            node("Unsqueeze", ["taken", "last"], ["column"]),
            node("Cast", ["column"], ["small"], to=TensorProto.INT32),
            node("Equal", ["count", "small"], ["same"]),
            node("Cast", ["same"], ["marked"], to=TensorProto.FLOAT),
        ],
    }["one-hot" if form in SIDE_BY_SIDE else form]
    if form in ("one-hot", *SIDE_BY_SIDE):
        arrays |= {"depth": np.array([EXPERTS]), "off_on": np.array([0, 1], np.float32)}
    else:
        count = np.arange(EXPERTS)
        arrays["count"] = count if form == "compared" else count.astype(np.int32)[None, None]
    nodes = [
        node("Softmax", ["router"], ["p"], axis=-1),
        node("TopK", ["p", "k"], ["best", "taken"], axis=-1, name="choose"),
        *marked,
        node("Unsqueeze", ["best", "last"], ["share"]),
        node("Mul", ["marked", "share"], ["placed"]),
        node("ReduceSum", ["placed", "inside"], ["shares"], keepdims=0),
    ]
    if form in SIDE_BY_SIDE:  # tokens are repeated for every expert
        shapes = {
            "repeated": [EXPERTS, TOKENS, HIDDEN],
            "often": [EXPERTS, 1, 1],
            "twice": [EXPERTS, 1],
            "behind": [-1, TOKENS, HIDDEN],
        }
        arrays |= {name: np.array(shape) for name, shape in shapes.items()}
        nodes += SIDE_BY_SIDE[form]
        nodes += [
            node("Transpose", ["w1"], ["k1"], perm=[0, 2, 1]),
            node("Transpose", ["w2"], ["k2"], perm=[0, 2, 1]),
            node("MatMul", ["each", "k1"], ["u"], name="up"),
            node("Relu", ["u"], ["r"]),
            node("MatMul", ["r", "k2"], ["d"], name="down"),
            node("Transpose", ["shares"], ["turned"], perm=[1, 0]),
            node("Unsqueeze", ["turned", "last"], ["by_expert"]),
            node("Mul", ["d", "by_expert"], ["scaled"]),
            node("ReduceSum", ["scaled", "first"], ["m"], keepdims=0),
        ]
        arrays["first"] = np.array([0])
        return model(nodes, arrays)
    nodes += [
        node("Einsum", ["h", "w1"], ["u"], equation="th,eih->tei", name="up"),
        node("Relu", ["u"], ["r"]),
        node("Einsum", ["r", "w2"], ["d"], equation="tei,ehi->teh", name="down"),
        node("Einsum", ["shares", "d"], ["m"], equation="te,teh->th", name="mixed"),
    ]
    return model(nodes, arrays)


FORMS = {
    "softmax first": lambda: gathered("softmax first"),
    "softmax of those taken": lambda: gathered("softmax of those taken"),
    "scores read by number": lambda: gathered("scores read by number"),
    "tuples": lambda: gathered("tuples"),
    "biases": lambda: gathered("biases"),
    "largest, then largest of the others": lambda: gathered("argmax"),
    "one-hot": lambda: dense("one-hot"),
    "compared": lambda: dense("compared"),
    "compared, the other way": lambda: dense("compared, the other way"),
    "side by side": lambda: dense("side by side"),
    "side by side, copies": lambda: dense("side by side, copies"),
    "side by side, copies in a row": lambda: dense("side by side, copies in a row"),
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
