"""Names for the types of arrays, in one place."""

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = dict[str, Array]
"""Arrays by the names of values: what a model takes or gives."""
IntArray = np.ndarray[Any, np.dtype[np.int64]]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Shape = tuple[int, ...]
"""The sizes of a value's axes."""
