"""The computation of a study: its dataset, its seed network, and the rows of its arms."""

import datetime as dt
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from arms import Arm, Row, Study
from graphs import drawing_of
from networks import NETWORKS
from peers import Slimming, bn_scale_pruned
from torch import nn

import morphgraph as mg
from morphgraph.graph import ChannelGraph
from morphgraph.options import Baseline
from morphgraph.plans import Plan
from morphgraph.recipes.baselines import baseline_plan
from morphgraph.recipes.data import Augmentation, Dataset, load_data
from morphgraph.recipes.trainer import Recipe, accuracy, train
from morphgraph.train.config import SearchConfig
from morphgraph.train.fixed_weight import FixedWeight
from morphgraph.train.loop import Iteration, rounds
from morphgraph.train.phases import NoPenalty, Penalty, ResumablePenalty


def seed_network(study: Study, dataset: Dataset) -> nn.Module:
    """The study's network before anything is trained or resized."""
    height, channels = dataset.preprocessing.size[0], len(dataset.preprocessing.mean)
    return NETWORKS[study.network].make(channels, len(dataset.classes), height)


def zero_image(dataset: Dataset) -> torch.Tensor:
    """An image of the dataset's size, ``[1, channels, height, width]``."""
    return torch.zeros(1, len(dataset.preprocessing.mean), *dataset.preprocessing.size)


def seed_graph(study: Study, dataset: Dataset) -> ChannelGraph:
    """The study's seed network, lifted."""
    torch.manual_seed(study.seed)
    net = seed_network(study, dataset).eval()
    return mg.lift(mg.export(net, (zero_image(dataset),)))


class Bench:
    """A study that is being computed: the dataset, the seed network, and what arms share."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.network = NETWORKS[study.network]
        self.dataset: Dataset = load_data(study.data)
        self.graph = seed_graph(study, self.dataset)
        height = self.dataset.preprocessing.size[0]
        flip = not Path(study.data).stem.startswith(("digits", "sounds"))
        self.recipe = Recipe(
            study.epochs,
            lr=self.network.lr,
            augmentation=Augmentation(crop=2 if height >= 16 else 1, flip=flip),
            bf16=self.network.bf16,
        )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._rounds: dict[Arm, list[tuple[Iteration, float]]] = {}

    def rows(self, arms: list[Arm]) -> Iterator[Row]:
        """The rows of some arms, one at a time."""
        for arm in arms:
            began = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = self._row(arm)
            yield {
                "key": self.study.key(arm),
                "study": self.study.title,
                "network": self.study.network,
                "data": Path(self.study.data).stem,
                "seed": self.study.seed,
                "arm": arm.name,
                "method": arm.method,
                "budget": arm.budget,
                "cost": arm.cost,
                **row,
                "seconds": round(time.perf_counter() - began, 1),
                "day": dt.date.today().isoformat(),
            }

    def _row(self, arm: Arm) -> Row:
        if arm.method == "seed":
            return self._measured(arm, mg.fresh(self.graph, self.study.seed), self.graph, {})
        model, told = self._structure(arm)
        return self._measured(arm, model, mg.lift(model), told)

    def _structure(self, arm: Arm) -> tuple[ir.Model, Row]:
        """The arm's network before its training, and what is to be told of how it was found."""
        if arm.method in ("morph", "fixed"):
            return self._morphed(arm)
        aim = SearchConfig({arm.cost: f"{arm.budget:g}%"}, round_to=1, min_width=arm.min_width)
        if arm.method == "bn":
            plan = bn_scale_pruned(
                self._slimmed, self.graph, zero_image(self.dataset), arm.budget / 100
            )
        else:
            scored = self.graph
            if arm.method == "l2":
                scored = mg.lift(mg.with_weights(self.graph.model, self._seed_net))
            found = baseline_plan(cast("Baseline", arm.method), scored, aim, self.study.seed)
            assert found is not None
            plan = found
        return self._applied(self.graph, plan, arm), {}

    def _applied(self, graph: ChannelGraph, plan: Plan, arm: Arm) -> ir.Model:
        if arm.weights == "keep":
            return mg.apply(graph, plan, verify=False, absorb=arm.absorb)
        return mg.apply(graph, plan, weights="fresh", seed=self.study.seed, verify=False)

    @cached_property
    def _seed_net(self) -> nn.Module:
        """The seed network, trained by the recipe."""
        net = self._module(mg.fresh(self.graph, self.study.seed))
        self.train(net, self.recipe, NoPenalty(), "train")
        return net

    @cached_property
    def _slimmed(self) -> nn.Module:
        """The seed network, trained with a penalty on its BatchNorm scales."""
        net = seed_network(self.study, self.dataset)
        net.load_state_dict(self._module(mg.fresh(self.graph, self.study.seed)).state_dict())
        self.train(net.to(self.device), self.recipe, Slimming(net), "train")
        return net.cpu()

    def _morphed(self, arm: Arm) -> tuple[ir.Model, Row]:
        if arm.method == "fixed":
            return self._by_hand(arm)
        found, seconds = self._iterations(arm)[-1]
        plan = found.grown
        if found.plan.request["morph"] != self._aim(arm).request()["morph"]:
            plan = mg.expand(
                found.graph,
                found.shrunk,
                {arm.cost: f"{arm.budget:g}%"},
                round_to=1,
                score=self._scores(found),
            )
        told = {
            "live": found.live / mg.cost(found.graph, arm.target or arm.cost).total,
            "aimed": found.target / mg.cost(found.graph, arm.target or arm.cost).total,
            "met": found.met,
            "trimmed": found.trimmed,
            "omega": plan.request.get("omega"),
            "shrink_seconds": round(seconds, 1),
        }
        trained = mg.lift(mg.with_weights(found.graph.model, found.net))
        return self._applied(trained, plan, arm), told

    def _scores(self, found: Iteration) -> np.ndarray[Any, np.dtype[np.float64]]:
        regularizer = mg.Regularizer(found.graph, found.net)
        return regularizer.strengths().detach().cpu().double().numpy()

    def _aim(self, arm: Arm) -> SearchConfig:
        return SearchConfig(
            {arm.cost: f"{arm.budget:g}%"},
            arm.target,
            arm.iterations,
            arm.shrink_to,
            round_to=1,
            min_width=arm.min_width,
            update=arm.update,
            relative=arm.relative,
        )

    def _iterations(self, arm: Arm) -> list[tuple[Iteration, float]]:
        """The rounds of shrinking; one round serves all budgets, since it shrinks to one share."""
        shared = replace(arm, weights="fresh", extra_epochs=0, absorb=False)
        if arm.iterations == 1:
            shared = replace(shared, budget=100.0, cost="flops", target=arm.target or arm.cost)
        if shared not in self._rounds:
            self._rounds[shared] = list(self._shrink(shared))
        return self._rounds[shared]

    def _shrink(self, arm: Arm) -> Iterator[tuple[Iteration, float]]:
        recipe = replace(self.recipe, epochs=self.study.shrink_epochs, constant=True)
        number = 0

        def fit(net: nn.Module, penalty: Penalty) -> None:
            nonlocal number
            number += 1
            self.train(net, recipe, cast("ResumablePenalty", penalty), f"shrink {number}")

        net = self._module(mg.fresh(self.graph, self.study.seed))
        began = time.perf_counter()
        for found in rounds(self.graph, net, fit, self._aim(arm), seed=self.study.seed):
            yield found, time.perf_counter() - began

    def _by_hand(self, arm: Arm) -> tuple[ir.Model, Row]:
        """A regularizer whose weight was set by hand, as in the paper; widths as they come."""
        net = self._module(mg.fresh(self.graph, self.study.seed))
        regularizer = mg.Regularizer(self.graph, net, arm.cost, threshold=arm.threshold)
        recipe = replace(self.recipe, epochs=self.study.shrink_epochs, constant=True)
        penalty = FixedWeight(regularizer, arm.weight, arm.update)
        self.train(net, recipe, penalty, "shrink 1")
        live = regularizer.live_share()
        budget = {arm.cost: f"{arm.budget:g}%"}
        plan = mg.expand(self.graph, regularizer.plan(), budget, round_to=1)
        return self._applied(self.graph, plan, arm), {"live": live, "omega": plan.request["omega"]}

    def _measured(self, arm: Arm, model: ir.Model, graph: ChannelGraph, told: Row) -> Row:
        """Train the arm's network, and say what it is worth."""
        began = time.perf_counter()
        epochs = self.recipe.epochs + arm.extra_epochs * self.study.shrink_epochs
        if arm == Arm("seed"):
            net = self._seed_net  # others take their scores from it
        else:
            net = self._module(model)
            self.train(net, replace(self.recipe, epochs=epochs), NoPenalty(), "train")
        seconds = time.perf_counter() - began
        costs = {kind: mg.cost(graph, kind).total for kind in ("macs", "params")}
        whole = {kind: mg.cost(self.graph, kind).total for kind in ("macs", "params")}
        return {
            "accuracy": accuracy(net, self.dataset),
            "macs": costs["macs"],
            "params": costs["params"],
            "macs_share": costs["macs"] / whole["macs"],
            "params_share": costs["params"] / whole["params"],
            "widths": {group.name: group.width for group in graph.groups if group.resizable},
            "epochs": epochs,
            "train_seconds": round(seconds, 1),
            **told,
            **({"drawing": vars(drawing_of(graph))} if arm.min_width == 0 else {}),
        }

    def _module(self, model: ir.Model) -> nn.Module:
        return mg.to_torch(model).to(self.device)

    def train(self, net: nn.Module, recipe: Recipe, penalty: ResumablePenalty, phase: str) -> None:
        """One phase of training; arms that name it alike see the same batches."""
        train(net, self.dataset, recipe, seed=self.study.seed, phase=phase, penalty=penalty)
