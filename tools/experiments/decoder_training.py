"""How the decoders of the experiments are trained on a text: one loop, that goes on where it was.

AdamW with a warm-up and a cosine, on sequences from random places of the text, the same ones
whenever a step comes; a checkpoint every 200 steps.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

BATCH = 8
RATE = 2e-3
CHECKPOINT = 200  # steps


@dataclass(frozen=True)
class Course:
    """What differs between decoders.

    Attributes:
        length: tokens of a sequence.
        warm: steps of the warm-up.
        loss: of a network on a batch of ids, ``[BATCH, length]``.
    """

    length: int
    warm: int
    loss: Callable[[Any, torch.Tensor], torch.Tensor]


def train(folder: Path, text: Path, network: Any, steps: int, course: Course) -> None:
    """Train a network, from its last checkpoint where there is one.

    Args:
        folder: of the network and its checkpoint.
        text: the folder with the ids, ``train.npy``.
        network: of transformers.
        steps: of ``BATCH`` sequences.
        course: what is particular to it.
    """
    optimizer = torch.optim.AdamW(
        network.parameters(), RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    state, first = folder / "training.pt", 0
    if state.exists():
        kept = torch.load(state, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        first = int(kept["step"])
    ids = np.load(text / "train.npy", mmap_mode="r", allow_pickle=False)
    began = time.perf_counter()
    for step in range(first, steps):
        warm, along = min(1.0, (step + 1) / course.warm), step / steps
        rate = RATE * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * along)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = course.loss(network, torch.tensor(random_sequences(ids, step, course.length)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            speed = (step + 1 - first) * BATCH * course.length / (time.perf_counter() - began)
            print(f"{step + 1}/{steps} loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
        if (step + 1) % CHECKPOINT == 0 or step + 1 == steps:
            kept = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**kept, "step": step + 1}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            network.save_pretrained(folder)


def random_sequences(
    ids: NDArray[np.uint16], seed: int, length: int, count: int = BATCH
) -> NDArray[np.int64]:
    """Some from random places of a text, ``[count, length]``."""
    places = np.random.default_rng(seed).integers(len(ids) - length, size=count)
    return np.stack([ids[at : at + length] for at in places]).astype(np.int64)
