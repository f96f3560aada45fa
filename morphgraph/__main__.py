"""``python -m morphgraph``, and the command ``morphgraph``."""

import sys


def run() -> int:
    """Run the command line of this process; returns the exit code.

    Ctrl-C is one line from the first import on: what commands need is read within.
    """
    try:
        from morphgraph.cli import main

        code = main()
    except KeyboardInterrupt:
        from morphgraph.errors import INTERRUPTED, INTERRUPTED_CODE

        sys.stderr.write(f"morphgraph: error: {INTERRUPTED}\n")
        return INTERRUPTED_CODE
    _leave_with_others(code)
    return code


def _leave_with_others(code: int) -> None:
    """Where this is one of several processes, end here.

    DistributedDataParallel leaves threads of gloo behind, and one that lets go of a tensor while
    the interpreter ends aborts it. All that is written is written.
    """
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(run())
