"""What imports what, under which name, and what a wheel holds."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

import exitify
from tests import digits

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "tvm", "onnx", "onnxruntime", "networkx", "onnxscript", "torchvision", "timm", "scipy", "sklearn", "rich", "typer")
POISON = """
import sys

class Poison:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is poisoned")

sys.meta_path.insert(0, Poison())
"""


def python(code: str, *arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


# --- names


def test_importing_exitify_imports_nothing_heavy() -> None:
    done = python("import sys, exitify; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "exitify" in done.stdout.split()
    assert sorted({name.partition(".")[0] for name in done.stdout.split()} & {*HEAVY, "numpy", "PIL"}) == []


def test_listing_the_commands_imports_nothing_heavy() -> None:
    done = python("import sys; from exitify.cli import main; print(*sys.modules)")
    assert done.returncode == 0, done.stderr
    assert sorted({name.partition(".")[0] for name in done.stdout.split()} & {*HEAVY} - {"rich", "typer"}) == []


@pytest.mark.parametrize("name", ["passes", "targets"])
def test_a_top_folder_has_one_name_only(name: str) -> None:
    refused = python(f"import {name}")
    assert refused.returncode == 1
    assert f"ImportError: this folder is the package exitify.{name}: import it by that name" in refused.stderr
    assert python(f"import exitify.{name}").returncode == 0


def test_every_public_name_resolves_and_is_what_its_module_calls_so() -> None:
    assert len(set(exitify.__all__)) == len(exitify.__all__)
    for name in exitify.__all__:
        value = getattr(exitify, name)
        if inspect.ismodule(value):
            assert value.__name__ == f"exitify.{name}"
            assert value.__doc__
        elif name != "__version__":
            assert value.__name__ == name
            assert value.__doc__
            assert value.__module__.startswith("exitify.")


def test_dir_and_star_give_the_public_names() -> None:
    done = python("from exitify import *; print(*sorted(set(globals()) - {'__builtins__'}))")
    assert set(exitify.__all__) <= set(done.stdout.split())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'exitify' has no attribute 'transfrom'"):
        _ = exitify.transfrom  # type: ignore[attr-defined]


def test_the_version_is_pyprojects() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert exitify.__version__ == version


# --- layers


def test_the_import_contracts_hold() -> None:
    command = shutil.which("lint-imports", path=sysconfig.get_path("scripts"))
    if command is None:
        pytest.skip("import-linter is not installed: pip install -e '.[dev]'")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_every_module_is_in_a_layer_or_is_the_front() -> None:
    """A new module must be given its place in pyproject.toml, or the contracts say nothing about it."""
    text = (ROOT / "pyproject.toml").read_text()
    layered = set(re.findall(r"exitify\.(\w+)", text[text.index("layers = [") : text.index("]", text.index("layers = ["))]))
    modules = {
        path.stem if path.is_file() else path.name for path in (ROOT / "exitify").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert modules - layered == {"__init__", "__main__"}


DEVICE_SIDE = "exitify.runtime.session exitify.runtime.engines exitify.calibration.calibrate exitify.data exitify.targets exitify.cli"


def test_the_device_side_imports_without_torch_or_a_compiler() -> None:
    code = (
        POISON.format(names={"torch", "tvm", "onnx", "networkx", "onnxscript"})
        + "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)"
    )
    done = python(code, *DEVICE_SIDE.split())
    assert done.returncode == 0, done.stderr


def test_a_poisoned_import_fails() -> None:
    """Or the tests that poison would show nothing."""
    done = python(POISON.format(names={"torch"}) + "import exitify; exitify.transform")
    assert done.returncode == 1
    assert "torch is poisoned" in done.stderr


@pytest.mark.parametrize(
    "command",
    [("inspect", "net.exitify"), ("run", "net.exitify", "x.npy"), ("calibrate", "net.exitify", "--data", "data.npz", "--max-drop", "0.02")],
    ids=lambda command: command[0],
)
def test_a_device_answers_and_calibrates_without_torch_and_onnx(tmp_path: Path, command: tuple[str, ...]) -> None:
    pytest.importorskip("onnxruntime", reason="the engine: pip install 'exitify[ort]'")
    digits.trained_artifact().save(tmp_path / "net.exitify")
    samples = digits.samples_of("calibration")
    np.save(tmp_path / "x.npy", samples.inputs([0]))
    np.savez(tmp_path / "data.npz", x=samples.pixels(slice(None)), y=samples.labels)
    code = POISON.format(names={"torch", "tvm", "onnx", "networkx", "onnxscript"}) + "from exitify.cli import main; main()"
    done = python(code, *command, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


# --- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the tree."""
    for module, name in (("setuptools", "setuptools"), ("pip", "pip")):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building a wheel needs {name}: pip install {name}")
    source, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("exitify", "passes", "targets"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(out), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("exitify-*-py3-none-any.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def in_tree(folder: Path, package: str, pattern: str) -> set[str]:
    """Files of a folder as a wheel names them; links are not followed."""
    inside = [path.relative_to(folder) for path in folder.rglob(pattern) if "__pycache__" not in path.parts]
    return {f"{package}/{path.as_posix()}" for path in inside if not any((folder / parent).is_symlink() for parent in path.parents)}


def test_a_wheel_holds_every_module_of_the_tree_and_nothing_else(wheel: set[str]) -> None:
    expected = in_tree(ROOT / "exitify", "exitify", "*.py") | {"exitify/py.typed", "exitify/artifact/FORMAT.md", "exitify/lower/ranking.json"}
    expected |= {"exitify/report/page.css", "exitify/report/page.html"}
    expected |= in_tree(ROOT / "passes", "exitify/passes", "*.py")
    expected |= in_tree(ROOT / "targets", "exitify/targets", "*.py") | in_tree(ROOT / "targets", "exitify/targets", "*.toml")
    files = {name for name in wheel if ".dist-info/" not in name}
    assert len(expected) > 50
    assert sorted(expected - files) == []
    assert sorted(files - expected) == []


def test_a_wheel_names_its_command(wheel: set[str]) -> None:
    assert f"exitify-{exitify.__version__}.dist-info/entry_points.txt" in wheel
