"""A model that was joined of several files becomes such files again: ``join_files`` backwards."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.errors import ModelError
from morphgraph.onnx_io import graphs_of, values_of
from morphgraph.onnx_io.copies import copied
from morphgraph.onnx_io.keys import JOINED_KEY
from morphgraph.passes.canonical.join_files import Layout, layouts


def split_files(model: ir.Model) -> dict[str, ir.Model]:
    """By name of a part the model that it is: what a joined one, resized or not, holds of it.

    Inputs and outputs are those of the part's file, in order, and so are their open sizes.

    Args:
        model: is not changed.

    Raises:
        ModelError: it is not joined of several.
    """
    noted = layouts(model)
    if noted is None:
        raise ModelError("the model is not joined of several files; save it as it is")
    return {part.name: _part_of(model, part) for part in noted.parts}


def files_of(model: ir.Model) -> dict[str, ir.Model]:
    """By name of a file the model that it holds, of a joined one: as :func:`split_files`.

    A file of two networks gets both again, in the branches of an If.

    Args:
        model: is not changed.
    """
    parts, noted = split_files(model), layouts(model)
    assert noted is not None
    found: dict[str, ir.Model] = {}
    pairs: dict[str, dict[bool, Layout]] = {}
    for part in noted.parts:
        if part.choice is None:
            found[part.name] = parts[part.name]
        else:
            pairs.setdefault(part.choice.file, {})[part.choice.value] = part
    for file, pair in pairs.items():
        found[file] = _merged(pair, {value: parts[part.name] for value, part in pair.items()})
    return found


def _part_of(model: ir.Model, part: Layout) -> ir.Model:
    """A part of a joined model as a model of its own, with the names of its file."""
    own = copied(model)
    own.meta.clear()
    graph = own.graph
    values = {value.name or "": value for value in values_of(graph)}
    # Caches of heads that are gone are in no file any more.
    outputs = {name: values[joined] for name, joined in part.outputs.items() if joined in values}
    graph.outputs.clear()
    graph.outputs.extend(outputs.values())
    inputs: list[ir.Value] = []
    for name, joined in part.inputs.items():
        value = values.get(joined)
        if value is None:
            continue
        source = ir.Value(name=f"{part.name}/{name}", type=value.type)
        source.shape = _declared_shape(part.sizes[name], value)
        if value not in outputs.values():  # else it only says the size of what nobody reads
            value.replace_all_uses_with(source)
        inputs.append(source)
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    common.RemoveUnusedNodesPass()(own)
    for value in list(graph.initializers.values()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(value.name or "")
    own.metadata_props.pop(JOINED_KEY)
    own.metadata_props.update(part.metadata)
    _name_as_in_file(own, part)
    for name, value in outputs.items():
        value.name = name
        value.shape = _declared_shape(part.sizes[name], value)
    return own


def _declared_shape(sizes: Sequence[int | str | None], value: ir.Value) -> ir.Shape | None:
    """The shape that a file declares of an input or output, at the sizes that it has now."""
    if value.shape is None or len(value.shape) != len(sizes):
        return ir.Shape([size if isinstance(size, str) else None for size in sizes])
    return ir.Shape(
        [
            new if isinstance(old, int) and isinstance(new, int) else old
            for old, new in zip(sizes, value.shape, strict=True)
        ]
    )


def _name_as_in_file(model: ir.Model, part: Layout) -> None:
    """Take the part's name off all names, and give weights those that they have in the file."""
    prefix = f"{part.name}/"
    graph = model.graph
    constants = list(graph.initializers.values())
    outputs = set(graph.outputs)
    taken = set(part.weights.values()) | {*part.inputs, *part.outputs}
    for each in graphs_of(model):
        for value in values_of(each):
            if value in constants or not value.name:
                continue
            value.name = _as_in_file(value.name, prefix)
            while value.name in taken and value not in graph.inputs and value not in outputs:
                value.name += "_"
        for node in each:
            node.name = _as_in_file(node.name or "", prefix)
            for value in node.outputs:
                if value.shape is not None and value not in outputs:
                    value.shape = ir.Shape(
                        [size if isinstance(size, int) else None for size in value.shape]
                    )
    for value in constants:
        graph.initializers.pop(value.name or "")
    for value in constants:
        new = _as_in_file(value.name or "", prefix)
        value.name = part.weights.get(value.name or "", new)
        while value.name in graph.initializers:
            value.name += "_"
        graph.initializers[value.name] = value


def _as_in_file(name: str, prefix: str) -> str:
    """A name without the part's; that of a new value may have a node's name behind its own."""
    return name.removeprefix(prefix).replace(f"_{prefix}", "_")


def _merged(parts: Mapping[bool, Layout], models: Mapping[bool, ir.Model]) -> ir.Model:
    """A file of two networks: what both take comes in once, and so do weights that both hold."""
    choice = parts[True].choice
    assert choice is not None
    chooser = ir.Value(name=choice.flag, type=ir.TensorType(ir.DataType.BOOL))
    chooser.shape = ir.Shape(choice.shape)
    inputs: dict[str, ir.Value] = {}
    for model in models.values():
        for value in model.graph.inputs:
            # The one that reads an input knows its size.
            if value.uses() or value.name not in inputs:
                inputs[value.name or ""] = ir.Value(
                    name=value.name, type=value.type, shape=value.shape
                )
    weights: dict[str, ir.Value] = {}
    ends = {v: {out.name: out for out in models[v].graph.outputs} for v in (True, False)}
    bodies = {flag: _body(models[flag], inputs, weights, flag) for flag in (True, False)}
    names = dict.fromkeys(name for part in parts.values() for name in (*part.outputs, *part.empty))
    order = list(parts[True].sizes)  # as the file has them
    names = dict.fromkeys(sorted(names, key=order.index))
    results: list[ir.Value] = []
    for name in names:
        like = next(e[name] for e in ends.values() if name in e)
        results.append(ir.Value(name=name, type=like.type, shape=like.shape))
    for flag, body in bodies.items():
        for name, result in zip(names, results, strict=True):
            body.outputs.append(ends[flag].get(name) or _empty(body, parts[flag], name, result))
        _name_apart(body, {*inputs, *weights, choice.flag})
    branches = [
        ir.AttrGraph("then_branch", bodies[True]),
        ir.AttrGraph("else_branch", bodies[False]),
    ]
    node = ir.Node("", "If", [chooser], branches, outputs=results, name=choice.flag)
    taken = list(inputs.values())
    taken.insert(choice.place, chooser)
    first = models[True]
    graph = ir.Graph(
        taken,
        results,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports=dict(first.opset_imports) | dict(models[False].opset_imports),
        name="merged",
    )
    merged = ir.Model(graph, ir_version=first.ir_version)
    merged.metadata_props.update(first.metadata_props)
    return merged


def _body(
    model: ir.Model, inputs: Mapping[str, ir.Value], weights: dict[str, ir.Value], is_true: bool
) -> ir.Graph:
    """The nodes of a network as a branch, which reads inputs and weights from around it."""
    graph = model.graph
    for value in list(graph.inputs):
        value.replace_all_uses_with(inputs[value.name or ""])
    for value in list(graph.initializers.values()):
        name = value.name or ""
        while name in weights and not _is_same(weights[name], value):
            name += "_"
        if name not in weights:
            weights[name] = ir.Value(
                name=name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        value.replace_all_uses_with(weights[name])
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    return ir.Graph([], [], nodes=nodes, name="later" if is_true else "first")


def _name_apart(body: ir.Graph, around: set[str]) -> None:
    """Give values of a branch other names than inputs and weights have, which the other one has."""
    outputs = set(body.outputs)
    for node in body.all_nodes():
        for value in node.outputs:
            while value.name in around and value not in outputs:
                value.name += "_"


def _is_same(one: ir.Value, other: ir.Value) -> bool:
    before, after = one.const_value, other.const_value
    assert before is not None
    assert after is not None
    if before.dtype != after.dtype or before.shape != after.shape:
        return False
    return before is after or before.numpy().tobytes() == after.numpy().tobytes()


def _empty(body: ir.Graph, part: Layout, name: str, result: ir.Value) -> ir.Value:
    """A constant without numbers, of the size that the other branch's result has."""
    declared = part.sizes[name]
    sizes = [
        new if isinstance(new, int) and old == was else old
        for old, was, new in zip(part.empty[name], declared, result.shape or (), strict=True)
    ]
    assert result.dtype is not None
    tensor = ir.Tensor(np.zeros(sizes, result.dtype.numpy()), name=name)
    node = ir.node("Constant", [], {"value": tensor}, name=f"{name}_empty")
    end = node.outputs[0]
    end.name, end.type, end.shape = name, result.type, ir.Shape(sizes)
    body.append(node)
    return end
