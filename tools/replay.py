"""Does a change of the code change what the program computes? Hashes to hold side by side.

    python tools/replay.py make MODELS                  # once: exports and random networks
    python tools/replay.py hash MODELS -o after.jsonl   # with the code of this checkout
    PYTHONPATH=../base python tools/replay.py hash MODELS -o before.jsonl
    python tools/replay.py compare before.jsonl after.jsonl

``make`` writes the small networks of the zoo, the networks with one construct each that the tests
compare peers on, three with open sizes, and 200 random networks of ``tests/test_laws.py``, all as
ONNX files. ``hash`` writes a line per file: its groups and their reasons, costs with gradients,
gates, strengths, three plans with an expansion each, and the bytes of every resized model. Public
names apart, functions are found by their names, wherever they stand, so that the code of both sides
may be cut differently. ``compare`` prints how many hashes of each kind are equal, lists those that
are not, and exits with 1 if there are any.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import logging
import pkgutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

import morphgraph as mg

HERE = Path(__file__).resolve().parent
RANDOM_NETWORKS = 200
COSTS = ("macs", "flops", "params", "weight_bytes", "memory", "peak", "latency")
SCORES = ("l2", "l1", "bn", "lasso", "random")  # both sides must know them


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the networks")
    make.add_argument("models", type=Path)
    hashes = commands.add_parser("hash", help="write the hashes of every network")
    hashes.add_argument("models", type=Path)
    hashes.add_argument("-o", "--output", type=Path, required=True)
    compare = commands.add_parser("compare", help="hold two files of hashes side by side")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    if options.command == "make":
        write_networks(options.models)
    elif options.command == "hash":
        write_hashes(options.models, options.output)
    else:
        return compare_hashes(options.before, options.after)
    return 0


# -- networks ------------------------------------------------------------------------------------


def write_networks(folder: Path) -> None:
    """All networks as ONNX files; torch is seeded before each."""
    folder.mkdir(parents=True, exist_ok=True)
    networks = (*zoo_networks(), *constructs(), *open_networks(), *random_networks())
    for name, model in networks:
        mg.save(model, folder / f"{name}.onnx", overwrite=True)
        print(name, file=sys.stderr, flush=True)


def zoo_networks() -> Iterator[tuple[str, ir.Model]]:
    import torch

    sys.path.insert(0, str(HERE / "zoo"))
    entries = importlib.import_module("entries").ENTRIES.values()
    for entry in entries:
        if entry.small:
            torch.manual_seed(0)
            network = entry.build()
            yield f"zoo-{entry.stem}", mg.export(network.net.eval(), network.arguments)


def constructs() -> Iterator[tuple[str, ir.Model]]:
    import torch

    for name, (build, shape, _) in _test_module("zoo/test_peers.py").NETWORKS.items():
        torch.manual_seed(0)
        plain = "".join(letter if letter.isalnum() else "-" for letter in name)
        yield f"construct-{plain}", mg.export(build().eval(), (torch.randn(shape),))


def open_networks() -> Iterator[tuple[str, ir.Model]]:
    """Networks that leave sizes open, and a network with a class token of an open batch."""
    import torch
    from torchvision.models import vision_transformer

    module = _test_module("passes/canonical/test_dynamic_sizes.py")
    axes = {"Language": (0, 1), "Segmentation": (0, 2, 3)}
    for kind, sizes in module.SIZES.items():
        torch.manual_seed(0)
        opened = (dict.fromkeys(axes[kind.__name__], torch.export.Dim.DYNAMIC),)
        example = module.given(kind, sizes[0])
        yield f"open-{kind.__name__}", mg.export(kind().eval(), (example,), dynamic_shapes=opened)
    torch.manual_seed(0)
    net = vision_transformer.VisionTransformer(32, 8, 2, 4, 32, 64).eval()
    yield "open-batch", mg.export(net, (torch.randn(2, 3, 32, 32),), dynamic_batch=True)


def random_networks() -> Iterator[tuple[str, ir.Model]]:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found: list[ir.Model] = []

    @seed(0)
    @settings(
        max_examples=RANDOM_NETWORKS,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(_test_module("test_laws.py").networks())
    def collect(model: ir.Model) -> None:
        found.append(model)

    collect()
    for number, model in enumerate(found[:RANDOM_NETWORKS]):
        yield f"random-{number:03d}", model


def _test_module(path: str) -> Any:
    file = HERE.parent / "tests" / path
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# -- hashes --------------------------------------------------------------------------------------


def write_hashes(models: Path, output: Path) -> None:
    """A line of hashes per network."""
    with output.open("w") as file:
        for path in sorted(models.glob("*.onnx")):
            line = {"name": path.stem, "hashes": hashes_of(path)}
            file.write(json.dumps(line) + "\n")
            file.flush()


def hashes_of(path: Path) -> dict[str, str]:
    """The hashes of one network, by what they are of; an error's name and words where it fails."""
    graph = mg.lift(path)
    found: dict[str, str] = {}

    def note(name: str, make: Callable[[], Any]) -> Any:
        try:
            thing = make()
        except mg.MorphError as error:
            found[name] = f"{type(error).__name__}: {error}"
            return None
        found[name] = digest(thing)
        return thing

    note("canonical", lambda: graph.model)
    note("groups", lambda: [_group(group) for group in graph.groups])
    note("reasons", lambda: [group.reason for group in graph.groups])
    for kind in COSTS:
        for convention in ("default", "morphnet"):
            note(f"cost {kind} {convention}", partial(_cost, graph, kind, convention))
    for name in ("gated_groups", "closing_scales", "deciding_scales"):
        note(f"gates {name}", partial(_facts, graph, name))
    for kind in SCORES:
        note(f"strengths {kind}", partial(_facts, graph, "score", kind))
    for name in ("kernels", "readers", "norm_scales"):
        note(f"strengths {name}", partial(_sources, graph, name))
    plans = {
        "uniform": lambda: mg.uniform(graph, 0.5, round_to=1),
        "budget": lambda: mg.plan(graph, budget={"flops": "60%"}, round_to=1),
        "deaths": lambda: mg.plan(
            graph, budget={"params": "40%"}, score="lasso", min_width=0, round_to=2
        ),
    }
    for name, make in plans.items():
        plan = note(f"plan {name}", make)
        if plan is None:
            continue
        wide = note(f"expand {name}", partial(mg.expand, graph, plan, {"flops": "90%"}))
        for which, chosen in ((name, plan), (f"{name} expanded", wide)):
            if chosen is not None:
                note(f"resized {which}", partial(mg.apply, graph, chosen, verify=False))
        note(f"absorbed {name}", partial(mg.apply, graph, plan, verify=False, absorb=True))
    return found


def _group(group: mg.Group) -> list[Any]:
    words = [group.id, group.name, group.width, group.statistical, group.producers, group.readers]
    members = [(m.value, m.axis, m.per_channel) for m in group.members]
    return [*words, members, group.channels]


def _cost(graph: mg.ChannelGraph, kind: str, convention: Any) -> list[Any]:
    cost = mg.cost(graph, kind, convention=convention)
    half = np.maximum(graph.widths // 2, 1)
    return [cost.total, cost.at(half), cost.gradient(graph.widths), cost.gradient(half)]


def _facts(graph: mg.ChannelGraph, name: str, *arguments: str) -> Any:
    return function(name)(graph, *arguments)


def _sources(graph: mg.ChannelGraph, name: str) -> list[Any]:
    return [[s.parameter, s.axis, s.channels] for s in function(name)(graph)]


def function(name: str) -> Callable[..., Any]:
    """The function of this name in ``morphgraph.passes``, in whatever module it stands."""
    if name not in _FUNCTIONS:
        package = importlib.import_module("morphgraph.passes")
        for info in pkgutil.walk_packages(package.__path__, "morphgraph.passes."):
            here = vars(importlib.import_module(info.name)).get(name)
            if inspect.isfunction(here) and here.__module__ == info.name:
                _FUNCTIONS[name] = here
    return _FUNCTIONS[name]


_FUNCTIONS: dict[str, Callable[..., Any]] = {}


def digest(thing: Any) -> str:
    """A hash that depends on values alone."""
    return hashlib.sha256(_bytes(thing)).hexdigest()[:16]


def _bytes(thing: Any) -> bytes:
    if isinstance(thing, mg.Plan):
        return thing.to_json()
    if isinstance(thing, ir.Model):
        proto: bytes = ir.to_proto(thing).SerializeToString(deterministic=True)
        return proto
    if isinstance(thing, np.ndarray):
        return repr((thing.dtype.str, thing.shape)).encode() + thing.tobytes()
    if isinstance(thing, dict):
        return b"{" + b"".join(_bytes(k) + b":" + _bytes(v) for k, v in thing.items()) + b"}"
    if isinstance(thing, frozenset | set):
        return _bytes(sorted(thing))
    if isinstance(thing, list | tuple):
        return b"[" + b",".join(map(_bytes, thing)) + b"]"
    return repr(thing).encode()


# -- comparison ----------------------------------------------------------------------------------


def compare_hashes(before: Path, after: Path) -> int:
    """Print how many hashes are equal, by their kind, and list the others."""
    old, new = (
        {line["name"]: line["hashes"] for line in map(json.loads, path.open())}
        for path in (before, after)
    )
    equal: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for network in sorted(old.keys() | new.keys()):
        left, right = old.get(network, {}), new.get(network, {})
        for what in sorted(left.keys() | right.keys()):
            kind = what.split()[0]
            total[kind] += 1
            if left.get(what) == right.get(what):
                equal[kind] += 1
            else:
                print(f"{network}: {what}: {left.get(what)} -> {right.get(what)}")
    print(f"{len(old)} networks before, {len(new)} after")
    for kind, number in sorted(total.items()):
        print(f"{kind:10} {equal[kind]:6} of {number:6} equal")
    return int(equal != total or old.keys() != new.keys())


if __name__ == "__main__":
    sys.exit(main())
