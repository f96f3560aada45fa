"""The sizes that torch's own layers keep in attributes, read off their tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn
from torch.nn.modules import batchnorm, conv

from morphgraph.arrays import IntArray, Shape
from morphgraph.errors import UnsupportedError


@dataclass(frozen=True)
class TensorCut:
    """A tensor's shape before and after, and per axis the old position at every new one."""

    before: Shape
    after: Shape
    positions: Mapping[int, IntArray]

    def at(self, axis: int) -> IntArray:
        """The old position at every new one of an axis."""
        whole = np.arange(self.before[axis])
        return self.positions.get(axis, whole)

    def blocks(self, axis: int, count: int) -> int:
        """How many of the equal blocks that an axis consists of are left; 0 where they differ."""
        return blocks_left(self.at(axis), self.before[axis] // count, count)


def blocks_left(kept: IntArray, size: int, count: int) -> int:
    """How many of ``count`` blocks of ``size`` positions are left; 0 where they are not alike.

    >>> blocks_left(np.array([0, 1, 4, 5]), 2, 3), blocks_left(np.array([0, 2, 4]), 2, 3)
    (2, 3)
    >>> blocks_left(np.array([0, 1, 2]), 2, 3), blocks_left(np.array([0, 1, 1]), 1, 2)
    (0, 3)
    """
    counts = np.bincount(kept // size, minlength=count)
    left = counts[counts > 0]
    if len(set(left.tolist())) == 1:
        return len(left)
    # Blocks that were added are copies of one that stays.
    return len(kept) // size if (left % size == 0).all() else 0


Cuts = Mapping[str, TensorCut]
"""The tensors of one layer, by the names that they have without parametrizations."""


def layer_sizes(module: nn.Module, cuts: Cuts) -> dict[str, Any]:
    """The values of a torch layer's size attributes after its tensors are cut, by name.

    Empty for a class that is no subclass of a layer of torch, and for one without tensors.

    Raises:
        UnsupportedError: the layer cannot be of that form; says why.
    """
    for kind, sizes in _LAYERS.items():
        if isinstance(module, kind):
            return sizes(module, cuts)
    return {}


def is_torch_layer(module: nn.Module) -> bool:
    """Whether all sizes of a module are known to this table or do not matter."""
    return type(module).__module__.startswith("torch.nn.modules")


def _linear(_: Any, cuts: Cuts) -> dict[str, Any]:
    out_features, in_features = cuts["weight"].after
    return {"in_features": in_features, "out_features": out_features}


def _bilinear(_: Any, cuts: Cuts) -> dict[str, Any]:
    names = ("out_features", "in1_features", "in2_features")
    return dict(zip(names, cuts["weight"].after, strict=True))


def _conv(module: Any, cuts: Cuts) -> dict[str, Any]:
    kernel = cuts["weight"]  # [out, in / groups, *taps], transposed: [in, out / groups, *taps]
    groups = kernel.blocks(0, module.groups)
    if not groups:
        raise UnsupportedError(
            f"its {module.groups} groups would have unequal numbers of channels, which torch has "
            "not got; plan them as one group of channels"
        )
    first, second = kernel.after[0], kernel.after[1] * groups
    if module.transposed:
        return {"in_channels": first, "out_channels": second, "groups": groups}
    return {"in_channels": second, "out_channels": first, "groups": groups}


def _group_norm(module: Any, cuts: Cuts) -> dict[str, Any]:
    if "weight" not in cuts:
        return {}
    groups = cuts["weight"].blocks(0, module.num_groups)
    if not groups:
        raise UnsupportedError(
            f"its {module.num_groups} groups would have unequal numbers of channels, which torch "
            "has not got"
        )
    return {"num_channels": cuts["weight"].after[0], "num_groups": groups}


def _features(_: Any, cuts: Cuts) -> dict[str, Any]:
    tensors = [cuts[name] for name in ("weight", "running_mean") if name in cuts]
    return {"num_features": tensors[0].after[0]} if tensors else {}


def _normalized(_: Any, cuts: Cuts) -> dict[str, Any]:
    return {"normalized_shape": tuple(cuts["weight"].after)} if "weight" in cuts else {}


def _embedding(module: Any, cuts: Cuts) -> dict[str, Any]:
    table = cuts["weight"]
    sizes: dict[str, Any] = {"num_embeddings": table.after[0], "embedding_dim": table.after[1]}
    if module.padding_idx is not None:
        at = np.flatnonzero(table.at(0) == module.padding_idx)
        sizes["padding_idx"] = int(at[0]) if len(at) else None
    return sizes


def _prelu(_: Any, cuts: Cuts) -> dict[str, Any]:
    return {"num_parameters": cuts["weight"].after[0]}


def _recurrent(module: Any, cuts: Cuts) -> dict[str, Any]:
    hidden = {
        cut.after[-1 if name.startswith("weight_hh") else 1]
        for name, cut in cuts.items()
        if name.startswith("weight_hr" if module.proj_size else "weight_hh")
    }
    projected = {cut.after[0] for name, cut in cuts.items() if name.startswith("weight_hr")}
    if len(hidden) > 1 or len(projected) > 1:
        found = ", ".join(map(str, sorted(projected if len(projected) > 1 else hidden)))
        raise UnsupportedError(
            f"its layers would have different sizes ({found}), and it has one for all; plan them "
            "with one width (same=[GLOB]), or take mg.to_torch(mg.apply(graph, plan, weights=net)):"
            " there every layer is a module of its own"
        )
    sizes = {"input_size": cuts["weight_ih_l0"].after[1], "hidden_size": hidden.pop()}
    return sizes | ({"proj_size": projected.pop()} if projected else {})


def _cell(_: Any, cuts: Cuts) -> dict[str, Any]:
    return {
        "input_size": cuts["weight_ih"].after[1],
        "hidden_size": cuts["weight_hh"].after[1],
    }


def _attention(module: Any, cuts: Cuts) -> dict[str, Any]:
    packed = cuts.get("in_proj_weight")
    query = packed or cuts["q_proj_weight"]
    width, size = query.after[1], query.before[1]
    rows = query.at(0)[query.at(0) < size]
    heads = blocks_left(rows, module.head_dim, module.num_heads)
    sizes = (
        {"kdim": width, "vdim": width}
        if packed
        else {"kdim": cuts["k_proj_weight"].after[1], "vdim": cuts["v_proj_weight"].after[1]}
    )
    if not heads or len(rows) != width:
        raise UnsupportedError(
            f"nn.MultiheadAttention has embed_dim = heads x size of a head; here the inputs would "
            f"have {width} channels and the heads {len(rows)} in all; leave its heads as they are "
            "(exclude), or plan both by the same share"
        )
    return sizes | {"embed_dim": width, "num_heads": heads, "head_dim": width // heads}


_Sizes = Callable[[Any, Cuts], dict[str, Any]]
# The classes above all BatchNorms, InstanceNorms and convolutions; torch gives them no other name.
_NORMS = (batchnorm._NormBase,)  # noqa: SLF001
_LAYERS: dict[type[nn.Module] | tuple[type[nn.Module], ...], _Sizes] = {
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    conv._ConvNd: _conv,  # noqa: SLF001
    _NORMS: _features,
    nn.GroupNorm: _group_norm,
    (nn.LayerNorm, nn.RMSNorm): _normalized,
    (nn.Embedding, nn.EmbeddingBag): _embedding,
    nn.PReLU: _prelu,
    nn.RNNBase: _recurrent,
    nn.RNNCellBase: _cell,
    nn.MultiheadAttention: _attention,
}

FREE_SIZES: dict[type[nn.Module] | tuple[type[nn.Module], ...], tuple[str, ...]] = {
    nn.Unflatten: ("unflattened_size",),
    nn.ChannelShuffle: ("groups",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    (nn.LayerNorm, nn.RMSNorm): ("normalized_shape",),
    _NORMS: ("num_features",),
}
"""Sizes of torch's layers that no tensor of theirs need tell."""
