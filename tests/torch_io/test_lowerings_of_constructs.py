"""Every network in which a form of an operator is tested becomes one of PyTorch.

The networks are those by which the descriptions are tested, so that a form that is described has a
lowering, too, or is refused by name, as the reference says.
"""

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

import morphgraph as mg
from morphgraph.onnx_io import runtime as ort
from morphgraph.ops import Op, described_ops, entry_of
from morphgraph.ops.barriers import Barrier
from morphgraph.testing import model_from_text

FOLDER = Path(__file__).parents[1] / "passes"
STORED = 0.05  # of the largest result: one step of 8 bits, where a number stood between two


def _models() -> Iterator[tuple[str, str]]:
    for path in sorted(FOLDER.glob("test_constructs*.py")):
        module = import_module(f"tests.passes.{path.stem}")
        for name, network in module.NETWORKS.items():
            text = network[0]
            head = "" if text.lstrip().startswith("<") else getattr(module, "OPSET", "")
            yield f"{path.stem.removeprefix('test_')}: {name}", head + text


MODELS = dict(_models())
BARE = "com.microsoft::DynamicQuantizeLSTM"  # of numbers that are quantized at every step
REFUSED = {"constructs_contrib: DynamicQuantizeLSTM"} | {
    f"constructs_contrib_attention: {name}"
    for name in (
        *("lengths", "starts and ends", "padding for every query"),
        *("packed kernels, lengths", "packed kernels, past"),
    )
}
REFERENCE = Path(__file__).parents[2] / "docs" / "reference.md"


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_a_network_by_which_forms_are_tested_becomes_one_of_torch(name: str) -> None:
    model = mg.lift(model_from_text(MODELS[name])).model
    feeds = ort.random_inputs(model)
    found = mg.to_torch(model)(*map(torch.from_numpy, feeds.values()))
    results = found if isinstance(found, tuple) else (found,)
    types = {value.dtype for node in model.graph for value in node.outputs}
    stored = not types.isdisjoint({ir.DataType.UINT8, ir.DataType.INT8})
    for one, other in zip(results, ort.run(model, feeds).values(), strict=True):
        limit = (STORED if stored else 1e-5) * np.abs(other).max()
        np.testing.assert_allclose(one.detach().numpy(), other, rtol=0, atol=limit)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_form_without_a_lowering_is_refused_as_the_reference_says(name: str) -> None:
    model = mg.lift(model_from_text(MODELS[name])).model
    with pytest.raises(mg.UnsupportedError, match="node '") as refused:
        mg.to_torch(model)
    said = re.search(r": (\w+) to PyTorch: (.+?);", str(refused.value))
    assert said is not None
    operator, reason = said.groups()
    rows = [line for line in REFERENCE.read_text("utf-8").splitlines() if line.startswith("| ")]
    assert any(
        f"com.microsoft::{operator}" in row.split("|")[1] and reason in row.split("|")[2]
        for row in rows
    )


def test_the_registry_has_a_lowering_of_all_but_barriers() -> None:
    """Whatever is described beside them, and be it in a form of its own, can be trained."""
    entries = {
        name: entry_of(name.rpartition("::")[2], name.rpartition("::")[0])
        for name in described_ops()
        if "com.acme" not in name
    }
    without = {name for name, entry in entries.items() if entry is None or entry.lower is None}
    barriers = {name for name, entry in entries.items() if issubclass(entry or Op, Barrier)}
    assert without == barriers | {BARE}
