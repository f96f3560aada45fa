"""Timing models in runtimes, and saying honestly which is faster.

``runtimes`` builds sessions, ``sessions`` runs models in turn, ``statistics`` knows numbers only,
``compare`` puts them together.
"""

from morphgraph.benchmark.compare import BenchResult, Convolutions, ModelTiming, bench
from morphgraph.benchmark.statistics import PairedRatio, Summary, paired_ratio, summarize

__all__ = [
    "BenchResult",
    "Convolutions",
    "ModelTiming",
    "PairedRatio",
    "Summary",
    "bench",
    "paired_ratio",
    "summarize",
]
