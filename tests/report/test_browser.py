"""The page as a browser shows it: headless Chromium, at the width of a desk and of a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.report.reports import with_samples
from tests.report.test_page import reports

WIDTHS = {"desk": 1280, "phone": 360}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium of the system. Where there is none its tests are skipped, or fail if `$EXITIFY_REQUIRE_CHROMIUM` is 1."""
    found = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    if found is None:
        reason = "there is no Chromium here: apt install chromium"
        if os.environ.get("EXITIFY_REQUIRE_CHROMIUM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright: pip install playwright")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])  # root has no sandbox
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    return {kind: report.save(folder / f"{i}.html", "net.exitify") for i, (kind, report) in enumerate(reports().items())}


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_its_window_nor_asks_for_anything_nor_complains(browser: Any, pages: dict[str, Path], width: str) -> None:
    for kind, path in pages.items():
        page = browser.new_page(viewport={"width": WIDTHS[width], "height": 800})
        said: list[str] = []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, said=said: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
        page.goto(path.as_uri())
        assert said == [], kind
        assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS[width], kind
        page.close()


def test_text_is_large_enough_and_figures_fill_their_place_on_a_phone(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": WIDTHS["phone"], "height": 800})
    page.goto(pages["with samples"].as_uri())
    sizes = page.eval_on_selector_all("main *:not(svg *)", "all => all.filter(e => e.innerText).map(e => parseFloat(getComputedStyle(e).fontSize))")
    assert min(sizes) >= 11
    widths = page.eval_on_selector_all("figure.wide svg", "all => all.map(e => e.getBoundingClientRect().width)")
    assert widths
    assert all(300 < width <= 360 for width in widths)
    cut = page.eval_on_selector_all(".line > *, .card, h1, p", "all => all.filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth).length")
    assert cut == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_both_schemes(browser: Any, pages: dict[str, Path], scheme: str, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 800, "height": 800}, color_scheme=scheme)
    page.goto(pages["with samples"].as_uri())
    ink, paper = page.evaluate(
        "[getComputedStyle(document.querySelector('figure.wide svg text')).fill, getComputedStyle(document.body).backgroundColor]"
    )
    assert _contrast(ink, paper) > 7
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    with Image.open(tmp_path / "page.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 500  # pictures, bars and curves are there
    page.close()


def test_the_blocks_are_as_wide_and_as_high_as_they_say(browser: Any, pages: dict[str, Path]) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto(pages["with samples"].as_uri())
    whole, *parts = page.evaluate(
        "(() => { const b = document.querySelector('.blocks'); return [b, ...b.children].map(e => [e.clientWidth, e.clientHeight]); })()"
    )
    done = with_samples().behaviour
    assert done is not None
    filled = sum(width * height for width, height in parts) / (whole[0] * whole[1])
    assert filled == pytest.approx(done.mean_macs / done.most_macs, abs=0.02)
    page.close()


def _contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two CSS colours."""

    def luminance(colour: str) -> float:
        channels = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
