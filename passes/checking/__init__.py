"""Whether a resized model computes what the masked original computes."""
