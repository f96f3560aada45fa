"""A workflow of Olive: shrink a classifier of digits by inputs without labels, then half precision.

    pip install 'morphgraph[olive,data]'
    python examples/olive_workflow.py

Without Olive the same two steps are ``morphgraph shrink`` and any converter.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from olive.workflows import run
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import morphgraph as mg
from morphgraph.olive import package_config
from morphgraph.testing.examples import residual_cnn


def main(steps: int = 250, budget: str = "flops=60%") -> tuple[float, float]:
    """The share of the FLOPs that is left, and the accuracy of what the workflow gives."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy((images / 16).astype(np.float32).reshape(-1, 1, 8, 8))
    y = torch.from_numpy(labels)
    net = residual_cnn()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(0, 1200, (64,))
        loss = cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = Path(tempfile.mkdtemp())
    mg.save(mg.export(net.eval(), (x[:2],), dynamic_batch=True), folder / "digits.onnx")
    np.savez(folder / "inputs.npz", x=x[:400].numpy())

    workflow = {
        "input_model": {"type": "ONNXModel", "model_path": str(folder / "digits.onnx")},
        "passes": {
            "shrink": {
                "type": "MorphgraphShrink",
                "budget": budget,
                "data": str(folder / "inputs.npz"),
            },
            "half": {"type": "OnnxFloatToFloat16", "keep_io_types": True},
        },
        "output_dir": str(folder / "out"),
        "cache_dir": str(folder / "cache"),
    }
    result = run(workflow, package_config=package_config())
    small = result.get_best_candidate().model_path

    session = onnxruntime.InferenceSession(small, providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"x": x[1200:].numpy()})
    accuracy = float((np.asarray(scores).argmax(axis=1) == y[1200:].numpy()).mean())
    whole, left = (mg.cost(mg.lift(m), "flops").total for m in (folder / "digits.onnx", small))
    sizes = [Path(path).stat().st_size for path in (folder / "digits.onnx", small)]
    print(f"FLOPs {whole:,} -> {left:,}, bytes {sizes[0]:,} -> {sizes[1]:,}, {accuracy:.1%} right")
    return left / whole, accuracy


if __name__ == "__main__":
    main()
