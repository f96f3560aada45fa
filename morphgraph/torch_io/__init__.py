"""Between ONNX and PyTorch: export, the way back, and trained weights."""
