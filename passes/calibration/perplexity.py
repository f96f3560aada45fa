"""Pass ``perplexity``: how well a language model foretells text, without labels.

The text says itself what comes next. A network is a language model here if it takes ids of tokens
and gives, for every token, a number per id, and what it gives for a token does not depend on later
ones; that is looked at, since a model that sees both sides of a gap has the same inputs and
outputs.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from morphgraph.arrays import Array, Arrays
from morphgraph.calibration.tokens import ids_input
from morphgraph.onnx_io import is_float
from morphgraph.passes.calibration.segments import run_all

#: Largest difference, as a share of the largest logit, that a later token makes: rounding.
LATER = 1e-3
_ROWS_BYTES = 2**26


@dataclass(frozen=True)
class Foretelling:
    """The input and the output of a language model.

    Attributes:
        ids: the input of ids, ``[batch, sequence]``.
        logits: the output of a number per id, ``[batch, sequence, ids]``.
        count: of the ids.
    """

    ids: str
    logits: str
    count: int


def foretelling(model: ir.Model, feed: Arrays, threads: int = 0) -> Foretelling | None:
    """What a model foretells, as one run of it shows; ``None`` of what is no language model.

    Args:
        model: the model.
        feed: inputs of a run.
        threads: of ONNX Runtime.
    """
    ids = ids_input(model)
    given = None if ids is None else feed.get(ids.name or "")
    if ids is None or given is None or given.ndim != 2 or given.shape[1] < 3:
        return None
    names = [v.name or "" for v in model.graph.outputs if is_float(v) and len(v.shape or ()) == 3]
    if not names:
        return None
    other = given.copy()
    other[:, -1] = np.where(given[:, -1] == given[:, 0], given[:, 1], given[:, 0])
    feeds = [feed, {**feed, (ids.name or ""): other}]
    one, two = run_all(model, feeds, threads)
    for name in names:
        found = one[name]
        if found.shape[:2] != given.shape or found.shape[2] <= max(int(given.max()), 2):
            continue
        before, scale = np.abs(found - two[name])[:, :-1], np.abs(found).max(initial=1e-30)
        if float(before.max()) <= LATER * float(scale):
            return Foretelling(ids.name or "", name, int(found.shape[2]))
    return None


def surprise(logits: Array, ids: Array) -> tuple[float, int]:
    """The negative log-likelihood of the tokens behind the first of each sequence, and how many.

    Args:
        logits: ``[batch, sequence, ids]``.
        ids: ``[batch, sequence]``.

    >>> total, count = surprise(np.zeros((1, 3, 8)), np.array([[1, 2, 3]]))
    >>> round(float(np.exp(total / count)), 6)
    8.0
    """
    rows = logits[:, :-1].reshape(-1, logits.shape[2])
    wanted = ids[:, 1:].reshape(-1)
    step = max(_ROWS_BYTES // (8 * rows.shape[1]), 1)
    total = 0.0
    for start in range(0, len(rows), step):
        part = rows[start : start + step].astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        chosen = part[np.arange(len(part)), wanted[start : start + step]]
        total += float((np.log(np.exp(part).sum(axis=1)) - chosen).sum())
    return total, len(wanted)


def perplexity(found: Iterable[Arrays], feeds: Iterable[Arrays], what: Foretelling) -> float | None:
    """The exponential of the mean negative log-likelihood of a token.

    ``None``: other ids remained, or there are ids that the network gives no number for. Then it is
    no language model, however causal: a tagger that has fewer tags than words.

    Args:
        found: what a network gives, batch by batch.
        feeds: for what.
        what: its input and output.
    """
    total, count = 0.0, 0
    for outputs, feed in zip(found, feeds, strict=True):
        if outputs[what.logits].shape[2] != what.count:
            return None
        if not 0 <= feed[what.ids].min() <= feed[what.ids].max() < what.count:
            return None
        more, tokens = surprise(outputs[what.logits], feed[what.ids])
        total, count = total + more, count + tokens
    with np.errstate(over="ignore"):
        return float(np.exp(total / max(count, 1)))
