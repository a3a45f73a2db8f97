"""The documentation site: `make docs` builds docs/_build/html."""

from importlib.metadata import version as version_of

project = "twofold"
author = "The twofold authors"
copyright = author
version = release = version_of("twofold")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"twofold {version}"
html_static_path = []

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_mock_imports = ["lightning", "transformers"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_use_rtype = False
default_role = "py:obj"
suppress_warnings = ["ref.python"]


def _as_text(app, what, name, obj, options, lines):
    """Keep bars and stars of formulas as they are: docstrings are prose, and only their examples are code."""
    code = False
    for i, line in enumerate(lines):
        code = line.lstrip().startswith(">>>") or (code and bool(line.strip()))
        if not code:
            lines[i] = line.replace("|", r"\|").replace("*", r"\*")


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _as_text, priority=900)
