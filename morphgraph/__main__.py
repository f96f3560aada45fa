"""``python -m morphgraph``: the same as the command ``morphgraph``."""

import sys

from morphgraph.cli import main

sys.exit(main())
