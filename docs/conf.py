"""Sphinx configuration: MyST pages, the reference from docstrings. `make docs` treats warnings as errors."""

import natgrad

project = "natgrad"
author = "The natgrad authors"
copyright = "the natgrad authors, Apache 2.0"
version = release = natgrad.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

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
