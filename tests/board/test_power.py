"""Energy from power monitors: each board's rails, joules, and what an answer takes above idle."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.board import power
from exitify.board.power import NoPower, Recording, find_rails, integrate, measure
from tests.board import sysfs

TOTALS = {"agx-orin-64gb": 4, "agx-orin-32gb": 4, "orin-nx-16gb": 1, "orin-nx-8gb": 1, "orin-nano-8gb": 1, "orin-nano-4gb": 1}
"""How many rails make up each module."""


class Time:
    """A clock that moves when somebody waits; what is drawn, which work may change; all of it in one thread's order."""

    def __init__(self) -> None:
        self.now, self.watts, self.answered = 0.0, 4.0, 0

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds

    def read(self) -> float:
        return self.watts


@pytest.mark.parametrize("target", sysfs.MODELS)
def test_the_rails_of_every_board_are_found_and_added(target: str, tmp_path: Path) -> None:
    rails = find_rails(sysfs.board(tmp_path, target, milliamps=1200))
    assert len(rails) == TOTALS[target]
    assert sum(rail.watts() for rail in rails) == pytest.approx(6.0 * TOTALS[target])


def test_channels_that_are_not_connected_and_the_drivers_own_sums_are_no_rails(tmp_path: Path) -> None:
    labels = {rail.label for rail in find_rails(sysfs.board(tmp_path, "agx-orin-64gb"))}
    assert labels == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}


def test_another_machine_has_no_energy(tmp_path: Path) -> None:
    with pytest.raises(NoPower, match=r"^energy is measured on a Jetson, and this machine is none\n  hint: leave --energy out$"):
        find_rails(tmp_path)


def test_a_board_of_which_nobody_knows_the_rails_is_refused(tmp_path: Path) -> None:
    sysfs.board(tmp_path)
    sysfs.write(tmp_path, "proc/device-tree/compatible", "nvidia,p9999-0001\0nvidia,tegra264\0")
    with pytest.raises(NoPower, match=r"^the rails of NVIDIA Jetson .* are not known\n  hint: name them in a target's file for p9999-0001$"):
        find_rails(tmp_path)


def test_a_board_without_a_monitor_says_where_it_was_looked_for(tmp_path: Path) -> None:
    sysfs.board(tmp_path)
    (tmp_path / power.MONITORS).rename(tmp_path / "elsewhere")
    with pytest.raises(NoPower, match=r"^there is no INA3221 power monitor under /sys/bus/i2c/drivers/ina3221\n"):
        find_rails(tmp_path)


def test_a_missing_rail_is_named_with_those_there_are(tmp_path: Path) -> None:
    sysfs.board(tmp_path)
    label = sysfs.currents(tmp_path, "VDD_IN").with_name("in1_label")
    label.write_text("VDD_OUT\n")
    with pytest.raises(NoPower, match=r"^no power monitor has the rail 'VDD_IN'\n  hint: there are VDD_CPU_GPU_CV, VDD_OUT, VDD_SOC$"):
        find_rails(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_rail_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = sysfs.currents(sysfs.board(tmp_path), "VDD_IN")
    path.chmod(0)
    with pytest.raises(NoPower, match=rf"^{path} cannot be read: Permission denied\n  hint: run as a user who may read it: sudo$"):
        find_rails(tmp_path)


def test_a_rail_whose_file_is_gone_or_says_no_number_is_named(tmp_path: Path) -> None:
    path = sysfs.currents(sysfs.board(tmp_path), "VDD_IN")
    path.write_text("n/a\n")
    with pytest.raises(NoPower, match=rf"^{path} says 'n/a', which is no number\n"):
        find_rails(tmp_path)
    path.unlink()
    with pytest.raises(NoPower, match=rf"^{path} cannot be read: No such file or directory\n"):
        find_rails(tmp_path)


@given(st.floats(0, 50), st.floats(-5, 5), st.lists(st.floats(0.001, 1), min_size=1, max_size=30))
def test_power_that_rises_evenly_is_integrated_exactly_however_it_is_sampled(start: float, slope: float, steps: list[float]) -> None:
    times = np.concatenate([[0.0], np.cumsum(steps)])
    end = times[-1]
    assert integrate(times, start + slope * times) == pytest.approx(start * end + slope * end**2 / 2, abs=1e-9)


def test_an_answer_takes_what_flows_above_idle_while_it_is_made() -> None:
    """4 W idle; one contender draws 9 W for 10 ms an answer, the other 6 W for 40 ms: 50 and 80 mJ above idle."""
    world = Time()

    def answering(watts: float, seconds: float):
        def answer() -> None:
            world.watts = watts
            world.now += seconds

        return answer

    def wait(seconds: float) -> None:
        world.watts = 4.0
        world.wait(seconds)

    fast, slow = measure([answering(9.0, 0.01), answering(6.0, 0.04)], world.read, clock=world.clock, wait=wait)
    assert (fast.idle_watts, slow.idle_watts) == pytest.approx((4.0, 4.0))
    assert (fast.watts, slow.watts) == pytest.approx((9.0, 6.0))
    assert (fast.mj, slow.mj) == pytest.approx((50.0, 80.0))
    assert (fast.total_mj, slow.total_mj) == pytest.approx((90.0, 240.0))
    assert fast.spread == pytest.approx((50.0, 50.0))


def test_readings_go_on_while_the_block_runs_and_end_with_it() -> None:
    count = [0]

    def read() -> float:
        count[0] += 1
        return 2.0

    with Recording(read) as recording:
        while count[0] < 5:
            time.sleep(0.01)
    after = count[0]
    time.sleep(0.1)
    assert count[0] == after == len(recording.watts)
    assert recording.joules() == pytest.approx(2.0 * recording.seconds)
    assert np.all(np.diff(recording.times) > 0)


def test_a_monitor_that_fails_in_the_middle_is_an_error_and_no_smaller_figure() -> None:
    calls = [0]

    def read() -> float:
        calls[0] += 1
        if calls[0] == 3:
            raise NoPower("the rail is gone", "")
        return 1.0

    def record() -> None:
        with Recording(read):
            while calls[0] < 3:
                time.sleep(0.01)
            time.sleep(0.05)

    with pytest.raises(NoPower, match="the rail is gone"):
        record()
