"""An encoder, a decoder's first step and its step with a cache, in files as Optimum writes them.

The files hold the same weights, which exporters name anew in each of them. Keys serve as values.
"""

import json
from pathlib import Path

import numpy as np
import onnx

BLOCKS, HEADS, SIZE, WIDTH, IDS = 2, 4, 3, 12, 20
INNER = {"encoder": 16, "decoder": 10}
ENCODER, FIRST, LATER = "encoder_model", "decoder_model", "decoder_with_past_model"
FLAG = "use_cache_branch"
MERGED = "decoder_model_merged"
CONFIG = {
    "model_type": "two-sided",
    "d_model": WIDTH,
    "d_kv": SIZE,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER["encoder"],
    "decoder_ffn_dim": INNER["decoder"],
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
    "vocab_size": IDS,
}


def _attention(at: str, stream: str, keys: str, weights: str) -> str:
    """Nodes that look at heads of keys ``[batch, heads, length, size]``, and add what they see."""
    return f"""
        {at}q = MatMul({stream}, {weights}q)  {at}r = Reshape({at}q, heads)
        {at}a = Transpose<perm=[0,2,1,3]>({at}r)
        {at}t = Transpose<perm=[0,1,3,2]>({keys})  {at}f = MatMul({at}a, {at}t)
        {at}p = Softmax<axis=-1>({at}f)  {at}h = MatMul({at}p, {keys})
        {at}i = Transpose<perm=[0,2,1,3]>({at}h)  {at}j = Reshape({at}i, flat)
        {at}l = MatMul({at}j, {weights}o)  {at}x = Add({stream}, {at}l)"""


def _keys(at: str, of: str, weights: str) -> str:
    return f"""
        {at}k = MatMul({of}, {weights}k)  {at}s = Reshape({at}k, heads)
        {at}b = Transpose<perm=[0,2,1,3]>({at}s)"""


def _mlp(at: str, stream: str, weights: str) -> str:
    return f"""
        {at}u = MatMul({stream}, {weights}up)  {at}v = Relu({at}u)
        {at}w = MatMul({at}v, {weights}dn)  {at}y = Add({stream}, {at}w)"""


def _encoder() -> str:
    nodes, stream = "hidden_0 = Gather(shared, input_ids)", "hidden_0"
    for k in range(BLOCKS):
        own, mlp = f"e{k}", f"m{k}"
        nodes += _keys(own, stream, f"en{k}") + _attention(own, stream, f"{own}b", f"en{k}")
        nodes += _mlp(mlp, f"{own}x", f"en{k}")
        stream = f"{mlp}y"
    return f"{nodes} last_hidden_state = Identity({stream})"


def _decoder(past: bool) -> str:
    nodes, stream, ends = "hidden_0 = Gather(shared, input_ids)", "hidden_0", ""
    for k in range(BLOCKS):
        own, look, mlp = f"s{k}", f"c{k}", f"m{k}"
        nodes += _keys(own, stream, f"de{k}")
        before = f'"past_key_values.{k}.decoder.key"'
        nodes += (
            f" {own}c = Concat<axis=2>({before}, {own}b)" if past else f" {own}c = Identity({own}b)"
        )
        nodes += _attention(own, stream, f"{own}c", f"de{k}")
        seen = f'"past_key_values.{k}.encoder.key"' if past else f"{look}b"
        nodes += "" if past else _keys(look, "encoder_hidden_states", f"cr{k}")
        nodes += _attention(look, f"{own}x", seen, f"cr{k}") + _mlp(mlp, f"{look}x", f"de{k}")
        stream = f"{mlp}y"
        ends += f'  "present.{k}.decoder.key" = Identity({own}c)'
        ends += "" if past else f'  "present.{k}.encoder.key" = Identity({look}b)'
    return f"{nodes} {ends} logits = MatMul({stream}, head)"


def _weights(generator: np.random.Generator) -> dict[str, np.ndarray]:
    own = HEADS * SIZE
    shapes = {"shared": (IDS, WIDTH), "head": (WIDTH, IDS)}
    for k in range(BLOCKS):
        for side in ("en", "de", "cr"):
            shapes |= {f"{side}{k}{name}": (WIDTH, own) for name in ("q", "k")}
            shapes[f"{side}{k}o"] = (own, WIDTH)
        for side, inner in INNER.items():
            shapes |= {f"{side[:2]}{k}up": (WIDTH, inner), f"{side[:2]}{k}dn": (inner, WIDTH)}
    return {
        name: (generator.standard_normal(shape) * shape[0] ** -0.5).astype(np.float32)
        for name, shape in shapes.items()
    }


def _file(inputs: str, outputs: str, nodes: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 18]> net ({inputs}) => ({outputs})
        <int64[4] heads = {{0, 0, {HEADS}, {SIZE}}}, int64[3] flat = {{0, 0, {HEADS * SIZE}}}>
        {{ {nodes} }}"""
    )
    used = {name for node in model.graph.node for name in node.input}
    for name, array in _weights(np.random.default_rng(0)).items():
        if name in used:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with names of weights as a tracer gives them, by number."""
    new = {
        value.name: f"onnx::MatMul_{k}"
        for k, value in enumerate(reversed(model.graph.initializer))
        if value.name not in ("heads", "flat")
    }
    for value in model.graph.initializer:
        value.name = new.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
    return model


def sided() -> dict[str, onnx.ModelProto]:
    """The files, by name."""
    pasts = ", ".join(
        f'float[B,{HEADS},{length},{SIZE}] "past_key_values.{k}.{side}.key"'
        for k in range(BLOCKS)
        for side, length in (("decoder", "P"), ("encoder", "S"))
    )
    presents = {
        side: ", ".join(
            f'float[B,{HEADS},{length},{SIZE}] "present.{k}.{side}.key"' for k in range(BLOCKS)
        )
        for side, length in (("decoder", "L"), ("encoder", "S"))
    }
    return {
        ENCODER: _file("int64[B,S] input_ids", f"float[B,S,{WIDTH}] last_hidden_state", _encoder()),
        FIRST: _file(
            f"int64[B,T] input_ids, float[B,S,{WIDTH}] encoder_hidden_states",
            f"float[B,T,{IDS}] logits, {presents['decoder']}, {presents['encoder']}",
            _decoder(past=False),
        ),
        LATER: _renamed(
            _file(
                f"int64[B,T] input_ids, {pasts}",
                f"float[B,T,{IDS}] logits, {presents['decoder']}",
                _decoder(past=True),
            )
        ),
    }


def merged_decoder(files: dict[str, onnx.ModelProto]) -> onnx.ModelProto:
    """Both networks of the decoder in the branches of one If; the later one gives no encoder's."""
    first, later = files[FIRST].graph, files[LATER].graph
    empty = [
        onnx.helper.make_node(
            "Constant", [], [value.name],
            value=onnx.numpy_helper.from_array(np.zeros((0, HEADS, 1, SIZE), np.float32)),
        )
        for value in first.output
        if value.name not in {each.name for each in later.output}
    ]  # fmt: skip
    outputs = list(first.output)
    branches = [
        onnx.helper.make_graph([*graph.node, *more], name, [], outputs)
        for graph, more, name in ((later, empty, "later"), (first, [], "first"))
    ]
    node = onnx.helper.make_node(
        "If", [FLAG], [value.name for value in outputs],
        then_branch=branches[0], else_branch=branches[1],
    )  # fmt: skip
    inputs = {value.name: value for value in (*first.input, *later.input)}
    flag = onnx.helper.make_tensor_value_info(FLAG, onnx.TensorProto.BOOL, [1])
    weights = {value.name: value for value in (*first.initializer, *later.initializer)}
    graph = onnx.helper.make_graph(
        [node], "merged", [*inputs.values(), flag], outputs, list(weights.values())
    )
    opsets = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)


def write_sided(folder: Path, config: dict[str, object] = CONFIG) -> Path:
    """The files in a folder with a config."""
    folder.mkdir()
    for name, model in sided().items():
        onnx.save(model, str(folder / f"{name}.onnx"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
