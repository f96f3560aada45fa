"""Networks that are recorded in one run, beside what ``torch.export`` makes of them."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from morphgraph.errors import UnsupportedError
from morphgraph.passes.lift import lift
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


WORDS = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])


@pytest.mark.parametrize(
    ("net", "example"),
    [
        (Convolutions(), (torch.randn(2, 3, 8, 8),)),
        (Sentences(), (WORDS,)),
        (Signals(), (torch.randn(2, 4, 9), torch.rand(4))),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), (torch.randn(2, 4),)),
    ],
    ids=["convolutions", "sentences", "signals", "parametrized"],
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


class Reads(nn.Module):
    """Whose forward does what one run does not tell about."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.linear, self.kept = what, nn.Linear(4, 4), dict[str, torch.Tensor]()
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if self.what == "shared":
            first = y[:, :2]
            return torch.cat([y.relu_(), first], 1)
        if self.what == "argument":
            x.mul_(2)
            return x + y
        if self.what == "argument's part":
            x[:, 0] = 0
            return x + y
        if self.what == "constant's part":
            mask = torch.zeros(2, 4)
            mask[:, 1] = y[:, 0]
            return y + mask
        if self.what == "list":
            self.kept["y"] = y
        elif self.what == "attribute":
            self.last = y
        elif self.what == "global":
            y = y * COUNT.add_(1)
        elif self.what == "random":
            y = y + torch.rand(4)
        elif self.what == "number" and float(y.detach().sum()) > 1e6:
            y = y + 1
        return y


COUNT = torch.zeros(4)


@pytest.mark.parametrize(
    "what",
    [
        *("shared", "argument", "argument's part", "constant's part"),
        *("list", "attribute", "global", "random", "number"),
    ],
)
def test_what_one_run_does_not_tell_is_refused(what: str) -> None:
    net, x = Reads(what).eval(), torch.randn(2, 4)
    assert translating._translate_quickly(net, Call((x,), {}), ["x"], 20) is None
    assert net.last is None
    assert not net.kept
    assert not COUNT.any()


@pytest.mark.parametrize("what", ["shared", "constant's part"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_refused_is_exported_the_slow_way(what: str) -> None:
    net, x = Reads(what).eval(), torch.randn(2, 4)
    assert_same_function(net, export(net, (x,)), x)


SCALE = torch.tensor([1.0, 2.0, 3.0, 4.0])


def _scaled(y: torch.Tensor) -> torch.Tensor:
    return y * SCALE


def _column(y: torch.Tensor) -> torch.Tensor:
    y[:, 1] = 2 * y[:, 0]
    return y


def _parts(y: torch.Tensor) -> torch.Tensor:
    part = y[:, 1:]
    part[:, ::2] *= 3
    y[0].relu_()
    return y + 1


def _last_part(y: torch.Tensor) -> torch.Tensor:
    """What was written to is read by its part alone."""
    part = y[:, 1:3]
    part.add_(1)
    return part * 2


def _in_place_then_turned(y: torch.Tensor) -> torch.Tensor:
    return y.relu_().t().contiguous().t()


def _mask(y: torch.Tensor) -> torch.Tensor:
    mask = y.new_zeros(4)
    for k, part in enumerate((slice(0, 1), slice(1, 3), slice(3, 4))):
        mask[part] = k
    differs = mask[None, :] - mask[:, None]
    bias = differs.masked_fill(differs != 0, -1.0).masked_fill(differs == 0, 0.5)
    return y @ bias if bias.any() else y  # a question that no input decides


def _read_twice(y: torch.Tensor) -> torch.Tensor:
    """A constant is as it was when it was read."""
    steps = torch.arange(4.0)
    early = y + steps
    steps.mul_(10)
    return early * steps


def _positions(y: torch.Tensor) -> torch.Tensor:
    at = torch.arange(y.shape[1], device=y.device)
    wave = torch.cat([torch.sin(at / 10), torch.cos(at / 10)])[:4]
    return torch.where(at % 2 == 0, y * wave, torch.zeros_like(y)) + torch.tensor(0.5)


@pytest.mark.parametrize(
    "then",
    [
        *(_scaled, _column, _parts, _last_part, _in_place_then_turned),
        *(_mask, _read_twice, _positions),
    ],
)
def test_writes_and_what_no_input_decides(then: Callable[[torch.Tensor], torch.Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return then(self.linear(x))

    net, x = Net().eval(), torch.randn(2, 4)
    assert translating._translate_quickly(net, Call((x,), {}), ["x"], 20) is not None
    assert_same_function(net, export(net, (x,)), x)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_begin_with_zeros_that_nobody_trains(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells, self.out = kind(4, 6, 2, bidirectional=True), nn.Linear(12, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.cells(x)[0])

    net, x = Net().eval(), torch.randn(5, 2, 4)
    assert translating._translate_quickly(net, Call((x,), {}), ["x"], 20) is not None
    found = export(net, (x,))
    assert_same_function(net, found, x)
    monkeypatch.setattr(translating, "_translate_quickly", lambda *_: None)
    groups = [
        sorted((group.width, group.reason or "") for group in lift(model).groups)
        for model in (found, export(net, (x,)))
    ]
    assert groups[0] == groups[1]


def test_a_pytorch_without_these_names_is_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "morphgraph.torch_io.quick", None)
    net, x = nn.Linear(3, 2), torch.randn(2, 3)
    assert translating._translate_quickly(net, Call((x,), {}), ["x"], 20) is None
    assert_same_function(net, export(net, (x,)), x)


def test_errors_of_the_network_are_told_as_ever() -> None:
    with pytest.raises(UnsupportedError, match="does not run on the example"):
        export(Convolutions(), (torch.randn(2, 4, 8, 8),))
