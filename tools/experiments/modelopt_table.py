"""FastNAS of NVIDIA ModelOpt beside ``shrink``, both without training: a table for the comparison.

    pip install nvidia-modelopt==0.47.0 'torchprofile<0.1'    # in an environment of their own
    python tools/experiments/modelopt_table.py --data cifar10_16px.npz --runs runs/experiments

ModelOpt gets 1,000 images with labels, by which it scores the subnets that it samples; ``shrink``
the same without labels. Both are judged by the test set. Channels are a multiple of 4 here: with
its default of 32 FastNAS would find nothing to remove in networks this small.
"""

import argparse
import io
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import modelopt.torch.prune as mtp
import numpy as np
import onnx
import onnx_ir as ir
import torch
from shrink_networks import CIFAR, Material, Subject, material

import morphgraph as mg

SHARES = [k / 8 for k in range(1, 9)]
RULES = {
    "nn.Conv2d": {"*": {"channels_ratio": SHARES, "channel_divisor": 4}},
    "nn.BatchNorm2d": {"*": {}},
    "nn.Linear": {"*": {"features_ratio": SHARES, "feature_divisor": 4}},
}
BATCH = 250


def by_fastnas(given: Material, share: float) -> onnx.ModelProto:
    """The best subnet that FastNAS finds, by the accuracy on labelled images."""
    assert given.module is not None
    assert given.labels is not None
    (images,) = given.inputs.values()
    x, y = torch.from_numpy(images), torch.from_numpy(given.labels)
    batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    def score(net: torch.nn.Module) -> float:
        with torch.no_grad():
            right = sum(int((net(a).argmax(1) == b).sum()) for a, b in batches)
        return right / len(y)

    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "data_loader": batches,
            "score_func": score,
            "checkpoint": str(Path(folder) / "search.pth"),
        }
        net, _ = mtp.prune(
            given.module(),
            mode=[("fastnas", RULES)],
            constraints={"flops": f"{share:.0%}"},
            dummy_input=x[:1],
            config=options,
        )
    example = (x[:1],)
    return ir.to_proto(mg.export(net.eval(), example, dynamic_batch=True))


def by_shrink(given: Material, share: float) -> onnx.ModelProto:
    """What this program makes of the same images, without their labels."""
    (images,) = given.inputs.values()
    budget = {"flops": f"{share:.0%}"}
    return ir.to_proto(mg.shrink(given.path, images, budget, round_to=4, limit=None).model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/experiments"))
    parser.add_argument("--networks", nargs="*", default=list(CIFAR))
    parser.add_argument("--seeds", type=int, default=1)
    asked = parser.parse_args()
    print("| network | FLOPs asked | by | FLOPs left | accuracy before | after | CPU s |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for network in asked.networks:
        for seed in range(asked.seeds):
            given = material(Subject(network, "nodes", seed), asked.data, asked.runs)
            base = onnx.load(given.path)
            before = given.judged(base)["accuracy"]
            for share in (0.7, 0.5):
                for name, make in (("FastNAS", by_fastnas), ("shrink", by_shrink)):
                    torch.manual_seed(seed)
                    np.random.seed(seed)
                    start = time.process_time()
                    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                        made = make(given, share)
                    taken = time.process_time() - start
                    left = _flops(made) / _flops(base)
                    after = given.judged(made)["accuracy"]
                    print(
                        f"| {network}, {seed} | {share:.0%} | {name} | {left:.1%} | {before:.1%} "
                        f"| {after:.1%} | {taken:.0f} |",
                        flush=True,
                    )


def _flops(model: onnx.ModelProto) -> float:
    return mg.cost(mg.lift(model), "flops").total


if __name__ == "__main__":
    main()
