"""The emulated Python is what tests of code for the Orin take it for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import artifacts, emulator
from tests.conftest import cannot_emulate
from tests.emulator import OLDER, ORIN, ROOT, CannotEmulate, EmulatedPython, emulated_python


def test_without_qemu_the_reason_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CannotEmulate, match="apt-get install qemu-user-static"):
        emulated_python(tmp_path)


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception), ("0", pytest.skip.Exception)])
def test_where_the_emulator_is_required_its_lack_fails(required: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXITIFY_REQUIRE_EMULATOR", required)
    with pytest.raises(outcome, match="no emulator here"):
        cannot_emulate("no emulator here")


@pytest.mark.usefixtures("orin")  # else QEMU is missing
def test_what_cannot_be_prepared_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(emulator, "APT", emulator.APT + 'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "/dev/null";\n')
    with pytest.raises(CannotEmulate, match=r"^apt-get brings no arm64 python3 and libstdc\+\+6: E: "):
        emulated_python(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_it_is_an_aarch64_python_with_its_own_packages(orin: EmulatedPython) -> None:
    code = "import platform, sys, numpy, tvm_ffi; print(platform.machine(), sys.prefix, numpy.__file__, tvm_ffi.__file__, sep='\\n')"
    machine, *places = orin.run("-c", code).stdout.splitlines()
    assert machine == "aarch64"
    assert len(places) == 3
    assert all(Path(place).is_relative_to(orin.folder) for place in places)


def test_it_inspects_an_artifact_as_this_python_does(orin: EmulatedPython, tmp_path: Path) -> None:
    _, artifact = artifacts.exported("identity")
    arguments = ["-m", "exitify", "inspect", str(artifact.save(tmp_path / "net.exitify")), "--json"]
    here = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    there = orin.run(*arguments)
    assert (there.returncode, there.stderr) == (0, "")
    assert json.loads(there.stdout) == json.loads(here.stdout)


INSTRUCTIONS = {"add floats": 0x1E202800, "add halves": 0x1EE02800, "dot product": 0x4E829420}
"""fadd s0, s0, s0 · fadd h0, h0, h0 · sdot v0.4s, v1.16b, v2.16b"""

EXECUTE = """
import ctypes, mmap, sys
page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page[:8] = int(sys.argv[1]).to_bytes(4, "little") + 0xD65F03C0.to_bytes(4, "little")  # the instruction, ret
ctypes.CFUNCTYPE(None)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
print("returned")
"""


@pytest.mark.parametrize(
    ("instruction", "cpu", "runs"),
    [
        ("add halves", ORIN, True),
        ("dot product", ORIN, True),
        ("add floats", OLDER, True),
        ("add halves", OLDER, False),
        ("dot product", OLDER, False),
    ],
)
def test_it_runs_what_the_orin_runs_and_an_older_processor_traps(orin: EmulatedPython, instruction: str, cpu: str, runs: bool) -> None:
    done = orin.run("-c", EXECUTE, str(INSTRUCTIONS[instruction]), cpu=cpu)
    assert (done.returncode, done.stdout) == ((0, "returned\n") if runs else (-4, ""))  # 4: SIGILL
