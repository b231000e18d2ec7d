"""Sphinx configuration: MyST pages, the reference from docstrings. `make docs` treats warnings as errors."""

import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

import natgrad

sys.path.insert(0, str(Path(__file__).parent))
from check_records import faults  # noqa: E402

project = "natgrad"
author = "The natgrad authors"
copyright = "the natgrad authors, Apache 2.0"
version = release = natgrad.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "papers/files/*"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Docstrings cite the papers by short name, as in [KFAC, sec. 5]; those are no links.
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"natgrad {version}"
html_static_path: list[str] = []


def _check_records(app: Sphinx) -> None:
    found = faults(Path(app.srcdir) / "papers")
    if found:
        raise ExtensionError("; ".join(found))


def setup(app: Sphinx) -> None:
    """A page that shows a record of the quick size is an error."""
    app.connect("builder-inited", _check_records)
