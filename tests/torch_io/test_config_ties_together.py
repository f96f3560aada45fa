"""Widths that a config says only all together, of more groups than pairs and threes."""

import pytest
import torch
import transformers
from torch import Tensor, nn

import morphgraph as mg
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.torch_io.config_ties import config_ties


class Logits(nn.Module):
    """The network without its other results, one of which is as wide as the hidden width."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        out = self.net(input_ids=input_ids, decoder_input_ids=decoder_input_ids, use_cache=False)
        logits: Tensor = out.logits
        return logits


@pytest.mark.long
def test_four_widths_that_one_ratio_changes_are_found() -> None:
    """BART: every attention's heads divide the hidden width, which encoder and decoder share."""
    torch.manual_seed(0)
    sides = {
        f"{side}_{entry}": number
        for side in ("encoder", "decoder")
        for entry, number in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 24))
    }
    config = transformers.BartConfig(vocab_size=60, d_model=16, max_position_embeddings=20, **sides)
    net = transformers.BartForConditionalGeneration(config).eval()
    ids = torch.randint(4, 60, (2, 5))
    graph = mg.lift(mg.export(Logits(net), (ids, ids)))
    places = [group.id for group in graph.groups if "embed_positions" in group.name]
    bounds = WidthBounds(exclude=tuple(places))
    ties = config_ties(graph, bounds, net, "net")
    (together,) = ties.ratios
    widths = sorted(graph.groups[index].width for index in together)
    assert widths == [4, 4, 4, 16]
    plan = mg.uniform(graph, 0.5, ties=ties, exclude=places)
    small = mg.apply(graph, plan)
    half = {name: number // 2 for name, number in sides.items() if "layers" not in name}
    built = transformers.BartForConditionalGeneration(
        transformers.BartConfig.from_dict(config.to_dict() | half | {"d_model": 8})
    )
    shapes = {f"net.{name}": sorted(value.shape) for name, value in built.state_dict().items()}
    found = {
        name: sorted(value.shape.numpy())
        for name, value in small.graph.initializers.items()
        if name in shapes and value.shape is not None
    }
    assert len(found) > 40
    assert found == {name: shapes[name] for name in found}
