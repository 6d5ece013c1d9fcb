"""How `make docs` makes a site of these pages: Sphinx, with MyST for Markdown."""

from expertstore import __version__

project = "expertd"
author = "the expertd authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"expertd {__version__}"
html_show_copyright = False
exclude_patterns = ["benchmarks/*"]
# Headings are link targets, as on GitHub.
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
