"""Inputs to calibrate with: given as arrays, files or iterables, and passed over many times."""

from morphgraph.calibration.samples import Samples

__all__ = ["Samples"]
