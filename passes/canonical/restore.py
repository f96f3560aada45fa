"""What a resize did not need to fold is written as the original computes it.

Canonicalization folds constants and drops operators that do nothing, so that all sizes are known.
In a resized model that would be a loss: tools behind look for the patterns that exporters write (a
mask, a shape that is put together), and a constant that a node makes from little takes much space.
So after a resize, operands go back to what the original read: where the constant is still the same
and so is everything that it is computed from. Constants that a resize has changed stay; those that
repeat themselves are written as an Expand, and others that a file did not hold as a Gather of what
it computes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, IntArray, Shape
from morphgraph.edit import Editor
from morphgraph.errors import ModelError
from morphgraph.onnx_io import ORIGINAL_KEY, static_shape, subgraphs
from morphgraph.onnx_io.mapped import Cut, shared
from morphgraph.passes.canonical.fold_values import constant_tensor

_SMALL_BYTES = 1024  # a constant up to this size is no burden for a file


def restore(
    canonical: ir.Model,
    resized: ir.Model,
    cuts: Callable[[str], Sequence[Cut]],
    editor: Editor,
) -> bool:
    """Undo folding in a resized model where that is exact, in place; whether anything changed.

    Args:
        canonical: the model that was resized.
        resized: is changed.
        cuts: by the name of a value the axes that do not stay whole, with the positions that stay.
        editor: of the resized model.
    """
    original = canonical.meta.get(ORIGINAL_KEY)
    if original is None:
        return False
    restorer = _Restorer(original, canonical, resized, cuts, editor)
    restorer.run()
    return restorer.changed


class _Restorer:
    def __init__(
        self,
        original: ir.Model,
        canonical: ir.Model,
        resized: ir.Model,
        cuts: Callable[[str], Sequence[Cut]],
        editor: Editor,
    ) -> None:
        self.graph = resized.graph
        self.editor = editor
        self.cuts = cuts
        self.changed = False
        self.old_nodes = {node.name: node for node in original.graph}
        self.old_values = {v.name: v for node in original.graph for v in node.outputs if v.name}
        self.canonical = canonical.graph.initializers
        self.analysed = _results(canonical.graph) | {v.name: v for v in canonical.graph.inputs}
        self.live = _results(self.graph) | {v.name: v for v in self.graph.inputs}
        self.rebuilt: dict[str, ir.Value | None] = {}

    def run(self) -> None:
        for node in list(self.graph):
            old = self.old_nodes.get(node.name)
            if old is not None and old.op_identifier() == node.op_identifier():
                self._restore_operands(node, old)
        for value in list(self.graph.initializers.values()):
            self._shrink(value)
        if self.changed:
            self._sort()

    def _sort(self) -> None:
        """Put the nodes in the original's order; new ones stay in front of what follows them."""
        places = {name: place for place, name in enumerate(self.old_nodes)}
        order: dict[ir.Node, int] = {}
        place = len(places)
        for node in reversed(self.graph):
            place = order[node] = places.get(node.name, place)
        self.graph.remove(list(order))
        in_order = list(order)[::-1]
        self.graph.extend(sorted(in_order, key=order.__getitem__))
        self.graph.sort()

    def _restore_operands(self, node: ir.Node, old: ir.Node) -> None:
        pairs = list(zip(node.inputs, old.inputs, strict=False))
        if any(operand is not None and wanted is None for operand, wanted in pairs):
            return  # a packed operand was separated into several
        # Where operands are gone, those behind them stand at other ports than they did.
        fewer = len(node.inputs) < len(old.inputs)
        named = {value.name for value in old.inputs if value is not None} if fewer else set()
        for index, (operand, wanted) in enumerate(pairs):
            if operand is None or wanted is None or wanted.producer() is None:
                continue
            is_constant = operand.is_initializer()
            if is_constant and not self._is_unchanged(operand):
                continue
            if operand.name != wanted.name and operand.name in named:
                continue
            if not is_constant and (operand.name == wanted.name or self._has_new_pieces(operand)):
                continue
            if operand.name != wanted.name and self._tells_sizes(operand, node):
                continue
            if operand.name != wanted.name and not self._may_be_other(node, operand):
                continue
            value = self._rebuild(wanted, node)
            if value is not None and value is not operand:
                node.replace_input_with(index, value)
                self._drop(operand)
                self.changed = True

    def _has_new_pieces(self, operand: ir.Value) -> bool:
        """Whether the resize has changed a constant of those that a shape is joined from."""
        maker = operand.producer()
        pieces = [] if maker is None or maker.op_type != "Concat" else maker.inputs
        return any(
            piece is not None and piece.is_initializer() and not self._is_unchanged(piece)
            for piece in pieces
        )

    def _tells_sizes(self, operand: ir.Value, node: ir.Node) -> bool:
        """Whether numbers that were written for open sizes stand at a node that has others now."""
        is_shape = operand.dtype == ir.DataType.INT64 and len(operand.shape or ()) == 1
        return is_shape and not all(self._has_its_size(value) for value in node.outputs)

    # -- what is the same as before -------------------------------------------------------------

    def _is_unchanged(self, value: ir.Value) -> bool:
        """Whether an initializer of the resized model holds what it held before."""
        before = self.canonical.get(value.name or "")
        if before is None or before.const_value is None or value.const_value is None:
            return False
        if before.const_value is value.const_value:
            return True
        one, other = before.const_value, value.const_value
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and np.array_equal(one.numpy(), other.numpy())
        )

    def _may_be_other(self, node: ir.Node, operand: ir.Value) -> bool:
        """Whether an operand may become the original's, which has another name.

        Sizes were written anew so that open ones stay open: a 0 or 1 in a shape follows a resize
        where the original's number would not.
        """
        return operand.dtype != ir.DataType.INT64 or all(
            self._has_its_size(value) for value in node.outputs if value.name
        )

    def _has_its_size(self, value: ir.Value) -> bool:
        before = self.analysed.get(value.name)
        return before is not None and _size(before) == _size(value)

    # -- building anew --------------------------------------------------------------------------

    def _rebuild(self, old: ir.Value, before: ir.Node) -> ir.Value | None:
        """A value of the original in the resized model; ``None``: it would not be the same."""
        name = old.name or ""
        if name not in self.rebuilt:
            self.rebuilt[name] = None  # until it is known
            self.rebuilt[name] = self._found(old) or self._made(old, before)
        return self.rebuilt[name]

    def _found(self, old: ir.Value) -> ir.Value | None:
        """A value that the resized model has, or an initializer that had been folded away."""
        name, maker = old.name or "", old.producer()
        live = self.live.get(name)
        if live is not None:
            return live if self._has_its_size(live) else None
        known = self.graph.initializers.get(name)
        is_constant = maker is None or (maker.op_type == "Constant" and not maker.domain)
        if not is_constant:
            return None
        if known is not None:
            return known if self._is_unchanged(known) else None
        tensor = old.const_value if maker is None else constant_tensor(maker)
        if tensor is None or name in self.canonical:
            return None
        return self.editor.constant(name, shared(tensor))

    def _made(self, old: ir.Value, before: ir.Node) -> ir.Value | None:
        """The result of a node that had been folded, or dropped since it does nothing."""
        node, name = old.producer(), old.name or ""
        if node is None or name in self.live or subgraphs(node) or self._renames_weight(node):
            return None
        results = [value for value in node.outputs if value.name]
        constants = [self.graph.initializers.get(value.name or "") for value in results]
        if any(value is not None and not self._is_unchanged(value) for value in constants):
            return None
        operands: list[ir.Value | None] = []
        for operand in node.inputs:
            value = None if operand is None else self._rebuild(operand, before)
            if operand is not None and value is None:
                return None
            operands.append(value)
        new = ir.Node(
            node.domain,
            node.op_type,
            operands,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=self.editor.node_name(node.name or ""),
            metadata_props=dict(node.metadata_props),
        )
        self.graph.insert_before(before, new)
        for result, fresh in zip(node.outputs, new.outputs, strict=True):
            known = self.graph.initializers.get(result.name or "")
            like = known if known is not None else self.analysed.get(result.name, result)
            fresh.type, fresh.shape = like.type, like.shape
            if known is not None:
                known.replace_all_uses_with(fresh, replace_graph_outputs=True)
                self._drop(known)
            fresh.name = self.editor.value_name(result.name) if result.name else None
            self.rebuilt[result.name or ""] = fresh
        self.changed = True
        return new.outputs[old.index() or 0]

    def _renames_weight(self, node: ir.Node) -> bool:
        """An Identity of a weight; what it ties may be two weights by now."""
        source = node.inputs[0] if node.inputs else None
        return node.op_type == "Identity" and source is not None and source.is_initializer()

    def _drop(self, value: ir.Value) -> None:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            del self.graph.initializers[value.name or ""]
            self.editor.release(value.name or "")

    # -- constants that have changed ------------------------------------------------------------

    def _shrink(self, value: ir.Value) -> None:
        """Let a large constant that the original computed be computed, where that is smaller."""
        name, tensor = value.name or "", value.const_value
        old = self.old_values.get(name)
        if old is None or tensor is None or tensor.nbytes <= _SMALL_BYTES or not value.uses():
            return
        maker = old.producer()
        if maker is None or maker.op_type == "Constant":
            return
        given = _given_bytes(old)
        compact = _without_repeats(tensor.numpy())
        repeats = compact.nbytes * 2 <= tensor.nbytes
        if repeats and compact.nbytes <= given + _SMALL_BYTES:
            self._expand(value, compact, maker)
            return
        is_cut = given < tensor.nbytes and self._cut(value, maker)
        if repeats and not is_cut:
            self._expand(value, compact, maker)

    def _expand(self, value: ir.Value, compact: Array, maker: ir.Node) -> None:
        name = value.name or ""
        sizes = self.editor.sizes(f"{name}_sizes", static_shape(value))
        if maker.op_type == "ConstantOfShape":
            self._compute(value, maker.op_type, [sizes], dict(maker.attributes), maker)
        else:
            repeated = self.editor.constant(f"{name}_value", compact)
            self._compute(value, "Expand", [repeated, sizes], {}, maker)

    def _cut(self, value: ir.Value, maker: ir.Node) -> bool:
        """A Gather of what the original computes, on each axis that has lost positions."""
        name = value.name or ""
        cuts = self.cuts(name)
        operands = [None if v is None else self._rebuild(v, self.graph[0]) for v in maker.inputs]
        if len(maker.outputs) > 1 or not cuts or None in operands or subgraphs(maker):
            return False
        whole = self.editor.insert(
            maker.op_type,
            operands,
            maker.attributes,
            name=maker.name or "",
            result=f"{name}_whole",
            like=self.canonical[name],
            before=self.graph[0],
            metadata=maker.metadata_props,
        )
        for axis, positions in cuts[:-1]:
            whole = self._gathered(whole, axis, positions, name)
        axis, positions = cuts[-1]
        kept = self.editor.sizes(f"{name}_kept_{axis}", positions.tolist())
        self._compute(value, "Gather", [whole, kept], {"axis": axis}, None)
        return True

    def _gathered(self, whole: ir.Value, axis: int, positions: IntArray, name: str) -> ir.Value:
        kept = self.editor.sizes(f"{name}_kept_{axis}", positions.tolist())
        return self.editor.insert(
            "Gather",
            [whole, kept],
            {"axis": axis},
            name=f"{name}_cut_{axis}",
            result=f"{name}_cut_{axis}",
            like=whole,
            sizes={axis: len(positions)},
            before=self.graph[0],
        )

    def _compute(
        self,
        value: ir.Value,
        op_type: str,
        operands: Sequence[ir.Value],
        attributes: Mapping[str, Any],
        maker: ir.Node | None,
    ) -> None:
        """Put a node in the place of an initializer, under its name."""
        name = value.name or ""
        made = self.editor.insert(
            op_type,
            operands,
            attributes,
            name=f"{name}_{op_type}" if maker is None else maker.name or name,
            result=f"{name}_",
            like=value,
            before=self.graph[0],
        )
        value.replace_all_uses_with(made, replace_graph_outputs=True)
        self._drop(value)
        self.editor.rename(made, name)
        self.changed = True


def _size(value: ir.Value) -> Shape | None:
    """The sizes of a value; ``None`` where they are not known, so that no resize changes them."""
    try:
        return static_shape(value)
    except ModelError:
        return None


def _results(graph: ir.Graph) -> dict[str | None, ir.Value]:
    return {value.name: value for node in graph for value in node.outputs if value.name}


def _without_repeats(array: Array) -> Array:
    """The array with size 1 on every axis along which it repeats itself, as Expand broadcasts it.

    >>> _without_repeats(np.array([[1, 2], [1, 2]]))
    array([[1, 2]])
    """
    if array.size and not any(array.strides):
        return np.ascontiguousarray(array.reshape(-1)[:1].reshape((1,) * array.ndim))
    for axis in range(array.ndim):
        first = array.take([0], axis=axis) if array.size else array
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return np.ascontiguousarray(array)


def _given_bytes(value: ir.Value) -> int:
    """The bytes of all initializers that a value is computed from."""
    pending, seen, total = [value], {value}, 0
    while pending:
        current = pending.pop()
        maker = current.producer()
        if current.const_value is not None:
            total += current.const_value.nbytes
        for operand in maker.inputs if maker is not None else ():
            if operand is not None and operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return total
