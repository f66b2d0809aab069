"""Kernels of every kind over odd shapes, compiled for an Arm processor and run on one, as QEMU emulates it: right as they are here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from exitify.lower import library
from exitify.lower.linking import link_with
from exitify.lower.processors import machine_of
from exitify.targets import load_target, processor
from tests.emulator import EmulatedPython
from tests.lower import test_attention, test_convolution, test_normalization, test_products, test_winograd
from tests.lower.kernels import Array, lowered, module_of, stages
from tests.lower.test_functions import EXACT, OPERATORS
from tests.lower.tuning import test_choices

pytestmark = pytest.mark.skipif(processor.architecture() != "x86_64", reason="what is foreign here is another machine's own")

MACHINE = machine_of(load_target("aarch64-cpu"))

RUN = """
import sys
from pathlib import Path
import numpy as np
import tvm_ffi
from exitify.runtime.engines.base import aligned
from exitify.runtime.engines.tvm import load_runtime

load_runtime()

def placed(array):
    copy = aligned(array.shape, array.dtype)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)

for path in sorted(Path(sys.argv[1]).glob("*.so")):
    machine = tvm_ffi.load_module(path, keep_module_alive=True)["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 2)
    given = np.load(path.with_suffix(".npz"))
    found = machine["main"](*(placed(given[name]) for name in given.files))
    np.savez(path.with_suffix(".found.npz"), *(np.from_dlpack(tensor) for tensor in found))
"""

POINTS = np.concatenate([np.linspace(-bound, bound, 300, dtype=np.float32) for bound in (1e-30, 1.0, 4.0, 20.0, 86.0, 120.0, 3e38)])


class Functions:
    """exp, erf, tanh and sigmoid of numbers of all sizes."""

    def __init__(self) -> None:
        self.inputs = [POINTS]
        self.module = module_of(self.inputs, lambda emit, x: [emit(write(x)) for write in OPERATORS.values()])

    def check(self, found: Sequence[Array]) -> None:
        for name, array in zip(OPERATORS, found):
            with np.errstate(over="ignore"):
                expected = np.array([EXACT[name](float(x)) for x in POINTS]).astype(np.float32)
            np.testing.assert_allclose(array, expected, rtol=3e-7, atol=2.0**-126)


class Windows:
    """Depthwise convolutions and pools."""

    def __init__(self) -> None:
        self.inputs = test_choices.arrays()[0]
        self.module = module_of(self.inputs, test_choices.write)

    def check(self, found: Sequence[Array]) -> None:
        for array, known in zip(found, test_choices.expected(), strict=True):
            np.testing.assert_allclose(array, known, rtol=1e-5, atol=1e-5)


class Means:
    """Over the images of channels, and over other axes."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0).standard_normal
        self.inputs = [draw(shape).astype(np.float32) for shape in ((1, 17, 7, 9), (1, 64, 13, 1), (3, 5, 8, 8))]
        self.module = module_of(self.inputs, self._write)

    def _write(self, emit, *inputs):
        for x in inputs:
            channels = int(x.ty.shape[1])
            blocked = emit(relax.op.nn.conv2d(x, relax.const(np.ones((channels, 1, 1, 1), np.float32)), 1, 0, 1, channels))
            yield emit(relax.op.mean(blocked, [2, 3], keepdims=True))
            yield emit(relax.op.mean(x, [1]))

    def check(self, found: Sequence[Array]) -> None:
        expected = [mean for x in self.inputs for mean in (x.mean((2, 3), keepdims=True), x.mean(1))]
        for array, known in zip(found, expected, strict=True):
            np.testing.assert_allclose(array, known, rtol=1e-5, atol=1e-5)


class Resizes:
    """Enlarged and reduced."""

    SIZES = ((14, 18), (3, 4))

    def __init__(self) -> None:
        self.inputs = [np.random.default_rng(0).standard_normal((1, 21, 7, 9)).astype(np.float32)]
        self.module = module_of(self.inputs, self._write)

    def _write(self, emit, x):
        blocked = emit(relax.op.nn.conv2d(x, relax.const(np.ones((21, 1, 1, 1), np.float32)), 1, 0, 1, 21))
        for size in self.SIZES:
            yield emit(relax.op.image.resize2d(blocked, size, None, "NCHW", "nearest_neighbor", "asymmetric", "floor"))
            yield emit(relax.op.image.resize2d(blocked, size, None, "NCHW", "linear", "half_pixel", ""))

    def check(self, found: Sequence[Array]) -> None:
        x = torch.from_numpy(self.inputs[0])
        expected = [torch.nn.functional.interpolate(x, size, mode=mode).numpy() for size in self.SIZES for mode in ("nearest", "bilinear")]
        for array, known in zip(found, expected, strict=True):
            np.testing.assert_allclose(array, known, rtol=1e-5, atol=1e-5)


GROUPED = [
    test_convolution.Case(24, 36, 7, 9, (3, 3), padding=(1, 1, 1, 1), groups=6, bias=True, relu=True),
    test_convolution.Case(32, 64, 8, 5, (1, 1), groups=4, residual=True),
    test_convolution.Case(16, 8, 9, 9, (3, 3), (2, 2), (1, 1, 1, 1), groups=2, batch=2),
]

GRID = {
    "attention": (lambda: test_attention.Network(test_attention.CASES), "similarities"),
    "convolution": (lambda: test_convolution.Network(test_convolution.drawn(40, 0)), "convolution"),
    "functions": (Functions, ""),
    "grouped": (lambda: test_convolution.Network(GROUPED), "convolution"),
    "means": (Means, "channel_sums"),
    "normalization": (lambda: test_normalization.Rows(test_normalization.SHAPES), "normalized"),
    "product": (lambda: test_products.Products(test_products.KNOWN, is_known=True), "product"),
    "product_of_arguments": (lambda: test_products.Products(test_products.ROWS, is_known=False), "dot_products"),
    "resizes": (Resizes, "resize"),
    "windows": (Windows, "window"),
    "winograd": (lambda: test_winograd.Network(test_winograd.drawn(24, 0), MACHINE.vectors), "winograd"),
}
"""Networks of kernels by kind, and a stage that a kernel of that kind has."""


@pytest.fixture(scope="module")
def answers(
    orin: EmulatedPython, aarch64_linker: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Callable[..., None], list[Array]]]:
    """What checks each network, and what it said there; all run in one process, since starting one takes seconds."""
    folder, checks = tmp_path_factory.mktemp("kernels"), {}
    for name, (make, stage) in GRID.items():
        network = make()
        kernels = lowered(network.module, MACHINE)
        assert not stage or any(stage in stages(kernel) for kernel in kernels.kernels.values()), name
        executable = library.build(kernels, library.scheduled_by_default(kernels, MACHINE), MACHINE)
        (folder / f"{name}.so").write_bytes(library.shared_object(executable, link_with(aarch64_linker)))
        np.savez(folder / f"{name}.npz", *network.inputs)
        checks[name] = network.check
    done = orin.run("-c", RUN, Path(folder))
    assert done.returncode == 0, done.stderr
    found = {}
    for name, check in checks.items():
        with np.load(folder / f"{name}.found.npz") as arrays:
            found[name] = check, [arrays[key] for key in arrays.files]
    return found


@pytest.mark.parametrize("kind", GRID)
def test_kernels_of_odd_shapes_are_right_on_an_arm_processor(kind: str, answers: dict[str, tuple[Callable[..., None], list[Array]]]) -> None:
    check, found = answers[kind]
    check(found)


def test_the_arm_processors_vectors_are_four_wide() -> None:
    assert (MACHINE.vectors.lanes, MACHINE.vectors.registers) == (4, 32)
    assert tvm.target.Target(MACHINE.target).kind.name == "llvm"
