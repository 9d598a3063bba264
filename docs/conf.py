"""The site: `make docs` builds it offline from these Markdown pages."""

import secateur

project = "Secateur"
author = "The Secateur authors"
copyright = "2026, the Secateur authors"
version = release = secateur.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Secateur {version}"
html_show_sourcelink = False

myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
