"""Training with a price on channels: regularizer, budget, the loop, data."""
