"""Mixtures of experts: the original with the router's logits of removed experts at minus infinity.

Units inside experts are removed by hand in the original: their weights are zero there.
"""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import morphgraph as mg
from morphgraph.errors import BudgetError, PlanError
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.build import scores_of
from morphgraph.shrinker import Shrinker
from tests.passes.experts import (
    COMMON,
    EXPERTS,
    FORMS,
    HIDDEN,
    INNER,
    PACKED,
    TAKEN,
    TOKENS,
    arrays_of,
    bare,
    changed,
    fused,
    group_on,
    model,
    outputs,
    three_kernels,
    weights,
)


@pytest.mark.parametrize("form", FORMS | PACKED)
def test_experts_go_as_if_the_router_never_took_them(form: str) -> None:
    proto = (FORMS | PACKED)[form]()
    graph = mg.lift(proto)
    experts = group_on(graph, "w1", 0)
    assert experts.resizable
    assert {(m.value, m.axis) for m in experts.members} >= {("gate", 1), ("w1", 0), ("w2", 0)}
    made = mg.plan(graph, {}, widths={experts.id: 3})
    (kept,) = made.keep_channels(graph).values()
    small = mg.apply(graph, made)  # and checked against the masked original
    _same_without(proto, small, EXPERTS, kept)
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


def _beside_one_another(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same network with gates and units in one kernel, which ONNX Runtime runs on a CPU.

    `x sigmoid(x)` times what the third kernel makes is SwiGLU without a limit.
    """
    held = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    for one, other in (("w1", "w3"), ("b1", "b3")):
        both = np.stack([held[one], held.pop(other)], axis=2)
        held[one] = both.reshape(len(both), -1, *both.shape[3:])
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in held.items())
    del copy.graph.value_info[:]
    (node,) = (node for node in copy.graph.node if node.op_type == "MoE")
    del node.input[6:]
    kept = [each for each in node.attribute if each.name in ("k", "normalize_routing_weights")]
    gates = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0}
    del node.attribute[:]
    node.attribute.extend(kept)
    gated: dict[str, Any] = {**gates, "activation_beta": 0.0}
    node.attribute.extend(helper.make_attribute(k, v) for k, v in gated.items())
    return copy


@pytest.mark.parametrize("form", ["silu", "swiglu"])
@pytest.mark.parametrize("axis", [("w2", 2, 4), ("w1", 0, 3), ("inw", 1, 5)])
def test_a_third_kernel_goes_along(form: str, axis: tuple[str, int, int]) -> None:
    """No kernel for CPUs takes one, but the same network in two kernels."""
    proto = three_kernels(form)
    graph = mg.lift(proto)
    name, at, width = axis
    group = group_on(graph, name, at)
    made = mg.plan(graph, {}, widths={group.id: width})
    (kept,) = made.keep_channels(graph).values()
    small = mg.apply(graph, made)  # and checked in PyTorch
    x = np.random.default_rng(6).normal(size=(TOKENS, 3)).astype(np.float32)
    held = {key: array.copy() for key, array in arrays_of(proto).items()}
    gone = np.setdiff1d(np.arange(group.width), kept)
    if name == "w2":  # units
        held["w2"][:, :, gone] = 0
    elif name == "w1":  # experts
        held["mask"][gone] = -np.inf
    else:  # the hidden width
        held["inw"][:, gone] = held["w2"][:, gone] = held["b2"][:, gone] = 0
    expected = outputs(_beside_one_another(changed(proto, **held)), x)
    found = outputs(_beside_one_another(onnx.load_from_string(_saved(small))), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    whole = outputs(_beside_one_another(proto), x)
    assert np.abs(whole - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("silu", "FC3 is not implemented for CPU MoE"),
        ("swiglu", "CPU MoE only supports interleaved SwiGLU format"),
    ],
)
def test_what_no_kernel_for_cpus_runs_is_no_fault_of_the_inputs(form: str, words: str) -> None:
    samples = [{"x": np.ones((TOKENS, 3), np.float32)}] * 20
    with pytest.raises(mg.UnsupportedError, match=words) as found:
        mg.shrink(mg.lift(three_kernels(form)), samples, {"flops": "70%"})
    assert "plan by its weights, without inputs" in str(found.value)


@pytest.mark.parametrize("fusion", [1, 2])
def test_how_gates_lie_is_asked_of_swiglu_only(fusion: int) -> None:
    """ONNX Runtime passes over the attribute for other activations."""
    proto = fused("relu")
    (node,) = (node for node in proto.graph.node if node.op_type == "MoE")
    plain = outputs(proto, x := np.random.default_rng(6).normal(size=(TOKENS, 3)).astype("f4"))
    node.attribute.append(helper.make_attribute("swiglu_fusion", fusion))
    np.testing.assert_array_equal(outputs(proto, x), plain)
    graph = mg.lift(proto)
    assert group_on(graph, "w1", 1).width == INNER
    mg.apply(graph, mg.uniform(graph, 0.6))


@pytest.mark.parametrize("fusion", [1, 2])
def test_gates_in_one_kernel_and_a_third_one_are_not_described(fusion: int) -> None:
    proto = three_kernels("swiglu")
    (node,) = (node for node in proto.graph.node if node.op_type == "MoE")
    node.attribute.append(helper.make_attribute("swiglu_fusion", fusion))
    proto = changed(proto, w1=np.ones((EXPERTS, 2 * INNER, HIDDEN), np.float32))
    (opaque,) = (op.opaque for op in mg.lift(proto).ops if op.opaque)
    assert "gates and units in one kernel, and a third one" in opaque


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


@pytest.mark.parametrize("form", ["softmax first", "silu", "largest, then largest of the others"])
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


@pytest.mark.parametrize("ranking", ["TopK", "ArgMax"])
@pytest.mark.parametrize("reader", ["output", "arithmetic", "beside a number that is held"])
def test_what_is_numbered_keeps_its_size_where_others_read_the_numbers(
    ranking: str, reader: str
) -> None:
    node = helper.make_node
    arrays = weights(2, **COMMON, table=(EXPERTS, HIDDEN)) | {"k": np.array([TAKEN])}
    arrays |= {"k1": np.array([1]), "always": np.full((TOKENS, 1), EXPERTS - 1)}
    nodes = [
        node("TopK", ["router", "k"], ["best", "taken"], axis=-1)
        if ranking == "TopK"
        else node("ArgMax", ["router"], ["taken"], axis=-1)
    ]
    read = {
        "output": [],
        "arithmetic": [node("Sub", ["taken", "k1"], ["other"])],
        "beside a number that is held": [node("Concat", ["taken", "always"], ["other"], axis=-1)],
    }[reader]
    nodes += [
        *read,
        node("Gather", ["table", "other" if read else "taken"], ["rows"]),
        node("ReduceSum", ["rows", "k1"], ["m"], keepdims=0),
    ]
    graph = mg.lift(model(nodes, arrays, *(["taken"] if reader == "output" else [])))
    said = {"TopK": "ranked by TopK", "ArgMax": "numbered by ArgMax"}[ranking]
    assert group_on(graph, "gate", 1).reason == said


def test_a_mask_keeps_the_numbers_that_it_has_where_the_router_keeps_its_rows() -> None:
    """Experts may go behind a mask without their numbers: nobody takes what was for them."""
    node = helper.make_node
    arrays = weights(2, inw=(3, EXPERTS), head=(HIDDEN, 4), table=(EXPERTS, HIDDEN))
    arrays |= {"count": np.arange(EXPERTS), "last": np.array([-1])}
    nodes = [
        node("MatMul", ["x", "inw"], ["h"], name="stem"),
        node("ArgMax", ["h"], ["chosen"], axis=-1, keepdims=0),
        node("Abs", ["chosen"], ["taken"]),  # so that it is not known whose numbers these are
        node("Unsqueeze", ["taken", "last"], ["column"]),
        node("Equal", ["column", "count"], ["same"]),
        node("Cast", ["same"], ["marked"], to=onnx.TensorProto.FLOAT),
        node("MatMul", ["marked", "table"], ["s"], name="read"),
        node("MatMul", ["s", "head"], ["y"], name="head"),
    ]
    proto = bare(nodes, arrays)
    graph = mg.lift(proto)
    marked = group_on(graph, "table", 0)
    assert group_on(graph, "inw", 1).reason == "numbered by ArgMax"
    scores = np.zeros(len(graph.channel_group))
    scores[marked.channels[[1, 3]]] = 1
    made = mg.plan(graph, {}, widths={marked.id: 2}, score=scores)
    (kept,) = made.keep_channels(graph).values()
    assert kept.tolist() == [1, 3]
    silent = np.where(np.isin(np.arange(EXPERTS), kept)[:, None], arrays["table"], np.float32(0))
    x = np.random.default_rng(5).normal(size=(TOKENS, 3)).astype(np.float32)
    expected = outputs(changed(proto, table=silent), x)
    found = outputs(_saved(mg.apply(graph, made)), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert 0 < np.abs(expected).max() < np.abs(outputs(proto, x)).max()


def test_the_largest_of_fewer_are_taken_where_nobody_reads_their_numbers() -> None:
    node = helper.make_node
    arrays = weights(2, **COMMON, mix=(TAKEN, HIDDEN)) | {"k": np.array([TAKEN])}
    nodes = [
        node("TopK", ["router", "k"], ["best", "taken"], axis=-1),
        node("MatMul", ["best", "mix"], ["m"]),
    ]
    proto = model(nodes, arrays)
    graph = mg.lift(proto)
    ranked = group_on(graph, "gate", 1)
    assert ranked.resizable
    assert ranked.statistical
    made = mg.plan(graph, {}, widths={ranked.id: 3})
    (kept,) = made.keep_channels(graph).values()
    _same_without(proto, mg.apply(graph, made), EXPERTS, kept)


def grouped(groups: int, taken_groups: int) -> tuple[onnx.ModelProto, int]:
    """A token takes experts of some groups only, by the sum of the best two of every group."""
    node, inside = helper.make_node, 3
    experts = groups * inside
    arrays = weights(4, **(COMMON | {"gate": (HIDDEN, experts)}))
    arrays |= weights(5, table=(experts, HIDDEN))
    constants = {
        "two": [2],
        "few": [taken_groups],
        "k": [TAKEN],
        "last": [-1],
        "inside": [TOKENS, groups, inside],
        "whole": [TOKENS, experts],
        "one": [1],
    }
    arrays |= {name: np.array(value) for name, value in constants.items()}
    arrays |= {
        "nothing": np.zeros((TOKENS, groups), np.float32),
        "ones": np.ones((TOKENS, taken_groups), np.float32),
        "never": np.array(-np.inf, np.float32),
    }
    nodes = [
        node("Reshape", ["router", "inside"], ["by_group"]),
        node("TopK", ["by_group", "two"], ["best_two", "places"], axis=-1, name="inside"),
        node("ReduceSum", ["best_two", "last"], ["of_group"], keepdims=0),
        node("TopK", ["of_group", "few"], ["best_groups", "groups"], axis=-1, name="groups"),
        node("ScatterElements", ["nothing", "groups", "ones"], ["marked"], axis=1),
        node("Unsqueeze", ["marked", "last"], ["upright"]),
        node("Expand", ["upright", "inside"], ["wide"]),
        node("Reshape", ["wide", "whole"], ["mask_of_experts"]),
        node("Cast", ["mask_of_experts"], ["open"], to=onnx.TensorProto.BOOL),
        node("Where", ["open", "router", "never"], ["left"]),
        node("TopK", ["left", "k"], ["best", "taken"], axis=-1, name="choose"),
        node("Softmax", ["best"], ["shares"], axis=-1),
        node("Gather", ["table", "taken"], ["rows"], axis=0),
        node("Unsqueeze", ["shares", "last"], ["share"]),
        node("Mul", ["rows", "share"], ["scaled"]),
        node("ReduceSum", ["scaled", "one"], ["m"], keepdims=0),
    ]
    return model(nodes, arrays), experts


@pytest.mark.parametrize("taken_groups", [2, 4])
def test_of_groups_that_compete_whole_ones_go_else_the_same_of_each(taken_groups: int) -> None:
    groups = 4
    proto, experts = grouped(groups, taken_groups)
    graph = mg.lift(proto)
    group = group_on(graph, "table", 0)
    assert group.width == (groups if taken_groups < groups else experts // groups)
    made = mg.plan(graph, {}, widths={group.id: group.width - 1})
    small = mg.apply(graph, made)
    (kept,) = made.keep_channels(graph).values()
    places = np.arange(experts).reshape(groups, -1)
    stay = places[kept] if taken_groups < groups else places[:, kept]
    _same_without(proto, small, experts, stay.ravel())
    with pytest.raises(PlanError, match="the network chooses 2 of them"):
        mg.plan(graph, {}, widths={group.id: 1})


def _same_without(proto: onnx.ModelProto, small: Any, experts: int, kept: np.ndarray) -> None:
    """The small one computes what the original does with others at minus infinity."""
    never = np.full(experts, -np.inf, np.float32)
    never[kept] = 0
    x = np.random.default_rng(3).normal(size=(TOKENS, 3)).astype(np.float32)
    expected = outputs(changed(proto, mask=never), x)
    found = outputs(_saved(small), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert np.abs(outputs(proto, x) - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("form", ["one-hot", "compared", "compared, the other way"])
def test_experts_that_inputs_choose_least_go_first(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing tells what each of them gives, and whatever the rows of the router are.

    That of the one that goes first is the largest.
    """
    monkeypatch.setattr("morphgraph.passes.calibration.statistics.stacks", lambda *_: {})
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
