"""A Python for the Orin's processor on an x86-64 machine: Debian's arm64 Python and aarch64 wheels, under QEMU's user mode.

Needs `qemu-aarch64-static` (Debian's qemu-user-static), apt-get with Debian's sources, and pip; no root. What it downloads once, 150 MB, becomes a
folder of 180 MB. A program there starts no other programs: the machine does not know arm64 ones. Its timings mean nothing.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent

ORIN = "cortex-a76"
"""The processor of QEMU's that has what the Orin's Cortex-A78AE has: arithmetic in float16, and dot products."""
OLDER = "cortex-a72"
"""One without either: code that uses them ends in SIGILL there."""

DEBIAN = ("python3", "libstdc++6")
WHEELS = ("apache-tvm-ffi<0.1.15",)  # and what exitify itself requires
COMPILER = "apache-tvm==0.27.*"  # of this wheel the runtime alone is kept: the compiler is 240 MB
OF_COMPILER = ("tvm/lib/libtvm_runtime*.so", "*.dist-info/*")
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in range(36, 16, -1))  # pip takes them literally: 2_28 does not include 2_17

APT = """\
#clear APT::Architectures;
#clear APT::Update;
#clear DPkg;
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}";
"""
"""The machine's own sources and keys for another architecture, with everything that apt writes in a folder, and without the machine's hooks."""

WARM_UP = """
import ctypes, sys
import numpy, PIL.Image, rich, safetensors.numpy, tvm_ffi, typer
import exitify.artifact.artifact
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
"""


class CannotEmulate(Exception):
    """There is no emulated Python here; the message says why, for `pytest.skip`."""


@dataclass(frozen=True)
class EmulatedPython:
    """An aarch64 Python with exitify from this tree, and with what exitify needs on a device; `folder` holds all of it.

    `import tvm` finds an empty package there: the folder that holds TVM's runtime library, which loads after `import tvm_ffi`.
    """

    qemu: str
    folder: Path

    @property
    def site(self) -> Path:
        """The folder with the wheels' packages."""
        return self.folder / "site"

    @property
    def tvm_runtime(self) -> Path:
        return self.site / "tvm" / "lib" / "libtvm_runtime.so"

    def command(self, *arguments: str | Path, cpu: str = ORIN) -> list[str]:
        """A command line that runs Python with these arguments; `environment` belongs to it. A program that traps leaves no core file."""
        root = self.folder / "root"
        python = (root / "usr" / "bin" / "python3").resolve()
        return ["prlimit", "--core=0", self.qemu, "-cpu", cpu, "-L", str(root), str(python), *map(str, arguments)]

    def environment(self, **variables: str) -> dict[str, str]:
        """The only variables that the emulated Python sees: the machine's are about another Python."""
        path = os.pathsep.join(map(str, (self.site, ROOT)))
        return {"PYTHONPATH": path, "PYTHONNOUSERSITE": "1", "OPENBLAS_NUM_THREADS": "1", "TVM_NUM_THREADS": "1", **variables}

    def run(self, *arguments: str | Path, cpu: str = ORIN, timeout: float = 600, **variables: str) -> subprocess.CompletedProcess[str]:
        """What it prints, and its exit status: minus the signal where one ended it."""
        command, environment = self.command(*arguments, cpu=cpu), self.environment(**variables)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def emulated_python(cache: Path | None = None) -> EmulatedPython:
    """The Python in a cache (`~/.cache/exitify-tests`), prepared on first use: a quarter of a minute, and the download.

    Raises:
        CannotEmulate: QEMU, apt-get, or what they should download is missing.
    """
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if qemu is None:
        raise CannotEmulate("qemu-aarch64-static is not installed: apt-get install qemu-user-static")
    for tool in ("apt-get", "dpkg-deb", "prlimit"):
        if shutil.which(tool) is None:
            raise CannotEmulate(f"{tool} is missing: the emulated Python comes from Debian's packages")
    if ORIN not in _run(qemu, "-cpu", "help").stdout.split():
        raise CannotEmulate(f"{qemu} knows no {ORIN}: QEMU 7.1 was the first that does")
    cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "exitify-tests"
    recipe = hashlib.sha256("\n".join((*DEBIAN, *_requirements(), COMPILER, *OF_COMPILER)).encode()).hexdigest()[:12]
    python = EmulatedPython(qemu, cache.resolve() / f"aarch64-{recipe}")
    if not python.folder.is_dir():
        python.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=python.folder.parent, prefix="preparing-") as work:
            ready = EmulatedPython(qemu, Path(work) / "ready")
            _prepare(ready, Path(work))
            try:
                ready.folder.rename(python.folder)
            except OSError:
                if not python.folder.is_dir():  # else another process was faster, and its folder is as good
                    raise
    return python


def _requirements() -> list[str]:
    """What pip installs: requirements of exitify on a device, and TVM's."""
    return [*tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"], *WHEELS]


def _prepare(python: EmulatedPython, work: Path) -> None:
    """Fill a folder; once it holds everything, a first start tries it and leaves byte code for the next ones."""
    root = python.folder / "root"
    root.mkdir(parents=True)
    for package in _debian_packages(work / "apt"):
        _do("dpkg-deb", "--extract", package, root)
    if not (root / "lib").exists():  # Debian 13 and later: a package of links, which apt does not take for a dependency, would bring it
        (root / "lib").symlink_to("usr/lib")
    for name in ("doc", "locale", "man"):
        shutil.rmtree(root / "usr" / "share" / name, ignore_errors=True)

    version = (root / "usr" / "bin" / "python3").resolve().name.removeprefix("python")
    options = ["--quiet", "--disable-pip-version-check", "--only-binary=:all:", "--python-version", version]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = (sys.executable, "-m", "pip")
    _do(*pip, "install", *options, "--no-compile", "--target", python.site, *_requirements())
    shutil.rmtree(python.site / "bin", ignore_errors=True)  # scripts that name this machine's Python
    _do(*pip, "download", *options, "--no-deps", "--dest", work / "wheel", COMPILER)
    for wheel in (work / "wheel").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if any(fnmatch.fnmatch(name, pattern) for pattern in OF_COMPILER)]
            archive.extractall(python.site, names)

    done = python.run("-c", WARM_UP, python.tvm_runtime)
    if done.returncode:
        raise CannotEmulate(f"the emulated Python does not start ({done.returncode}): {_last_line(done.stderr)}")


def _debian_packages(folder: Path) -> list[Path]:
    """Debian's arm64 packages of a Python with all that they depend on, as if nothing were installed."""
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()
    (folder / "apt.conf").write_text(APT.format(folder=folder))
    apt = ("apt-get", "-c", folder / "apt.conf", "--quiet=2")
    updated = _run(*apt, "update")  # its failure is none yet: one of several sources may have no arm64
    fetched = _run(*apt, "--yes", "--download-only", "install", *DEBIAN)
    if fetched.returncode:
        complaint = (updated.stderr or fetched.stderr).partition("\n")[0]
        raise CannotEmulate(f"apt-get brings no arm64 {' and '.join(DEBIAN)}: {complaint}")
    return sorted((folder / "cache" / "archives").glob("*.deb"))


def _do(*command: str | Path) -> None:
    done = _run(*command)
    if done.returncode:
        raise CannotEmulate(f"{' '.join(map(str, command[:3]))}: {_last_line(done.stderr)}")


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1200, check=False)
    except subprocess.TimeoutExpired:
        raise CannotEmulate(f"{command[0]} took longer than 20 minutes") from None


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
