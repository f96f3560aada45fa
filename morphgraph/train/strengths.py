"""The strength of every channel: how much the network uses it, measured on a module's parameters.

The strength of a group's channels is measured in one of two ways: by the scales (of norms, layer
scales, gates) that switch the channel off for all of its readers, or by the kernels that produce
it. Where a scale closes a product only if the norm's shift is zero as well, both are tied, and the
channel is dead where both are zero. Channel ``c`` of the network is one of ``[channels]``, all
groups' channels one after another;
``graph.channel_group[c]`` is its group, -1 for channels of no group.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from morphgraph.arrays import Flags, FloatArray
from morphgraph.errors import ArgumentError, ModelError, UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.check import escape
from morphgraph.ops import facts_of, parameter_names
from morphgraph.options import Strength, Tied
from morphgraph.passes.analysis.channel_sources import (
    Source,
    channel_scales,
    computed_kernels,
    one_per_channel,
    stored_kernels,
)
from morphgraph.passes.analysis.cost import Convention
from morphgraph.passes.analysis.gates import (
    closing_scales,
    closing_shifts,
    deciding_scales,
    deciding_shifts,
    gated_groups,
)
from morphgraph.passes.analysis.silence import Silencing, silence
from morphgraph.torch_io.weights import named_tensors
from morphgraph.train.computed import ComputedSource, find_computed
from morphgraph.train.proximal import TiedStrengths
from morphgraph.train.sources import (
    BoundSource,
    bind,
    is_shared,
    kernel_strength,
    root,
    scale_strength,
    whole,
)

THRESHOLD = 1e-2
"""Of a strength that begins at 1: at or below this a channel is dead."""
_ONE = torch.ones(1)


class Strengths:
    """Measures strengths and says which channels are alive.

    Args:
        graph: the lifted network.
        net: the module, with the parameters that the graph names.
        allowed: the groups that may be measured, ``[groups]``.
        strength, threshold, l1_fraction, tied, convention: see
            :class:`~morphgraph.train.regularizer.Regularizer`.

    Attributes:
        measured: the groups that are allowed and have scales or kernels, ``[groups]``.
        left_alone: why the other allowed groups have neither, by their index.
        owned: the same as a flag per channel, ``[channels]``, on the module's device.
        scales, kernels: the slices of parameters, and of what is computed from them, that are
            measured; among the scales the shifts that close products with them.
        by_kernel: which channels are measured by kernels, ``[channels]``.
        threshold: a number, or one per channel, ``[channels]``.

    Raises:
        ModelError: a parameter that the graph names is not in the module, or has another shape.
        UnsupportedError: ``strength="bn"`` and some allowed group has no norm that gates it.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        net: nn.Module,
        allowed: Flags,
        strength: Strength,
        *,
        threshold: float | None,
        l1_fraction: float,
        tied: Tied,
        convention: Convention,
    ) -> None:
        self.graph = graph
        self._net = net
        self.l1_fraction = l1_fraction
        self.tied = tied
        morphnet = convention == "morphnet"
        gated = _gated(graph, strength, allowed)
        tensors = named_tensors(net)
        device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        producing = stored_kernels(graph)
        computed, without = find_computed(
            graph, computed_kernels(graph), tensors, _per_channel(graph, allowed & ~gated), device
        )
        by_kernels = _on_axes_of(graph, producing) | _flags(graph, _groups_of(graph, computed))
        deciding = closing_scales(graph) if morphnet else deciding_scales(graph)
        shifts = closing_shifts(graph) if morphnet else deciding_shifts(graph)
        # A frozen shift that is zero already is in nobody's way.
        felt = {k: on for k, on in shifts.items() if bool(whole(tensors.get(k, _ONE)).any())}
        still = _frozen_groups(graph, tensors, producing, computed, gated, deciding | felt)
        without = {**without, **still}
        by_kernels &= ~_flags(graph, without)
        gated &= ~_flags(graph, still)
        self.measured: Flags = allowed & (gated | by_kernels)
        self.left_alone = {
            index: without.get(index, "no kernel makes its channels")
            for index in np.flatnonzero(allowed & ~self.measured).tolist()
        }
        by_scale = _per_channel(graph, gated)
        by_kernel = _per_channel(graph, self.measured & ~gated)
        # A parameter that several operators share is one source; the last of them stands for all.
        scaling = {source.parameter: source for source in channel_scales(graph).values()}
        # Per scale the channels whose strength it has a part in.
        decides = {name: by_scale & _of_groups(graph, deciding.get(name, ())) for name in scaling}
        wanted = [(source, decides[name]) for name, source in scaling.items()]
        wanted += [
            (source, by_scale & _of_groups(graph, groups))
            for name, groups in shifts.items()
            if (source := one_per_channel(graph, name)) is not None
        ]
        self.scales = bind(wanted, tensors, device)
        stored = bind([(source, by_kernel) for source in producing], tensors, device)
        # A kernel's groups may have others beside it that cannot be measured.
        self.kernels = [*stored, *(s for s in computed if bool(by_kernel[s.index.cpu()].all()))]
        self.channel_group = torch.from_numpy(graph.channel_group).to(device)
        # Of the channels of no group the last one.
        self._group = (self.channel_group % (len(graph.groups) + 1)).int()
        self.owned = torch.from_numpy(_per_channel(graph, self.measured)).to(device)
        self._unit = torch.ones(len(self.owned), device=device)
        with torch.no_grad():
            means = self.means(self.measure(), torch.ones_like(self.owned))
        self.by_kernel = torch.from_numpy(by_kernel).to(device)
        # A norm's scales begin at 1; other scales, and kernels as they are, may begin anywhere.
        anywhere = _by_layer_scale(graph, decides)
        if morphnet:
            anywhere = anywhere | by_kernel
        begin = torch.where(torch.from_numpy(anywhere).to(device), means.clamp(1e-6, 1.0), 1.0)
        self.threshold = THRESHOLD * begin if threshold is None else threshold
        if not morphnet:
            # From here on kernels are measured relative to what they were: they begin at 1, too.
            self._unit = torch.where(self.by_kernel, means.clamp_min(1e-6), 1.0)
        # How each strength falls with its parameter: the strength of a kernel is its norm over
        # u sqrt(n), with u its unit.
        self._falls = [torch.ones_like(s.index, dtype=torch.float32) for s in self.scales]
        self._falls += [self._weights(source) for source in self.kernels]
        self.ties = self._tie()

    def _tie(self) -> TiedStrengths:
        """Which strengths are of one channel."""
        index = [source.index for source in self.scales]
        index += [source.channels for source in self.kernels]
        return TiedStrengths(index, self._falls, len(self.channel_group))

    def state_dict(self) -> dict[str, Any]:
        """What was read off the network as it was at first: units and thresholds."""
        return {"unit": self._unit, "threshold": self.threshold, "falls": self._falls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Measure from now on as another run does: by its units.

        Raises:
            ArgumentError: the state is of another network, or of other groups.
        """
        sizes = [len(part) for part in state["falls"]]
        if len(state["unit"]) != len(self._unit) or sizes != [len(part) for part in self._falls]:
            raise ArgumentError(
                "the state is of a regularizer of another network, or of other groups of it; make "
                "the regularizer as it was, with the same include and exclude"
            )
        self._unit, self.threshold = state["unit"], state["threshold"]
        self._falls = list(state["falls"])
        self.ties = self._tie()

    def _weights(self, source: BoundSource) -> Tensor:
        weights = source.count * self._unit[source.channels].square()
        if isinstance(source, ComputedSource):
            with torch.no_grad():
                strength = kernel_strength(source, 0.0) / self._unit[source.channels]
                measured = (source.scaling_norms() / strength).square()
                weights = torch.where(measured.isfinite() & (measured > 0), measured, weights)
        return weights

    def bind_again(self) -> bool:
        """Find the parameters by their names again: ``fully_shard`` and others replace them.

        Returns:
            Whether any is another one.

        Raises:
            ModelError: a parameter is not there any more, or has another shape.
            UnsupportedError: a kernel is computed from what several processes share.
        """
        tensors: dict[str, Tensor] | None = None
        replaced = False
        for source in (*self.acted_on, *self.__dict__.get("silencing", ())):
            if tensors is None:
                tensors = named_tensors(self._net)
            found = tensors.get(source.name)
            if found is source.parameter and found.shape == source.shape:
                continue
            if found is None or found.shape != source.shape:
                raise ModelError(
                    f"parameter '{escape(source.name)}' is not in the module any more, or has "
                    "another shape; make the regularizer anew for the module that is trained"
                )
            source.parameter = found
            replaced = True
        for kernel in self.kernels:
            if isinstance(kernel, ComputedSource) and tensors is not None:
                kernel.tensors = tensors
                if any(is_shared(part.parameter) for part in kernel.scaling):
                    raise UnsupportedError(
                        f"kernel '{escape(kernel.name)}' is computed from parameters that several "
                        "processes share (DTensor); exclude its groups, or train with DDP"
                    )
        return replaced

    @property
    def shared(self) -> bool:
        """Whether several processes share a parameter, so that all of them must measure it."""
        return any(is_shared(source.parameter) for source in self.acted_on)

    @cached_property
    def silencing(self) -> list[BoundSource]:
        """What else has to be zero where a channel is dead, so that it adds nothing anywhere.

        A frozen parameter stays what it is.
        """
        killed = [
            Silencing(s.name, s.axis, frozenset(self._groups_at(s)))
            for s in self.acted_on
            if not s.frozen
        ]
        tensors, wanted = named_tensors(self._net), []
        trained = {n for n in parameter_names(self.graph.model) if _is_trained(tensors.get(n))}
        owned = self.owned.cpu().numpy()
        for each in silence(self.graph, killed, trained):
            dim = self.graph.dim(each.parameter, each.axis)
            on = owned & _of_groups(self.graph, each.groups)
            wanted += [
                (Source(each.parameter, each.axis, channels), on)
                for channels in self.graph.channels_by_view(dim)
            ]
        return bind(wanted, tensors, self.owned.device)

    def _groups_at(self, source: BoundSource) -> set[int]:
        return set(self.graph.channel_group[source.channels.cpu().numpy()].tolist())

    @property
    def acted_on(self) -> list[BoundSource]:
        """The slices of parameters that shrinking steps multiply."""
        found = list(self.scales)
        for source in self.kernels:
            found += source.scaling if isinstance(source, ComputedSource) else (source,)
        return found

    def of_sources(self, l1_fraction: float) -> list[tuple[Tensor, Tensor]]:
        """Per scale and kernel its channels and their strengths."""
        parts = [(source.index, scale_strength(source)) for source in self.scales]
        return parts + [
            (source.channels, _strength(source, l1_fraction) / self._unit[source.channels])
            for source in self.kernels
        ]

    def measure(self) -> Tensor:
        """The strength of every channel, ``[channels]``; zero for those that are left alone."""
        return self.combined(self.of_sources(self.l1_fraction))

    def combined(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The strength of every channel, ``[channels]``, from those of its producers.

        Args:
            parts: per source its channels and their strengths, as :meth:`of_sources` gives them.
        """
        total = torch.zeros(len(self.channel_group), device=self.channel_group.device)
        if not parts:
            return total
        index = torch.cat([index for index, _ in parts])
        values = torch.cat([value.float() for _, value in parts])
        if self.tied == "max":
            return total.scatter_reduce(0, index, values, "amax", include_self=False)
        return root(total.index_add(0, index, values.square()))

    def means(self, strengths: Tensor, counted: Tensor) -> Tensor:
        """The mean strength of the counted channels of every channel's group, ``[channels]``.

        Zero where none is counted.
        """
        size, group = len(self.graph.groups) + 1, self._group
        total = torch.zeros(size, device=group.device).index_add(0, group, strengths * counted)
        count = torch.zeros(size, device=group.device).index_add(0, group, counted.float())
        return (total / count.clamp_min(1))[group]

    def alive(self, strengths: Tensor) -> Tensor:
        """Which channels are above the threshold, or left alone, ``[channels]``."""
        return (strengths > self.threshold) | ~self.owned

    def live_widths(self, strengths: Tensor) -> FloatArray:
        """The number of channels alive in every group, ``[groups]``."""
        return self.widths_of(self.alive(strengths))

    def widths_of(self, alive: Tensor) -> FloatArray:
        """The same, given a flag for every channel."""
        counted = torch.zeros(len(self.graph.groups) + 1, device=alive.device)
        counted.index_add_(0, self._group, alive.float())
        widths: FloatArray = counted[:-1].cpu().numpy().astype(np.float64)
        return widths

    def strongest(self, strengths: Tensor, counts: Tensor) -> Tensor:
        """The strongest channels of every group, a flag per channel ``[channels]``.

        Args:
            strengths: by which they are ranked, ``[channels]``; of equals the first counts.
            counts: how many of every group, ``[groups]``.
        """
        order = torch.argsort(strengths, descending=True, stable=True)
        order = order[self.channel_group[order] >= 0]
        # Stable, so that every group's channels stand together and still from strong to weak.
        order = order[torch.argsort(self.channel_group[order], stable=True)]
        groups = self.channel_group[order]
        # Its place less that where its group begins.
        rank = torch.arange(len(order), dtype=torch.int32, device=order.device)
        rank -= torch.searchsorted(groups, groups, out_int32=True)
        chosen = torch.zeros_like(strengths, dtype=torch.bool)
        chosen[order[rank < counts[groups]]] = True
        return chosen


def _gated(graph: ChannelGraph, strength: Strength, allowed: Flags) -> Flags:
    """The allowed groups whose strength is measured by scales, ``[groups]``."""
    if strength == "lasso":
        return np.zeros(len(graph.groups), dtype=bool)
    gated = allowed & _flags(graph, gated_groups(graph))
    ungated = [graph.groups[index].name for index in np.flatnonzero(allowed & ~gated)]
    if strength == "bn" and ungated:
        raise UnsupportedError(
            f"strength 'bn': no norm's scale gates '{escape(ungated[0])}' (and "
            f"{len(ungated) - 1} more groups); use 'auto', or exclude them"
        )
    return gated


def _strength(source: BoundSource, l1_fraction: float) -> Tensor:
    """A kernel's strength; that of a computed one has the gradient of what scales its channels."""
    strength = kernel_strength(source, l1_fraction)
    if not isinstance(source, ComputedSource):
        return strength
    magnitude = source.scaling_norms()
    now = magnitude.detach()
    return strength * torch.where(now > 0, magnitude / now.where(now > 0, 1.0), 1.0)


def _is_trained(tensor: Tensor | None) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad


def _groups_of(graph: ChannelGraph, sources: Iterable[BoundSource]) -> set[int]:
    """The groups whose channels stand on these sources."""
    return {
        group
        for source in sources
        for group in graph.channel_group[source.channels.cpu().numpy()].tolist()
    }


def _frozen_groups(
    graph: ChannelGraph,
    tensors: Mapping[str, Tensor],
    producing: Iterable[Source],
    computed: Iterable[ComputedSource],
    gated: Flags,
    deciding: Mapping[str, Iterable[int]],
) -> dict[int, str]:
    """Groups whose strength is, in part, that of a frozen parameter, by index with the reason.

    It never falls to zero there. Where everything is frozen, nothing is trained, but measured.
    """
    frozen = {
        name
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }
    if not any(tensor.requires_grad for tensor in tensors.values()):
        return {}
    still: dict[int, str] = {}
    for name in sorted(frozen & set(deciding)):
        still.update({k: name for k in deciding[name] if gated[k]})
    for source in producing:
        if source.parameter in frozen:
            groups = np.unique(graph.channel_group[source.channels]).tolist()
            still.update({k: source.parameter for k in groups if k >= 0 and not gated[k]})
    for kernel in computed:
        if any(part.frozen for part in kernel.scaling):
            groups = np.unique(graph.channel_group[kernel.channels.cpu().numpy()]).tolist()
            still.update({k: "what scales its kernel" for k in groups if k >= 0 and not gated[k]})
    return {
        index: f"{escape(name)} is frozen (requires_grad=False)" for index, name in still.items()
    }


def _flags(graph: ChannelGraph, groups: Iterable[int]) -> Flags:
    """Group indices as a flag per group."""
    flags = np.zeros(len(graph.groups), dtype=bool)
    flags[list(groups)] = True
    return flags


def _per_channel(graph: ChannelGraph, flags: Flags) -> Flags:
    """A flag per group as a flag per channel; channels outside of all groups get False."""
    spread: Flags = np.append(flags, False)[graph.channel_group]
    return spread


def _of_groups(graph: ChannelGraph, groups: Iterable[int]) -> Flags:
    """The channels of some groups, a flag per channel."""
    return _per_channel(graph, _flags(graph, groups))


def _on_axes_of(graph: ChannelGraph, sources: Iterable[Source]) -> Flags:
    """Which groups have channels on one of these axes, ``[groups]``."""
    on_axes = np.zeros(len(graph.groups) + 1, dtype=bool)
    for source in sources:
        on_axes[graph.channel_group[source.channels]] = True  # -1, no group, comes last
    return on_axes[:-1]


def _by_layer_scale(graph: ChannelGraph, decides: dict[str, Flags]) -> Flags:
    """The channels that a scale which is no norm's decides on, ``[channels]``."""
    flags = np.zeros(len(graph.channel_group), dtype=bool)
    for op_index, source in channel_scales(graph).items():
        if facts_of(graph.ops[op_index].ir).scale is None:
            flags |= decides[source.parameter]
    return flags
