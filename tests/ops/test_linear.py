"""Operators as linear maps, held against what ONNX Runtime computes for random nodes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from morphgraph.ops import Linear, OpNode, facts_of

SEEDS = 25


@dataclass
class Case:
    """A node, its operand and its weights by port."""

    op_type: str
    arrays: Sequence[np.ndarray | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    operand: int = 0
    domain: str = ""
    results: int = 1


def taken(case: Case) -> tuple[Linear | None, np.ndarray]:
    """The node as a linear map, and what ONNX Runtime gives for it."""
    names = ["" if array is None else f"v{k}" for k, array in enumerate(case.arrays)]
    node = helper.make_node(
        case.op_type, names, ["y"], name="node", domain=case.domain, **case.attributes
    )
    given = {name: a for name, a in zip(names, case.arrays, strict=True) if a is not None}
    x = names[case.operand]
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, given[x].shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, name) for name, a in given.items() if name != x],
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    running = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = running.run(None, {x: given[x]})
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("y", TensorProto.FLOAT, result.shape)
    )
    mine = ir.from_proto(model)
    (entry,) = mine.graph
    facts = facts_of(entry)
    assert facts.linear is not None
    weights = frozenset(name for name in given if name != x)
    return facts.call(facts.linear, entry, OpNode(entry, weights)), result


def require_linear(case: Case, bias: np.ndarray | None = None, seed: int = 0) -> None:
    """``rows @ matrix + bias`` is the result wherever one looks; the kernel comes back whole."""
    linear, result = taken(case)
    assert linear is not None, case
    operand, kernel = case.arrays[linear.operand], case.arrays[linear.weight]
    assert operand is not None
    assert kernel is not None
    matrix = linear.matrix(kernel)
    maps, outputs, inputs, _ = matrix.shape
    assert matrix.size == kernel.size
    np.testing.assert_array_equal(linear.kernel(matrix, kernel.shape), kernel)
    places = linear.places(operand.shape, result.shape)
    assert places * maps * outputs == result.size
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(places, min(places, 40), replace=False))
    rows = linear.rows(operand, result.shape, chosen)
    assert rows.shape == (len(chosen), maps, inputs, matrix.shape[3])
    found = np.einsum("ngik,goik->ngo", rows, matrix, dtype=np.float64) * linear.factor
    expected = linear.results(result, chosen).astype(np.float64)
    if bias is not None:
        found = found + np.broadcast_to(bias, (maps * outputs,)).reshape(maps, outputs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    # All places together are all results, and what is spread over the result is one per output.
    every = linear.results(result, np.arange(places))
    np.testing.assert_array_equal(np.sort(every.ravel()), np.sort(result.ravel()))
    numbers = np.arange(maps * outputs, dtype=np.float64).reshape(maps, outputs)
    whole = np.broadcast_to(linear.spread(numbers, result.ndim), result.shape)
    np.testing.assert_array_equal(
        linear.results(whole, chosen), np.broadcast_to(numbers, (len(chosen), maps, outputs))
    )
    axis = linear.input_axis(operand.ndim)
    assert operand.shape[axis] == inputs * maps


def floats(generator: np.random.Generator, *shape: int) -> np.ndarray:
    return generator.normal(size=shape).astype(np.float32)


def drawn(generator: np.random.Generator, low: int, high: int, count: int) -> list[int]:
    return [int(n) for n in generator.integers(low, high + 1, count)]


def window(generator: np.random.Generator) -> tuple[int, dict[str, Any], list[int], list[int]]:
    """Spatial rank, attributes, kernel and positions of a convolution that gives something."""
    rank = int(generator.integers(1, 4))
    size, strides = drawn(generator, 1, 3, rank), drawn(generator, 1, 3, rank)
    dilations = drawn(generator, 1, 2, rank)
    positions = drawn(generator, 5, 8, rank)
    attributes: dict[str, Any] = {"kernel_shape": size}
    if generator.random() < 0.7:
        attributes["strides"] = strides
    if generator.random() < 0.6:
        attributes["dilations"] = dilations
    return rank, attributes, size, positions


def conv(generator: np.random.Generator) -> tuple[Case, np.ndarray | None]:
    rank, attributes, size, positions = window(generator)
    groups, inputs = drawn(generator, 1, 3, 2)
    outputs = int(generator.integers(1, 4))
    kind = generator.choice(["NOTSET", "", "SAME_UPPER", "SAME_LOWER", "VALID"])
    if kind:
        attributes["auto_pad"] = str(kind)
    if kind in ("NOTSET", "") and generator.random() < 0.8:
        attributes["pads"] = drawn(generator, 0, 2, 2 * rank)
    if groups > 1:
        attributes["group"] = groups
    x = floats(generator, int(generator.integers(1, 4)), groups * inputs, *positions)
    kernel = floats(generator, groups * outputs, inputs, *size)
    bias = floats(generator, groups * outputs) if generator.random() < 0.5 else None
    arrays = [x, kernel] if bias is None else [x, kernel, bias]
    return Case("Conv", arrays, attributes), bias


def conv_transpose(generator: np.random.Generator) -> tuple[Case, np.ndarray | None]:
    rank, attributes, size, positions = window(generator)
    groups, inputs = drawn(generator, 1, 3, 2)
    outputs = int(generator.integers(1, 4))
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    kind = str(generator.choice(["NOTSET", "", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if kind:
        attributes["auto_pad"] = kind
    if generator.random() < 0.4:
        attributes["output_padding"] = [
            int(generator.integers(0, max(s, d))) for s, d in zip(strides, dilations, strict=True)
        ]
    if kind in ("NOTSET", "") and generator.random() < 0.6:
        attributes["pads"] = drawn(generator, 0, 1, 2 * rank)
    if generator.random() < 0.4:
        full = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(positions, strides, size, dilations, strict=True)
        ]
        attributes["output_shape"] = [n - int(generator.integers(0, 3)) for n in full]
    if groups > 1:
        attributes["group"] = groups
    x = floats(generator, int(generator.integers(1, 3)), groups * inputs, *positions)
    kernel = floats(generator, groups * inputs, outputs, *size)
    bias = floats(generator, groups * outputs) if generator.random() < 0.5 else None
    arrays = [x, kernel] if bias is None else [x, kernel, bias]
    return Case("ConvTranspose", arrays, attributes), bias


def gemm(generator: np.random.Generator) -> tuple[Case, np.ndarray | None]:
    n, i, o = drawn(generator, 1, 5, 3)
    left, right = drawn(generator, 0, 1, 2)
    alpha, beta = (float(x) for x in generator.choice([-2.0, 0.5, 1.0, 3.0], 2))
    a = floats(generator, *((i, n) if left else (n, i)))
    b = floats(generator, *((o, i) if right else (i, o)))
    attributes = {"transA": left, "transB": right, "alpha": alpha, "beta": beta}
    if generator.random() < 0.5:
        vector = floats(generator, o)
        return Case("Gemm", [a, b, vector], attributes), beta * vector
    if generator.random() < 0.5:  # the kernel on the left: the outputs are rows
        column = floats(generator, n, 1)
        return Case("Gemm", [a, b, column], attributes, operand=1), beta * column[:, 0]
    return Case("Gemm", [a, b], attributes, operand=int(generator.integers(0, 2))), None


def matmul(generator: np.random.Generator) -> tuple[Case, np.ndarray | None]:
    k, n = drawn(generator, 1, 5, 2)
    lead = drawn(generator, 1, 3, int(generator.integers(0, 3)))
    m = int(generator.integers(1, 5))
    ones = (1,) * int(generator.integers(0, len(lead) + 2))
    if generator.random() < 0.5:
        arrays = [floats(generator, *lead, m, k), floats(generator, *ones, k, n)]
        return Case("MatMul", arrays), None
    arrays = [floats(generator, *ones, n, k), floats(generator, *lead, k, m)]
    return Case("MatMul", arrays, operand=1), None


def fused_matmul(generator: np.random.Generator) -> tuple[Case, np.ndarray | None]:
    k, n, m = drawn(generator, 2, 5, 3)
    lead = drawn(generator, 1, 3, int(generator.integers(0, 3)))
    left, right = drawn(generator, 0, 1, 2)
    alpha = float(generator.choice([0.5, 1.0, -3.0]))
    attributes = {"transA": left, "transB": right, "alpha": alpha}
    if generator.random() < 0.5:
        a = floats(generator, *lead, *((k, m) if left else (m, k)))
        b = floats(generator, *((n, k) if right else (k, n)))
        return Case("FusedMatMul", [a, b], attributes, 0, "com.microsoft"), None
    a = floats(generator, *((k, n) if left else (n, k)))
    b = floats(generator, *lead, *((m, k) if right else (k, m)))
    return Case("FusedMatMul", [a, b], attributes, 1, "com.microsoft"), None


DRAWN: dict[str, Callable[[np.random.Generator], tuple[Case, np.ndarray | None]]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    "FusedMatMul": fused_matmul,
}


def accepted(kind: str, seed: int) -> tuple[Case, np.ndarray | None]:
    """A random node that ONNX Runtime takes: not every size that is drawn can be reached."""
    generator = np.random.default_rng(seed)
    for _ in range(20):
        case, bias = DRAWN[kind](generator)
        try:
            taken(case)
        except Exception as error:  # ONNX Runtime's errors share no base class
            if "ONNXRuntimeError" not in str(error):
                raise
            continue
        return case, bias
    raise AssertionError(f"{kind} {seed}: no such node")


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", DRAWN)
def test_random_nodes_are_the_linear_maps_that_they_say(kind: str, seed: int) -> None:
    case, bias = accepted(kind, seed)
    require_linear(case, bias, seed)


@pytest.mark.long
@pytest.mark.parametrize("kind", DRAWN)
def test_many_random_nodes(kind: str) -> None:
    for seed in range(100, 400):
        case, bias = accepted(kind, seed)
        require_linear(case, bias, seed)


@pytest.mark.parametrize(
    ("equation", "operand", "kernel"),
    [
        ("bi,oi->bo", (4, 3), (5, 3)),
        ("bi,io->bo", (4, 3), (3, 5)),
        ("bsi,io->bso", (2, 4, 3), (3, 5)),
        ("bis,oi->bos", (2, 3, 4), (5, 3)),
        ("bis,oi->bso", (2, 3, 4), (5, 3)),
        ("bsi,oi->obs", (2, 4, 3), (5, 3)),
        ("ibs,io->bos", (3, 2, 4), (3, 5)),
        ("bchi,io->bcho", (2, 3, 4, 3), (3, 5)),
        ("...i,io->...o", (2, 4, 3), (3, 5)),
        ("...i,io->...o", (3,), (3, 5)),
        ("i...,io->o...", (3, 2, 4), (3, 5)),
        ("i...,io->...o", (3, 2, 4), (3, 5)),
        ("...i,oi->o...", (2, 4, 3), (5, 3)),
        ("b...i,io->b...o", (2, 4, 3, 3), (3, 5)),
        ("bi...,io->bo...", (2, 3, 4, 2), (3, 5)),
        ("b i , o i -> b o", (4, 3), (5, 3)),
    ],
)
def test_equations_of_one_kernel(
    equation: str, operand: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    """Kernel on the right, then on the left."""
    generator = np.random.default_rng(0)
    x, w = floats(generator, *operand), floats(generator, *kernel)
    require_linear(Case("Einsum", [x, w], {"equation": equation}))
    left, _, out = equation.replace(" ", "").partition("->")
    turned = ",".join(left.split(",")[::-1])
    require_linear(Case("Einsum", [w, x], {"equation": f"{turned}->{out}"}, operand=1))


def test_an_equation_without_a_result_names_its_axes_in_order() -> None:
    """The result of ``bi,io`` is ``bo``, that of ``zi,io`` is ``oz``."""
    generator = np.random.default_rng(0)
    x, w = floats(generator, 4, 3), floats(generator, 3, 5)
    require_linear(Case("Einsum", [x, w], {"equation": "bi,io"}))
    require_linear(Case("Einsum", [x, w], {"equation": "zi,io"}))


@pytest.mark.parametrize(
    ("equation", "operand", "kernel"),
    [
        ("bhi,hio->bho", (2, 3, 4), (3, 4, 5)),  # a kernel per head
        ("bij,ijo->bo", (2, 3, 4), (3, 4, 5)),  # two axes are summed over
        ("bi,iop->bop", (2, 3), (3, 4, 5)),  # two axes are made
        ("bsi,io->sbo", (2, 4, 3), (3, 5)),  # the others change places
        ("bsi,io->bo", (2, 4, 3), (3, 5)),  # another is summed over alone
        ("bi,i->bi", (2, 3), (3,)),  # a scale
        ("bii,io->bo", (2, 3, 3), (3, 5)),  # a diagonal
        ("bbi,io->bo", (3, 3, 2), (2, 5)),
        ("bi,ii->bi", (2, 3), (3, 3)),
    ],
)
def test_equations_that_are_no_single_matrix_product_are_none(
    equation: str, operand: tuple[int, ...], kernel: tuple[int, ...]
) -> None:
    """What is given as a map must be one; none is always right."""
    generator = np.random.default_rng(0)
    x, w = floats(generator, *operand), floats(generator, *kernel)
    case = Case("Einsum", [x, w], {"equation": equation})
    linear, _ = taken(case)
    if linear is not None:
        require_linear(case)


@pytest.mark.parametrize(
    "case",
    [
        Case("MatMul", [np.ones((3,), np.float32), np.ones((3, 4), np.float32)]),
        Case("MatMul", [np.ones((2, 3), np.float32), np.ones((3,), np.float32)]),
        Case("MatMul", [np.ones((2, 4, 3), np.float32), np.ones((2, 3, 4), np.float32)]),
        Case("Gemm", [np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)], {"alpha": 0.0}),
    ],
)
def test_what_is_no_such_map(case: Case) -> None:
    linear, _ = taken(case)
    assert linear is None


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize(("op_type", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_gates_of_recurrent_layers_change_by_their_rows(
    op_type: str, gates: int, direction: str
) -> None:
    """With another operand and kernel of the same gates the layer gives the same."""
    generator = np.random.default_rng(0)
    directions = 2 if direction == "bidirectional" else 1
    seq, batch, inputs, units = 4, 3, 5, 2
    x = floats(generator, seq, batch, inputs)
    kernel = floats(generator, directions, gates * units, inputs)
    state = floats(generator, directions, gates * units, units)
    bias = floats(generator, directions, 2 * gates * units)
    attributes = {"hidden_size": units, "direction": direction}
    linear, result = taken(Case(op_type, [x, kernel, state, bias], attributes))
    assert linear is not None
    assert linear.inside
    matrix = linear.matrix(kernel)
    np.testing.assert_array_equal(linear.kernel(matrix, kernel.shape), kernel)
    places = linear.places(x.shape, result.shape)
    assert places == seq * batch
    rows = linear.rows(x, result.shape, np.arange(places))
    seen = np.einsum("ngik,goik->ngo", rows, matrix)  # [places, 1, directions * gates * units]
    # The same gates from an operand that is the gates themselves, through a kernel of ones.
    same = seen.reshape(seq, batch, -1).astype(np.float32)
    size = directions * gates * units
    picked = np.eye(size, dtype=np.float32).reshape(directions, gates * units, size)
    _, again = taken(Case(op_type, [same, picked, state, bias], attributes))
    np.testing.assert_allclose(again, result, rtol=1e-4, atol=1e-5)
    assert prod(matrix.shape) == kernel.size


def test_fused_convolutions_are_maps_where_nothing_follows() -> None:
    generator = np.random.default_rng(0)
    arrays: list[np.ndarray | None] = [floats(generator, 2, 3, 5, 5), floats(generator, 4, 3, 3, 3)]
    plain = Case("FusedConv", arrays, {}, 0, "com.microsoft")
    require_linear(plain)
    active = Case("FusedConv", arrays, {"activation": "Relu"}, 0, "com.microsoft")
    assert taken(active)[0] is None


def test_the_model_of_every_case_is_valid() -> None:
    """The cases are networks of the standard, not only of ONNX Runtime."""
    for kind, draw in DRAWN.items():
        if kind == "FusedMatMul":
            continue
        case, _ = draw(np.random.default_rng(1))
        names = [f"v{k}" for k in range(len(case.arrays))]
        node = helper.make_node(case.op_type, names, ["y"], **case.attributes)
        onnx.checker.check_node(node, _context())


def _context() -> onnx.checker.C.CheckerContext:
    context = onnx.checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 9, {"": 20}
    return context
