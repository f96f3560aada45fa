"""What factors of rotated pairs make up for, where heads of a trained decoder get smaller.

    python tools/experiments/decoder_rotary.py [--shares 0.8 0.7 0.6] [--pairs 12 8] [--seed 0]
    python tools/experiments/decoder_rotary.py --folder runs/experiments/decoder-normed

The folder holds a decoder that ``tools/experiments/decoder.py`` trains: with norms of queries and
keys, factors are those of the norm's scales. At every budget of the
parameters outside of the embeddings, and at every number of pairs where nothing else goes, it is
made smaller several times, with one calibration text:
pairs go by the smallest kernels and nothing makes up for them; they go by the logits; with the
factors too; and with mixtures ahead of the norm, too. Perplexity is that of text that nobody has
seen.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
from decoder import FOLDER
from decoder_table import Material

import morphgraph as mg
from morphgraph.arrays import FloatArray, IntArray
from morphgraph.options import Attention
from morphgraph.passes.calibration import bases, narrowed
from morphgraph.passes.calibration.compared import Compared
from morphgraph.passes.calibration.curves import order_of
from morphgraph.passes.calibration.factors import best_factors, whole
from morphgraph.passes.calibration.logits import products
from morphgraph.passes.calibration.mixing import Mixtures, Sample, best_mixtures
from morphgraph.passes.calibration.normed import best_scales
from morphgraph.plans import Plan, make_plan
from morphgraph.shrinker import Shrinker
from morphgraph.shrinking import finish


def main() -> None:
    """Print a row for every budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--attention", nargs="+", default=["head-dim", "all"])
    parser.add_argument("--shares", nargs="*", type=float, default=[0.8, 0.7, 0.6])
    parser.add_argument("--pairs", nargs="+", type=int, default=[], help="that stay, alone")
    parser.add_argument("--arms", nargs="+", choices=list(FACTORS), default=list(FACTORS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for attention in options.attention:
        material = Material(options.folder, options.seed)
        print(f"attention={attention}, original: {material.judge(material.graph.model):.2f}")
        for arm in options.arms:
            measure(material, attention, arm, options)


def measure(
    material: Material, attention: Attention, arm: str, options: argparse.Namespace
) -> None:
    """Print what one way leaves of the decoder at all budgets, and at all numbers of pairs."""
    graph = mg.lift(material.folder / "decoder.onnx", attention=attention)
    shrinker = Shrinker(graph, {"input_ids": material.text}, seed=options.seed, threads=1)
    (pairs,) = {
        k for p in products(graph) if p.partner is not None for k in graph.groups_on(p.summed)
    }
    if arm == "by kernels":
        plain = [p for p in shrinker.compared.products if p.partner is None]
        shrinker.compared = Compared(plain, shrinker.compared.moments)
    factors, scales, mixtures = FACTORS[arm]
    with (
        patch.object(bases, "best_factors", factors),
        patch.object(narrowed, "best_scales", scales),
        patch.object(narrowed, "best_mixtures", mixtures),
    ):
        for count in options.pairs:
            keep = np.sort(order_of(shrinker.calibration, pairs)[-count:])
            _row(material, shrinker, make_plan(graph, {pairs: keep}, {}), pairs, arm)
        for share in options.shares:
            _row(
                material,
                shrinker,
                shrinker.plan(material.budget(share)),
                pairs,
                f"{share:.0%} {arm}",
            )


def _row(material: Material, shrinker: Shrinker, plan: Plan, pairs: int, name: str) -> None:
    began = time.process_time()
    found = material.judge(finish(shrinker, plan, verify=False).model)
    left = int(plan.widths(shrinker.graph)[pairs])
    print(f"{name}, {left} pairs: {found:.2f} ({time.process_time() - began:.0f} s)", flush=True)


def _as_they_are(
    _fitted: FloatArray, _aside: FloatArray, partner: IntArray, kept: IntArray
) -> FloatArray:
    """Factors of 1 for what stays."""
    found = np.zeros(len(partner))
    found[kept] = whole(partner)[kept]
    return found


def _as_they_start(_fitted: FloatArray, _aside: FloatArray, start: FloatArray) -> FloatArray:
    """The numbers of a norm as they are."""
    return start


def _slices(start: Mixtures, _fitted: Sequence[Sample], _aside: Sequence[Sample]) -> Mixtures:
    """The elements that stay as they are."""
    return start


FACTORS = {
    "by kernels": (best_factors, best_scales, best_mixtures),
    "by logits": (_as_they_are, _as_they_start, _slices),
    "with factors": (best_factors, best_scales, _slices),
    "with mixtures": (best_factors, best_scales, best_mixtures),
}


if __name__ == "__main__":
    main()
