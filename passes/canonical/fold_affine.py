"""Scales and shifts go into the layers beside them, for a file that is shipped and not trained.

A BatchNorm in inference multiplies every channel and adds to it, and so do the products and sums
with a constant per channel that exporters write. Behind a convolution or a matrix product that is
another kernel and another bias. In front of one it is, too, where no padding stands between: padded
zeros have not been shifted. Quantizers and converters want it so.

What cannot be folded stays: a result that something else reads as well, statistics of the batch, a
kernel or bias that others read, and kernels that are computed.
"""

import json
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import Editor, array_of, replace_array
from morphgraph.onnx_io import (
    CANONICAL_KEY,
    ORIGINAL_KEY,
    PARAMETERS_KEY,
    keep_known_names,
)

_KERNELS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def fold_affine(model: ir.Model) -> ir.Model:
    """A copy of the model whose scales and shifts are part of the layers beside them.

    It computes the same, up to rounding, as long as it is not trained. Weights are shared with the
    model as far as they stay the same.
    """
    copy = model.clone()
    copy.meta.update(
        {k: v for k, v in model.meta.items() if k not in (CANONICAL_KEY, ORIGINAL_KEY)}
    )
    _Folder(copy).run()
    return copy


@dataclass(frozen=True)
class _Affine:
    """A node that computes ``scale * x + shift``, one number each per channel or one for all.

    Attributes:
        node: the node.
        port: its operand ``x``.
        scale, shift: double precision, ``[channels]`` or ``[1]``.
        axis: of the channels, counted from the end; ``None``: one number for all.
        is_norm: whether it is a BatchNorm.
    """

    node: ir.Node
    port: int
    scale: Array
    shift: Array
    axis: int | None
    is_norm: bool = False


@dataclass(frozen=True)
class _Layer:
    """A convolution or matrix product with a kernel that is stored.

    Attributes:
        node: the product.
        kernel: the initializer.
        swapped: whether a Transpose stands between the two.
        rank: of the result.
        addition: the node behind that adds the bias, for a product that can have none.
    """

    node: ir.Node
    kernel: ir.Value
    swapped: bool
    rank: int
    addition: ir.Node | None = None

    @property
    def is_convolution(self) -> bool:
        return self.node.op_type.startswith("Conv")

    @property
    def channel_axis(self) -> int:
        """Of the result's channels, counted from the end."""
        return 1 - self.rank if self.is_convolution else -1

    @property
    def group(self) -> int:
        return self.node.attributes.get_int("group", 1)

    @property
    def last(self) -> ir.Node:
        return self.node if self.addition is None else self.addition

    def grid(self) -> tuple[tuple[int, ...], int, int]:
        """The kernel's shape with the groups as an axis, and its axes of inputs and outputs.

        A kernel that belongs to no group has one of them.
        """
        shape = tuple(array_of(self.kernel).shape)
        match self.node.op_type:
            case "Conv":
                return (self.group, shape[0] // self.group, *shape[1:]), 2, 1
            case "ConvTranspose":
                return (self.group, shape[0] // self.group, *shape[1:]), 1, 2
        from_right = self.node.attributes.get_int("transB", 0) != int(self.swapped)
        return (1, *shape), *((2, 1) if from_right else (1, 2))

    def along(self, vector: Array, axis: int) -> Array:
        """A vector over all channels, or of one number, as it broadcasts along the grid's axis."""
        shape, _, _ = self.grid()
        if vector.size == 1:
            return vector.reshape((1,) * len(shape))
        sizes = [1] * len(shape)
        sizes[0], sizes[axis] = shape[0], shape[axis]
        return vector.reshape(sizes)

    def channels(self, axis: int) -> int:
        shape, _, _ = self.grid()
        return shape[0] * shape[axis]


class _Folder:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.editor = Editor(model)
        self.new: list[str] = []

    def run(self) -> None:
        for node in list(self.graph):
            affine = self._affine(node)
            if affine is not None:
                self._fold_behind(affine)
        for node in list(self.graph):
            affine = self._affine(node)
            if affine is not None and affine.is_norm:
                self._fold_ahead(affine)
        for value in list(self.graph.initializers.values()):
            if not (value.uses() or value.is_graph_output() or value in self.graph.inputs):
                del self.graph.initializers[value.name or ""]
        if PARAMETERS_KEY in self.model.metadata_props:
            listed = json.loads(self.model.metadata_props[PARAMETERS_KEY])
            self.model.metadata_props[PARAMETERS_KEY] = json.dumps([*listed, *self.new])
        keep_known_names(self.model)

    # -- what is there ----------------------------------------------------------------------------

    def _constant(self, value: ir.Value | None) -> Array | None:
        """The numbers of a constant, which no caller of the model may replace."""
        if value is None or value.const_value is None or value in self.graph.inputs:
            return None
        if not value.is_initializer() or not value.const_value.dtype.is_floating_point():
            return None
        return value.const_value.numpy().astype(np.float64)

    def _is_own(self, value: ir.Value | None) -> bool:
        """Whether one node reads a value, and nobody outside."""
        return value is not None and len(value.uses()) == 1 and not value.is_graph_output()

    def _affine(self, node: ir.Node) -> _Affine | None:
        if node.domain or node.graph is not self.graph:
            return None
        if node.op_type == "BatchNormalization":
            return self._norm(node)
        if node.op_type not in ("Add", "Div", "Mul", "Sub"):
            return None
        constants = [self._constant(value) for value in node.inputs]
        if len(constants) != 2 or (constants[0] is None) == (constants[1] is None):
            return None
        port = 0 if constants[0] is None else 1
        number = constants[1 - port]
        assert number is not None
        wide = [axis for axis, size in enumerate(number.shape) if size > 1]
        if len(wide) > 1 or not self._keeps_rank(node, port, number):
            return None
        axis = wide[0] - number.ndim if wide else None
        flat, one, zero = number.reshape(-1), np.ones(1), np.zeros(1)
        match node.op_type, port:
            case "Add", _:
                return _Affine(node, port, one, flat, axis)
            case "Mul", _:
                return _Affine(node, port, flat, zero, axis)
            case "Div", 0 if flat.all():
                return _Affine(node, port, 1 / flat, zero, axis)
            case "Sub", 0:
                return _Affine(node, port, one, -flat, axis)
            case "Sub", 1:
                return _Affine(node, port, -one, flat, axis)
        return None

    def _keeps_rank(self, node: ir.Node, port: int, number: Array) -> bool:
        rank = _rank(node.inputs[port])
        return number.ndim <= (1 if rank is None else rank)

    def _norm(self, node: ir.Node) -> _Affine | None:
        parts = [self._constant(value) for value in node.inputs[1:5]]
        results = [value for value in node.outputs[1:] if value.uses() or value.is_graph_output()]
        if node.attributes.get_int("training_mode", 0) or results or len(parts) < 4:
            return None
        scale, shift, mean, variance = parts
        if scale is None or shift is None or mean is None or variance is None:
            return None
        factor = scale / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
        rank = _rank(node.inputs[0]) or _rank(node.outputs[0])
        axis = None if rank is None else 1 - rank
        if axis is None:
            maker = None if node.inputs[0] is None else node.inputs[0].producer()
            kernel = maker.inputs[1] if maker is not None and len(maker.inputs) > 1 else None
            kernel_rank = _rank(kernel)
            if maker is None or kernel_rank is None or not maker.op_type.startswith("Conv"):
                return None
            axis = 1 - kernel_rank
        return _Affine(node, 0, factor, shift - mean * factor, axis, is_norm=True)

    def _layer(self, node: ir.Node | None) -> _Layer | None:
        """The layer that a node is, where its kernel is stored for it alone."""
        if (
            node is None
            or node.domain
            or node.op_type not in _KERNELS
            or node.graph is not self.graph
        ):
            return None
        kernel, swapped = node.inputs[1], False
        maker = None if kernel is None else kernel.producer()
        if node.op_type in ("Gemm", "MatMul") and maker is not None:
            order = maker.attributes.get_ints("perm", [1, 0])
            if maker.op_type != "Transpose" or list(order) != [1, 0] or not self._is_own(kernel):
                return None
            kernel, swapped = maker.inputs[0], True
        array = self._constant(kernel)
        if kernel is None or array is None or not self._is_own(kernel):
            return None
        if node.op_type in ("Conv", "ConvTranspose"):
            return _Layer(node, kernel, swapped, array.ndim)
        rank = 2 if node.op_type == "Gemm" else _rank(node.outputs[0]) or _rank(node.inputs[0])
        if array.ndim != 2 or rank is None or rank < 2:
            return None
        return _Layer(node, kernel, swapped, rank)

    def _layer_before(self, value: ir.Value | None) -> _Layer | None:
        """The layer whose result this is, with the addition of its bias where there is one."""
        if value is None or not self._is_own(value):
            return None
        node = value.producer()
        if node is None or node.domain or node.op_type != "Add":
            return self._layer(node)
        products = [v for v in node.inputs if self._constant(v) is None]
        layer = self._layer(products[0].producer()) if len(products) == 1 and products[0] else None
        if layer is None or layer.node.op_type != "MatMul" or not self._is_own(products[0]):
            return None
        bias = node.inputs[0] if node.inputs[1] is products[0] else node.inputs[1]
        outputs = layer.channels(layer.grid()[2])
        fits = bias is not None and array_of(bias).size in (1, outputs)
        if not fits or bias is None or array_of(bias).size not in (1, *array_of(bias).shape[-1:]):
            return None
        return _Layer(layer.node, layer.kernel, layer.swapped, layer.rank, node)

    # -- folding --------------------------------------------------------------------------------

    def _fold_behind(self, affine: _Affine) -> None:
        """Fold what stands behind a layer into that."""
        layer = self._layer_before(affine.node.inputs[affine.port])
        if layer is None or affine.axis not in (None, layer.channel_axis):
            return
        _, _, outputs = layer.grid()
        if not {affine.scale.size, affine.shift.size} <= {1, layer.channels(outputs)}:
            return
        needs_sum = layer.node.op_type == "MatMul" and layer.addition is None
        if needs_sum and not affine.is_norm and affine.shift.any():
            return  # an addition it is, and that stays one
        kernel = self._scaled(layer, affine.scale, outputs)
        bias = self._bias(layer)
        if kernel is None or bias is None:
            return
        if not self._set_bias(layer, bias * affine.scale + affine.shift, affine):
            return
        replace_array(layer.kernel, kernel)
        if not needs_sum or not affine.shift.any():
            self._take_out(affine.node, affine.port)

    def _fold_ahead(self, affine: _Affine) -> None:
        """Fold a norm into the layer that alone reads it."""
        result = affine.node.outputs[0]
        if not self._is_own(result):
            return
        (use,) = result.uses()
        layer = self._layer(use.node) if use.idx == 0 else None
        if layer is None or layer.node.attributes.get_int("transA", 0) != 0:
            return
        axis = 1 - layer.rank if layer.is_convolution else -1
        _, inputs, outputs = layer.grid()
        if affine.axis != axis or layer.channels(inputs) != affine.scale.size:
            return
        if affine.shift.any() and not _is_exact_at_borders(layer.node):
            return
        kernel = self._scaled(layer, affine.scale, inputs)
        if layer.node.op_type == "MatMul":
            follower = self._addition_behind(layer)
            if follower is None and affine.shift.any():
                return
            layer = _Layer(layer.node, layer.kernel, layer.swapped, layer.rank, follower)
        bias = self._bias(layer)
        if kernel is None or bias is None:
            return
        moved = (self._grid_of(layer) * layer.along(affine.shift, inputs)).sum(
            axis=tuple(k for k in range(1, len(layer.grid()[0])) if k != outputs)
        )
        alpha = layer.node.attributes.get_float("alpha", 1.0)
        if not self._set_bias(layer, bias + alpha * moved.reshape(-1), affine):
            return
        replace_array(layer.kernel, kernel)
        self.editor.bypass(affine.node, affine.port)

    def _addition_behind(self, layer: _Layer) -> ir.Node | None:
        result = layer.node.outputs[0]
        if not self._is_own(result):
            return None
        (use,) = result.uses()
        found = self._layer_before(use.node.outputs[0]) if use.node.outputs[0].uses() else None
        return found.addition if found is not None and found.node is layer.node else None

    def _grid_of(self, layer: _Layer) -> Array:
        array = self._constant(layer.kernel)
        assert array is not None
        return array.reshape(layer.grid()[0])

    def _scaled(self, layer: _Layer, scale: Array, axis: int) -> Array | None:
        """The kernel with every channel scaled; ``None``: its type cannot hold that."""
        scaled = self._grid_of(layer) * layer.along(scale, axis)
        return self._held(layer.kernel, scaled.reshape(array_of(layer.kernel).shape))

    def _held(self, value: ir.Value, array: Array) -> Array | None:
        """The numbers in a value's type; ``None`` where they overflow there."""
        with np.errstate(over="ignore", invalid="ignore"):
            held = array.astype(array_of(value).dtype)
        return held if np.isfinite(held.astype(np.float64)).all() else None

    def _bias_operand(self, layer: _Layer) -> tuple[ir.Node, int]:
        """Where the bias of a layer is read, or would be."""
        if layer.addition is None:
            return layer.node, 2
        return layer.addition, int(self._constant(layer.addition.inputs[0]) is None)

    def _bias(self, layer: _Layer) -> Array | None:
        """What is added to the product, for all channels; ``None``: it is not known."""
        node, index = self._bias_operand(layer)
        value = node.inputs[index] if index < len(node.inputs) else None
        channels = layer.channels(layer.grid()[2])
        if value is None or (layer.node.op_type == "MatMul" and layer.addition is None):
            return np.zeros(channels)
        array = self._constant(value)
        if array is None or array.size not in (1, *array.shape[-1:]):
            return None
        if array.size not in (1, channels):
            return None
        beta = layer.node.attributes.get_float("beta", 1.0)
        return np.broadcast_to(array.reshape(-1) * beta, (channels,))

    def _set_bias(self, layer: _Layer, bias: Array, affine: _Affine) -> bool:
        """Let a layer add this bias; whether it can."""
        if layer.node.op_type == "MatMul" and layer.addition is None:
            return not bias.any() or self._add_behind(affine, bias)
        node, index = self._bias_operand(layer)
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is None and not bias.any():
            return True
        held = self._held(layer.kernel, bias)
        if held is None:
            return False
        node.attributes.pop("beta", None)
        if old is not None and self._is_own(old) and old.const_value is not None:
            shape = array_of(old).shape
            replace_array(old, held.reshape(shape) if prod(shape) == held.size else held)
            return True
        owner, _, leaf = (layer.kernel.name or "").rpartition(".")
        name = f"{owner}.bias" if leaf == "weight" else f"{layer.node.name}_bias"
        new = self.editor.constant(name, held)
        new.type = layer.kernel.type
        self.new.append(new.name or "")
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, new)
        return True

    def _add_behind(self, affine: _Affine, bias: Array) -> bool:
        """Turn a norm behind a product into the addition of its bias."""
        source = affine.node.inputs[affine.port]
        held = (
            self._held(affine.node.inputs[1], bias) if affine.node.inputs[1] is not None else None
        )
        if held is None or source is None or affine.axis != -1:
            return False
        value = self.editor.constant(f"{affine.node.name}_bias", held)
        self.new.append(value.name or "")
        self.editor.replace(affine.node, "Add", [source, value], results=[affine.node.outputs[0]])
        return True

    def _take_out(self, node: ir.Node, port: int) -> None:
        """Take a node out behind a layer, whose result gets its name."""
        source, result = node.inputs[port], node.outputs[0]
        assert source is not None
        name = result.name or ""
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)
        self.editor.release(source.name or "")
        source.name = name


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _is_exact_at_borders(node: ir.Node) -> bool:
    """Whether each result sums over the whole kernel, so that a shift counts everywhere alike."""
    if node.op_type == "ConvTranspose":
        return False
    padded = any(node.attributes.get_ints("pads", []))
    automatic = node.attributes.get_string("auto_pad", "NOTSET")
    return not padded and automatic in ("NOTSET", "VALID")
