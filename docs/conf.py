"""The site: `make docs` builds it offline from these Markdown pages."""

import re

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
autodoc_typehints_format = "short"
aliases = "Answer Archive FloatArray ImageBatch IntArray Metrics Ratios Request Strategy"  # as the code writes them
autodoc_type_aliases = {name: name for name in aliases.split()}
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def plain_names(app, what, name, obj, options, signature, returns):
    """Aliases inside of other types as the code writes them, not as the objects that stand for them."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returns))


def setup(app):
    app.connect("autodoc-process-signature", plain_names)
