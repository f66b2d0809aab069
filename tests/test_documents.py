"""What README and docs show runs as it stands, links lead somewhere, and the pages build."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import exitify
from tests.conftest import ROOT
from tests.documents.blocks import GENERATED, GUIDES, PAGES, REASONS, RUN, SHOWN, anchors_of, blocks_of, links_of

AGAIN = "python -m typer exitify.cli.app utils docs --name exitify --title Commands --output docs/cli.md"

WITH_BLOCKS = [page for page in PAGES if page not in GENERATED and any(block.is_run for block in blocks_of(page))]
SLOW = [page for page in WITH_BLOCKS if any(block.mark == "slow" for block in blocks_of(page))]
by_name = {"ids": lambda page: str(page.relative_to(ROOT))}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """A function that makes a page's world and runs the page in it; with torchvision, its slow blocks and large networks too."""
    from tests.documents.world import World

    def run(page: Path, torchvision: ModuleType | None = None) -> None:
        made = World(tmp_path, monkeypatch, torchvision)
        try:
            for block in blocks_of(page):
                if block.is_run and (torchvision is not None or block.mark != "slow"):
                    made.run(block)
        finally:
            made.close()

    return run


@pytest.mark.parametrize("page", WITH_BLOCKS, **by_name)
def test_a_page_runs_from_top_to_bottom(page: Path, world: Callable[..., None]) -> None:
    world(page)


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", *SLOW], **by_name)
def test_a_page_runs_with_its_slow_blocks_and_large_networks(page: Path, world: Callable[..., None], torchvision: ModuleType) -> None:
    world(page, torchvision)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], **by_name)
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in RUN | SHOWN, f"{block.place}: blocks are {', '.join(sorted(RUN | SHOWN - {''}))}, not {block.language!r}"
        reason = block.mark.removeprefix("not run: ") if block.mark.startswith("not run") else None
        assert reason is None or reason in REASONS, f"{block.place}: {reason!r} is none of {', '.join(sorted(REASONS))}"


@pytest.mark.parametrize("page", GUIDES, **by_name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), link
        assert not anchor or anchor in anchors_of(there), f"{link}: {there.name} has {', '.join(sorted(anchors_of(there)))}"


def test_every_test_that_a_page_names_is_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", page.read_text(encoding="utf-8"))}
    assert len([name for name in named if "::" in name]) > 30  # the threat model's claims
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).is_file(), name
        assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), name


def test_the_python_page_describes_every_public_name_and_error() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^\.\. auto\w+:: exitify\.(\w+)$", text, re.MULTILINE))
    assert {name for name in exitify.__all__ if name not in ("__version__", "ExitifyError")} <= described
    assert "errors" in described


def test_every_page_is_in_the_index() -> None:
    listed = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links_of(ROOT / "docs" / "README.md")}
    assert {page for page in PAGES if page != ROOT / "docs" / "README.md"} <= listed


def test_the_commands_page_is_what_the_commands_say(tmp_path: Path) -> None:
    output = tmp_path / "cli.md"
    subprocess.run([sys.executable, *AGAIN.split()[1:-1], str(output)], cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == output.read_text(encoding="utf-8"), f"the commands changed: {AGAIN}"


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the pages' builder: pip install 'exitify[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", str(tmp_path / "doctrees"), "-c", "docs"]
    done = subprocess.run([*command, ".", str(tmp_path / "html")], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "transform" in (tmp_path / "html" / "docs" / "api.html").read_text(encoding="utf-8")
