"""Hugging Face's Trainer: a callback. Needs ``morphgraph[transformers]``."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from morphgraph.errors import warn
from morphgraph.integrations.phase import ShrinkPhase

_KEY = "morphgraph"  # among the states of callbacks


class BudgetCallback(ShrinkPhase, TrainerCallback):
    """Meets a budget while ``Trainer.train`` trains; its state is in ``trainer_state.json``.

    Args:
        graph, budget, steps, options: see :class:`~morphgraph.integrations.phase.ShrinkPhase`; by
            default the phase is ``max_steps`` long, as the trainer counts them.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Begin: model and optimizer are there, and loaded from a checkpoint if there is one."""
        saved = state.stateful_callbacks.pop(_KEY, {})
        if saved.get("step") == state.global_step:
            content = io.BytesIO(base64.b64decode(saved["state"]))
            self.load_state_dict(torch.load(content, map_location="cpu", weights_only=True))
        elif state.global_step:
            warn(
                f"the checkpoint of step {state.global_step} has no state of a budget: the phase "
                "begins there; to go on with one resume from a checkpoint that was written with "
                "this callback"
            )
        left = state.max_steps - (0 if self._loaded else state.global_step)
        self.begin(kwargs["model"], [kwargs["optimizer"]], left)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Add the state to the checkpoint that was written just now.

        The trainer exports the states of callbacks by itself, but as the arguments of new ones; a
        graph cannot be made from these.
        """
        if not state.is_world_process_zero:
            return
        content = io.BytesIO()
        torch.save(self.state_dict(), content)
        text = base64.b64encode(content.getvalue()).decode("ascii")
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        state.stateful_callbacks[_KEY] = {"step": state.global_step, "state": text}
        state.save_to_json(str(folder / TRAINER_STATE_NAME))
        # Were it left there, a run that is killed before the next `on_save` would find the old one.
        del state.stateful_callbacks[_KEY]

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Follow the optimizer no longer."""
        self.end()
