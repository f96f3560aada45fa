"""What is asked wrongly of a training gets one line that says what to do."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import morphgraph as mg
from morphgraph.errors import ArgumentError, BudgetError, ModelError, MorphWarning, UnsupportedError
from morphgraph.integrations.phase import ShrinkPhase
from tests.train.test_optimizers import OPTIMIZERS, STEPS, batch, made, train


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = net, nn.Linear(2, 2)


def budget(amounts: Any = None, steps: Any = 50, **options: Any) -> mg.Budget:
    return mg.Budget(made()[1], {"flops": "50%"} if amounts is None else amounts, steps, **options)


def regularizer(net: Any = None, graph: Any = None, **options: Any) -> mg.Regularizer:
    own, reg = made()
    return mg.Regularizer(graph or reg.graph, net or own, **options)


def wrapped() -> mg.Regularizer:
    return regularizer(Wrapped(made()[0]))


def part() -> mg.Regularizer:
    """The graph is of the whole, the module a part of it."""
    whole = Wrapped(made()[0])
    whole.forward = lambda x: whole.model(x)
    graph = mg.lift(mg.export(whole, (torch.rand(2, 2, 6, 6),)))
    return mg.Regularizer(graph, whole.model)


def floored() -> mg.Budget:
    return mg.Budget(made(floors={"*": "90%"})[1], {"flops": "50%"}, 50)


def excluded() -> mg.Budget:
    return mg.Budget(made(exclude=["*"])[1], {"flops": "50%"}, 50)


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "fraction": (BudgetError, "for a share write flops=50%", lambda: budget({"flops": 0.5})),
    "per cent": (BudgetError, "for a share write flops=50%", lambda: budget({"flops": "50"})),
    "below the lowest": (BudgetError, r"narrowest .* 0.2%", lambda: budget({"flops": "0.1%"})),
    "floors": (
        BudgetError,
        "82.8% .*, or lower the floors. It is held by '3' with 76.9% .29 is the least",
        floored,
    ),
    "exclude": (
        BudgetError,
        "100.0% .*, or exclude less. It is held by '3' with 93.5% .left alone by",
        excluded,
    ),
    "text": (ArgumentError, r"write one such as \{'flops'", lambda: budget("flops=50%")),
    "number": (ArgumentError, r"0.5 is no budget; write", lambda: budget(0.5)),
    "empty": (ArgumentError, "no budget is given", lambda: budget({})),
    "half a step": (ArgumentError, "steps=50.5: .* whole number", lambda: budget(steps=50.5)),
    "steps in words": (ArgumentError, "steps='50': .* whole number", lambda: budget(steps="50")),
    "turned round": (ArgumentError, "0 <= start < end", lambda: budget(start=0.8, end=0.2)),
    "interval": (ArgumentError, "interval=0: give", lambda: budget(interval=0)),
    "update": (ArgumentError, "did you mean 'proximal'", lambda: budget(update="proximl")),
    "length": (ArgumentError, "lr=-1.0: give the length", lambda: budget().step(lr=-1.0)),
    "a net": (
        ArgumentError,
        "a Sequential is no mg.Regularizer",
        lambda: mg.Budget(made()[0], {"flops": "50%"}, 50),  # type: ignore[arg-type]
    ),
    "a model": (
        ArgumentError,
        "a Model, no lifted network; give mg.lift",
        lambda: regularizer(graph=made()[1].graph.model),
    ),
    "a state_dict": (
        ArgumentError,
        "a OrderedDict; give the torch.nn.Module",
        lambda: regularizer(made()[0].state_dict()),
    ),
    "strength": (ArgumentError, "use one of auto, bn", lambda: regularizer(strength="gamma")),
    "tied": (ArgumentError, "use one of max, l2", lambda: regularizer(tied="sum")),
    "a wrapper": (ModelError, "has 'model.1.weight': give the part of it at 'model'", wrapped),
    "a part": (ModelError, "has '1.weight': give the whole that was exported", part),
    "option": (
        ArgumentError,
        r"excludes= is no option of Regularizer \(did you mean 'exclude' or 'include'\?\)",
        lambda: ShrinkPhase(made()[1].graph, {"flops": "50%"}, excludes=["a"]),
    ),
    "no state": (
        ArgumentError,
        "no state of a budget: it has NoneType, and no paces",
        lambda: budget().load_state_dict(None),  # type: ignore[arg-type]
    ),
    "an optimizer's state": (
        ArgumentError,
        "it has state, param_groups, and no paces, .*; give what budget.state_dict",
        lambda: budget().load_state_dict(OPTIMIZERS["SGD"](made()[0].parameters()).state_dict()),
    ),
    "of a framework": (
        ArgumentError,
        "it has epoch, and no paces",
        lambda: ShrinkPhase(made()[1].graph, {"flops": "50%"}).load_state_dict({"epoch": 1}),
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_is_refused_in_one_line(name: str) -> None:
    kind, said, ask = REFUSED[name]
    with pytest.raises(kind, match=said) as caught:
        ask()
    assert "\n" not in str(caught.value)


def test_a_part_of_a_state_is_refused() -> None:
    state = dict(budget().state_dict())
    del state["motion"]
    with pytest.raises(
        ArgumentError, match=r"no part of the state of a budget: .* no motion; give"
    ):
        budget().load_state_dict(state)


def test_a_phase_of_whole_steps_may_be_a_float() -> None:
    assert budget(steps=50.0).steps == 50


def test_a_network_that_is_resized_in_place_needs_a_regularizer_of_its_own() -> None:
    net, reg = made()
    begun = mg.Budget(reg, {"flops": "50%"}, STEPS)
    mg.resize_module(net, reg.graph, mg.uniform(reg.graph, 0.5))
    with pytest.raises(ModelError, match="has another shape; make the regularizer anew"):
        begun.attach(OPTIMIZERS["SGD"](net.parameters()))


def test_a_second_budget_beside_the_first_is_told() -> None:
    """As of a cell of a notebook that is run again; not one that was detached."""
    net, reg = made()
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    first = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    with pytest.warns(MorphWarning, match="another budget is attached to this SGD"):
        mg.Budget(mg.Regularizer(reg.graph, net), {"flops": "50%"}, STEPS).attach(optimizer)
    other = OPTIMIZERS["SGD"](net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", MorphWarning)
        first.attach(other)
        first.detach()
        mg.Budget(reg, {"flops": "50%"}, STEPS).attach(other)


def test_no_plan_is_made_of_what_diverged_after_the_budget_was_met() -> None:
    net, reg = made()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    met = mg.Budget(reg, {"flops": "100%"}, STEPS).attach(optimizer)
    assert met.met
    before = copy.deepcopy(reg.plan())
    images, labels = batch(0)
    F.cross_entropy(net(images * torch.nan), labels).backward()
    optimizer.step()
    assert before is not None
    with pytest.raises(UnsupportedError, match="the training has diverged: the weights"):
        reg.plan()
    net, reg = made()
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    met = mg.Budget(reg, {"flops": "50%"}, STEPS).attach(optimizer)
    train(net, optimizer)
    assert met.met
    assert reg.plan().groups
