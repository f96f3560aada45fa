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
    """

    function: Callable[..., Any]
    _written: dict[Hashable, tuple[list[_Written], Any] | None] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function gives."""
        operands: list[ir.Value] = []
        try:
            key = _key([*args, *kwargs.items()], operands)
        except _UnlikeError:
            return self.function(*args, **kwargs)
        recorder = evaluator.default()
        if key not in self._written:
            before = len(recorder.nodes), len(recorder.constant_farm)  # type: ignore[attr-defined]
            knowing = _Knowing(recorder)  # type: ignore[abstract]  # so is PyTorch's own
            with evaluator.default_as(knowing):
                result = self.function(*args, **kwargs)
            self._written[key] = _template(recorder, before, operands, result)
            return result
        template = self._written[key]
        if template is None:
            return self.function(*args, **kwargs)
        return _repeated(recorder, template, operands)


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
