"""How Sphinx builds these pages: ``make docs``, or ``sphinx-build -W docs build/docs``.

Nothing is taken from the network: no inventories of other projects, no fonts, no scripts.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from morphgraph.version import __version__  # noqa: E402

project = "morphgraph"
author = "the morphgraph authors"
copyright = "the morphgraph authors, Apache-2.0"  # noqa: A001
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_pages",  # tools/sphinx_pages.py
]
myst_heading_anchors = 4  # links to headings, as GitHub names them
exclude_patterns = ["_static"]

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"morphgraph {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "default"
