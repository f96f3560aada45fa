"""``morphgraph doctor``: what this machine and installation look like."""

import platform

from morphgraph.cli.command import command
from morphgraph.cli.console import show
from morphgraph.cli.shared_options import OutputFormat
from morphgraph.version import __version__

_PACKAGES = (
    "click",
    "jinja2",
    "msgspec",
    "networkx",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "rich",
    "safetensors",
    "scipy",
    "torch",
    "torchvision",
    "timm",
    "scikit-learn",
    "pillow",
)


@command
def doctor(*, output_format: OutputFormat = "table") -> None:
    """Show versions, CPU features and execution providers."""
    from morphgraph.report.machine import Cpu, Machine, cpu, package_version, providers, usable_cpus
    from morphgraph.report.tables import Cell, Column, Report, Table

    packages = {name: package_version(name) for name in _PACKAGES}
    model, features = cpu()
    data = Machine(
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=Cpu(model, list(features), usable_cpus()),
        packages=packages,
        execution_providers=list(providers()),
    )
    rows: list[list[Cell]] = [
        ["morphgraph", __version__],
        ["python", platform.python_version()],
        ["platform", platform.platform()],
        ["cpu", model],
        ["cpu features", ", ".join(features) or "not known"],
        ["cpus usable", usable_cpus()],
        ["execution providers", ", ".join(providers()) or "onnxruntime is not installed"],
    ]
    rows += [[name, release or "not installed"] for name, release in packages.items()]
    show(Report(data, [Table([Column("what"), Column("found")], rows)]), output_format)
