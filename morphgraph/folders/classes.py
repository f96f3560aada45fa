"""The class that a folder's config builds, where Hugging Face's transformers is here to say."""

import warnings
from typing import TYPE_CHECKING, Any

from morphgraph.folders.found import HUGGING_FACE, ModelFolder
from morphgraph.graph import ChannelGraph
from morphgraph.passes.planning.bounds import WidthBounds
from morphgraph.passes.planning.ties import NONE, Ties

if TYPE_CHECKING:
    from torch import nn


def folder_ties(graph: ChannelGraph, bounds: WidthBounds, folder: ModelFolder) -> Ties:
    """The widths that go together so that a folder's ``config.json`` says them.

    Nothing goes together where no class is known for it: transformers is not installed, or has
    none of that name.

    Args:
        graph: the folder's model.
        bounds: of its widths.
        folder: where it lies.
    """
    module = built_class(folder.configs.get(HUGGING_FACE, {}))
    if module is None:
        return NONE
    from morphgraph.torch_io.config_ties import config_ties

    return config_ties(graph, bounds, module)


def built_class(config: dict[str, Any]) -> "nn.Module | None":
    """The network that a config names, without memory for its weights; ``None``: nobody knows it.

    Args:
        config: what ``config.json`` says.
    """
    names = config.get("architectures") or []
    kind = config.get("model_type")
    if not (isinstance(names, list) and names and isinstance(kind, str)):
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    architecture = getattr(transformers, str(names[0]), None)
    if architecture is None or kind not in transformers.CONFIG_MAPPING:
        return None
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            made = architecture(transformers.CONFIG_MAPPING[kind].from_dict(config))
    except Exception:  # noqa: BLE001  validators, and classes that want more packages
        return None
    return made if isinstance(made, torch.nn.Module) else None
