"""From a canonical model to its channel graph: which channels live and die together."""
