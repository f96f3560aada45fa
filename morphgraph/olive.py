"""A pass for Olive: make a network smaller within a workflow (``pip install 'morphgraph[olive]'``).

Olive knows the passes of a package configuration; :func:`package_config` is Olive's own with this
one added::

    from olive.workflows import run
    from morphgraph.olive import package_config

    run(workflow, package_config=package_config())

In the workflow it is ``{"type": "MorphgraphShrink", "budget": "flops=70%", "data": "inputs.npz"}``.
"""

import json
from pathlib import Path
from typing import Any

from olive.common.config_utils import ParamCategory
from olive.data.config import DataConfig
from olive.model import ONNXModelHandler
from olive.model.utils import resolve_onnx_path
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.resource_path import LocalFile, LocalFolder
from olive.search.search_parameter import Categorical

from morphgraph.errors import ArgumentError
from morphgraph.passes.lift import lift
from morphgraph.shrinking import shrink
from morphgraph.steps import apply, plan
from morphgraph.workflow import save

BUDGETS = ("flops=85%", "flops=70%", "flops=55%")
"""What a search of Olive tries, if the workflow does not say it."""


class MorphgraphShrink(Pass):
    """Removes the channels that a network needs least, so that it fits a budget.

    With inputs (``data`` or ``data_config``) they choose, and what is left is fitted to what the
    original computes; without, the weights choose, for a network that is trained again.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        del accelerator_spec
        return {
            "budget": PassConfigParam(
                type_=str,
                default_value="flops=70%",
                search_defaults=Categorical(list(BUDGETS)),
                description="What the result may cost: 'flops=70%', 'params=2M,flops=60%'.",
            ),
            "data": PassConfigParam(
                type_=str | None,
                default_value=None,
                category=ParamCategory.PATH,
                description="Inputs without labels: .npz, .npy, a folder of them or of images.",
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict | None,
                default_value=None,
                description="Inputs from a data configuration of Olive instead.",
            ),
            "samples": PassConfigParam(
                type_=int, default_value=512, description="The most inputs that are read."
            ),
            "tune": PassConfigParam(
                type_=int,
                default_value=0,
                description="Steps of self-distillation behind the fit; needs torch.",
            ),
            "round_to": PassConfigParam(
                type_=int | str,
                default_value="auto",
                description="Widths become multiples of this; auto: of what suits the operators.",
            ),
            "min_width": PassConfigParam(
                type_=int, default_value=1, description="No group gets narrower; 0: layers may go."
            ),
            "include": PassConfigParam(
                type_=list[str], default_value=[], description="Globs: resize these groups only."
            ),
            "exclude": PassConfigParam(
                type_=list[str], default_value=[], description="Globs: leave these groups alone."
            ),
            "same": PassConfigParam(
                type_=list[str],
                default_value=[],
                description="Globs of groups that get one width; 'repeated': of repeated blocks.",
            ),
            "seed": PassConfigParam(type_=int, default_value=0, description="Of random numbers."),
        }

    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        file = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        budget, data = amounts(config.budget), _inputs(config)
        options = {
            name: getattr(config, name) for name in ("min_width", "include", "exclude", "same")
        }
        options["round_to"] = _number(config.round_to)
        graph = lift(model.model_path)
        if data is None:
            chosen = plan(graph, budget, seed=config.seed, **options)
            small = apply(graph, chosen, seed=config.seed)
        else:
            result = shrink(
                graph,
                data,
                budget,
                tune=config.tune,
                limit=config.samples,
                seed=config.seed,
                **options,
            )
            chosen, small = result.plan, result.model
        save(small, file, overwrite=True)
        chosen.save(file.with_suffix(".plan.json"), overwrite=True)
        beside = {path.name for path in file.parent.iterdir()} - {file.name}
        if f"{file.name}.data" in beside:
            return ONNXModelHandler(LocalFolder({"path": file.parent}), onnx_file_name=file.name)
        return ONNXModelHandler(LocalFile({"path": file}))


def amounts(text: str) -> dict[str, str]:
    """A budget as a workflow spells it.

    >>> amounts("flops=60%, params=2M")
    {'flops': '60%', 'params': '2M'}
    >>> amounts("60%")
    Traceback (most recent call last):
        ...
    morphgraph.errors.ArgumentError: budget '60%': no amount of a cost; write 'flops=60%'
    """
    parts = [part.strip().partition("=") for part in text.split(",")]
    for cost, sign, amount in parts:
        if not (cost and sign and amount):
            raise ArgumentError(f"budget '{text}': no amount of a cost; write 'flops=60%'")
    return {cost.strip(): amount.strip() for cost, _, amount in parts}


def _inputs(config: Any) -> Any:
    if config.data is not None and config.data_config is not None:
        raise ArgumentError("data and data_config: give one of them")
    if config.data_config is None:
        return config.data
    given = config.data_config
    given = DataConfig.model_validate(given) if isinstance(given, dict) else given
    return given.to_data_container().create_dataloader()


def _number(value: int | str) -> Any:
    return int(value) if str(value).isdigit() else value


def package_config() -> dict[str, Any]:
    """Olive's package configuration with this pass added, for ``olive.workflows.run``.

    >>> package_config()["passes"]["MorphgraphShrink"]["module_path"]
    'morphgraph.olive.MorphgraphShrink'
    """
    config = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text("utf-8"))
    config["passes"][MorphgraphShrink.__name__] = {
        "module_path": f"{__name__}.{MorphgraphShrink.__name__}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
        "dataset": "dataset_optional",
        "extra_dependencies": [],
    }
    assert isinstance(config, dict)
    return config
