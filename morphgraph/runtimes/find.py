"""Runtimes by name: built in, or a class of the user's own."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from morphgraph.errors import ArgumentError
from morphgraph.onnx_io import escape
from morphgraph.runtimes.base import Runtime
from morphgraph.words import did_you_mean


def _ort(provider: str) -> Runtime:
    from morphgraph.runtimes.ort import OnnxRuntime

    return OnnxRuntime(provider or "cpu")


def _openvino(device: str) -> Runtime:
    from morphgraph.runtimes.openvino import OpenVino

    return OpenVino(device or "CPU")


BUILT_IN: dict[str, Callable[[str], Runtime]] = {"ort": _ort, "openvino": _openvino}
"""By name, from the provider or device that may stand behind a colon."""


def find_runtime(name: str) -> Runtime:
    """The runtime of a name.

    Args:
        name: ``"ort"``, ``"openvino"``, either with a provider or device (``"ort:cuda"``), or
            ``"module:Class"`` of a class derived from :class:`Runtime` that is built without
            arguments; the working folder is searched too.

    Raises:
        ArgumentError: there is no such runtime, or the class cannot be imported or built.
        UnsupportedError: it is not installed here, or has no such provider.

    >>> find_runtime("ort").name
    'ort'
    """
    head, _, rest = name.partition(":")
    if head in BUILT_IN:
        return BUILT_IN[head](rest)
    where = f"runtime '{escape(name)}'"
    if not rest:
        raise ArgumentError(
            f"{where} is unknown{did_you_mean(name, BUILT_IN)}; use {', '.join(BUILT_IN)} or "
            "module:Class of your own"
        )
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(head), rest)()
    except Exception as error:  # a module of the user's may raise anything
        raise ArgumentError(
            f"{where}: {type(error).__name__}: {escape(str(error))}; it is imported as "
            f"`from {escape(head)} import {escape(rest)}` and built without arguments"
        ) from error
    finally:
        sys.path.remove(folder)
    if not isinstance(found, Runtime):
        raise ArgumentError(
            f"{where} makes a {type(found).__name__}; derive it from morphgraph.runtimes.Runtime"
        )
    return found
