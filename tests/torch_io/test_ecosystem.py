"""What PyTorch does with networks of its own it does with a resized one that was loaded back."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

import morphgraph as mg
from morphgraph.testing import randomize_weights


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.norm = nn.BatchNorm2d(16, momentum=0.2)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.body(x)))
        return self.head(self.drop(x.mean((2, 3))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop1, self.drop2 = nn.Dropout(0.1), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        sizes = batch, length, 3, self.heads, width // self.heads
        q, k, v = self.qkv(self.norm1(x)).reshape(sizes).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-2, -1) * sizes[-1] ** -0.5, -1)
        mixed = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.drop1(self.out(mixed))
        return x + self.drop2(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.position = nn.Parameter(torch.randn(1, 5, 32))
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embed(x) + self.position).mean(1))


SHAPES: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    Convolutions: (3, 8, 8),
    Transformer: (5, 6),
}


def images(kind: Callable[[], nn.Module], batch: int) -> torch.Tensor:
    return torch.randn(batch, *SHAPES[kind], generator=torch.Generator().manual_seed(batch))


@cache
def original_of(kind: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize_weights(kind(), images(kind, 1))


@cache
def exported(kind: Callable[[], nn.Module]) -> ir.Model:
    return mg.export(original_of(kind), images(kind, 1))


@cache
def resized_of(kind: Callable[[], nn.Module]) -> nn.Module:
    graph = mg.lift(exported(kind))
    return mg.to_torch(mg.apply(graph, mg.plan(graph, budget={"flops": "50%"})))


@pytest.fixture(params=SHAPES, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


@pytest.fixture
def resized(kind: Callable[[], nn.Module]) -> nn.Module:
    return resized_of(kind)


def gradients(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    net.zero_grad()
    net(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_training_is_that_of_the_original(kind: Callable[[], nn.Module]) -> None:
    """Dropout drops the same, BatchNorm takes the same statistics, and the gradients agree."""
    original = original_of(kind)
    theirs = deepcopy(original).train()
    ours = mg.to_torch(exported(kind)).train()
    for step in range(3):
        x = images(kind, 4 + step)
        torch.manual_seed(step)
        expected = gradients(theirs, x)
        torch.manual_seed(step)
        assert_close(gradients(ours, x), expected)
    statistics = running(theirs)
    assert_close(running(ours), statistics)
    assert all(not torch.equal(running(original)[name], new) for name, new in statistics.items())
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def running(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b for name, b in net.named_buffers() if ".running_" in name}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(kind: Callable[[], nn.Module], resized: nn.Module, backend: str) -> None:
    torch._dynamo.reset()
    x = images(kind, 4)
    compiled: Any = torch.compile(deepcopy(resized), backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), resized(x))
    found = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, x).items()}
    assert_close(found, gradients(resized, x))


def test_export(kind: Callable[[], nn.Module], resized: nn.Module) -> None:
    program = torch.export.export(
        resized, (images(kind, 2),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    assert set(program.graph_signature.parameters) == {n for n, _ in resized.named_parameters()}
    for batch in (1, 3):
        x = images(kind, batch)
        torch.testing.assert_close(program.module()(x), resized(x))


WORKER = """
import sys
import torch
from torch.nn.parallel import DistributedDataParallel

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
)
results = []
for net, x in torch.load(f"{folder}/jobs.pt", weights_only=False):
    parallel = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    parallel(x.chunk(2)[rank]).square().mean().backward()
    optimizer.step()
    results.append({name: p.detach() for name, p in net.named_parameters()})
torch.save(results, f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.long
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """One step on half of the batch each is the step on the whole of it."""
    jobs = [(resized_of(kind), images(kind, 6)) for kind in SHAPES]
    torch.save(jobs, tmp_path / "jobs.pt")
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)])
        for rank in (0, 1)
    ]
    assert [worker.wait(timeout=100) for worker in workers] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for k, (net, x) in enumerate(jobs):
        alone = deepcopy(net)
        alone(x).square().mean().backward()
        torch.optim.SGD(alone.parameters(), lr=0.1).step()
        expected = {name: p.detach() for name, p in alone.named_parameters()}
        before = dict(net.named_parameters())
        assert any(not torch.allclose(before[name], p, atol=1e-3) for name, p in expected.items())
        for parameters in found:
            assert_close(parameters[k], expected)
