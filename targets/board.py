"""The board at hand, as its own files say: which one, its software, and what every time and energy measured on it depends on."""

from __future__ import annotations

import contextlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exitify.artifact.manifest import Conditions
from exitify.targets import jetpack_of_linux, load_target, processor, target_names

ROOT = Path("/")
_RELEASE = re.compile(r"R(\d+) \(release\), REVISION: ([\d.]+)")
_MODE = re.compile(r"NV Power Mode:\s*(\S+)")
_MODEL = re.compile(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>")


@dataclass(frozen=True)
class Board:
    """A Jetson.

    model: Its name for people. modules: Part numbers that its device tree names, `p3767-0005`, the carrier's left out.
    target: Name of the target that it is; empty for one that exitify does not know.
    linux: Release of Jetson Linux, `36.4.3`; empty where it does not say. jetpack: The JetPack of that release, empty for one
        that exitify does not know.
    """

    model: str
    modules: tuple[str, ...]
    target: str
    linux: str
    jetpack: str


def board_at_hand(root: Path = ROOT) -> Board | None:
    """The Jetson whose files these are; None where it is another machine.

    Args:
        root: Where its `/proc`, `/sys`, `/etc` and `/var` are.
    """
    tree = root / "proc" / "device-tree"
    model, compatible = _words(tree / "model"), _words(tree / "compatible")
    numbers = [word.partition(",")[2] for word in compatible if word.startswith("nvidia,")]
    if not model or not any(number.startswith("tegra") for number in numbers):
        return None
    parts = dict.fromkeys(part for number in numbers if not number.startswith("tegra") for part in number.split("+")[-1:])
    targets = {part: name for name in target_names() for part in load_target(name).modules}
    found = next((part for part in parts if part in targets), "")
    said = _RELEASE.search(_text(root / "etc" / "nv_tegra_release"))
    linux = f"{said[1]}.{said[2]}" if said else ""
    return Board(model[0], tuple(parts), targets.get(found, ""), linux, jetpack_of_linux(linux))


def conditions(root: Path = ROOT) -> Conditions:
    """What times and energy that are measured now belong to."""
    board = board_at_hand(root)
    if board is None:
        return Conditions(processor.model_name(), "", "")
    return Conditions(board.target or board.model, power_mode(root), clocks(root))


def power_mode(root: Path = ROOT, program: Path | None = None) -> str:
    """The name of nvpmodel's mode; empty where nobody says.

    Args:
        program: What to ask, by default nvpmodel; files that were collected elsewhere (`root`) are only read.
    """
    if program is None and root == ROOT:
        program = Path("/usr/sbin/nvpmodel")
    if program is not None:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
            said = _MODE.search(done.stdout)
            if said:
                return said[1]
    # What it was last set to, for a user who may not ask the program.
    number = re.search(r"pmode:\s*(\d+)", _text(root / "var" / "lib" / "nvpmodel" / "status"))
    names = {int(i): name for i, name in _MODEL.findall(_text(root / "etc" / "nvpmodel.conf"))}
    return names.get(int(number[1]), "") if number else ""


def clocks(root: Path = ROOT) -> Literal["fixed", "free", ""]:
    """`fixed` if the lowest and the highest clock of every core and of the GPU are the same, as `jetson_clocks` sets them; else `free`."""
    policies = [path for path in (root / "sys/devices/system/cpu/cpufreq").glob("policy*") if _text(path / "affected_cpus").strip()]
    cpus = [(path / "scaling_min_freq", path / "scaling_max_freq") for path in policies]  # of a cluster that is off none can be set
    gpus = [(path / "min_freq", path / "max_freq") for path in (root / "sys/class/devfreq").glob("*") if re.search(r"\.(gpu|ga10b)$", path.name)]
    limits = [(_text(low).strip(), _text(high).strip()) for low, high in (*cpus, *gpus)]
    if not cpus or not all(low and high for low, high in limits):
        return ""
    return "fixed" if all(low == high for low, high in limits) else "free"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _words(path: Path) -> list[str]:
    """A property of a device tree: texts that end with a zero byte."""
    return [word for word in _text(path).split("\0") if word.strip()]
