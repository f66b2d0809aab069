"""A report for a README or an issue."""

from __future__ import annotations

from exitify.benchmark.report import BenchReport, cells, conditions_text, energy_cells, exits_text, noise_text, versions_text


def markdown(report: BenchReport, *, title: str = "") -> str:
    """The report as Markdown: title, conditions, table, noise, versions. The same report gives the same text.

    Args:
        title: In place of one that names the network.
    """
    profile = f"profile `{_escaped(report.profile)}`" if report.profile else "no profile, so no exit is taken"
    heading = title or (f"{report.network}, exits against none" if report.network else "Exits against none")
    energy = energy_cells(report)
    lines = [
        f"### {_escaped(heading)}",
        "",
        f"{_escaped(conditions_text(report))}; {profile}.",
        "",
        *_table(*cells(report)),
        "",
        *([*_table(*energy), ""] if energy[1] else []),
        noise_text(report),
        "",
        exits_text(report),
        "",
        f"{versions_text(report)}.",
    ]
    return "\n".join(lines) + "\n"


def _table(columns: list[str], rows: list[list[str]]) -> list[str]:
    """Its lines: names to the left, numbers to the right."""
    aligned = ["---", "---", *["---:"] * (len(columns) - 2)]
    return [f"| {' | '.join(row)} |" for row in (columns, aligned, *([_escaped(cell) for cell in row] for row in rows))]


def _escaped(text: str) -> str:
    """Text that stays text in a cell: names come from files, and some characters would make another table, a link or a tag of them."""
    kept = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
    for character in "\\`*_[]<>|":
        kept = kept.replace(character, f"\\{character}")
    return kept
