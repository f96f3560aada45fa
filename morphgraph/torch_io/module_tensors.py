"""Which positions of a network's own tensors stay under a plan, in its training forward as well.

The plan is for the graph of the ``eval`` forward. What only the training forward reads (auxiliary
heads) is not there, nor are buffers from which the exporter has computed constants. For those the
network is exported again: in training form, buffers kept as if they were parameters. The axes of
the tensors that both graphs have say which channels of that graph go, and these which positions of
the others. Layers that are run and whose results nobody uses (the last of a list) are in no graph
of the network's results; they are exported with what they give among these.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

from morphgraph.arrays import IntArray
from morphgraph.errors import MorphError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import escape
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.lift import lift
from morphgraph.passes.rewrite.resize import resize
from morphgraph.torch_io.export import export
from morphgraph.torch_io.layer_sizes import TensorCut
from morphgraph.torch_io.module_runs import Call, Runner
from morphgraph.torch_io.names import recorded_names
from morphgraph.torch_io.tensors import take, to_onnx

_PREFIX = "net."
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True)
class OwnTensor:
    """A parameter or buffer, which may be tied: all names it has in the network and in ONNX."""

    tensor: torch.Tensor
    names: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)


def own_tensors(net: nn.Module) -> list[OwnTensor]:
    """All parameters and buffers, each once."""
    in_onnx = recorded_names(net)
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in (
        *net.named_parameters(remove_duplicate=False),
        *net.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    for known in names.values():
        known += [in_onnx[name] for name in known if in_onnx.get(name, name) not in known]
    return [OwnTensor(tensor, tuple(names[key])) for key, tensor in tensors.items()]


@dataclass(frozen=True)
class Form:
    """One way in which a network computes, as a graph before and after the resize.

    Attributes:
        graph: lifted, with the network's present weights.
        small: the resized model.
        selection: which positions stay.
        prefix: what stands before a tensor's name.
        traced: exported by tracing, so that what depends on data is decided once for all.
    """

    graph: ChannelGraph
    small: ir.Model
    selection: AxisSelection
    prefix: str = ""
    traced: bool = False

    def find(self, own: OwnTensor) -> str | None:
        """The initializer that a tensor is, if it is one."""
        for name in own.names:
            full = self.prefix + name
            initializer = self.graph.model.graph.initializers.get(full)
            if initializer is not None and self.graph.shapes.get(full) == own.shape:
                return full
        return None


def form_of(
    graph: ChannelGraph,
    keep: Mapping[int, IntArray],
    added: Mapping[int, int] | None = None,
    prefix: str = "",
    seed: int = 0,
) -> Form:
    """A graph under a plan."""
    small = resize(graph, keep, added, seed)
    return Form(graph, small, AxisSelection(graph, keep, added), prefix)


@dataclass
class Followed:
    """What becomes of a network's tensors.

    Attributes:
        cuts: by name; tensors that do not change are left out.
        numbers: by name the new contents, where they are not the old ones at the kept positions.
        unread: names of tensors that no form of the network reads; they stay as they are.
        idle: names of tensors of layers that run, and on whose results nothing depends.
        training: the training form, if it had to be exported.
        refusal: why there is no training form though it was needed.
    """

    cuts: dict[str, TensorCut] = field(default_factory=dict)
    numbers: dict[str, ir.TensorProtocol] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    training: Form | None = None
    refusal: str = ""


def follow(net: nn.Module, form: Form, call: Call) -> Followed:
    """Find what becomes of every tensor of a network.

    Args:
        net: the network, not yet resized.
        form: what it computes in ``eval`` mode, and the plan.
        call: an example of its arguments.

    Raises:
        UnsupportedError: a tensor of a layer that is cut away altogether; or a plan that adds
            channels to what the graph does not show.
    """
    tensors = own_tensors(net)
    followed = follow_known(tensors, form)
    unknown = [
        own
        for own in tensors
        if own.tensor.is_floating_point() and own.tensor.dim() and form.find(own) is None
    ]
    for exported in (eval_form, training_form):
        if not unknown:
            break
        try:
            with exported(net):
                other = _other_form(net, form, tensors, unknown, call)
        except MorphError as error:
            followed.refusal = str(error)
            continue
        unknown = [own for own in unknown if not _take(other, own, followed)]
        if exported is training_form:
            followed.training, followed.refusal = other, ""
    with eval_form(net):
        layers = _run_layers(net, unknown, call)
        if layers:
            followed.idle = tuple(own.names[0] for own, _ in layers)
            try:
                run = [layer for _, layer in layers]
                other = _other_form(net, form, tensors, unknown, call, run)
            except MorphError as error:
                followed.refusal = str(error)
            else:
                unknown = [own for own in unknown if not _take(other, own, followed)]
    followed.unread = tuple(own.names[0] for own in unknown)
    return followed


def _run_layers(
    net: nn.Module, unknown: Sequence[OwnTensor], call: Call
) -> list[tuple[OwnTensor, nn.Module]]:
    """The tensors whose layers, inside of the network, are run by a call of it, with these."""
    owners = [(own, net.get_submodule(own.names[0].rpartition(".")[0])) for own in unknown]
    run: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda layer, *_: run.add(layer))
        for module in {layer for _, layer in owners} - {net}
    ]
    try:
        if hooks:
            Runner(net, call)()
    finally:
        for hook in hooks:
            hook.remove()
    return [(own, layer) for own, layer in owners if layer in run]


def follow_known(tensors: Sequence[OwnTensor], form: Form) -> Followed:
    """What becomes of the tensors that a form has, with the numbers that they hold now.

    Raises:
        UnsupportedError: a tensor of a layer that is cut away altogether.
    """
    followed = Followed()
    for own in tensors:
        if not _take(form, own, followed):
            _take_positions(form, own, followed)
    return followed


def _take(form: Form, own: OwnTensor, followed: Followed) -> bool:
    """Note what a form says of a tensor; whether it says anything."""
    name = form.find(own)
    if name is None:
        return False
    cuts = form.selection.cuts(name)
    small = form.small.graph.initializers.get(name)
    if small is None or small.const_value is None:
        if cuts:
            raise UnsupportedError(
                f"tensor '{escape(own.names[0])}': the plan cuts its layer away, but a module's "
                "forward goes on calling it; plan without `depth` and with a min_width of 1, or "
                "take mg.to_torch(mg.apply(graph, plan))"
            )
        return True
    before = own.shape
    after = tuple(small.const_value.shape.numpy())
    positions = dict(cuts)
    expected = take(own.tensor.detach(), positions)
    plain = to_onnx(expected, small.const_value.dtype, name)
    if plain.shape != small.const_value.shape or plain.tobytes() != small.const_value.tobytes():
        followed.numbers |= dict.fromkeys(own.names, small.const_value)
    elif not cuts:
        return True
    followed.cuts |= dict.fromkeys(own.names, TensorCut(before, after, positions))
    return True


def _take_positions(form: Form, own: OwnTensor, followed: Followed) -> None:
    """Note new numbers of a list of positions, from which the exporter has made a constant.

    Such a constant is known by its numbers; where it changes, a choice by index follows the plan.
    """
    if own.tensor.dtype not in (torch.int64, torch.int32) or own.tensor.dim() != 1:
        return
    numbers = own.tensor.cpu().numpy()
    news: dict[bytes, ir.TensorProtocol] = {}
    for name, value in form.graph.model.graph.initializers.items():
        old, new = value.const_value, form.small.graph.initializers.get(name)
        if old is None or new is None or new.const_value is None or old.size != numbers.size:
            continue
        if old.dtype in _INTEGERS and np.array_equal(old.numpy().ravel(), numbers):
            content = new.const_value.numpy().ravel()
            news[content.tobytes()] = ir.tensor(content)
    if len(news) == 1:
        (found,) = news.values()
        if not np.array_equal(found.numpy(), numbers):
            cuts = TensorCut(own.shape, tuple(found.shape.numpy()), {})
            followed.cuts |= dict.fromkeys(own.names, cuts)
            followed.numbers |= dict.fromkeys(own.names, found)


def _other_form(
    net: nn.Module,
    form: Form,
    tensors: Sequence[OwnTensor],
    unknown: Sequence[OwnTensor],
    call: Call,
    layers: Iterable[nn.Module] = (),
) -> Form:
    """Another form of the network, with the channels that the plan removes from the first.

    What these layers give is among its results.
    """
    kept = [own for own in unknown if not isinstance(own.tensor, nn.Parameter)]
    holder = _Holder(net, kept, call.keywords, layers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = export(holder, call.arguments)
    graph = lift(model, attention=form.graph.options.attention)
    bare = Form(graph, graph.model, AxisSelection(graph, {}), _PREFIX)
    dead = _dead_channels(form, bare, tensors)
    owners = graph.channel_group[dead]
    if (owners < 0).any():
        raise UnsupportedError("some of the removed channels cannot be told apart there")
    keep = {
        int(index): np.flatnonzero(~np.isin(graph.groups[index].channels, dead))
        for index in np.unique(owners)
    }
    return replace(form_of(graph, keep, prefix=_PREFIX), traced=bool(caught))


def _dead_channels(form: Form, other: Form, tensors: Sequence[OwnTensor]) -> IntArray:
    """The channels of another form at the positions that the plan removes from shared tensors."""
    graph = other.graph
    removed, stays = (np.zeros(len(graph.channel_group), dtype=bool) for _ in range(2))
    for own in tensors:
        name, there = form.find(own), other.find(own)
        if name is None or there is None:
            continue
        for axis, size in enumerate(own.shape):
            if len(form.selection.fresh(name, axis)):
                raise UnsupportedError(
                    f"'{escape(own.names[0])}' grows, and the network has tensors that the graph "
                    "does not show; plan without new channels"
                )
            kept = form.selection.axis(name, axis)
            alive = np.ones(size, dtype=bool)
            if kept is not None:
                alive[:] = False
                alive[kept] = True
            channels = graph.channels_at(there, axis)
            stays[channels[alive]] = True
            removed[channels[~alive]] = True
            if (stays & removed)[channels].any():
                raise UnsupportedError(
                    f"axis {axis} of '{escape(own.names[0])}' holds channels there of which the "
                    "plan removes some and keeps others"
                )
    return np.flatnonzero(removed)


class _Holder(nn.Module):
    """A network to be exported as it stands, with the results' tensors, and those of some layers.

    Attributes:
        net: the network; the exporter's calls of ``train`` and ``eval`` do not reach it.
        kept: buffers that are not folded, but kept as parameters are.
    """

    def __init__(
        self,
        net: nn.Module,
        kept: Sequence[OwnTensor],
        keywords: Mapping[str, Any],
        layers: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.net = net
        self._layers = tuple(dict.fromkeys(layers))  # a tuple, which registers no modules
        self._keywords = keywords
        self._kept = [own for own in kept if own.tensor.is_leaf]

    def train(self, mode: bool = True) -> "_Holder":
        """Set the flag of this module alone."""
        self.training = mode
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters, and the buffers that are to be kept."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for own in self._kept:
            for name in own.names[: 1 if remove_duplicate else None]:
                yield f"{_PREFIX}{name}", own.tensor  # type: ignore[misc]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The network's parameters; a buffer takes no gradient."""
        for _, parameter in super().named_parameters(recurse=recurse):
            yield parameter

    def forward(self, *arguments: Any) -> list[torch.Tensor]:
        """The tensors in the results of the network, and of the layers that are asked for."""
        heard: list[Any] = []
        hooks = [
            layer.register_forward_hook(lambda *parts: heard.append(parts[-1]))
            for layer in self._layers
        ]
        try:
            results = self.net(*arguments, **self._keywords)
        finally:
            for hook in hooks:
                hook.remove()
        leaves = pytree.tree_leaves([results, heard])
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextmanager
def modes_kept(net: nn.Module) -> Iterator[None]:
    """Give every module its mode back afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_form(net: nn.Module) -> Iterator[None]:
    """``eval`` for a while, by way of ``train``, where modules drop what they have computed."""
    with modes_kept(net):
        net.train()
        net.eval()
        yield


@contextmanager
def training_form(net: nn.Module) -> Iterator[None]:
    """``train`` for a while, but for the leaves: norms and dropout compute as in ``eval``."""
    with modes_kept(net):
        net.train()
        for module in net.modules():
            if not any(True for _ in module.children()):
                module.training = False
        yield
