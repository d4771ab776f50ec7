"""Sphinx configuration. Build strictly: `sphinx-build -W --keep-going -n docs docs/_build`."""

import shunted_lit

project = "shunted-lit"
author = "the shunted-lit contributors"
project_copyright = f"2026, {author}"
release = version = shunted_lit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
default_role = "code"  # docstrings write `name`
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # an included file starts at its own heading level

autodoc_inherit_docstrings = False  # those of Lightning link into its own documentation
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "mixed"
# Types of other libraries, and aliases of types, have no page here.
nitpick_ignore_regex = [("py:.*", r"(?!shunted_lit).*")]

napoleon_use_ivar = True  # an `Attributes:` section does not repeat what autodoc lists

html_theme = "furo"
html_title = "shunted-lit"
html_static_path = ["_static"]
html_css_files = ["style.css"]
