"""Whole blocks of decoders with caches: their caches go with them, and the rest runs on."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import morphgraph as mg
from morphgraph.errors import PlanError
from morphgraph.folders import folder_of, write_folder
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.analysis.branches import blocks, branches
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.planning.uniform import set_widths
from morphgraph.shrinker import Shrinker
from morphgraph.testing import model_from_text
from morphgraph.testing.prove import prove_plan

HEADER = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '
BLOCKS, HEADS = 3, 2


def caches(size: int, before: str = "P", after: str = "L") -> tuple[str, str]:
    """The declarations of the inputs and outputs of all caches."""
    inputs, outputs = [], []
    for k in range(BLOCKS):
        for kind in ("key", "value"):
            shape = f"float[B,{HEADS},{{}},{size}]"
            inputs.append(f'{shape.format(before)} "past_key_values.{k}.{kind}"')
            outputs.append(f'{shape.format(after)} "present.{k}.{kind}"')
    return ", ".join(inputs), ", ".join(outputs)


def builders(blocks_left: tuple[int, ...] = tuple(range(BLOCKS))) -> str:
    """As the model builder writes it: norms are fused with sums, sizes come from the mask."""
    past, present = caches(16)
    weights, body = [], []
    stream, normed = "x", "n0"
    for k in range(BLOCKS):
        weights += [f"float[8,64] qkv{k}", f"float[32,8] o{k}", f"float[8,12] up{k}"]
        weights += [f"float[12,8] dn{k}", f"float[8] g{k}", f"float[8] h{k}"]
        body.append(
            f"""q{k} = MatMul({normed}, qkv{k})
            s{k}, t{k}, u{k} = Split<axis=2>(q{k}, sizes)
            a{k}, "present.{k}.key", "present.{k}.value" =
                com.microsoft.GroupQueryAttention<num_heads={HEADS}, kv_num_heads={HEADS}>
                (s{k}, t{k}, u{k}, "past_key_values.{k}.key", "past_key_values.{k}.value", l, t)
            b{k} = MatMul(a{k}, o{k})
            m{k}, , , r{k} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.01>
                ({stream}, b{k}, g{k})
            c{k} = MatMul(m{k}, up{k})  d{k} = Relu(c{k})  e{k} = MatMul(d{k}, dn{k})
            v{k}, , , z{k} = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.01>
                (r{k}, e{k}, h{k})"""
        )
        stream, normed = f"z{k}", f"v{k}"
    body = [each for k, each in enumerate(body) if k in blocks_left]
    return f"""{HEADER} net (int64[B,T] input_ids, int64[B,L] attention_mask, {past},
        float[20,8] e, float[8] n, float[8,20] w, {", ".join(weights)})
        => (float[B,T,20] logits, {present})
        <int64[1] one = {{1}}, int64 axis = {{1}}, int64[3] sizes = {{32, 16, 16}}> {{
            x = Gather(e, input_ids)  n0 = SimplifiedLayerNormalization<epsilon=0.01>(x, n)
            sum = ReduceSum<keepdims=0>(attention_mask, one)
            less = Sub(sum, one)  l = Cast<to=6>(less)
            shape = Shape(attention_mask)  size = Gather(shape, axis)  t = Cast<to=6>(size)
            {" ".join(body)}  logits = MatMul({normed}, w) }}""".replace(
        "sizes = {32, 16, 16}", f"sizes = {{{16 * HEADS}, {16 * HEADS}, {16 * HEADS}}}"
    ).replace("float[8,64]", f"float[8,{48 * HEADS}]")


def exported(form: str = "plain") -> str:
    """As an exporter writes it: caches are joined, and the first one tells how long the past is.

    ``biased`` is GPT-2's form: layers on rows, whose results are reshaped to what the ids have.
    """
    past, present = caches(4)
    weights, body = [], []
    stream = "x"
    wide = 4 * HEADS
    for k in range(BLOCKS):
        weights += [f"float[8,{wide}] {n}{k}" for n in "qkv"] + [f"float[{wide},8] o{k}"]
        weights += [f"float[8,12] up{k}", f"float[12,8] dn{k}", f"float[8] bo{k}, float[8] bd{k}"]
        heads = "  ".join(
            f"{n}a{k} = MatMul({stream}, {n}{k})  {n}b{k} = Reshape({n}a{k}, split)"
            f"  {n}c{k} = Transpose<perm=[0,2,1,3]>({n}b{k})"
            for n in "qkv"
        )
        ends = [f"b{k} = MatMul(f{k}, o{k})", f"j{k} = MatMul(i{k}, dn{k})"]
        if form == "biased":
            ends = [
                f"{x}r{k} = Reshape({x}{k}, rows{width})  {x}s{k} = Gemm({x}r{k}, {w}{k}, {c}{k})"
                f"  {y}{k} = Reshape({x}s{k}, whole)"
                for x, w, c, y, width in (("f", "o", "bo", "b", wide), ("i", "dn", "bd", "j", 12))
            ]
        body.append(
            f"""{heads}
            "present.{k}.key" = Concat<axis=2>("past_key_values.{k}.key", kc{k})
            "present.{k}.value" = Concat<axis=2>("past_key_values.{k}.value", vc{k})
            kt{k} = Transpose<perm=[0,1,3,2]>("present.{k}.key")
            sc{k} = MatMul(qc{k}, kt{k})  p{k} = Softmax(sc{k})
            a{k} = MatMul(p{k}, "present.{k}.value")  at{k} = Transpose<perm=[0,2,1,3]>(a{k})
            f{k} = Reshape(at{k}, join)  {ends[0]}  r{k} = Add({stream}, b{k})
            h{k} = MatMul(r{k}, up{k})  i{k} = Relu(h{k})  {ends[1]}  z{k} = Add(r{k}, j{k})"""
        )
        stream = f"z{k}"
    return f"""{HEADER} net (int64[B,T] input_ids, {past}, float[20,8] e, float[8,20] w,
        float[99,8] table, {", ".join(weights)})
        => (float[B,T,20] logits, {present})
        <int64[4] split = {{0, 0, {HEADS}, 4}}, int64[3] join = {{0, 0, {wide}}},
         int64 zero = {{0}}, int64[2] rows{wide} = {{-1, {wide}}},
         int64[2] rows12 = {{-1, 12}}, int64[1] eight = {{8}}> {{
            words = Gather(e, input_ids)  long = Shape<start=2, end=3>("past_key_values.0.key")
            zeros = Mul(input_ids, zero)  at = Add(zeros, long)  place = Gather(table, at)
            x = Add(words, place)  ids = Shape(input_ids)  whole = Concat<axis=0>(ids, eight)
            {" ".join(body)}  logits = MatMul({stream}, w) }}"""


INPUTS = ["input_ids", "attention_mask"]
INPUTS += [f"past_key_values.{k}.{kind}" for k in range(BLOCKS) for kind in ("key", "value")]
NETWORKS = {"builders": builders(), "exported": exported(), "biased": exported("biased")}


def graph_of(name: str) -> ChannelGraph:
    return mg.lift(model_from_text(NETWORKS[name], inputs=INPUTS))


def without(graph: ChannelGraph, *numbers: int) -> mg.Plan:
    """A plan that removes blocks."""
    mortal = frozenset(g.index for g in graph.groups if g.resizable)
    whole = blocks(branches(graph, mortal))
    assert [len(block.groups) for block in whole] == [2] * BLOCKS
    dead = [graph.groups[k].id for n in numbers for k in whole[n].groups]
    return set_widths(graph, dict.fromkeys(dead, 0))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("numbers", [(0,), (1, 2)])
def test_a_block_goes_with_its_cache(name: str, numbers: tuple[int, ...]) -> None:
    """Proved in two steps of decoding against the masked original; the caches are those left."""
    graph = graph_of(name)
    plan = without(graph, *numbers)
    assert prove_plan(graph, plan, faults=6).ok
    small = mg.apply(graph, plan)
    left = [k for k in range(BLOCKS) if k not in numbers]
    caches_left = {f"{k}.{kind}" for k in left for kind in ("key", "value")}
    found = [v.name or "" for v in (*small.graph.inputs, *small.graph.outputs)]
    assert {
        n.removeprefix("past_key_values.") for n in found if n.startswith("past")
    } == caches_left
    assert {n.removeprefix("present.") for n in found if n.startswith("present")} == caches_left


def test_the_network_without_a_block_is_the_one_that_was_written_without_it() -> None:
    graph = graph_of("builders")
    small = mg.apply(graph, without(graph, 2))
    text = builders((0, 1)).replace("MatMul(v2, w)", "MatMul(v1, w)")
    for kind in ("key", "value"):
        text = text.replace(f', float[B,{HEADS},L,16] "present.2.{kind}"', "")
        text = text.replace(f', float[B,{HEADS},P,16] "past_key_values.2.{kind}"', "")
    written = model_from_text(text, inputs=INPUTS)
    for name, value in list(written.graph.initializers.items()):
        if not value.uses():
            del written.graph.initializers[name]
        stored = graph.model.graph.initializers.get(name)
        if stored is not None and stored.const_value is not None:
            value.const_value = ir.Tensor(stored.const_value.numpy(), name=name)
    feeds = {"input_ids": np.array([[3, 1, 4]]), "attention_mask": np.ones((1, 3), np.int64)}
    feeds |= {
        f"past_key_values.{k}.{kind}": np.zeros((1, HEADS, 0, 16), np.float32)
        for k in range(2)
        for kind in ("key", "value")
    }
    expected, found = run(written, feeds), run(small, feeds)
    assert sorted(expected) == sorted(found)
    for name, array in expected.items():
        # Its last norm is another there: that of the block which is gone here.
        if name != "logits":
            np.testing.assert_allclose(found[name], array, atol=1e-5)
    assert all(node.op_type != "Expand" for node in small.graph)


def test_the_last_cache_stays_where_its_length_is_read() -> None:
    graph = graph_of("exported")
    with pytest.raises(PlanError, match=r"reads how long the cache 'past_key_values\.0\.key' is"):
        without(graph, *range(BLOCKS))
    fused = graph_of("builders")
    small = mg.apply(fused, without(fused, *range(BLOCKS)))
    assert [v.name for v in small.graph.outputs] == ["logits"]


def test_data_let_blocks_go_and_the_folder_counts_them(tmp_path: Path) -> None:
    """The one whose output is nothing goes first; names and config are those that are left."""
    model = model_from_text(NETWORKS["builders"], inputs=INPUTS)
    for name in ("o1", "dn1"):
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.Tensor(1e-3 * value.const_value.numpy(), name=name)
    large = tmp_path / "large"
    large.mkdir()
    ir.save(model, large / "model.onnx")
    names = {
        "inputs": {f"past_{n}_names": f"past_key_values.%d.{n}" for n in ("key", "value")},
        "outputs": {f"present_{n}_names": f"present.%d.{n}" for n in ("key", "value")},
    }
    sizes = {
        "num_hidden_layers": BLOCKS,
        "head_size": 16,
        "hidden_size": 8,
        "filename": "model.onnx",
    }
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
    config = {"model": {"decoder": sizes | heads | names}}
    (large / "genai_config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    data = {
        "input_ids": generator.integers(0, 20, (30, 6)),
        "attention_mask": np.ones((30, 6), int),
    }
    empty = np.zeros((30, HEADS, 0, 16), np.float32)
    data |= {name: empty for name in INPUTS if name.startswith("past")}
    graph = mg.lift(large / "model.onnx")
    hidden = [group.id for group in graph.groups if group.width == 8]
    # Without a block there are two thirds, and what a fit adds in biases.
    result = mg.shrink(graph, data, {"body_params": "75%"}, depth="blocks", exclude=hidden)
    left = {"present.0.key", "present.0.value", "present.2.key", "present.2.value"}
    assert {v.name for v in result.model.graph.outputs} == {"logits", *left}
    source = folder_of(large)
    assert source is not None
    write_folder(graph, result.plan, result.model, source, tmp_path / "small")
    decoder = json.loads((tmp_path / "small" / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["num_hidden_layers"] == 2
    written = ir.load(tmp_path / "small" / "model.onnx")
    assert {v.name for v in written.graph.inputs} >= {
        f"past_key_values.{k}.{kind}" for k in (0, 1) for kind in ("key", "value")
    }


@pytest.mark.parametrize("tune", [0, 4])
def test_caches_that_are_given_lose_the_heads_that_go(tune: int) -> None:
    """The original is fed whole caches, the resized network those of its heads."""
    graph = graph_of("builders")
    generator = np.random.default_rng(0)
    data = {
        "input_ids": generator.integers(0, 20, (30, 1)),
        "attention_mask": np.ones((30, 4), int),
    }
    past = [name for name in INPUTS if name.startswith("past")]
    data |= {n: generator.standard_normal((30, HEADS, 3, 16)).astype(np.float32) for n in past}
    attention = [group.id for group in graph.groups if group.width == HEADS]
    assert len(attention) == BLOCKS
    budget = {"body_params": "75%"}
    result = mg.shrink(graph, data, budget, include=attention, round_to=1, tune=tune, curve=True)
    assert result.check is not None
    assert result.check.ok
    selection = AxisSelection(graph, result.plan.keep_channels(graph))
    assert any(selection.cuts(name) for name in past)
    # The errors that it tells are those of ONNX Runtime with the heads that stay.
    held_out = Shrinker(graph, data).aside()
    kept, off, spread = selection.positions, list[float](), list[float]()
    for feeds in held_out:
        fewer = {v.name or "": kept(feeds)[v.name or ""] for v in result.model.graph.inputs}
        one, other = run(graph.model, feeds)["logits"], run(result.model, fewer)["logits"]
        off.append(float(np.square(one - other).sum()))
        spread.append(float(np.square(one).sum()))
    (told,) = (each.error for each in result.error if each.name == "logits")
    assert told == pytest.approx(np.sqrt(sum(off) / sum(spread)), rel=1e-4)
    assert told > 1e-4


@pytest.mark.parametrize(
    ("kind", "operands", "left"),
    [
        ("SkipLayerNormalization<epsilon=0.1>", "x, e, g, h, k", "LayerNormalization"),
        ("SkipLayerNormalization", "e, x, g", "LayerNormalization"),
        ("SkipSimplifiedLayerNormalization", "x, e, g, k", "SimplifiedLayerNormalization"),
    ],
)
@pytest.mark.parametrize("shown", ["n", "t"])
def test_a_norm_that_was_fused_with_a_sum_stands_alone(
    kind: str, operands: str, left: str, shown: str
) -> None:
    """What the branch leaves is added, and so is a bias; the batch and the length are open."""
    further = {"n": "y = MatMul(n, w)", "t": "a = MatMul(n, w)  b = MatMul(t, w)  y = Mul(a, b)"}
    text = f"""{HEADER} net (float[B,T,8] x, float[8,12] u, float[12] c, float[12,8] v, float[8] d,
        float[8] g, float[8] h, float[8] k, float[8,3] w, float[8] m) => (float[B,T,3] y) {{
        i = MatMul(x, u)  j = Add(i, c)  r = Relu(j)  f = MatMul(r, v)  e = Add(f, d)
        q = SimplifiedLayerNormalization(x, m)
        n0, , , t0 = com.microsoft.{kind}({operands})  n = Add(n0, q)  t = Relu(t0)
        {further[shown]} }}"""
    graph = mg.lift(model_from_text(text))
    (inner,) = [group for group in graph.groups if group.width == 12]
    small = mg.apply(graph, set_widths(graph, {inner.id: 0}))
    kinds = [node.op_type for node in small.graph]
    assert left in kinds
    assert not any(each.startswith("Skip") for each in kinds)
    assert kinds.count("MatMul") == (1 if shown == "n" else 2)
