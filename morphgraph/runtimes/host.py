"""What a time belongs to beside the network: this machine's processor, a runtime's version."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def processor() -> str:
    """The name of this machine's processor."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(runtime: str) -> dict[str, str]:
    """By the name of a runtime's package its version; empty where it is none.

    >>> list(version_of("ort:cpu")), version_of("my_phone:Runtime")
    (['onnxruntime'], {})
    """
    name = runtime.partition(":")[0]
    package = {"ort": "onnxruntime"}.get(name, name)
    with suppress(PackageNotFoundError):
        return {package: version(package)}
    return {}
