"""Models of older opsets, raised to the oldest one that the program knows.

onnx's version converter does it. It gets the nodes and small constants; weights never pass through
it. What it loses of names and metadata is put back, and so is what a Resize means.
"""

from collections.abc import Iterable, Iterator

import onnx

from morphgraph.errors import ModelError
from morphgraph.onnx_io.check import MIN_OPSET, escape

_MAX_CONSTANT = 4096  # elements of a constant that the converter may look into

_CONVERTER_ERRORS = (
    RuntimeError,
    ValueError,
    IndexError,
    TypeError,
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    onnx.version_converter.ConvertError,
)
_FREE_INITIALIZERS = 4  # the IR version from which initializers need not be inputs
_PRELU_BROADCASTS = 7  # the opset from which slopes are aligned with the last axis, not the second
_RESIZING = ("Resize", "Upsample")


def standard_opset(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model names; 0: it names none."""
    return next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def raised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model at the oldest supported opset; one that is not older is returned as it is.

    Args:
        proto: a checked model; it is not changed.

    Raises:
        ModelError: an operator cannot be converted; names it.
    """
    if not 0 < standard_opset(proto) < MIN_OPSET:
        return proto
    light = _without_weights(proto)
    try:
        converted = onnx.version_converter.convert_version(light, MIN_OPSET)
    except _CONVERTER_ERRORS as error:
        raise ModelError(_refusal(light, error)) from error
    _restore_nodes(light.graph, converted.graph)
    if standard_opset(proto) < _PRELU_BROADCASTS:
        _align_slopes(converted)
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    known = {tensor.name for tensor in graph.initializer}
    if proto.ir_version < _FREE_INITIALIZERS:
        # All had to stand among the inputs; later that says that callers may override them.
        for k in reversed([k for k, v in enumerate(graph.input) if v.name in known]):
            del graph.input[k]
        result.ir_version = _FREE_INITIALIZERS
    del graph.node[:], result.opset_import[:]
    graph.node.extend(converted.graph.node)
    graph.initializer.extend(t for t in converted.graph.initializer if t.name not in known)
    result.opset_import.extend(converted.opset_import)
    return result


def _without_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model whose large and external initializers are plain inputs."""
    light = onnx.ModelProto(
        ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions
    )
    graph = light.graph
    graph.name = proto.graph.name or "graph"
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(proto.graph, field))
    declared = {value.name for value in graph.input}
    for tensor in proto.graph.initializer:
        count = 1
        for size in tensor.dims:
            count *= size
        is_kept = count <= _MAX_CONSTANT and tensor.data_location != onnx.TensorProto.EXTERNAL
        if is_kept:
            graph.initializer.append(tensor)
        # Writers leave the input out where it is called for; the converter does not.
        is_free = is_kept and proto.ir_version >= _FREE_INITIALIZERS
        if tensor.name not in declared and not is_free:
            graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return light


def _refusal(light: onnx.ModelProto, error: Exception) -> str:
    version = standard_opset(light)
    node = next((node for node in light.graph.node if not _converts(light, node)), None)
    words = escape(" ".join(str(error).split())).rpartition("failed: ")[2]
    where = "" if node is None else f"node '{escape(node.name)}' ({escape(node.op_type)}): "
    return (
        f"{where}opset {version} is older than the oldest supported, {MIN_OPSET}, and onnx's "
        f"version converter cannot raise it: {words}; export again with a newer opset"
    )


def _converts(light: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    """Whether the converter takes a node by itself."""
    graph = onnx.helper.make_graph(
        [node],
        "node",
        [value for value in light.graph.input if value.name in node.input]
        + [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in dict.fromkeys(node.input)
            if name and name not in {value.name for value in light.graph.input}
        ],
        [onnx.helper.make_empty_tensor_value_info(name) for name in node.output if name],
        [tensor for tensor in light.graph.initializer if tensor.name in node.input],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=light.opset_import, ir_version=light.ir_version
    )
    try:
        onnx.version_converter.convert_version(model, MIN_OPSET)
    except _CONVERTER_ERRORS:
        return False
    return True


def _restore_nodes(before: onnx.GraphProto, after: onnx.GraphProto) -> None:
    """Give nodes back the names, texts and metadata that they had, and a Resize its meaning.

    Nodes are known by the names of their results, but for an Upsample: the converter puts a Resize
    of another name in its place. All that resize follow each other as before.
    """
    for resizing, node in zip(_resizing(before), _resizing(after), strict=True):
        _rename(node.output[0], resizing.output[0], after)
        if node.op_type == "Resize":
            _keep_meaning(node, after)
    old = {name: node for node in _nodes(before) for name in node.output if name}
    for node in _nodes(after):
        origin = next((old[name] for name in node.output if name in old), None)
        if origin is None:
            continue
        node.name, node.doc_string = origin.name, origin.doc_string
        del node.metadata_props[:]
        node.metadata_props.extend(origin.metadata_props)


def _resizing(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in _nodes(graph) if node.op_type in _RESIZING and not node.domain]


def _rename(found: str, name: str, graph: onnx.GraphProto) -> None:
    """Give a value another name, wherever it is made and read."""
    for node in _nodes(graph):
        for names in (node.input, node.output):
            for k, other in enumerate(names):
                if other == found:
                    names[k] = name


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside."""
    graphs = [graph]
    for inner in graphs:  # grows while nested ones are found
        for node in inner.node:
            yield node
            for attribute in node.attribute:
                graphs += [attribute.g] if attribute.HasField("g") else attribute.graphs


def _keep_meaning(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Say how a Resize of opset 11 takes positions, which before was the only way there was.

    The converter leaves that out, so that the new default holds: other pixels, in linear mode all.
    """
    node.attribute.append(
        onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric")
    )
    mode = next((a.s for a in node.attribute if a.name == "mode"), b"nearest")
    if mode == b"nearest":
        scales = _constant(node.input[2], graph) if len(node.input) > 2 else ()
        # ONNX Runtime rounds up where it leaves pixels out.
        smaller = [scale for scale in scales if scale < 1]
        if smaller and any(scale > 1 for scale in scales):
            raise ModelError(
                f"node '{escape(node.name)}' ({node.op_type}): makes one axis smaller and another "
                f"larger, which opset {MIN_OPSET} cannot say; export again with a newer opset"
            )
        node.attribute.append(
            onnx.helper.make_attribute("nearest_mode", "ceil" if smaller else "floor")
        )


def _constant(name: str, graph: onnx.GraphProto) -> Iterable[float]:
    """The numbers of a constant; none where it is computed."""
    tensors = [tensor for tensor in graph.initializer if tensor.name == name]
    tensors += [
        attribute.t
        for node in _nodes(graph)
        if node.op_type == "Constant" and name in node.output
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    numbers: list[float] = onnx.numpy_helper.to_array(tensors[0]).tolist() if tensors else []
    return numbers


def _align_slopes(model: onnx.ModelProto) -> None:
    """Give one slope per channel the axes behind the channels, as broadcasting wants them.

    The converter leaves slopes as they are, so that they meet another axis.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    declared = (*inferred.input, *inferred.value_info, *inferred.output)
    sizes = {value.name: value.type.tensor_type.shape.dim for value in declared}
    sizes |= {tensor.name: tensor.dims for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type == "PRelu" and not node.domain and len(sizes.get(node.input[1], ())) == 1:
            slope, rank = node.input[1], len(sizes.get(node.input[0], ()))
            if rank > 2:
                aligned = f"{slope}_of_{node.output[0]}"
                axes = list(range(1, rank - 1))
                unsqueeze = onnx.helper.make_node("Unsqueeze", [slope], [aligned], axes=axes)
                model.graph.node.append(unsqueeze)
                node.input[1] = aligned
        model.graph.node.append(node)
