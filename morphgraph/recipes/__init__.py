"""Training of image classifiers, ready to run: data, trainer, runs, sweeps.

The library's training core is :mod:`morphgraph.train`; this is one way to use it.
"""
