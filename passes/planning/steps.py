"""Which multiples of channels suit runtimes, by group: what ``round_to="auto"`` stands for.

A convolution is computed in blocks of channels, and a width that fills no block costs as much as
the next that does, or more. Steps are what divides a width then, from the best to 1, and a plan
takes the first with which its budget can be met. Measured on ONNX Runtime 1.32, OpenVINO 2026.4,
ncnn, MNN and LiteRT, one thread:

- Depthwise convolutions step by 16 nearly everywhere. ONNX Runtime computes them in twice the time
  off a multiple of 4, and its int8 ones in 1.4 to 1.8 times off a multiple of 16.
- Dense ones step by 16 too, and by 4 in int8. What reads fewer than 16 channels is computed from
  another layout, and changes of the layout take long beside kernels of a single place: MobileNetV2
  with 12 channels in the one place where it has 16 is 1.63 times as fast as the original, not 1.85
  times. Larger kernels hide that. Where they read less than two blocks, finer steps are left,
  for the network's sake: 8 is a third of the width at most, 16 a half.
- ONNX Runtime computes convolutions in groups by blocks where every group has whole blocks of 16.
- Products of matrices, recurrent layers among them, have no cliff off a grid: 61 columns take as
  long as 64, 57 as long as 60 (32-bit floats; in int8 a multiple of 4 fills the registers). Wide
  ones lose nothing by 16; narrow ones are left free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from morphgraph.graph import ChannelGraph, analysis
from morphgraph.passes.analysis.convolutions import ALIGNED, BLOCK, convolutions
from morphgraph.passes.analysis.measured import MeasuredCost
from morphgraph.passes.planning.grids import tensor_channels

#: The steps of groups that larger kernels read, and how many of them a width has at least.
DENSE_STEPS = {BLOCK: 2, BLOCK // 2: 3}
#: Products of matrices: from how many channels on a step is no more than a few percent.
WIDE_PRODUCT, LEAST_PRODUCT = 256, 16


@dataclass(frozen=True, slots=True)
class Steps:
    """What a group's channels should be a multiple of, counted in channels of tensors.

    Attributes:
        sizes: from the best to the finest, which is 1.
        reason: what sees the group, as a person would say it.

    >>> Steps((16, 8, 4, 1), "depthwise convolution").at(9), Steps((4, 1), "convolution").at(0)
    (16, 1)
    """

    sizes: tuple[int, ...]
    reason: str

    def at(self, level: int) -> int:
        """The step that has at most so many finer ones."""
        return self.sizes[-1 - min(level, len(self.sizes) - 1)]


FREE = Steps((1,), "few channels")


@analysis
def auto_steps(graph: ChannelGraph) -> tuple[Steps, ...]:
    """Per group the steps that suit the operators that make it and read it, ``[groups]``.

    >>> from morphgraph.passes.lift import lift
    >>> from morphgraph.testing import model_from_text
    >>> graph = lift(model_from_text('''
    ... net (float[1,3,8,8] x, float[64,3,1,1] w, float[64,1,3,3] d, float[24,64,1,1] v,
    ...      float[2,24,1,1] u) => (float[1,2,6,6] y)
    ... { h = Conv(x, w)  e = Conv<group=64>(h, d)  f = Conv(e, v)  y = Conv(f, u) }'''))
    >>> [(steps.sizes, steps.reason) for steps in auto_steps(graph)[1:3]]
    [((16, 8, 4, 1), 'depthwise convolution'), ((16, 8, 4, 1), 'pointwise convolution')]
    """
    depthwise: set[int] = set()
    grouped: set[int] = set()
    dense: set[int] = set()
    large: set[int] = set()
    sizes = graph.class_sizes(graph.widths)
    for found in convolutions(graph):
        seen = graph.groups_in(found.reads) | graph.groups_in(found.makes)
        (depthwise if found.depthwise else dense).update(seen)
        large.update(() if found.pointwise else graph.groups_in(found.reads))
        if found.within and all(sizes[each] % BLOCK == 0 for each in found.within):
            grouped.update(*(graph.groups_in(each) for each in found.within))
    units = tensor_channels(graph).tolist()
    chosen = [
        _grouped(units[group.index])
        if group.index in grouped
        else _blocks(group.width * units[group.index], "depthwise convolution")
        if group.index in depthwise
        else _dense(group.width, units[group.index])
        if group.index in large
        else _blocks(group.width * units[group.index], "pointwise convolution")
        if group.index in dense
        else _product(group.width * units[group.index])
        for group in graph.groups
    ]
    return tuple(
        steps if group.index in grouped else _reachable(steps, group.width, units[group.index])
        for steps, group in zip(chosen, graph.groups, strict=True)
    )


def measured_steps(cost: MeasuredCost) -> tuple[Steps, ...]:
    """Per group the steps that a measured device shows, ``[groups]``.

    A device's largest block counts where a group has two of them at least: in less, a coarse step
    wins no time and costs channels. The finest above 1 is what a blocked layout asks for.
    """
    graph = cost.graph
    units, blocks = tensor_channels(graph).tolist(), cost.step.tolist()
    finest = max(cost.profile.blocked_multiple, 1)
    found = []
    for group in graph.groups:
        block, channels = blocks[group.index], group.width * units[group.index]
        sizes = []
        while block > 1 and block >= finest:
            if 2 * block <= channels:
                sizes.append(block)
            block //= 2
        found.append(Steps((*sizes, 1), "measured") if sizes else FREE)
    return tuple(found)


def _reachable(steps: Steps, width: int, unit: int) -> Steps:
    """The steps that some smaller width is on, where channels of tensors come in units."""
    if unit == 1:
        return steps
    fitting = [size for size in steps.sizes if size // gcd(size, unit) < width or size == 1]
    return Steps(tuple(fitting), steps.reason)


def _grouped(unit: int) -> Steps:
    """Channels within the groups of a convolution, of which it has ``unit``."""
    # Off a block of each group only the neighbours' blocks are left to be filled.
    return Steps((BLOCK * unit, ALIGNED, 1), "convolution in groups")


def _blocks(channels: int, reason: str) -> Steps:
    """Whole blocks wherever there is one."""
    if channels <= ALIGNED:
        return FREE
    return Steps(((BLOCK, BLOCK // 2) if channels >= BLOCK else ()) + (ALIGNED, 1), reason)


def _dense(width: int, unit: int) -> Steps:
    if width * unit <= ALIGNED:
        return FREE
    wide = [step for step, count in DENSE_STEPS.items() if step // gcd(step, unit) * count <= width]
    return Steps((*wide, ALIGNED, 1), "convolution")


def _product(channels: int) -> Steps:
    if channels < LEAST_PRODUCT:
        return FREE
    sizes = (BLOCK, ALIGNED, 1) if channels >= WIDE_PRODUCT else (ALIGNED, 1)
    return Steps(sizes, "product of matrices")


def common(steps: Sequence[Steps]) -> Steps:
    """The steps of groups that are to have one width: those of the group with the coarsest."""
    return max(steps, key=lambda each: each.sizes)
