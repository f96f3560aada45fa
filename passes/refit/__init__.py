"""Stage of the pipeline: what is left of a network, fitted to what the whole one computes."""
