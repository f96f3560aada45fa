"""Whole networks: exported, loaded back, trained, saved, exported again."""

import copy
import io
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.onnx_io import runtime as ort, static_shape
from morphgraph.testing import model_from_text, randomize_weights
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import to_torch

IMAGE = (3, 48, 48)


def images(batch: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *(shape or IMAGE), generator=torch.Generator().manual_seed(seed))


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error, relative to the scale of the expected output."""
    assert out.shape == expected.shape
    return float((out - expected).abs().max() / expected.abs().max())


def layers(net: nn.Module) -> dict[str, str]:
    """What stands at each path; whether it works in place does not matter."""
    leaves = ((path, repr(m)) for path, m in net.named_modules() if not list(m.children()))
    return {path: text.replace("inplace=True", "") for path, text in leaves}


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    return randomize_weights(torchvision.models.resnet18(num_classes=10), images(2))


@pytest.fixture(scope="module")
def model(resnet18: nn.Module) -> ir.Model:
    return export(resnet18, images(1))


def test_resnet18_has_the_names_and_modules_of_torchvision(
    resnet18: nn.Module, model: ir.Model
) -> None:
    net = to_torch(model)
    theirs, ours = resnet18.state_dict(), net.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(ours[name], tensor)
    assert {name for name, _ in net.named_parameters()} == {
        n for n, _ in resnet18.named_parameters()
    }
    assert layers(net).items() <= layers(resnet18).items()
    assert layers(resnet18).keys() - layers(net).keys() <= {"avgpool"}  # exported as a mean
    net.load_state_dict(theirs)
    assert all(ours == theirs for ours, theirs in net.meta["morphgraph.parameters"].items())


def test_resnet18_computes_what_onnx_runtime_computes_at_any_batch(
    resnet18: nn.Module, model: ir.Model
) -> None:
    net = to_torch(model)
    for batch in (1, 2, 5):
        x = images(batch, seed=batch)
        runs = [ort.run(model, {"x": x[k : k + 1].numpy()}) for k in range(batch)]
        expected = torch.from_numpy(np.concatenate([next(iter(e.values())) for e in runs]))
        assert expected.std() > 0.1
        assert error(net(x), expected) < 1e-5
    assert net.meta["morphgraph.batch"] == "free"


def test_training_is_that_of_the_original(resnet18: nn.Module, model: ir.Model) -> None:
    """Three steps of SGD: the same loss, weights and running statistics."""
    ours, theirs = to_torch(model).train(), copy.deepcopy(resnet18).train()
    x, labels = images(8), torch.arange(8)
    for net in (ours, theirs):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            optimizer.step()
    for name, tensor in theirs.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        assert error(ours.state_dict()[name].double(), tensor.double()) < 1e-5, name
    moved = ours.state_dict()["layer1.0.bn1.running_mean"]
    assert not torch.allclose(moved, resnet18.state_dict()["layer1.0.bn1.running_mean"])


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0, None, 0.0])
def test_running_statistics_move_as_those_of_the_original(
    momentum: float | None, calls: int
) -> None:
    """With a norm that is called several times, with the mean of all batches, and held still."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.norm = nn.BatchNorm2d(3, momentum=momentum)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(calls):
                x = x + self.norm(self.conv(x)).relu()
            return x

    theirs = Net()
    ours = to_torch(export(theirs, (torch.randn(2, 3, 5, 5),))).train()
    theirs.train()
    for seed in range(4):
        x = 3 * torch.randn(4, 3, 5, 5) + seed
        theirs(x), ours(x)
    for name in ("running_mean", "running_var"):
        wanted = theirs.norm.get_buffer(name)
        begin = float(name == "running_var")
        assert (float((wanted - begin).abs().max()) > 0.1) == (momentum != 0)
        torch.testing.assert_close(ours.get_buffer(f"norm.{name}"), wanted, rtol=1e-5, atol=1e-6)


def test_statistics_that_are_held_still_stay_so_in_files_and_resized_networks(
    tmp_path: Path,
) -> None:
    momenta = (0.0, None, 1.0)
    net = nn.Sequential()
    for momentum in momenta:
        net.extend([nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU()])
    net.append(nn.Conv2d(8, 2, 1))
    mg.save(export(net, (torch.randn(1, 8, 4, 4),)), tmp_path / "model.onnx")
    graph = mg.lift(tmp_path / "model.onnx")
    small = mg.apply(graph, mg.uniform(graph, 0.5))
    for ours in (to_torch(mg.load(tmp_path / "model.onnx")), to_torch(small)):
        found = [m.momentum for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
        assert found == [*momenta]


def test_a_network_in_eval_mode_changes_no_statistics(model: ir.Model) -> None:
    net = to_torch(model)
    before = copy.deepcopy(net.state_dict())
    net(images(2))
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert not net.training


def test_training_does_not_write_into_the_model(model: ir.Model) -> None:
    before = model.graph.initializers["conv1.weight"].const_value.numpy().copy()
    net = to_torch(model)
    with torch.no_grad():
        net.get_parameter("conv1.weight").zero_()
    np.testing.assert_array_equal(
        model.graph.initializers["conv1.weight"].const_value.numpy(), before
    )


def test_it_copies_and_saves(model: ir.Model) -> None:
    net, x = to_torch(model), images(2)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), net(x))
        assert twin.state_dict().keys() == net.state_dict().keys()
        next(twin.parameters()).data.zero_()
        assert next(net.parameters()).any()


def test_it_exports_again(model: ir.Model) -> None:
    net, x = to_torch(model), images(2)
    again = export(net, images(1))
    assert again.graph.initializers.keys() >= dict(net.named_parameters()).keys()
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert error(program.module()(images(3)), net(images(3))) < 1e-6


def test_compile_takes_it_whole(model: ir.Model) -> None:
    net, x = to_torch(model), images(2)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), net(x))


def test_the_code_reads_like_a_forward(model: ir.Model) -> None:
    code = to_torch(model).code
    assert "conv1 = self.conv1(x)" in code
    assert "+ maxpool" in code
    assert ".flatten(1)" in code or ".reshape((-1, 512))" in code


# -- constructs -----------------------------------------------------------------------------------


class Constructs(nn.Module):
    """What one meets beside plain convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.gamma = nn.Parameter(torch.rand(16) + 0.5)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.wide = nn.Linear(16, 32)
        self.drop = nn.Dropout(0.5)
        self.back = nn.Linear(32, 16, bias=False)
        self.table = nn.Embedding(10, 16)
        self.register_buffer("shift", torch.randn(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x)
        y, _ = self.attention(y, y, y, need_weights=False)
        x = x + self.gamma * y + self.shift
        x = x + self.back(self.drop(F.gelu(self.wide(x))))
        return self.head(x[:, 0] + self.table(label))


@pytest.fixture(scope="module")
def constructs() -> tuple[nn.Module, ir.Model]:
    torch.manual_seed(0)
    net = Constructs().eval()
    example = images(1, 3, 16, 16), torch.tensor([3])
    return net, export(net, example)


def test_constructs_at_any_batch(constructs: tuple[nn.Module, ir.Model]) -> None:
    original, model = constructs
    net = to_torch(model)
    assert net.meta["morphgraph.batch"] == "free"
    for batch in (1, 2, 7):
        x, labels = images(batch, 3, 16, 16), torch.arange(batch)
        assert error(net(x, labels), original(x, labels)) < 1e-5


def test_constructs_keep_their_parameters(constructs: tuple[nn.Module, ir.Model]) -> None:
    original, model = constructs
    net = to_torch(model)
    theirs, ours = dict(original.named_parameters()), dict(net.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    net(images(4, 3, 16, 16), torch.arange(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.values())
    for path, kind in {"wide": nn.Linear, "table": nn.Embedding, "norm": nn.LayerNorm}.items():
        assert type(net.get_submodule(path)) is kind


def test_dropout_drops_in_training_alone(constructs: tuple[nn.Module, ir.Model]) -> None:
    _, model = constructs
    net, inputs = to_torch(model), (images(4, 3, 16, 16), torch.arange(4))
    assert torch.equal(net(*inputs), net(*inputs))
    assert isinstance(net.get_submodule("drop"), nn.Dropout)
    net.train()
    assert not torch.equal(net(*inputs), net(*inputs))


class Shared(nn.Module):
    """One convolution called twice, and one weight that two different layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.embed = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(torch.relu(self.conv(x))).mean((2, 3))
        return F.linear(F.linear(x, self.embed) @ self.embed, self.embed)


def test_a_shared_weight_stays_one_parameter() -> None:
    torch.manual_seed(0)
    original = Shared().eval()
    net, x = to_torch(export(original, images(1, 4, 6, 6))), images(3, 4, 6, 6)
    assert {name for name, _ in net.named_parameters()} == {"conv.weight", "conv.bias", "embed"}
    assert error(net(x), original(x)) < 1e-5
    for module in (net, original):
        module(x).square().sum().backward()
    for name, parameter in original.named_parameters():
        ours = net.get_parameter(name).grad
        assert ours is not None
        assert parameter.grad is not None
        assert error(ours, parameter.grad) < 1e-5


# -- foreign models ------------------------------------------------------------------------------


def test_foreign_names_become_paths_with_a_mapping() -> None:
    text = (
        "net (float[1,3,6,6] x, float[4,3,3,3] k, float[4] b, float[4] s, float[4] t, float[4] m,"
        " float[4] v, float[4,1,1] g) => (float y) "
        "{ c = Conv (x, k, b) n = BatchNormalization (c, s, t, m, v) y = Mul (n, g) }"
    )
    model = model_from_text(text)
    for old, new in {"k": "conv0/weights:0", "b": "conv0/bias:0", "g": "forward"}.items():
        model.graph.initializers[old].name = new
    net = to_torch(model)
    names = net.meta["morphgraph.parameters"]
    assert sorted(names.values()) == [
        "conv0/bias:0",
        "conv0/weights:0",
        "forward",
        "m",
        "s",
        "t",
        "v",
    ]
    assert [type(m) for m in net.children() if not isinstance(m, nn.ParameterList)] == [
        nn.Conv2d,
        nn.BatchNorm2d,
    ]
    x = images(4, 3, 6, 6)
    expected = [next(iter(ort.run(model, {"x": x[k : k + 1].numpy()}).values())) for k in range(4)]
    assert error(net(x), torch.from_numpy(np.concatenate(expected))) < 1e-5
    for name, onnx_name in names.items():
        array = model.graph.initializers[onnx_name].const_value.numpy()
        np.testing.assert_array_equal(net.state_dict()[name].numpy(), array)


# -- the batch -----------------------------------------------------------------------------------


def from_text(inputs: str, nodes: str) -> ir.Model:
    given, _, constants = inputs.partition("|")
    listed = f"<{constants}>" if constants else ""
    return model_from_text(f"net ({given}) => (float y) {listed} {{ {nodes} }}")


@pytest.mark.parametrize(
    ("inputs", "nodes"),
    [
        # flattened as one exporter and as another writes it
        ("float[1,3,4] x | int64[2] s = {1, 12}", "y = Reshape (x, s)"),
        ("float[1,3,4] x | int64[2] s = {1, -1}", "y = Reshape (x, s)"),
        ("float[1,3,4] x | int64[2] s = {-1, 12}", "y = Reshape (x, s)"),
        # windows: the batch is merged into an axis, and parted again
        (
            "float[1,4,4,3] x | int64[6] s = {1,2,2,2,2,3}, int64[3] t = {4,4,3}",
            "a = Reshape (x, s) b = Transpose <perm = [0,1,3,2,4,5]> (a) c = Reshape (b, t) "
            "d = Softmax <axis = 1> (c) e = Reshape (d, s) "
            "y = Transpose <perm = [0,1,3,2,4,5]> (e)",
        ),
        # sequence first: the batch stands inside, is merged with the length, and parted again
        (
            "float[1,5,8] x, float[8,8] w | int64[2] s = {5, 8}, int64[3] t = {5, 2, 4}",
            "a = Transpose <perm = [1,0,2]> (x) b = Reshape (a, s) c = Gemm (b, w) "
            "d = Reshape (c, t) "
            "e = Transpose <perm = [1,0,2]> (d) f = Transpose <perm = [0,2,1]> (e) "
            "g = MatMul (e, f) "
            "y = Softmax (g)",
        ),
        # three samples in the export
        ("float[3,2,4] x | int64[2] s = {6, 4}", "y = Reshape (x, s)"),
        # a constant for every sample: joined with them, added to them, and one of fewer axes
        (
            "float[3,2,4] x, float[1,1,4] c | int64[3] s = {3, 1, 4}",
            "a = Expand (c, s) y = Concat <axis = 1> (a, x)",
        ),
        (
            "float[3,2,4] x, float[1,2,4] c | int64[3] s = {3, 2, 4}",
            "a = Expand (c, s) b = Relu (a) y = Mul (x, b)",
        ),
        (
            "float[3,2,4] x, float[1,4] c, float[1,1,4] d | int64[3] s = {3, 1, 4}",
            "a = Expand (c, s) b = Add (a, d) y = Concat <axis = 1> (x, b)",
        ),
    ],
)
def test_a_fixed_batch_is_freed(inputs: str, nodes: str) -> None:
    model = from_text(inputs, nodes)
    net = to_torch(model)
    assert net.meta["morphgraph.batch"] == "free"
    shape = static_shape(model.graph.inputs[0])
    x = images(2 * shape[0], *shape[1:])
    halves = [next(iter(ort.run(model, {"x": half.numpy()}).values())) for half in x.chunk(2)]
    # Whatever axis carries the batch: the samples' outputs stand one behind the other.
    joined = np.concatenate([half.reshape(shape[0], -1) for half in halves])
    out = net(x)
    axis = next(k for k, (a, b) in enumerate(zip(out.shape, halves[0].shape)) if a != b)
    parts = np.concatenate([p.detach().numpy().reshape(shape[0], -1) for p in out.chunk(2, axis)])
    np.testing.assert_allclose(parts, joined, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "nodes", "reason"),
    [
        ("float[2,3] x", "y = Softmax <axis = 0> (x)", "mixes samples"),
        ("float[2,3] x | int64[1] a = {0}", "y = ReduceMean (x, a)", "mixes or picks samples"),
        ("float[2,3] x | int64[2] s = {3, 2}", "y = Reshape (x, s)", "mixes samples"),
        ("float[2,3] x, float[2,3] w", "y = Add (x, w)", "add"),
        ("float[2,3] x | int64 i = {1}", "y = Gather (x, i)", "has 1 axes instead|mixes or picks"),
        ("float[2,3] x, float[1,3] z", "y = Concat <axis = 0> (x, z)", "leading axis"),
        (
            "float[2,3] x, float[1,3] c | int64[2] s = {2, 3}, int64[1] a = {0}",
            "b = Expand (c, s) d = ReduceSum <keepdims = 1> (b, a) y = Add (x, d)",
            "counted once for every sample",
        ),
    ],
)
def test_a_batch_that_cannot_be_freed_stays_as_exported(
    inputs: str, nodes: str, reason: str
) -> None:
    given, _, constants = inputs.partition("|")
    listed = f"<{constants}>" if constants else ""
    text = f"net ({given}) => (float y) {listed} {{ {nodes} }}"
    model = model_from_text(text, inputs=("x", "z"))
    net = to_torch(model)
    assert re.search(reason, net.meta["morphgraph.batch"])
    feeds = {
        str(v.name): images(*static_shape(v), seed=k).numpy()
        for k, v in enumerate(model.graph.inputs)
    }
    (expected,) = ort.run(model, feeds).values()
    out = net(*(torch.from_numpy(feed) for feed in feeds.values()))
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-5)


def test_a_dynamic_batch_stays_dynamic(resnet18: nn.Module) -> None:
    model = export(resnet18, images(2), dynamic_batch=True)
    net = to_torch(model)
    assert net.meta["morphgraph.batch"] == "free"
    for batch in (1, 2, 5):
        x = images(batch)
        (expected,) = ort.run(model, {"x": x.numpy()}).values()
        assert error(net(x), torch.from_numpy(expected)) < 1e-5


@pytest.mark.parametrize("exported", [1, 2])
def test_a_vision_transformer_at_any_batch(exported: int) -> None:
    torch.manual_seed(0)
    original = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    randomize_weights(original, images(2, 3, 32, 32))
    net = to_torch(export(original, images(exported, 3, 32, 32)))
    assert net.meta["morphgraph.batch"] == "free"
    x = images(3, 3, 32, 32)
    assert error(net(x), original(x)) < 1e-5


class PartlySilentBias(nn.Module):
    """Adds a bias of which a part counts as zero, as Swin V2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.linear.bias.clone()
        bias[2:4].zero_()
        return torch.nn.functional.linear(x, self.linear.weight, bias)


def test_a_bias_that_is_changed_first_is_not_added_twice() -> None:
    torch.manual_seed(0)
    net, x = PartlySilentBias(), torch.randn(2, 3, 4)
    again = to_torch(export(net, (x,)))
    torch.testing.assert_close(again(x), net(x))
    assert set(again.state_dict()) == {"linear.weight", "linear.bias"}


class Unpooled(nn.Module):
    """What SegNet does: pooled values go back to where they were found."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, places = F.max_pool2d(self.down(x).relu(), 2, return_indices=True)
        return self.up(F.max_unpool2d(y, places, (2, 2)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_pooled_values_go_back_to_their_places(dynamic: bool) -> None:
    torch.manual_seed(0)
    net = Unpooled().eval()
    loaded = to_torch(export(net, images(2, 3, 8, 8), dynamic_batch=dynamic))
    for batch in (1, 3) if dynamic else (2,):
        x = images(batch, 3, 8, 8)
        assert error(loaded(x), net(x)) < 1e-5


def test_a_vision_transformer_of_an_open_batch() -> None:
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 1, 4, 32, 64, num_classes=7)
    net = randomize_weights(net, images(2, 3, 32, 32))
    loaded = to_torch(export(net, images(2, 3, 32, 32), dynamic_batch=True))
    assert loaded.meta["morphgraph.batch"] == "free"
    for batch in (1, 5):
        x = images(batch, 3, 32, 32)
        assert error(loaded(x), net(x)) < 1e-5
