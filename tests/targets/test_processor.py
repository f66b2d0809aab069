"""The processor at hand, as made-up operating systems tell of it."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from exitify.targets import load_target, processor

V2 = "cx16 lahf_lm popcnt sse4_1 sse4_2 ssse3"
V3 = f"{V2} avx avx2 bmi1 bmi2 f16c fma abm movbe"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"

CPUINFO = """\
processor\t: 0
model name\t: A Processor: 3 GHz
VMX flags\t: vnmi invvpid
flags\t\t: fpu sse2 {flags}
bugs\t\t: none
power management:

processor\t: 1
model name\t: Another Processor
flags\t\t: fpu
"""


@pytest.fixture(autouse=True)
def ask_again() -> Iterator[None]:
    """What is known of this machine's processor is forgotten, before and after."""
    processor.features.cache_clear()
    yield
    processor.features.cache_clear()


@pytest.fixture
def cpuinfo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """An x86-64 machine with this text in place of its `/proc/cpuinfo`."""

    def say(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(processor, "Path", lambda path: tmp_path / path.removeprefix("/proc/"))

    return say


@pytest.mark.parametrize(
    ("machine", "architecture"),
    [("x86_64", "x86_64"), ("AMD64", "x86_64"), ("aarch64", "aarch64"), ("arm64", "aarch64"), ("ppc64le", "ppc64le"), ("", "")],
)
def test_an_architecture_has_one_name(machine: str, architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert processor.architecture() == architecture


def test_features_are_the_first_processors_flags(cpuinfo: Callable[[str], None]) -> None:
    cpuinfo(CPUINFO.format(flags="avx2 fma"))
    assert processor.features() == {"fpu", "sse2", "avx2", "fma"}
    assert processor.model_name() == "A Processor: 3 GHz"


@pytest.mark.parametrize("text", ["", "processor\t: 0\n", "flags\n", "\xff"])
def test_where_nobody_says_there_are_no_features(text: str, cpuinfo: Callable[[str], None]) -> None:
    cpuinfo(text)
    assert processor.features() == frozenset()
    assert processor.model_name() == "x86_64"


def test_without_cpuinfo_there_are_no_features(cpuinfo: Callable[[str], None], tmp_path: Path) -> None:
    cpuinfo("")
    (tmp_path / "cpuinfo").unlink()
    assert processor.features() == frozenset()
    assert processor.model_name() == "x86_64"


def test_features_of_this_machine_are_asked_once(cpuinfo: Callable[[str], None]) -> None:
    cpuinfo(CPUINFO.format(flags="avx2"))
    before = processor.features()
    cpuinfo(CPUINFO.format(flags="fma"))
    assert processor.features() is before


# Bits of AT_HWCAP by Linux's arch/arm64/include/uapi/asm/hwcap.h.
FP, ASIMD, FPHP, ASIMDHP, ASIMDDP, SVE = (1 << bit for bit in (0, 1, 9, 10, 20, 22))


@pytest.mark.parametrize(
    ("bits", "features"),
    [
        (FP | ASIMD, {"asimd"}),  # Cortex-A72
        (FP | ASIMD | FPHP | ASIMDHP | ASIMDDP, {"asimd", "fphp", "asimdhp", "asimddp"}),  # Cortex-A78AE
        (SVE | ASIMDDP, {"asimddp"}),
        (0, set()),
    ],
)
def test_features_of_an_arm_processor_are_the_kernels_bits(bits: int, features: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def getauxval(kind: int) -> int:
        asked.append(kind)
        return bits

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(getauxval=getauxval))
    assert processor.features() == features
    assert asked == [16]  # AT_HWCAP, include/uapi/linux/auxvec.h


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_a_c_library_that_does_not_tell_is_no_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise error

    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert processor.features() == frozenset()


@pytest.mark.parametrize(("level", "features"), [("x86-64-v2", V2), ("x86-64-v3", V3), ("x86-64-v4", V4)])
def test_a_level_needs_what_it_adds_and_all_below_it(level: str, features: str) -> None:
    assert sorted(processor.x86_level_features(level)) == list(processor.x86_level_features(level)) == sorted(features.split())


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="Linux tells here what the processor can do")
def test_this_machine_says_something() -> None:
    assert processor.features()
    assert processor.model_name()


def test_an_arm_target_asks_for_nothing_that_only_some_have() -> None:
    target = load_target("aarch64-cpu")
    assert (target.cpu.triple, target.cpu.name, target.cpu.features) == ("aarch64-linux-gnu", "generic", ("neon",))
    assert target.gpu is None


def test_the_orins_target_names_its_core_and_its_arithmetic() -> None:
    for name in ("agx-orin-64gb", "orin-nano-8gb"):
        cpu = load_target(name).cpu
        assert (cpu.triple, cpu.name, set(cpu.features)) == ("aarch64-linux-gnu", "cortex-a78ae", {"neon", "fullfp16", "dotprod"})
