"""Whether a slim network is as fast as one that is written by hand: a table for the benchmarks.

    python tools/bench_slim.py                          # minutes; a quiet machine is better
    python tools/bench_slim.py -o docs/benchmarks.md    # as its section of the page

By hand: torchvision's module whose convolutions, norms and linear layers are replaced by new ones
of the plan's widths, exported by ``torch.onnx.export``. Slim: the original, exported and resized by
morphgraph. Both hold the same weights, and must give the same outputs. They run interleaved in ONNX
Runtime, one thread; the ratio is the median of the paired ratios of CPU time with its 95 %
interval, above 1 where the slim one is slower.
"""

import argparse
import datetime as dt
import tempfile
import warnings
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import cast

import numpy as np
import onnxruntime as ort
import torch
import torchvision
from onnx_ir import Model
from torch import nn

import morphgraph as mg
from morphgraph.testing.random_weights import randomize_weights

HEADING = "## A slim network beside one written by hand"
NETWORKS = ("resnet18", "mobilenet_v2", "vgg11_bn", "efficientnet_b0", "densenet121")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=NETWORKS, help="names in torchvision")
    parser.add_argument("--budget", default="50%", help="of the FLOPs")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each model")
    parser.add_argument("-o", "--output", type=Path, help="a page that gets the table")
    options = parser.parse_args()
    lines = [
        f"| network at {options.budget} of the FLOPs | by hand, ms | slim, ms | slim / by hand |",
        "|---|---:|---:|---|",
    ]
    print("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            lines.append(row(name, options.budget, options.seconds, Path(folder)))
            print(lines[-1], flush=True)
    if options.output:
        write(options.output, "\n".join(lines))


def write(page: Path, table: str) -> None:
    """Put the table into its section of a page, or behind the page."""
    about = "\n\n".join((__doc__ or "").split("\n\n")[2:]).strip()
    made = (
        f"Made by `tools/bench_slim.py` on {dt.date.today()}, onnxruntime {ort.__version__}, "
        f"torch {torch.__version__}."
    )
    section = f"{HEADING}\n\n{made}\n{about}\n\n{table}\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(HEADING)
    behind = "".join(f"\n## {each}" for each in rest.split("\n## ")[1:])
    page.write_text(f"{before.rstrip()}\n\n{section}{behind}", encoding="utf-8")


def row(name: str, budget: str, seconds: float, folder: Path) -> str:
    """A network's two times."""
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    net = cast(nn.Module, torchvision.models.get_model(name, weights=None)).eval()
    randomize_weights(net, (image,))
    written, slim = folder / f"{name}-by-hand.onnx", folder / f"{name}-slim.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = mg.lift(mg.export(net, (image,)))
        model = mg.apply(graph, mg.plan(graph, {"flops": budget}))
        mg.save(model, slim)
        net = by_hand(net, weights_of(model))
        torch.onnx.export(net, (image,), written, external_data=False, verbose=False)
    require_equal(net, image, slim)
    require_equal(net, image, written)
    first, second = mg.bench([written, slim], seconds=seconds).models
    assert second.speedup is not None
    assert second.speedup_interval is not None
    low, high = (1 / bound for bound in reversed(second.speedup_interval))
    return (
        f"| {name} | {first.p50_ms:.2f} | {second.p50_ms:.2f} | "
        f"{1 / second.speedup:.3f} ({low:.3f} to {high:.3f}) |"
    )


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """The weights of a model that was exported from a module, by their names there."""
    return {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def by_hand(net: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module with new layers, as wide as the weights that they get."""
    net = deepcopy(net)
    for path, layer in list(net.named_modules()):
        made = resized(layer, weights.get(f"{path}.weight"))
        if made is not None:
            net.set_submodule(path, made)
    mine = net.state_dict()
    net.load_state_dict({name: weights.get(name, mine[name]) for name in mine})
    return net.eval()


def resized(layer: nn.Module, weight: torch.Tensor | None) -> nn.Module | None:
    """A layer of its kind for a weight; None of a layer that has no width."""
    if weight is None:
        return None
    bias = getattr(layer, "bias", None) is not None
    if isinstance(layer, nn.Conv2d):
        is_depthwise = layer.groups == layer.in_channels > 1
        return nn.Conv2d(
            weight.shape[0] if is_depthwise else weight.shape[1] * layer.groups,
            weight.shape[0],
            cast(tuple[int, int], layer.kernel_size),
            cast(tuple[int, int], layer.stride),
            cast(tuple[int, int], layer.padding),
            cast(tuple[int, int], layer.dilation),
            groups=weight.shape[0] if is_depthwise else layer.groups,
            bias=bias,
        )
    if isinstance(layer, nn.Linear):
        return nn.Linear(weight.shape[1], weight.shape[0], bias)
    if isinstance(layer, nn.BatchNorm2d):
        return nn.BatchNorm2d(weight.shape[0], layer.eps, layer.momentum)
    return None


def require_equal(net: nn.Module, image: torch.Tensor, file: Path) -> None:
    """Refuse to compare networks that do not compute the same."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        expected = net(image).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


if __name__ == "__main__":
    main()
