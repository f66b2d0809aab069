"""What stands between this machine and an artifact's libraries: each thing looked at, and what helps where it is wrong."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Compiled
from exitify.board.power import find_rails
from exitify.errors import ExitifyError, first_line
from exitify.runtime.engines.cuda import gpu_at_hand, load_sidecar
from exitify.targets import load_jetpack, load_target, processor
from exitify.targets.board import ROOT, Board, board_at_hand, conditions
from exitify.version import __version__

_REINSTALL = "pip install --force-reinstall 'exitify[tvm]'"
TVM_PAIR = ("apache-tvm", "apache-tvm-ffi")
State = Literal["right", "absent", "wrong"]


@dataclass(frozen=True)
class Finding:
    """What was found of one thing. state: `wrong` stops something that was meant to run, `absent` is only not there. hint: What helps."""

    topic: str
    state: State
    text: str
    hint: str = ""


def examine(artifact: Artifact | None = None, root: Path = ROOT) -> list[Finding]:
    """Look at everything that running an artifact here depends on. Nothing of the artifact is loaded as code.

    Args:
        artifact: Whose libraries to look at too. root: Where the board's own files are.
    """
    board = board_at_hand(root)
    findings = [*_machine(board, root), _python(), *_engines()]
    findings += [_checked("GPU", lambda: _gpu(board), "wrong" if board else "absent")]
    findings += [_checked("TVM's CUDA runtime", _sidecar, "wrong" if board else "absent")]
    findings += [_checked("power", lambda: _power(root), "wrong" if board else "absent")]
    return [*findings, *(_libraries(artifact) if artifact is not None else ())]


def _machine(board: Board | None, root: Path) -> Iterator[Finding]:
    name = f"{processor.model_name()}, {processor.architecture()}"
    if board is None:
        yield Finding("board", "absent", f"no Jetson: {name}")
        return
    parts = ", ".join(board.modules) or "no part number"
    if board.target:
        yield Finding("board", "right", f"{board.model} ({parts}): target {board.target}")
    else:
        yield Finding("board", "wrong", f"{board.model} ({parts}) is none that exitify knows", "write its target: targets/README.md")
    if board.jetpack:
        yield Finding("JetPack", "right", f"{load_jetpack(board.jetpack).description}, release {board.linux}")
    else:
        said = f"Jetson Linux {board.linux} belongs to none that exitify knows" if board.linux else "/etc/nv_tegra_release does not say"
        yield Finding("JetPack", "wrong", said, "JetPack 6 and 7.2 are known")
    now = conditions(root)
    if not now.power_mode:
        yield Finding("power mode", "wrong", "nobody says which it is", "`sudo nvpmodel -q`: figures are kept by power mode")
    else:
        clocks = {"fixed": "clocks fixed", "free": "clocks follow the load"}.get(now.clocks, "clocks not readable")
        known = board.target and now.power_mode in load_target(board.target).power_modes
        other = "" if known or not board.target else f"; not among {', '.join(load_target(board.target).power_modes)}"
        hint = "for figures that repeat: `sudo jetson_clocks`" if now.clocks != "fixed" else ""
        yield Finding("power mode", "right", f"{now.power_mode}, {clocks}{other}", hint)


def _python() -> Finding:
    return Finding("Python", "right", f"{platform.python_version()}, exitify {__version__}, in {sys.prefix}")


def _engines() -> Iterator[Finding]:
    try:
        import onnxruntime

        providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
        yield Finding("ONNX Runtime", "right", f"{onnxruntime.__version__}: {providers}")
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime"
        text = "not installed" if is_missing else f"does not load: {first_line(error)}"
        yield Finding("ONNX Runtime", "absent" if is_missing else "wrong", text, "pip install 'exitify[ort]'")
    versions = {name: _version(name) for name in TVM_PAIR}
    if not any(versions.values()):
        yield Finding("TVM", "absent", "not installed", "pip install 'exitify[tvm]'")
        return
    said = ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())
    if not all(versions.values()):
        yield Finding("TVM", "wrong", said, "pip install 'exitify[tvm]'")
        return
    try:
        import exitify.runtime.engines.tvm as engine

        engine.load_runtime()
        yield Finding("TVM", "right", said)
    except Exception as error:
        yield Finding("TVM", "wrong", f"{said}; does not load: {first_line(error)}", _REINSTALL)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _checked(topic: str, find: Callable[[], str], otherwise: State) -> Finding:
    """What the function says; or the error that it raises."""
    try:
        return Finding(topic, "right", find())
    except ExitifyError as error:
        return Finding(topic, otherwise, error.problem, error.hint)
    except ModuleNotFoundError as error:
        return Finding(topic, "absent", f"{error.name} is not installed", "pip install 'exitify[tvm]'")
    except (ImportError, OSError) as error:
        return Finding(topic, "wrong", f"TVM's runtime does not load: {first_line(error)}", _REINSTALL)


def _gpu(board: Board | None) -> str:
    gpu = gpu_at_hand()
    text = f"{gpu.name}, {gpu.architecture}, driver for CUDA {gpu.driver}"
    wanted = load_target(board.target).gpu if board is not None and board.target else None
    if wanted is not None and wanted.architecture != gpu.architecture:
        raise ExitifyError(f"{text}: the board's is {wanted.architecture}", "report this with the output of `exitify doctor --json`")
    return text


def _sidecar() -> str:
    from exitify.runtime.engines.tvm import load_runtime

    return str(load_sidecar(load_runtime()))


def _power(root: Path) -> str:
    return " + ".join(f"{rail.label} {rail.watts():.2f} W" for rail in find_rails(root))


def _libraries(artifact: Artifact) -> Iterator[Finding]:
    """Whether each library would run here."""
    if not artifact.targets:
        yield Finding("library", "absent", "the artifact has none", "exitify compile --target host")
        return
    for name, compiled in artifact.targets.items():
        is_for_here = compiled.triple.split("-")[0] == processor.architecture()
        yield _checked(f"library {name}", functools.partial(_library, artifact, compiled), "wrong" if is_for_here else "absent")


def _library(artifact: Artifact, compiled: Compiled) -> str:
    from exitify.runtime.engines.tvm import check_library

    check_library(artifact, compiled)
    return "runs here"
