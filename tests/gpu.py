"""Networks of the zoo compiled for a GPU, with the source of their kernels, for the fake one in `tests.fake_cuda`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Precision
from exitify.lower.nvrtc import Compiler, GpuCode
from exitify.lower.pipeline import compile_artifact
from exitify.targets import load_target
from tests.artifacts import exported
from tests.skipping import skipping

ORIN = "sm_87"
GPU = "cuda.gpu"
"""What the library is called: the machine at hand, with an Orin's GPU."""


@functools.cache
def on_gpu(name: str, precision: Precision = "fp32") -> tuple[Artifact, str]:
    """A network of the zoo with a library for a GPU, and the CUDA source of its kernels."""
    artifact = skipping()[1] if name == "skipping" else exported(name)[1]
    return compiled_for_gpu(artifact, precision)


def compiled_for_gpu(artifact: Artifact, precision: Precision = "fp32") -> tuple[Artifact, str]:
    """The artifact with a library for an Orin's GPU beside this machine's processor, and the CUDA source of its kernels."""
    with sources_seen() as sources:
        made = compile_artifact(artifact, load_target("cuda"), device="gpu", architecture=ORIN, precision=precision)
    (source,) = sources
    return made, source


@contextmanager
def sources_seen() -> Iterator[list[str]]:
    """What is handed to NVRTC meanwhile."""
    sources: list[str] = []
    compile_: Callable[[Compiler, str, str], GpuCode] = Compiler.compile

    def see(self: Compiler, source: str, architecture: str) -> GpuCode:
        sources.append(source)
        return compile_(self, source, architecture)

    Compiler.compile = see  # type: ignore[method-assign]
    try:
        yield sources
    finally:
        Compiler.compile = compile_  # type: ignore[method-assign]
