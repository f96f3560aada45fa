"""The list of parameters in a file's metadata is believed only where it fits the weights."""

import warnings
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import morphgraph as mg
from morphgraph.onnx_io import PARAMETERS_KEY
from morphgraph.ops import listed_parameters
from morphgraph.passes.canonical.canonicalize import canonicalize


class Net(nn.Module):
    """A fixed kernel (a buffer) in front of trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("blur", torch.full((3, 1, 3, 3), 1 / 9))
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.blur, torch.Tensor)
        x = nn.functional.conv2d(x, self.blur, groups=3)
        x = self.mid(torch.relu(self.norm(self.conv(x))))
        result: torch.Tensor = self.fc(torch.relu(x).mean((2, 3)).unsqueeze(1))
        return result


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    torch.manual_seed(0)
    return ir.to_proto(mg.export(Net().eval(), (torch.randn(2, 3, 9, 9),)))


def renamed(proto: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in copy.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return copy


def array(proto: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)


def put(proto: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(value, name))


def rename_all(proto: onnx.ModelProto) -> onnx.ModelProto:
    return renamed(proto, {t.name: f"w{k}" for k, t in enumerate(proto.graph.initializer)})


def rename_one(proto: onnx.ModelProto) -> onnx.ModelProto:
    return renamed(proto, {"conv.weight": "onnx::Conv_7"})


def rename_bias_of_product(proto: onnx.ModelProto) -> onnx.ModelProto:
    return renamed(proto, {"fc.bias": "fc_bias"})


def transpose_ahead(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = renamed(proto, {})
    node = next(n for n in copy.graph.node if n.op_type == "Transpose")
    put(copy, "onnx::MatMul_9", np.ascontiguousarray(array(proto, "fc.weight").T))
    for reader in copy.graph.node:
        reader.input[:] = ["onnx::MatMul_9" if n == node.output[0] else n for n in reader.input]
    copy.graph.node.remove(node)
    return copy  # fc.weight stays as an initializer that nobody reads


def fold_norm(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Under the kernel's own name, as some tools do it; the bias is new."""
    copy = renamed(proto, {})
    scale, shift, mean, var = (
        array(proto, f"norm.{k}") for k in ("weight", "bias", "running_mean", "running_var")
    )
    norm = next(n for n in copy.graph.node if n.op_type == "BatchNormalization")
    conv = next(n for n in copy.graph.node if "conv.weight" in n.input)
    factor = scale / np.sqrt(var + 1e-5)
    kernel = next(t for t in copy.graph.initializer if t.name == "conv.weight")
    folded = array(proto, "conv.weight") * factor.reshape(-1, 1, 1, 1)
    kernel.CopyFrom(numpy_helper.from_array(folded, "conv.weight"))
    put(copy, "conv_b", shift - mean * factor)
    conv.input.append("conv_b")
    conv.output[0] = norm.output[0]
    copy.graph.node.remove(norm)
    gone = [t for t in copy.graph.initializer if t.name.startswith("norm.")]
    for tensor in gone:
        copy.graph.initializer.remove(tensor)
    return copy


def split_weight(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = renamed(proto, {})
    (conv,) = (n for n in copy.graph.node if "mid.weight" in n.input)
    kernel, bias = array(proto, "mid.weight"), array(proto, "mid.bias")
    at = list(copy.graph.node).index(conv)
    parts = []
    for k in range(2):
        put(copy, f"mid_{k}", kernel[4 * k : 4 * k + 4])
        put(copy, f"mid_b{k}", bias[4 * k : 4 * k + 4])
        operands = [conv.input[0], f"mid_{k}", f"mid_b{k}"]
        parts.append(helper.make_node("Conv", operands, [f"part{k}"], kernel_shape=[1, 1]))
    parts.append(helper.make_node("Concat", ["part0", "part1"], [conv.output[0]], axis=1))
    nodes = [*copy.graph.node[:at], *parts, *copy.graph.node[at + 1 :]]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    gone = [t for t in copy.graph.initializer if t.name in ("mid.weight", "mid.bias")]
    for tensor in gone:
        copy.graph.initializer.remove(tensor)
    return copy


OUTDATED = [
    rename_all,
    rename_one,
    rename_bias_of_product,
    transpose_ahead,
    fold_norm,
    split_weight,
]


@pytest.mark.parametrize("change", OUTDATED, ids=lambda change: str(change.__name__))
def test_a_list_that_does_not_fit_is_ignored(
    exported: onnx.ModelProto, change: Callable[[onnx.ModelProto], onnx.ModelProto]
) -> None:
    changed = change(exported)
    onnx.checker.check_model(changed)
    bare = renamed(changed, {})
    del bare.metadata_props[:]
    with pytest.warns(mg.MorphWarning, match="does not fit the weights any more") as caught:
        graph = mg.lift(changed)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", mg.MorphWarning)
        expected = mg.lift(bare)
        assert mg.cost(graph, "params").total == mg.cost(expected, "params").total
        net, plain = mg.to_torch(graph.model), mg.to_torch(bare)
    assert [p.shape for p in net.parameters()] == [p.shape for p in plain.parameters()]
    kinds = [type(module) for module in net.modules() if not list(module.children())]
    assert kinds == [type(module) for module in plain.modules() if not list(module.children())]
    assert sum(kind is nn.Conv2d for kind in kinds) >= 3
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(net(x), plain(x))


def test_a_list_that_fits_is_believed(exported: onnx.ModelProto) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", mg.MorphWarning)
        net = mg.to_torch(exported)
        names = {name for name, _ in net.named_parameters()}
        assert "conv.weight" in names
        assert "blur" not in names  # a buffer, though some layer's kernel
        # A file without its head has lost the head's names; no layer has a weight under another.
        cut = next(n.output[0] for n in exported.graph.node if "mid.weight" in n.input)
        blurred = next(n.output[0] for n in exported.graph.node if "blur" in n.input)
        body = onnx.utils.Extractor(exported).extract_model([blurred], [cut])
        body.metadata_props.extend(exported.metadata_props)
        assert "mid.weight" in (listed_parameters(ir.from_proto(body)) or ())
        model = canonicalize(ir.from_proto(body))
    assert "fc.weight" not in model.metadata_props[PARAMETERS_KEY]


def test_a_network_that_lost_layers_keeps_its_list(exported: onnx.ModelProto) -> None:
    """Layers that vanish take their names along; the buffer is still none of the parameters."""
    graph = mg.lift(exported)
    small = mg.apply(graph, mg.plan(graph, {"flops": "70%"}, score="random"), verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", mg.MorphWarning)
        net = mg.to_torch(small)
    assert "blur" not in {name for name, _ in net.named_parameters()}
