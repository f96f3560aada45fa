"""A decoder of two bodies in one If, as Optimum merges them: the first step, and those after it.

The mask is named after the first step: as long as the new tokens. Weights stand outside of the If.
"""

from pathlib import Path

import numpy as np
import onnx

BLOCKS, HEADS, SIZE, WIDTH, IDS = 2, 2, 4, 8, 20
FLAG = "use_cache_branch"


def _body(past: bool) -> str:
    """Nodes of a branch; one with a past joins it with what is new, and looks at the whole mask."""
    lines = ["x = Gather(e, input_ids)  shape = Shape(input_ids)"]
    stream = "x"
    for k in range(BLOCKS):
        key = (
            f'c{k} = Concat<axis=2>("past_key_values.{k}.key", b{k})'
            if past
            else f"c{k} = Identity(b{k})"
        )
        lines.append(f"""
            q{k} = MatMul({stream}, wq{k})  k{k} = MatMul({stream}, wk{k})
            r{k} = Reshape(q{k}, heads)  s{k} = Reshape(k{k}, heads)
            a{k} = Transpose<perm=[0,2,1,3]>(r{k})  b{k} = Transpose<perm=[0,2,1,3]>(s{k})
            {key}
            d{k} = Transpose<perm=[0,1,3,2]>(c{k})  f{k} = MatMul(a{k}, d{k})
            g{k} = Add(f{k}, far)  p{k} = Softmax<axis=-1>(g{k})
            h{k} = MatMul(p{k}, c{k})  i{k} = Transpose<perm=[0,2,1,3]>(h{k})
            j{k} = Reshape(i{k}, flat)  l{k} = MatMul(j{k}, wo{k})  m{k} = Add({stream}, l{k})
            u{k} = MatMul(m{k}, up{k})  t{k} = Relu(u{k})  v{k} = MatMul(t{k}, dn{k})
            o{k} = Add(m{k}, v{k})""")
        stream = f"o{k}"
    results = "  ".join(f'"present.{k}.key" = Identity(c{k})' for k in range(BLOCKS))
    mask = """marks = Cast<to=1>(attention_mask)  miss = Sub(marks, one)  big = Mul(miss, thousand)
        far = Unsqueeze(big, middle)"""
    return f"{mask} {' '.join(lines)} {results} logits = MatMul({stream}, w)"


def merged() -> onnx.ModelProto:
    """The file; its cache of every block holds keys that serve as values as well."""
    past = ", ".join(f'float[B,{HEADS},P,{SIZE}] "past_key_values.{k}.key"' for k in range(BLOCKS))
    present = ", ".join(f'float[B,{HEADS},L,{SIZE}] "present.{k}.key"' for k in range(BLOCKS))
    weights = ", ".join(
        f"float[{WIDTH},{HEADS * SIZE}] wq{k}, float[{WIDTH},{HEADS * SIZE}] wk{k}, "
        f"float[{HEADS * SIZE},{WIDTH}] wo{k}, float[{WIDTH},12] up{k}, float[12,{WIDTH}] dn{k}"
        for k in range(BLOCKS)
    )
    names = ", ".join(f'"present.{k}.key"' for k in range(BLOCKS))
    head = '<ir_version: 10, opset_import: ["": 20]>'
    outputs = f"float[B,T,{IDS}] logits, {present}"
    model = onnx.parser.parse_model(f"""{head}
        net (int64[B,T] input_ids, int64[B,T] attention_mask, {past}, bool[1] {FLAG}) => ({outputs})
        <float[{IDS},{WIDTH}] e, float[{WIDTH},{IDS}] w, {weights},
         int64[4] heads = {{0, 0, {HEADS}, {SIZE}}}, int64[3] flat = {{0, 0, {HEADS * SIZE}}},
         float one = {{1.0}}, float thousand = {{1000.0}}, int64[2] middle = {{1, 2}}> {{
            logits, {names} = If ({FLAG}) <
                then_branch = later () => ({outputs}) {{ {_body(past=True)} }},
                else_branch = first () => ({outputs}) {{ {_body(past=False)} }}>
        }}""")
    generator = np.random.default_rng(0)
    for value in model.graph.value_info:
        sizes = [size.dim_value for size in value.type.tensor_type.shape.dim]
        numbers = generator.standard_normal(sizes) * sizes[0] ** -0.5
        array = numbers.astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del model.graph.value_info[:]
    return model


def write_merged(path: Path) -> Path:
    """The same as a file."""
    onnx.save(merged(), str(path))
    return path
