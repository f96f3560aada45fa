"""The types that lowerings name in their annotations, which are strings.

They are defined in ``torch_io``, above this package: type checkers alone import them, and torch is
loaded when a network becomes one of torch's.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx as fx

    from morphgraph.torch_io.builder import TorchBuilder as TorchBuilder
    from morphgraph.torch_io.functions import Activation as Activation
else:
    Activation = TorchBuilder = fx = None
