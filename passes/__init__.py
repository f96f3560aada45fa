"""The passes: one module each, imported as ``morphgraph.passes``."""
