"""The runtimes that models are timed in: build a session, run it, tell what it executes.

ONNX Runtime is built in (``ort``), OpenVINO an extra (``openvino``); others are a user's own class.
"""

from morphgraph.runtimes.base import (
    Clock,
    Executed,
    Input,
    Operator,
    Runtime,
    Session,
    Source,
    Spent,
)
from morphgraph.runtimes.find import find_runtime

__all__ = [
    "Clock",
    "Executed",
    "Input",
    "Operator",
    "Runtime",
    "Session",
    "Source",
    "Spent",
    "find_runtime",
]
