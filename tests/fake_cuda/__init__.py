"""A GPU that is none: CUDA's driver and runtime as far as TVM calls them, with kernels that the processor computes.

What is real is everything above: TVM's own CUDA runtime, the library, the machine code that is loaded (its kernels are looked up by name, its
architecture is checked). What is not is NVIDIA's part: the kernels' source is compiled for the processor and run there, thread by thread.
Times mean nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypeVar

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\((.*?)\) \{')
_FOR_PROCESSORS = (
    (r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];", rf"alignas(\1) static \2 \3[{163 * 1024}];"),  # as much as an Orin has
    (r"__shared__ alignas\((\d+)\)", r"alignas(\1) static"),
    (r'asm volatile\("cp\.async\.(?:commit_group|wait_group \d+);"[^;]*\);', ";"),  # what is copied is there at once
)
"""What TVM's source says otherwise to a GPU."""


class CannotFake(Exception):
    """There is no C compiler here; the message is for `pytest.skip`."""


class FakeGpu:
    """A GPU for programs that are started with `environment`."""

    def __init__(self, folder: Path) -> None:
        """Build the driver and the runtime in a folder.

        Raises:
            CannotFake: gcc or g++ is missing.
        """
        if not shutil.which("gcc") or not shutil.which("g++"):
            raise CannotFake("gcc and g++ are missing, which build the fake CUDA driver")
        self.folder = folder
        _run("gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", FOLDER / "driver.c", "-ldl")
        versions = f"-Wl,-soname,libcudart.so.13,--version-script,{FOLDER / 'versions.map'}"
        _run("gcc", "-shared", "-fPIC", "-O1", "-w", versions, "-o", folder / "libcudart.so.13", FOLDER / "runtime.c")
        (folder / "cuda.h").touch()

    @property
    def launches(self) -> Path:
        """The log: a line a launch, the kernel's name first."""
        return self.folder / "launches.log"

    def environment(self, *, architecture: str = "87", cuda: str = "12060", kernels: Path | None = None) -> dict[str, str]:
        """The variables with which a program sees the GPU.

        Args:
            architecture: Its compute capability. cuda: What its driver says, 12060 for CUDA 12.6.
            kernels: What computes, from `kernels_of`; without it launches are logged and nothing is computed.
        """
        path = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("LD_LIBRARY_PATH", ""))))
        variables = {"LD_LIBRARY_PATH": path, "EXITIFY_FAKE_GPU": f"{architecture} {cuda}", "EXITIFY_FAKE_LAUNCHES": str(self.launches)}
        return {**os.environ, "PYTHONPATH": str(ROOT), **variables, **({"EXITIFY_FAKE_KERNELS": str(kernels)} if kernels else {})}

    def kernels_of(self, source: str, name: str = "kernels") -> Path:
        """CUDA source compiled for the processor."""
        runners = []
        for kernel, parameters in _KERNEL.findall(source):
            types = [parameter.rpartition(" ")[0].replace("__restrict__", "") for parameter in parameters.split(", ")]
            arguments = ", ".join(f"*({kind} *)a[{i}]" for i, kind in enumerate(types))
            signature = f'extern "C" void run_{kernel}(void **a, const unsigned *grid, const unsigned *block, unsigned)'
            runners.append(f"{signature} {{ on_processor::launch(grid, block, [=] {{ {kernel}({arguments}); }}); }}")
        path, library = self.folder / f"{name}.cpp", self.folder / f"lib{name}.so"
        for theirs, ours in _FOR_PROCESSORS:
            source = re.sub(theirs, ours, source)
        path.write_text("\n".join(['#include "on_processor.hpp"', source, *runners]))
        _run("g++", "-shared", "-fPIC", "-std=c++17", "-O1", "-w", "-U_FORTIFY_SOURCE", f"-I{FOLDER}", f"-I{self.folder}", "-o", library, path)
        return library

    def python(self, program: str, *arguments: object, **given: object) -> str:
        """Run a Python program that sees the GPU and return what it prints."""
        self.launches.unlink(missing_ok=True)
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, env=self.environment(**given), capture_output=True, text=True, check=False)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        return done.stdout

    def launched(self) -> list[str]:
        """Names of the kernels that the last program launched, in order."""
        return [line.split()[0] for line in self.launches.read_text().splitlines()] if self.launches.exists() else []


Kind = TypeVar("Kind", bound=FakeGpu)


def made_or_skipped(kind: type[Kind], folder: Path) -> Kind:
    """A GPU of this kind; the test is skipped where it cannot be built."""
    try:
        return kind(folder)
    except CannotFake as reason:
        pytest.skip(str(reason))


def _run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
