"""ONNX files, and modules with weights, that others made and ship in packages for Python."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx.version_converter
import onnx_ir as ir
import torch
from entry import File, Network
from torch import nn

import morphgraph as mg
from morphgraph.onnx_io import static_shape
from morphgraph.testing.random_weights import randomize_model_weights


def _package(name: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is not installed; `make zoo` installs it")
    return Path(spec.origin).parent


def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def light(name: str) -> File:
    """A light model of the package onnx: its weights are constant fills; random ones are put in.

    They are of opset 9, which onnx's own converter lifts. As files of IR version 3 do, they list
    every initializer as an input, too, which from version 4 on would mean a default value.
    """
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    old = onnx.load(folder / f"light_{name}.onnx")
    stored = {tensor.name for tensor in old.graph.initializer}
    inputs = [value for value in old.graph.input if value.name not in stored]
    del old.graph.input[:]
    old.graph.input.extend(inputs)
    old.ir_version = 4
    model = ir.from_proto(onnx.version_converter.convert_version(old, 13))
    value = next(v for v in model.graph.inputs if not v.is_initializer())
    feeds = {value.name or "": _noise(static_shape(value))}
    return File(randomize_model_weights(model, feeds), feeds)


def shipped(package: str, file: str, shape: tuple[int, ...]) -> File:
    """A file with its trained weights, at one size of its open input."""
    model: ir.Model = mg.load(_package(package) / "models" / file, {"x": shape})
    return File(model, {"x": _noise(shape)})


class _Cascade(nn.Module):
    """A stage of MTCNN; its results come in a plain tuple."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.net(x))


def facenet(name: str, size: int) -> Network:
    """A stage of MTCNN as facenet-pytorch ships it."""
    from facenet_pytorch.models import mtcnn

    noise = torch.from_numpy(_noise((1, 3, size, size)))
    return Network(_Cascade(getattr(mtcnn, name)(pretrained=True)), (noise,), trained=True)
