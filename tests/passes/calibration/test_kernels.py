"""Where kernels are stored: what is written is what operators read, and nothing else changes."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.onnx_io.runtime import run
from morphgraph.passes.calibration.kernels import Joined
from morphgraph.passes.calibration.readers import readers
from morphgraph.testing import model_from_text


class Recurrent(nn.Module):
    """A layer whose kernel torch's exporter joins from slices."""

    def __init__(self, kind: str, both: bool) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(6, 5, batch_first=True, bidirectional=both)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)[0]
        return result


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_gates_that_are_joined_in_another_order(kind: str, both: bool) -> None:
    """Torch itself is the oracle: twice the input kernels there, twice the kernel here."""
    torch.manual_seed(0)
    net = Recurrent(kind, both).eval()
    example = torch.randn(2, 7, 6)
    model = mg.lift(mg.export(net, (example,))).model
    (reader,) = readers(model, mg.lift(model).couplings.input_independent).values()
    assert isinstance(reader.store, Joined)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    reader.write(2 * reader.matrix())
    changed = {
        name
        for name, value in model.graph.initializers.items()
        if value.const_value is not before[name]
    }
    assert changed == {name for name, _ in net.named_parameters() if "weight_ih" in name}
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "weight_ih" in name:
                parameter.mul_(2)
        expected = net(example).numpy()
    (found,) = run(model, {"x": example.numpy()}).values()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def kernels_of(text: str) -> dict[str, ir.Value]:
    """The model's readers by name, with what stores their kernels."""
    graph = mg.lift(model_from_text(text))
    found = readers(graph.model, graph.couplings.input_independent)
    return {name: reader.node.outputs[0] for name, reader in found.items()}


def test_what_others_read_is_left_alone() -> None:
    """A kernel used twice, one that is an output, one of which another node reads a part."""
    assert not kernels_of("""net (float[N,4] x, float[4,4] w) => (float[N,4] y) {
        a = MatMul(x, w)  r = Relu(a)  y = MatMul(r, w) }""")
    assert not kernels_of("""net (float[N,4] x, float[4,3] a, float[4,3] b)
        => (float[N,6] y, float[4,3] z) {
        w = Concat<axis=1>(a, b)  y = MatMul(x, w)  z = Relu(b) }""")


def test_a_number_that_stands_twice_is_left_alone() -> None:
    """A kernel that repeats a parameter cannot take any numbers."""
    assert not kernels_of("""net (float[N,4] x, float[4,3] a) => (float[N,6] y) {
        w = Concat<axis=1>(a, a)  y = MatMul(x, w) }""")
