"""``python -m morphgraph``: the same as the command ``morphgraph``."""

import os
import sys

from morphgraph.cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # One of several processes: DistributedDataParallel leaves threads of gloo behind, and one that
    # lets go of a tensor while the interpreter ends aborts it. All that is written is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
