"""TVM's CUDA runtime, built on this machine for the CUDA that it has.

The one in PyPI's wheel is for CUDA 13. JetPack 6 has CUDA 12.6, so that there TVM finds no GPU. The wheel comes without the two files that
talk to CUDA, and PyPI has no source distribution: they are taken from TVM's source release.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from exitify.errors import ExitifyError, one_line
from exitify.files import written_whole
from exitify.progress import Progress, silent
from exitify.runtime.engines.cuda import SIDECAR, own_sidecar

FILES = (
    "src/backend/cuda/runtime/cuda_module.cc",
    "src/backend/cuda/runtime/cuda_device_api.cc",
    "src/runtime/vm/cuda/cuda_graph_builtin.cc",
)
"""What is compiled, by its path in TVM's source."""

TOOLKITS = Path("/usr/local")
"""Where NVIDIA's packages put CUDA toolkits: `cuda`, `cuda-12.6`."""

_VERSION_HEADER = "include/tvm/runtime/base.h"
_UNPACKED_LIMIT = 1 << 28
_CLUSTERS = "CU_LAUNCH_ATTRIBUTE_PREFERRED_CLUSTER_DIMENSION"
_REGISTERED = ("device_api.cuda", "ffi.Module.load_from_bytes.cuda", "vm.builtin.cuda_graph.run_or_capture")
_LOAD = """
import ctypes, sys
import tvm_ffi

try:
    for path in sys.argv[2:]:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
except OSError as error:
    sys.exit(str(error))
lacking = [name for name in sys.argv[1].split() if tvm_ffi.get_global_func(name, allow_missing=True) is None]
if lacking:
    sys.exit(f"it does not register {', '.join(lacking)}")
"""


class CannotBuild(ExitifyError):
    """The CUDA runtime cannot be built here: something is missing, of another version, or refused by the compiler."""


@dataclass(frozen=True)
class Sidecar:
    """A CUDA runtime that was built and loads.

    path: Where it is. tvm: The version of apache-tvm that it belongs to. cuda: That of the headers, `12.6`.
    cudart: CUDA's own runtime that it was linked with.
    """

    path: Path
    tvm: str
    cuda: str
    cudart: Path


@dataclass(frozen=True)
class _Tvm:
    """The installed TVM: its version, and the folders of the packages tvm and tvm_ffi."""

    version: str
    tvm: Path
    ffi: Path

    @property
    def release(self) -> str:
        """The source's version. A wheel that was uploaded again (`.post1`) is of the same source."""
        return re.sub(r"\.post\d+$", "", self.version)

    @property
    def libraries(self) -> tuple[Path, Path]:
        return self.ffi / "lib" / "libtvm_ffi.so", self.tvm / "lib" / "libtvm_runtime.so"

    @property
    def archive(self) -> str:
        """What Apache calls the source release."""
        return f"apache-tvm-src-v{self.release}.tar.gz"


@dataclass(frozen=True)
class _Cuda:
    """A CUDA toolkit: its version, the folder of its headers, and its runtime."""

    version: str
    include: Path
    cudart: Path


def build_sidecar(
    source: Path | None = None,
    *,
    cuda: Path | None = None,
    to: Path | None = None,
    progress: Progress = silent,
) -> Sidecar:
    """Compile TVM's CUDA runtime, see that it loads, and put it where the engine looks for it.

    Args:
        source: TVM's source of the installed version: its release archive, or a folder.
        cuda: The CUDA toolkit; otherwise `$CUDA_HOME`, `$CUDA_PATH`, or what is in /usr/local.
        to: The file to write; otherwise `$EXITIFY_TVM_CUDA`, or a folder of this user's for the installed version.
        progress: Called with the steps.

    Raises:
        CannotBuild: the message says what is missing or refused; what stood at `to` before is left alone.
    """
    steps = len(FILES) + 3
    tvm = _installed()
    target = to or own_sidecar()
    if source is None:
        raise CannotBuild(f"TVM's source is needed, which PyPI does not have for apache-tvm {tvm.version}", _fetch(tvm))
    compiler = _compiler()
    toolkit = _toolkit(cuda)
    with tempfile.TemporaryDirectory(prefix="exitify-") as folder:
        progress(f"reading {source.name}", 0, steps)
        root = _source(source, Path(folder, "source"), tvm)
        objects = []
        for step, file in enumerate(FILES, 1):
            progress(f"compiling {Path(file).name}", step, steps)
            objects.append(Path(folder, f"{step}.o"))
            _run([*compiler, *_flags(root, tvm, toolkit), "-c", root / file, "-o", objects[-1]], f"{Path(file).name} does not compile")
        progress("linking", steps - 2, steps)
        built = Path(folder, SIDECAR)
        _link(compiler, objects, built, tvm, toolkit)
        progress("loading", steps - 1, steps)
        _check(built, tvm)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CannotBuild(f"the folder {target.parent} cannot be made: {one_line(error)}", "name another file: $EXITIFY_TVM_CUDA") from error
        with written_whole(target) as stream, open(built, "rb") as made:
            shutil.copyfileobj(made, stream)
    progress("done", steps, steps)
    return Sidecar(target, tvm.version, toolkit.version, toolkit.cudart)


# --- what it is made of


def _installed() -> _Tvm:
    """The installed TVM, without importing it."""
    try:
        version = importlib.metadata.version("apache-tvm")
        tvm = _Tvm(version, _package("tvm"), _package("tvm_ffi"))
    except ModuleNotFoundError as error:
        raise CannotBuild("TVM's runtime is not installed", "pip install 'exitify[tvm]'") from error
    for path in (*tvm.libraries, tvm.tvm / _VERSION_HEADER, tvm.ffi / "include"):
        if not path.exists():
            raise CannotBuild(f"the installed apache-tvm {version} lacks {path}", "pip install --force-reinstall 'exitify[tvm]'")
    return tvm


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(name=name)
    return Path(found.submodule_search_locations[0])


def _fetch(tvm: _Tvm) -> str:
    return f"fetch {tvm.archive} from the release v{tvm.release} of Apache TVM and give it: --source {tvm.archive}"


def _source(given: Path, folder: Path, tvm: _Tvm) -> Path:
    """The root of TVM's source, unpacked into a folder where it is an archive, of the version that is installed."""
    if given.is_file():
        _unpack(given, folder)
    elif given.is_dir():
        folder = given.absolute()
    else:
        raise CannotBuild(f"there is no {given}", _fetch(tvm))
    root = next((place for place in (folder, *_folders(folder)) if (place / _VERSION_HEADER).is_file()), None)
    if root is None:
        raise CannotBuild(f"{given} is not TVM's source: it has no {_VERSION_HEADER}", _fetch(tvm))
    version = re.search(r'#define TVM_VERSION "(.*)"', (root / _VERSION_HEADER).read_text(errors="replace"))
    found = version.group(1) if version else "of an unknown version"
    if found != tvm.release:
        raise CannotBuild(f"{given} is TVM {found}, and apache-tvm {tvm.version} is installed", _fetch(tvm))
    # A library of other headers would load and then crash, so that a branch with the release's number is not enough.
    for part in ("include/tvm/runtime", "src/runtime"):
        for header in sorted((tvm.tvm / part).rglob("*.h")):
            theirs = root / header.relative_to(tvm.tvm)
            if theirs.is_file() and theirs.read_bytes() != header.read_bytes():
                name = header.relative_to(tvm.tvm)
                raise CannotBuild(f"{given} is not what apache-tvm {tvm.version} was built from: {name} differs", _fetch(tvm))
    for file in FILES:
        if not (root / file).is_file():
            raise CannotBuild(f"{given} lacks {file}", _fetch(tvm))
    return root


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir())


def _unpack(archive: Path, folder: Path) -> None:
    """Write the headers and C++ files of an archive into a folder; links and everything else are left out.

    Raises:
        CannotBuild: it cannot be read, is too large, or has names that lead out of the folder.
    """
    size = 0
    try:
        folder.mkdir()
        with tarfile.open(archive) as members:
            for member in members:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise CannotBuild(f"{archive} has a file {member.name[:200]!r}, which leads out of it", "fetch the archive again")
                if not member.isfile() or path.suffix not in (".h", ".cc") or path.parts[1:2] not in (("include",), ("src",)):
                    continue
                size += member.size
                if size > _UNPACKED_LIMIT:
                    raise CannotBuild(f"{archive} holds more than {_UNPACKED_LIMIT >> 20} MiB of source", "fetch the archive again")
                stream = members.extractfile(member)
                assert stream is not None
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as file:
                    shutil.copyfileobj(stream, file)
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError) as error:
        raise CannotBuild(f"{archive} cannot be unpacked: {one_line(error)}", "give TVM's release as .tar.gz, or its folder") from error


def _compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if not shutil.which(command[0]):
        raise CannotBuild(f"there is no C++ compiler here ({command[0]})", "sudo apt install g++, or name one: $CXX")
    return command


def _toolkit(given: Path | None) -> _Cuda:
    """The CUDA toolkit that was named, or the first one in /usr/local that is whole."""
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [given] if given else named[:1] or sorted(TOOLKITS.glob("cuda*"))
    lacking = f"there is no CUDA toolkit in {TOOLKITS}"
    for place in places:
        include = place / "include"
        text = (include / "cuda.h").read_text(errors="replace") if (include / "cuda_runtime.h").is_file() and (include / "cuda.h").is_file() else ""
        version = re.search(r"^#define CUDA_VERSION (\d+)", text, re.MULTILINE)
        if not version:
            lacking = f"{place} has no headers of CUDA (include/cuda.h and include/cuda_runtime.h)"
            continue
        major, minor = divmod(int(version.group(1)), 1000)
        for cudart in (place / part / f"libcudart.so.{major}" for part in ("lib64", "lib")):
            if cudart.exists():
                return _Cuda(f"{major}.{minor // 10}", include.absolute(), cudart.resolve())
        lacking = f"{place} has headers of CUDA {major}.{minor // 10} and no lib64/libcudart.so.{major}"
    raise CannotBuild(lacking, "on JetPack 6: sudo apt install cuda-toolkit-12-6; or name its folder: --cuda DIR")


# --- compiling


def _flags(root: Path, tvm: _Tvm, cuda: _Cuda) -> list[str]:
    """Options for each file. The wheel's headers come first: the libraries that it is linked with were made with them."""
    places = (tvm.tvm / "include", root / "include", tvm.ffi / "include", cuda.include)
    flags = ["-std=c++20", "-O2", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-w", *(f"-I{place}" for place in places)]
    if _CLUSTERS not in (cuda.include / "cuda.h").read_text(errors="replace"):
        flags.append(f"-D{_CLUSTERS}=((CUlaunchAttributeID)11)")  # CUDA 12.8's; TVM asks for it on GPUs that are newer than any Orin
    return flags


def _link(compiler: Sequence[str], objects: Sequence[Path], built: Path, tvm: _Tvm, cuda: _Cuda) -> None:
    """Link with the installed TVM, with CUDA's runtime, and with the driver's name alone: its library for linking is in no fixed place."""
    driver = built.parent / "libcuda.so.1"
    _run([*compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", driver, "-x", "c++", os.devnull], "linking fails")
    options = ["-Wl,--no-as-needed", f"-Wl,-soname,{SIDECAR}", f"-Wl,-rpath,{cuda.cudart.parent}"]
    _run([*compiler, "-shared", *options, "-o", built, *objects, *tvm.libraries, cuda.cudart, driver], "linking fails")


def _run(command: Sequence[str | Path], problem: str) -> None:
    done = _output(command)
    if done.returncode:
        said = done.stderr.splitlines()
        first = next((line for line in said if "error:" in line), said[0] if said else f"status {done.returncode}")
        raise CannotBuild(f"{problem}: {first.strip()[:300]}", "it takes g++ 11 or newer and CUDA 12 or newer; report this with the versions")


def _check(built: Path, tvm: _Tvm) -> None:
    """Load it in a process of its own, which may crash, and look for what it is there for."""
    done = _output([sys.executable, "-c", _LOAD, " ".join(_REGISTERED), *tvm.libraries, built])
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"the process ends with {done.returncode}"])[-1]
        raise CannotBuild(f"the CUDA runtime was built and cannot be loaded: {said[:300]}", "it must be built where NVIDIA's driver is installed")


def _output(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}  # messages are searched for "error:"
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False, env=environment)  # noqa: S603
