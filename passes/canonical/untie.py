"""Constants that were stored once, though no two layers share a weight: a copy for every reader.

Exporters and optimizers store equal tensors once: zero biases, scales of one, what batch
normalizations were folded to. Layers that read the same tensor are tied through it, and keep their
width where one of them does. A copy each frees them, at the price of a few numbers; ``resize``
merges copies that are still equal.

A kernel that several nodes read is a tied weight and stays one. So does a vector that the model
lists as a parameter, or whose readers belong to layers that share their kernels, and numbers that
differ where no kernels tell the readers apart.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.edit import Editor
from morphgraph.errors import MorphError
from morphgraph.notation import NotationError
from morphgraph.onnx_io import ALIASES_KEY, COPIES_KEY
from morphgraph.onnx_io.mapped import blocks, shared
from morphgraph.ops import OpNode, describe, facts_of, is_layers_weight, listed_parameters

_MAX_DISTANCE = 64  # nodes looked at between a norm and the kernels around it


def untie_constants(model: ir.Model) -> None:
    """Give readers of one constant a copy each, in place, where that unties them.

    ``Model.meta`` notes which initializers are copies, and of which.
    """
    aliases: dict[tuple[str, str], str] = model.meta.pop(ALIASES_KEY, {})
    copies: dict[str, str] = {}
    parameters = set(listed_parameters(model) or ())
    shared_values = [
        value
        for value in model.graph.initializers.values()
        if value.name not in parameters and len(value.uses()) > 1 and _is_vector_or_filler(value)
    ]
    if shared_values:
        editor, layers = Editor(model), _Layers(model)
        order = {node: place for place, node in enumerate(model.graph)}
        for value in shared_values:
            reading = sorted(
                {use.node for use in value.uses()} & order.keys(), key=order.__getitem__
            )
            readers = [node for node in reading if _follows_channels(node, value)]
            name, tensor = value.name or "", value.const_value
            assert tensor is not None
            is_filler = _repeats(tensor)
            for tied in layers.apart(readers, is_filler)[1:]:
                wanted = aliases.get((name, tied[0].name or ""), f"{name}_{tied[0].name}")
                copy = editor.constant(wanted, shared(tensor))
                copies[copy.name or ""] = name
                for node in tied:
                    for index, operand in enumerate(node.inputs):
                        if operand is value:
                            node.replace_input_with(index, copy)
    model.meta[COPIES_KEY] = copies


def merge_copies(model: ir.Model) -> bool:
    """Let readers of copies that hold the same read one initializer again; whether some do."""
    initializers = model.graph.initializers
    families: dict[str, list[str]] = {}
    for copy, name in model.meta.get(COPIES_KEY, {}).items():
        families.setdefault(name, [name]).append(copy)
    merged = False
    for names in families.values():
        kept: dict[tuple[object, ...], ir.Value] = {}
        for value in (initializers[name] for name in names if name in initializers):
            if value.const_value is None:
                continue
            array = value.const_value.numpy()
            content = value.dtype, array.shape, np.ascontiguousarray(array).tobytes()
            first = kept.setdefault(content, value)
            if first is not value and not value.is_graph_output():
                value.replace_all_uses_with(first)
                del initializers[value.name or ""]
                merged = True
    return merged


def _is_vector_or_filler(value: ir.Value) -> bool:
    """Whether a constant has at most one axis, or repeats one number everywhere."""
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or not tensor.size:
        return False
    if tensor.size == 1:
        return tensor.dtype.is_floating_point()
    return sum(size > 1 for size in tensor.shape.numpy()) == 1 or _repeats(tensor)


def _repeats(tensor: ir.TensorProtocol) -> bool:
    array: Array = tensor.numpy()
    if not any(array.strides):
        return True
    if not tensor.dtype.is_floating_point():
        return bool((array == array.reshape(-1)[0]).all())
    first = array.reshape(-1)[0]
    return all((block == first).all() for _, block in blocks(tensor))


def _follows_channels(node: ir.Node, value: ir.Value) -> bool:
    """Whether an axis of the operand is one that a resize of the node may change."""
    try:
        description = describe(OpNode(node))
    except (NotationError, MorphError):
        return False  # said in the pass that couples operators
    mine = {k for k, operand in enumerate(node.inputs) if operand is value}
    for factor in description.factors.values():
        ports = {place.port for place in factor.places}
        # One number is a channel's where a layer has a single one: its scale, or its bias.
        follows = factor.size > 1 or any(is_layers_weight(node, port) for port in ports & mine)
        if follows and factor.pinned is None and ports & mine:
            # Not so an axis that no activation has, such as the positions of a table.
            others = [k for k in ports - mine if k < 0 or not _is_initializer(node.inputs[k])]
            if others:
                return True
    return False


def _is_initializer(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


class _Layers:
    """Which nodes belong to one layer that runs several times: those around the same kernels."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self.known: dict[ir.Node, frozenset[ir.Value]] = {}
        self.found: dict[tuple[ir.Node, bool], tuple[Sequence[ir.Node], int]] = {}

    def apart(self, nodes: Sequence[ir.Node], is_filler: bool) -> list[list[ir.Node]]:
        """The nodes by layers; each node that runs alone is a layer of its own.

        Args:
            nodes: which read one constant.
            is_filler: whether that repeats one number. Other numbers are hardly the same by chance,
                and readers without kernels have nothing else that tells them apart.
        """
        layer_of: dict[ir.Node, list[ir.Node]] = {}
        alike: dict[object, list[ir.Node]] = {}
        for node in nodes:
            layer = [node]
            traits = [*self._traits(node)]
            # Who shares no trait does not run together: not every pair has to be looked at.
            for other in dict.fromkeys(n for trait in traits for n in alike.get(trait, ())):
                theirs = layer_of[other]
                if theirs is not layer and self._together(node, other, is_filler):
                    layer += theirs
                    layer_of.update(dict.fromkeys(theirs, layer))
            layer_of[node] = layer
            for trait in traits:
                alike.setdefault(trait, []).append(node)
        place = {node: k for k, node in enumerate(nodes)}
        layers = {id(layer): sorted(layer, key=place.__getitem__) for layer in layer_of.values()}
        return sorted(layers.values(), key=lambda layer: place[layer[0]])

    def _traits(self, node: ir.Node) -> Iterator[object]:
        """What two nodes that run together have in common, one of them at least."""
        kernels = [self._kernels_of(self._near(node, before)[0]) for before in (True, False)]
        yield from ((side, found) for side, found in enumerate(kernels) if found)
        if not any(kernels):
            yield "alone"

    def _kernels_of(self, nodes: Sequence[ir.Node]) -> frozenset[frozenset[ir.Value]]:
        return frozenset(map(self._kernels, nodes))

    def _together(self, one: ir.Node, other: ir.Node, is_filler: bool) -> bool:
        """Whether both stand at the same kernels, which different nodes read."""
        ahead = [self._near(node, before=True) for node in (one, other)]
        if self._same(*ahead):
            return True
        # A bias stands behind its kernel. A norm may stand in front of those of its layer.
        if any(nodes and distance <= facts_of(one).adds for nodes, distance in ahead):
            return False
        behind = [self._near(node, before=False) for node in (one, other)]
        if not is_filler and not any(nodes for nodes, _ in (*ahead, *behind)):
            return True
        return self._same(*behind)

    def _same(
        self, one: tuple[Sequence[ir.Node], int], other: tuple[Sequence[ir.Node], int]
    ) -> bool:
        kernels = [self._kernels_of(nodes) for nodes, _ in (one, other)]
        return bool(kernels[0]) and kernels[0] == kernels[1] and not set(one[0]) & set(other[0])

    def _near(self, node: ir.Node, before: bool) -> tuple[Sequence[ir.Node], int]:
        """The nearest nodes with kernels, and how far they are."""
        if (node, before) not in self.found:
            self.found[node, before] = self._search(node, before)
        return self.found[node, before]

    def _search(self, node: ir.Node, before: bool) -> tuple[Sequence[ir.Node], int]:
        level, seen, distance = [node], {node}, 0
        while level and len(seen) < _MAX_DISTANCE:
            found = [n for n in level if self._kernels(n)]
            if found:
                return found, distance
            around = (n for step in level for n in (_before(step) if before else _behind(step)))
            level = [n for n in dict.fromkeys(around) if n not in seen]
            seen.update(level)
            distance += 1
        return [], distance

    def _kernels(self, node: ir.Node) -> frozenset[ir.Value]:
        if node not in self.known:
            facts = facts_of(node)
            is_layer = facts.initial is not None and not (facts.adds or facts.multiplies)
            operands = [value for value in node.inputs if is_layer and value is not None]
            self.known[node] = frozenset(
                source
                for value in operands
                for source in _sources(value)
                if sum(size > 1 for size in source.shape or () if isinstance(size, int)) > 1
            )
        return self.known[node]


def _sources(value: ir.Value) -> Iterator[ir.Value]:
    """The initializers of which a weight is computed, without any activation."""
    pending, found = [value], []
    while pending:
        value = pending.pop()
        node = value.producer()
        if value.is_initializer():
            found.append(value)
        elif node is None or len(found) > _MAX_DISTANCE:
            return  # an activation
        else:
            pending += [operand for operand in node.inputs if operand is not None]
    yield from found


def _before(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.inputs:
        maker = None if value is None else value.producer()
        if maker is not None:
            yield maker


def _behind(node: ir.Node) -> Iterator[ir.Node]:
    for value in node.outputs:
        for use in value.uses():
            yield use.node
