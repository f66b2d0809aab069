"""What a board is: its processors, memory and toolchain, each figure with its source. How to compile for one is not said here."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from exitify.errors import ExitifyError, RecordError
from exitify.records import from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent
ALIASES = {"orin": "agx-orin-64gb"}
"""Names for several boards, and the one that is taken where the machine at hand is none of them."""
T = TypeVar("T")


class TargetError(ExitifyError):
    """No board has that name, or its file is not what a board's file must be."""


@dataclass(frozen=True)
class Processor:
    """A CPU.

    triple: LLVM's. name: LLVM's name of the core, `native` for the machine at hand. cores: 0 for all there are.
    """

    triple: str
    name: str
    cores: int
    features: tuple[str, ...]


@dataclass(frozen=True)
class Graphics:
    """A GPU.

    architecture: CUDA's, `sm_87`; `native` for the one at hand. multiprocessors: At the full power mode. clock_mhz: Highest stock clock.
    Both are 0 when not fixed.
    """

    architecture: str
    multiprocessors: int
    clock_mhz: int


@dataclass(frozen=True)
class PowerMode:
    """What nvpmodel sets. multiprocessors: That the GPU has in this mode, 0 where it is not known."""

    watts: int
    multiprocessors: int


@dataclass(frozen=True)
class Target:
    """A board.

    modules: Part numbers in its device tree, `p3701-0005`; none for what is no board.
    memory_gib: Of the board, shared by CPU and GPU; 0 when not fixed. bandwidth_gb_s: Of that memory, 0 when not fixed.
    jetpacks: The releases that it runs, oldest first.
    rails: Labels of the power monitor's channels whose sum is the module's power.
    power_modes: By their names; ids differ from board to board.
    sources: Where the figures come from, by the field's name.
    """

    name: str
    description: str
    modules: tuple[str, ...]
    cpu: Processor
    gpu: Graphics | None
    memory_gib: int
    bandwidth_gb_s: float
    jetpacks: tuple[str, ...]
    rails: tuple[str, ...]
    power_modes: Mapping[str, PowerMode]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class JetPack:
    """A release of NVIDIA's software for the boards.

    linux: What its release of Jetson Linux begins with, `36`.
    cuda: Of its toolkit and driver, `12.6`. driver: The driver's branch. ptx: The newest PTX that the driver loads.
    python, glibc: Of its Ubuntu. tvm_cuda: Whether apache-tvm's wheel finds its CUDA runtime there.
    """

    name: str
    description: str
    linux: str
    cuda: str
    driver: str
    ptx: str
    python: str
    glibc: str
    tvm_cuda: bool
    sources: Mapping[str, str]


def target_names() -> list[str]:
    """Names of the boards that come with exitify."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def jetpack_names() -> list[str]:
    """Names of the JetPack releases that exitify knows, oldest first."""
    return sorted((path.stem for path in (FOLDER / "jetpacks").glob("*.toml")), key=lambda name: tuple(map(int, name.split("."))))


def load_target(name: str) -> Target:
    """Return the board of that name or alias, or the one in a file of your own (`./my-board.toml`).

    Raises:
        TargetError: no such board or file, or a figure is missing, misspelt, or without a source.
    """
    name = ALIASES.get(name, name)
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        known = ", ".join([*target_names(), *ALIASES])
        raise TargetError(f"there is no target {name!r}", f"there are {known}, and your own ./my-board.toml")
    target = _read(Target, path, {"gpu": None})
    for field in ("cpu", *(field for field in ("gpu", "memory_gib", "modules", "rails", "power_modes") if getattr(target, field))):
        if field not in target.sources:
            raise TargetError(f"{path.name} gives no source for {field}", "name the datasheet, or the measurement and its date, under [sources]")
    unknown = sorted(set(target.jetpacks) - set(jetpack_names()))
    if unknown:
        raise TargetError(f"{path.name} names JetPack {unknown[0]!r}", f"exitify knows {', '.join(jetpack_names())}")
    return target


def load_jetpack(name: str) -> JetPack:
    """Return the JetPack release of that name.

    Raises:
        TargetError: there is none.
    """
    if name not in jetpack_names():
        raise TargetError(f"there is no JetPack {name!r}", f"exitify knows {', '.join(jetpack_names())}")
    return _read(JetPack, FOLDER / "jetpacks" / f"{name}.toml", {})


def jetpack_of_linux(release: str) -> str:
    """The JetPack with this release of Jetson Linux, `36.4.3`; empty for one that exitify does not know."""
    return next((name for name in jetpack_names() if f"{release}.".startswith(f"{load_jetpack(name).linux}.")), "")


def _read(kind: type[T], path: Path, defaults: Mapping[str, Any]) -> T:
    try:
        return from_json(kind, {**defaults, **tomllib.loads(path.read_text(encoding="utf-8"))}, path.name)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path} is not TOML: {error}", "see targets/README.md") from error
    except RecordError as error:
        raise TargetError(error.problem, error.hint or "see targets/README.md") from error


if __name__ == "targets":
    raise ImportError("this folder is the package exitify.targets: import it by that name")
