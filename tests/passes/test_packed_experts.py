"""Experts in few bits lose whole blocks: numpy computes the smaller network from real numbers.

ONNX Runtime's kernel for CPUs knows one layout of SwiGLU and two kernels; the other forms are
checked by ``mg.apply`` in PyTorch, and by the same arithmetic in numpy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.arrays import Array, Arrays, IntArray
from morphgraph.graph import ChannelGraph, Group

TOKENS, HIDDEN, UNITS, EXPERTS, TAKEN, BLOCK = 9, 128, 192, 5, 2, 16
LIMIT, ALPHA, BETA = 1.5, 1.702, 1.0


@dataclass(frozen=True)
class Form:
    """How the experts are written; ``fusion``: 1 side by side, 2 one after the other, 3 apart."""

    bits: int
    blocks: bool = False
    zeros: bool = False
    fusion: int = 0

    @property
    def kernels(self) -> dict[str, tuple[int, int]]:
        rows = UNITS * (2 if self.fusion in (1, 2) else 1)
        third = {"w3": (UNITS, HIDDEN)} if self.fusion == 3 else {}
        return {"w1": (rows, HIDDEN), "w2": (HIDDEN, UNITS), **third}


def arrays(form: Form) -> Arrays:
    generator, in_byte = np.random.default_rng(0), 8 // form.bits
    held: dict[str, Any] = {
        "inw": generator.normal(size=(3, HIDDEN)),
        "gate": generator.normal(size=(HIDDEN, EXPERTS)),
        "head": generator.normal(size=(HIDDEN, 4)),
    }
    for name, (rows, columns) in form.kernels.items():
        held[name] = generator.integers(0, 256, (EXPERTS, rows, columns // in_byte))
        groups = (columns // BLOCK,) if form.blocks else ()
        spread = 2.0**form.bits * columns**0.5
        held[f"{name}_scales"] = generator.uniform(2, 4, (EXPERTS, rows, *groups)) / spread
        held[f"b{name[1]}"] = generator.normal(size=(EXPERTS, rows))
        points = (EXPERTS, rows, *groups)
        if form.zeros:
            packed = (*points[:-1], -(-points[-1] // in_byte))
            held[f"{name}_zeros"] = generator.integers(0, 256, packed)
    return {
        name: np.asarray(array, np.uint8 if array.dtype.kind == "i" else np.float32)
        for name, array in held.items()
    }


def network(form: Form, held: Arrays) -> onnx.ModelProto:
    """A stem and a router in front, a sum and a head behind."""
    operands = ["h", "router"]
    for name in ("w1", "w2", "w3"):
        there = name in form.kernels
        operands += [name, f"{name}_scales", f"b{name[1]}"] if there else ["", "", ""]
    if form.zeros:
        operands += [f"{name}_zeros" if name in form.kernels else "" for name in ("w1", "w2", "w3")]
    options: dict[str, Any] = {"activation_type": "silu"}
    if form.fusion:
        options = {
            "activation_type": "swiglu",
            "swiglu_limit": LIMIT,
            "swiglu_fusion": form.fusion % 3,
        }
        options |= {"activation_alpha": ALPHA, "activation_beta": BETA}
    options |= {"block_size": BLOCK} if form.blocks else {}
    experts = helper.make_node(
        "QMoE",
        operands,
        ["m"],
        name="moe",
        domain="com.microsoft",
        k=TAKEN,
        normalize_routing_weights=1,
        expert_weight_bits=form.bits,
        **options,
    )
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "inw"], ["h"], name="stem"),
        node("MatMul", ["h", "gate"], ["router"], name="gate"),
        experts,
        node("Add", ["h", "m"], ["s"], name="sum"),
        node("MatMul", ["s", "head"], ["y"], name="head"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (TOKENS, 3))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (TOKENS, 4))
    stored = [numpy_helper.from_array(array, name) for name, array in held.items()]
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "mixture", [x], [y], stored)
    return helper.make_model(graph, ir_version=10, opset_imports=opsets)


def numbers(packed: Array, bits: int) -> Array:
    """What bytes hold, the lowest bits first."""
    parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.float64)


def real(form: Form, held: Arrays, name: str) -> Array:
    """A stack of kernels as real numbers, ``[experts, rows, columns]``."""
    steps = numbers(held[name], form.bits)
    columns = steps.shape[-1]
    scale = held[f"{name}_scales"].reshape(*steps.shape[:2], -1).astype(np.float64)
    zero = np.full(scale.shape, 2.0 ** (form.bits - 1))
    if form.zeros:
        zero = numbers(held[f"{name}_zeros"], form.bits).reshape(scale.shape)
    each = columns // scale.shape[-1]
    whole: Array = (steps - np.repeat(zero, each, -1)) * np.repeat(scale, each, -1)
    return whole


def expected(
    form: Form, held: Arrays, x: Array, hidden: IntArray, units: IntArray, experts: IntArray
) -> Array:
    """What the network gives that has these positions only."""
    h = (x @ held["inw"].astype(np.float64))[:, hidden]
    logits = h @ held["gate"][np.ix_(hidden, experts)]
    kernels = {name: real(form, held, name)[experts] for name in form.kernels}
    biases = {name: held[f"b{name[1]}"][experts] for name in form.kernels}

    def inside(name: str, rows: Any) -> Array:
        kernel, bias = (
            kernels[name][:, rows][:, units][:, :, hidden],
            biases[name][:, rows][:, units],
        )
        return np.einsum("th,eih->tei", h, kernel) + bias

    if form.fusion == 0:
        gate = inside("w1", slice(None))
        inner = gate / (1 + np.exp(-gate))
    else:
        if form.fusion == 1:
            gate, up = inside("w1", slice(0, None, 2)), inside("w1", slice(1, None, 2))
        elif form.fusion == 2:
            gate, up = inside("w1", slice(0, UNITS)), inside("w1", slice(UNITS, None))
        else:
            gate, up = inside("w1", slice(None)), inside("w3", slice(None))
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        inner = gate / (1 + np.exp(-ALPHA * gate)) * (up + BETA)
    down = kernels["w2"][:, hidden][:, :, units]
    out = np.einsum("tei,ehi->teh", inner, down) + biases["w2"][:, hidden]
    y = h.copy()
    for token, row in enumerate(logits):
        best = np.argsort(-row)[:TAKEN]
        shares = np.exp(row[best] - row[best].max())
        y[token] += (shares / shares.sum()) @ out[token, best]
    result: Array = y @ held["head"][hidden]
    return result


def kept(graph: ChannelGraph, plan: mg.Plan, group: Group, width: int) -> IntArray:
    """Positions of an axis of this width that stay of a group."""
    channels = plan.keep_channels(graph).get(group.index, np.arange(group.width))
    each = width // group.width
    return (channels[:, None] * each + np.arange(each)).ravel()


def group_on(graph: ChannelGraph, value: str, axis: int) -> Group:
    (index,) = graph.groups_on(graph.dim(value, axis))
    return graph.groups[index]


FORMS = {
    f"{bits} bits, {'blocks' if blocks else 'rows'}{', zero points' * zeros}, {layout}": Form(
        bits, blocks, zeros, fusion
    )
    for bits in (2, 4, 8)
    for blocks in (False, True)
    for zeros in (False, True)
    for layout, fusion in {
        "silu": 0,
        "side by side": 1,
        "one after the other": 2,
        "apart": 3,
    }.items()
    if fusion < 2 or (blocks, bits) == (True, 4)
}


@pytest.mark.parametrize("name", FORMS)
def test_hidden_width_units_and_experts_go(name: str) -> None:
    form = FORMS[name]
    held = arrays(form)
    proto = network(form, held)
    graph = mg.lift(proto)
    groups = [group_on(graph, "h", 1), group_on(graph, "b2", 0), group_on(graph, "b2", 1)]
    units = group_on(graph, "w2", 2)
    hidden, experts = groups[0], groups[1]
    assert groups[2] is hidden
    widths = {hidden.id: hidden.width // 2, units.id: units.width // 2, experts.id: 3}
    plan = mg.plan(graph, {}, widths=widths)
    small = mg.apply(graph, plan)  # and checked against the masked original
    x = np.random.default_rng(3).normal(size=(TOKENS, 3)).astype(np.float32)
    positions = [
        kept(graph, plan, group, width)
        for group, width in ((hidden, HIDDEN), (units, UNITS), (experts, EXPERTS))
    ]
    assert len(positions[0]) == HIDDEN // 2
    assert UNITS // 4 < len(positions[1]) <= UNITS // 2
    want = expected(form, held, x, *positions)
    whole = expected(form, held, x, *map(np.arange, (HIDDEN, UNITS, EXPERTS)))
    assert np.abs(whole - want).max() > 1e-2 * np.abs(want).max()
    # Of blocks in 8 bits the runtime's kernel rounds the activations to 8 bits, too.
    if form.fusion < 2 and not (form.blocks and form.bits == 8):
        raw = ir.to_proto(small).SerializeToString()
        session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
    else:
        import torch

        found = mg.to_torch(small)(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("fusion", [0, 1])
def test_units_stay_where_the_last_byte_of_zero_points_is_not_full(
    fusion: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = 160  # ten blocks, and four share a byte
    monkeypatch.setattr(f"{__name__}.UNITS", units)
    form = Form(2, True, True, fusion)
    graph = mg.lift(network(form, arrays(form)))
    hidden, experts = group_on(graph, "h", 1), group_on(graph, "b2", 0)
    assert hidden.resizable
    assert experts.resizable
    inside = graph.groups_on(graph.dim("w2", 2))
    assert not any(graph.groups[index].resizable for index in inside)
    mixture = 3 + fusion - 1  # kernels
    rest = 3 * HIDDEN + HIDDEN * EXPERTS + HIDDEN * 4
    macs = TOKENS * (mixture * TAKEN * HIDDEN * units + rest)
    assert mg.cost(graph, "macs").total * graph.batch == macs
    biases = EXPERTS * (units * (1 + fusion) + HIDDEN)
    weights = EXPERTS * HIDDEN * units * mixture
    assert mg.cost(graph, "params").total == weights + biases + rest
    mg.apply(graph, mg.plan(graph, {}, widths={hidden.id: 1, experts.id: 3}))
