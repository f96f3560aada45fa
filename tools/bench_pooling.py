"""What a pooling costs in ONNX Runtime where its channels are no whole blocks.

    python tools/bench_pooling.py

A pooling of 3x3 places on 28x28 stands between two pointwise convolutions, which stay in the
blocked layout at both widths. Times are microseconds by ONNX Runtime's profile, one thread, the
middle of 100 runs that take turns.
"""

from collections.abc import Sequence

import numpy as np

from morphgraph.runtimes import Executed, find_runtime
from morphgraph.testing import model_from_text

WIDTHS = (160, 156)
NET = """<ir_version: 10, opset_import: ["": 20]>
net (float[1,16,28,28] x, float[{c},16,1,1] a, float[32,{c},1,1] b) => (float[1,32,28,28] y)
{{ h = Conv(x, a)  p = {kind}<kernel_shape=[3,3], pads=[1,1,1,1]>(h)  y = Conv(p, b) }}"""


def main() -> None:
    """Print times and their ratio."""
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 16, 28, 28)).astype(np.float32)}
    for kind in ("AveragePool", "MaxPool"):
        models = [model_from_text(NET.format(kind=kind, c=width)) for width in WIDTHS]
        sessions = [find_runtime("ort").session(model) for model in models]
        turns = [[_pooling(session.executed(feeds, 10)) for session in sessions] for _ in range(10)]
        whole, fewer = np.median(turns, axis=0)
        print(f"{kind}: {WIDTHS[0]} channels {whole:.0f}, {WIDTHS[1]} {fewer:.0f}: ", end="")
        print(f"{fewer / whole:.1f} times as long")


def _pooling(executed: Sequence[Executed]) -> float:
    """Microseconds of the pooling."""
    return next(each.microseconds for each in executed if each.op_type.endswith("Pool"))


if __name__ == "__main__":
    main()
