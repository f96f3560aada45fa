"""Timing models in ONNX Runtime, and saying honestly which is faster.

``statistics`` knows numbers only, ``sessions`` runs models, ``compare`` puts the two together.
"""

from morphgraph.benchmark.compare import BenchResult, ModelTiming, bench
from morphgraph.benchmark.statistics import PairedRatio, Summary, paired_ratio, summarize

__all__ = [
    "BenchResult",
    "ModelTiming",
    "PairedRatio",
    "Summary",
    "bench",
    "paired_ratio",
    "summarize",
]
