"""Whether half of the FLOPs is met with default arguments, whatever moves the parameters: a table.

    python tools/probe_optimizers.py DATA.npz                      # a quarter of an hour
    python tools/probe_optimizers.py DATA.npz --only SGD AdamW --nets cnn --seeds 1

`DATA.npz` has `x_train` and `y_train`, uint8 images NHWC of at least 16x16. Three networks learn
from it and from the text of this repository: a CNN with BatchNorm, a small vision transformer, and
an LSTM that says which letters of a lower-cased text were capital, or were followed by a space.
Columns: the worst run's distance from 50 %, in points, and what one channel costs there (nothing
can be closer than that to a budget that is not exceeded); the share of the phase at which it was
met; the loss before and after the phase, and that of the network as it was resized.

    python tools/probe_optimizers.py DATA.npz --drift --only "SGD, momentum" Adam Lion

Once a budget is met, what it has taken is set to zero with every control step only, and the
optimizer moves it until the next. The table is then of networks that are looked at one step before
a control step, where these are as far apart as they ever are: the largest difference from the
network that is resized there, as a share of its largest output; and the losses of both.
"""

import argparse
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm import optim as timm_optim
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim import lr_scheduler

import morphgraph as mg

STEPS = 240
Batch = tuple[Tensor, Tensor]


class Cnn(nn.Sequential):
    def __init__(self) -> None:
        widths, layers, before = (16, 24, 32, 48), [], 3
        for width, stride in zip(widths, (1, 2, 1, 2), strict=True):
            layers += [
                nn.Conv2d(before, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Vit(nn.Module):
    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        scores: Tensor = self.head(self.norm(tokens).mean(1))
        return scores


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 24)
        self.lstm = nn.LSTM(24, 48, batch_first=True, bidirectional=True)
        self.hidden, self.head = nn.Linear(96, 48), nn.Linear(48, 4)

    def forward(self, letters: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(letters))
        scores: Tensor = self.head(self.hidden(states).relu())
        return scores.transpose(1, 2)


class Data:
    """Batches for every network: images with labels, and letters with tags."""

    def __init__(self, path: Path) -> None:
        loaded = np.load(path, allow_pickle=False)
        chosen = np.random.default_rng(0).permutation(len(loaded["y_train"]))[:8192]
        images = loaded["x_train"][chosen, :16, :16].astype(np.float32).transpose(0, 3, 1, 2)
        self.images = torch.from_numpy((images - 118) / 62)
        self.labels = torch.from_numpy(loaded["y_train"][chosen].astype(np.int64))
        pages = Path(__file__).parent.parent.glob("docs/*.md")
        text = "".join(page.read_text(encoding="utf-8") for page in sorted(pages))
        self.text = torch.tensor([ord(letter) for letter in text if ord(letter) < 128])

    def batches(self, net: str, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            if net != "lstm":
                chosen = torch.randint(len(self.images), (32,), generator=generator)
                yield self.images[chosen], self.labels[chosen]
                continue
            begin = torch.randint(len(self.text) - 40, (24, 1), generator=generator)
            letters = self.text[begin + torch.arange(33)]
            capital = (letters >= 65) & (letters <= 90)
            space = letters[:, 1:] == 32
            lowered = torch.where(capital, letters + 32, letters)[:, :-1]
            yield lowered, capital[:, :-1].long() + 2 * space


class Sophia(optim.Optimizer):
    """Liu et al. 2023, with squares of gradients in the place of sampled curvature."""

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                mean = state.setdefault("mean", torch.zeros_like(p))
                curve = state.setdefault("curve", torch.zeros_like(p))
                mean.lerp_(p.grad, 0.035)
                curve.lerp_(p.grad.square(), 0.01)
                p.sub_(group["lr"] * (mean / (0.05 * 48 * curve + 1e-12)).clamp(-1, 1))


class ScheduleFree(optim.Optimizer):
    """Defazio et al. 2024 on top of AdamW: gradients at y, averages x, iterates z."""

    def __init__(self, parameters: Any, lr: float = 2.5e-3, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train": True})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            k, lr, beta = group["k"], group["lr"], group["beta"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                z = state.setdefault("z", p.detach().clone())
                square = state.setdefault("square", torch.zeros_like(p))
                square.lerp_(p.grad.square(), 0.001)
                pull = p.grad / ((square / (1 - 0.999**k)).sqrt() + 1e-8)
                p.lerp_(z, 1 / k)
                p.add_(pull, alpha=lr * (beta * (1 - 1 / k) - 1))
                z.sub_(pull, alpha=lr)

    @torch.no_grad()
    def turn(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train"] != train:
                share = 1 - group["beta"] if train else 1 - 1 / group["beta"]
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], share)
            group["train"] = train


def muon(net: nn.Module) -> list[optim.Optimizer]:
    """torch's, which takes matrices only; AdamW for the rest."""
    matrices = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() != 2]
    return [optim.Muon(matrices, lr=0.02, weight_decay=0.0), adamw(rest)]


def adamw(parameters: Any, lr: float = 1e-3) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def per_group(net: nn.Module) -> list[optim.Optimizer]:
    """A rate for every layer, falling towards the input, as in layer-wise decay."""
    parameters = list(net.parameters())
    rates = [2e-3 * 0.1 ** (1 - k / len(parameters)) for k in range(len(parameters))]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, rates, strict=True)]
    return [optim.AdamW(groups, weight_decay=0.0)]


def lbfgs(net: nn.Module) -> list[optim.Optimizer]:
    return [
        optim.LBFGS(
            net.parameters(), lr=0.5, max_iter=3, history_size=5, line_search_fn="strong_wolfe"
        )
    ]


Maker = Callable[[nn.Module], list[optim.Optimizer]]


def of(make: Callable[..., optim.Optimizer], **options: Any) -> Maker:
    return lambda net: [make(net.parameters(), **options)]


OPTIMIZERS: dict[str, Maker] = {
    "SGD": of(optim.SGD, lr=0.1),
    "SGD, momentum": of(optim.SGD, lr=0.03, momentum=0.9),
    "SGD, nesterov": of(optim.SGD, lr=0.03, momentum=0.9, nesterov=True),
    "Adam": of(optim.Adam),
    "AdamW": of(adamw),
    "AdamW, a rate per layer": per_group,
    "NAdam": of(optim.NAdam),
    "RAdam": of(optim.RAdam),
    "RMSprop": of(optim.RMSprop, lr=1e-3),
    "Adagrad": of(optim.Adagrad, lr=1e-2),
    "Adadelta": of(optim.Adadelta),
    "Adafactor": of(optim.Adafactor),
    "Muon + AdamW": muon,
    "Lion": of(timm_optim.Lion, lr=3e-4),
    "Sophia": of(Sophia),
    "schedule-free AdamW": of(ScheduleFree),
    "LAMB": of(timm_optim.Lamb, lr=5e-3),
    "LARS": of(timm_optim.Lars, lr=0.3, momentum=0.9, trust_coeff=0.02),
    "LBFGS": lbfgs,
}

Scheduled = Callable[[optim.Optimizer], Any]
SCHEDULES: dict[str, Scheduled | None] = {
    "constant": None,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 4 * o.param_groups[0]["lr"], STEPS),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, STEPS // 6, 2),
    "warm-up": lambda o: lr_scheduler.LinearLR(o, 0.01, total_iters=STEPS // 4),
    "steps": lambda o: lr_scheduler.MultiStepLR(o, [STEPS // 3, 2 * STEPS // 3]),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=15, factor=0.3),
}


@dataclass(frozen=True)
class Run:
    """Shares are of the FLOPs, of the phase where ``met`` is."""

    share: float
    channel: float
    met: float
    losses: tuple[float, float, float]
    narrowest: float
    warned: tuple[str, ...]


def made(net: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    kinds: dict[str, Callable[[], nn.Module]] = {"cnn": Cnn, "vit": Vit, "lstm": Tagger}
    return kinds[net]()


def run(net_name: str, seed: int, make: Maker, schedule: Scheduled | None, data: Data) -> Run:
    net = made(net_name, seed)
    batches = data.batches(net_name, seed)
    example = next(batches)[0][:2]
    graph = mg.lift(mg.export(net, (example,)))
    held = [next(data.batches(net_name, 1000 + seed)) for _ in range(4)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reg = mg.Regularizer(graph, net)
        optimizers = make(net)
        budget = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(*optimizers)
        schedules = [schedule(each) for each in optimizers] if schedule else []
        before, met = loss_on(net, held), math.inf
        net.train()
        for step in range(STEPS):
            loss = train(net, optimizers, next(batches))
            for each in schedules:
                plateau = isinstance(each, lr_scheduler.ReduceLROnPlateau)
                each.step(loss) if plateau else each.step()
            met = min(met, step / STEPS) if budget.met else met
        for each in optimizers:
            if isinstance(each, ScheduleFree):
                each.turn(train=False)
        plan = reg.plan()
        small = mg.to_torch(mg.apply(graph, plan, weights=net, verify=False))
    widths = plan.widths(graph)
    return Run(
        budget.share,
        cheapest(reg),
        met,
        (before, loss_on(net, held), loss_on(small, held)),
        min(widths[g.index] / g.width for g in graph.groups if g.resizable),
        tuple(str(each.message).split(":")[0][:90] for each in caught),
    )


FURTHEST = {"cnn": 4, "vit": 8, "lstm": 8}
"""Steps between control steps of long phases: more where kernels are measured."""


def drift(net_name: str, seed: int, make: Maker, data: Data) -> tuple[float, float, float]:
    """The largest difference as a share, the loss in training, and that of the resized network."""
    net = made(net_name, seed)
    batches = data.batches(net_name, seed)
    graph = mg.lift(mg.export(net, (next(batches)[0][:2],)))
    held = [next(data.batches(net_name, 1000 + seed)) for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reg = mg.Regularizer(graph, net)
        optimizers = make(net)
        budget = mg.Budget(reg, {"flops": "50%"}, STEPS, interval=FURTHEST[net_name])
        budget.attach(*optimizers)
        net.train()
        for _ in range(STEPS - 1):
            train(net, optimizers, next(batches))
        if not budget.met:
            raise SystemExit(f"{net_name}, seed {seed}: the budget is not met")
        moved = copy.deepcopy(net).eval()
        small = mg.to_torch(mg.apply(graph, reg.plan(), weights=net, verify=False)).eval()
    with torch.no_grad():
        found = torch.cat([moved(x) for x, _ in held])
        wanted = torch.cat([small(x) for x, _ in held])
    off = float((found - wanted).abs().max() / wanted.abs().max())
    return off, loss_on(moved, held), loss_on(small, held)


def train(net: nn.Module, optimizers: list[optim.Optimizer], batch: Batch) -> float:
    inputs, labels = batch

    def closure() -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(net(inputs), labels)
        torch.autograd.backward(loss)
        return loss

    if isinstance(optimizers[0], optim.LBFGS):
        return float(cast("Any", optimizers[0]).step(closure))
    loss = closure()
    for optimizer in optimizers:
        optimizer.step()
    return float(loss)


@torch.no_grad()
def loss_on(net: nn.Module, batches: list[Batch]) -> float:
    net.eval()
    return float(np.mean([float(F.cross_entropy(net(x), y)) for x, y in batches]))


def cheapest(reg: mg.Regularizer) -> float:
    """What the cheapest channel that may come back costs, as a share."""
    live = reg.live_widths()
    prices = reg.cost.marginals(live)
    able = [prices[g.index] for g in reg.graph.groups if g.resizable and live[g.index] < g.width]
    return float(min(able, default=0.0)) / reg.initial_cost


def row(name: str, net: str, runs: list[Run]) -> str:
    far = max(runs, key=lambda each: abs(each.share - 0.5))
    off, one = 100 * (far.share - 0.5), 100 * far.channel
    ok = -1 - one <= off <= 0
    met = " ".join("never" if each.met > 1 else f"{each.met:.2f}" for each in runs)
    losses = [np.mean([each.losses[k] for each in runs]) for k in range(3)]
    said = " ".join(f"{loss:.2f}" for loss in losses)
    narrow = min(each.narrowest for each in runs)
    return (
        f"| {name} | {net} | {off:+.2f} | {one:.2f} | {'' if ok else 'OUT'} | {met} | {said} | "
        f"{narrow:.2f} |"
    )


def print_drift(arguments: argparse.Namespace, data: Data) -> None:
    print("| optimizer | network | off, at most | loss in training | resized |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name in arguments.only or OPTIMIZERS:
        for net in arguments.nets:
            make, seeds = OPTIMIZERS[name], range(arguments.seeds)
            off, before, after = max(drift(net, seed, make, data) for seed in seeds)
            print(f"| {name} | {net} | {off:.2%} | {before:.4f} | {after:.4f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", help="optimizers and schedules", metavar="NAME")
    parser.add_argument("--nets", nargs="+", default=("cnn", "vit", "lstm"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drift", action="store_true", help="between two control steps")
    parser.add_argument("-v", action="store_true", help="print what is warned of")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = Data(arguments.data)
    if arguments.drift:
        print_drift(arguments, data)
        return
    cases: list[tuple[str, Maker, Scheduled | None]] = [
        *((name, make, None) for name, make in OPTIMIZERS.items()),
        *(
            (f"{name}, {kind}", OPTIMIZERS[name], schedule)
            for name in ("SGD, momentum", "AdamW")
            for kind, schedule in SCHEDULES.items()
            if schedule
        ),
    ]
    print("| optimizer | network | off, points | a channel |  | met at | losses | narrowest |")
    print("| --- | --- | ---: | ---: | --- | --- | --- | ---: |")
    for name, make, schedule in cases:
        if arguments.only and name not in arguments.only:
            continue
        for net in arguments.nets:
            begin = time.perf_counter()
            runs = [run(net, seed, make, schedule, data) for seed in range(arguments.seeds)]
            print(row(name, net, runs), flush=True)
            if arguments.v:
                print(
                    f"{time.perf_counter() - begin:.0f} s",
                    *{w for r in runs for w in r.warned},
                    sep="\n    ",
                )


if __name__ == "__main__":
    main()
