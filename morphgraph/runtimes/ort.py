"""ONNX Runtime: timing sessions, and what they execute.

What ONNX Runtime makes of a model is read from the model that it saves after its optimizations.
Nodes of the blocked layout (domain ``com.microsoft.nchwc``) are named after the value that they
make there; most other values keep their names.
"""

import json
import os
import re
import tempfile
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from morphgraph.arrays import Arrays, Shape
from morphgraph.errors import UnsupportedError
from morphgraph.runtimes.base import (
    Executed,
    Input,
    Layout,
    Operator,
    Runtime,
    Session,
    Source,
)
from morphgraph.runtimes.origins import Node, Nodes, layer_of
from morphgraph.runtimes.sources import Held, middle

_RUNTIME = "ONNX Runtime"
_OPTIMIZED = "optimized.onnx"
_NCHWC = "com.microsoft.nchwc"
_NCHWC_SUFFIX = "_nchwc"
_CAST_PREFIX = "InsertedPrecisionFreeCast_"
_TOKEN = re.compile(r"_token_[0-9]+$")
_REORDERS = ("ReorderInput", "ReorderOutput")  # take a value into the blocked layout and back
_SUM_INPUT = 3  # of a convolution there
_EVENT_SUFFIX = "_kernel_time"

# ONNX Runtime's names of the types that inputs may have.
_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    **{
        f"tensor({name})": np.dtype(name)
        for size in ("8", "16", "32", "64")
        for name in (f"int{size}", f"uint{size}")
    },
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bool)": np.dtype(np.bool_),
}


class OnnxRuntime(Runtime):
    """ONNX Runtime, on the CPU unless another execution provider is named.

    >>> OnnxRuntime("cuda").name  # doctest: +SKIP
    'ort:cuda'
    """

    def __init__(self, provider: str = "cpu") -> None:
        """Choose the provider: ``"cuda"`` or ``"CUDAExecutionProvider"``, in any case of letters.

        Raises:
            UnsupportedError: this ONNX Runtime has no such provider.
        """
        available = {_short(full): full for full in onnxruntime.get_available_providers()}
        key = _short(provider)
        if key not in available:
            raise UnsupportedError(
                f"runtime 'ort:{provider}': this ONNX Runtime has no such provider; it has "
                f"{', '.join(available)}"
            )
        self.name = "ort" if key == "cpu" else f"ort:{key}"
        self.clock = "cpu" if key == "cpu" else "wall"
        # What the provider does not take runs on the CPU.
        self.providers = list(dict.fromkeys([available[key], "CPUExecutionProvider"]))

    def session(self, model: Source, threads: int = 1, *, name: str = "model") -> "OrtSession":
        """A session; ``threads`` are those within an operator."""
        return OrtSession(model, self.providers, threads, name)


def _short(provider: str) -> str:
    """A provider's short name.

    >>> _short("CUDAExecutionProvider")
    'cuda'
    """
    return provider.lower().removesuffix("executionprovider")


class OrtSession(Session):
    """A model in ONNX Runtime."""

    def __init__(self, model: Source, providers: Sequence[str], threads: int, name: str) -> None:
        """Build the session."""
        self._model, self._providers = Held(model), list(providers)
        self._threads, self._name = threads, name
        with self._errors(), self._model.file() as path:
            self._session = self._build(path, self._options())
        self._outputs = [output.name for output in self._session.get_outputs()]

    def _errors(self) -> AbstractContextManager[None]:
        return self._model.errors(_RUNTIME, self._name)

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # an error is raised; it need not be printed too
        # Threads that spin while they wait burn the CPU time that is measured.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options

    def _build(
        self, path: Path, options: onnxruntime.SessionOptions
    ) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(path), options, self._providers)

    @property
    def inputs(self) -> Sequence[Input]:
        """What the model declares.

        Raises:
            UnsupportedError: an input is no tensor of numbers.
        """
        return [
            Input(one.name, self._dtype(one), tuple(one.shape))
            for one in self._session.get_inputs()
        ]

    def _dtype(self, declared: onnxruntime.NodeArg) -> np.dtype[Any]:
        if declared.type not in _DTYPES:
            raise UnsupportedError(
                f"{self._name}: input '{declared.name}' is a {declared.type}; only tensors of "
                "numbers are fed"
            )
        return _DTYPES[declared.type]

    def run(self, feeds: Arrays) -> Sequence[Any]:
        """Run once."""
        try:
            results: list[Any] = self._session.run(self._outputs, feeds)
        except Exception as error:  # a context manager would be timed
            raise self._model.refused(_RUNTIME, self._name, error) from error
        return results

    def operators(self) -> Sequence[Operator]:
        """The nodes of the model that ONNX Runtime runs, in topological order."""
        with self._looking(self._options()) as (_, folder):
            nodes = _optimized(folder, self._model.nodes)
        if not nodes:
            raise UnsupportedError(
                f"{self._name}: this provider does not tell what it executes; its profile does"
            )
        return [one.operator for one in nodes]

    def executed(self, feeds: Arrays, runs: int = 1) -> Sequence[Executed]:
        """The kernels of a run, from a session of its own with the profiler on."""
        options = self._options()
        options.enable_profiling = True
        with self._looking(options) as (session, folder):
            with self._errors():
                for _ in range(runs + 1):
                    session.run(self._outputs, feeds)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            optimized = _optimized(folder, self._model.nodes)
        kernels = _kernels(events, 1)
        known = _by_kernel(kernels, optimized)
        return [_executed(kernel, known.get(kernel.name)) for kernel in kernels]

    @contextmanager
    def _looking(
        self, options: onnxruntime.SessionOptions
    ) -> Iterator[tuple[onnxruntime.InferenceSession, Path]]:
        """A session whose nodes have names, and the folder for what it writes about them."""
        with tempfile.TemporaryDirectory(prefix="morphgraph-") as made:
            folder = Path(made)
            options.profile_file_prefix = str(folder / "profile")
            _write_optimized(options, folder)
            with self._errors(), self._model.file(named=True) as path:
                session = self._build(path, options)
            yield session, folder


def _write_optimized(options: onnxruntime.SessionOptions, folder: Path) -> None:
    """Have the optimized model saved, without its weights where the system can forget them."""
    weights = folder / "weights"
    options.optimized_model_filepath = str(folder / _OPTIMIZED)
    prefix = "session.optimized_model_external_initializers"
    options.add_session_config_entry(f"{prefix}_file_name", weights.name)
    options.add_session_config_entry(f"{prefix}_min_size_in_bytes", "256")
    with suppress(OSError, NotImplementedError):
        weights.symlink_to(os.devnull)


@dataclass(frozen=True, slots=True)
class _Optimized:
    """A node of the optimized model: the operator, and per input its shape if it is a weight."""

    operator: Operator
    weights: tuple[Shape | None, ...]

    def inputs(self, profiled: Sequence[Shape]) -> tuple[Shape, ...]:
        """Shapes of all inputs, where a profile lacks those of weights that were packed.

        >>> _Optimized(Operator("fc", "Gemm"), (None, (8, 4), (4,))).inputs([(1, 8), (4,)])
        ((1, 8), (8, 4), (4,))
        """
        left = list(profiled)
        packed = len(self.weights) - len(left)
        shapes = []
        for weight in self.weights:
            if weight is not None and packed > 0 and weight not in left[:1]:
                shapes.append(weight)
                packed -= 1
            elif left:
                shapes.append(left.pop(0))
        return tuple(shapes)


def _optimized(folder: Path, nodes: Nodes) -> list[_Optimized]:
    """The nodes of the optimized model, in topological order; none if a provider leaves none."""
    path = folder / _OPTIMIZED
    if not path.exists():
        return []
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return [
        _Optimized(operator, tuple(weights.get(name) for name in node.input if name))
        for node, operator in zip(graph.node, _operators(graph, nodes), strict=True)
    ]


def _operators(graph: onnx.GraphProto, nodes: Nodes) -> list[Operator]:
    """The nodes of an optimized model, each with those of the model that it computes."""
    moves = [node.domain == _NCHWC and node.op_type in _REORDERS for node in graph.node]
    made = [
        () if moved else _made(node, nodes) for node, moved in zip(graph.node, moves, strict=True)
    ]
    starts = {name for names in made for name in names}
    origins = [nodes.between(ends, starts) for ends in made]
    layers = [layer_of(node.op_type, each) for node, each in zip(graph.node, origins, strict=True)]
    # What a function that was inlined computes on the way is for the node whose result it serves.
    reader: dict[str, str] = {}
    for place in reversed(range(len(layers))):
        node = graph.node[place]
        if not layers[place] and not moves[place]:
            layers[place] = next((reader[name] for name in node.output if name in reader), "")
        reader |= dict.fromkeys(filter(None, node.input), layers[place])
    return [_operator(*each) for each in zip(graph.node, origins, layers, strict=True)]


def _operator(node: onnx.NodeProto, origins: Sequence[Node], layer: str) -> Operator:
    return Operator(
        name=node.name,
        op_type=node.op_type,
        domain=node.domain,
        origins=tuple(origin.name for origin in origins),
        layer=layer,
        layout=_layout(node),
        activation=_activation(node),
    )


def _made(node: onnx.NodeProto, nodes: Nodes) -> tuple[str, ...]:
    """The values of the model that a node of the optimized one makes, under whatever names.

    Nodes of the blocked layout are named after the value, others after the node that they stand for
    and what has changed it: ``layer/MatMulAddFusion``.
    """
    kept = tuple(filter(None, (_known(name, nodes.makers) for name in node.output)))
    value = _known(node.name.rpartition(_NCHWC_SUFFIX)[0], nodes.makers)
    if kept or value:
        return kept or (nodes.behind(value, most=_taken_in(node)),)
    named = nodes.named_after(node.name) or nodes.named_after(_without_additions(node.name))
    return () if named is None else named.makes


def _known(name: str, names: Container[str]) -> str:
    """The one of the names that ONNX Runtime has made a name of; empty for none."""
    return next((each for each in (name, _without_additions(name)) if each in names), "")


def _without_additions(name: str) -> str:
    """A name without what ONNX Runtime puts before and behind it.

    Before: a value in single precision, where the model has half. Behind: a second of its name.

    >>> _without_additions("InsertedPrecisionFreeCast_relu"), _without_additions("conv_token_90")
    ('relu', 'conv')
    """
    return _TOKEN.sub("", name.removeprefix(_CAST_PREFIX))


def _taken_in(node: onnx.NodeProto) -> int:
    """How many nodes a convolution of the blocked layout has taken in behind the value it names.

    One that adds what its fourth input holds keeps its name, also with an activation behind that.
    """
    if len(node.input) <= _SUM_INPUT or not node.input[_SUM_INPUT]:
        return 0
    return 1 + bool(_activation(node))


def _activation(node: onnx.NodeProto) -> str:
    """What ONNX Runtime has fused behind a convolution or a product."""
    return next((a.s.decode() for a in node.attribute if a.name == "activation"), "")


def _layout(node: onnx.NodeProto) -> Layout | None:
    if node.op_type not in ("Conv", "FusedConv") and not node.op_type.endswith("Pool"):
        return None
    return "blocked" if node.domain == _NCHWC else "plain"


@dataclass(slots=True)
class _Kernel:
    """The events of one node in a profile."""

    name: str
    op_type: str
    index: str
    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    microseconds: dict[int, float] = field(default_factory=dict)  # by run, all turns together


def _kernels(events: Sequence[Mapping[str, Any]], warm_up: int) -> list[_Kernel]:
    """The nodes in a profile, after some runs to warm up.

    The event of a run follows those of its nodes, that of a loop those of its body: what lies
    within a node is taken off its time.
    """
    found: dict[tuple[str, str, str], _Kernel] = {}
    run = -warm_up
    within: list[Mapping[str, Any]] = []  # events that may turn out to lie within a later one
    for event in events:
        if event["name"] == "model_run":
            run += 1
            within.clear()
        elif event["cat"] == "Node" and event["name"].endswith(_EVENT_SUFFIX):
            own = event["dur"]
            while within and within[-1]["ts"] >= event["ts"]:
                own -= within.pop()["dur"]
            within.append(event)
            if run >= 0:
                kernel = _kernel(event)
                kernel = found.setdefault((kernel.name, kernel.op_type, kernel.index), kernel)
                kernel.microseconds[run] = kernel.microseconds.get(run, 0.0) + max(own, 0)
    return list(found.values())


def _kernel(event: Mapping[str, Any]) -> _Kernel:
    args = event["args"]
    return _Kernel(
        event["name"].removesuffix(_EVENT_SUFFIX),
        args["op_name"],
        args.get("node_index", ""),
        _shapes(args.get("input_type_shape", ())),
        _shapes(args.get("output_type_shape", ())),
    )


def _shapes(typed: Sequence[Mapping[str, Sequence[int]]]) -> tuple[Shape, ...]:
    """Shapes out of ``[{"float": [1, 8]}, ...]``."""
    return tuple(tuple(shape) for one in typed for shape in one.values())


def _by_kernel(
    kernels: Sequence[_Kernel], optimized: Sequence[_Optimized]
) -> dict[str, _Optimized]:
    """The nodes of the optimized model by the names of the kernels that run them.

    Nodes without a name, as of a function that was inlined, run under that of their type and a
    number; both lists are in the order of execution.
    """
    found = {one.operator.name: one for one in optimized if one.operator.name}
    nameless: dict[str, list[_Optimized]] = {}
    for one in optimized:
        if not one.operator.name:
            nameless.setdefault(one.operator.op_type, []).append(one)
    for op_type, nodes in nameless.items():
        left = [each.name for each in kernels if each.op_type == op_type and each.name not in found]
        if len(left) == len(nodes):
            found |= zip(left, nodes, strict=True)
    return found


def _executed(kernel: _Kernel, optimized: _Optimized | None) -> Executed:
    operator = Operator(kernel.name, kernel.op_type) if optimized is None else optimized.operator
    return Executed(
        **asdict(operator) | {"name": kernel.name},
        inputs=kernel.inputs if optimized is None else optimized.inputs(kernel.inputs),
        outputs=kernel.outputs,
        microseconds=middle(kernel.microseconds.values()),
    )
