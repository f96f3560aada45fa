"""Networks whose weights can be felt, and proofs on them, for tests and for new operators."""

from morphgraph.testing.prove import (
    is_rejected,
    model_from_text,
    prove,
    prove_plan,
    random_plan,
    random_removal,
    wrong_slices,
)
from morphgraph.testing.random_weights import felt_array, make_felt, make_felt_model

__all__ = [
    "felt_array",
    "is_rejected",
    "make_felt",
    "make_felt_model",
    "model_from_text",
    "prove",
    "prove_plan",
    "random_plan",
    "random_removal",
    "wrong_slices",
]
