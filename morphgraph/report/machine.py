"""What this machine and installation look like: versions, CPU and execution providers."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from morphgraph.version import __version__

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


def package_version(package: str) -> str | None:
    """The version of an installed package, without importing it; ``None`` if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def usable_cpus() -> int:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu() -> tuple[str, list[str]]:
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


def providers() -> list[str]:
    """ONNX Runtime's execution providers; none if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


class Cpu(msgspec.Struct, frozen=True):
    """The processor: its name, what it can do, and how many cores this process may use."""

    model: str
    features: list[str]
    usable: int


class Machine(msgspec.Struct, frozen=True):
    """What ``doctor`` prints: versions, the processor, and where ONNX Runtime can run.

    ``packages`` has a version by name, ``null`` where a package is not installed.
    """

    python: str
    platform: str
    cpu: Cpu
    packages: dict[str, str | None]
    execution_providers: list[str]
    schema_version: int = 1
    tool_version: str = __version__
