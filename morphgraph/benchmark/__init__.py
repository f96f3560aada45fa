"""Timing models in runtimes, and saying honestly which is faster.

``runtimes`` builds sessions, ``sessions`` runs models in turn, ``statistics`` knows numbers only,
``compare`` puts them together.
"""

from morphgraph.benchmark.compare import (
    BenchResult,
    BenchSweep,
    Convolutions,
    ModelTiming,
    bench,
)
from morphgraph.benchmark.profile import Profile, Structure, TimeRow, structure_of
from morphgraph.benchmark.statistics import PairedRatio, Summary, paired_ratio, summarize

__all__ = [
    "BenchResult",
    "BenchSweep",
    "Convolutions",
    "ModelTiming",
    "PairedRatio",
    "Profile",
    "Structure",
    "Summary",
    "TimeRow",
    "bench",
    "paired_ratio",
    "structure_of",
    "summarize",
]
