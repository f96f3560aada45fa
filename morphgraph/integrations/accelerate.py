"""Hugging Face's accelerate: one call after ``prepare``. Needs ``morphgraph[accelerate]``."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import nn

from morphgraph.graph import ChannelGraph
from morphgraph.integrations.phase import ShrinkPhase


def shrink(
    accelerator: Accelerator,
    graph: ChannelGraph,
    budget: Mapping[str, str | float | int],
    net: nn.Module,
    *optimizers: Any,
    steps: int,
    **options: Any,
) -> ShrinkPhase:
    """Meet a budget while the network trains; the state is saved with the accelerator's.

    Call it once, after ``accelerator.prepare`` and before ``accelerator.load_state``. Accumulated
    and skipped steps are left out.

    Args:
        accelerator: saves and loads the state with ``save_state`` and ``load_state``.
        graph: the network as it was exported, lifted.
        budget: as for :class:`morphgraph.Budget`.
        net: what ``prepare`` returned for it.
        optimizers: the same.
        steps: optimizer steps of the phase: of accumulated batches one.
        options: of :class:`morphgraph.Regularizer`.

    Raises:
        ModelError: the graph's parameters are not in the network.
        ArgumentError: the optimizers have none of them.
    """
    phase = ShrinkPhase(graph, budget, steps=steps, **options)
    phase.begin(net, optimizers, steps)
    accelerator.register_for_checkpointing(phase)
    return phase
