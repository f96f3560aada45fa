"""What ``test_distributed.py`` looks at in each of two processes; ``torchrun`` starts this file.

Every check is a function; what it returns goes to ``FOLDER/RANK.json`` under its name.
"""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from test_regularizer import concat_network, morphnet  # type: ignore[import-not-found]
from torch import Tensor, distributed as dist, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import morphgraph as mg
from morphgraph import cli
from morphgraph.errors import BudgetError, MorphError
from morphgraph.onnx_io.runtime import run
from morphgraph.recipes.norms import synchronized
from morphgraph.testing.examples import residual_cnn
from morphgraph.train import distributed
from morphgraph.train.phases import NoPenalty, Penalty
from morphgraph.train.sources import whole

PARTS = (5, 3)  # images of either process


def batch() -> Tensor:
    """``[8, 4, 3, 3]``, channels with very different means."""
    generator = torch.Generator().manual_seed(0)
    offset = torch.tensor([0.0, 1.0, 100.0, -5.0]).reshape(1, 4, 1, 1)
    return torch.randn((8, 4, 3, 3), generator=generator, dtype=torch.float64) + offset


def norm() -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(4).double()
    with torch.no_grad():
        made.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        made.bias.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    return made


def statistics(norm: nn.BatchNorm2d, x: Tensor) -> dict[str, Any]:
    """What one training step gives and leaves: outputs, gradients, running statistics."""
    y = norm(x)
    (y.square() * x.detach().cos()).sum().backward()
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert x.grad is not None
    return {
        "y": y.tolist(),
        "x": x.grad.tolist(),
        "weight": norm.weight.grad.tolist(),
        "bias": norm.bias.grad.tolist(),
        "mean": norm.running_mean.tolist(),
        "var": norm.running_var.tolist(),
    }


def batch_norm() -> dict[str, Any]:
    """A batch in two parts, of unequal size."""
    start = sum(PARTS[: distributed.rank()])
    x = batch()[start : start + PARTS[distributed.rank()]].clone().requires_grad_()
    module = norm()
    with synchronized(module):
        found = statistics(module, x)
        still = module.eval()(x)
    assert "forward" not in vars(module)
    return found | {"eval": bool(torch.equal(still, module(x)))}


def oracle() -> dict[str, Any]:
    """Oracle O1 through DistributedDataParallel: value and gradient."""
    net, graph = concat_network()
    wrapped = DistributedDataParallel(net)
    found: dict[str, Any] = {}
    for kind in ("flops", "params"):
        wrapped.zero_grad()
        reg = morphnet(graph, wrapped, kind, threshold=0.45)
        outputs = wrapped(torch.ones(1, 3, 17, 19) * distributed.rank())
        value = reg.value()
        (value + sum(0.0 * y.sum() for y in outputs)).backward()
        gradients = {
            name: p.grad.tolist()
            for name, p in net.named_parameters()
            if name.endswith("bn.weight") and p.grad is not None
        }
        found[kind] = {"value": value.item(), "cost": reg.live_cost(), "gradients": gradients}
    return found


def decisions() -> dict[str, Any]:
    """What is decided by the first process, its errors, its state; and what must be equal."""
    said = distributed.from_first(lambda: f"made by {distributed.rank()}")

    def refuse() -> None:
        raise BudgetError("too little")

    try:
        distributed.from_first(refuse)
        error = ""
    except BudgetError as raised:
        error = str(raised)
    try:
        distributed.require_equal("data", f"those of {distributed.rank()}")
        refused = ""
    except MorphError as raised:
        refused = str(raised)
    distributed.require_equal("data", "the same")
    net = nn.Conv2d(2, 2, 3).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(float(distributed.rank() + 1))
    distributed.broadcast_state(net, NoPenalty())
    weights = {float(w) for p in net.parameters() for w in p.flatten()}
    return {"said": said, "error": error, "refused": refused, "weights": sorted(weights)}


def fit(net: nn.Module, penalty: Penalty) -> None:
    """A user's own training under DistributedDataParallel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((16, 1, 8, 8), generator=generator, dtype=torch.float64)
    labels = torch.arange(16) % 10
    own = distributed.own_share(16)
    net.train()
    wrapped = distributed.shared(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    penalty.begin(100)
    with synchronized(net):
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(images[own]), labels[own]).backward()
            optimizer.step()
            penalty.step(0.05 / (1 - 0.9))


def own_loop() -> dict[str, Any]:
    """``mg.morph`` around a user's ``fit``."""
    torch.manual_seed(0)
    net = residual_cnn((6, 8)).double()
    example = (torch.zeros(2, 1, 8, 8, dtype=torch.float64),)
    result = mg.morph(net, example, fit, budget={"flops": "60%"})
    weights = {name: t.tolist() for name, t in result.net.state_dict().items() if t.dim() == 1}
    return {"plan": result.plan.to_json().decode(), "weights": weights}


def sharded() -> dict[str, Any]:
    """``fully_shard``, before or after the regularizer is made, against one process alone."""
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(16) % 10
    found: dict[str, Any] = {}
    for way in ("alone", "before", "after"):
        torch.manual_seed(0)
        net = residual_cnn((6, 8)).double()
        graph = mg.lift(mg.export(net, (images[:2],)))
        if way == "after":
            fully_shard(net)
        reg = mg.Regularizer(graph, net)
        if way == "before":
            fully_shard(net)
        optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-3, weight_decay=0)
        budget = mg.Budget(reg, {"flops": "60%"}, 80)
        if distributed.is_first() or way != "alone":
            budget.attach(optimizer)
            for _ in range(80):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(images), labels).backward()
                optimizer.step()
            found[way] = {"met": budget.met, "share": budget.share, "widths": widths_of(reg)}
    return found


class Biased(nn.Sequential):
    """Biases behind kernels, which leave a constant of a channel that is dead.

    ONNX Runtime has kernels in double precision for all of it.
    """

    def __init__(self) -> None:
        layers = [nn.Linear(64, 24), nn.Sigmoid(), nn.Linear(24, 16), nn.Sigmoid()]
        super().__init__(nn.Flatten(), *layers, nn.Linear(16, 10))


def settled() -> dict[str, Any]:
    """``fully_shard`` beyond the step at which a budget is met: nobody reads what it has taken."""
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(16) % 10
    found: dict[str, Any] = {}
    for way in ("alone", "shared"):
        if way == "alone" and not distributed.is_first():
            continue
        torch.manual_seed(0)
        net = Biased().double()
        graph = mg.lift(mg.export(net, (images[:2],)))
        reg = mg.Regularizer(graph, net)
        if way == "shared":
            fully_shard(net)
        optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-2, weight_decay=0)
        budget = mg.Budget(reg, {"flops": "50%"}, 80).attach(optimizer)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        plan = reg.plan()
        weights = {name: whole(tensor).detach() for name, tensor in net.state_dict().items()}
        small = mg.apply(graph, plan, weights=weights)
        (got,) = run(small, {small.graph.inputs[0].name or "": images[:2].numpy()}).values()
        wanted = net.eval()(images[:2]).detach().numpy()
        found[way] = {
            "met": budget.met,
            "plan": plan.to_json().decode(),
            "off": float(abs(got - wanted).max() / abs(wanted).max()),
            "answers": wanted.tolist(),
        }
    return found


class Alone(nn.Module):
    """Norms that look at one image alone, so that a batch may be shared out; and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(1, 16, 3, bias=False), nn.InstanceNorm2d(16, affine=True)
        self.two, self.second = nn.Conv2d(16, 24, 3, bias=False), nn.InstanceNorm2d(24, affine=True)
        self.hidden, self.last = nn.Linear(24, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.two(self.first(self.one(x)).relu())).relu().mean((2, 3))
        scores: Tensor = self.last(nn.functional.gelu(self.hidden(y)))
        return scores


def attached() -> dict[str, Any]:
    """``attach`` under DistributedDataParallel, against one process with the whole batch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(16) % 4
    images = torch.randn(4, 1, 8, 8, generator=generator).double()[labels]
    images += torch.randn(16, 1, 8, 8, generator=generator).double()
    own = slice(distributed.rank(), None, distributed.size())
    found: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        for way in ("alone", "shared"):
            torch.manual_seed(0)
            net = Alone().double()
            graph = mg.lift(mg.export(net, (images[:2],)))
            part = own if way == "shared" else slice(None)
            called = DistributedDataParallel(net) if way == "shared" else net
            reg = mg.Regularizer(graph, called)
            optimizer = make(called.train().parameters())
            budget = mg.Budget(reg, {"flops": "60%"}, 80).attach(optimizer)
            for _ in range(80):
                optimizer.zero_grad()
                nn.functional.cross_entropy(called(images[part]), labels[part]).backward()
                optimizer.step()
            last = net.last.weight.detach().flatten().tolist()
            seen = {"met": budget.met, "share": budget.share, "widths": widths_of(reg)}
            found[f"{name} {way}"] = seen | {"weights": last, "plan": reg.plan().to_json().decode()}
    return found


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0),
}


def widths_of(reg: mg.Regularizer) -> list[int]:
    return [int(width) for width in reg.plan().widths(reg.graph)]


def refusal() -> dict[str, Any]:
    """A command line that cannot be: its exit code, and what it says."""
    task = Path(sys.argv[2])
    line = ["morph", str(task / "single.onnx"), "--data", str(task / "data.npz"), "-o", "run"]
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = cli.main([*line, "--budget", "flops=0.1%"])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


CHECKS: tuple[Callable[[], dict[str, Any]], ...] = (
    batch_norm,
    oracle,
    decisions,
    own_loop,
    attached,
    sharded,
    settled,
    refusal,
)


def main(folder: Path) -> None:
    with distributed.launched():
        assert distributed.size() == 2
        found = {check.__name__: check() for check in CHECKS}
        (folder / f"{distributed.rank()}.json").write_text(json.dumps(found), encoding="utf-8")
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
