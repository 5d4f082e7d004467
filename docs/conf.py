"""Sphinx settings: `make docs`."""

from typing import Any

import safe_lr

project = "safe_lr"
author = "The safe_lr authors"
copyright = "2026, The safe_lr authors"
release = safe_lr.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links out of docs/; tests/test_readme.py checks that they lead somewhere
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
html_theme = "furo"
html_title = "safe_lr"


def as_literal(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Shows what docstrings set off, indented equations and Markdown tables, as it stands in the source."""
    shown: list[str] = []
    literal = False
    for before, line in zip(["", *lines], lines, strict=False):
        set_off = line.startswith(("    ", "|")) and not before and not line.lstrip().startswith(">>>")
        if set_off and not literal:
            shown += ["::", ""]
        literal = set_off or (literal and (line.startswith(("    ", "|")) or not line))
        shown.append(f"    {line}" if literal and line.startswith("|") else line)
    lines[:] = shown


def setup(app: Any) -> None:
    # Before napoleon, whose own priority is 500: it turns Google's sections into indented blocks too.
    app.connect("autodoc-process-docstring", as_literal, priority=400)
