"""OpenVINO, which ``pip install openvino`` adds."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from morphgraph.arrays import Arrays, Shape
from morphgraph.errors import UnsupportedError
from morphgraph.runtimes.base import (
    Executed,
    Input,
    Operator,
    Runtime,
    Session,
    Source,
)
from morphgraph.runtimes.origins import layer_of
from morphgraph.runtimes.sources import Held, middle

_RUNTIME = "OpenVINO"
_ORIGINS = "originalLayersNames"
_NO_KERNELS = ("Input", "Const", "Output")


class OpenVino(Runtime):
    """OpenVINO in single precision; its own default on newer CPUs is bfloat16."""

    def __init__(self, device: str = "CPU") -> None:
        """Load OpenVINO for a device.

        Raises:
            UnsupportedError: it is not installed, or has no such device.
        """
        try:
            import openvino
        except ImportError as error:
            raise UnsupportedError(
                "runtime 'openvino' is not installed here; run `pip install openvino`"
            ) from error
        self._core = openvino.Core()
        self._device = device.upper()
        if self._device not in self._core.available_devices:
            raise UnsupportedError(
                f"runtime 'openvino:{device}': OpenVINO finds no such device; it has "
                f"{', '.join(self._core.available_devices)}"
            )
        self.name = "openvino" if self._device == "CPU" else f"openvino:{device.lower()}"
        self.clock = "cpu" if self._device == "CPU" else "wall"

    def session(self, model: Source, threads: int = 1, *, name: str = "model") -> "OpenVinoSession":
        """A session for one request at a time; ``threads`` are those that it may use."""
        return OpenVinoSession(self._core, self._device, Held(model), threads, name)


class OpenVinoSession(Session):
    """A model in OpenVINO."""

    def __init__(self, core: Any, device: str, model: Held, threads: int, name: str) -> None:
        """Compile the model."""
        self._core, self._device = core, device
        self._model, self._threads, self._name = model, threads, name
        self._request = self._compile(told=False).create_infer_request()

    def _compile(self, told: bool) -> Any:
        properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": told}
        if self._device == "CPU":
            properties |= {"INFERENCE_NUM_THREADS": self._threads, "NUM_STREAMS": 1}
        with self._errors(), self._model.file(named=told) as path:
            read = self._core.read_model(str(path))
            for node in read.get_ops() if told else ():
                # Kept through all fusions, where names are not.
                node.get_rt_info()[_ORIGINS] = node.get_friendly_name()
            return self._core.compile_model(read, self._device, properties)

    def _errors(self) -> AbstractContextManager[None]:
        return self._model.errors(_RUNTIME, self._name)

    @property
    def inputs(self) -> Sequence[Input]:
        """What the model declares; open sizes are -1."""
        return [
            Input(one.any_name, np.dtype(one.element_type.to_dtype()), _sizes(one))
            for one in self._request.model_inputs
        ]

    def run(self, feeds: Arrays) -> Sequence[Any]:
        """Run once."""
        try:
            results = self._request.infer(feeds)
        except Exception as error:  # a context manager would be timed
            raise self._model.refused(_RUNTIME, self._name, error) from error
        return [results[output] for output in self._request.model_outputs]

    def operators(self) -> Sequence[Operator]:
        """The layers of the compiled model, in the order of execution."""
        return list(self._layers(self._compile(told=True)))

    def executed(self, feeds: Arrays, runs: int = 1) -> Sequence[Executed]:
        """The layers that ran, from a model of its own that OpenVINO counts the times of."""
        compiled = self._compile(told=True)
        request = compiled.create_infer_request()
        spent: dict[str, list[float]] = {}
        with self._errors():
            request.infer(feeds)
            for _ in range(runs):
                request.infer(feeds)
                for layer in request.profiling_info:
                    if layer.status == layer.Status.EXECUTED:
                        microseconds = layer.real_time.total_seconds() * 1e6
                        spent.setdefault(layer.node_name, []).append(microseconds)
        return [
            replace(layer, microseconds=middle(spent[layer.name]))
            for layer in self._layers(compiled)
            if layer.name in spent
        ]

    def _layers(self, compiled: Any) -> Iterator[Executed]:
        """The layers of a compiled model, without times."""
        layers = [
            layer
            for layer in compiled.get_runtime_model().get_ordered_ops()
            if _told(layer, "layerType") not in _NO_KERNELS
        ]
        made = self._made([_told(layer, _ORIGINS).split(",") for layer in layers])
        starts = {name for names in made for name in names}
        for layer, ends in zip(layers, made, strict=True):
            op_type = _told(layer, "layerType")
            origins = self._model.nodes.between(ends, starts)
            yield Executed(
                name=layer.get_friendly_name(),
                op_type=op_type,
                origins=tuple(origin.name for origin in origins),
                layer=layer_of(op_type, origins),
                inputs=tuple(map(_shape, layer.inputs())),
                outputs=tuple(map(_shape, layer.outputs())),
            )

    def _made(self, names: Sequence[Sequence[str]]) -> list[list[str]]:
        """Per layer the model's values that it makes, from the names of nodes that OpenVINO keeps.

        It keeps that of a convolution, not that of a normalization or bias folded into it.
        """
        nodes = self._model.nodes
        named = [[nodes.named_after(name) for name in group] for group in names]
        made = [[value for node in group if node for value in node.makes] for group in named]
        taken = {value for values in made for value in values}
        return [[nodes.behind(value, taken) for value in values] for values in made]


def _told(layer: Any, key: str) -> str:
    """What OpenVINO tells of a layer."""
    info = layer.get_rt_info()
    return str(info[key].value) if key in info else ""


def _sizes(port: Any) -> tuple[int, ...]:
    """The sizes of a port; -1 where one is open."""
    return tuple(size.get_length() if size.is_static else -1 for size in port.get_partial_shape())


def _shape(port: Any) -> Shape:
    return _sizes(port) if port.get_partial_shape().rank.is_static else ()
