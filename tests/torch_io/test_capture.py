"""Networks that are recorded in one run, beside what ``torch.export`` makes of them."""

import sys
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from morphgraph.errors import UnsupportedError
from morphgraph.torch_io import translate as translating
from morphgraph.torch_io.arguments import Call
from morphgraph.torch_io.export import export


def assert_same_function(net: nn.Module, model: ir.Model, x: torch.Tensor) -> None:
    session = ort.InferenceSession(serialized(model), providers=["CPUExecutionProvider"])
    (name,) = (value.name for value in session.get_inputs())
    with torch.no_grad():
        expected = net(x).numpy()
    np.testing.assert_allclose(session.run(None, {name: x.numpy()})[0], expected, atol=1e-5)


class Convolutions(nn.Module):
    """Writes in place, cuts in chunks, calls one module twice, drops out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.second, self.head = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = F.hardswish(self.norm(self.first(x))).chunk(2, 1)
        y = self.act(self.second(a * b.sigmoid()))
        y += 1
        return self.head(self.drop(F.adaptive_avg_pool2d(y, 1).flatten(1)))


class Sentences(nn.Module):
    """Attention, integers that become floats, a mask and two results."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.out = nn.Linear(8, 11, bias=False)

    def forward(self, words: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = words == 0
        x = self.table(words) + words[:, :, None] / 10
        return {"y": self.out(self.block(x * ~mask[:, :, None])), "count": mask.sum(1)}


class Signals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 6, 3, stride=2), nn.GroupNorm(2, 6)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x) * scale)
        return F.pad(y, (1, 1)).unfold(2, 2, 2).permute(0, 2, 1, 3).flatten(2).amax(-1)


class Writes(nn.Module):
    """Writes into memory that several tensors look at."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv, self.linear = how, nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        if self.how == "view of what was written":
            y += 1
            return y * self.linear(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        if self.how == "what is looked at":
            z = y.permute(0, 2, 3, 1)
            y.relu_()
            parts = z.unsqueeze(1)
            y *= 2
            first, second = parts.chunk(2, -1)
            return first - second, self.linear(z)
        if self.how == "part":
            y[:, 1] = 2 * y[:, 0]
            y[:, 2:, 1:3, -1] -= 1
            y[:, :2].transpose(1, 2).clamp_(-0.5)
            return y.view(-1) + 1, y
        if self.how == "part of a constant":
            mask = torch.zeros(1, *y.shape[2:])
            for k, rows in enumerate((slice(0, 2), slice(2, None))):
                mask[:, rows] = k + 0.5
            return y * mask + torch.arange(y.shape[3]) * torch.tensor([0.5])
        y = F.adaptive_avg_pool2d(y.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), 1)
        y[:, 0] = torch.linspace(0, 1, 1)
        y.add_(1).squeeze_(-1)
        return y.squeeze_(2).neg()


class Masks(nn.Module):
    """Constants that are written part by part, as those of shifted windows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.conv = how, nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.conv(x)
        mask, count = y.new_zeros(y.shape[2:]), 0
        for rows in (slice(0, -2), slice(-2, -1), slice(-1, None)):
            for columns in (slice(0, -1), slice(-1, None)):
                mask[rows, columns] = count
                count += 1
        if self.how == "windows":
            parts = mask.view(2, 2, 2, 2).permute(0, 2, 1, 3).reshape(4, 4)
            far = parts.unsqueeze(1) - parts.unsqueeze(2)
            far = far.masked_fill(far != 0, (-100.0)).masked_fill(far == 0, 0.0)
            tokens = y.view(4, 4, 4)
            return (tokens @ tokens.transpose(1, 2) + far).softmax(-1)
        if self.how == "as it was written":
            return y * mask, y - mask.clone(), y + mask.view(4, 4)
        if self.how == "beside functions":
            y[:, 1] = 2.0
            return y * (mask * 3)
        if self.how == "result":
            return y, mask + 1
        if self.how == "types":
            flags, numbers = torch.ones(4, 4, dtype=torch.bool), torch.full((4, 4), 3)
            halves = torch.zeros(4, 4, dtype=torch.float16) + 1
            return y * flags, y * numbers, y + halves, y * (mask > 2).float(), y + (numbers == 3)
        table = torch.tensor([[0.5, 1.0, 2.0, 4.0]])
        return y * table + torch.zeros_like(y) * 2 + torch.ones_like(table).select(1, 0)


class Steps(nn.Module):
    """Recurrent layers, which make their first states and list their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.second, self.out = nn.GRU(8, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(self.first(x)[0])[0][:, -1])


class Again(nn.Module):
    """Calls operators again: with the same sizes, with others, and with numbers that are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in range(3))

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> Any:
        y = x * x + x * x.flip(0)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = norm(layer(y)) + torch.cat([y, x, y], 0)[: len(y)]
        a, b = y.split([1, 3], 1)
        c, d, e = b.split(1, 1)
        y = torch.stack([a + 1, c + 1.0, d * True, e * 0.0, e * -0.0, a + c, a + a], 0)
        counts = (n + 1, n + True, n / 2, n + 2.0, n * n, n // 3, n - n.flip(0), n.float() + n)
        even = (n % 2 == 0).to(y.dtype)
        return y, counts, even * 0.5, n.to(torch.int32) * n, n.new_zeros(2), n.new_zeros(2) + 1


WRITES = (
    "view of what was written",
    "what is looked at",
    "part",
    "part of a constant",
    "tensor that changes its shape",
)
MASKS = ("windows", "as it was written", "beside functions", "result", "types", "tables")
WORDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])


@pytest.mark.parametrize(
    ("net", "example"),
    [
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Sentences(), (WORDS,)),
        (Signals(), (torch.randn(2, 4, 9), torch.rand(4))),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (torch.randn(2, 4),)),
        (Steps(), (torch.randn(1, 4, 3),)),
        (Again(), (torch.randn(2, 4), torch.tensor([3, 4]))),
        *((Writes(how), (torch.randn(1, 3, 4, 4),)) for how in WRITES),
        *((Masks(how), (torch.randn(1, 3, 4, 4),)) for how in MASKS),
    ],
    ids=["convolutions", "sentences", "signals", "parametrized", "steps", "again", *WRITES, *MASKS],
)
def test_one_run_gives_what_torch_export_gives(
    net: nn.Module, example: tuple[torch.Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick: list[ir.Model | None] = []
    translate = translating._translate_quickly

    def noted(*arguments: Any) -> ir.Model | None:
        quick.append(translate(*arguments))
        return quick[-1]

    monkeypatch.setattr(translating, "_translate_quickly", noted)
    found = export(net, example)
    assert quick[0] is not None
    monkeypatch.setattr(translating, "_translate_quickly", lambda *_: None)
    assert serialized(found) == serialized(export(net, example))


def serialized(model: ir.Model) -> bytes:
    return ir.serde.serialize_model(model).SerializeToString(deterministic=True)


def test_what_is_written_into_constants_is_not_translated() -> None:
    net, call = Masks("windows").eval(), Call((torch.randn(1, 3, 4, 4),), {})
    model = translating._translate_quickly(net, call, ["x"], 20)
    assert model is not None
    assert "ScatterND" not in {node.op_type for node in model.graph}


class Scripted(nn.Module):
    """What torchlib writes as functions of their own, and parses when they are asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.addcmul(x, x, x.flip(0), value=0.5) + torch.addcdiv(x, x, x.abs() + 1)
        y = torch.lerp(y, x.exp(), 0.25) + torch.where(torch.isfinite(1 / x), x, 0 * x)
        return F.selu(y + torch.log1p(x.abs())) + y.amax(1, keepdim=True) - y.amin(0)


def test_functions_that_are_parsed_late_compute_what_pytorch_computes() -> None:
    x = torch.tensor([[1.5, -2.0, 0.25], [-0.5, 3.0, 1.0]])
    assert_same_function(Scripted(), export(Scripted(), (x,)), x)


class Reads(nn.Module):
    """Whose forward does what one run does not tell about."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.linear, self.kept = what, nn.Linear(4, 4), dict[str, torch.Tensor]()
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.what == "diagonal":
            y[:, :2].diagonal().add_(1)
        elif self.what == "argument":
            x.mul_(2)
            return x + y
        elif self.what == "list":
            self.kept["y"] = y
        elif self.what == "attribute":
            self.last = y
        elif self.what == "elsewhere":
            y = y * SCALE
        elif self.what == "number" and float(y.detach().sum()) > 1e6:
            y = y + 1
        return y


SCALE = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize(
    "what", ["diagonal", "argument", "list", "attribute", "elsewhere", "number"]
)
def test_what_one_run_does_not_tell_is_refused(what: str) -> None:
    net, x = Reads(what).eval(), torch.randn(2, 4)
    assert translating._translate_quickly(net, Call((x,), {}), ["x"], 20) is None
    assert net.last is None
    assert not net.kept


@pytest.mark.parametrize("what", ["number", "elsewhere"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_refused_is_exported_the_slow_way(what: str) -> None:
    net, x = Reads(what).eval(), torch.randn(2, 4)
    assert_same_function(net, export(net, (x,)), x)


def test_a_pytorch_without_these_names_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "morphgraph.torch_io.quick", None)
    net, x = nn.Linear(3, 2), torch.randn(2, 3)
    assert translating._translate_quickly(net, Call((x,), {}), ["x"], 20) is None
    assert_same_function(net, export(net, (x,)), x)


def test_errors_of_the_network_are_told_as_ever() -> None:
    with pytest.raises(UnsupportedError, match="does not run on the example"):
        export(Convolutions(), (torch.randn(2, 4, 8, 8),))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_writes_that_the_older_exporter_loses_are_refused(whole: bool) -> None:
    class Diagonal(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = 2 * x
            (y if whole else y[:, :2]).diagonal().add_(1)
            return y

    with pytest.raises(UnsupportedError, match=r"Diagonal.* computes something else"):
        export(Diagonal(), (torch.randn(3, 3),))
