"""Which initializers training changes: parameters by gradients, running statistics beside them."""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from morphgraph.onnx_io import PARAMETERS_KEY, stored_names, values_of
from morphgraph.onnx_io.fixed import fixed_values
from morphgraph.ops.op import Coded, OpNode, facts_of


def listed_parameters(model: ir.Model) -> list[str] | None:
    """The names that the model lists as its parameters; ``None``: it has no list that fits.

    Other tools keep the metadata and rename, fold or split weights. A list is outdated where a name
    of it has gone and some layer has a weight that is not on it. A name that has gone with its
    layer is no harm, nor is a layer's weight that was never listed: a buffer.

    Raises:
        ModelError: the model's list is broken.
    """
    if PARAMETERS_KEY not in model.metadata_props:
        return None
    values = {value.name for value in values_of(model.graph) if _is_read(value)}
    listed = stored_names(model)
    known = [name for name in listed if name in values]
    if len(known) < len(listed) and not layers_weights(model) <= set(known):
        return None
    return known


def parameter_names(model: ir.Model) -> list[str]:
    """Names of the initializers that gradients change, in the model's order.

    A model exported by morphgraph lists them. In any other, ONNX cannot tell parameters from
    buffers: there, all floating-point initializers with at least one axis count, apart from those
    that are read as running statistics alone, and from inputs that were fixed. So they do where the
    list does not fit any more (:func:`listed_parameters`).

    Raises:
        ModelError: the model's list is broken.
    """
    initializers = model.graph.initializers
    listed = listed_parameters(model)
    if listed is not None:
        return [name for name in listed if name in initializers]
    settings = fixed_values(model)
    return [
        name
        for name, value in initializers.items()
        if name not in settings
        if _may_train(value) and not (value.uses() and all(_statistical_reads(value)))
    ]


def weights_of(model: ir.Model) -> dict[str, float]:
    """The initializers that hold weights, in the model's order: how many a number stands for.

    That is one, but for numbers of a few bits that share a byte. A network has the same weights
    whether they are stored as they are or quantized: scales and zero points are none.

    Raises:
        ModelError: the model's list of parameters is broken.
    """
    coded, codes = coded_weights(model)
    known = set(parameter_names(model)) - codes
    return {
        name: coded.get(name, 1.0)
        for name in model.graph.initializers
        if name in known or name in coded
    }


def coded_weights(model: ir.Model) -> tuple[dict[str, float], set[str]]:
    """The weights of a model that are stored as whole numbers.

    Returns:
        By initializer how many weights one of its numbers stands for; and the initializers that
        only say what such numbers mean (scales, zero points), which are no weights.
    """
    weights: dict[str, float] = {}
    codes: dict[str, set[tuple[ir.Node, int]]] = {}
    for node in model.graph:
        for port, coded in coded_operands(node).items():
            value = _initializer(node, port)
            if value is None or value.dtype is None or not value.dtype.is_integer():
                continue
            weights.setdefault(value.name or "", coded.weights)
            for other in coded.by:
                code = _initializer(node, other)
                if code is not None:
                    codes.setdefault(code.name or "", set()).add((node, other))
    stored = model.graph.initializers
    only = {name for name, read in codes.items() if read >= set(map(tuple, stored[name].uses()))}
    return weights, only - weights.keys()


def coded_operands(node: ir.Node) -> Mapping[int, Coded]:
    """By operand of a node what its whole numbers stand for, if they are weights."""
    facts = facts_of(node)
    if facts.coded is not None:
        found: Mapping[int, Coded] = facts.call(facts.coded, node, OpNode(node))
        return found
    return {
        port: Coded(1, tuple(other for other in others if other is not None))
        for port, others in facts.quantized.items()
    }


def _initializer(node: ir.Node, port: int) -> ir.Value | None:
    value = node.inputs[port] if port < len(node.inputs) else None
    return value if value is not None and value.is_initializer() else None


def running_statistics(model: ir.Model) -> list[str]:
    """Names of the initializers that norms read as running statistics."""
    return [
        name for name, value in model.graph.initializers.items() if any(_statistical_reads(value))
    ]


def _statistical_reads(value: ir.Value) -> list[bool]:
    """For each use of a value whether it is as a running statistic."""
    return [use.idx in facts_of(use.node).statistics for use in value.uses()]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _may_train(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.dtype.is_floating_point() and tensor.shape.rank() > 0


def layers_weights(model: ir.Model) -> set[str]:
    """Names of the floating-point initializers that layers read as kernels, scales and biases."""
    return {
        name
        for name, value in model.graph.initializers.items()
        if _may_train(value) and any(is_layers_weight(*use) for use in _moved_uses(value))
    }


def _moved_uses(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The uses of a weight, as node and index, also behind operators that move it."""
    for node, index in value.uses():
        yield node, index
        if facts_of(node).moves and index == 0:
            for output in node.outputs:
                yield from _moved_uses(output)


def is_layers_weight(node: ir.Node, index: int) -> bool:
    """Whether an operand is a layer's kernel, scale or bias, if it is a weight."""
    facts = facts_of(node)
    if facts.initial is None or index in facts.statistics:
        return False
    if not (facts.adds or facts.multiplies):
        return True
    # Of what is added, the bias of a linear layer, whose product has no bias of its own.
    others = [v for k, v in enumerate(node.inputs) if k != index and v is not None]
    makers = [maker for value in others if (maker := value.producer()) is not None]
    return facts.adds and any(_is_product(maker) for maker in makers)


def _is_product(node: ir.Node) -> bool:
    facts = facts_of(node)
    pointwise = facts.adds or facts.multiplies
    return facts.initial is not None and facts.shift is None and not pointwise
