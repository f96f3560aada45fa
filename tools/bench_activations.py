"""What an activation costs that ONNX Runtime fuses behind a convolution.

    python tools/bench_activations.py

Eight convolutions with one activation each, in the blocked layout, run in turns with the same
without activations, one thread. Times are microseconds of a convolution: the median of 40 runs of
the whole network by the clock of the processor, over eight.
"""

from itertools import product

import numpy as np

from morphgraph.benchmark.probe_builder import Probe
from morphgraph.runtimes import Session, find_runtime

SIZES = ((32, 56), (96, 56), (192, 28), (384, 14), (960, 7))  # channels, side
ACTIVATIONS = ("", "Relu", "Relu6", "HardSigmoid", "LeakyRelu")
LAYERS, TURNS = 8, 40


def main() -> None:
    """Print a table: a row for each size of each convolution."""
    print("| convolution | channels, side | none, us |", " | ".join(ACTIVATIONS[1:]), "|")
    print("|---|---|---:|" + "---:|" * len(ACTIVATIONS[1:]))
    for depthwise, (channels, side) in product((False, True), SIZES):
        feeds = {"x0": np.random.default_rng(0).normal(size=(1, channels, side, side))}
        feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
        sessions = [_session(each, depthwise, channels, side) for each in ACTIVATIONS]
        for session in sessions:
            session.run(feeds)
        turns = [[session.timed_run(feeds).cpu for session in sessions] for _ in range(TURNS)]
        none, *others = np.median(turns, axis=0) * 1e6 / LAYERS
        kind = "depthwise" if depthwise else "pointwise"
        cells = " | ".join(f"{other / none:.2f}" for other in others)
        print(f"| {kind} | {channels}, {side} | {none:.0f} | {cells} |", flush=True)


def _session(activation: str, depthwise: bool, channels: int, side: int) -> Session:
    probe = Probe(0, free=False)
    x = probe.input((1, channels, side, side))
    for _ in range(LAYERS):
        if depthwise:
            x = probe.conv(x, channels, 3, groups=channels)
        else:
            x = probe.conv(x, channels, 1)
        x = probe.act(x, activation) if activation else x
    return find_runtime("ort").session(probe.model(x))


if __name__ == "__main__":
    main()
