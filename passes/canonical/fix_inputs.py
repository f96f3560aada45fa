"""Inputs that are fixed to a value: the network for that value, which does not take them any more.

Files hold networks of which an input chooses: ``use_cache_branch`` of a merged decoder, the
sampling rate of a detector of speech. Fixed, the input becomes a constant, and so does what follows
from it; an If that it decides becomes the branch that is taken. What the other branch needed goes.
"""

import onnx_ir as ir
from onnx_ir.passes import common

from morphgraph.arrays import Array
from morphgraph.edit import Editor, name_nodes
from morphgraph.errors import ModelError
from morphgraph.onnx_io import UNFIXED_KEY, bind_inputs, subgraphs
from morphgraph.onnx_io.fixed import Fixed, fixed_arrays, note_fixed
from morphgraph.passes.canonical.branches import take_branch
from morphgraph.passes.canonical.fold_values import (
    KnownValues,
    computed,
    constant_tensor,
    is_foldable,
)
from morphgraph.passes.canonical.infer_shapes import ResultTypes
from morphgraph.passes.canonical.inline import inline_functions, sort_nodes

_SMALL = 64  # numbers of a result that is written in the place of its node
_KNOWN = 4096  # numbers of a constant that is looked into

#: An operand of this value decides alone.
_DECIDES = {"And": False, "Or": True}
_HANDS_ON = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})


def fix_inputs(model: ir.Model, fixed: Fixed) -> ir.Model:
    """The network for some values of inputs: a new model that shares its weights with the old one.

    It does not take these inputs, and its metadata say which values it holds for. Inputs that only
    another branch reads stay, so that whoever calls the model may go on giving them. A value that
    gives an input's open sizes a number gives it to all inputs with these sizes.

    Args:
        model: is not changed.
        fixed: by input a number, a flag, or an array of them. Values that the model holds for
            already may be among them.

    Raises:
        ModelError: there is no such input, or it does not take the value; says what it takes.
        UnsupportedError: the input is no tensor of numbers, or has more of them than a setting.

    >>> from morphgraph.testing import model_from_text
    >>> model = model_from_text('''
    ... net (bool flag, float[1,2] x) => (float[1,2] y) {
    ...     y = If (flag) <then_branch = a () => (float[1,2] p) { p = Relu(x) },
    ...                    else_branch = b () => (float[1,2] q) { q = Neg(x) }>
    ... }''', inputs=("flag", "x"))
    >>> small = fix_inputs(model, {"flag": True})
    >>> [node.op_type for node in small.graph], [value.name for value in small.graph.inputs]
    (['Relu'], ['x'])
    """
    arrays = fixed_arrays(model, fixed)
    if not arrays:
        return model
    weights = {value.name for value in model.graph.inputs if value.is_initializer()}
    shapes = {name: array.shape for name, array in arrays.items() if name not in weights}
    bound = bind_inputs(model, {name: shape for name, shape in shapes.items() if 0 not in shape})
    note_fixed(bound, arrays)
    inline_functions(bound)
    sort_nodes(bound.graph)
    for name, array in arrays.items():
        _make_constant(bound, name, array)
    _Follower(bound, frozenset(arrays)).walk(bound.graph)
    common.RemoveUnusedNodesPass()(bound)
    name_nodes(bound.graph)
    bound.meta[UNFIXED_KEY] = model.meta.get(UNFIXED_KEY, model)
    return bound


def _make_constant(model: ir.Model, name: str, array: Array) -> None:
    """Take an input off the list, and let an initializer of its name stand for it."""
    graph = model.graph
    value = next(value for value in graph.inputs if value.name == name)
    graph.inputs.remove(value)
    value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)
    value.shape = ir.Shape(array.shape)
    value.meta.clear()
    if not value.is_initializer():
        graph.register_initializer(value)
    if value.is_graph_output():  # which a node must make
        editor = Editor(model)
        end = ir.Node("", "Identity", [value], name=editor.node_name(name))
        result = end.outputs[0]
        result.type, result.shape = value.type, value.shape
        graph.outputs[graph.outputs.index(value)] = result
        editor.rename(value, f"{name}_value")
        result.name = name
        graph.append(end)


class KnownNumbers:
    """What is known of the numbers in a model before its sizes are: of constants and what follows.

    Attributes:
        known: small constants, and what is computed of them.
        decided: conditions of which only the outcome is known, not the shape.
    """

    def __init__(self, model: ir.Model) -> None:
        self.known = KnownValues(model)
        self.types = ResultTypes(model, self.known)
        self.decided: dict[ir.Value, bool] = {}

    def learn(self, node: ir.Node) -> bool:
        """Note what a node computes; whether its numbers are known now."""
        if node.op_type == "Constant" and not node.domain:
            return self._learn_constant(node)
        operands = [value for value in node.inputs if value is not None]
        if not operands or not is_foldable(node):
            return False
        if any(self.known.get(value) is None for value in operands):
            outcome = self._outcome(node)
            if outcome is not None:
                self.decided[node.outputs[0]] = outcome
            return False
        try:
            self.types.infer(node)
        except ModelError:  # said when the model is lifted, if the node is still there
            return False
        tensors = computed(node, self.types.opsets[""], self.known)
        if tensors is None:
            return False
        for value, tensor in zip(node.outputs, tensors, strict=True):
            self.known.note_varying(value, tensor)
        return True

    def learn_initializers(self, graph: ir.Graph) -> None:
        """Note the small constants that a body holds."""
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.size <= _KNOWN:
                self.known.note_varying(value, tensor)

    def condition(self, value: ir.Value | None) -> bool | None:
        """What a condition is; ``None`` where that is not known."""
        tensor = self.known.get(value)
        if value is None or tensor is None:
            return None if value is None else self.decided.get(value)
        return bool(tensor.numpy().item()) if tensor.size == 1 else None

    def _learn_constant(self, node: ir.Node) -> bool:
        try:
            tensor = constant_tensor(node)
        except ModelError:  # sparse
            return False
        if tensor.size > _KNOWN:
            return False
        self.known.note_varying(node.outputs[0], tensor)
        return True

    def _outcome(self, node: ir.Node) -> bool | None:
        """What a condition is, of which not all operands are known."""
        if node.domain:
            return None
        found = [self.condition(value) for value in node.inputs]
        if node.op_type in _DECIDES:
            decides = _DECIDES[node.op_type]
            if decides in found:
                return decides
            return None if None in found else not decides
        if node.op_type == "Not" and found[0] is not None:
            return not found[0]
        return found[0] if node.op_type in _HANDS_ON else None


class _Follower:
    """Folds what follows from fixed inputs, in place, in the main graph and in bodies."""

    def __init__(self, model: ir.Model, names: frozenset[str]) -> None:
        self.graph = model.graph
        self.editor = Editor(model)
        self.numbers = KnownNumbers(model)
        self.follows: set[ir.Value | None] = {
            value for value in model.graph.initializers.values() if value.name in names
        }
        for node in model.graph:  # of an input that is an output as well
            if node.op_type == "Identity" and node.outputs[0].name in names:
                self.follows.add(node.inputs[0])

    def walk(self, graph: ir.Graph) -> None:
        """Visit the nodes of a graph; those that come in from a branch are visited too."""
        if graph is not self.graph:
            self.numbers.learn_initializers(graph)
        for node in graph:
            self._visit(node)

    def _visit(self, node: ir.Node) -> None:
        is_if = node.op_type == "If" and not node.domain and node.inputs
        outcome = self.numbers.condition(node.inputs[0]) if is_if else None
        if outcome is not None and self._take(node, outcome):
            return
        bodies = subgraphs(node)
        for body in bodies:
            self.walk(body)
        if bodies or not self.numbers.learn(node):
            return
        if self.follows.isdisjoint(node.inputs):
            return
        self.follows.update(node.outputs)
        tensors = [self.numbers.known.get(value) for value in node.outputs]
        if any(tensor is None or tensor.size > _SMALL for tensor in tensors):
            return
        if not any(value.is_graph_output() for value in node.outputs):
            self._replace(node)

    def _take(self, node: ir.Node, outcome: bool) -> bool:
        ends = take_branch(node, outcome, self.editor)
        if ends is None:
            return False
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        for end in ends:
            self._bypass(end)
        return True

    def _bypass(self, end: ir.Node) -> None:
        """Let a result of a branch have the name that the If gave it, where a node makes it."""
        source, result = end.inputs[0], end.outputs[0]
        assert source is not None
        maker = source.producer()
        if end.graph is not self.graph or maker is None or maker.graph is not self.graph:
            return
        if source.is_graph_output():
            return
        source.type = source.type if result.type is None else result.type
        source.shape = source.shape if result.shape is None else result.shape
        name = result.name
        result.replace_all_uses_with(source, replace_graph_outputs=True)
        self.graph.remove(end, safe=True)
        self.editor.release(source.name or "")
        source.name = name

    def _replace(self, node: ir.Node) -> None:
        """Put initializers in the place of a node's results; bodies read them from around."""
        for value in node.outputs:
            tensor = self.numbers.known.get(value)
            if not value.name or tensor is None:
                continue
            constant = self.editor.constant_for(value, tensor)
            value.replace_all_uses_with(constant)
            self.follows.add(constant)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
