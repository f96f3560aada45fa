"""Inputs to calibrate with: given as arrays, files or iterables, and passed over many times."""

from morphgraph.calibration.images import ImageOptions
from morphgraph.calibration.progress import Progress, no_progress
from morphgraph.calibration.samples import Samples
from morphgraph.calibration.text import TextOptions

__all__ = ["ImageOptions", "Progress", "Samples", "TextOptions", "no_progress"]
