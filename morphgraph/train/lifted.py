"""A module as the graph that it is trained by: one whose networks take batches of any size."""

from typing import Any

from torch import nn

from morphgraph.errors import MorphError, warn
from morphgraph.graph import ChannelGraph
from morphgraph.onnx_io.check import escape
from morphgraph.passes.lift import lift
from morphgraph.torch_io.batch import FREE
from morphgraph.torch_io.export import export
from morphgraph.torch_io.to_torch import batch_of, to_torch


def lift_to_train(net: nn.Module, example: Any) -> ChannelGraph:
    """Export and lift a network that is to be resized and trained on.

    A training loop has other batches than the example, and the last one of an epoch is smaller.
    Where :func:`to_torch` cannot free the batch of the export, as where a network computes masks or
    positions for the batch that it sees, the network is exported once more with an open one.

    Raises:
        UnsupportedError: the network cannot be exported, or an operator has no PyTorch form.
    """
    model = export(net, example)
    why = batch_of(to_torch(model))
    if why == FREE:
        return lift(model)
    try:
        opened = export(net, example, dynamic_batch=True)
        if batch_of(to_torch(opened)) == FREE:
            return lift(opened)
    except MorphError as error:
        why = str(error)
    warn(
        f"network {type(net).__name__}: resized, it takes batches of the example's size only "
        f"({escape(why)}); give an example of the size that fit trains with, and leave out smaller "
        "batches (drop_last=True)"
    )
    return lift(model)
