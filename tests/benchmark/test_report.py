"""What a report says: in Markdown byte by byte, in a terminal, over several repeats."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import against
from exitify.benchmark import BenchReport, markdown
from exitify.benchmark.memory import peak_rss
from exitify.benchmark.neighbours import Moment, now, others_share
from exitify.cli import tables
from exitify.records import to_json
from tests.benchmark.reports import ENERGY, report, timing

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("bench.md", report()),
        (
            "bench_energy.md",
            report(
                timings=tuple(
                    timing(name, role, ratio, rss_mib=None, energy=ENERGY)
                    for name, role, ratio in (("tvm", "baseline", 1.0), ("tvm again", "again", 0.998), ("exitify", "artifact", 0.5))
                ),
                network="", profile=None, rounds=1, threads=2, others_share=0.31,
            ),
        ),
    ],
    ids=["as_usual", "with_energy"],
)  # fmt: skip
def test_a_report_in_markdown_is_the_golden_one(name: str, given: BenchReport) -> None:
    assert markdown(given) == (GOLDEN / name).read_text()


def test_a_title_is_what_is_asked_for() -> None:
    assert markdown(report(), title="On our board").startswith("### On our board\n")


def test_a_name_from_a_file_makes_no_cell_and_no_tag() -> None:
    evil = dataclasses.replace(report(), network="a|b\n# <script>[x](y)", profile="p`q")
    (heading, *_), (table,) = markdown(evil).splitlines(), [markdown(report()).count("\n|")]
    assert heading == "### a\\|b�# \\<script\\>\\[x\\](y), exits against none"
    assert markdown(evil).count("\n|") == table


def test_every_row_has_as_many_cells_as_the_table_columns() -> None:
    rows = [line.replace("\\|", "") for line in markdown(report()).splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + len(report().timings)


def test_a_terminal_shows_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    tables.timings(report())
    shown = capsys.readouterr().out
    expected = (
        "500 samples in each of 5 rounds, batch 1, 1 thread, fp32; orin-nano-8gb",
        "untransformed, again",
        "small|er.onnx",
        "0.710 ± 1.2 %",
        "0.703 to 0.717",
        "84.2",
        "loaded twice: 1.003.",
        "2 % of the processors' time.",
        "Left at: exit1 50.0 %",
        "torch 2.13.0+cpu.",
    )
    for text in expected:
        assert text in shown


def test_one_round_is_said_to_be_little_and_a_busy_machine_to_be_busy(capsys: pytest.CaptureFixture[str]) -> None:
    tables.timings(report(rounds=1, others_share=0.4))
    shown = capsys.readouterr().out
    assert "--rounds 5" in shown
    assert "Meanwhile other programs took 40 % of the processors' time, and ratios may be others when they take less." in shown
    tables.timings(report(others_share=None))
    assert "Meanwhile" not in capsys.readouterr().out


# --- what is measured beside times


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="others than Linux keep no peak that can be set back")
def test_a_peak_is_of_what_answering_holds_and_not_of_what_loading_held() -> None:
    mib = 2**20
    loading = np.ones(200 * mib, np.uint8)
    del loading
    held = []

    def run(x: np.ndarray) -> int:
        if not held:
            held.append(np.ones(50 * mib, np.uint8))  # on the first answer, as engines do
        return int(np.ones(60 * mib, np.uint8)[0])  # on every one, and given back

    before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    grown = peak_rss(run, np.zeros((3, 1))) - before
    assert 80 * mib < grown < 160 * mib


def test_the_share_of_others_is_what_is_busy_and_not_ours() -> None:
    assert others_share(Moment(100, 40, 5), Moment(120, 55, 15)) == pytest.approx(0.25)
    assert others_share(Moment(100, 40, 5), Moment(120, 50, 16)) == 0  # ours are counted finer than the machine's
    assert others_share(None, Moment(1, 1, 1)) is None
    assert others_share(Moment(1, 1, 1), Moment(1, 1, 1)) is None


def test_what_the_kernel_has_counted_is_read_from_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    path.write_text("cpu  100 20 30 4000 500 6 7 80 9 10\ncpu0 1 2 3 4\n")
    found = now(path)
    assert found is not None
    assert (found.all, found.busy) == pytest.approx((47.43, 2.43))
    path.write_text("nothing of that kind\n")
    assert now(path) is None
    assert now(tmp_path / "missing") is None


# --- several networks, several times: benchmarks/against.py


def reports_of(network: str, ratios: list[float], noise: float) -> dict[tuple[str, int], BenchReport]:
    return {(network, i): report(ours=ratio, noise=noise) for i, ratio in enumerate(ratios)}


def test_repeats_that_agree_are_counted_by_the_noise_of_the_earlier() -> None:
    rows = [list(repeats) for repeats in zip(*(r.timings for r in reports_of("resnet56", [0.70, 0.705, 0.74], 0.01).values()))]
    ours = against.row_cells(rows[-1], is_random=False)
    assert ours[3:] == ["1.410 (1.400 to 1.480)", "0.705 (0.700 to 0.740)", "± 1.0 %", "1 of 3 pairs", "84"]
    assert against.row_cells(rows[0], is_random=False)[4:] == ["1", "", "", "80"]


def test_the_table_says_that_random_weights_have_no_accuracy() -> None:
    table = against.markdown(("resnet56", "resnet50"), {**reports_of("resnet56", [0.7], 0.01), **reports_of("resnet50", [1.02, 1.03], 0.01)})
    lines = [line for line in table.splitlines() if line.startswith("| resnet50")]
    assert len(lines) == 5
    assert all("| random weights |" in line and "93.00 %" not in line for line in lines)
    assert "accuracy says nothing" in table


def test_a_log_gives_back_what_was_measured_with_the_same_options(tmp_path: Path) -> None:
    options = {"rounds": 5, "model_id": "m"}
    record = {"network": "resnet56", "repeat": 1, "options": options, "report": to_json(report())}
    (tmp_path / "log").write_text(json.dumps(record) + "\n")
    assert against.read_log(tmp_path / "log", options) == {("resnet56", 1): report()}
    assert against.read_log(tmp_path / "none", options) == {}
    with pytest.raises(SystemExit, match="give another --log"):
        against.read_log(tmp_path / "log", {**options, "rounds": 3})
