"""PyTorch Lightning: a callback. Needs ``morphgraph[lightning]``."""

from math import isfinite
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from morphgraph.errors import ArgumentError
from morphgraph.integrations.phase import ShrinkPhase


class BudgetCallback(ShrinkPhase, Callback):
    """Meets a budget while ``Trainer.fit`` trains; its state is in the checkpoints.

    The graph may be that of the ``LightningModule`` or of a network inside it. Steps count as
    ``trainer.global_step`` does: of an accumulated batch once, of a skipped step not at all.

    Args:
        graph, budget, steps, options: see :class:`~morphgraph.integrations.phase.ShrinkPhase`; by
            default the phase is ``trainer.estimated_stepping_batches`` long.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin: the module is on its device and loaded, the optimizers are there."""
        steps = trainer.estimated_stepping_batches
        if self.steps is None and not (isfinite(steps) and steps > 0):
            raise ArgumentError(
                "nobody knows how many steps this training takes: give max_epochs or max_steps to "
                "the Trainer, or steps= to the callback"
            )
        self.begin(pl_module, trainer.optimizers, self.steps or int(steps))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Follow the optimizers no longer."""
        self.end()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of a run that was resumed at its end nothing has begun: make its plan available."""
        if self.budget is None and self._loaded:
            self.on_train_start(trainer, pl_module)
            self.end()

    def on_exception(self, *_: Any) -> None:
        """The same where the training breaks off, without a word: the exception has said it."""
        if self.budget is not None:
            self.budget.detach()
