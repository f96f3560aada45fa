"""Write the table of operators in docs/reference.md from the registry.

Each operator is described on a small example, and what its entry said is written down: the line of
notation, the multiply-adds, the factors that it sums or competes over. ``tests/test_docs.py`` holds
the page against :func:`updated`.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import onnx_ir as ir

from morphgraph import ops
from morphgraph.notation import NotationError
from morphgraph.ops import Description, Op, OpNode, described_ops, entry_of
from morphgraph.ops.barriers import Barrier
from morphgraph.ops.op import UnsupportedFormError, from_line

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"
BEGIN = "<!-- operators, written by tools/write_reference.py -->"
END = "<!-- end of operators -->"

_FAMILIES = {
    "contraction": "Convolutions and matrix products",
    "attention": "Attention",
    "linear_attention": "Attention with a state of fixed size",
    "einsum": "Einsum",
    "norm": "Normalizations",
    "recurrent": "Recurrent layers",
    "activation": "Activations",
    "elementwise": "Element by element",
    "reduce": "Reductions",
    "pool": "Pooling",
    "rearrange": "Channels to space, repetition",
    "movement": "Data movement",
    "indexing": "Reading and writing at indices",
    "selection": "Choosing, ranking, accumulating",
    "reshape": "Reshape",
    "padding": "Padding",
    "interpolation": "Interpolation",
    "vision": "Sampling, regions, patches",
    "quantize": "Quantized numbers",
    "contrib": "ONNX Runtime's own (`com.microsoft`)",
    "contrib_attention": "ONNX Runtime's own, around attention (`com.microsoft`)",
    "contrib_linear_attention": (
        "ONNX Runtime's own, attention with a state of fixed size (`com.microsoft`)"
    ),
    "contrib_decoding": "ONNX Runtime's own, of decoders (`com.microsoft`)",
    "contrib_moe": "ONNX Runtime's own, mixtures of experts (`com.microsoft`)",
    "contrib_quantize": "ONNX Runtime's own, quantized (`com.microsoft`)",
    "contrib_blocks": "ONNX Runtime's own, in few bits (`com.microsoft`)",
    "ml": "Features of tables (`ai.onnx.ml`)",
    "barriers": "Barriers",
    "sizes": "Computing with sizes",
}
# Entries of these families write index maps, not lines; their docstring says what moves.
_MAPPED = (
    *("movement", "reshape", "padding", "interpolation", "indexing", "sizes"),
    "com.microsoft::QLinearConcat",
)


@dataclass(frozen=True, slots=True)
class Example:
    """A node to be described: ``"2x8, 4x8 -> 2x4"``, attributes, and a constant last operand."""

    shapes: str
    attributes: Mapping[str, Any]
    constant: tuple[int, ...] | None = None


_IMAGE = "2x8x6x6"
_QUANTIZED = (
    Example(f"{_IMAGE}, 1, 1 -> {_IMAGE}", {}),
    Example(f"{_IMAGE}, 8, 8 -> {_IMAGE}", {}),
)
_QUANTIZED_PAIR = (Example(f"{_IMAGE}, 1, 1, {_IMAGE}, 1, 1, 1, 1 -> {_IMAGE}", {}),)
_EXAMPLES: Mapping[str, tuple[Example, ...]] = {
    "Attention": (
        Example("2x6x5x4, 2x3x7x4, 2x3x7x2 -> 2x6x5x2", {}),
        Example("2x5x24, 2x7x12, 2x7x6 -> 2x5x12", {"q_num_heads": 6, "kv_num_heads": 3}),
    ),
    "BatchNormalization": (Example(f"{_IMAGE}, 8, 8, 8, 8 -> {_IMAGE}", {}),),
    "Conv": (
        Example(f"{_IMAGE}, 4x8x3x3, 4 -> 2x4x4x4", {}),
        Example(f"{_IMAGE}, 4x4x3x3, 4 -> 2x4x4x4", {"group": 2}),
        Example(f"{_IMAGE}, 16x1x3x3, 16 -> 2x16x4x4", {"group": 8}),
    ),
    "ConvTranspose": (
        Example(f"{_IMAGE}, 8x4x3x3, 4 -> 2x4x8x8", {}),
        Example(f"{_IMAGE}, 8x4x3x3, 8 -> 2x8x8x8", {"group": 2}),
        Example(f"{_IMAGE}, 8x1x3x3, 8 -> 2x8x8x8", {"group": 8}),
        Example(f"{_IMAGE}, 8x2x3x3, 16 -> 2x16x8x8", {"group": 8}),
    ),
    "AffineGrid": (Example("2x2x3, 4 -> 2x6x6x2", {}),),
    "Col2Im": (Example("2x32x9, 2, 2 -> 2x8x6x6", {}, (2, 2)),),
    "DeformConv": (
        Example(f"{_IMAGE}, 4x8x3x3, 2x36x4x4, 4, 2x18x4x4 -> 2x4x4x4", {"offset_group": 2}),
        Example(f"{_IMAGE}, 4x4x3x3, 2x18x4x4, 4, 2x9x4x4 -> 2x4x4x4", {"group": 2}),
        Example(f"{_IMAGE}, 8x1x3x3, 2x18x4x4, 8, 2x9x4x4 -> 2x8x4x4", {"group": 8}),
    ),
    "CausalConvWithState": (Example("2x8x6, 8x1x3, 8, 2x8x2 -> 2x8x6, 2x8x2", {}),),
    "LinearAttention": (
        Example(
            "2x5x24, 2x5x12, 2x5x6, 2x3x4x2, 2x5x3, 2x5x3 -> 2x5x12, 2x3x4x2",
            {"q_num_heads": 6, "kv_num_heads": 3},
        ),
    ),
    "com.microsoft::CausalConvWithState": (
        Example("2x8x6, 8x1x3, 8, 2x8x2 -> 2x8x6, 2x8x2", {}),
        Example("2x6x8, 8x1x3, 8, 2x2x8 -> 2x6x8, 2x2x8", {"channels_last": 1}),
    ),
    "com.microsoft::LinearAttention": (
        Example(
            "2x5x12, 2x5x24, 2x5x12, 2x6x4x2, 2x5x6, 2x5x6 -> 2x5x12, 2x6x4x2",
            {"q_num_heads": 3, "kv_num_heads": 6},
        ),
    ),
    "com.microsoft::LinearAttentionGate": (Example("2x5x3, 3, 3, 2x5x3 -> 2x5x3, 2x5x3", {}),),
    "com.microsoft::SwiGLU": (Example("2x8, 2x8 -> 2x8", {}), Example("2x8 -> 2x4", {})),
    "GridSample": (Example(f"{_IMAGE}, 2x4x4x2 -> 2x8x4x4", {}),),
    "MaxRoiPool": (Example(f"{_IMAGE}, 3x5 -> 3x8x4x4", {}),),
    "MaxUnpool": (Example(f"2x8x3x3, 2x8x3x3, 4 -> {_IMAGE}", {}),),
    "RoiAlign": (Example(f"{_IMAGE}, 3x4, 3 -> 3x8x4x4", {}),),
    "ArgMax": (Example(f"{_IMAGE} -> 2x1x6x6", {"axis": 1}),),
    "ArgMin": (Example(f"{_IMAGE} -> 2x1x6x6", {"axis": 1}),),
    "ConvInteger": (
        Example(f"{_IMAGE}, 4x8x3x3, 1, 4 -> 2x4x4x4", {}),
        Example(f"{_IMAGE}, 4x4x3x3, 1, 4 -> 2x4x4x4", {"group": 2}),
        Example(f"{_IMAGE}, 16x1x3x3, 1, 16 -> 2x16x4x4", {"group": 8}),
    ),
    "DequantizeLinear": _QUANTIZED,
    "DynamicQuantizeLinear": (Example("2x8 -> 2x8", {}),),
    "MatMulInteger": (Example("2x6x8, 8x4, 1, 4 -> 2x6x4", {}),),
    "QLinearConv": (
        Example(f"{_IMAGE}, 1, 1, 4x8x3x3, 4, 4, 1, 1, 4 -> 2x4x4x4", {}),
        Example(f"{_IMAGE}, 1, 1, 4x4x3x3, 4, 4, 1, 1, 4 -> 2x4x4x4", {"group": 2}),
        Example(f"{_IMAGE}, 1, 1, 16x1x3x3, 16, 16, 1, 1, 16 -> 2x16x4x4", {"group": 8}),
    ),
    "QLinearMatMul": (Example("2x6x8, 1, 1, 8x4, 4, 4, 1, 1 -> 2x6x4", {}),),
    "QuantizeLinear": _QUANTIZED,
    "com.microsoft::Attention": (Example("2x6x8, 8x24, 24 -> 2x6x8", {"num_heads": 2}),),
    "com.microsoft::FusedConv": (
        Example(f"{_IMAGE}, 4x8x3x3, 4, 2x4x4x4 -> 2x4x4x4", {}),
        Example(f"{_IMAGE}, 4x4x3x3, 4, 2x4x4x4 -> 2x4x4x4", {"group": 2}),
        Example(f"{_IMAGE}, 16x1x3x3, 16, 2x16x4x4 -> 2x16x4x4", {"group": 8}),
    ),
    "com.microsoft::FusedGemm": (Example("2x8, 8x4, 4 -> 2x4", {}),),
    "com.microsoft::FusedMatMul": (Example("2x6x8, 2x8x4 -> 2x6x4", {}),),
    "ai.onnx.ml::Imputer": (Example("2x8 -> 2x8", {}),),
    "ai.onnx.ml::Scaler": (Example("2x8 -> 2x8", {}),),
    "com.microsoft::DynamicQuantizeLSTM": (
        Example("5x2x3, 1x3x16, 1x4x16, 1x32, 2, 1x2x4, 1x2x4 -> 5x1x2x4, 1x2x4, 1x2x4", {}),
    ),
    "com.microsoft::DynamicQuantizeMatMul": (Example("2x6x8, 8x4, 4, 4, 4 -> 2x6x4", {}),),
    "com.microsoft::MatMulIntegerToFloat": (Example("2x6x8, 8x4, 1, 4, 1, 4, 4 -> 2x6x4", {}),),
    "com.microsoft::MoE": (
        Example("5x8, 5x4, 4x6x8, 4x6, 4x8x6, 4x8 -> 5x8", {"k": 2}),
        Example(
            "5x8, 5x4, 4x12x8, 4x12, 4x8x6, 4x8 -> 5x8",
            {"k": 2, "activation_type": "swiglu", "swiglu_fusion": 1},
        ),
    ),
    "com.microsoft::QMoE": (
        Example("5x8, 5x4, 4x6x4, 4x6, 4x6, 4x8x3, 4x8, 4x8 -> 5x8", {"k": 2}),
    ),
    "com.microsoft::MatMulNBits": (
        Example("2x6x32, 4x2x8, 4x2 -> 2x6x4", {"K": 32, "N": 4, "bits": 4, "block_size": 16}),
    ),
    "com.microsoft::GatherBlockQuantized": (
        Example("9x16, 2x5, 9x2 -> 2x5x32", {"bits": 4, "block_size": 16, "quantize_axis": 1}),
    ),
    "com.microsoft::QLinearSoftmax": (
        Example(f"{_IMAGE}, 1, 1, 1, 1 -> {_IMAGE}", {"axis": 1, "opset": 13}),
    ),
    "com.microsoft::EmbedLayerNormalization": (
        Example("2x5, 2x5, 20x8, 9x8, 2x8, 8, 8 -> 2x5x8, 2, 2x5x8", {}),
    ),
    "com.microsoft::GroupQueryAttention": (
        Example(
            "2x5x64, 2x5x32, 2x5x32, 2x2x3x16, 2x2x3x16, 2, 1 -> 2x5x64, 2x2x8x16, 2x2x8x16",
            {"num_heads": 4, "kv_num_heads": 2},
        ),
    ),
    "com.microsoft::MultiHeadAttention": (
        Example("2x5x8, 2x7x8, 2x7x8 -> 2x5x8", {"num_heads": 2}),
        Example(
            "2x5x8, 2x7x8, 2x7x8, 24, 2x10, 2x2x5x10, 2x2x3x4, 2x2x3x4"
            " -> 2x5x8, 2x2x10x4, 2x2x10x4",
            {"num_heads": 2},
        ),
    ),
    "com.microsoft::QAttention": (
        Example("2x6x8, 8x24, 24, 1, 1, 2, 1, 1 -> 2x6x8", {"num_heads": 2}),
    ),
    "com.microsoft::RotaryEmbedding": (
        Example("2x5x24, 2x5, 9x2, 9x2 -> 2x5x24", {"num_heads": 6}),
        Example("2x6x5x4, 1, 9x2, 9x2 -> 2x6x5x4", {"interleaved": 1}),
        Example("2x5x24, 1, 9x1, 9x1 -> 2x5x24", {"num_heads": 6, "rotary_embedding_dim": 2}),
    ),
    "com.microsoft::QGemm": (Example("2x8, 1, 1, 8x4, 4, 4, 4, 1, 1 -> 2x4", {}),),
    "com.microsoft::QLinearAdd": _QUANTIZED_PAIR,
    "com.microsoft::QLinearAveragePool": (Example(f"{_IMAGE}, 1, 1, 1, 1 -> 2x8x3x3", {}),),
    "com.microsoft::QLinearGlobalAveragePool": (Example(f"{_IMAGE}, 1, 1, 1, 1 -> 2x8x1x1", {}),),
    "com.microsoft::QLinearLeakyRelu": (Example(f"{_IMAGE}, 1, 1, 1, 1 -> {_IMAGE}", {}),),
    "com.microsoft::QLinearMul": _QUANTIZED_PAIR,
    "com.microsoft::QLinearSigmoid": (Example(f"{_IMAGE}, 1, 1, 1, 1 -> {_IMAGE}", {}),),
    "com.microsoft::SkipLayerNormalization": (Example("2x6x8, 2x6x8, 8, 8, 8 -> 2x6x8", {}),),
    "com.microsoft::SkipSimplifiedLayerNormalization": (
        Example("2x6x8, 2x6x8, 8, 8 -> 2x6x8", {}),
    ),
    "CumProd": (Example(f"{_IMAGE}, 1 -> {_IMAGE}", {}, (1,)),),
    "CumSum": (Example(f"{_IMAGE}, 1 -> {_IMAGE}", {}, (1,)),),
    "DFT": (Example("2x8x6x1 -> 2x8x6x2", {}),),
    "Det": (Example("2x6x6 -> 2", {}),),
    "EyeLike": (Example("6x6 -> 6x6", {}),),
    "OneHot": (Example("2x8, 1, 2 -> 2x8x6", {}),),
    "ReverseSequence": (Example("6x2x8, 2 -> 6x2x8", {}),),
    "STFT": (Example("2x6x1, 1, 6 -> 2x6x6x2", {}),),
    "TopK": (Example("2x8x6, 1 -> 2x8x3, 2x8x3", {}),),
    "DepthToSpace": (
        Example(f"{_IMAGE} -> 2x2x12x12", {"blocksize": 2}),
        Example(f"{_IMAGE} -> 2x2x12x12", {"blocksize": 2, "mode": "CRD"}),
    ),
    "Einsum": (Example("2x6x8, 4x8 -> 2x6x4", {"equation": "...i,oi->...o"}),),
    "Gemm": (
        Example("2x8, 4x8, 4 -> 2x4", {"transB": 1}),
        Example("2x8, 8x4, 4 -> 2x4", {}),
    ),
    "GroupNormalization": (
        Example(f"{_IMAGE}, 8, 8 -> {_IMAGE}", {"num_groups": 2}),
        Example(f"{_IMAGE}, 2, 2 -> {_IMAGE}", {"num_groups": 2}),
    ),
    "InstanceNormalization": (Example(f"{_IMAGE}, 8, 8 -> {_IMAGE}", {}),),
    "LayerNormalization": (Example("2x6x8, 8, 8 -> 2x6x8", {"axis": -1}),),
    "MatMul": (Example("2x6x8, 8x4 -> 2x6x4", {}),),
    "MeanVarianceNormalization": (Example(f"{_IMAGE} -> {_IMAGE}", {}),),
    "RMSNormalization": (Example("2x6x8, 8 -> 2x6x8", {}),),
    "RotaryEmbedding": (
        Example("2x6x5x4, 2x5x2, 2x5x2 -> 2x6x5x4", {}),
        Example("2x6x5x4, 2x5x2, 2x5x2 -> 2x6x5x4", {"interleaved": 1}),
        Example("2x5x24, 2x5x2, 2x5x2 -> 2x5x24", {"num_heads": 6}),
    ),
    "GRU": (
        Example("5x2x3, 1x12x3, 1x12x4, 1x24, 2, 1x2x4 -> 5x1x2x4, 1x2x4", {}),
        Example("2x5x3, 1x12x3, 1x12x4, 1x24, 2, 2x1x4 -> 2x5x1x4, 2x1x4", {"layout": 1}),
    ),
    "LSTM": (
        Example("5x2x3, 1x16x3, 1x16x4, 1x32, 2, 1x2x4, 1x2x4, 1x12 -> 5x1x2x4, 1x2x4, 1x2x4", {}),
        Example(
            "2x5x3, 1x16x3, 1x16x4, 1x32, 2, 2x1x4, 2x1x4, 1x12 -> 2x5x1x4, 2x1x4, 2x1x4",
            {"layout": 1},
        ),
    ),
    "RNN": (
        Example("5x2x3, 1x4x3, 1x4x4, 1x8, 2, 1x2x4 -> 5x1x2x4, 1x2x4", {}),
        Example("2x5x3, 1x4x3, 1x4x4, 1x8, 2, 2x1x4 -> 2x5x1x4, 2x1x4", {"layout": 1}),
    ),
    "SpaceToDepth": (Example(f"{_IMAGE} -> 2x32x3x3", {"blocksize": 2}),),
    "Tile": (Example("2x8, 2 -> 2x16", {}, (1, 2)),),
}
# All others take operands of one shape and keep it, pool space away, or reduce one axis.
_USUAL = (
    Example(f"{_IMAGE}, {_IMAGE} -> {_IMAGE}", {}),
    Example(f"{_IMAGE} -> {_IMAGE}", {}),
    Example(f"{_IMAGE} -> 2x1x6x6", {"axes": (1,)}),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What operators of one kind say of themselves."""

    line: str
    macs: str = ""
    contracted: str = ""
    statistical: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row's cells behind the operators' names."""
        shown = (_code(self.line) if "->" in self.line else self.line, _code(self.macs))
        return *shown, _code(self.contracted), _code(self.statistical)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def table() -> str:
    """The Markdown tables of all operators, one per family."""
    families: dict[str, dict[tuple[Row, ...], list[str]]] = {name: {} for name in _FAMILIES}
    for op_type in described_ops():
        name = op_type.rpartition("::")[2]
        entry = _entry(op_type)
        package, _, family = entry.__module__.rpartition(".")
        if package != ops.__name__ or family == "custom":
            continue  # taught by `register`, not part of the program
        rows = families.setdefault(family, {})
        rows.setdefault(_rows(op_type, family), []).append(name)
    return "\n\n".join(
        _family(_FAMILIES.get(name, name), rows) for name, rows in families.items() if rows
    )


def _entry(op_type: str) -> type[Op]:
    domain, _, name = op_type.rpartition("::")
    entry = entry_of(name, domain)
    assert entry is not None
    return entry


def _family(title: str, rows: Mapping[tuple[Row, ...], list[str]]) -> str:
    head = ("operators", "line", "multiply-adds", "sums over", "competes over")
    body = [
        ((", ".join(names) if k == 0 else ""), *row.cells())
        for forms, names in rows.items()
        for k, row in enumerate(forms)
    ]
    used = [k for k in range(len(head)) if k < 2 or any(cells[k] for cells in body)]
    lines = [
        "| " + " | ".join(cells[k] for k in used) + " |"
        for cells in (head, ("---",) * len(head), *body)
    ]
    return f"### {title}\n\n" + "\n".join(lines)


def _rows(op_type: str, family: str) -> tuple[Row, ...]:
    entry = _entry(op_type)
    if issubclass(entry, Barrier):
        return (Row(entry.reason),)
    words = (entry.__doc__ or "").split("\n\n")[0].strip().removesuffix(".")
    if family in _MAPPED or op_type in _MAPPED:
        return (Row(f"index map: {words[0].lower()}{words[1:]}" if words else "index map"),)
    if op_type in _EXAMPLES:
        return tuple(dict.fromkeys(_described(op_type, example) for example in _EXAMPLES[op_type]))
    for example in _USUAL:
        try:
            return (_described(op_type, example),)
        except (NotationError, UnsupportedFormError):
            continue
    raise SystemExit(f"{op_type}: no usual example fits; add one to _EXAMPLES")


def _described(op_type: str, example: Example) -> Row:
    """Call the operator's entry and listen to what it says to ``from_line``."""
    heard: list[Row] = []

    def listen(n: OpNode, line: str, *args: Any, **facts: Any) -> Description:
        names = ("macs", "contracted", "statistical")
        heard.append(Row(line, **{name: facts[name] or "" for name in names if name in facts}))
        return from_line(n, line, *args, **facts)

    node, entry = _node(op_type, example), _entry(op_type)
    with ExitStack() as patches:
        for family in _FAMILIES:  # an entry may ask another family for its line
            module = import_module(f"{ops.__name__}.{family}")
            if hasattr(module, "from_line"):
                patches.enter_context(patch.object(module, "from_line", listen))
        entry.call(entry.describe, node, OpNode(node, frozenset({"in1", "in2"})))
    assert heard, f"{op_type}: is described without a line; add its family to _MAPPED"
    return heard[0]


def _node(op_type: str, example: Example) -> ir.Node:
    operands, results = (
        [[int(size) for size in shape.split("x")] for shape in side.split(", ")]
        for side in example.shapes.split(" -> ")
    )
    inputs = [ir.val(f"in{k}", ir.DataType.FLOAT, shape) for k, shape in enumerate(operands)]
    if example.constant is not None:
        inputs[-1].const_value = ir.tensor(list(example.constant), dtype=ir.DataType.INT64)
    outputs = [ir.val(f"out{k}", ir.DataType.FLOAT, shape) for k, shape in enumerate(results)]
    domain, _, name = op_type.rpartition("::")
    return ir.node(
        name, inputs, dict(example.attributes), outputs=outputs, name=name, domain=domain
    )


def without_lowering() -> str:
    """The Markdown table of the forms that lowerings refuse, read off their calls of ``b.fail``."""
    refused: dict[tuple[str, ...], list[str]] = {}
    for op_type in described_ops():
        entry = _entry(op_type)
        if entry.__module__.rpartition(".")[0] != ops.__name__ or issubclass(entry, Barrier):
            continue
        found = ["it has no lowering"] if entry.lower is None else _refusals(entry.lower, set())
        reasons = tuple(dict.fromkeys(found))
        if reasons:
            refused.setdefault(reasons, []).append(op_type)
    rows = [f"| {', '.join(names)} | {'; '.join(reasons)} |" for reasons, names in refused.items()]
    head = "| operators | what `to_torch` refuses, by the node's name |"
    return "\n".join(["### Forms without a lowering", "", head, "| --- | --- |", *rows])


def _refusals(function: Any, seen: set[Any]) -> Iterator[str]:
    """The reasons that a function of this package, and those that it calls, may give."""
    written = function if inspect.isroutine(function) or isinstance(function, type) else None
    written = type(function) if written is None else inspect.unwrap(function)
    module = getattr(written, "__module__", "") or ""
    if written in seen or module.rpartition(".")[0] != ops.__name__:
        return
    seen.add(written)
    names = vars(import_module(module))
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(written)))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "b.fail":
            reason = node.args[1]
            parts = reason.values if isinstance(reason, ast.JoinedStr) else [reason]
            yield "".join(_part(part) for part in parts)
        elif isinstance(node, ast.Name) and callable(names.get(node.id)):
            yield from _refusals(names[node.id], seen)


def _part(part: ast.expr) -> str:
    if isinstance(part, ast.FormattedValue):
        return f"*{ast.unparse(part.value).rpartition('.')[2]}*"
    assert isinstance(part, ast.Constant)
    return str(part.value)


def updated(page: str) -> str:
    """The page with the tables as the registry has them now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{without_lowering()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(PAGE.relative_to(PAGE.parent.parent))
