"""What every way of a run shares: train a network, write it, measure it, end with a result."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import fx, nn

from morphgraph.calibration import Samples
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io import PREPROCESSING_KEY
from morphgraph.passes.analysis.cost import cost
from morphgraph.passes.lift import lift
from morphgraph.plans import Change
from morphgraph.recipes.checkpoint import seed_of
from morphgraph.recipes.data import Dataset
from morphgraph.recipes.folder import RunFolder, SecondaryRunFolder
from morphgraph.recipes.progress import Progress
from morphgraph.recipes.results import Arm, IterationResult, Member, Result
from morphgraph.recipes.settings import Settings, planned_work
from morphgraph.recipes.trainer import Epoch, Recipe, accuracy, train
from morphgraph.torch_io.to_torch import flat_network
from morphgraph.torch_io.weights import with_weights
from morphgraph.train import distributed
from morphgraph.train.phases import NoPenalty, ResumablePenalty

CLASSES_KEY = "morphgraph.classes"


@dataclass
class Work:
    """A run at work.

    Args:
        graph: the lifted original.
        dataset: its images.
        settings: how.
        folder: where everything is written.
        device: where networks are trained.
    """

    graph: ChannelGraph
    dataset: Dataset
    settings: Settings
    folder: RunFolder | SecondaryRunFolder
    device: torch.device

    def __post_init__(self) -> None:
        self.progress = Progress(planned_work(self.graph, self.settings))

    def to_torch(self, model: ir.Model) -> fx.GraphModule:
        """A module of the model on the device of the run."""
        net: fx.GraphModule = flat_network(model).to(self.device)
        return net

    def train(
        self, phase: str, net: nn.Module, recipe: Recipe, penalty: ResumablePenalty | None = None
    ) -> None:
        """Train in place by a recipe; resumed from the checkpoint of the phase, logged by epoch."""
        self.folder.log("phase", phase=phase, epochs=recipe.epochs)

        def tell(epoch: Epoch) -> None:
            seconds = self.progress.remaining(phase, epoch.number, epoch.seconds)
            self.folder.log("epoch", phase=phase, **asdict(epoch), left=round(seconds, 1))

        train(
            net,
            self.dataset,
            recipe,
            seed=self.settings.seed,
            phase=phase,
            penalty=penalty or NoPenalty(),
            on_epoch=tell,
            checkpoint=self.folder.checkpoint(phase),
        )
        self.progress.finish(phase)

    def save(self, model: ir.Model, name: str) -> None:
        """Write a model that says what images it takes."""
        preprocessing = asdict(self.dataset.preprocessing)
        model.metadata_props[PREPROCESSING_KEY] = json.dumps(preprocessing)
        model.metadata_props[CLASSES_KEY] = json.dumps(self.dataset.classes)
        self.folder.save(model, name)

    def arm(self, name: str, model: ir.Model, net: fx.GraphModule, epochs: int) -> Arm:
        """Write a trained network, and measure it."""
        trained = with_weights(model, net)
        self.save(trained, f"{name}.onnx")
        graph = lift(trained, **self.graph.options.arguments())
        arm = Arm(
            accuracy=accuracy(net, self.dataset),
            macs=cost(graph, "macs").total,
            params=cost(graph, "params").total,
            epochs=epochs,
            file=f"{name}.onnx",
        )
        self.folder.log("arm", name=name, accuracy=arm.accuracy, macs=arm.macs, params=arm.params)
        return arm

    def calibration(self, count: int) -> Samples | None:
        """Some of the training images, as the network takes them."""
        if not count:
            return None
        chosen = np.random.default_rng(seed_of(self.settings.seed, "calibration"))
        images = len(self.dataset.y_train)
        picked = np.sort(chosen.permutation(images)[: min(count, images)])
        inputs = self.dataset.preprocessing(self.dataset.x_train[picked]).numpy()
        return Samples.of(inputs, self.graph.model, None, self.settings.seed)

    def end(
        self,
        arms: dict[str, Arm],
        costs: dict[str, Change],
        iterations: list[IterationResult],
        members: Sequence[Member] = (),
    ) -> Result:
        """Write the result, which says that the run is finished."""
        aim = self.settings.aim
        result = Result(
            data=self.dataset.name,
            seed=self.settings.seed,
            budget={name: str(amount) for name, amount in aim.budget.items()},
            regularized=aim.regularized,
            cost=costs,
            arms=arms,
            iterations=iterations,
            seconds=round(self.folder.seconds, 1),
            family=list(members),
        )
        self.folder.finish(result.to_json())
        return distributed.from_first(lambda: result)
