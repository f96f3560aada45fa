"""PyTorch's translations of operators, imported without what most exports never ask for.

Importing torchlib parses the source of some fifty functions and reads the signatures of four
hundred more, to use a few of them. While it is imported here, both are put off until somebody asks;
what is asked for then is the same.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, update_wrapper
from typing import Any

import onnx_ir as ir
import onnxscript
from onnxscript import values
from onnxscript.function_libs.torch_lib.registration import default_registry
from onnxscript.ir import _schemas

_script = onnxscript.script


class _Traced(values.TracedOnnxFunction):
    """One whose signature is read when it is asked for."""

    def __init__(self, opset: values.Opset, func: Callable[..., Any]) -> None:
        values.Op.__init__(self, opset, func.__name__)
        self.func = func
        update_wrapper(self, func)

    @property
    def op_signature(self) -> ir.schemas.OpSignature | None:
        """What the function takes."""
        if self._signature is None:
            self._signature = _schemas.op_signature_from_function(
                self.func, domain="_traced", name=self.name
            )
        return self._signature

    @op_signature.setter
    def op_signature(self, value: ir.schemas.OpSignature) -> None:
        self._signature = value


class _Scripted(values.OnnxFunction):  # type: ignore[type-arg]  # takes any function
    """One whose source is parsed when it is asked for."""

    def __init__(self, opset: values.Opset, function: Callable[..., Any]) -> None:
        values.Op.__init__(self, opset, function.__name__)
        self.function, self.kwargs, self.traceable = function, {}, False
        update_wrapper(self, function)

    @cached_property
    def _parsed(self) -> Any:
        return _script(opset=self.opset)(self.function)

    @property
    def function_ir(self) -> Any:  # type: ignore[override]  # nobody writes it
        """The function's nodes."""
        return self._parsed.function_ir

    @property
    def source(self) -> str:  # type: ignore[override]
        """The function's source."""
        return str(self._parsed.source)

    @property
    def op_signature(self) -> ir.schemas.OpSignature | None:
        """What the function takes."""
        return self._signature or self._parsed.op_signature

    @op_signature.setter
    def op_signature(self, value: ir.schemas.OpSignature) -> None:
        self._signature = value


def _script_later(opset: values.Opset | None = None, *others: Any, **settings: Any) -> Any:
    """``onnxscript.script`` whose work is put off."""
    if opset is None or others or settings:
        return _script(opset, *others, **settings)
    return lambda function: _Scripted(opset, function)


@contextmanager
def _put_off() -> Iterator[None]:
    traced = onnxscript.values.TracedOnnxFunction
    onnxscript.script = _script_later
    onnxscript.values.TracedOnnxFunction = _Traced  # type: ignore[misc]  # a class is a name, too
    try:
        yield
    finally:
        onnxscript.script = _script
        onnxscript.values.TracedOnnxFunction = traced  # type: ignore[misc]


if "onnxscript.function_libs.torch_lib.ops" not in sys.modules:
    with _put_off():
        import onnxscript.function_libs.torch_lib.ops

__all__ = ["default_registry"]
