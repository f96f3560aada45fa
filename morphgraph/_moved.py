"""Modules under their former names, for one version: importing one warns, and gives today's.

Nothing in the program imports this but ``morphgraph`` itself, which puts :class:`FormerNames`
behind all other finders: it is asked only for modules that nobody else has.
"""

import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

_STAGES = {
    "canonical": "canonicalize fold infer=infer_shapes compute=fold_values unpack=split_sequences "
    "open_batch=dynamic_batch open_sizes=dynamic_sizes symbols",
    "coupling": "couple sites=factorize_axes carriers group",
    "analysis": "cost polynomial score gates depend=dependence kept=selection evaluate",
    "planning": "goals=constraints limits=bounds budget=removal_path widths=uniform expand compose "
    "choose=build",
    "rewrite": "resize vanish absorb shift=bias placement=bias fresh mask",
    "checking": "verify precision=single_precision",
}
_RECIPES = "baselines checkpoint data folder images norms precision progress readers results run "
_RECIPES += "settings sweep trainer workers"

MOVED = {
    "morphgraph.bench": "morphgraph.benchmark",
    "morphgraph.examples": "morphgraph.testing.examples",
    "morphgraph.fates": "morphgraph.passes.analysis.liveness",
    "morphgraph.felt": "morphgraph.testing.random_weights",
    "morphgraph.onnx_check": "morphgraph.onnx_io.check",
    "morphgraph.ort": "morphgraph.onnx_io.runtime",
    "morphgraph.stored": "morphgraph.onnx_io.mapped",
}
for _stage, _names in _STAGES.items():
    for _old, _, _new in (name.partition("=") for name in _names.split()):
        MOVED[f"morphgraph.passes.{_old}"] = f"morphgraph.passes.{_stage}.{_new or _old}"
for _name in _RECIPES.split():
    MOVED[f"morphgraph.train.{_name}"] = f"morphgraph.recipes.{_name}"


class FormerNames:
    """Finds modules by the names that they had before."""

    @staticmethod
    def find_spec(name: str, *_where: object) -> ModuleSpec | None:
        """The spec of a module that has moved, else ``None``."""
        return ModuleSpec(name, _Loader(MOVED[name])) if name in MOVED else None  # type: ignore[arg-type]  # a loader is what has these methods


class _Loader:
    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self.new}", DeprecationWarning, stacklevel=2)
        module = import_module(self.new)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has put the former name's there
