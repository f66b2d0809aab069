"""What the commands print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from exitify.cli.verbosity import chosen
from exitify.records import to_json


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; columns whose cells are all numbers stand right."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(header_style="bold")
    for i, name in enumerate(columns):
        cells = [str(row[i]) for row in rows]
        numeric = all(cell[:1].isdigit() or cell[:1] in "+-−." for cell in cells if cell)
        grid.add_column(name, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(Text(printable(str(cell))) for cell in row))
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, highlight=False)
    if title:
        console.print(Text(printable(title)))
    console.print(grid)


def printable(text: str) -> str:
    """The text without control characters: names come from strangers' files, and a terminal obeys some of them."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def say(text: str) -> None:
    """Print a line, without control characters."""
    print(printable(text))


def as_json(document: Any) -> None:
    """Print a document for machines."""
    print(json.dumps(to_json(document), ensure_ascii=False, allow_nan=False))


def call(function: str, *arguments: str, **options: tuple[object, object]) -> str:
    """A call as Python text.

    Args:
        function: Its name. arguments: As they stand in Python.
        options: Value and default of each keyword; one at its default is left out.
    """
    given = [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]
    return f"{function}({', '.join([*arguments, *given])})"


def python_call(text: str) -> None:
    """Print the Python that does the same, unless -q."""
    advise(f"In Python: {text}")


def advise(text: str) -> None:
    """Print what is no result but helps to go on, unless -q."""
    if not chosen().quiet:
        say(text)


def done(text: str, advice: str) -> None:
    """Print what was done and, unless -q, what comes next."""
    say(text if chosen().quiet else f"{text} {advice}")


def millions(macs: float) -> str:
    """Multiply-adds in millions."""
    return f"{macs / 1e6:.1f} M"


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{share * 100:.1f} %"
