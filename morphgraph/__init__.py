"""A compiler for network shapes.

An ONNX model is lifted into a channel-dependency graph; passes find which channels live and die
together and what each costs; a plan says which stay; a rewrite emits the network in that size.

Public names are loaded when they are first used, so that ``import morphgraph`` costs nothing and
only what trains loads torch.

>>> import morphgraph as mg
>>> issubclass(mg.PlanError, mg.MorphError)
True
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING

from morphgraph._moved import FormerNames
from morphgraph.version import __version__ as __version__

if TYPE_CHECKING:
    from morphgraph.benchmark import bench as bench
    from morphgraph.benchmark.calibrate import calibrate as calibrate
    from morphgraph.errors import (
        ArgumentError as ArgumentError,
        BudgetError as BudgetError,
        DataError as DataError,
        FileError as FileError,
        ModelError as ModelError,
        MorphError as MorphError,
        MorphWarning as MorphWarning,
        PlanError as PlanError,
        UnsupportedError as UnsupportedError,
        VerificationError as VerificationError,
    )
    from morphgraph.folders.tokens import tokens_with_parts as tokens_with_parts
    from morphgraph.graph import ChannelGraph as ChannelGraph, Group as Group
    from morphgraph.learning import family as family, morph as morph
    from morphgraph.ops import register as register
    from morphgraph.passes.analysis.cost import cost as cost
    from morphgraph.passes.checking.sensitivity import sensitivity as sensitivity
    from morphgraph.passes.lift import lift as lift
    from morphgraph.passes.planning.expand import expand as expand
    from morphgraph.passes.planning.nested import Ranking as Ranking
    from morphgraph.passes.planning.uniform import uniform as uniform
    from morphgraph.passes.planning.vocabulary import (
        frequent_tokens as frequent_tokens,
        token_map as token_map,
    )
    from morphgraph.passes.rewrite.fresh import fresh as fresh
    from morphgraph.plans import Plan as Plan
    from morphgraph.report.explain import explain as explain
    from morphgraph.shrinking import data_scores as data_scores, shrink as shrink
    from morphgraph.slicing import Elastic as Elastic, elastic as elastic
    from morphgraph.steps import apply as apply, plan as plan
    from morphgraph.torch_io.export import export as export
    from morphgraph.torch_io.optimizer_state import (
        transfer_optimizer_state as transfer_optimizer_state,
    )
    from morphgraph.torch_io.resize_module import resize_module as resize_module
    from morphgraph.torch_io.to_torch import to_torch as to_torch
    from morphgraph.torch_io.weights import with_weights as with_weights
    from morphgraph.train.controller import Budget as Budget
    from morphgraph.train.regularizer import Regularizer as Regularizer
    from morphgraph.train.smoke import smoke as smoke
    from morphgraph.train.statistics import refresh_statistics as refresh_statistics
    from morphgraph.train.taylor import taylor as taylor
    from morphgraph.workflow import load as load, save as save, verify as verify

# Public name -> the module that defines it; the imports above say the same to type checkers.
_HOMES = {
    "ArgumentError": "morphgraph.errors",
    "Budget": "morphgraph.train.controller",
    "BudgetError": "morphgraph.errors",
    "ChannelGraph": "morphgraph.graph",
    "DataError": "morphgraph.errors",
    "FileError": "morphgraph.errors",
    "Group": "morphgraph.graph",
    "ModelError": "morphgraph.errors",
    "MorphError": "morphgraph.errors",
    "MorphWarning": "morphgraph.errors",
    "Plan": "morphgraph.plans",
    "PlanError": "morphgraph.errors",
    "Regularizer": "morphgraph.train.regularizer",
    "UnsupportedError": "morphgraph.errors",
    "VerificationError": "morphgraph.errors",
    "apply": "morphgraph.steps",
    "bench": "morphgraph.benchmark",
    "calibrate": "morphgraph.benchmark.calibrate",
    "cost": "morphgraph.passes.analysis.cost",
    "export": "morphgraph.torch_io.export",
    "elastic": "morphgraph.slicing",
    "Elastic": "morphgraph.slicing",
    "explain": "morphgraph.report.explain",
    "expand": "morphgraph.passes.planning.expand",
    "family": "morphgraph.learning",
    "fresh": "morphgraph.passes.rewrite.fresh",
    "lift": "morphgraph.passes.lift",
    "load": "morphgraph.workflow",
    "morph": "morphgraph.learning",
    "plan": "morphgraph.steps",
    "Ranking": "morphgraph.passes.planning.nested",
    "refresh_statistics": "morphgraph.train.statistics",
    "register": "morphgraph.ops",
    "resize_module": "morphgraph.torch_io.resize_module",
    "sensitivity": "morphgraph.passes.checking.sensitivity",
    "save": "morphgraph.workflow",
    "data_scores": "morphgraph.shrinking",
    "frequent_tokens": "morphgraph.passes.planning.vocabulary",
    "token_map": "morphgraph.passes.planning.vocabulary",
    "tokens_with_parts": "morphgraph.folders.tokens",
    "shrink": "morphgraph.shrinking",
    "smoke": "morphgraph.train.smoke",
    "taylor": "morphgraph.train.taylor",
    "to_torch": "morphgraph.torch_io.to_torch",
    "transfer_optimizer_state": "morphgraph.torch_io.optimizer_state",
    "uniform": "morphgraph.passes.planning.uniform",
    "verify": "morphgraph.workflow",
    "with_weights": "morphgraph.torch_io.weights",
}

__all__ = ["__version__", *_HOMES]

sys.meta_path.append(FormerNames)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
