"""Open sizes, however they are read, filled, burnt in, or ordered: right at every size."""

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import morphgraph as mg
from morphgraph.errors import ModelError
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import runtime as ort
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.rewrite.mask import mask
from morphgraph.testing import model_from_text

Sizes = Sequence[tuple[int, ...]]


def resized_is_right(graph: ChannelGraph, sizes: Sequence[Sizes]) -> None:
    """At half the width, for every list of input sizes, by ONNX Runtime on the masked original."""
    plan = mg.uniform(graph, 0.5)
    small, masked = mg.apply(graph, plan), mask(graph, plan.keep_channels(graph))
    generator = np.random.default_rng(0)
    names = [value.name or "" for value in graph.model.graph.inputs]
    for each in sizes:
        feeds = {
            name: generator.standard_normal(size).astype(np.float32)
            for name, size in zip(names, each, strict=True)
        }
        original, expected, found = (ort.run(m, feeds) for m in (graph.model, masked, small))
        for name, array in expected.items():
            scale = np.abs(array).max()
            assert found[name].shape == array.shape
            np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * scale)
        assert any(np.abs(original[name] - a).max() > 1e-2 for name, a in expected.items())


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], layers: int, both: bool) -> None:
        super().__init__()
        self.layers = kind(8, 16, num_layers=layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(32 if both else 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x)[0])


class Cell(nn.Module):
    """A state that the user makes, of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(x.shape[0], 16)
        for step in range(3):
            state = self.cell(x[:, step], state)
        return self.head(state)


class Learned(nn.Module):
    """A learned first state, repeated for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, 16))
        self.layer, self.head = nn.GRU(8, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x, self.first.expand(1, x.shape[0], 16).contiguous())[0])


NETS = {
    "LSTM": lambda: Recurrent(nn.LSTM, 1, True),
    "GRU": lambda: Recurrent(nn.GRU, 2, False),
    "RNN": lambda: Recurrent(nn.RNN, 1, False),
    "cell": Cell,
    "learned": Learned,
}


@pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NETS)
def test_a_state_that_follows_the_batch_is_shrunk(name: str, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, path = NETS[name]().eval(), tmp_path / "net.onnx"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if dynamo:
            axes = dict.fromkeys(
                (0,) if name in ("cell", "RNN") else (0, 1), torch.export.Dim.DYNAMIC
            )
            torch.onnx.export(
                net,
                (torch.randn(2, 6, 8),),
                path,
                input_names=["x"],
                dynamo=True,
                dynamic_shapes=(axes,),
                external_data=False,
            )
        else:
            names = {0: "B", 1: "T"} if name != "cell" else {0: "B"}
            torch.onnx.export(
                net,
                (torch.randn(2, 6, 8),),
                path,
                input_names=["x"],
                dynamo=False,
                dynamic_axes={"x": names},
                opset_version=17,
            )
    graph = mg.lift(path)
    cost, lowest = mg.cost(graph, "macs"), WidthBounds().lowest(graph)
    assert cost.at(lowest) < 0.3 * cost.total
    resized_is_right(graph, [[(1, 6, 8)], [(4, 6, 8)]])


READS = {
    "Gather": "b = Gather<axis=0>(s, i0)",
    "Gather of a scalar": "g = Gather<axis=0>(s, z) b = Unsqueeze(g, i0)",
    "Gather from behind": "b = Gather<axis=0>(s, im3)",
    "Slice": "b = Slice(s, i0, i1)",
    "Slice with axes and steps": "b = Slice(s, i0, i1, i0, i1)",
    "Slice of a Slice": "h = Slice(s, i0, i2) b = Slice(h, i0, i1)",
    "Split": "b, rest = Split<axis=0>(s, parts)",
    "Cast": "f = Cast<to=1>(s) h = Slice(f, i0, i1) b = Cast<to=7>(h)",
    "arithmetic": "d = Mul(s, i2) e = Div(d, i2) b = Gather<axis=0>(e, i0)",
    "Concat": "j = Concat<axis=0>(s, i5) b = Slice(j, i0, i1)",
    "GatherND": "b = Gather<axis=0>(s, i0)",
}


@pytest.mark.parametrize("how", [*READS, "Shape of one axis"])
def test_a_size_that_is_not_read_is_free(how: str) -> None:
    """The sizes of batch and length are read, that of 16 channels is not."""
    read = READS.get(how, "")
    shape = "s = Shape(r)" if read else "b = Shape<start=0, end=1>(r)"
    graph = mg.lift(
        model_from_text(f"""net (float[B,T,8] x, float[8,16] w, float[16,5] v)
        => (float[B,U,5] y) <int64 z = {{0}}, int64[1] i0 = {{0}}, int64[1] i1 = {{1}},
        int64[1] i2 = {{2}}, int64[1] i5 = {{5}}, int64[1] im3 = {{-3}}, int64[2] parts = {{1, 2}}>
        {{ h0 = MatMul(x, w) r = Relu(h0) {shape} {read} t = Concat<axis=0>(b, i1, i5)
           k = ConstantOfShape(t) q = MatMul(r, v) y = Concat<axis=1>(q, k) }}""")
    )
    assert [(g.width, g.reason) for g in graph.groups if g.width == 16] == [(16, None)]
    resized_is_right(graph, [[(1, 3, 8)], [(4, 70, 8)]])


def test_sizes_that_are_read_keep_theirs() -> None:
    """All of them, where the product or the whole shape is read; the result tells them."""
    for read in ("n = Size(r)", "n = Shape(r)", "s = Shape(r) n = ReduceProd<keepdims=0>(s)"):
        graph = mg.lift(
            model_from_text(f"""net (float[B,T,8] x, float[8,16] w, float[16,5] v)
            => (float[B,T,5] y, int64[k] n) {{
            h0 = MatMul(x, w) r = Relu(h0) {read} y = MatMul(r, v) }}""")
        )
        assert [g.reason for g in graph.groups if g.width == 16] == ["its size is read"]
        net = mg.to_torch(graph.model)
        for size in ((2, 3, 8), (3, 5, 8)):
            x = torch.randn(size)
            for found, expected in zip(net(x), ort.run(graph.model, {"x": x.numpy()}).values()):
                np.testing.assert_allclose(found.detach(), expected, rtol=1e-4, atol=1e-5)


TILES = {  # operand, repeats joined from the batch b, the length t and numbers, widths that shrink
    "a token by batch": ("1,1,16", "b, i1, i1", [16]),
    "tokens by batch, twice": ("1,3,16", "b, i2, i1", [16]),
    "channels twice": ("1,1,8", "b, i1, i2", [8]),
    "by length": ("1,2,16", "b, t, i1", [16]),
    "without a known piece": ("1,1,16", "all", []),
}


@pytest.mark.parametrize("name", TILES)
def test_only_the_axes_that_are_repeated_by_computed_numbers_keep_their_size(name: str) -> None:
    """A learned start of a sequence, repeated for every sample."""
    sizes, repeats, widths = TILES[name]
    pieces = (
        f"p = Concat<axis=0>({repeats})"
        if repeats != "all"
        else ("j = Concat<axis=0>(b, i1, i1)  p = Mul(j, i1)")
    )
    graph = mg.lift(
        model_from_text(f"""net (float[B,T,8] x, float[{sizes}] first, float[8,16] w, float[16,5] v)
        => (float[B,U,5] y) <int64[1] i1 = {{1}}, int64[1] i2 = {{2}}> {{
            b = Shape<start=0, end=1>(x)  t = Shape<start=1, end=2>(x)  {pieces}
            k = Tile(first, p)  m = MatMul(x, w)  c = Concat<axis=1>(k, m)  r = Relu(c)
            y = MatMul(r, v) }}""")
    )
    assert [group.width for group in graph.groups if group.resizable] == widths
    if widths:
        resized_is_right(graph, [[(1, 3, 8)], [(4, 70, 8)]])
    net = mg.to_torch(graph.model)
    for size in ((2, 3, 8), (3, 5, 8)):
        x = torch.randn(size)
        (expected,) = ort.run(graph.model, {"x": x.numpy()}).values()
        np.testing.assert_allclose(net(x).detach(), expected, rtol=1e-4, atol=1e-5)


IMAGES: dict[str, tuple[str, str, str, tuple[int, ...], list[tuple[int, ...]]]] = {
    "NHWC": ("N,H,W,3", "0,3,1,2", "0,2,3,1", (3, 3), [(1, 20, 31, 3), (3, 64, 9, 3)]),
    "unk__": ("unk__1,unk__2,unk__3,3", "0,3,1,2", "0,2,3,1", (3, 3), [(2, 9, 8, 3)] * 2),
    "one image": ("1,H,W,3", "0,3,1,2", "0,2,3,1", (3, 3), [(1, 20, 31, 3), (1, 7, 8, 3)]),
    "open height": ("N,H,32,3", "0,3,1,2", "0,2,3,1", (3, 3), [(1, 20, 32, 3), (3, 7, 32, 3)]),
    "NWC": ("N,W,3", "0,2,1", "0,2,1", (3,), [(1, 20, 3), (3, 64, 3)]),
    "NDHWC": ("N,D,H,W,3", "0,4,1,2,3", "0,2,3,4,1", (3, 3, 3), [(1, 5, 6, 7, 3), (2, 8, 5, 4, 3)]),
    "NCHW": ("N,3,H,W", "0,1,2,3", "0,1,2,3", (3, 3), [(1, 3, 20, 31), (3, 3, 64, 9)]),
}


@pytest.mark.parametrize("name", IMAGES)
def test_open_axes_may_stand_anywhere(name: str) -> None:
    shape, to_first, to_last, kernel, sizes = IMAGES[name]
    window = ",".join(map(str, kernel))
    ones = ",".join("1" for _ in kernel)
    axes = ",".join(f"O{k}" for k in range(len(kernel) + 2))
    graph = mg.lift(
        model_from_text(f"""net (float[{shape}] x, float[8,3,{window}] w, float[5,8,{ones}] v)
        => (float[{axes}] y) {{ t = Transpose<perm=[{to_first}]>(x) c = Conv(t, w) r = Relu(c)
            q = Conv(r, v) y = Transpose<perm=[{to_last}]>(q) }}""")
    )
    assert [group.width for group in graph.groups if group.resizable] == [8]
    resized_is_right(graph, [[size] for size in sizes])


def test_open_channels_of_images_in_either_order_are_asked_for() -> None:
    for shape, perm in (("N,C,H,W", "0,1,2,3"), ("N,H,W,C", "0,3,1,2")):
        with pytest.raises(ModelError, match=r"--input-shape x=.*3"):
            mg.lift(
                model_from_text(f"""net (float[{shape}] x, float[8,3,3,3] w) => (float[N,8,P,Q] y)
                {{ t = Transpose<perm=[{perm}]>(x) y = Conv(t, w) }}""")
            )


BURNT = {
    "Reshape to three axes": ("b = Reshape(a, s)", [12, 4, 8], "6x2x32"),
    "Reshape to two axes": ("b = Reshape(a, s)", [12, 32], "6x2x32"),
    "Reshape with one left open": ("b = Reshape(a, s)", [-1, 5, 8], "5x2x32"),
    "Expand": ("b = Expand(a, s)", [7, 2, 32], "7x2x32"),
    "mask": ("k = ConstantOfShape(s) b = Add(a, k)", [9, 1, 1], "9x2x32"),
    "Tile": ("t = Tile(one, s) b = Add(a, t)", [11, 2, 32], "11x2x32"),
}


@pytest.mark.parametrize("name", BURNT)
def test_a_size_that_was_burnt_in_is_named(name: str) -> None:
    """The node, its operands' sizes, and an input shape with which the file can be lifted."""
    nodes, numbers, wanted = BURNT[name]
    model = model_from_text(f"""net
        (float[T,2,32] x, float[32,32] w, float[1,1,1] one) => (float[a] y)
        <int64[{len(numbers)}] s = {{{",".join(map(str, numbers))}}}>
        {{ a = MatMul(x, w) {nodes} y = Relu(b) }}""")
    model.graph.outputs[0].shape = None
    with pytest.raises(ModelError) as caught:
        mg.lift(model)
    words = str(caught.value)
    assert words.startswith("node '")
    assert "2x2x32" in words
    assert words.endswith(f"were tried at T=2; give --input-shape x={wanted})")
    sizes = tuple(int(size) for size in wanted.split("x"))
    assert mg.lift(model, input_shapes={"x": sizes}).shapes["a"] == sizes


def test_a_length_of_the_analysis_that_was_burnt_in_is_named() -> None:
    """64 is what open lengths are tried at: then it is right, and any other is wrong."""
    with pytest.raises(ModelError, match=r"--input-shape x=2x64x8\)"):
        mg.lift(
            model_from_text("""net (float[N,T,8] x, float[1,64,8] w) => (float[N,64,8] y)
            { y = Add(x, w) }""")
        )


def test_images_of_which_both_sizes_were_burnt_in() -> None:
    with pytest.raises(ModelError, match=r"--input-shape x=2x3x192x192\)"):
        mg.lift(
            model_from_text("""net (float[N,3,H,W] x, float[4,3,1,1] w) => (float[N,4,a,b] y)
            <int64[4] to = {1, 4, 24, 24}> { c = Conv(x, w)
                p = AveragePool<kernel_shape=[8,8], strides=[8,8]>(c)
                k = ConstantOfShape(to) y = Add(p, k) }""")
        )


def test_slices_and_resizes_of_burnt_in_sizes_stay_as_they_are() -> None:
    """They fit every size, and do what they did."""
    graph = mg.lift(
        model_from_text("""net (float[N,3,H,W] x, float[8,3,1,1] w, float[5,8,1,1] v)
        => (float[N,5,6,6] y) <int64[2] first = {0, 0}, int64[2] last = {12, 9},
        int64[2] axes = {2, 3}, int64[2] to = {6, 6}, float[4] scales = {1, 1, 1, 1}>
        { c = Conv(x, w) r = Relu(c) s = Slice(r, first, last, axes)
          z = Resize<axes=[2,3], mode="linear">(s, , , to) y = Conv(z, v) }""")
    )
    assert [group.width for group in graph.groups if group.resizable] == [8]
    resized_is_right(graph, [[(1, 3, 20, 20)], [(2, 3, 8, 31)]])


def test_the_names_that_other_tools_give_open_sizes_say_nothing() -> None:
    """Many call every open size "None" or "?": they are not one size."""
    graph = onnx.helper.make_graph(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]),
            helper.make_node("Conv", ["t", "w"], ["c"]),
            helper.make_node("Relu", ["c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["None", "None", "None", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["None", 8, "None", "None"])],
        [numpy_helper.from_array(np.ones((8, 3, 5, 5), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert mg.lift(model).shapes["y"] == (2, 8, 220, 220)


def test_a_mask_of_floats_is_computed_at_every_length() -> None:
    """Cast from a condition it takes more bytes than that, and is not folded at first."""
    graph = mg.lift(
        model_from_text("""net (float[B,T,8] x, float[8,16] w, float[8,16] u, float[16,5] v)
        => (float[B,T,5] y) <int64 z = {0}, int64 i = {1}, int64[2] column = {-1, 1},
        int64[1] i0 = {0}> {
            sizes = Shape(x)  t = Gather<axis=0>(sizes, i)  r = Range(z, t, i)
            c = Reshape(r, column)  both = Add(t, t)  r2 = Range(z, both, i)
            later = Greater(r2, c)  one = Cast<to=1>(later)
            t1 = Unsqueeze(t, i0)  t2 = Unsqueeze(both, i0)
            square = Concat<axis=0>(t1, t2)  full = ConstantOfShape<value = float[1] {-9.0}>(square)
            upper = Trilu(full)  hidden = Mul(upper, one)  mask = Unsqueeze(hidden, i0)
            q = MatMul(x, w)  twice = Concat<axis=1>(x, x)  k = MatMul(twice, u)
            kt = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, kt)  m = Add(s, mask)
            p = Softmax<axis=-1>(m)  h = MatMul(p, k)  y = MatMul(h, v) }""")
    )
    assert [g.width for g in graph.groups if g.resizable] == [16]
    resized_is_right(graph, [[(1, 3, 8)], [(4, 70, 8)]])
