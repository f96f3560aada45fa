"""Stage of the pipeline: what data tell of a network's channels."""
