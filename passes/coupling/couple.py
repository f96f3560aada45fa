"""Pass ``couple``: from a canonical model to dims, factors, and the edges between them."""

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Shape
from morphgraph.errors import ModelError
from morphgraph.graph import Couplings, Dim, Edge, GraphOp, OpFactor
from morphgraph.notation import NotationError
from morphgraph.onnx_io import escape, static_shape
from morphgraph.ops import Description, OpNode, describe, entry_of, mismatch_hint
from morphgraph.passes.canonical.dynamic_sizes import OPEN_AXES_KEY
from morphgraph.passes.canonical.infer_shapes import captured


def couple(model: ir.Model, pin_outputs: bool = True) -> Couplings:
    """Describe every operator of a canonical model and lay its factors on the values' axes.

    Args:
        model: as ``canonicalize`` returns it.
        pin_outputs: whether graph outputs keep their size, as a user of the model expects.

    Raises:
        ModelError: an operator's operands do not fit together; names the node.
    """
    return _Coupler(model, pin_outputs).run()


class _Coupler:
    def __init__(self, model: ir.Model, pin_outputs: bool) -> None:
        self.model = model
        self.pin_outputs = pin_outputs
        self.first_dim: dict[str, int] = {}
        self.shapes: dict[str, Shape] = {}
        self.dims: list[Dim] = []
        self.sizes: list[int] = []
        self.weights = input_independent_values(model)
        self.descriptions: list[tuple[OpNode, Description]] = []
        self.first_at: list[dict[int, int]] = []
        self.known_shapes: dict[ir.Value, Shape] = {}

    def run(self) -> Couplings:
        graph = self.model.graph
        for value in graph.inputs:
            self._enter(value)
        for node in graph:
            op_node = OpNode(node, self.weights, self._shape)
            try:
                description = describe(op_node)
            except NotationError as error:
                raise ModelError(
                    f"node '{escape(op_node.name)}' ({op_node.op_type}): shape mismatch: {error}; "
                    f"{mismatch_hint(entry_of(op_node.op_type, op_node.domain))}"
                ) from None
            self.descriptions.append((op_node, description))
            ports = {
                place.port for factor in description.factors.values() for place in factor.places
            }
            self.first_at.append({p: self._enter(_value_at(node, p)) for p in sorted(ports)})
        return self._number()

    def _enter(self, value: ir.Value) -> int:
        """Give a value's axes dims, unless they have some; returns the id of the first."""
        name = value.name or ""
        if name not in self.first_dim:
            shape = self._shape(value)
            self.first_dim[name] = len(self.dims)
            self.shapes[name] = shape
            self.dims += [Dim(name, axis) for axis in range(len(shape))]
            self.sizes += shape
        return self.first_dim[name]

    def _shape(self, value: ir.Value) -> Shape:
        """A value's static shape; looked up once, since a value may have hundreds of readers."""
        shape = self.known_shapes.get(value)
        if shape is None:
            shape = self.known_shapes[value] = static_shape(value)
        return shape

    def _number(self) -> Couplings:
        factors: list[OpFactor] = []
        nodes: list[GraphOp] = []
        edges: list[Edge] = []
        pins: dict[int, str] = {}
        preferences: dict[int, tuple[str, ...]] = {}
        reluctant: set[int] = set()
        eager: set[int] = set()
        start = len(self.dims)
        sizes = list(self.sizes)
        for index, (op_node, description) in enumerate(self.descriptions):
            ids: dict[str, int] = {}
            covered: set[int] = set()
            first_at = self.first_at[index]
            for name, factor in description.factors.items():
                number = ids[name] = start + len(factors)
                factors.append(OpFactor(op_node.name, name))
                sizes.append(factor.size)
                if factor.pinned is not None:
                    pins[number] = factor.pinned
                for place in factor.places:
                    dim = first_at[place.port] + place.axis
                    covered.add(dim)
                    whole = place.map.starts and factor.size == sizes[dim]
                    edges.append(Edge(number, dim, place.map, place.port, index, whole))
            if description.prefer:
                preferences[index] = description.prefer
            reluctant.update(ids[name] for name in description.reluctant)
            eager.update(ids[name] for name in description.eager)
            for operand in op_node.ir.inputs:
                if operand is None or operand.const_value is not None:
                    continue
                for dim in self._dims_of(operand):
                    if dim not in covered:
                        pins.setdefault(
                            dim, f"{op_node.op_type} '{op_node.name}' reads it undescribed"
                        )
            inner = captured(op_node.ir)
            for value in inner:
                for dim in self._dims_of(value):
                    pins.setdefault(dim, f"read inside {op_node.op_type} '{op_node.name}'")
            nodes.append(
                GraphOp(
                    ir=op_node.ir,
                    name=op_node.name,
                    layer=layer_name(op_node.ir),
                    factors=ids,
                    macs=tuple(tuple(ids[f] for f in term) for term in description.macs),
                    contracted=description.contracted,
                    statistical=description.statistical,
                    gate=description.gate,
                    silent=description.silent,
                    broadcast=description.broadcast,
                    captured=tuple(value.name or "" for value in inner),
                    opaque=description.opaque,
                )
            )
        self._pin_open(pins)
        self._pin_interface(pins)
        return Couplings(
            model=self.model,
            first_dim=self.first_dim,
            shapes=self.shapes,
            dims=self.dims,
            factors=factors,
            sizes=np.array(sizes, dtype=np.int64),
            ops=nodes,
            edges=edges,
            pins=pins,
            input_independent=self.weights,
            preferences=preferences,
            reluctant=frozenset(reluctant),
            eager=frozenset(eager),
        )

    def _pin_open(self, pins: dict[int, str]) -> None:
        """An axis whose size follows the inputs is no axis of channels."""
        for node in self.model.graph:
            for value in node.outputs:
                first = self.first_dim.get(value.name or "")
                if first is not None:
                    for axis in value.meta.get(OPEN_AXES_KEY, ()):
                        pins.setdefault(first + axis, "its size follows the inputs'")

    def _pin_interface(self, pins: dict[int, str]) -> None:
        interface = [("input", value) for value in self.model.graph.inputs]
        if self.pin_outputs:
            interface += [("output", value) for value in self.model.graph.outputs]
        for kind, value in interface:
            for dim in self._dims_of(value):
                pins[dim] = f"graph {kind} '{value.name}'"

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
