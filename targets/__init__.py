"""What a board is: its processors, memory and toolchain, each figure with its source. How to compile for one is not said here."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from exitify.errors import ExitifyError, RecordError
from exitify.records import from_json

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent


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
    """A GPU that shares the CPU's memory.

    architecture: CUDA's, `sm_87`. multiprocessors: At the full power mode. clock_mhz: Highest stock clock.
    """

    architecture: str
    multiprocessors: int
    clock_mhz: int


@dataclass(frozen=True)
class Target:
    """A board.

    memory_gib: Of the board, shared by CPU and GPU; 0 when not fixed. bandwidth_gb_s: Of that memory, 0 when not fixed.
    power_modes: By their names, watts; ids differ from board to board.
    sources: Where the figures come from, by the field's name.
    """

    name: str
    description: str
    cpu: Processor
    gpu: Graphics | None
    memory_gib: int
    bandwidth_gb_s: float
    power_modes: dict[str, int]
    sources: dict[str, str]


def target_names() -> list[str]:
    """Names of the boards that come with exitify."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_target(name: str) -> Target:
    """Return the board of that name, or the one in a file of your own (`./my-board.toml`).

    Raises:
        TargetError: no such board or file, or a figure is missing, misspelt, or without a source.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise TargetError(f"there is no target {name!r}", f"there are {', '.join(target_names())}, and your own ./my-board.toml")
    try:
        target = from_json(Target, {"gpu": None, **tomllib.loads(path.read_text(encoding="utf-8"))}, path.name)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"{path} is not TOML: {error}", "see targets/README.md") from error
    except RecordError as error:
        raise TargetError(error.problem, error.hint or "see targets/README.md") from error
    for field in ("cpu", *(["gpu"] if target.gpu else []), *(["memory_gib"] if target.memory_gib else [])):
        if field not in target.sources:
            raise TargetError(f"{path.name} gives no source for {field}", "name the datasheet, or the measurement and its date, under [sources]")
    return target


if __name__ == "targets":
    raise ImportError("this folder is the package exitify.targets: import it by that name")
