"""Checkpoints: the state of a training phase in a file that is whole or not there.

What is saved is plain data and tensors; nothing in a checkpoint is executed when it is read.
"""

import hashlib
import io
import random
import time
from pathlib import Path

import numpy as np
import torch

from morphgraph.errors import FileError
from morphgraph.onnx_io import escape, write_atomically
from morphgraph.train.distributed import State


class Checkpoint:
    """The checkpoint of one phase.

    Args:
        path: of the file; its folder exists.
        every: seconds between two checkpoints within an epoch.
    """

    def __init__(self, path: Path, every: float = 60.0) -> None:
        self.path = path
        self.every = every
        self._last = time.monotonic()

    def load(self, device: torch.device) -> State | None:
        """The last state, its tensors on ``device``; ``None`` where there is none yet.

        Raises:
            FileError: the file is no checkpoint.
        """
        if not self.path.exists():
            return None
        try:
            state: State = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:  # what PyTorch's reader raises shares no base class
            raise FileError(
                f"{escape(str(self.path))}: no checkpoint of a run ({escape(str(error))}); "
                "begin again with --overwrite"
            ) from error
        return state

    def due(self) -> bool:
        """Whether it is time for another one."""
        return time.monotonic() - self._last >= self.every

    def save(self, state: State) -> None:
        """Replace the file by one that holds this state."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(self.path, buffer.getvalue(), overwrite=True)
        self._last = time.monotonic()


def seed_of(seed: int, *names: object) -> int:
    """A seed for one thing of a run, so that no thing's randomness depends on what went before.

    >>> seed_of(0, "retrain", 1) == seed_of(0, "retrain", 1) != seed_of(0, "retrain", 2)
    True
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def seed_everything(seed: int) -> None:
    """Seed the global generators of PyTorch, NumPy and Python, from which dropout draws."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def random_states() -> State:
    """The states of the global generators."""
    generator, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(generator), np.asarray(keys).tolist(), position, has_gauss, cached),
        "python": random.getstate(),
    }


def restore_random_states(state: State) -> None:
    """Set the global generators to what :func:`random_states` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])
    generator, keys, *rest = state["numpy"]
    np.random.set_state((generator, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
