"""How the pages are built: `make docs`, or `sphinx-build -W --keep-going -c docs . build/docs` in the project's folder.

The source folder is the project's, not this one, so that links from page to page and to files beside the code are the same here as on GitHub.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import exitify

project, author, release = "exitify", "the exitify authors", exitify.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "docs/README"
include_patterns = [
    "README.md",
    "docs/*.md",
    "benchmarks/README.md",
    "examples/README.md",
    "examples/*/README.md",
    "exitify/README.md",
    "exitify/artifact/FORMAT.md",
    "passes/README.md",
    "targets/README.md",
]
exclude_patterns = [".*", "build", "exitify/passes", "exitify/targets"]
myst_heading_anchors = 4
highlight_language = "none"
default_role = "code"  # names in docstrings stand in single backticks

html_theme = "furo"
html_title = f"exitify {release}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
suppress_warnings = ["toc.not_included"]  # guides of folders are reached by links; tests/test_documents.py looks for pages that are in no list

INDEX = "docs/README"


def setup(app: Sphinx) -> None:
    """Connect what the settings above cannot say."""
    app.connect("autodoc-process-docstring", plain_fields, priority=400)  # before napoleon, which has 500
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_front)


def plain_fields(app: Sphinx, what: str, name: str, described: Any, options: Any, lines: list[str]) -> None:
    """Fields of dataclasses, `logits: What it is. macs: Multiply-adds.`, as the section that napoleon knows; code after a colon as code."""
    fields = "|".join(getattr(described, "__dataclass_fields__", ()))
    made: list[str] = []
    inside = False
    for line in lines:
        if fields and re.match(rf"(?:(?:{fields})(?:, )?)+: ", line):
            made += [] if inside else ["Attributes:"]
            made += [f"    {part}" for part in re.split(rf" (?=(?:(?:{fields})(?:, )?)+: )", line)]
            inside = True
        else:
            inside = inside and bool(line)
            made.append(f"        {line.lstrip()}" if inside else line)
    text = re.sub(r":\n\n(?=    \S)", "::\n\n", "\n".join(made))
    lines[:] = re.sub(r"\*+(?=\w+[,:])", lambda stars: "\\*" * len(stars[0]), text).split("\n")


def add_contents(app: Sphinx, page: str, text: list[str]) -> None:
    """Sphinx's tree of contents from the index's own lists: a hidden one for each heading, of the pages that it links to."""
    if page != INDEX:
        return
    for heading, part in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", text[0], re.MULTILINE):
        links = [link.removesuffix(".md") for link in re.findall(r"^- \[[^]]*\]\(([^)#]+\.md)\)", part, re.MULTILINE)]
        text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n" + "\n".join(links) + "\n```\n"


def add_front(app: Sphinx, error: Exception | None) -> None:
    """An index.html at the top that leads to the index."""
    if error is None and app.builder.name == "html":
        Path(app.outdir, "index.html").write_text(f'<meta http-equiv="refresh" content="0; url={INDEX}.html">\n', encoding="utf-8")
