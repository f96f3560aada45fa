"""Sampling, regions, deformable convolution and patches: resized equals masked."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from morphgraph.graph import ChannelGraph
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.testing import model_from_text, prove

# 6 channels are made, something is done to them, they are read.
FRAME = """net (float[1,3,4,4] x, float[6,3,1,1] w1, float[2,6,1,1] w2{more})
        => (float[1,2,{out}] y) <{constants}> {{
            a = Conv(x, w1)  r = Relu(a)
            {body}
            y = Conv(b, w2)
        }}"""


def framed(
    body: str, more: str = "", constants: str = "int64 unused = {0}", out: str = "4,4"
) -> str:
    return FRAME.format(body=body, more=more, constants=constants, out=out)


NETWORKS: dict[str, tuple[str, list[int]]] = {
    "sampled": (framed("b = GridSample(r, grid)", ", float[1,4,4,2] grid"), [6]),
    "sampled on an affine grid": (
        framed(
            "g = AffineGrid(theta, size)  b = GridSample(r, g)",
            ", float[1,2,3] theta",
            "int64[4] size = {1, 6, 4, 4}",
        ),
        [6],
    ),
    "regions aligned": (
        framed(
            "b = RoiAlign<output_height=4, output_width=4, spatial_scale=0.5>(r, rois, which)",
            "",
            "float[1,4] rois = {0.5, 1.0, 7.0, 6.0}, int64[1] which = {0}",
        ),
        [6],
    ),
    "regions pooled": (
        framed(
            "b = MaxRoiPool<pooled_shape=[4,4]>(r, rois)",
            "",
            "float[1,5] rois = {0.0, 0.0, 0.0, 3.0, 2.0}",
        ),
        [6],
    ),
    "deformed": (
        framed(
            "o = Conv<pads=[1,1,1,1]>(r, w3)  d = DeformConv<pads=[1,1,1,1]>(r, w4, o, bias)"
            "  b = Relu(d)",
            ", float[18,6,3,3] w3, float[6,6,3,3] w4, float[6] bias",
        ),
        [6, 6],
    ),
    "deformed, with blocks of offsets and a mask": (
        framed(
            "o = Conv<pads=[1,1,1,1]>(r, w3)  m = Conv<pads=[1,1,1,1]>(r, w5)  s = Sigmoid(m)"
            "  d = DeformConv<pads=[1,1,1,1], offset_group=2>(r, w4, o, , s)  b = Relu(d)",
            ", float[36,6,3,3] w3, float[6,6,3,3] w4, float[18,6,3,3] w5",
        ),
        [3, 6],
    ),
    "deformed, grouped": (
        framed(
            "o = Conv<pads=[1,1,1,1]>(r, w3)"
            "  d = DeformConv<pads=[1,1,1,1], group=2>(r, w4, o)  b = Relu(d)",
            ", float[18,6,3,3] w3, float[6,3,3,3] w4",
        ),
        [3, 3],
    ),
    "deformed, a channel a group": (
        framed(
            "o = Conv<pads=[1,1,1,1]>(r, w3)"
            "  d = DeformConv<pads=[1,1,1,1], group=6>(r, w4, o)  b = Relu(d)",
            ", float[18,6,3,3] w3, float[6,1,3,3] w4",
        ),
        [6],
    ),
    "patches folded": (
        framed(
            "p = Conv(x, w3)  f = Reshape(p, flat)  c = Col2Im<strides=[2,2]>(f, size, block)"
            "  g = MaxPool<kernel_shape=[2,2], strides=[2,2]>(c)  b = Add(r, g)",
            ", float[24,3,1,1] w3",
            "int64[3] flat = {1, 24, 16}, int64[2] size = {8, 8}, int64[2] block = {2, 2}",
        ),
        [6],
    ),
    "pooled and put back": (
        framed(
            "p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)"
            "  b = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, i)",
        ),
        [6],
    ),
    "pooled and put back into a given size": (
        framed(
            "p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)"
            "  b = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(p, i, size)",
            "",
            "float[1,6,4,4] b, int64[4] size = {1, 6, 4, 4}",
        ),
        [6],
    ),
    "cropped and padded around the centre": (
        framed("b = CenterCropPad(r, size)", "", "int64[4] size = {1, 6, 2, 6}", "2,6"),
        [6],
    ),
}


def graph_of(name: str) -> ChannelGraph:
    return lift(model_from_text(NETWORKS[name][0]))


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_and_slices(name: str) -> None:
    graph = graph_of(name)
    assert [group.width for group in graph.groups if group.resizable] == NETWORKS[name][1]
    prove(graph, faults=30)


def test_macs_of_a_deformed_convolution_are_those_of_the_convolution() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.conv2d(torch.ones(1, 6, 4, 4), torch.ones(6, 6, 3, 3), padding=1)
    by_layer = cost(graph_of("deformed"), "macs").by_layer
    assert 2 * by_layer["DeformConv_d"] == counter.get_total_flops()
