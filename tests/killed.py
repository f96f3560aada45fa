"""Processes that are killed (SIGKILL): nothing is said to them, and they clean up nothing."""

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# Processes are forked from one that has imported everything and computed nothing.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["morphgraph.cli.morph", "morphgraph.recipes.run"])
_PATIENCE = 600.0  # seconds


def killed(
    run: Callable[..., Any], arguments: tuple[Any, ...], ready: Callable[[], bool], delay: float = 0
) -> bool:
    """Run a function in a process and kill it a while after it is ready; whether it ran on."""
    process = _PROCESSES.Process(target=run, args=arguments)
    process.start()
    while process.is_alive() and not ready():
        time.sleep(0.003)
    process.join(delay)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def wait_for_the_kill(marker: Path) -> NoReturn:
    """Say by a file that the moment has come, and do nothing more."""
    marker.touch()
    time.sleep(_PATIENCE)
    raise TimeoutError(marker)
