"""From any ONNX model to the canonical one: constants folded, sizes known, names kept."""
