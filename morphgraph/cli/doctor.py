"""``morphgraph doctor``: what this machine and installation look like."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from morphgraph.cli.command import command
from morphgraph.cli.console import show
from morphgraph.cli.shared_options import OutputFormat
from morphgraph.report.tables import Cell, Column, Report, Table
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
# What decides how fast ONNX Runtime's kernels are.
_FEATURES = (
    "sse4_2",
    "avx",
    "fma",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_tile",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


@command
def doctor(*, output_format: OutputFormat = "table") -> None:
    """Show versions, CPU features and execution providers."""
    packages = {name: _version(name) for name in _PACKAGES}
    model, features = _cpu()
    data = {
        "schema_version": 1,
        "tool_version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": model, "features": features, "usable": _usable_cpus()},
        "packages": packages,
        "execution_providers": _providers(),
    }
    rows: list[list[Cell]] = [
        ["morphgraph", __version__],
        ["python", platform.python_version()],
        ["platform", platform.platform()],
        ["cpu", model],
        ["cpu features", ", ".join(features) or "not known"],
        ["cpus usable", _usable_cpus()],
        ["execution providers", ", ".join(_providers()) or "onnxruntime is not installed"],
    ]
    rows += [[name, release or "not installed"] for name, release in packages.items()]
    show(Report(data, [Table([Column("what"), Column("found")], rows)]), output_format)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> tuple[str, list[str]]:
    """The CPU's name and its features that matter here, from Linux's ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip().lower(), value.strip())
    flags = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [feature for feature in _FEATURES if feature in flags]


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())
