"""How far results may differ and still count as the same.

Every number is a share of a scale that its comment names. They stand in one module of the lowest
layer, for the rewrites, the check above them, ``to_torch`` and the test kit all need some, and none
of these may import all others.
"""

RESIZED = 1e-4
"""Between a resized model and the masked original: of the largest magnitude of the original's
output. Single precision rounds by less even in deep networks; a wrong slice is off by far more."""

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

REBUILT = 1e-3
"""Between two forms of one network in PyTorch: of an output's largest magnitude, or of each number
and of 1. It is wide, for the order of sums differs; what it must catch is another function."""

MIN_SENSITIVITY = 1e-3
"""How far masking must change some output, as a share of its scale, for a check to have power. A
wrong slice could hide below a removal that changes the outputs by less."""

PROOF_SENSITIVITY = 1e-2
"""The same in ``testing.prove``, whose weights are drawn so that removals change the outputs."""
