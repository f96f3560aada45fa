"""Every operator, alone in a model: what torch computes is what ONNX Runtime computes.

A case is the inputs (``x`` and ``z`` are fed, all others are random weights) and the nodes.
"""

import copy
import re
import sys

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from morphgraph.errors import UnsupportedError
from morphgraph.onnx_io import runtime as ort
from morphgraph.ops import Op, described_ops, entry_of
from morphgraph.ops.barriers import Barrier
from morphgraph.passes.canonical.canonicalize import canonicalize
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.testing import model_from_text
from morphgraph.torch_io.tensors import to_tensor, torch_type
from morphgraph.torch_io.to_torch import to_torch
from tests.torch_io.contrib_cases import CONTRIB_CASES, numbers
from tests.torch_io.onnx_cases import CASES, IMAGE, NEWER_CASES, OLDER_CASES, QKV

NOT_IN_CURRENT_OPSETS = {"Upsample"}
NOT_IN_TORCH = {"com.microsoft::DynamicQuantizeLSTM"}
WITHOUT_KERNEL = {"SwiGLU", "com.microsoft::SwiGLU"}  # on a CPU; see below
WITH_OPEN_SIZES = {
    "ConstantOfShape",
    "Range",
    "Shape",
    "Size",
}  # in test_open_sizes.py; else folded

_FURTHER_RESULTS = {
    "CausalConvWithState": ", s",
    "EmbedLayerNormalization": ", m",
    "GroupQueryAttention": ", k2, v2",
    "LinearAttention": ", s",
}


def build(inputs: str, nodes: str, opset: int = 21) -> ir.Model:
    """A model in ONNX text; behind a ``|`` stand constants."""
    given, _, constants = inputs.partition("|")
    head = f'<ir_version: 10, opset_import: ["" : {opset}]> '
    listed = f"<{constants}>" if constants else ""
    text = f"{head} net ({given}) => (float y) {listed} {{ {nodes} }}"
    return canonicalize(model_from_text(text, inputs=("x", "z")))


def assert_same(out: torch.Tensor, expected: np.ndarray) -> None:
    assert tuple(out.shape) == expected.shape
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=2e-5, atol=2e-5)


def name(case: object) -> str:
    return case if isinstance(case, str) and "=" in case else ""


@pytest.mark.parametrize(
    ("opset", "inputs", "nodes"),
    [*((21, *case) for case in CASES), *OLDER_CASES, *NEWER_CASES],
    ids=name,
)
def test_torch_computes_what_onnx_runtime_computes(opset: int, inputs: str, nodes: str) -> None:
    model = build(inputs, nodes, opset)
    feeds = ort.random_inputs(model)
    (expected,) = ort.run(model, feeds).values()
    net = to_torch(model)
    out = net(*(torch.from_numpy(feed) for feed in feeds.values()))
    assert_same(out, expected)
    elsewhere = (torch.from_numpy(feed).to("meta") for feed in feeds.values())
    everywhere = copy.deepcopy(net).to("meta")(*elsewhere)
    assert everywhere.shape == out.shape  # nothing stays behind on the CPU
    if out.requires_grad:
        (out * torch.randn(out.shape)).sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(("inputs", "result", "constants", "kind", "form"), CONTRIB_CASES, ids=name)
def test_operators_of_onnx_runtime_itself(
    inputs: str, result: str, constants: str, kind: str, form: str
) -> None:
    dtype, _, shape = result.partition("[")
    domain = "" if "." in kind or not kind else "com.microsoft."
    call = f"{domain}{kind} {form}"
    more = _FURTHER_RESULTS.get(kind, "")
    head = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1, "ai.onnx.ml" : 3]>'
    text = f"{head} net ({inputs}) => ({dtype}[{shape} y) <{constants}> {{ y{more} = {call} }}"
    model = canonicalize(model_from_text(text, inputs=("x", "z")))
    feeds = ort.random_inputs(model)
    (expected,) = ort.run(model, feeds).values()
    net = to_torch(model)
    out = net(*(torch.from_numpy(feed) for feed in feeds.values()))
    assert_same(out, expected)
    if out.requires_grad:
        out.square().sum().backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_zero_points_of_columns_in_groups() -> None:
    """Held against the description: ONNX Runtime's kernel takes 8 for them (see findings)."""
    order = [k * 7 % 3 % 2 for k in range(32)]
    constants = f"uint8[4,2,8] w = {numbers(64)}, uint8[4] z = {numbers(4)}, "
    constants += f"int32[32] g = {{{','.join(map(str, order))}}}"
    call = "com.microsoft.MatMulNBits <K = 32, N = 4, bits = 4, block_size = 16> (x, w, s, z, g)"
    head = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
    text = (
        f"{head} net (float[32,32] x, float[8] s) => (float[32,4] y) <{constants}> {{ y = {call} }}"
    )
    model = canonicalize(model_from_text(text, inputs=("x", "s")))
    w = np.array([k * 97 % 256 for k in range(64)], np.uint8).reshape(4, 2, 8)
    z = np.array([k * 97 % 256 for k in range(4)], np.uint8)
    kernel = np.stack([w & 15, w >> 4], -1).reshape(4, 32).astype(np.float32)
    points = np.stack([z & 15, z >> 4], -1).astype(np.float32)
    s = np.linspace(0.5, 1.2, 8, dtype=np.float32)
    expected = (kernel - points[:, order]) * s.reshape(4, 2)[:, order]
    out = to_torch(model)(torch.eye(32), torch.from_numpy(s))
    assert_same(out, expected.T)


# ONNX has Celu in float32 only; torch has no avg_pool3d in half precision on the CPU, which LRN
# uses too; Atanh and Acosh magnify the rounding of what they are given. To pick the nearest is the
# same in all types. Torch has no transforms, determinants and deformable
# convolutions in bfloat16, ONNX no dynamic
# quantization but of float32; GridSample magnifies the rounding of its coordinates.
NOT_IN_EVERY_TYPE = (
    *("Celu", "LRN", "kernel_shape = [2,3,2]", "Atanh", "Acosh", "nearest"),
    *("DFT", "STFT", "Det ", "DeformConv", "DynamicQuantizeLinear", "GridSample"),
)
ROUNDING = {"double": 1e-5, "bfloat16": 4e-2}  # relative to the largest result


@pytest.mark.parametrize("kind", [pytest.param("double", marks=pytest.mark.long), "bfloat16"])
@pytest.mark.parametrize(
    ("inputs", "nodes"),
    [
        (inputs, nodes)
        for inputs, nodes in CASES
        # ONNX text has no constants in half precision, and a Resize has float32 scales in all.
        if "float" not in inputs.partition("|")[2] or "Resize" in nodes
        if not any(words in nodes for words in NOT_IN_EVERY_TYPE)
    ],
    ids=name,
)
def test_other_floating_point_types(inputs: str, nodes: str, kind: str) -> None:
    given, separator, constants = inputs.partition("|")
    given = re.sub(r"\bfloat(?=[\[ ])", kind, given)
    model = build(given + separator + constants, nodes)
    single = in_single_precision(model)
    types = {value.name: value.dtype.numpy() for value in model.graph.inputs}
    feeds = {name: x.astype(types[name]) for name, x in ort.random_inputs(single).items()}
    plain = {
        name: x.astype(v.dtype.numpy()) for (name, x), v in zip(feeds.items(), single.graph.inputs)
    }
    (expected,) = ort.run(single, plain).values()
    out = to_torch(model)(*(to_tensor(ir.tensor(feed)) for feed in feeds.values()))
    (result,) = model.graph.outputs
    assert result.dtype is not None
    assert out.dtype == torch_type(result.dtype)
    found = out.detach().double().numpy()
    atol = ROUNDING[kind] * max(float(np.abs(expected).max(initial=0)), 1e-3)
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=0, atol=atol)


def by_reference(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [*ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)]


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("results", ["y", ", y"])
def test_recurrent_layers_with_batches_first(kind: str, gates: int, results: str) -> None:
    # ONNX Runtime has no kernel for layout 1.
    weights = f"float[1,{gates * 4},3] w, float[1,{gates * 4},4] r, float[2,1,4] h"
    nodes = f"{results} = {kind} <hidden_size = 4, layout = 1> (x, w, r, , , h)"
    model = build(f"float[2,5,3] x, {weights}", nodes)
    feeds = ort.random_inputs(model)
    (expected,) = by_reference(model, feeds)
    assert_same(to_torch(model)(torch.from_numpy(feeds["x"])), expected)


def test_an_even_window_of_lrn_reaches_further_up() -> None:
    # ONNX Runtime takes odd windows only.
    model = build("float[6,6,4,4] x", "y = LRN <size = 4, alpha = 0.9> (x)")
    feeds = ort.random_inputs(model)
    (expected,) = by_reference(model, feeds)
    assert_same(to_torch(model)(torch.from_numpy(feeds["x"])), expected)


@pytest.mark.parametrize("form", ["", "<alpha = 1.7>"])
def test_gated_units_of_onnx(form: str) -> None:
    model = build("float[2,6] x, float[2,6] w", f"y = SwiGLU {form} (x, w)", 28)
    feeds = ort.random_inputs(model)
    (expected,) = by_reference(model, feeds)
    assert_same(to_torch(model)(torch.from_numpy(feeds["x"])), expected)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ("float[2,6] x, float[2,6] z", "<limit = 0.7, activation_alpha = 1.7> (x, z)"),
        ("float[2,12] x", "<activation_beta = 1.0> (x)"),
    ],
)
def test_gated_units_of_onnx_runtime(given: str, form: str) -> None:
    """Held against the formula in the operator's description."""
    head = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'
    text = f"{head} net ({given}) => (float[2,6] y) {{ y = com.microsoft.SwiGLU {form} }}"
    model = canonicalize(model_from_text(text, inputs=("x", "z")))
    arrays = [3 * x for x in ort.random_inputs(model).values()]
    gate, up = arrays if len(arrays) == 2 else np.split(arrays[0], 2, axis=1)
    alpha, beta = (1.7, 0.0) if len(arrays) == 2 else (1.0, 1.0)
    if len(arrays) == 2:
        gate, up = gate.clip(max=0.7), up.clip(-0.7, 0.7)
    expected = gate / (1 + np.exp(-alpha * gate)) * (up + beta)
    assert_same(to_torch(model)(*map(torch.from_numpy, arrays)), expected)


@pytest.mark.parametrize("mask", ["bool[5,4] z", "float[5,4] z"])
def test_a_mask_shorter_than_the_keys_hides_the_rest(mask: str) -> None:
    # ONNX Runtime takes masks of full length only.
    model = build(f"{QKV}, {mask}", "y = Attention (x, k, v, z)", 24)
    feeds = ort.random_inputs(model)
    feeds["z"][:, 0] = 1
    (expected,) = by_reference(model, feeds)
    assert_same(to_torch(model)(*map(torch.from_numpy, feeds.values())), expected)


def test_every_operator_has_a_case() -> None:
    texts = [case[-1] for case in (*CASES, *NEWER_CASES, *CONTRIB_CASES)]
    covered = {word for nodes in texts for word in nodes.replace("(", " ").split()}
    covered |= {f"com.microsoft::{case[3]}" for case in CONTRIB_CASES}
    covered |= {"::".join(case[3].rsplit(".", 1)) for case in CONTRIB_CASES if "." in case[3]}
    described = {name for name in described_ops() if "com.acme" not in name}
    barriers = {
        name for name in described if issubclass(entry_of(*name.split("::")[::-1]) or Op, Barrier)
    }
    without = NOT_IN_CURRENT_OPSETS | NOT_IN_TORCH | WITHOUT_KERNEL | WITH_OPEN_SIZES | barriers
    assert described - covered == without


@pytest.mark.parametrize(
    ("inputs", "nodes", "told"),
    [
        (
            f"{IMAGE} | float[4] s = {{1, 1, 2, 2}}",
            'y = Resize <mode = "linear", coordinate_transformation_mode = "asymmetric"> (x, , s)',
            "mode linear with asymmetric",
        ),
        (
            "float[2,3,8,8] x",
            "m, y = MaxPool <kernel_shape = [2,2], storage_order = 1> (x)",
            "counted by columns",
        ),
        (
            f"{IMAGE} | float[1,4] r = {{0,0,3,3}}, int64[1] k = {{0}}",
            'y = RoiAlign <mode = "max"> (x, r, k)',
            "mode max",
        ),
        ("float[2,3] x", "y = RandomNormalLike (x)", "it has no lowering"),
        (
            "float[5,2,3] x, float[1,4,3] w, float[1,4,4] r",
            'y = RNN <hidden_size = 4, activations = ["Affine"]> (x, w, r)',
            "activation Affine without alpha or beta",
        ),
    ],
)
def test_what_torch_cannot_do_is_refused_by_name(inputs: str, nodes: str, told: str) -> None:
    with pytest.raises(UnsupportedError, match=told) as refused:
        to_torch(build(inputs, nodes))
    assert "node '" in str(refused.value)


def test_what_wants_torchvision_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    inputs = f"{IMAGE}, float[2,5] z"
    with pytest.raises(UnsupportedError, match=r"MaxRoiPool.*install torchvision"):
        to_torch(build(inputs, "y = MaxRoiPool <pooled_shape = [2,3]> (x, z)"))
