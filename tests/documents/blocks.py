"""The fenced blocks of a page, and what stands before them that says how they are run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "exitify" / "artifact" / "FORMAT.md")
GUIDES = (
    *PAGES,
    *(guide for folder in ("benchmarks", "examples", "examples/*", "exitify", "passes", "targets") for guide in ROOT.glob(f"{folder}/README.md")),
)
"""Pages, and what stands beside the code: all that has links."""
GENERATED = (ROOT / "docs" / "cli.md",)
"""Written by a tool from the code; its blocks are lines of usage."""

RUN = frozenset({"sh", "python", "toml"})
SHOWN = frozenset({"", "text", "{eval-rst}"})
"""Languages of blocks that are drawings and output, or Sphinx's own."""
REASONS = frozenset(
    {
        "installs",  # packages, from the network
        "needs a board",
        "needs a source release of TVM",
        "makes this project's own environment",
        "copies to another machine",
        "waits until Ctrl-C",
    }
)
MARK = re.compile(r"<!-- (slow|not run: ([^>]+)) -->")
FILE = re.compile(r"# ([\w-]+\.(?:py|toml))\n")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One fence.

    line: Of its first line of text, from 1. mark: `slow`, `not run: REASON`, or empty.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.mark.startswith("not run")

    @property
    def file(self) -> str:
        """The name in its first line, `# my-board.toml`, where it is a file to write; else empty."""
        named = FILE.match(self.text)
        return named[1] if named and self.language in ("python", "toml") else ""

    def commands(self) -> list[list[str]]:
        """The lines of a shell block as words, lines that `\\` continues as one, comments left out."""
        lines = re.sub(r"(^|\s)#.*$", "", self.text.replace("\\\n", " "), flags=re.MULTILINE).splitlines()
        return [words for words in map(shlex.split, lines) if words]


def blocks_of(page: Path) -> Iterator[Block]:
    """A page's fences in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    mark, start = "", -1
    for number, line in enumerate(lines):
        if start >= 0:
            if line == "```":
                language = lines[start].removeprefix("```")
                yield Block(page, start + 2, language, "".join(f"{text}\n" for text in lines[start + 1 : number]), mark)
                mark, start = "", -1
        elif line.startswith("```"):
            start = number
        elif found := MARK.fullmatch(line):
            assert not mark, f"{page.name}:{number + 1}: two marks before one block"
            mark = found[1]
        elif line:
            assert not mark, f"{page.name}:{number + 1}: a mark that is not before a block"
    assert start < 0, f"{page.name}:{start + 1}: a block without an end"


def links_of(page: Path) -> Iterator[str]:
    """Where a page's links lead, those to the web left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    yield from (link for link in LINK.findall(re.sub(r"`[^`]*`", "", text)) if not re.match(r"https?:", link))


def anchors_of(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
