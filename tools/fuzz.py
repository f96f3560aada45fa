"""Feed spoiled files to the program: it may refuse them, in one line, and nothing else.

    python tools/fuzz.py --seed 0                                 # the counts of docs/robustness.md
    python tools/fuzz.py --kinds plan,device --count 500
    python tools/fuzz.py --kinds fields --only 17                # one input again, with a traceback

Each input is made from the seed, its kind and its number alone. Inputs run in processes that have
4 GiB of address space, and 20 seconds for each; a process that dies is a fault of the input that it
was at. A resize that the check refuses is a fault, too. Exits with 1 where there is one.
"""

import argparse
import contextlib
import csv
import faulthandler
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

import morphgraph as mg
from morphgraph.calibration import Samples
from morphgraph.device import load_profile
from morphgraph.onnx_io.inputs import read_inputs
from morphgraph.testing import model_from_text, random_plan
from morphgraph.testing.limited import MEMORY_BYTES, run_limited
from morphgraph.testing.mutations import spoiled_bytes, spoiled_json, spoiled_message

SECONDS = 20  # of computing, for one input
BATCH = 500  # inputs of one process
COUNTS = {
    "bytes": 9000,
    "fields": 3000,
    "plan": 5000,
    "device": 600,
    "data": 3000,
    "resize": 400,
    "commands": 60,
}

TEXTS = {
    "convolutions": """
net (float[1,3,8,8] x, float[8,3,3,3] w1, float[8] b1, float[8] s, float[8] b, float[8] m,
     float[8] v, float[4,2,1,1] w2, float[5,64] w3) => (float[1,5] y) <int64[2] flat = {1, -1}> {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)  n = BatchNormalization(a, s, b, m, v)  r = Relu(n)
    p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)  c = Conv<group=4>(p, w2)
    f = Reshape(c, flat)  y = Gemm<transB=1>(f, w3) }""",
    "attention": """
net (float[2,5,8] x, float[8,12] wq, float[8,12] wk, float[8,12] wv, float[12,8] wo)
    => (float[2,5,8] y) <int64[4] heads = {2, 5, 3, 4}, float scale = {0.5}, int64[3] flat = {0, 0,
    -1}> { q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
    qh = Reshape(q, heads)  kh = Reshape(k, heads)  vh = Reshape(v, heads)
    qt = Transpose<perm=[0,2,1,3]>(qh)  kt = Transpose<perm=[0,2,3,1]>(kh)
    vt = Transpose<perm=[0,2,1,3]>(vh)
    s = MatMul(qt, kt)  t = Mul(s, scale)  p = Softmax<axis=-1>(t)  z = MatMul(p, vt)
    zt = Transpose<perm=[0,2,1,3]>(z)  zf = Reshape(zt, flat)  y = MatMul(zf, wo) }""",
    "branches": """
net (float[1,3,6,6] x, float[6,3,1,1] w1, float[6,6,3,3] w2, float[6,1,3,3] w3, float[4,12,1,1] w4)
    => (float[1,4,12,12] y) <int64[2] parts = {3, 3}, float[4] by = {1, 1, 2, 2}> {
    a = Conv(x, w1)  b = Conv<pads=[1,1,1,1]>(a, w2)  r = Add(a, b)
    d = Conv<group=6, pads=[1,1,1,1]>(r, w3)  l, k = Split<axis=1>(d, parts)
    m = Concat<axis=1>(k, l, r)  g = Sigmoid(m)  h = Mul(m, g)  o = Conv(h, w4)
    y = Resize<mode="nearest">(o, , by) }""",
    "recurrent": """
net (float[4,1,3] x, float[1,24,3] w, float[1,24,6] r, float[1,48] b, float[6,5] o)
    => (float[4,1,5] y) <int64[1] one = {1}> {
    h, last, cell = LSTM<hidden_size=6>(x, w, r, b)  s = Squeeze(h, one)  y = MatMul(s, o) }""",
    "words": """
net (int64[1,4] x, float[10,6] table, float[6] g, float[6] b, float[6,8] up, float[8,6] down)
    => (float[1,4,6] y) <int64 axis = {0}> {
    e = Gather(table, x)  n = LayerNormalization(e, g, b)  u = MatMul(n, up)  a = Gelu(u)
    d = MatMul(a, down)  y = Add(e, d) }""",
}


@cache
def sound(name: str) -> onnx.ModelProto:
    return ir.to_proto(model_from_text(TEXTS[name]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, help="inputs of each kind, instead of the usual")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(COUNTS))
    parser.add_argument("--only", type=int, help="the number of one input")
    parser.add_argument("--faults", type=Path, help="a file that faults are added to, a line each")
    parser.add_argument("--from", dest="first", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    kinds = asked.kinds.split(",")
    if asked.first is not None:
        work(kinds[0], asked.seed, asked.first, asked.count)
        return 0
    if asked.only is not None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, contextlib.chdir(folder):
            KINDS[kinds[0]](chance_of(asked.seed, kinds[0], asked.only))
        return 0
    print("| kind | inputs | refused | accepted | faults | seconds |", flush=True)
    print("| --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    total = Counter[str]()
    for kind in kinds:
        start = time.monotonic()
        found = fuzz(kind, asked.seed, asked.count or COUNTS[kind], asked.faults)
        row = (found.total(), found["refused"], found["accepted"], found["fault"])
        print(
            f"| {kind} | {' | '.join(map(str, row))} | {time.monotonic() - start:.0f} |", flush=True
        )
        total += found
    row = (total.total(), total["refused"], total["accepted"], total["fault"])
    print(f"| all | {' | '.join(map(str, row))} | |")
    return 1 if total["fault"] else 0


def fuzz(kind: str, seed: int, count: int, faults: Path | None) -> Counter[str]:
    """Run so many inputs of a kind, in processes of a batch each."""
    found = Counter[str]()
    done = 0
    while done < count:
        size = min(BATCH, count - done)
        lines, ended = batch(kind, seed, done, size)
        for line in lines:
            found[line["came"]] += 1
            if line["came"] == "fault":
                report(kind, line, faults)
        done += len(lines)
        if len(lines) < size:
            found["fault"] += 1
            report(kind, {"number": done, "came": "fault", "what": ended}, faults)
            done += 1
    return found


def batch(kind: str, seed: int, first: int, size: int) -> tuple[list[dict[str, Any]], str]:
    """What inputs came to, up to one at which the process died; and how it did."""
    line = [sys.executable, __file__, "--kinds", kind, "--seed", str(seed)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        done = subprocess.run(
            [*line, "--from", str(first), "--count", str(size)], stdout=out, stderr=err, check=False
        )
        out.seek(0), err.seek(0)
        found = [json.loads(each) for each in out if each.startswith("{")]
        return found, f"the process ended with {done.returncode}: {err.read()[-600:]}"


_SHOWN = Counter[str]()


def report(kind: str, line: dict[str, Any], faults: Path | None) -> None:
    last = line["what"].splitlines()[-1][:300]
    _SHOWN[last] += 1
    if _SHOWN[last] <= 3:
        print(f"FAULT {kind} {line['number']}: {last}", file=sys.stderr)
    if faults is not None:
        with faults.open("a") as file:
            file.write(json.dumps({"kind": kind, **line}) + "\n")


def work(kind: str, seed: int, first: int, count: int) -> None:
    """Run inputs in this process, and write a line on each."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _too_long)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)
        for number in range(first, first + count):
            # A hang in a library in C++ is ended by the second alarm, with the process; also one
            # that waits.
            faulthandler.dump_traceback_later(20 * SECONDS, exit=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            line = {"number": number, **came(kind, chance_of(seed, kind, number))}
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()
            print(json.dumps(line), flush=True)


def came(kind: str, chance: random.Random) -> dict[str, str]:
    """What became of an input: refused, accepted, or a fault with its traceback."""
    try:
        KINDS[kind](chance)
    except mg.MorphError as error:
        if type(error).__name__ == "VerificationError" or len(str(error).splitlines()) != 1:
            return {"came": "fault", "what": traceback.format_exc()[-3000:]}
        return {"came": "refused"}
    except BaseException:  # noqa: BLE001  # whatever it is, it is a fault
        return {"came": "fault", "what": traceback.format_exc()[-3000:]}
    return {"came": "accepted"}


def _too_long(_number: int, _frame: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s of computing")


def chance_of(seed: int, kind: str, number: int) -> random.Random:
    return random.Random(f"{seed} {kind} {number}")  # noqa: S311  # no secret


# ---- kinds of inputs


def look_at(content: bytes) -> None:
    """What `analyze` does with a file."""
    path = Path("model.onnx")
    path.write_bytes(content)
    graph = mg.lift(path)
    for cost in ("flops", "params", "memory"):
        assert mg.cost(graph, cost).total >= 0


def bytes_of_models(chance: random.Random) -> None:
    look_at(spoiled_bytes(sound(chance.choice([*TEXTS])).SerializeToString(), chance))


def fields_of_models(chance: random.Random) -> None:
    look_at(spoiled_message(sound(chance.choice([*TEXTS])), chance).SerializeToString())


@cache
def planned(name: str) -> tuple[Any, bytes]:
    graph = mg.lift(sound(name))
    return graph, random_plan(graph).to_json()


def plans(chance: random.Random) -> None:
    graph, plan = planned(chance.choice([*TEXTS]))
    path = Path("plan.json")
    path.write_bytes(spoiled_json(plan, chance))
    mg.Plan.load(path).widths(graph)


@cache
def device() -> bytes:
    """A profile of a made-up machine, with kinds that networks here have."""
    rng = np.random.default_rng(0)
    kernels = []
    for kind in ("Conv", "MatMul", "Relu"):
        for _ in range(8):
            wide, out = (int(size) for size in rng.integers(1, 64, 2))
            shapes = {
                "Conv": ((1, wide, 8, 8), (out, wide, 3, 3)),
                "MatMul": ((1, wide), (wide, out)),
            }
            inputs = shapes.get(kind, ((1, wide, 8, 8),))
            result = (1, out, 6, 6) if kind == "Conv" else (1, out if kind == "MatMul" else wide)
            kernels.append(
                {"op_type": kind, "inputs": inputs, "outputs": [result], "microseconds": 1.0 + wide}
            )
    return json.dumps({"runtime": "ort", "threads": 1, "kernels": kernels}).encode()


def devices(chance: random.Random) -> None:
    if chance.random() < 0.5:
        path, content = Path("device.json"), spoiled_json(device(), chance)
    else:
        path, content = Path("device.csv"), spoiled_bytes(table(), chance)
    path.write_bytes(content)
    graph, _ = planned("convolutions")
    load_profile(path)
    assert mg.cost(graph, "latency", device=path).total >= 0


def table() -> bytes:
    found = io.StringIO()
    rows = csv.writer(found)
    rows.writerow(["op_type", "inputs", "outputs", "microseconds"])
    for kernel in json.loads(device())["kernels"]:
        shapes = [
            " ".join("x".join(map(str, s)) for s in kernel[key]) for key in ("inputs", "outputs")
        ]
        rows.writerow([kernel["op_type"], *shapes, kernel["microseconds"]])
    return found.getvalue().encode()


def data(chance: random.Random) -> None:
    arrays = {"x": np.random.default_rng(0).standard_normal((4, 3, 8, 8)).astype(np.float32)}
    held = io.BytesIO()
    suffix = chance.choice(("npz", "npz", "npy"))
    if suffix == "npy":
        np.save(held, arrays["x"])
    else:
        write: Any = np.savez if chance.random() < 0.5 else np.savez_compressed
        write(held, **arrays)
    path = Path(f"data.{suffix}")
    path.write_bytes(spoiled_bytes(held.getvalue(), chance))
    graph, _ = planned("convolutions")
    if chance.random() < 0.5:
        read_inputs(path)
    else:
        for _ in Samples.of(path, graph.model).batches(2):
            pass


def resizes(chance: random.Random) -> None:
    """A spoiled model that is still one, resized and compared with its masked original."""
    proto = sound(chance.choice([*TEXTS]))
    if chance.random() < 0.9:
        proto = spoiled_message(proto, chance)
    graph = mg.lift(proto)
    mg.apply(graph, random_plan(graph, chance.randrange(2**31)))


COMMANDS: Sequence[Sequence[str]] = (
    ("analyze", "bad.onnx", "--format", "json"),
    ("plan", "bad.onnx", "--budget", "flops=60%", "-o", "new.json"),
    ("apply", "bad.onnx", "plan.json", "-o", "new.onnx"),
    ("verify", "bad.onnx", "plan.json", "bad.onnx"),
    ("bench", "bad.onnx", "--seconds", "0.01"),
    ("shrink", "bad.onnx", "--data", "data.npz", "--budget", "flops=70%", "-o", "new.onnx"),
    ("diff", "bad.onnx", "bad.onnx"),
)


def commands(chance: random.Random) -> None:
    """A spoiled file through one command line, as a user's shell sees it."""
    name = chance.choice([*TEXTS])
    spoil = chance.choice((spoiled_message, lambda proto, _: spoiled_bytes(proto, chance)))
    proto = sound(name)
    spoiled: Any = spoil(proto if spoil is spoiled_message else proto.SerializeToString(), chance)
    content = spoiled if isinstance(spoiled, bytes) else spoiled.SerializeToString()
    with tempfile.TemporaryDirectory(prefix="line-", dir=".") as temporary:
        folder = Path(temporary).absolute()
        (folder / "bad.onnx").write_bytes(content)
        (folder / "plan.json").write_bytes(planned(name)[1])
        shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
        rng = np.random.default_rng(0)
        kind = np.int64 if name == "words" else np.float32
        np.savez(folder / "data.npz", x=rng.integers(0, 9, (4 * shape[0], *shape[1:])).astype(kind))
        line = chance.choice(COMMANDS)
        [ran] = run_limited([(folder, line)], 20 * SECONDS)
        said = [each for each in ran.err.splitlines() if each.startswith("morphgraph: error: ")]
        assert ran.code in (0, 1, 3), (ran, line)
        assert len(said) == (ran.code != 0), (ran, line)
        assert "unexpected" not in ran.err, (ran, line)
        assert "Traceback" not in ran.err, (ran, line)
        assert not ran.spoilt, (ran, line)
        assert set(ran.made) <= ({"new.json", "new.onnx"} if ran.code == 0 else set()), (ran, line)
        if ran.code:
            raise mg.MorphError(said[0])


KINDS: dict[str, Callable[[random.Random], None]] = {
    "bytes": bytes_of_models,
    "fields": fields_of_models,
    "plan": plans,
    "device": devices,
    "data": data,
    "resize": resizes,
    "commands": commands,
}

if __name__ == "__main__":
    sys.exit(main())
