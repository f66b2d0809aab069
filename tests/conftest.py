"""One seed a test, real data where there is any, and the optional model zoos."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import settings

from tests.emulator import CannotEmulate, EmulatedPython, emulated_python
from tests.fake_cuda import FakeGpu, made_or_skipped

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("EXITIFY_DATA", ROOT.parent / "shared" / "data"))

SOURCES = {
    "cifar10.npz": "a part of CIFAR-10 (Krizhevsky 2009): x_train, y_train, x_test, y_test, classes; uint8 NHWC",
    "imagenet_sample": "200 ImageNet images, <wnid>/<wnid>.jpg, with classes.tsv",
    "weights/cifar10_resnet20_akamaster.safetensors": "akamaster/pytorch_resnet_cifar10, converted",
    "weights/cifar10_resnet56_akamaster.safetensors": "akamaster/pytorch_resnet_cifar10, converted",
}
"""Where the files that tests marked `data` read come from."""

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads that wait for each other made the tests ten times slower

# Machines are slow and shared: an example that takes a second is no failure. The seed is the test's own (derandomize).
settings.register_profile("exitify", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("exitify")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow`: run what takes more than a minute, too."""
    parser.addoption("--slow", action="store_true", help="run tests marked slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `data` where there is no data, and what is marked `slow` unless asked for."""
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes more than a minute: pytest --slow")
    if item.get_closest_marker("data") and not DATA.is_dir():
        pytest.skip(f"{DATA} is no folder: set EXITIFY_DATA to one that holds {', '.join(SOURCES)}")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Random numbers that depend on the test's name alone: the same by itself, in any order, and in any process."""
    number = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(number)
    np.random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)
    return number


@pytest.fixture(scope="session")
def data_file() -> Callable[[str], Path]:
    """A function from a name under EXITIFY_DATA to its path; the test is skipped where the file is missing."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"{path} is missing: {SOURCES.get(name, 'see EXITIFY_DATA')}")
        return path

    return find


@pytest.fixture(scope="session")
def torchvision() -> ModuleType:
    """torchvision, also where its C++ operators do not load (its wheel from PyPI beside a CPU build of torch)."""
    return _import_zoo("torchvision")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm, which imports torchvision."""
    _import_zoo("torchvision")
    return _import_zoo("timm")


@pytest.fixture(scope="session")
def orin() -> EmulatedPython:
    """An aarch64 Python with exitify. Where there is none its tests are skipped, or fail if `$EXITIFY_REQUIRE_EMULATOR` is 1."""
    try:
        return emulated_python()
    except CannotEmulate as reason:
        cannot_emulate(str(reason))


@pytest.fixture(scope="session")
def aarch64_linker() -> list[str]:
    """The linker for the emulated processor; where there is none, as above."""
    from exitify.lower.linking import NoLinker, linker
    from exitify.targets import processor

    try:
        return linker("aarch64", processor.architecture())
    except NoLinker as reason:
        cannot_emulate(reason.problem)


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> FakeGpu:
    """CUDA's driver and runtime without a GPU, whose kernels the processor computes."""
    return made_or_skipped(FakeGpu, tmp_path_factory.mktemp("fake_gpu"))


def cannot_emulate(reason: str) -> NoReturn:
    """A skip; a failure where the emulator was asked for, so that no break of it hides there."""
    if os.environ.get("EXITIFY_REQUIRE_EMULATOR") == "1":
        pytest.fail(f"EXITIFY_REQUIRE_EMULATOR is 1, and {reason}")
    pytest.skip(reason)


def _import_zoo(name: str) -> ModuleType:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps {name}")
    if name == "torchvision" and name not in sys.modules:
        _STUBS.extend(_stub_operators())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its image decoders do not load either, and are not used
        return importlib.import_module(name)


_STUBS: list[Any] = []
"""Operator libraries unregister when they are collected."""


def _stub_operators() -> list[Any]:
    """Two operators that `import torchvision` looks up, declared where its own library of operators does not load."""
    import torch

    files = importlib.metadata.files("torchvision") or []
    for file in files:
        if file.name.startswith("_C") and file.suffix in (".so", ".pyd"):
            try:
                torch.ops.load_library(str(file.locate()))
            except OSError:
                continue
            return []
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return [library]
