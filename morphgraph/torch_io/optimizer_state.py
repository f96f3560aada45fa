"""An optimizer's state after a resize: momenta, averages and the like, cut as their parameters.

Optimizers name what they keep as they like (``exp_avg``, ``momentum_buffer``, ``row_var``), so that
a state is known by its shape: the parameter's own, the parameter's with axes of size 1 where it was
averaged over (Adafactor of torch), or the parameter's without such axes (Adafactor elsewhere).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from morphgraph.arrays import IntArray, Shape
from morphgraph.errors import ArgumentError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.plans import Plan
from morphgraph.torch_io.layer_sizes import TensorCut
from morphgraph.torch_io.weights import named_tensors

Optimizer = torch.optim.Optimizer
_SHOWN = 5  # parameters that a warning names
_ROWS, _COLUMNS = ("row", "_r"), ("col", "_c")  # how averages of matrices are called


@dataclass(frozen=True)
class CarriedState:
    """What became of an optimizer's state.

    Attributes:
        carried: parameters whose state the new optimizer has, by their names in the graph.
        left_out: parameters that it begins anew with, and why.
    """

    carried: tuple[str, ...]
    left_out: Mapping[str, str]

    def warn(self) -> None:
        """Say what was left out."""
        if not self.left_out:
            return
        named = [f"'{escape(name)}' ({why})" for name, why in self.left_out.items()]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        warn(
            f"state of the optimizer that is not carried over: {'; '.join(named[:_SHOWN])}{more}; "
            "it begins anew there"
        )


@dataclass(frozen=True)
class Cut:
    """A parameter's cut, and per axis the new positions of channels that were added."""

    tensor: TensorCut
    fresh: Mapping[int, IntArray]


class UnknownStateError(Exception):
    """Why a state cannot be cut."""


def transfer_optimizer_state(
    optimizer: Optimizer,
    new_optimizer: Optimizer,
    graph: ChannelGraph,
    plan: Plan,
    *,
    net: nn.Module,
    new_net: nn.Module,
) -> CarriedState:
    """Give the optimizer of a resized network the state of the one before, cut as the weights.

    Everything that stands beside a parameter in its own shape, or averaged over some of its axes,
    is cut as the parameter is: the momentum of SGD and Muon, the averages of Adam, AdamW, Lion,
    RMSprop, Adagrad, and Adafactor's rows and columns. Counts of steps are kept. Channels that the
    plan adds begin with the averages of squares of the channel that they are copies of, and without
    momentum. Where a parameter has a state of another form, all of its state is left out, with a
    warning; it begins anew. Learning rates and the like stay those of the new optimizer.

    Args:
        optimizer: of ``net``; it is not changed. Of several optimizers, give one at a time.
        new_optimizer: of ``new_net``; what it has of a state is replaced.
        graph: the lifted network that the plan is for.
        plan: by which ``net`` became ``new_net``.
        net: the network before the resize; wrapped or not.
        new_net: the network after it.

    Raises:
        ArgumentError: an optimizer owns no parameter of its network.
        PlanError: the plan is for another network.

    >>> import morphgraph as mg
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> graph = mg.lift(mg.export(net, (image(),)))
    >>> optimizer = torch.optim.AdamW(net.parameters())
    >>> net(image(2)).square().mean().backward(); optimizer.step()
    >>> plan = mg.uniform(graph, 0.5)
    >>> small = mg.to_torch(mg.apply(graph, plan, weights=net))
    >>> new = torch.optim.AdamW(small.parameters())
    >>> told = mg.transfer_optimizer_state(optimizer, new, graph, plan, net=net, new_net=small)
    >>> len(told.carried) == len(list(small.parameters())), dict(told.left_out)
    (True, {})
    """
    selection = AxisSelection(graph, plan.keep_channels(graph), plan.added(graph))
    old_names, new_names = _names(net, optimizer), _names(new_net, new_optimizer)
    by_name = {name: p for p, names in new_names.items() for name in names}
    carried, left_out = [], {}
    for parameter, names in old_names.items():
        name = next((n for n in names if n in graph.shapes), names[0])
        new = next((by_name[n] for n in names if n in by_name), None)
        state = optimizer.state.get(parameter)
        if not state or new is None:  # it has not moved yet, or its layer has vanished
            continue
        try:
            cut = _cut_of(name, parameter, new, selection)
            new_optimizer.state[new] = dict(cut_state(state, cut, new.device))
        except UnknownStateError as error:
            new_optimizer.state.pop(new, None)
            left_out[name] = str(error)
        else:
            carried.append(name)
    told = CarriedState(tuple(carried), left_out)
    told.warn()
    return told


def cut_in_place(
    optimizer: Optimizer, cuts: Mapping[nn.Parameter, tuple[str, Cut]]
) -> CarriedState:
    """Cut the state of parameters that were resized and stayed the same objects.

    Args:
        optimizer: whose state is cut.
        cuts: by parameter its name and what was done to it.
    """
    carried, left_out = [], {}
    for parameter, (name, cut) in cuts.items():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        try:
            optimizer.state[parameter] = dict(cut_state(state, cut, parameter.device))
        except UnknownStateError as error:
            del optimizer.state[parameter]
            left_out[name] = str(error)
        else:
            carried.append(name)
    return CarriedState(tuple(carried), left_out)


def cut_state(
    state: Mapping[str, Any], cut: Cut, device: torch.device
) -> Iterator[tuple[str, Any]]:
    """All that an optimizer keeps for a parameter, after the parameter's cut.

    Raises:
        UnknownStateError: an entry is neither a number nor of the parameter's shape.
    """
    for key, value in state.items():
        if isinstance(value, Tensor) and value.dim() and value.numel() != 1:
            yield key, _cut_entry(str(key), value, cut).to(device)
        elif isinstance(value, Tensor) and value.dim() == len(cut.tensor.before):
            yield key, _cut_entry(str(key), value, cut)
        elif isinstance(value, Tensor):
            yield key, value.clone()
        elif value is None or isinstance(value, int | float | bool | str):
            yield key, value
        else:
            raise UnknownStateError(f"its {escape(str(key))} is a {type(value).__name__}")


def _names(net: nn.Module, optimizer: Optimizer) -> dict[nn.Parameter, list[str]]:
    """The parameters that an optimizer owns, with all the names that they have in the graph.

    Raises:
        ArgumentError: there are none.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found: dict[nn.Parameter, list[str]] = {}
    for name, tensor in named_tensors(net).items():
        if isinstance(tensor, nn.Parameter) and id(tensor) in owned:
            found.setdefault(tensor, []).append(name)
    if not found:
        raise ArgumentError(
            f"the {type(optimizer).__name__} owns no parameter of the {type(net).__name__} that it "
            "was given with; make the optimizer of that network's parameters()"
        )
    return found


def _cut_of(name: str, parameter: Tensor, new: Tensor, selection: AxisSelection) -> Cut:
    """What a resize has done to a parameter.

    Raises:
        UnknownStateError: it is not what the plan says.
    """
    before, after = tuple(parameter.shape), tuple(new.shape)
    known = tuple(selection.graph.shapes.get(name, before))
    positions = dict(selection.cuts(name)) if name in selection.graph.shapes else {}
    expected = tuple(len(positions[k]) if k in positions else n for k, n in enumerate(before))
    if known != before or expected != after:
        raise UnknownStateError(
            f"it is {_shown(before)} before and {_shown(after)} after, which is not what the plan "
            "does"
        )
    fresh = {axis: selection.fresh(name, axis) for axis in positions}
    return Cut(TensorCut(before, after, positions), fresh)


def _cut_entry(key: str, value: Tensor, cut: Cut) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter):
        raise UnknownStateError(f"its {escape(key)} is a {type(value).__name__}")
    axes = _axes(key, tuple(value.shape), cut.tensor)
    result = value.detach().clone()
    signed = bool((value < 0).any()) if value.is_floating_point() else False
    for place, axis in enumerate(axes):
        positions = None if axis is None else cut.tensor.positions.get(axis)
        if axis is None or positions is None:
            continue
        result = result.index_select(place, torch.from_numpy(positions).to(result.device))
        fresh = cut.fresh.get(axis, np.zeros(0, dtype=np.int64))
        if signed and len(fresh):  # a direction, not a size: the copies have none yet
            result.index_fill_(place, torch.from_numpy(fresh).to(result.device), 0)
    return result


def _axes(key: str, shape: Shape, cut: TensorCut) -> tuple[int | None, ...]:
    """For every axis of a state the parameter's axis that it is; None for one averaged over.

    Raises:
        UnknownStateError: it fits none, or several that are cut differently.
    """
    before = cut.before
    if len(shape) == len(before):
        if all(size in (1, whole) for size, whole in zip(shape, before, strict=True)):
            return tuple(
                k if size == whole else None
                for k, (size, whole) in enumerate(zip(shape, before, strict=True))
            )
        raise UnknownStateError(f"its {escape(key)} is {_shown(shape)}")
    found = [
        axes
        for axes in combinations(range(len(before)), len(shape))
        if all(before[axis] == size for axis, size in zip(axes, shape, strict=True))
    ]
    last = len(before) - 1
    for endings, averaged in ((_ROWS, last), (_COLUMNS, last - 1)):
        if key.endswith(endings):
            found = [axes for axes in found if averaged not in axes]
    if not found:
        raise UnknownStateError(f"its {escape(key)} is {_shown(shape)}")
    if len({tuple(cut.at(axis).tobytes() for axis in axes) for axes in found}) > 1:
        raise UnknownStateError(
            f"its {escape(key)} of {_shown(shape)} may stand for several of its axes"
        )
    return found[0]


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
