"""Resize a model of several gigabytes, and measure the memory that it takes.

    python tools/large_model.py [--gigabytes 3] [--verify] [--folder DIR]
    python tools/large_model.py --decoder 7B --folder DIR   # like Llama, float16, 13.5 GB, twice

The model has 1x1 convolutions and linear layers with random weights in external data, or is a
decoder (``morphgraph/testing/decoder.py``). It is made in a temporary folder; another process lifts
it, plans 50 % of its FLOPs and writes the result. Printed are the largest resident set above what
the bare interpreter takes, the share of it that no file backs, and the seconds, beside those in
which the file is copied, before and after.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from morphgraph.testing.decoder import SHAPES, write_decoder

LAYERS = 12
FINAL = 10

WORK = """
import json, re, sys, time

def kilobytes(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+)", status.read()).group(1))

start, began, cpu = kilobytes("VmRSS"), time.perf_counter(), time.process_time()
import morphgraph as mg

source, target, verify = sys.argv[1], sys.argv[2], sys.argv[3] == "verify"
stages = {}

def stage(name):
    resident = (kilobytes("VmHWM") - start) * 1024
    before = [sum(numbers) for numbers in zip((0, 0, 0), *stages.values())]
    clock, busy = time.perf_counter() - began - before[0], time.process_time() - cpu - before[1]
    stages[name] = clock, busy, resident

graph = mg.lift(source)
mg.cost(graph, "flops").total
stage("lift, group and cost")
plan = mg.plan(graph, budget={"flops": "50%"})
stage("plan")
mg.save(mg.apply(graph, plan, verify=verify), target)
stage("resize")
print(json.dumps({
    "stages": stages,
    "resident": (kilobytes("VmHWM") - start) * 1024,
    "seconds": time.perf_counter() - began,
}))
"""


def main() -> None:
    """Make the model, resize it in a process of its own, print what that took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.0, help="of weights")
    parser.add_argument("--decoder", choices=SHAPES, help="one of so many parameters, float16")
    parser.add_argument("--verify", action="store_true", help="check the result as well")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder, "large.onnx"), Path(folder, "small.onnx")
        if options.decoder:
            write_decoder(source, SHAPES[options.decoder], "float16")
        else:
            write_model(Path(folder), int(options.gigabytes * 1e9))
        copies = [copying(source)]
        used = measure(source, target, options.verify)
        copies.append(copying(source))
        sizes = [Path(f"{p}.data").stat().st_size for p in (source, target)]
    print(f"weights: {sizes[0] / 1e9:.2f} GB before, {sizes[1] / 1e9:.2f} GB after")
    (before, cpu), (after, more) = copies
    print(
        f"copying the file: {before:.0f} s before, {after:.0f} s after; CPU {cpu:.1f}, {more:.1f} s"
    )
    for name, (seconds, cpu, resident) in used["stages"].items():
        print(
            f"{name}: {seconds:.1f} s, CPU {cpu:.1f} s, {resident / 1e6:.0f} MB at most until then"
        )
    print(f"resident set above the interpreter's start: {used['resident'] / 1e6:.0f} MB")
    print(f"of it anonymous memory: {used['anonymous'] / 1e6:.0f} MB; {used['seconds']:.0f} s")


def copying(source: Path) -> tuple[float, float]:
    """Seconds in which the weights are copied and stand on the disk: on the clock, and of CPU."""
    began, cpu = time.perf_counter(), time.process_time()
    data = Path(f"{source}.data")
    copy = data.with_suffix(".copy")
    shutil.copyfile(data, copy)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began, time.process_time() - cpu
    copy.unlink()
    return seconds


def write_model(folder: Path, weight_bytes: int) -> Path:
    """A chain of layers of one width, float32, whose weights lie in external data.

    The kernels of all layers take ``weight_bytes`` together; [width, width, 1, 1] in the first
    half of them, [width, width] in the second.
    """
    width = round((weight_bytes / 4 / LAYERS) ** 0.5)
    generator = np.random.default_rng(0)
    path = folder / "large.onnx"
    nodes, tensors, offset, last = [], [], 0, "x"
    with Path(f"{path}.data").open("wb") as data:
        for k in range(LAYERS + 1):
            rows = width if k < LAYERS else FINAL
            is_convolution = k < LAYERS // 2
            for _ in range(rows):
                numbers = generator.random(width, dtype=np.float32) - np.float32(0.5)
                data.write((numbers * np.float32((12 / width) ** 0.5)).tobytes())
            tensor = TensorProto(name=f"w{k}", data_type=TensorProto.FLOAT)
            tensor.dims[:] = (rows, width, 1, 1) if is_convolution else (rows, width)
            tensor.data_location = TensorProto.EXTERNAL
            size = rows * width * 4
            for key, value in {
                "location": f"{path.name}.data",
                "offset": offset,
                "length": size,
            }.items():
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            offset += size
            if is_convolution:
                nodes.append(helper.make_node("Conv", [last, f"w{k}"], [f"a{k}"], name=f"conv{k}"))
            else:
                if k == LAYERS // 2:
                    nodes.append(helper.make_node("Flatten", [last], ["flat"], name="flatten"))
                    last = "flat"
                nodes.append(
                    helper.make_node("Gemm", [last, f"w{k}"], [f"a{k}"], f"linear{k}", transB=1)
                )
            last = f"a{k}"
            if k < LAYERS:
                nodes.append(helper.make_node("Relu", [last], [f"r{k}"], name=f"relu{k}"))
                last = f"r{k}"
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, width, 1, 1])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, FINAL])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def measure(source: Path, target: Path, verify: bool = False) -> dict[str, Any]:
    """Resize a model in a process of its own.

    Returns:
        ``stages``: by name their seconds, and the most bytes until their end;
        ``resident`` and ``anonymous``: the most bytes above the interpreter's start, of all memory
        and of that which no file backs (sampled every 5 ms); ``seconds``.
    """
    command = [sys.executable, "-c", WORK, str(source), str(target), "verify" if verify else ""]
    anonymous: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
            anonymous += [int(number) * 1024 for number in found]
            time.sleep(0.005)
        assert process.stdout is not None
        result: dict[str, Any] = json.loads(process.stdout.read())
    first = next((number for number in anonymous if number), 0)
    return {**result, "anonymous": max(anonymous) - first}


if __name__ == "__main__":
    main()
