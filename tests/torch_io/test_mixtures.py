"""ONNX Runtime's mixtures of experts in PyTorch; the runtime computes what is expected.

Its kernel for CPUs knows one of three layouts of SwiGLU and no third kernel: those are expected to
compute what the known layout does with the same numbers in its order.
"""

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.arrays import Array, Arrays
from morphgraph.onnx_io import runtime as ort

TOKENS, HIDDEN, EXPERTS, INNER = 6, 32, 5, 32
GPT_OSS: dict[str, Any] = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 1.0}


def arrays(seed: int, **shapes: tuple[int, ...]) -> Arrays:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def mixture(
    op_type: str, operands: list[str], held: Arrays, batched: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """A single node; ``x`` and the router's numbers ``r`` are given, the rest is held."""
    node = helper.make_node(
        op_type, operands, ["y"], name="moe", domain="com.microsoft", k=2, **attributes
    )
    shape = (2, TOKENS // 2, HIDDEN) if batched else (TOKENS, HIDDEN)
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in (("x", shape), ("r", (TOKENS, EXPERTS)), ("p", (TOKENS, EXPERTS)))
        if name in operands
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph([node], "mixture", given, [y], stored)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def inputs(proto: onnx.ModelProto) -> Arrays:
    sizes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in proto.graph.input
    }
    feeds = arrays(9, **sizes)
    return feeds | ({"p": np.abs(feeds["p"])} if "p" in feeds else {})


def in_torch(proto: onnx.ModelProto) -> tuple[torch.nn.Module, Array]:
    net = mg.to_torch(mg.lift(proto).model)
    found = net(*(torch.from_numpy(array) for array in inputs(proto).values()))
    return net, found.detach().numpy()


def in_runtime(proto: onnx.ModelProto) -> Array:
    (found,) = ort.run(mg.lift(proto).model, inputs(proto)).values()
    return found


def same(one: Array, other: Array) -> None:
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(other).max())


def kernels(rows: int = INNER, seed: int = 0) -> Arrays:
    return arrays(
        seed,
        w1=(EXPERTS, rows, HIDDEN),
        b1=(EXPERTS, rows),
        w2=(EXPERTS, HIDDEN, INNER),
        b2=(EXPERTS, HIDDEN),
    )


@pytest.mark.parametrize("normalized", [0, 1])
@pytest.mark.parametrize("kind", ["relu", "gelu", "silu", "identity", "swiglu", "limited"])
def test_experts_of_real_numbers(kind: str, normalized: int) -> None:
    gated = {"activation_type": "swiglu", "swiglu_fusion": 1}
    options: dict[str, Any] = {
        "swiglu": gated,
        "limited": {**gated, **GPT_OSS},
    }.get(kind, {"activation_type": kind})
    held = kernels(2 * INNER if "swiglu_fusion" in options else INNER)
    proto = mixture(
        "MoE",
        ["x", "r", "w1", "b1", "w2", "b2"],
        held,
        batched=kind in ("gelu", "swiglu"),
        normalize_routing_weights=normalized,
        **options,
    )
    net, found = in_torch(proto)
    same(found, in_runtime(proto))
    net.zero_grad()
    feeds = [torch.from_numpy(array) for array in inputs(proto).values()]
    net(*feeds).square().sum().backward()
    stacks = [p for p in net.parameters() if p.ndim > 1]
    assert len(stacks) == 4
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in stacks)


@pytest.mark.parametrize("layout", ["one after the other", "two kernels"])
def test_other_layouts_of_swiglu(layout: str) -> None:
    held = kernels(2 * INNER)
    known = mixture(
        "MoE",
        ["x", "r", "w1", "b1", "w2", "b2"],
        held,
        activation_type="swiglu",
        swiglu_fusion=1,
        **GPT_OSS,
    )
    gates, ups = ({k: held[k][:, first::2] for k in ("w1", "b1")} for first in (0, 1))
    operands = ["x", "r", "w1", "b1", "w2", "b2"]
    if layout == "two kernels":
        held |= gates | {"w3": ups["w1"], "b3": ups["b1"]}
        operands += ["w3", "b3"]
    else:
        held |= {k: np.concatenate([gates[k], ups[k]], axis=1) for k in gates}
    fusion = 0 if layout == "two kernels" else 2
    other = mixture(
        "MoE", operands, held, activation_type="swiglu", swiglu_fusion=fusion, **GPT_OSS
    )
    same(in_torch(other)[1], in_runtime(known))


@pytest.mark.parametrize(
    "form", ["rows", "blocks", "zero points", "zero points of blocks", "shares"]
)
@pytest.mark.parametrize("bits", [4, 8])
def test_experts_in_few_bits(form: str, bits: int) -> None:
    generator = np.random.default_rng(3)
    blocks = 2 if "blocks" in form else 1
    held: Arrays = {}
    for name in ("w1", "w2"):
        shape = (EXPERTS, HIDDEN, HIDDEN * bits // 8)
        held[name] = generator.integers(0, 256, shape).astype(np.uint8)
        scales = (EXPERTS, HIDDEN, blocks)[: 3 if blocks > 1 else 2]
        held[f"{name}_scales"] = (generator.uniform(0.01, 0.02, scales) / 2 ** (bits - 4)).astype(
            np.float32
        )
        points = (
            (EXPERTS, HIDDEN, blocks * bits // 8) if blocks > 1 else (EXPERTS, HIDDEN * bits // 8)
        )
        held[f"{name}_zeros"] = generator.integers(0, 256, points).astype(np.uint8)
    operands = ["x", "r", "w1", "w1_scales", "", "w2", "w2_scales", "", "", "", ""]
    operands += ["w1_zeros", "w2_zeros", ""] if "zero points" in form else ["", "", ""]
    operands += ["p"] if form == "shares" else []
    used = {name: array for name, array in held.items() if name in operands}
    size: dict[str, Any] = {"block_size": HIDDEN // blocks} if blocks > 1 else {}
    proto = mixture(
        "QMoE",
        operands,
        used,
        activation_type="silu",
        normalize_routing_weights=1,
        expert_weight_bits=bits,
        **size,
    )
    found, expected = in_torch(proto)[1], in_runtime(proto)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("left_out", [{"use_sparse_mixer": 1}, {"activation_type": "relu2"}])
def test_what_no_cpu_computes_is_refused_by_name(left_out: dict[str, Any]) -> None:
    proto = mixture("MoE", ["x", "r", "w1", "b1", "w2", "b2"], kernels(), **left_out)
    with pytest.raises(mg.UnsupportedError, match="node 'moe': MoE to PyTorch: the"):
        mg.to_torch(mg.lift(proto).model)
