"""Translations that are remembered: an operator of the same sizes becomes the same nodes.

PyTorch's translation of an operator is a function of Python that reads the types and sizes of its
operands and writes nodes; for each node it looks up the operator's signature anew. A network calls
few operators with few sizes, again and again. So what a call has written is written again for the
next one of the same sizes, with other operands.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import evaluator
from torch.onnx._internal.exporter import _building
from torch.onnx._internal.exporter._tensors import SymbolicTensor

_PLAIN = (bool, int, str, type(None))


@dataclass(frozen=True)
class _Written:
    """A node of a template.

    ``inputs`` holds for each operand a number, which is the place of a value among the operands of
    the call, followed by the results of the template's nodes; or a value, which is a constant that
    the whole graph shares.
    """

    node: ir.Node
    inputs: tuple[int | ir.Value | None, ...]
    results: tuple[tuple[str | None, ir.Shape | None, ir.TypeProtocol | None], ...]


@dataclass
class Repeating:
    """A function of torchlib, called once for all calls of the same sizes.

    Args:
        function: writes nodes by the present ``OpRecorder``.
        names: of the graph.
    """

    function: Callable[..., Any]
    names: "Names"
    _written: dict[Hashable, tuple[list[_Written], Any] | None] = field(default_factory=dict)
    _left_out: dict[Hashable, tuple[int, int]] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        recorder: Any = evaluator.default()
        start = len(recorder.nodes)
        result = self._result(recorder, args, kwargs)
        self.names.give(recorder.nodes[start:], result)
        return result

    def leave_out(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Count the nodes that a call would write, so that others keep their names.

        Constants that the whole graph shares are written: others read them from now on.
        """
        recorder: Any = evaluator.default()
        key = _key([*args, *kwargs.items()], [])
        if key not in self._left_out:
            aside = _Knowing(recorder)  # type: ignore[abstract]  # so is PyTorch's own
            aside.nodes, aside.functions = [], {}
            before = self.names.counts
            with evaluator.default_as(aside):
                result = self.function(*args, **kwargs)
            self.names.give(aside.nodes, result)
            shared = set(recorder.constant_farm.values())
            kept = [node for node in aside.nodes if not shared.isdisjoint(node.outputs)]
            recorder.nodes.extend(kept)
            for node in aside.nodes:
                if node not in kept:
                    node.resize_inputs(0)  # a reader counts, whether it stands in a graph or not
            nodes, values = self.names.counts
            self._left_out[key] = nodes - before[0] - len(kept), values - before[1] - len(kept)
            return
        self.names.skip(*self._left_out[key])

    def _result(self, recorder: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        operands: list[ir.Value] = []
        try:
            key = _key([*args, *kwargs.items()], operands)
        except _UnlikeError:
            return self.function(*args, **kwargs)
        if key not in self._written:
            before = len(recorder.nodes), len(recorder.constant_farm)
            knowing = _Knowing(recorder)  # type: ignore[abstract]  # so is PyTorch's own
            with evaluator.default_as(knowing):
                result = self.function(*args, **kwargs)
            self._written[key] = _template(recorder, before, operands, result)
            return result
        template = self._written[key]
        if template is None:
            return self.function(*args, **kwargs)
        return _repeated(recorder, template, operands)


class Names:
    """The names of nodes and values without one, as ``onnx_ir`` gives them: ``val_0``, ``val_1``.

    They are given here, since they count nodes that are not written, too.
    """

    def __init__(self) -> None:
        self.counts = 0, 0

    def skip(self, nodes: int, values: int) -> None:
        """Leave out so many names."""
        self.counts = self.counts[0] + nodes, self.counts[1] + values

    def give(self, written: Sequence[ir.Node], result: Any) -> None:
        """Name what a call has written; the exporter names results, and who makes them."""
        results = set(_parts(result))
        makers = {value.producer() for value in results if isinstance(value, ir.Value)}
        nodes, values = self.counts
        for node in written:
            if node.name is None and node not in makers:
                node.name = f"node_{node.op_type}_{nodes}"
                nodes += 1
            for value in node.outputs:
                if value.name is None and value not in results:
                    value.name = f"val_{values}"
                    values += 1
        self.counts = nodes, values


class _Knowing(_building.OpRecorder):
    """A recorder for the nodes of another one that reads each operator's signature once."""

    def __init__(self, recorder: Any) -> None:
        super().__init__(recorder.opset, recorder.constant_farm)
        self.nodes, self.functions = recorder.nodes, recorder.functions

    def eval(self, schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record a node; its results."""
        signature = _signature(schema.domain, schema.name, schema.since_version)
        inputs, attributes = _building._construct_named_inputs_and_attrs(  # noqa: SLF001
            signature, args, kwargs
        )
        count = _building._determine_output_number(signature, attributes)  # noqa: SLF001
        known = {name: _attribute(name, value) for name, value in attributes.items()}
        outputs = self._call_op(signature, inputs, known, count)
        return outputs[0] if len(outputs) == 1 else outputs


def _attribute(name: str, value: Any) -> Any:
    """An attribute as ``onnx_ir`` makes it, where that takes long to find out what it holds."""
    if isinstance(value, ir.Tensor):
        return ir.AttrTensor(name, value)
    if type(value) in (list, tuple) and value and all(type(each) is int for each in value):
        return ir.AttrInt64s(name, value)
    return value


@cache
def _signature(domain: str, name: str, version: int) -> ir.schemas.OpSignature:
    return ir.schemas.OpSignature.from_op_schema(onnx.defs.get_schema(name, version, domain))


class _UnlikeError(Exception):
    """A call whose arguments are not seen through."""


def _key(argument: Any, operands: list[ir.Value]) -> Hashable:
    """What a translation may depend on; the values among its arguments are put into a list."""
    if isinstance(argument, ir.Value):
        place = next((k for k, value in enumerate(operands) if value is argument), len(operands))
        operands[place:] = [argument]
        if not isinstance(argument.type, ir.TensorType | None):
            raise _UnlikeError
        return place, argument.dtype, None if argument.shape is None else tuple(argument.shape)
    if type(argument) in (list, tuple):
        return type(argument), tuple([_key(part, operands) for part in argument])
    if isinstance(argument, _PLAIN):
        return type(argument), argument
    if type(argument) is float:
        return float, repr(argument)  # 0.0 == -0.0
    raise _UnlikeError


def _template(
    recorder: Any, before: tuple[int, int], operands: Sequence[ir.Value], result: Any
) -> tuple[list[_Written], Any] | None:
    """What a call has written since; ``None`` where it cannot be written again."""
    if recorder.functions:
        return None
    shared = set(islice(recorder.constant_farm.values(), before[1], None))
    places = {value: k for k, value in enumerate(operands)}
    template = []
    for node in recorder.nodes[before[0] :]:
        if not shared.isdisjoint(node.outputs):
            continue  # others read it from now on
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            return None
        inputs = tuple(None if v is None else places.get(v, v) for v in node.inputs)
        results = tuple((value.name, value.shape, value.type) for value in node.outputs)
        template.append(_Written(node, inputs, results))
        for value in node.outputs:
            places[value] = len(places)
    if not all(isinstance(part, ir.Value) for part in _parts(result)):
        return None
    return template, _mapped(result, lambda value: places.get(value, value))


_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _repeated(
    recorder: Any, template: tuple[list[_Written], Any], operands: Sequence[ir.Value]
) -> Any:
    """Write a template for other operands; what the call gives."""
    values: list[Any] = list(operands)
    written, result = template
    for each in written:
        outputs = []
        for name, shape, type_ in each.results:
            output = SymbolicTensor(recorder.opset, name, None, type_)
            output.shape = None if shape is None else shape.copy()
            outputs.append(output)
        inputs: list[Any] = [values[k] if type(k) is int else k for k in each.inputs]
        node = ir.Node(
            each.node.domain,
            each.node.op_type,
            inputs,
            each.node.attributes,
            outputs=outputs,
            version=each.node.version,
        )
        recorder.nodes.append(node)
        values.extend(outputs)
    return _mapped(result, lambda place: values[place] if type(place) is int else place)


def _parts(result: Any) -> Iterator[Any]:
    """What a result consists of."""
    if type(result) in (list, tuple):
        for part in result:
            yield from _parts(part)
    else:
        yield result


def _mapped(result: Any, change: Callable[[Any], Any]) -> Any:
    """A result with its parts changed."""
    if type(result) in (list, tuple):
        return type(result)([_mapped(part, change) for part in result])
    return change(result)
