"""The verdict where rounding grows, outputs saturate, or the masked original gives no numbers.

In each network a right resize must pass, and each wrong slice must be rejected. That the outputs
alone would not do is checked as well: from end to end they are off, or hide what is wrong.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import morphgraph as mg
from morphgraph.arrays import Array
from morphgraph.edit import array_of, replace_array
from morphgraph.errors import MorphWarning, VerificationError
from morphgraph.onnx_io import static_shape
from morphgraph.passes.rewrite.resize import resize
from morphgraph.testing import is_rejected, random_plan, wrong_slices
from morphgraph.tolerances import RESIZED

WIDTH = 48  # sums of 9 x 48 terms: ONNX Runtime takes them in another order when some go


class Net:
    """Builds a chain of nodes, each of which reads what the last one gives."""

    def __init__(self, shape: list[int]) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.shape, self.last = shape, "x"

    def constant(self, array: object, dtype: str = "float32") -> str:
        name = f"k{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def kernel(self, *shape: int, gain: float = 2.0) -> Array:
        fan_in = int(np.prod(shape[1:]))
        return self.random.standard_normal(shape) * (gain / fan_in) ** 0.5

    def add(self, op_type: str, *operands: str, first: str | None = None, **attributes: Any) -> str:
        """A node that reads ``first``, or the last value, and constants behind it."""
        source = self.last if first is None else first
        self.last = f"v{len(self.nodes)}"
        made = helper.make_node(op_type, [source, *operands], [self.last], **attributes)
        made.name = f"n_{self.last}"
        self.nodes.append(made)
        return self.last

    def model(self, dtype: int = TensorProto.FLOAT) -> ir.Model:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.last, dtype, None)],
            self.initializers,
        )
        opset = [helper.make_opsetid("", 19)]
        return ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=9))

    def conv(self, channels: int, given: int, size: int = 3, gain: float = 2.0) -> str:
        kernel = self.constant(self.kernel(channels, given, size, size, gain=gain))
        return self.add("Conv", kernel, pads=[size // 2] * 4)

    def swish(self) -> str:
        value = self.last
        return self.add("Mul", self.add("Sigmoid"), first=value)

    def trunk(self, layers: int = 4) -> None:
        for layer in range(layers):
            self.conv(WIDTH, 3 if layer == 0 else WIDTH, gain=4.0)
            self.swish()


def quantized_convolutions(per_channel: bool = False, size: int = 12, layers: int = 6) -> ir.Model:
    """Scales and zero points around every convolution, as ``quantize_static`` leaves them."""
    net = Net([1, 3, size, size])
    scale, zero = net.constant(0.05), net.constant(0, "int8")
    for layer in range(layers):
        given = 3 if layer == 0 else WIDTH
        kernel = net.kernel(WIDTH, given, 3, 3)
        axes = (1, 2, 3) if per_channel else None
        step = np.abs(kernel).max(axis=axes) / 127
        stored = np.round(kernel / (step.reshape(-1, 1, 1, 1) if per_channel else step))
        net.add("QuantizeLinear", scale, zero)
        value = net.add("DequantizeLinear", scale, zero)
        zeros = net.constant(np.zeros(np.shape(step)), "int8")
        axis = {"axis": 0} if per_channel else {}
        weight = net.add(
            "DequantizeLinear",
            net.constant(step),
            zeros,
            first=net.constant(stored, "int8"),
            **axis,
        )
        net.add("Conv", weight, first=value, pads=[1, 1, 1, 1])
        net.swish()
        net.add("Mul", net.constant(1.9))
    net.conv(5, WIDTH, 1)
    return net.model()


def quantized_as_it_runs() -> ir.Model:
    """Scales of activations that are measured in every run, and products of whole numbers."""
    net = Net([64, 16])
    for given in (16, 8 * WIDTH):  # real numbers first, so that there is something to round
        net.add("MatMul", net.constant(net.kernel(8 * WIDTH if given == 16 else WIDTH, given).T))
        net.swish()
        net.add("Mul", net.constant(1.9))
    for layer in range(4):
        given = WIDTH
        kernel = net.kernel(WIDTH, given).T
        step = np.abs(kernel).max() / 127
        name = f"q{layer}"
        outputs = [name, f"{name}_scale", f"{name}_zero"]
        made = helper.make_node("DynamicQuantizeLinear", [net.last], outputs, name=name)
        net.nodes.append(made)
        zero = net.constant(0, "int8")
        kernel_name = net.constant(np.round(kernel / step), "int8")
        net.add("MatMulInteger", kernel_name, outputs[2], zero, first=name)
        net.add("Cast", to=TensorProto.FLOAT)
        net.add("Mul", outputs[1])
        net.add("Mul", net.constant(step))
        net.swish()
        net.add("Mul", net.constant(1.9))
    net.add("MatMul", net.constant(net.kernel(5, WIDTH).T))
    return net.model()


def quantized_operators() -> ir.Model:
    net = Net([1, 3, 12, 12])
    net.trunk(2)
    scale, zero = net.constant(0.05), net.constant(3, "int8")
    for _ in range(4):
        kernel = net.kernel(WIDTH, WIDTH, 3, 3)
        step = np.abs(kernel).max() / 127
        net.add("QuantizeLinear", scale, zero)
        stored = net.constant(np.round(kernel / step), "int8")
        kernel_scale, kernel_zero = net.constant(step), net.constant(0, "int8")
        net.add(
            "QLinearConv", scale, zero, stored, kernel_scale, kernel_zero, scale, zero, pads=[1] * 4
        )
        net.add("DequantizeLinear", scale, zero)
        net.swish()
        net.add("Mul", net.constant(1.9))
    net.conv(5, WIDTH, 1)
    return net.model()


def ending(finish: Callable[[Net], object], dtype: int = TensorProto.FLOAT) -> ir.Model:
    net = Net([1, 3, 12, 12])
    net.trunk()
    net.conv(6, WIDTH, 1)
    finish(net)
    return net.model(dtype)


def sharp_sigmoid(offset: float) -> Callable[[Net], object]:
    def finish(net: Net) -> None:
        net.add("Mul", net.constant(3e3))
        net.add("Add", net.constant(offset))
        net.add("Sigmoid")

    return finish


def sharp_softmax(net: Net) -> None:
    net.add("Mul", net.constant(1e4))
    net.add("Softmax", axis=1)


def rounded(op_type: str) -> Callable[[Net], object]:
    def finish(net: Net) -> None:
        net.add("Mul", net.constant(3e3))
        net.add(op_type)

    return finish


def highest(net: Net) -> None:
    net.add("ArgMax", axis=1, keepdims=0)


def constant_output(net: Net) -> None:
    net.add("Mul", net.constant(0.0))


def shares_of_nothing() -> ir.Model:
    """The shares of channels in a sum that is zero in many places: 0 / 0."""
    net = Net([1, 3, 12, 12])
    net.conv(WIDTH, 3)
    net.add("Add", net.constant(-3.0))
    value = net.add("Relu")
    net.add("ReduceSum", net.constant([1], "int64"), keepdims=1)
    net.add("Div", net.last, first=value)
    net.conv(WIDTH, WIDTH, 1)
    net.swish()
    net.conv(5, WIDTH, 1)
    return net.model()


def logarithm() -> ir.Model:
    """Not a number for about half of the usual inputs, so that everything behind it is none."""
    net = Net([2, 16])
    net.add("Log")
    net.add("MatMul", net.constant(net.kernel(WIDTH, 16).T))
    net.swish()
    net.add("MatMul", net.constant(net.kernel(5, WIDTH).T))
    return net.model()


def half_precision() -> ir.Model:
    net = Net([1, 3, 12, 12])
    net.add("Cast", to=TensorProto.FLOAT16)
    scale, zero = net.constant(0.05, "float16"), net.constant(0, "int8")
    for layer in range(5):
        given = 3 if layer == 0 else WIDTH
        net.add("QuantizeLinear", scale, zero)
        net.add("DequantizeLinear", scale, zero)
        net.add("Conv", net.constant(net.kernel(WIDTH, given, 3, 3), "float16"), pads=[1] * 4)
        net.swish()
        net.add("Mul", net.constant(1.9, "float16"))
    net.add("Conv", net.constant(net.kernel(5, WIDTH, 1, 1), "float16"))
    net.add("Cast", to=TensorProto.FLOAT)
    return net.model()


def best_places() -> ir.Model:
    """The places of the five highest scores, which swap where two are nearly the same."""
    net = Net([1, 3, 12, 12])
    net.trunk()
    net.conv(6, WIDTH, 1)
    net.add("Flatten")
    count = net.constant([5], "int64")
    net.nodes.append(helper.make_node("TopK", [net.last, count], ["best", "places"], name="n_best"))
    net.last = "places"
    return net.model(TensorProto.INT64)


NETWORKS: dict[str, Callable[[], ir.Model]] = {
    "quantized": quantized_convolutions,
    "quantized per channel": lambda: quantized_convolutions(per_channel=True),
    "quantized as it runs": quantized_as_it_runs,
    "quantized operators": quantized_operators,
    "a sigmoid far below zero": lambda: ending(sharp_sigmoid(-3e4)),
    "a sigmoid far above zero": lambda: ending(sharp_sigmoid(3e4)),
    "a sharp sigmoid": lambda: ending(sharp_sigmoid(0.0)),
    "a sharp softmax": lambda: ending(sharp_softmax),
    "rounded": lambda: ending(rounded("Round")),
    "rounded down": lambda: ending(rounded("Floor")),
    "signs": lambda: ending(rounded("Sign")),
    "the highest of classes": lambda: ending(highest, TensorProto.INT64),
    "a constant": lambda: ending(constant_output),
    "the best places": best_places,
    "half precision": half_precision,
    "shares of nothing": shares_of_nothing,
    "a logarithm": logarithm,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_right_resize_passes_and_wrong_slices_do_not(name: str) -> None:
    graph = mg.lift(NETWORKS[name]())
    plan = random_plan(graph, 1)
    assert plan.groups
    keep = plan.keep_channels(graph)
    small = resize(graph, keep)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)  # it tells, so it need not warn
        report = mg.verify(graph, plan, small)
    report.require()
    planted = list(wrong_slices(graph, keep, small))
    assert len(planted) > 3
    for fault, broken in planted[:: max(1, len(planted) // 5)]:
        assert is_rejected(graph, plan, broken), fault


def test_the_outputs_alone_would_not_tell() -> None:
    """Quantization moves a right result by far more than the tolerance, and rounding does as well.

    The report says how far rounding alone moves the masked original, and what was compared inside.
    """
    graph = mg.lift(quantized_convolutions(size=24, layers=10))
    plans = [random_plan(graph, seed) for seed in range(4)]
    reports = [mg.verify(graph, plan, resize(graph, plan.keep_channels(graph))) for plan in plans]
    report = max(reports, key=lambda report: report.worst.relative)
    assert report.worst.relative > 10 * RESIZED
    assert report.worst.floor is not None
    assert report.worst.floor > RESIZED
    assert report.values is not None
    assert report.values.worst.relative < RESIZED / 10
    assert all(report.ok for report in reports)


def test_a_fault_that_no_output_shows_is_named() -> None:
    graph = mg.lift(ending(sharp_sigmoid(-3e4)))
    plan = random_plan(graph, 0)
    small = resize(graph, plan.keep_channels(graph))
    kernel = next(v for v in small.graph.initializers.values() if len(static_shape(v)) == 4)
    replace_array(kernel, array_of(kernel) * np.float32(1.01))
    report = mg.verify(graph, plan, small)
    assert not report.ok
    with pytest.raises(VerificationError, match=r"value 'v0', computed from the same operands, is"):
        report.require()


def test_where_nothing_is_a_number_the_check_says_so() -> None:
    net = Net([2, 16])
    net.add("Mul", net.constant(0.0))
    net.add("Div", net.last)
    net.add("MatMul", net.constant(net.kernel(WIDTH, 16).T))
    net.add("Relu")
    net.add("MatMul", net.constant(net.kernel(5, WIDTH).T))
    graph = mg.lift(net.model())
    plan = random_plan(graph, 0)
    with (
        pytest.warns(MorphWarning, match="give no finite numbers"),
        pytest.warns(MorphWarning, match="masking changed the outputs by 0 of their scale only"),
    ):
        report = mg.verify(graph, plan, resize(graph, plan.keep_channels(graph)))
    assert report.ok
    assert report.untold
