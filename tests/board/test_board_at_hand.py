"""Which board this is, its software and its power mode, from files as a Jetson has them."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from exitify.artifact.manifest import Conditions
from exitify.targets import load_target, processor, target_names
from exitify.targets.board import board_at_hand, clocks, conditions, power_mode
from tests.board import sysfs


@pytest.mark.parametrize("target", sysfs.MODELS)
def test_every_board_is_recognised_by_its_module(target: str, tmp_path: Path) -> None:
    board = board_at_hand(sysfs.board(tmp_path, target))
    assert board is not None
    assert (board.target, board.model) == (target, sysfs.MODELS[target][0])


def test_every_target_with_modules_has_a_tree_here() -> None:
    assert {name for name in target_names() if load_target(name).modules} == set(sysfs.MODELS)


def test_no_module_belongs_to_two_targets() -> None:
    modules = [module for name in target_names() for module in load_target(name).modules]
    assert len(modules) == len(set(modules))


def test_a_machine_without_a_device_tree_is_no_board(tmp_path: Path) -> None:
    assert board_at_hand(tmp_path) is None
    assert conditions(tmp_path) == Conditions(processor.model_name(), "", "")


def test_an_arm_board_of_somebody_else_is_none(tmp_path: Path) -> None:
    sysfs.write(tmp_path, "proc/device-tree/model", "Raspberry Pi 5 Model B Rev 1.0\0")
    sysfs.write(tmp_path, "proc/device-tree/compatible", "raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert board_at_hand(tmp_path) is None


def test_a_jetson_that_no_target_describes_has_its_part_numbers_and_no_target(tmp_path: Path) -> None:
    sysfs.board(tmp_path)
    sysfs.write(tmp_path, "proc/device-tree/compatible", "nvidia,p3971-0050+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0")
    board = board_at_hand(tmp_path)
    assert board is not None
    assert (board.target, board.modules) == ("", ("p3834-0008",))
    assert conditions(tmp_path).board == board.model


@pytest.mark.parametrize(("jetpack", "linux"), [("6", "36.4.3"), ("7.2", "39.2.0")])
def test_the_release_of_jetson_linux_says_which_jetpack(jetpack: str, linux: str, tmp_path: Path) -> None:
    board = board_at_hand(sysfs.board(tmp_path, jetpack=jetpack))
    assert board is not None
    assert (board.linux, board.jetpack) == (linux, jetpack)


@pytest.mark.parametrize(
    "release", ["# R35 (release), REVISION: 4.1, GCID: 1", "# R360 (release), REVISION: 0.1", "# R39 (release), REVISION: 1.0", "", "?"]
)
def test_a_release_that_is_not_known_is_no_jetpack(release: str, tmp_path: Path) -> None:
    sysfs.board(tmp_path)
    sysfs.write(tmp_path, "etc/nv_tegra_release", release)
    board = board_at_hand(tmp_path)
    assert board is not None
    assert board.jetpack == ""


@pytest.mark.parametrize("target", sysfs.MODELS)
def test_the_power_mode_is_read_by_name(target: str, tmp_path: Path) -> None:
    mode = power_mode(sysfs.board(tmp_path, target))
    assert mode == sysfs.MODELS[target][2]
    assert mode in load_target(target).power_modes


def test_what_nvpmodel_says_comes_before_its_files(tmp_path: Path) -> None:
    root, program = sysfs.board(tmp_path / "root"), tmp_path / "nvpmodel"
    program.write_text("#!/bin/sh\n[ $1 = -q ] && printf 'NV Power Mode: MAXN_SUPER\\n2\\n'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    assert power_mode(root, program) == "MAXN_SUPER"
    program.write_text("#!/bin/sh\necho 'Error: not root' >&2; exit 1\n")
    assert power_mode(root, program) == "25W"
    assert power_mode(root, tmp_path / "missing") == "25W"


def test_nothing_among_files_from_elsewhere_is_run(tmp_path: Path) -> None:
    root = sysfs.board(tmp_path / "root")
    sysfs.write(root, "usr/sbin/nvpmodel", f"#!/bin/sh\ntouch {tmp_path / 'ran'}; printf 'NV Power Mode: MAXN\\n'\n")
    (root / "usr/sbin/nvpmodel").chmod(0o755)
    assert power_mode(root) == "25W"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", ["var/lib/nvpmodel/status", "etc/nvpmodel.conf"])
def test_a_power_mode_that_nobody_says_is_empty(file: str, tmp_path: Path) -> None:
    (sysfs.board(tmp_path) / file).write_text("pmode:0077 < POWER_MODEL >")
    assert power_mode(tmp_path) == ""


@pytest.mark.parametrize(("fixed", "said"), [(True, "fixed"), (False, "free")])
def test_clocks_are_fixed_where_their_limits_are_one(fixed: bool, said: str, tmp_path: Path) -> None:
    assert clocks(sysfs.board(tmp_path, fixed=fixed)) == said


def test_a_gpu_whose_clock_follows_the_load_makes_them_free(tmp_path: Path) -> None:
    sysfs.board(tmp_path)
    sysfs.write(tmp_path, "sys/class/devfreq/17000000.gpu/min_freq", "306000000\n")
    assert clocks(tmp_path) == "free"


def test_clocks_that_cannot_be_read_are_neither(tmp_path: Path) -> None:
    assert clocks(tmp_path) == ""


def test_conditions_read_as_people_say_them(tmp_path: Path) -> None:
    assert str(conditions(sysfs.board(tmp_path))) == "orin-nano-8gb, 25W, clocks fixed"
    assert str(Conditions("a processor", "", "")) == "a processor"
