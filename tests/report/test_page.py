"""The page and the figures as files: whole by themselves, for every kind of artifact, and harmless with a stranger's names."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exitify.artifact.manifest import Conditions, MaskMeasured, MaskTable, TunedKernel
from exitify.errors import ExitifyError
from exitify.report.gallery import EACH, gallery
from exitify.report.report import Report, inspect
from tests.artifact.test_targets import with_library
from tests.artifacts import exported, profile_for
from tests.cli.console import exitify, refused
from tests.digits import artifact_without_exits, fresh_artifact, samples_of, trained_artifact, write_npz
from tests.report.reports import calibrated, with_samples, without_samples
from tests.skipping import MASKS, skipping

EMPTY = {"meta", "link", "img", "br", "wbr"}
KERNELS = {
    "conv2d_add_relu": TunedKernel(9, 40, ((1, 0.020), (4, 0.017), (30, 0.012)), 0.012),
    "dense": TunedKernel(1, 1, ((1, 0.001),), 0.001),
}


class Page(HTMLParser):
    """What tags there are, whether each is closed, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    @property
    def sections(self) -> list[str]:
        """Their ids."""
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]


def masks_of(artifact) -> MaskTable:
    measured = {mask: MaskMeasured(0.9 - 0.02 * mask.count("1"), 0.01, 1 - 0.1 * mask.count("1"), 3.0 - 0.5 * mask.count("1")) for mask in MASKS}
    return MaskTable(artifact.manifest.model_id, "onnxruntime", 1, Conditions("board", "", ""), 100, "", measured)


def reports() -> dict[str, Report]:
    """One of every kind."""
    _, skips = skipping()
    masked = skips.with_masks(masks_of(skips)).with_profile("default", replace(profile_for(skips, {"exit1": 0.9}), skip="010"))
    tuned = with_library(calibrated(), kernels=KERNELS, trials=41)
    not_kept = calibrated().profile("default")
    not_kept = replace(not_kept, promise=replace(not_kept.promise, kept=False))
    return {
        "with samples": with_samples(),
        "without samples": without_samples(),
        "no profile": inspect(trained_artifact()),
        "no profile, samples": inspect(trained_artifact(), samples_of("test")),
        "untrained": inspect(fresh_artifact()),
        "no exits": inspect(artifact_without_exits()),
        "skips": inspect(masked),
        "tuned": inspect(tuned),
        "promise not kept": inspect(calibrated().with_profile("default", not_kept)),
        "no pictures": inspect(exported("identity")[1]),
    }


SECTIONS = {
    "with samples": "stops cost classes pictures calibration runs origin",
    "without samples": "stops cost classes calibration runs origin",
    "no profile": "stops runs origin",
    "no profile, samples": "stops cost calibration runs origin",
    "untrained": "stops runs origin",
    "no exits": "stops runs origin",
    "skips": "stops masks runs origin",
    "tuned": "stops cost classes calibration runs origin",
    "promise not kept": "stops cost classes calibration runs origin",
    "no pictures": "stops runs origin",
}


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_kind_of_artifact_has_a_page_that_needs_nothing_beside_it(kind: str) -> None:
    text = reports()[kind].html("net.exitify")
    page = Page(text)
    assert page.sections == SECTIONS[kind].split()
    assert {attributes["href"] for tag, attributes in page.tags if tag == "a"} <= {f"#{section}" for section in page.sections}
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "form")]
    addresses = [value for tag, attributes in page.tags for name, value in attributes.items() if name in ("src", "href", "xlink:href") and value]
    assert all(value.startswith(("data:", "#")) for value in addresses)
    assert "url(http" not in text
    assert "@import" not in text


def test_the_first_sentences_say_what_it_costs_and_what_it_saves() -> None:
    report = with_samples()
    done = report.behaviour
    assert done is not None
    text = " ".join(Page(report.html()).text.replace("\N{NARROW NO-BREAK SPACE}", " ").split())
    assert f"A mean answer costs {done.mean_macs * 100:.1f} % of the network's multiply-adds, {(1 - done.mean_macs) * 100:.1f} % less" in text
    assert f"{done.accuracy * 100:.2f} % of the answers are right" in text
    assert f"{done.full_accuracy * 100:.2f} %" in text
    assert f"of the samples leave early: {done.shares()[0] * 100:.0f} % at exit1" in text
    assert "up to stage2" in text
    assert f"{done.shares()[0] * 100:.1f} % of all stop here" in text


def test_a_promise_that_is_not_kept_is_said_so() -> None:
    assert "The promise could not be kept: drop of at most 0.5 points." in Page(reports()["promise not kept"].html()).text
    assert "The promise could not be kept" not in Page(with_samples().html()).text


def test_a_strangers_names_are_text_and_nothing_else() -> None:
    evil = '"><script>alert(1)</script><img src=http://x/y onerror=alert(2)>$\\frac{1}{0}$'
    artifact = calibrated()
    classes = tuple(f"{evil}{i}" for i in range(10))
    named = replace(artifact, manifest=replace(artifact.manifest, input=replace(artifact.manifest.input, classes=classes)))
    report = replace(without_samples(), artifact=with_library(named, kernels={evil: KERNELS["conv2d_add_relu"]}), profile_name=evil)
    page = Page(report.html(evil))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert not [attributes for tag, attributes in page.tags if tag == "img"]
    assert evil in page.text
    policy = next(attributes["content"] for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # and if one got through, it would not run


def test_classes_that_do_not_occur_are_told_from_those_that_are_left_out() -> None:
    some = samples_of("test").subset(np.flatnonzero(samples_of("test").labels < 7))
    text = " ".join(Page(inspect(calibrated(), some).html()).text.split())
    assert "3 of the 10 classes do not occur in these samples." in text
    assert "those that leave first, and those that leave last" not in text


def test_easiest_and_hardest_are_the_ends_of_what_leaves_at_an_exit() -> None:
    report = with_samples()
    assert report.evidence is not None
    assert report.behaviour is not None
    found, done = gallery(report.evidence, report.behaviour), report.behaviour
    assert set(found) == set(done.taken)
    for number, (easiest, hardest) in found.items():
        here = np.sort(done.probability[done.taken == number])
        assert [one.probability for one in easiest] == pytest.approx(here[::-1][:EACH].tolist())
        assert [one.probability for one in hardest] == pytest.approx(here[: max(min(EACH, len(here) - EACH), 0)].tolist())
        assert all(one.picture.startswith("data:image/png;base64,") for one in easiest)


def test_the_same_report_is_the_same_page() -> None:
    assert without_samples().html("a") == without_samples().html("a")


def test_figures_for_papers_are_vector_and_pixels(tmp_path: Path) -> None:
    tuned = reports()["tuned"]
    written = tuned.save_plots(tmp_path / "new" / "plots")
    names = ("accuracy_by_cost", "exits_by_class", "calibration", "tuning_host")
    assert [path.name for path in written] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    for path in written:
        if path.suffix == ".svg":
            assert ElementTree.fromstring(path.read_text()).tag == "{http://www.w3.org/2000/svg}svg"
            assert "currentColor" not in path.read_text()  # a paper has no page around it
        else:
            with Image.open(path) as picture:
                assert picture.width > 1000
                assert round(picture.info["dpi"][0]) == 300
    before = {path: path.read_bytes() for path in written}
    tuned.save_plots(tmp_path / "new" / "plots")
    assert {path: path.read_bytes() for path in written} == before


def test_the_front_of_masks_is_drawn() -> None:
    text = Page(reports()["skips"].html()).text
    assert "no other is faster and better" in text
    assert "010" in text
    assert "left out by this profile" in text


def test_tuning_says_what_it_gained() -> None:
    text = " ".join(Page(reports()["tuned"].html()).text.replace("\N{NARROW NO-BREAK SPACE}", " ").split())
    assert "41 schedules measured. A run of all segments spends 109 µs in its 2 kernels, 60.2 % of the 181 µs" in text
    assert "conv2d_add_relu" in text
    assert "<code>dense</code>" not in reports()["tuned"].html()  # it left no choice


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    calibrated().save(place / "net.exitify")
    fresh_artifact().save(place / "fresh.exitify")
    write_npz(place / "judge.npz", "test")
    return place


def test_inspect_writes_the_page_and_says_the_python_that_does_so_too(folder: Path) -> None:
    done = exitify("inspect", "net.exitify", "--html", "report.html", folder=folder)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(
        r"Wrote report\.html, \d+ KiB\.\n"
        r"In Python: exitify\.inspect\(exitify\.Artifact\.open\('net\.exitify'\)\)\.save\('report\.html', 'net\.exitify'\)\n",
        done.out,
    )
    assert (folder / "report.html").read_text() == without_samples().html("net.exitify")


def test_inspect_answers_samples_and_writes_both(folder: Path) -> None:
    done = exitify("inspect", "net.exitify", "--html", "both.html", "--plots", "plots", "--data", "judge.npz", "--json", folder=folder)
    written = done.document["written"]
    assert written[0] == "both.html"
    assert {Path(path).name for path in written[1:]} >= {"accuracy_by_cost.svg", "calibration.png"}
    assert all((folder / path).is_file() for path in written)
    assert "Easiest and hardest pictures" in (folder / "both.html").read_text()


def test_inspect_says_each_file_and_the_python_for_both(folder: Path) -> None:
    done = exitify("inspect", "net.exitify", "--html", "one.html", "--plots", "two", folder=folder)
    lines = done.out.splitlines()
    assert [line.split(",")[0] for line in lines[:2]] == ["Wrote one.html", "Wrote two/accuracy_by_cost.svg"]
    assert lines[-1].endswith("; report.save('one.html', 'net.exitify'); report.save_plots('two')")


def test_of_an_artifact_without_figures_that_is_said(folder: Path) -> None:
    done = exitify("inspect", "fresh.exitify", "--plots", "none", folder=folder)
    assert done.out.splitlines()[0] == "There is nothing to draw in none."


def test_an_artifact_without_trained_heads_says_what_is_missing(folder: Path) -> None:
    done = exitify("inspect", "fresh.exitify", "--html", "fresh.html", folder=folder)
    assert done.code == 0
    assert "It shows what the network is, and not what it does: give --data." in done.out
    refused(exitify("inspect", "fresh.exitify", "--html", "x.html", "--data", "judge.npz", folder=folder), "heads are untrained")
    assert not (folder / "x.html").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--data", "judge.npz"), "--data, --profile, --engine and --threads are for the report"),
        (("--threads", "2"), "--data, --profile, --engine and --threads are for the report"),
        (("--html", "x.html", "--engine", "tvm"), "--engine and --threads are for answering samples"),
        (("--html", "no/x.html"), "there is no folder no"),
        (("--html", "x.html", "--profile", "other"), "no profile 'other'"),
        (("--html", "x.html", "--data", "absent"), "there is no absent"),
        (("--plots", "judge.npz"), "cannot make the folder judge.npz"),
    ],
)
def test_what_cannot_be_reported_is_refused(folder: Path, arguments: tuple[str, ...], problem: str) -> None:
    refused(exitify("inspect", "net.exitify", *arguments, folder=folder), problem)
    assert not (folder / "x.html").exists()


def test_inspect_alone_prints_as_before(folder: Path) -> None:
    assert json.loads(exitify("inspect", "net.exitify", "--json", folder=folder).out)["model_id"] == calibrated().manifest.model_id


def test_a_missing_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "exitify.report.page", raising=False)
    done = exitify("inspect", "net.exitify", "--html", "x.html", folder=folder)
    refused(done, "this command needs jinja2, which is not installed")
    assert "pip install 'exitify[report]'" in done.err


def test_errors_are_of_the_family() -> None:
    with pytest.raises(ExitifyError):
        inspect(calibrated(), profile="none")
