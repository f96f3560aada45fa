"""Constructs of many networks: each is shrunk, or it is said why not."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from morphgraph.onnx_io.runtime import run
from morphgraph.shrinking import ShrinkResult, shrink
from morphgraph.torch_io.export import export


def _module(path: str) -> ModuleType:
    place = Path(__file__).parents[2] / path
    spec = importlib.util.spec_from_file_location(f"networks_of_{place.stem}", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PEERS = _module("zoo/test_peers.py").NETWORKS


def require_finite(model: ir.Model, result: ShrinkResult, feeds: dict[str, np.ndarray]) -> None:
    onnx.checker.check_model(ir.to_proto(result.model), full_check=True)
    expected, found = run(model, feeds), run(result.model, feeds)
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert np.isfinite(found[name]).all()
    assert result.plan.cost["flops"].after <= 0.7 * result.plan.cost["flops"].before
    for check, before in zip(result.error, result.before, strict=True):
        assert check.error <= 1.05 * before.error + 1e-5


def require_shrunk(name: str) -> None:
    build, shape, _ = PEERS[name]
    torch.manual_seed(0)
    model = export(build().eval(), (torch.randn(shape),), dynamic_batch=True)
    data = np.random.default_rng(0).normal(size=(120, *shape[1:])).astype(np.float32)
    result = shrink(model, data, {"flops": "70%"}, threads=1)
    require_finite(model, result, {model.graph.inputs[0].name or "": data[:3]})


QUICK = ("4 groups feed 6", "heads by reshape", "NHWC permute", "transposed convolution")


@pytest.mark.parametrize("name", QUICK)
def test_some_constructs(name: str) -> None:
    require_shrunk(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in PEERS if name not in QUICK])
def test_all_constructs_of_peers(name: str) -> None:
    require_shrunk(name)
