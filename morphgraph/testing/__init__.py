"""Random weights, random plans and proofs on them, for tests and for new operators."""

from morphgraph.errors import warn
from morphgraph.testing.prove import (
    is_rejected,
    model_from_text,
    prove,
    prove_plan,
    random_plan,
    random_removal,
    wrong_slices,
)
from morphgraph.testing.random_weights import (
    random_weight,
    randomize_model_weights,
    randomize_weights,
)

__all__ = [
    "is_rejected",
    "model_from_text",
    "prove",
    "prove_plan",
    "random_plan",
    "random_removal",
    "random_weight",
    "randomize_model_weights",
    "randomize_weights",
    "wrong_slices",
]

# Former names, for one version.
_RENAMED = {
    "felt_array": "random_weight",
    "make_felt": "randomize_weights",
    "make_felt_model": "randomize_model_weights",
}


def __getattr__(name: str) -> object:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _RENAMED[name]
    warn(f"{__name__}.{name} is now {new}", DeprecationWarning)
    return globals()[new]
