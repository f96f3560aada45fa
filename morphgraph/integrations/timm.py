"""Training scripts in timm's manner: one call, and the state is in the optimizer's.

``timm.utils.CheckpointSaver`` and ``timm.models.resume_checkpoint`` save and load the network and
the optimizer, and nothing of ours. So the state travels in that of the optimizer. Nothing of timm
is needed for it: any script that saves ``optimizer.state_dict()`` will do.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from morphgraph.graph import ChannelGraph
from morphgraph.integrations.phase import ShrinkPhase

_KEY = "morphgraph"


def shrink(
    graph: ChannelGraph,
    budget: Mapping[str, str | float | int],
    net: nn.Module,
    optimizer: Optimizer,
    *,
    steps: int,
    **options: Any,
) -> ShrinkPhase:
    """Meet a budget while a script trains the network; the state is saved with the optimizer's.

    Call it once, after ``create_optimizer_v2`` and before ``resume_checkpoint``. Accumulated and
    skipped steps are left out.

    >>> import morphgraph as mg, torch
    >>> from morphgraph.testing.examples import image, residual_cnn
    >>> net = residual_cnn()
    >>> graph = mg.lift(mg.export(net, (image(),)))
    >>> optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0)
    >>> phase = shrink(graph, {"flops": "50%"}, net, optimizer, steps=100)
    >>> sorted(optimizer.state_dict())
    ['morphgraph', 'param_groups', 'state']

    Args:
        graph: the network as it was exported, lifted.
        budget: as for :class:`morphgraph.Budget`.
        net: the network that is trained, wrapped or not; not its moving average.
        optimizer: that trains it.
        steps: optimizer steps of the phase: of accumulated batches one.
        options: of :class:`morphgraph.Regularizer`.

    Raises:
        ModelError: the graph's parameters are not in the network.
        ArgumentError: the optimizer has none of them, or does not say when it has stepped.
    """
    phase = ShrinkPhase(graph, budget, steps=steps, **options)
    phase.begin(net, [optimizer], steps)

    def save(_: Optimizer, state: dict[str, Any]) -> None:
        state[_KEY] = phase.state_dict()

    def load(_: Optimizer, state: dict[str, Any]) -> None:
        phase.load_state_dict(state.pop(_KEY, {}))

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return phase
