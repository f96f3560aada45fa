"""Time and memory of calibration beside one run of the network over the same inputs.

    python tools/bench_calibration.py 5M --sequences 96 --tokens 128
    python tools/bench_calibration.py 1B --parts statistics curves --folder /large/disk

A decoder like Llama with random weights (``morphgraph/testing/decoder.py``) is written, lifted, and
calibrated on random tokens, all in one process and by one thread. Every row is CPU seconds, also as
multiples of a run over all inputs, and the most memory that was resident meanwhile, mapped weights
included.
"""

import argparse
import platform
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import morphgraph as mg
from morphgraph.shrinker import Shrinker
from morphgraph.testing.decoder import SHAPES, write_decoder

PARTS = ("statistics", "curves", "plan", "refit")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES, help="by the number of parameters")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence")
    parser.add_argument("--blocks", type=int, help="another number of them")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--budget", default="70%", help="of the parameters")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tempfile.tempdir = folder  # activations too
        measure(Path(folder, "decoder.onnx"), options)


def measure(path: Path, options: argparse.Namespace) -> None:
    """Print a row for each part."""
    shape = SHAPES[options.shape]
    if options.blocks:
        shape = type(shape)(**{**vars(shape), "blocks": options.blocks})
    write_decoder(path, shape)
    drawn = np.random.default_rng(0).integers(shape.ids, size=(options.sequences, options.tokens))
    print(f"{options.shape}, {shape.blocks} blocks, {options.sequences} sequences of "
          f"{options.tokens} tokens; {time.strftime('%Y-%m-%d')}, onnxruntime {ort.__version__}, "
          f"{platform.processor() or platform.machine()}")  # fmt: skip
    base = _row("one run", lambda: once(path, drawn), None)
    graph = _row("lift", lambda: mg.lift(path), base)[1]
    shrinker = Shrinker(graph, {"input_ids": drawn}, threads=1)
    work: dict[str, Callable[[], Any]] = {
        "statistics": lambda: shrinker.calibration,
        "curves": lambda: shrinker.scores(),
        "plan": lambda: shrinker.plan({"params": options.budget}),
        "refit": lambda: shrinker.fit(shrinker.plan({"params": options.budget})),
    }
    for part in options.parts:
        _row(part, work[part], base)


def once(path: Path, ids: np.ndarray[Any, Any]) -> None:
    """Run the network over all inputs, a sequence at a time."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    for row in ids:
        session.run(None, {"input_ids": row[None]})


def _row(name: str, work: Callable[[], Any], base: Any) -> Any:
    """Do something; CPU seconds and what it gives."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = time.process_time(), time.perf_counter()
    result = work()
    seconds, clock = time.process_time() - before, time.perf_counter() - began
    status = Path("/proc/self/status").read_text()
    peak = int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1e6
    times = "" if base is None else f"{seconds / base[0]:7.2f} x"
    print(f"{name:12} {seconds:9.1f} s {times:10} {peak:6.2f} GB   ({clock:.0f} s on the clock)",
          flush=True)  # fmt: skip
    return seconds, result


if __name__ == "__main__":
    main()
