"""Activations of many samples are kept in files: memory does not grow with them."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource, sys
import numpy as np
from morphgraph.shrinking import shrink
from morphgraph.testing import model_from_text

def peak():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024

model = model_from_text('''<ir_version: 9, opset_import: ["": 20]>
net (float[N,3,160,160] x, float[24,3,3,3] a, float[24,24,3,3] b, float[24,24,3,3] c,
     float[8,24,1,1] d) => (float[N,8,1,1] y) {
    p = Conv<pads=[1,1,1,1]>(x, a)  r = Relu(p)  q = Conv<pads=[1,1,1,1]>(r, b)  s = Relu(q)
    t = Conv<pads=[1,1,1,1]>(s, c)  u = Add(t, r)  v = Relu(u)  w = Conv(v, d)
    y = GlobalAveragePool(w)
}''')
count = int(sys.argv[1])
inputs = np.random.default_rng(0).normal(size=(count, 3, 160, 160)).astype(np.float32)
before = peak()
shrink(model, inputs, {"flops": "80%"}, threads=1, verify=False)
print(json.dumps([inputs.nbytes, peak() - before]))
"""


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_bounded_where_activations_are_large() -> None:
    """120 samples of 2.5 MB for each of several activations, 300 MB for one."""
    grown = []
    for count in (30, 120):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(count)], capture_output=True, text=True, check=True
        )
        _, more = json.loads(done.stdout)
        grown.append(more)
    assert grown[1] < 1.5e9
    assert grown[1] < grown[0] + 0.6e9  # what is held in memory before files are written
