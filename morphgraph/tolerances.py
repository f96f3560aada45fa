"""How far results may differ and still count as the same.

Every number is a share of a scale that its comment names. They stand in one module of the lowest
layer, for the rewrites, the check above them, ``to_torch`` and the test kit all need some, and none
of these may import all others.
"""

RESIZED = 1e-4
"""Between a resized model and the masked original: of the largest magnitude of the original's
output. Single precision rounds by less even in deep networks; a wrong slice is off by far more."""

ROUNDING = 2.0**-23
"""How far a number moves where a sum is taken in another order: of its own magnitude. This is one
step of single precision."""

ADDITIVE = 1e-4
"""Between f(a + b) - f(b) and f(a) - f(0), where an operator counts as linear: of the largest
magnitude of f(a + b)."""

EQUAL_SLICES = 1e-6
"""Between slices of a constant that count as the same: of its largest magnitude. This is the
rounding of single precision."""

IN_PLACE = 1e-5
ROUNDING_SPREAD = 30
"""Between a user's own network resized in place and its resized ONNX: of the largest magnitude of a
result IN_PLACE, and ROUNDING_SPREAD times what the two forms of the original differ by. A wrong
number of heads may change a result by less than RESIZED."""

FOLDED_IN_HALF = 3e-2
"""Between a model with weights in half precision and the same with scales folded into its layers:
of the largest magnitude of the model's output. Each folded weight is rounded once more."""

REBUILT = 1e-3
"""Between two forms of one network in PyTorch: of an output's largest magnitude, or of each number
and of 1. It is wide, for the order of sums differs; what it must catch is another function."""

MIN_SENSITIVITY = 1e-3
"""How far masking must change some output, as a share of its scale, for a check to have power. A
wrong slice could hide below a removal that changes the outputs by less."""

MIN_MOVED = 0.5
"""Share of an output's numbers that masking must move beyond ``RESIZED``, lest the values inside
are compared too."""

PROOF_SENSITIVITY = 1e-2
"""The same in ``testing.prove``, whose weights are drawn so that removals change the outputs."""
