"""What a command says beside its result: help, completion, -v and -q, colours, progress in a log file."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from exitify.cli import build, guide, verbosity
from exitify.cli.app import app
from exitify.train import end_to_end, heads
from tests.cli.console import COMMAND, exitify, refused
from tests.digits import write_npz
from tests.report.reports import calibrated

GROUP = typer.main.get_command(app)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("feel")
    calibrated().save(place / "net.exitify")
    write_npz(place / "held_out.npz", "calibration")
    return place


def commands() -> dict[str, click.Command]:
    """All of them by name, those of a group behind its name."""
    found: dict[str, click.Command] = {}
    for name, command in GROUP.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found.update({f"{name} {below}": one for below, one in inner.items()} if inner else {name: command})
    return found


# --- help -----------------------------------------------------------------------------------------------------------


def test_every_command_has_examples_and_a_place_in_the_list() -> None:
    assert set(guide.EXAMPLES) == set(commands())
    assert [name for names in guide.PANELS.values() for name in names] == list(dict.fromkeys(name.split()[0] for name in guide.EXAMPLES))
    assert set(GROUP.commands) == {name.split()[0] for name in guide.EXAMPLES}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "example", [*(e for several in guide.EXAMPLES.values() for e in several), *(s[2:] for s in guide.FIRST_STEPS if s[0] == "$")]
)
def test_an_example_in_the_help_is_read_by_its_command(example: str) -> None:
    name, *words = shlex.split(example)
    assert name == "exitify"
    command, *rest = words
    if f"{command} {rest[0]}" in commands():
        command, rest = f"{command} {rest[0]}", rest[1:]
    context = commands()[command].make_context(command, rest)  # refuses unknown options and missing arguments
    assert not context.args


@pytest.mark.parametrize("name", ["transform", "inspect", "state merge"])
def test_help_of_a_command_ends_in_its_examples(name: str, tmp_path: Path) -> None:
    done = exitify(*name.split(), "--help", folder=tmp_path)
    assert (done.code, done.err) == (0, "")
    shown = " ".join(done.out.split())
    for example in guide.EXAMPLES[name]:
        assert f"$ {example}" in shown
    assert exitify(*name.split(), "-h", folder=tmp_path).out == done.out


def test_the_list_of_commands_shows_the_first_steps(tmp_path: Path) -> None:
    shown = " ".join(exitify("--help", folder=tmp_path).out.split())
    for line in (*guide.PANELS, *guide.FIRST_STEPS):
        assert line in shown


# --- completion -----------------------------------------------------------------------------------------------------


def completed(line: str, folder: Path) -> list[str]:
    """What bash would offer for a line, whose last word is not finished (empty after a blank)."""
    words = line.split()
    number = len(words) if line.endswith(" ") else len(words) - 1
    environment = {**os.environ, "_EXITIFY_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(number)}
    done = subprocess.run(
        [sys.executable, "-c", "from exitify.cli import main; main()"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("exitify cal", ["calibrate"]),
        ("exitify compile net.exitify --target orin-n", ["orin-nano-4gb", "orin-nano-8gb", "orin-nx-16gb", "orin-nx-8gb"]),
        ("exitify run net.exitify --profile ", ["default", "none"]),
        ("exitify run net.exitify --engine onnxruntime:", ["onnxruntime:cuda", "onnxruntime:tensorrt"]),
        ("exitify run absent.exitify --profile ", ["none"]),
        ("exitify train net.exitify --method j", ["jei", "joint"]),
        ("exitify bench net.exitify --against torch,o", ["torch,onnxruntime", "torch,openvino"]),
        ("exitify state lo", ["log"]),
    ],
)
def test_tab_offers_what_can_come_next(line: str, offered: list[str], folder: Path) -> None:
    assert completed(line, folder) == offered


def test_tab_offers_every_method_that_there_is() -> None:
    assert set(build.METHODS) == {*heads.METHODS, *end_to_end.METHODS}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shells_script_can_be_shown(shell: str, folder: Path) -> None:
    environment = {**os.environ, "_EXITIFY_COMPLETE": f"source_{shell}"}
    done = subprocess.run([sys.executable, "-c", "from exitify.cli import main; main()"], env=environment, cwd=folder, capture_output=True, text=True,
                          timeout=60, check=False)  # fmt: skip
    assert "_EXITIFY_COMPLETE=complete_" + shell in done.stdout


# --- -v and -q ------------------------------------------------------------------------------------------------------

CALIBRATE = ("calibrate", "net.exitify", "--data", "held_out.npz", "--max-drop", "0.005", "-o", "out.exitify")


def test_quiet_leaves_the_result_and_nothing_that_helps_to_go_on(folder: Path) -> None:
    loud, quiet = exitify(*CALIBRATE, folder=folder), exitify(*CALIBRATE, "-q", folder=folder)
    assert "Next: `exitify run out.exitify PICTURE`" in loud.out
    assert "In Python: " in loud.out
    assert quiet.out.splitlines()[-1] == "Wrote out.exitify."
    assert set(quiet.out.splitlines()) - {"Wrote out.exitify."} < set(loud.out.splitlines())


def test_quiet_leaves_warnings_out_and_errors_in(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recomputing.py").write_text(
        "import torch, torch.utils.checkpoint\n"
        "class Recomputing(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.stem, self.classify = torch.nn.Conv2d(1, 4, 3), torch.nn.Linear(4, 3)\n"
        "    def forward(self, x):\n"
        "        x = torch.utils.checkpoint.checkpoint(self.stem, x, use_reentrant=False)\n"
        "        return self.classify(x.mean((2, 3)))\n"
    )
    transform = ("transform", "recomputing:Recomputing", "--input-shape", "1x8x8", "--exits", "none", "-o", "new.exitify")
    assert exitify(*transform, folder=tmp_path).err.startswith("exitify: warning: the model recomputes its activations")
    assert exitify(*transform, "-q", folder=tmp_path).err == ""
    refused(exitify("inspect", "absent.exitify", "-q", folder=folder), "cannot open absent")


def test_verbose_tells_the_stages_and_very_verbose_where_an_error_came_from(folder: Path) -> None:
    said = exitify(*CALIBRATE, "-v", folder=folder).err
    assert re.search(r"^exitify: \d\d:\d\d:\d\d: recording outputs: done in \d", said, re.MULTILINE)
    assert re.search(r"^exitify: \d\d:\d\d:\d\d: searching thresholds: done in \d", said, re.MULTILINE)
    refused(exitify("inspect", "absent.exitify", "-v", folder=folder), "cannot open absent")
    traced = exitify("inspect", "absent.exitify", "-vv", folder=folder)
    assert traced.code == 1
    assert "FileNotFoundError" in traced.err
    assert traced.err.splitlines()[-2].startswith("exitify: cannot open absent.exitify")


def test_quiet_is_stronger_than_verbose(folder: Path) -> None:
    assert exitify(*CALIBRATE, "-q", "-v", folder=folder).err == ""


def test_one_command_after_another_has_its_own_choice(folder: Path) -> None:
    exitify(*CALIBRATE, "-q", folder=folder)
    assert "In Python: " in exitify(*CALIBRATE, folder=folder).out
    assert logging.getLogger("exitify").level == logging.NOTSET


# --- colours --------------------------------------------------------------------------------------------------------


def on_a_terminal(*arguments: str, folder: Path, **environment: str) -> str:
    """What a command writes to a terminal."""
    main, side = pty.openpty()
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "TERM", "CI")}
    process = subprocess.Popen([*COMMAND, *arguments], cwd=folder, env={**kept, "TERM": "xterm-256color", **environment}, stdout=side, stderr=side)
    os.close(side)
    written = io.BytesIO()
    while True:
        try:
            written.write(os.read(main, 65536))
        except OSError:  # Linux's way to say that the other side is closed
            break
    os.close(main)
    assert process.wait() == 0
    return written.getvalue().decode()


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-7]|38|4[0-7]|48|9[0-7])[;m]")


@pytest.mark.parametrize("arguments", [("transform", "--help"), (*CALIBRATE,)], ids=["help", "calibrate"])
def test_no_color_is_obeyed(arguments: tuple[str, ...], folder: Path) -> None:
    assert COLOUR.search(on_a_terminal(*arguments, folder=folder))
    assert not COLOUR.search(on_a_terminal(*arguments, folder=folder, NO_COLOR="1"))


def test_on_a_terminal_there_is_a_bar_and_with_quiet_there_is_none(folder: Path) -> None:
    assert "━" in (shown := on_a_terminal(*CALIBRATE, folder=folder))
    assert "recording outputs" in shown
    assert "recording outputs" not in on_a_terminal(*CALIBRATE, "-q", folder=folder)


def test_what_goes_into_a_file_has_no_escape_codes(folder: Path) -> None:
    done = exitify(*CALIBRATE, folder=folder)
    assert "\x1b" not in done.out + done.err


# --- progress in a log file -----------------------------------------------------------------------------------------


def test_in_a_log_file_long_work_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(verbosity.time, "monotonic", lambda: now[0])
    verbosity.choose(0, quiet=False)
    with verbosity.progress_bar() as progress:
        for done in range(0, 101):
            now[0] = float(done)
            progress("recording", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d\d:\d\d:\d\d", "TIME", line) for line in lines] == [
        "exitify: TIME: recording, 20 of 100, 80 s left",
        "exitify: TIME: recording, 40 of 100, 60 s left",
        "exitify: TIME: recording, 60 of 100, 40 s left",
        "exitify: TIME: recording, 80 of 100, 20 s left",
    ]


def test_in_a_log_file_work_that_goes_on_reckons_by_what_is_done_now(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(verbosity.time, "monotonic", lambda: now[0])
    verbosity.choose(0, quiet=False)
    with verbosity.progress_bar() as progress:
        for done in range(80, 101):
            now[0] = 10.0 * (done - 80)
            progress("recording", done, 100)
    assert "recording, 82 of 100, 3 min left" in capsys.readouterr().err.splitlines()[0]


def test_in_a_log_file_short_work_and_quiet_work_say_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(verbosity.time, "monotonic", lambda: now[0])
    for quiet, step in ((False, 0.1), (True, 10.0)):
        verbosity.choose(0, quiet=quiet)
        with verbosity.progress_bar() as progress:
            for done in range(0, 101):
                now[0] += step
                progress("recording", done, 100)
    assert capsys.readouterr().err == ""
    verbosity.choose(0, quiet=False)


def test_tuning_in_a_log_file_says_what_it_gained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(verbosity.time, "monotonic", lambda: now[0])
    verbosity.choose(0, quiet=False)
    with verbosity.tuning_bar() as report:
        report(0, 500, 0.0, 0.0)
        now[0] = 3600.0
        report(100, 500, 0.002, 0.0015)
    assert re.search(r": tuning: 1\.500 ms, 0\.750 of the default, 100 of 500, 4 h 0 min left\n", capsys.readouterr().err)
