"""The same network in single precision.

ONNX Runtime's CPU provider has no kernels for many operators in half or double precision, and half
precision would hide a small error behind its own rounding. Slicing does not round, so a resize is
right in every precision or in none, and is checked in single precision.
"""

import numpy as np
import onnx_ir as ir

from morphgraph.onnx_io import graphs_of, values_of

# To look through three is quicker than to hash one of onnx_ir's numbers.
_OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

# Attributes of ONNX's own operators that name an element type.
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "precision", "softmax_precision", "stash_type")


def in_single_precision(model: ir.Model) -> ir.Model:
    """A copy of the model in which float16, bfloat16 and double are float32.

    Weights are converted when they are read. Doubles too large for float32 become its largest
    number. A model without such types is returned as it is.

    >>> half = ir.from_onnx_text('''
    ... <ir_version: 10, opset_import: ["" : 20]>
    ... tiny (float16[1,2] x) => (double[1,2] y) { y = Cast<to=11>(x) }''')
    >>> single = in_single_precision(half)
    >>> single.graph.inputs[0].dtype, single.graph.outputs[0].dtype
    (FLOAT, FLOAT)
    """
    if not any(value.dtype in _OTHERS for graph in graphs_of(model) for value in values_of(graph)):
        return model
    copy = model.clone()
    for graph in graphs_of(copy):
        for value in values_of(graph):
            if isinstance(value.type, ir.TensorType) and value.dtype in _OTHERS:
                # Not in place: the type belongs to the original as well.
                value.type = ir.TensorType(ir.DataType.FLOAT)
            if value.const_value is not None and value.const_value.dtype in _OTHERS:
                value.const_value = _when_read(value.const_value)
        for node in graph:
            _convert_attributes(node)
    return copy


def _when_read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: _single(tensor), ir.DataType.FLOAT, shape, name=tensor.name)


def _single(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    array = tensor.numpy()
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    overflown = np.isinf(single) & np.isfinite(array)
    if overflown.any():
        largest = np.finfo(np.float32).max
        single = np.where(overflown, np.copysign(largest, single), single)
    return ir.Tensor(single, name=tensor.name)


def _convert_attributes(node: ir.Node) -> None:
    for name, attribute in () if node.domain else list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in _OTHERS:
            node.attributes[name] = ir.AttrTensor(name, _single(attribute.as_tensor()))
        elif name in _TYPE_ATTRIBUTES and attribute.value in _OTHERS:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT.value)
