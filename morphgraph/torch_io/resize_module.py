"""A user's own network, resized in place: its class, its training forward and its hooks stay.

The graph tells which positions of every tensor stay, and the tensors which sizes the layers keep
(``in_channels``, ``num_features``). What other attributes hold is found by running: the network
must compute what its resized ONNX model computes. Whatever fails, everything is put back.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from morphgraph.errors import PlanError, UnsupportedError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import COPIES_KEY, ModelLike, escape
from morphgraph.ops import parameter_names
from morphgraph.passes.analysis.recount import Recount, recounts
from morphgraph.passes.lift import lift
from morphgraph.passes.planning.same import repeated
from morphgraph.plans import Plan
from morphgraph.torch_io.config_sizes import configs_of
from morphgraph.torch_io.export import export
from morphgraph.torch_io.lively_weights import lend_lively_weights
from morphgraph.torch_io.module_checks import EvalCheck, TrainingCheck
from morphgraph.torch_io.module_runs import Runner, call_of, random_call
from morphgraph.torch_io.module_sizes import Attributes, AxisSizes
from morphgraph.torch_io.module_state import Snapshot, cut, replace_data
from morphgraph.torch_io.module_tensors import (
    Followed,
    Form,
    OwnTensor,
    follow,
    follow_known,
    form_of,
    own_tensors,
)
from morphgraph.torch_io.optimizer_state import Cut, cut_in_place
from morphgraph.torch_io.tensors import to_tensor
from morphgraph.torch_io.weights import exported_module, graph_with_weights, named_tensors

_SHOWN = 5  # names in a message


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A parameter or buffer that has another size now; of tied ones the first name."""

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttributeChange:
    """A size that a module, or a config that it holds, states otherwise now."""

    module: str
    kind: str
    attribute: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What :func:`resize_module` has changed; ``str`` of it is a text to read.

    Attributes:
        tensors: parameters and buffers.
        attributes: of modules and configs.
        error: largest difference from the resized ONNX model, as a share of the result's scale.
        tolerance: how large it might be.
        training: what is known of the training forward.
        unread: tensors that neither forward reads; they have their old size.
        config: what is known of a config that builds the network; empty where there is none.
    """

    tensors: tuple[TensorChange, ...]
    attributes: tuple[AttributeChange, ...]
    error: float
    tolerance: float
    training: str
    unread: tuple[str, ...]
    config: str

    def __str__(self) -> str:
        lines = [f"{len(self.tensors)} tensors, {len(self.attributes)} attributes changed"]
        lines += [f"  {t.name}: {_shown(t.before)} -> {_shown(t.after)}" for t in self.tensors]
        lines += [
            f"  {a.module or 'the network'} ({a.kind}): {a.attribute} {a.before} -> {a.after}"
            for a in self.attributes
        ]
        lines.append(f"eval: equal to the resized ONNX (error {self.error:.2g} of the scale)")
        lines.append(f"training: {self.training}")
        lines += [f"config: {self.config}"] if self.config else []
        lines += [f"not read, left as it was: {name}" for name in self.unread]
        return "\n".join(lines)


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def resize_module(
    net: nn.Module,
    graph: "ChannelGraph | ModelLike | Plan",
    plan: Plan | None = None,
    *,
    example: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> ModuleReport:
    """Resize a network in place: the user's own class, with its own forward in training too.

    Parameters, buffers and size attributes follow the plan. Parameters stay the same objects, with
    ``requires_grad`` and hooks, and tied ones stay tied; gradients are dropped. An optimizer has to
    be made anew, for its state has the old sizes, or be given as ``optimizer``: then its state is
    cut as well (:func:`morphgraph.transfer_optimizer_state` says what of it). Layers of torch know
    their sizes; a number that another module keeps (``self.num_heads``) is found by running the
    network in ``eval`` mode until it computes what the resized ONNX model computes, within 1e-4 of
    the result's scale and what PyTorch and ONNX Runtime differed by before. Tensors that only the
    training forward reads (auxiliary heads) follow by a second export, in training form, and its
    results are compared as well; norms and dropout compute as in ``eval`` there. A config that
    builds the network (``type(net)(net.config)``, as Hugging Face's do) is brought to the new sizes
    where it can say them, so that ``save_pretrained`` and ``from_pretrained`` work.

    Args:
        net: the network that ``graph`` was exported from, trained further or not. What stands in
            a DistributedDataParallel has to be wrapped again.
        graph: the lifted model, or a model or path that is lifted here as it was for the plan. Or
            the plan, with an ``example``: then the network is exported here.
        plan: which channels stay, and how many are added.
        example: arguments of the forward, as :func:`morphgraph.export` takes them. Needed where the
            model's inputs do not tell them: structures of tensors, numbers, switches. By default
            random numbers, and integers 0 and 1.
        optimizer: of the network's parameters, which goes on with them.
        seed: of random inputs, and of the kernels that make added channels.

    Returns:
        What has changed, and how well it was checked.

    Raises:
        PlanError: the plan is for another network.
        ModelError: the network lacks a tensor of the graph, or has it in another shape.
        UnsupportedError: the network stores a size where it cannot be changed (a number in its
            forward, an attribute that layers of different sizes share); names the module and its
            line. The network is as it was before.

    >>> import morphgraph as mg
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> graph = mg.lift(mg.export(net, torch.zeros(1, 3, 8, 8)))
    >>> report = resize_module(net, graph, mg.uniform(graph, 0.5))
    >>> net[0].out_channels, net[1].num_features, net[3].in_channels, tuple(net[3].weight.shape)
    (4, 4, 4, (2, 4, 1, 1))
    >>> print(str(report).splitlines()[0])
    7 tensors, 3 attributes changed
    """
    if isinstance(graph, Plan):
        plan = graph
        graph = _exported(net, example, plan)
    if plan is None:
        raise PlanError("no plan; call resize_module(net, graph, plan)")
    if not isinstance(graph, ChannelGraph):
        graph = lift(graph, **plan.model.lift.arguments())
    own = exported_module(net, parameter_names(graph.model))
    return _Resize(own, graph, plan, example, optimizer, seed).run()


def _exported(net: nn.Module, example: Any, plan: Plan) -> ChannelGraph:
    if example is None:
        raise PlanError(
            "without a graph resize_module has to export the network: give example=..., or call "
            "resize_module(net, graph, plan)"
        )
    return lift(export(net, example), **plan.model.lift.arguments())


class _Resize:
    def __init__(
        self,
        net: nn.Module,
        graph: ChannelGraph,
        plan: Plan,
        example: Any,
        optimizer: torch.optim.Optimizer | None,
        seed: int,
    ) -> None:
        self.net = net
        self.optimizer = optimizer
        self.seed = seed
        self.keep, self.added = plan.keep_channels(graph), plan.added(graph)
        self.graph = graph
        self.call = (
            random_call(net, graph.model, seed) if example is None else call_of(net, example)
        )

    def run(self) -> ModuleReport:
        snapshot = Snapshot(self.net)
        undo: list[Attributes] = []
        try:
            self._recount()
            graph = graph_with_weights(self.graph, self.net)
            self.form = form_of(graph, self.keep, self.added, seed=self.seed)
            return self._resize(undo)
        except BaseException:
            for attributes in undo:
                attributes.restore()
            snapshot.restore()
            raise

    def _resize(self, undo: list[Attributes]) -> ModuleReport:
        runner = Runner(self.net, self.call)
        check = EvalCheck(runner, self.form)
        tensors = own_tensors(self.net)
        known = follow_known(tensors, self.form)
        data = {own.names[0]: own.tensor.data for own in tensors}
        configs = configs_of(self.net)
        for config in configs:
            config.look_before(check.held)
        lively = self._lend()
        lively_check = EvalCheck(runner, lively)
        followed = follow(self.net, lively, self.call)
        training_check = TrainingCheck(runner, followed, self.form.selection)
        self._cut(tensors, followed, followed.numbers, {})
        attributes = Attributes(self.net, AxisSizes(lively), followed.cuts)
        undo.append(attributes)
        attributes.set_known()
        said = [config.fit(attributes, lively_check.holds, self._unequal()) for config in configs]
        attributes.set_plain()
        try:
            lively_check.require(attributes)
            training = training_check.require(attributes)
        except UnsupportedError as problem:
            if not followed.idle:
                raise
            shown = ", ".join(f"'{escape(name)}'" for name in followed.idle[:_SHOWN])
            raise UnsupportedError(
                f"{problem}; no result depends on {shown}, so that the graph does not show the "
                "sizes of what they are combined with: do not run their layers where that is used "
                "by nobody"
            ) from problem
        self._cut(tensors, followed, known.numbers, data)
        notes = [words for words in said if "cannot" in words]
        if followed.unread and followed.refusal:
            shown = ", ".join(f"'{escape(name)}'" for name in followed.unread[:_SHOWN])
            notes.append(
                f"{shown} keep their size: they are not read in eval, and the training forward "
                f"could not be followed ({followed.refusal})"
            )
        report = self._report(check, attributes, followed, training, said, data)
        for words in notes:
            warn(words)
        self._cut_state(tensors, followed)
        return report

    def _recount(self) -> None:
        """Let norms give what they gave while they counted channels of zeros."""
        tensors = named_tensors(self.net)
        names: dict[int, list[str]] = {}
        for name, tensor in tensors.items():
            if name in self.graph.model.graph.initializers and isinstance(tensor, nn.Parameter):
                names.setdefault(id(tensor), []).append(name)
        # One tensor of several initializers may be read by norms that are not all recounted.
        own = {name for name, *others in names.values() if not others}
        own -= set(self.graph.model.meta.get(COPIES_KEY, {}).values())
        for each in recounts(graph_with_weights(self.graph, self.net), self.keep, own):
            assert isinstance(each, Recount)  # epsilons are numbers of the module's code
            tensor = tensors[each.parameter]
            tensor.data = each.of(tensor.data)

    def _unequal(self) -> list[str]:
        """Groups that correspond in repeated blocks, and get different widths."""
        widths = self.form.graph.widths.copy()
        for index, positions in self.keep.items():
            widths[index] = len(positions)
        for index, count in self.added.items():
            widths[index] += count
        found = []
        for groups in repeated(self.form.graph):
            narrow, wide = (find(groups, key=lambda g: widths[g.index]) for find in (min, max))
            if widths[narrow.index] < widths[wide.index]:
                found += [narrow.name, wide.name]
        return found

    def _report(
        self,
        check: EvalCheck,
        attributes: Attributes,
        followed: Followed,
        training: str,
        said: Sequence[str],
        names: Iterable[str],
    ) -> ModuleReport:
        return ModuleReport(
            tuple(
                TensorChange(name, cuts.before, cuts.after)
                for name in names
                if (cuts := followed.cuts.get(name)) is not None
            ),
            tuple(
                AttributeChange(slot.path, type(slot.module).__name__, slot.label, old, slot.value)
                for slot, old in attributes.changes()
            ),
            check.require(attributes),
            check.tolerance,
            training,
            followed.unread,
            "; ".join(said),
        )

    def _cut_state(self, tensors: Sequence[OwnTensor], followed: Followed) -> None:
        """Cut what the optimizer keeps beside the parameters, which are the same objects still."""
        if self.optimizer is None:
            return
        cuts = {}
        for own in tensors:
            found = followed.cuts.get(own.names[0])
            if found is not None and isinstance(own.tensor, nn.Parameter):
                name = self.form.find(own)
                fresh = {a: self.form.selection.fresh(name, a) for a in found.positions if name}
                cuts[own.tensor] = (own.names[0], Cut(found, fresh))
        cut_in_place(self.optimizer, cuts).warn()

    def _lend(self) -> Form:
        """Lend the network lively weights where it can compute with them; what it then computes."""
        own = Snapshot(self.net)
        lend_lively_weights(self.net, self.seed)
        graph = graph_with_weights(self.form.graph, self.net)
        form = form_of(graph, self.keep, self.added, seed=self.seed)
        try:
            EvalCheck(Runner(self.net, self.call), form)
        except UnsupportedError:  # numbers without end, or a network that wants its own
            own.restore()
            return self.form
        return form

    def _cut(
        self,
        tensors: Sequence[OwnTensor],
        followed: Followed,
        numbers: Mapping[str, ir.TensorProtocol],
        data: Mapping[str, torch.Tensor],
    ) -> None:
        """Give every tensor the positions that stay, of its own numbers or of other ones."""
        for own in tensors:
            name, tensor = own.names[0], own.tensor
            whole, cuts = data.get(name, tensor.data), followed.cuts.get(name)
            if cuts is None:
                replace_data(tensor, whole)
            elif name in numbers:
                content = to_tensor(numbers[name])
                replace_data(tensor, content.to(tensor.device, tensor.dtype))
            else:
                replace_data(tensor, cut(whole, cuts))
