"""Operators that installed packages teach: the entry points of the group ``morphgraph.ops``.

A package names them in its ``pyproject.toml``::

    [project.entry-points."morphgraph.ops"]
    acme = "acme.morphgraph_ops"            # a module that calls register when it is imported
    acme = "acme.morphgraph_ops:teach"      # or a function that does so when it is called

They are loaded once, when a model holds an operator that nobody has described yet: a program that
meets none does not look for them.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from morphgraph.errors import warn

GROUP = "morphgraph.ops"


@cache
def load_plugins() -> None:
    """Let every plugin register its operators; a broken one is named in a warning, and left out."""
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        _load(point)


def _load(point: EntryPoint) -> None:
    try:
        found = point.load()
        if callable(found):
            found()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a plugin may raise anything
        package = f" of {point.dist.name}" if point.dist is not None else ""
        warn(
            f"plugin '{point.name}'{package} ({point.value}): {type(error).__name__}: {error}; "
            "its operators stay unknown; repair the package, or uninstall it",
        )
