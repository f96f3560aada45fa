"""Pass ``couple``: from a canonical model to dims, factors, and the edges between them."""

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.errors import ModelError, UnsupportedError
from morphgraph.graph import Couplings, Dim, Edge, GraphOp, OpFactor
from morphgraph.notation import NotationError
from morphgraph.onnx_io import (
    CHOICE_KEY,
    DYNAMIC_AXES_KEY,
    captured_values,
    escape,
    known_shape,
    node_label,
    static_shape,
)
from morphgraph.ops import Description, OpNode, describe, entry_of, mismatch_hint
from morphgraph.ops.description import IDENTITY
from morphgraph.passes.canonical.caches import following_axes
from morphgraph.passes.coupling.numbers import numberings

MAX_POSITIONS = 2**26
"""Of all axes of a network together; lists of them are held in memory."""


def too_large(where: str, size: int) -> str:
    """What to say of an axis of that size.

    >>> too_large("axis 0 of 'x'", 2**34)
    "axis 0 of 'x' has 17179869184 positions; at most 67108864 in all axes can be followed: ..."
    """
    return (
        f"{where} has {size} positions; at most {MAX_POSITIONS} in all axes can be followed: "
        "export the model for smaller inputs, or without that tensor"
    )


def couple(model: ir.Model, pin_outputs: bool = True, pin_rows: bool = True) -> Couplings:
    """Describe every operator of a canonical model and lay its factors on the values' axes.

    Args:
        model: as ``canonicalize`` returns it.
        pin_outputs: whether graph outputs keep their size, as a user of the model expects.
        pin_rows: whether tables keep the rows that are named by number at run time.

    Raises:
        ModelError: an operator's operands do not fit together; names the node.
    """
    return _Coupler(model, pin_outputs, pin_rows).run()


def _require_bounded(values: Iterable[ir.Value]) -> None:
    """Refuse axes whose positions cannot be listed; a weight without numbers may claim any size.

    Raises:
        UnsupportedError: names the first such axis.
    """
    for value in values:
        sizes = known_shape(value) or ()
        if max(sizes, default=0) <= MAX_POSITIONS:
            continue
        held = 0 if value.const_value is None else value.const_value.size
        for axis, size in enumerate(sizes):
            if size > max(MAX_POSITIONS, held):
                where = f"axis {axis} of '{escape(value.name or '')}'"
                raise UnsupportedError(too_large(where, size))


class _Coupler:
    """Two walks: the first describes operators and gives axes their dims, the second lays factors.

    Dims come first in the numbering, so that factors can be numbered only once all dims are known.
    """

    def __init__(self, model: ir.Model, pin_outputs: bool, pin_rows: bool) -> None:
        self.model = model
        self.pin_rows = pin_rows
        self.rows: set[int] = set()
        self.pin_outputs = pin_outputs
        self.first_dim: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.dims: list[Dim] = []
        self.sizes: list[int] = []
        self.input_independent = input_independent_values(model)
        self.known_shapes: dict[ir.Value, Shape] = {}
        self.factors: list[OpFactor] = []
        self.edges: list[Edge] = []
        self.pins: dict[int, str] = {}
        self.preferences: dict[int, tuple[str, ...]] = {}
        self.reluctant: set[int] = set()
        self.eager: set[int] = set()
        self.sharing: set[int] = set()
        self.ties: list[tuple[int, int]] = []
        self.least: dict[int, int] = {}
        self.multiples: dict[int, int] = {}
        self.numbered: dict[int, dict[int, int]] = {}
        self.indexed: dict[ir.Node, dict[int, int]] = {}  # by operand the factor

    def run(self) -> Couplings:
        graph = self.model.graph
        _require_bounded([*graph.inputs, *graph.initializers.values()])
        for value in graph.inputs:
            self._enter(value)
        described = [self._describe(node) for node in graph]
        ops = [
            self._couple(k, node, description) for k, (node, description) in enumerate(described)
        ]
        self._follow_numbers(ops)
        self._pin_open()
        self._pin_interface()
        return Couplings(
            model=self.model,
            first_dim=self.first_dim,
            shapes=self.shapes,
            dims=self.dims,
            factors=self.factors,
            sizes=np.array(self.sizes, dtype=np.int64),
            ops=ops,
            edges=self.edges,
            pins=self.pins,
            input_independent=self.input_independent,
            preferences=self.preferences,
            reluctant=frozenset(self.reluctant),
            eager=frozenset(self.eager),
            sharing=frozenset(self.sharing),
            rows=frozenset(self.rows),
            ties=self.ties,
            least=self.least,
            numbered=self.numbered,
            indexed=frozenset(k for ports in self.indexed.values() for k in ports.values()),
            multiples=self.multiples,
        )

    # -- dims ----------------------------------------------------------------------------------

    def _describe(self, node: ir.Node) -> tuple[OpNode, Description]:
        """The description of a node's operator; values on which a factor stands get dims."""
        _require_bounded(node.outputs)
        op_node = OpNode(node, self.input_independent, self._shape)
        try:
            description = describe(op_node)
        except NotationError as error:
            raise ModelError(
                f"{node_label(node)}: shape mismatch: {error}; "
                f"{mismatch_hint(entry_of(op_node.op_type, op_node.domain))}"
            ) from None
        ports = {place.port for factor in description.factors.values() for place in factor.places}
        for port in sorted(ports):
            self._enter(_value_at(node, port))
        return op_node, description

    def _enter(self, value: ir.Value) -> None:
        """Give a value's axes dims, unless they have some."""
        name = value.name or ""
        if name not in self.first_dim:
            shape = self._shape(value)
            self.first_dim[name] = len(self.dims)
            self.shapes[name] = shape
            self.dims += [Dim(name, axis) for axis in range(len(shape))]
            self.sizes += shape

    def _shape(self, value: ir.Value) -> Shape:
        """A value's static shape; looked up once, since a value may have hundreds of readers."""
        shape = self.known_shapes.get(value)
        if shape is None:
            shape = self.known_shapes[value] = static_shape(value)
        return shape

    # -- factors -------------------------------------------------------------------------------

    def _couple(self, op_index: int, op_node: OpNode, description: Description) -> GraphOp:
        """Lay an operator's factors on the axes of its operands and results."""
        node = op_node.ir
        vertices = {name: len(self.sizes) + k for k, name in enumerate(description.factors)}
        covered: set[int] = set()
        first: dict[int, int] = {}
        sizes, enter = self.sizes, self.edges.append
        for name, factor in description.factors.items():
            vertex = vertices[name]
            self.factors.append(OpFactor(op_node.name, name))
            sizes.append(factor.size)
            if name in description.rows and not self.pin_rows:
                self.rows.add(vertex)
            elif factor.pinned is not None:
                self.pins[vertex] = factor.pinned
            size = factor.size
            for port, axis, index_map in factor.places:
                start = first.get(port)
                if start is None:
                    start = first[port] = self.first_dim[_value_at(node, port).name or ""]
                dim = start + axis
                covered.add(dim)
                whole = (index_map is IDENTITY or index_map.starts) and size == sizes[dim]
                enter(Edge(vertex, dim, index_map, port, op_index, whole))
        if description.prefer:
            self.preferences[op_index] = description.prefer
        for name, least in description.least.items():
            self.least[vertices[name]] = least
        for name, number in description.multiples.items():
            self.multiples[vertices[name]] = number
        if description.numbers:
            self.numbered[op_index] = {k: vertices[name] for k, name in description.numbers.items()}
        if description.indexed:
            self.indexed[op_node.ir] = {
                port: vertices[name] for name, port in description.indexed.items()
            }
        self.reluctant.update(vertices[name] for name in description.reluctant)
        self.eager.update(vertices[name] for name in description.eager)
        self.sharing.update(vertices[name] for name in description.sharing)
        read_inside = captured_values(node)
        self._pin_reads(op_node, covered, read_inside)
        return GraphOp(
            ir=node,
            name=op_node.name,
            layer=layer_name(node),
            factors=vertices,
            macs=tuple(tuple(vertices[f] for f in term) for term in description.macs),
            contracted=description.contracted,
            statistical=description.statistical,
            gate=description.gate,
            silent=description.silent,
            broadcast=description.broadcast,
            captured=tuple(value.name or "" for value in read_inside),
            opaque=description.opaque and node.meta.get(CHOICE_KEY, description.opaque),
        )

    def _pin_reads(
        self, op_node: OpNode, covered: set[int], read_inside: Sequence[ir.Value]
    ) -> None:
        """Axes that an operator reads without a factor, or in a subgraph, keep their size."""
        where = f"{op_node.op_type} '{op_node.name}'"
        for operand in op_node.ir.inputs:
            if operand is not None and operand.const_value is None:
                for dim in self._dims_of(operand):
                    if dim not in covered:
                        self.pins.setdefault(dim, f"{where} reads it undescribed")
        for value in read_inside:
            for dim in self._dims_of(value):
                self.pins.setdefault(dim, f"read inside {where}")

    def _follow_numbers(self, ops: Sequence[GraphOp]) -> None:
        """Tie axes that are read by numbers to the axis whose positions these number.

        So the experts of a mixture are the positions that a router ranks: one that goes takes its
        row of the router and its weights along.
        """
        for numbering in numberings(ops, self.numbered, self.indexed):
            first, *tied = *numbering.ranked, *numbering.followers
            if any(self.sizes[factor] != self.sizes[first] for factor in tied):
                continue
            if not tied and self.least.get(first, 0) >= self.sizes[first]:
                continue  # all of them are wanted, in order
            for factor in (first, *tied):
                self.pins.pop(factor, None)
                self.ties += [(first, factor)] if factor != first else []
            self.rows.difference_update(numbering.followers)
            if len(numbering.ranked) > 1:  # what is joined is chosen together
                together = sum(self.least[factor] for factor in numbering.ranked)
                self.least.update(dict.fromkeys(numbering.followers, together))

    def _pin_open(self) -> None:
        """An axis whose size follows the inputs is no axis of channels."""
        for node in self.model.graph:
            for value in node.outputs:
                first = self.first_dim.get(value.name or "")
                if first is not None:
                    for axis in value.meta.get(DYNAMIC_AXES_KEY, ()):
                        self.pins.setdefault(first + axis, "its size follows the inputs'")

    def _pin_interface(self) -> None:
        interface = [("input", value) for value in self.model.graph.inputs]
        if self.pin_outputs:
            interface += [("output", value) for value in self.model.graph.outputs]
        follows = following_axes(self.model)
        for side, value in interface:
            free = follows.get(value.name or "", ())
            for axis, dim in enumerate(self._dims_of(value)):
                if axis not in free:
                    self.pins[dim] = f"graph {side} '{value.name}'"

    def _dims_of(self, value: ir.Value) -> range:
        """The ids of a value's dims; none for a value that no factor stands on."""
        first = self.first_dim.get(value.name or "")
        return range(0) if first is None else range(first, first + len(self._shape(value)))


def _value_at(node: ir.Node, port: int) -> ir.Value:
    value = node.inputs[port] if port >= 0 else node.outputs[~port]
    assert value is not None
    return value


def input_independent_values(model: ir.Model) -> frozenset[str]:
    """Names of the values that depend on initializers alone."""
    weights = set(model.graph.initializers)
    weights.difference_update(value.name or "" for value in model.graph.inputs)
    for node in model.graph:
        if node.inputs and all(v is None or (v.name or "") in weights for v in node.inputs):
            weights.update(value.name or "" for value in node.outputs)
    return frozenset(weights)


def layer_name(node: ir.Node) -> str:
    """The module that a person would name: a parameter's owner, the exporter's scope, the node."""
    for value in node.inputs:
        if value is not None and value.is_initializer() and "." in (value.name or ""):
            owner, _, leaf = (value.name or "").rpartition(".")
            if leaf in ("weight", "bias"):
                return owner
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    named = [part for part in parts[:-1] if part]
    return named[-1] if named else node.name or ""
