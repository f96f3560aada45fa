"""The networks that a check compares, each made when it is first needed."""

from collections.abc import Mapping
from functools import cached_property

import onnx_ir as ir

from morphgraph.arrays import IntArray
from morphgraph.errors import UnsupportedError
from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.selection import AxisSelection
from morphgraph.passes.checking.shorter import Shorter
from morphgraph.passes.checking.single_precision import in_single_precision
from morphgraph.passes.rewrite.mask import Maskable, mask, maskable


class Networks:
    """The original, the masked original and the resized network, all in single precision.

    Args:
        graph: the lifted original.
        masked_channels: per group index the channels that the masked original keeps.
        resized: the resized network.
        fewer: how all of them get fewer positions, if they do.

    Raises, where one is first asked for:
        UnsupportedError: it holds other sizes than those that become smaller.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        masked_channels: Mapping[int, IntArray],
        resized: ir.Model,
        fewer: Shorter | None = None,
    ) -> None:
        self._graph, self._masked_channels, self._resized = graph, masked_channels, resized
        self._fewer = fewer

    @cached_property
    def original(self) -> ir.Model:
        """The original."""
        return self._sized(in_single_precision(self._graph.model))

    @cached_property
    def masked(self) -> ir.Model:
        """The masked original."""
        return self.masked_by(self._masked_channels)

    def masked_by(self, channels: Mapping[int, IntArray]) -> ir.Model:
        """The original where these channels stay, per group index."""
        return self._sized(in_single_precision(mask(self._graph, channels)), is_own=True)

    @cached_property
    def maskable(self) -> Maskable:
        """Both of them in one."""
        both = maskable(self._graph, self._masked_channels)
        return both._replace(model=self._sized(in_single_precision(both.model), is_own=True))

    @cached_property
    def small(self) -> ir.Model:
        """The resized network."""
        return self._sized(in_single_precision(self._resized))

    def shortened(self, fewer: Shorter, selection: AxisSelection) -> "Networks | None":
        """The same networks with fewer positions; ``None``: that would not prove the same."""
        if not fewer.agrees(self.original, self.small, selection):
            return None
        return Networks(self._graph, self._masked_channels, self._resized, fewer)

    def _sized(self, model: ir.Model, is_own: bool = False) -> ir.Model:
        if self._fewer is None:
            return model
        # One that nobody else has needs no copy.
        sized = self._fewer.change(model) if is_own else self._fewer.of(model)
        if sized is None:
            raise UnsupportedError("the network holds sizes that do not become smaller")
        return sized
