"""Fresh weights against the initial weights of PyTorch's own modules."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.errors import ArgumentError
from morphgraph.ops.initial import ONE, Initial
from morphgraph.passes.rewrite.fresh import initials
from morphgraph.testing import model_from_text
from morphgraph.torch_io.weights import with_weights
from morphgraph.workflow import resize_and_check

pytestmark = pytest.mark.filterwarnings("ignore")
HEAD = '<ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]> '


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 24, 5)
        self.bn = nn.BatchNorm2d(24)
        self.grouped = nn.Conv2d(24, 32, 3, groups=4, bias=False)
        self.gn = nn.GroupNorm(4, 32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.InstanceNorm2d(32, affine=True)
        self.up = nn.ConvTranspose2d(32, 12, 3, groups=2)
        self.slope = nn.PReLU(12)
        self.slopes = nn.PReLU()
        self.fc = nn.Linear(12, 40)
        self.head = nn.Linear(40, 30, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gn(self.grouped(torch.relu(self.bn(self.conv(x)))))
        x = self.slope(self.up(self.norm(self.depthwise(x))))
        return self.head(self.slopes(self.fc(x.mean((2, 3)))))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 24, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(48, 20, batch_first=True)
        self.rnn = nn.RNN(20, 32, batch_first=True, bias=False)
        self.cell = nn.LSTMCell(32, 16)
        self.encoder = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=16, vdim=24, batch_first=True)
        self.rms = nn.RMSNorm(32)
        self.out = nn.Linear(32, 50)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rnn(self.gru(self.lstm(self.embedding(x))[0])[0])[0]
        x = self.encoder(x)
        x = self.cross(x, x[..., :16], x[..., :24], need_weights=False)[0]
        x = self.rms(x) + self.cell(x[:, 0])[0].repeat(1, 2)[:, None]
        return self.out(x)


EXAMPLES: dict[Callable[[], nn.Module], Tensor] = {
    Images: torch.zeros(2, 3, 16, 16),
    Words: torch.zeros(2, 7, dtype=torch.long),
}


def array(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("make", EXAMPLES)
def test_weights_are_drawn_as_the_modules_draw_them(make: Callable[[], nn.Module]) -> None:
    """Many draws of both: every tensor's numbers are from one distribution."""
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(7)  # would show if it stayed
    model = mg.export(net, (EXAMPLES[make],))
    drawn = [mg.fresh(model, seed) for seed in range(40)]
    own = [make().state_dict() for _ in drawn]
    compared = 0
    for name, first in own[0].items():
        if "num_batches" in name:
            continue
        theirs = np.concatenate([state[name].numpy().ravel() for state in own])
        ours = np.concatenate([array(one, name).ravel() for one in drawn])
        if theirs.min() == theirs.max():
            assert (ours == theirs[0]).all(), name
            continue
        assert ks_2samp(ours, theirs).pvalue > 1e-4, name
        if name != "embedding.weight":  # uniform: neither reaches above the other's bound
            assert np.abs(ours).max() == pytest.approx(np.abs(theirs).max(), rel=0.03), name
        assert ours.shape == (40 * first.numel(),)
        compared += 1
    assert compared > 9


def test_what_is_no_weight_of_a_layer_keeps_its_values() -> None:
    class Tokens(nn.Module):
        order: Tensor
        blur: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, 4)
            self.token = nn.Parameter(torch.full((1, 1, 16), 7.0))
            self.places = nn.Parameter(torch.full((1, 17, 16), 7.0))
            self.table = nn.Parameter(torch.full((9, 16), 7.0))
            self.register_buffer("order", torch.arange(17) % 9)
            self.norm = nn.LayerNorm(16)
            self.fc = nn.Linear(16, 16)
            self.scale = nn.Parameter(torch.full((16,), 7.0))
            self.bias = nn.Parameter(torch.full((16,), 7.0))
            self.register_buffer("blur", torch.full((16, 1, 3), 7.0))

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
            x = x + self.table[self.order]
            x = x + self.fc(self.norm(x)) * self.scale
            x = nn.functional.conv1d(x.transpose(1, 2), self.blur, groups=16)
            return x.transpose(1, 2) + self.bias

    model = mg.export(Tokens().eval(), (torch.zeros(2, 3, 16, 16),))
    fresh = mg.fresh(model)
    for name in ("token", "places", "table", "scale", "bias", "blur"):
        assert (array(fresh, name) == 7).all(), name
    for name in ("patches.weight", "patches.bias", "fc.weight", "fc.bias"):
        assert not np.isin(array(fresh, name), array(model, name)).any(), name


def of_text(text: str) -> dict[str, Initial]:
    return initials(mg.lift(model_from_text(HEAD + text)).model)


def test_fan_in_of_every_form_of_a_product() -> None:
    found = of_text("""net (float[2,9] x, float[9,4] a, float[4] p, float[25,4] b, float[25] q,
    float[25,3] c, float[3] r, float[3,36] d, float[36] s) => (float[2,36] y) {
        h1 = Gemm(x, a, p)  h2 = Gemm<transB=1>(h1, b, q)
        h3 = MatMul(h2, c)  h4 = Add(r, h3)  h5 = MatMul(h4, d)  h6 = Relu(h5)  y = Add(h6, s)
    }""")
    bounds = {
        **dict.fromkeys(("a", "p"), 1 / 3),
        **dict.fromkeys(("b", "q"), 1 / 2),
        **dict.fromkeys(("c", "r"), 1 / 5),
        "d": 3**-0.5,
    }  # s is added behind an activation: nobody says what it is
    assert found == {name: Initial("uniform", bound) for name, bound in bounds.items()}


def test_kernels_on_the_left_and_operators_of_onnx_runtime() -> None:
    found = of_text("""net (float[4,16] x, float[9,4] a, float[9,5] b, float[5] p, float[5] g,
    float[5] s) => (float[16,5] y) <float[16,5] v> {
        t = MatMul(a, x)  u = Transpose<perm=[1,0]>(t)
        v = com.microsoft.FusedGemm<activation="Relu">(u, b, p)
        y = com.microsoft.SkipLayerNormalization(v, v, g, s)
    }""")
    third = Initial("uniform", 1 / 3)
    zero = Initial("constant", 0)
    assert found == {"a": Initial("uniform", 0.5), "b": third, "p": third, "g": ONE, "s": zero}


def test_a_shared_tensor_is_drawn_as_its_first_layer_does() -> None:
    found = of_text("""net (int64[2,5] x, float[50,16] e) => (float[2,5,50] y) {
        a = Gather(e, x)  t = Transpose<perm=[1,0]>(e)  y = MatMul(a, t) }""")
    assert found == {"e": Initial("normal", 1.0)}


def test_numbers_depend_on_seed_name_and_shape_alone() -> None:
    text = "net (float[1,3,4,4] x, float[8,3,1,1] a, float[{n},8,1,1] b) => (float[1,{n},4,4] y)"
    models = [
        model_from_text(HEAD + text.format(n=n) + "{ p = Conv(x, a)  y = Conv(p, b) }")
        for n in (2, 5)
    ]
    before = array(models[0], "a").copy()
    one, other = (mg.fresh(model, 3) for model in models)
    assert np.array_equal(array(one, "a"), array(other, "a"))
    assert np.array_equal(array(one, "b"), array(mg.fresh(mg.lift(models[0]), 3), "b"))
    assert not np.array_equal(array(one, "a"), array(mg.fresh(models[0], 4), "a"))
    assert not np.array_equal(array(one, "a").ravel()[:16], array(one, "b").ravel())
    assert np.array_equal(array(models[0], "a"), before)


def test_half_precision_stays() -> None:
    text = "net (float16[1,3,4,4] x, float16[8,3,1,1] a) => (float16[1,8,4,4] y)"
    fresh = mg.fresh(model_from_text(HEAD + text + "{ y = Conv(x, a) }"))
    assert array(fresh, "a").dtype == np.float16


def test_apply_checks_the_structure_and_then_draws() -> None:
    from morphgraph.testing.examples import image, residual_cnn

    graph = mg.lift(mg.export(residual_cnn().eval(), (image(),)))
    plan = mg.uniform(graph, 0.5)
    grown = mg.expand(graph, plan, {"flops": "60%"})
    kept, drawn = (mg.apply(graph, grown, weights=how, seed=5) for how in ("keep", "fresh"))
    assert np.array_equal(array(kept, "fc.bias"), array(graph.model, "fc.bias"))
    for name, value in kept.graph.initializers.items():
        assert drawn.graph.initializers[name].shape == value.shape
    kernel = array(drawn, "blocks.2.conv2.weight")
    bound = np.prod(kernel.shape[1:]) ** -0.5
    assert 0.99 * bound < np.abs(kernel).max() <= bound
    checked = resize_and_check(graph, grown, weights="fresh")
    assert checked.report is not None
    assert checked.report.ok
    assert with_weights(drawn, mg.to_torch(drawn)).graph.initializers.keys() >= {"fc.weight"}
    with pytest.raises(ArgumentError, match="absorb"):
        mg.apply(graph, plan, weights="fresh", absorb=True)
