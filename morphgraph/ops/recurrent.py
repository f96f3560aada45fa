"""Recurrent layers: LSTM, GRU, RNN.

The hidden state is one set of units in three roles. The layer makes them (``h``: the gates' rows of
both kernels, biases, peepholes), sums over them at the next step (``k``: the columns of the
recurrent kernel), and takes them from outside for the first one (``s``: initial states). All three
stand on the result, so that they live and die together; a removed unit is one whose columns of the
recurrent kernel are zero. Gates and directions are pinned: both directions keep the same units.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from morphgraph.ops.initial import Initial, by_fan_in
from morphgraph.ops.linear import Gates, Linear
from morphgraph.ops.lowering import Activation, TorchBuilder, fx
from morphgraph.ops.op import (
    Description,
    Op,
    OpNode,
    Resizing,
    attribute_value,
    from_line,
    op,
)


def _describe(n: OpNode, gates: int, states: int, layout: int) -> Description:
    """The factors of a layer with some gates, that carries one or two states from step to step."""
    x, state, y, last = (
        ("N T i", "N D s", "N T D h", "N D h") if layout else ("T N i", "D N s", "T D N h", "D N h")
    )
    operands = [x, "D (G h) i", "D (G h) k", "D (Q h)", "N", *[state] * states]
    if states == 2:
        operands.append("D (P h)")
    line = f"{', '.join(operands)} -> {', '.join([y, *[last] * states])}"
    sizes = {"G": gates, "Q": 2 * gates}
    macs = "T N D G h i + T N D G h k"
    description = from_line(n, line, sizes, macs=macs, contracted="i k")
    factors = description.factors
    (result, *_) = (place for place in factors["h"].places if place.port < 0)
    for name in {"k", "s"} & factors.keys():
        factors[name].places.append(result)
    if factors["h"].size == 1:
        # Nothing tells a single unit from the gates that it stands beside: no place to grow at.
        factors["h"].pinned = f"{n.op_type} of one unit"
    return description


_GATES_AND_STATES = {"LSTM": (4, 2), "GRU": (3, 1), "RNN": (1, 1)}
_DEFAULTS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
# The activations that a layer may name, with the defaults of alpha and beta where they have them.
# Without a default they must be given: ONNX Runtime takes others than the operators of these names.
_ACTIVATIONS: dict[str, tuple[float | None, ...]] = {
    "affine": (None, None),
    "elu": (1.0,),
    "hardsigmoid": (0.2, 0.5),
    "leakyrelu": (0.01,),
    "relu": (),
    "scaledtanh": (None, None),
    "sigmoid": (),
    "softplus": (),
    "softsign": (),
    "tanh": (),
    "thresholdedrelu": (None,),
}
# Where torch's gates stand among ONNX's: (i, f, c, o) in (i, o, f, c); (r, z, h) in (z, r, h).
_TORCH_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}


def _activations(
    b: "TorchBuilder",
    n: OpNode,
    names: Sequence[str] | None,
    alphas: Sequence[float],
    betas: Sequence[float],
) -> list[list["Activation"]]:
    """The activations of every direction; numbers go to those that take some, in order."""
    default = _DEFAULTS[n.op_type]
    directions = n.shape(1)[0]
    given = iter(alphas), iter(betas)
    functions: list[Activation] = []
    for name in names or default * directions:
        defaults = _ACTIVATIONS.get(name.lower())
        if defaults is None:
            b.fail(n, f"activation {name} is none of ONNX's", "write another into the model")
        numbers = [0.0, 0.0]
        for k, value in enumerate(defaults):
            number = next(given[k], value)
            if number is None:
                b.fail(n, f"activation {name} without alpha or beta", "write them into the model")
            numbers[k] = b.decimal(number)
        functions.append((name.lower(), numbers[0], numbers[1]))
    each = len(default)
    return [functions[k * each : (k + 1) * each] for k in range(directions)]


def _torch_kernel(
    n: OpNode, activations: list[list["Activation"]], clip: float | None, option: int
) -> str | None:
    """Torch's function for this form of the layer, if it has one."""
    if n.has(4) or n.has(7) or clip is not None:
        return None
    default = tuple(name.lower() for name in _DEFAULTS[n.op_type])
    used = {tuple(name for name, _, _ in functions) for functions in activations}
    if n.op_type == "RNN" and used == {("relu",)}:
        return "rnn_relu"
    if used != {default} or option != (n.op_type == "GRU"):
        return None
    return "rnn_tanh" if n.op_type == "RNN" else n.op_type.lower()


def _lower(
    b: "TorchBuilder",
    n: OpNode,
    direction: str,
    layout: int,
    activations: list[list["Activation"]],
    clip: float | None,
    option: int,
) -> "tuple[fx.Node, ...]":
    """The layer by torch's kernel where it has one, else step by step."""
    carried = 2 if n.op_type == "LSTM" else 1
    x = b.tensor(n, 0)
    states = [b.optional(n, 5 + k) for k in range(carried)]
    if layout:
        x = b.method("transpose", x, 0, 1)
        states = [None if s is None else b.method("transpose", s, 0, 1) for s in states]
    kernel = _torch_kernel(n, activations, clip, option)
    if kernel is None:
        weights = [b.tensor(n, 1), b.tensor(n, 2), b.optional(n, 3), b.optional(n, 7)]
        form = activations, direction == "reverse", clip, bool(option)
        made = b.call(b.functions.stepwise, n.op_type, x, states, *weights, b.optional(n, 4), *form)
        results = [b.item(made, k) for k in range(1 + carried)]
    else:
        results = _by_kernel(b, n, kernel, x, states, direction == "reverse")
    if layout:
        results[0] = b.method("permute", results[0], (2, 0, 1, 3))
        results[1:] = [b.method("transpose", last, 0, 1) for last in results[1:]]
    return tuple(results)


def _by_kernel(
    b: "TorchBuilder",
    n: OpNode,
    kernel: str,
    x: "fx.Node",
    states: list["fx.Node | None"],
    reverse: bool,
) -> list["fx.Node"]:
    """A call of torch's kernel: of the module that was exported, or else of the function."""
    weights, names = _weights(b, n)
    directions = n.shape(1)[0]
    made = None if reverse else _module(b, n, kernel, x, states, names)
    if made is None:
        made = b.call(b.functions.fused, kernel, x, states, weights, directions, reverse)
        return [b.item(made, k) for k in range(1 + len(states))]
    y, last = b.item(made, 0), b.item(made, 1)
    lasts = [b.item(last, k) for k in range(2)] if len(states) == 2 else [last]
    if (names[0] or "").rpartition("_l")[2] != "0":  # the module gives those of all layers
        lasts = [b.item(state, slice(-directions, None)) for state in lasts]
    apart = b.method("unflatten", y, 2, (directions, n.shape(2)[2]))
    return [b.method("transpose", apart, 1, 2), *lasts]


def _weights(b: "TorchBuilder", n: OpNode) -> tuple[list["fx.Node"], list[str | None]]:
    """The weights as torch's kernels take them, and their names where they are parameters.

    The exporter writes them in ONNX's order of gates, computed from parameters in torch's. Where
    undoing that finds a parameter as a whole, the parameter itself is read.
    """
    units, order = n.shape(2)[2], _TORCH_GATES[n.op_type]
    rows = np.concatenate([np.arange(gate * units, (gate + 1) * units) for gate in order])
    pieces = [(1, 0), (2, 0)] + ([(3, 0), (3, len(rows))] if n.has(3) else [])
    origins = {i: b.origins(n, i) for i, _ in pieces}
    found: list[fx.Node] = []
    names: list[str | None] = []
    for d in range(n.shape(1)[0]):
        for i, start in pieces:
            origin = origins[i]
            name = None if origin is None else origin.parameter(origin.positions[d][start + rows])
            names.append(name)
            found.append(
                _in_torch_order(b, b.item(b.tensor(n, i), d), start, units, order)
                if name is None
                else b.parameter(name)
            )
    return found, names


def _in_torch_order(
    b: "TorchBuilder", weight: "fx.Node", start: int, units: int, order: Sequence[int]
) -> "fx.Node":
    """Rows of a computed weight ``[rows, ...]``, gate by gate."""
    import torch

    starts = [start + gate * units for gate in order]
    gates = [b.item(weight, slice(first, first + units)) for first in starts]
    return gates[0] if len(gates) == 1 else b.call(torch.cat, gates)


def _module(
    b: "TorchBuilder",
    n: OpNode,
    kernel: str,
    x: "fx.Node",
    states: list["fx.Node | None"],
    names: list[str | None],
) -> "fx.Node | None":
    """A call of ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``, at the last of the nodes that it became.

    The module owns the parameters of all its layers under their names; ``None`` where the nodes are
    no such module, for example since their sizes differ after a resize.
    """
    from torch import nn

    place = _place_in_module(n, names)
    if place is None or b.is_exported(f"{place[0]}.weight_ih_l{place[1] + 1}"):
        return None
    path, layers = place[0], place[1] + 1
    bottom = n
    for number in range(layers - 1)[::-1]:
        under = _layer_under(bottom)
        if under is None or _place_in_module(under, _weights(b, under)[1]) != (path, number):
            return None
        bottom = under
    given = [state for state in states if state is not None]
    if given and (layers > 1 or len(given) < len(states)):
        return None
    kinds = {"lstm": nn.LSTM, "gru": nn.GRU}
    options = {
        "num_layers": layers,
        "bias": n.has(3),
        "bidirectional": n.shape(1)[0] == 2,
        "device": "meta",
    }
    sizes = bottom.shape(1)[2], n.shape(2)[2]
    module = (
        kinds[kernel](*sizes, **options)
        if kernel in kinds
        else nn.RNN(*sizes, nonlinearity=kernel.removeprefix("rnn_"), **options)
    )
    hidden = [tuple(given) if len(given) == 2 else given[0]] if given else []
    return b.adopt(path, module, x if bottom is n else b.tensor(bottom, 0), *hidden)


def _place_in_module(n: OpNode, names: Sequence[str | None]) -> tuple[str, int] | None:
    """Path of the module and number of the layer, if the weights are called as torch calls them."""
    found = re.fullmatch(r"(.+)\.weight_ih_l(\d+)", names[0] or "")
    if found is None:
        return None
    path, number = found.groups()
    roles = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: 4 if n.has(3) else 2]
    ends = ["", "_reverse"][: n.shape(1)[0]]
    wanted = [f"{path}.{role}_l{number}{end}" for end in ends for role in roles]
    return (path, int(number)) if list(names) == wanted else None


def _layer_under(n: OpNode) -> OpNode | None:
    """The layer whose states, and nothing else of it, this one of the same form reads."""
    value = n.ir.inputs[0]
    perms = [(0, 2, 1, 3)] if n.shape(1)[0] == 2 else []
    for movements in [("Reshape", "Squeeze"), *[("Transpose",)] * len(perms)]:
        node = _only_use(value)
        if node is None or node.op_type not in movements:
            return None
        if node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) != perms[0]:
            return None
        value = node.inputs[0]
    node = _only_use(value)
    if node is None or node.op_type != n.op_type or value is not node.outputs[0]:
        return None
    unread = all(not v.uses() and not v.is_graph_output() for v in node.outputs[1:])
    same_form = _attributes(node) == _attributes(n.ir)
    under = OpNode(node)
    plain = not any(under.has(i) for i in range(4, 8)) and under.has(3) == n.has(3)
    return under if unread and same_form and plain else None


def _only_use(value: ir.Value | None) -> ir.Node | None:
    """The producer of a value that is read once and is no output of the graph."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute_value(attribute) for name, attribute in node.attributes.items()}


@op("LSTM", "GRU", "RNN")
class Recurrent(Op):
    """Arithmetic: both kernels, per step and direction; ``T N (|W| + |R|)`` in all."""

    foldable = False  # slow
    zeros = (3, 5, 6)  # the biases, the initial states

    @staticmethod
    def describe(n: OpNode, *, layout: int = 0) -> Description:
        gates, states = _GATES_AND_STATES[n.op_type]
        return _describe(n, gates, states, layout)

    @staticmethod
    def initial(n: OpNode) -> Mapping[int, Initial]:
        return dict.fromkeys((1, 2, 3, 7), by_fan_in(n.shape(2)[2]))  # kernels, biases, peepholes

    @staticmethod
    def linear(n: OpNode) -> Linear | None:
        return Gates(operand=0, weight=1) if n.is_weight(1) and not n.is_weight(0) else None

    @staticmethod
    def resize(n: OpNode, new: Resizing) -> None:
        new.set_attribute("hidden_size", new.size("h"))

    @staticmethod
    def lower(
        b: "TorchBuilder",
        n: OpNode,
        *,
        activation_alpha: Sequence[float] = (),
        activation_beta: Sequence[float] = (),
        activations: Sequence[str] | None = None,
        clip: float | None = None,
        direction: str = "forward",
        input_forget: int = 0,
        layout: int = 0,
        linear_before_reset: int = 0,
    ) -> "tuple[fx.Node, ...]":
        functions = _activations(b, n, activations, activation_alpha, activation_beta)
        option = input_forget or linear_before_reset  # the first is LSTM's, the second GRU's
        return _lower(b, n, direction, layout, functions, clip, option)
