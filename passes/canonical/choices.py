"""Inputs that choose what a network computes: what an If decides by, as far as the graph tells.

What stands in the branches of such an If is opaque, and keeps its size. Fixed to a value, the input
frees the branch that is taken (``fix_inputs``); which values there are is tried here.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array
from morphgraph.errors import warn
from morphgraph.onnx_io import CHOICE_KEY, dtype_of, escape, node_label
from morphgraph.onnx_io.fixed import fixed_words, plain
from morphgraph.passes.canonical.fix_inputs import KnownNumbers

_MOST_NODES = 64  # between inputs and a condition
_MOST_VALUES = 16  # of an input that are tried


def note_choices(model: ir.Model) -> None:
    """Note at every If of the main graph which input decides it, and by which values, and warn.

    Args:
        model: canonical; nothing but notes in memory is changed.
    """
    found = []
    for node in model.graph:
        words = _advice(model, node) if node.op_type == "If" and not node.domain else None
        if words is not None:
            node.meta[CHOICE_KEY] = words
            found.append(f"{node_label(node)}: {words}")
    if found:
        more = f" (and {len(found) - 1} more nodes)" if found[1:] else ""
        warn(f"{found[0]}; until then what it makes keeps its channels{more}")


def _advice(model: ir.Model, node: ir.Node) -> str | None:
    """What fixes the condition of an If; ``None``: no input alone does."""
    cone = _cone(model.graph, node)
    if cone is None:
        return None
    for value in _sources(cone, node):
        if value not in model.graph.inputs or not _is_setting(value):
            continue
        outcomes: dict[bool, list[Array]] = {}
        for array in _candidates(value, cone):
            outcome = _outcome(model, node, cone, value.name or "", array)
            if outcome is not None:
                outcomes.setdefault(outcome, []).append(array)
        if outcomes:
            return _words(value, cone, outcomes)
    return None


def _cone(graph: ir.Graph, node: ir.Node) -> list[ir.Node] | None:
    """The nodes that a condition is computed by, in order; ``None`` where these are many."""
    found: dict[ir.Node, None] = {}
    waiting = [node.inputs[0].producer()] if node.inputs and node.inputs[0] is not None else []
    while waiting:
        maker = waiting.pop()
        if maker is None or maker in found or maker.graph is not graph:
            continue
        found[maker] = None
        if len(found) > _MOST_NODES:
            return None
        waiting += [value.producer() for value in maker.inputs if value is not None]
    return [each for each in graph if each in found] if found else []


def _sources(cone: Iterable[ir.Node], node: ir.Node) -> list[ir.Value]:
    """Values that a condition depends on and no node makes."""
    read = [value for each in cone for value in each.inputs] + [node.inputs[0]]
    return [v for v in dict.fromkeys(read) if v is not None and v.producer() is None]


def _is_setting(value: ir.Value) -> bool:
    """Whether an input is a flag or a whole number, and one of them."""
    is_whole = value.dtype is not None and (
        value.dtype == ir.DataType.BOOL or value.dtype.is_integer()
    )
    sizes = list(value.shape or ())
    return is_whole and len(sizes) < 2 and all(size == 1 or type(size) is not int for size in sizes)


def _candidates(value: ir.Value, cone: Iterable[ir.Node]) -> Iterator[Array]:
    """Values of an input that may decide: both flags, or what is compared with and what is not."""
    shape = [1] * len(value.shape or ())
    if value.dtype == ir.DataType.BOOL:
        yield from (np.full(shape, flag) for flag in (True, False))
        return
    limits = np.iinfo(dtype_of(value))
    numbers = _compared(cone)
    tried = dict.fromkeys([*numbers, *(n + 1 for n in numbers), *(n - 1 for n in numbers), 0, 1])
    for number in list(tried)[:_MOST_VALUES]:
        if limits.min <= number <= limits.max:
            yield np.full(shape, number, dtype_of(value))


def _compared(cone: Iterable[ir.Node]) -> list[int]:
    """Whole numbers that stand on the way to a condition."""
    found: dict[int, None] = {}
    for node in cone:
        for value in node.inputs:
            tensor = None if value is None else value.const_value
            if tensor is not None and tensor.size == 1 and tensor.dtype != ir.DataType.STRING:
                number = float(tensor.numpy().item())
                if number.is_integer():
                    found[int(number)] = None
    return list(found)


def _outcome(
    model: ir.Model, node: ir.Node, cone: Iterable[ir.Node], name: str, array: Array
) -> bool | None:
    """What the condition is where an input has a value; tried on a copy."""
    copy = _part(model, node, cone)
    numbers = KnownNumbers(copy)
    value = next(value for value in copy.graph.inputs if value.name == name)
    numbers.known.note_varying(value, ir.Tensor(array, dtype=value.dtype))
    for each in copy.graph:
        numbers.learn(each)
    return numbers.condition(copy.graph.outputs[0])


def _part(model: ir.Model, node: ir.Node, cone: Iterable[ir.Node]) -> ir.Model:
    """The part of a model that computes a condition, as a model of its own."""
    copies: dict[ir.Value, ir.Value] = {}

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        if value not in copies:
            copies[value] = ir.Value(
                name=value.name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        return copies[value]

    nodes = [
        ir.Node(
            each.domain,
            each.op_type,
            [copied(value) for value in each.inputs],
            list(each.attributes.values()),
            outputs=[made for value in each.outputs if (made := copied(value)) is not None],
            name=each.name,
        )
        for each in cone
    ]
    sources = _sources(cone, node)
    end = copied(node.inputs[0])
    assert end is not None
    constants = [copies[v] for v in sources if v in copies and v.const_value is not None]
    inputs = [copies[v] for v in sources if v in copies and v.const_value is None]
    graph = ir.Graph(
        inputs,
        [end],
        nodes=nodes,
        initializers=constants,
        opset_imports=dict(model.opset_imports),
        name="condition",
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _words(value: ir.Value, cone: Iterable[ir.Node], outcomes: dict[bool, list[Array]]) -> str:
    name, known = value.name or "", _compared(cone)
    is_flag = value.dtype == ir.DataType.BOOL
    chosen: list[str] = []
    example: object = None
    has_other = False
    for arrays in outcomes.values():
        named = [a for a in arrays if is_flag or int(a.reshape(-1)[0]) in known]
        if named:
            text = escape(fixed_words({name: plain(named[0])})[0])
            chosen.append(f"--fix {text}")
            example = plain(named[0]) if example is None else example
        has_other = has_other or not named
    if not chosen:
        first = next(iter(outcomes.values()))[0]
        chosen, example = [f"--fix {escape(fixed_words({name: plain(first)})[0])}"], plain(first)
    if has_other:
        chosen.append("another number")
    shown = escape(name)
    return (
        f"input '{shown}' chooses which of its branches runs; {' or '.join(chosen)} "
        f"(fixed={{'{shown}': {example}}}) frees what is in one"
    )
