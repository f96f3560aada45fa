"""Silence for what others log while this program tries things out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unlogged() -> Iterator[None]:
    """Nothing is logged meanwhile, by whomever.

    >>> with unlogged():
    ...     logging.getLogger("elsewhere").isEnabledFor(logging.CRITICAL)
    False
    >>> logging.getLogger("elsewhere").isEnabledFor(logging.CRITICAL)
    True
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
