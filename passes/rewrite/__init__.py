"""From a channel graph and a plan to another ONNX model."""
