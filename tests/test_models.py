from __future__ import annotations

import logging
import os
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from exitify import models
from exitify.artifact.manifest import InputContract, Preprocess
from exitify.errors import DataError, ModelError
from exitify.models import load_model, parse_shape, read_weights
from exitify.pictures import PRESETS, picture_to_input
from tests.models import SHAPE, Plain

BATCH = torch.export.Dim("batch", min=1, max=64)
CODE = """
import torch
from torch import nn
from exitify.artifact.manifest import Preprocess
from tests.models import Plain

def bare(): return Plain()
def described(): return Plain()
described.input_shape = (3, 16, 16)
described.preprocess = "mean=0.5;std=0.25;resize=20;crop=16"
described.classes = ("a", "b", "c", "d", "e")
def in_text(): return Plain()
in_text.input_shape = "3x16x16"
class Grey(nn.Module):
    input_shape = (1, 8, 8)
    preprocess = "mean=0.5"
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 3)
    def forward(self, x): return self.fc(x.flatten(1))
built = Plain()
class inside: make = bare
def wants(depth): return Plain()
def breaks():
    return 1 / 0
def scripted(): return torch.jit.trace(Plain().eval(), torch.zeros(1, 3, 16, 16))
def leaves(): raise SystemExit("usage")
def wrapped(): return nn.DataParallel(Plain())
def with_steps(): return Plain()
with_steps.input_shape = (3, 16, 16)
with_steps.preprocess = Preprocess(crop=(16, 16))
def gives_weights(): return Plain().state_dict()
thing = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's in the current directory."""
    name = f"user_model_{os.getpid()}_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plain, Path]:
    """A network, and its file."""
    path = tmp_path_factory.mktemp("exported") / "net.pt2"
    net = Plain().eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, *SHAPE),), dynamic_shapes=({0: BATCH},)), path)
    return net, path


def same(module: nn.Module, net: nn.Module) -> bool:
    x = torch.randn(2, *SHAPE)
    with torch.no_grad():
        return torch.equal(module(x), net.eval()(x))


def all_eval(module: nn.Module) -> bool:
    return not any(part.training for part in module.modules())


# --- shapes


def test_a_shape_is_written_without_the_batch() -> None:
    assert parse_shape("3x224x192") == (3, 224, 192)
    assert parse_shape("64") == (64,)


@given(st.lists(st.integers(1, 999_999_999), min_size=1, max_size=5))
def test_a_shape_and_its_text_are_the_same(sides: list[int]) -> None:
    assert parse_shape("x".join(map(str, sides))) == tuple(sides)


@pytest.mark.parametrize("text", ["", "3x", "x3", "3,224,224", "3x0x2", "-1x2", "3x2 ", "axb", "3x1e3"])
def test_a_text_that_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="is no input shape") as caught:
        parse_shape(text)
    assert "--input-shape 3x224x224" in caught.value.hint


# --- names


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("resnet18", "'resnet18' names no model", "torchvision:resnet18"),
        ("weights.safetensors", "holds weights and not the network", "package.module:factory --weights weights.safetensors"),
        ("net.onnx", "ONNX network", "model.pt2"),
        ("net.pt2", "there is no file net.pt2", "current directory"),
        ("net.pt", "there is no file net.pt", "current directory"),
        ("no_such_package.net:build", "there is no module 'no_such_package'", "current directory"),
        ("./net.py:build", "is not of the form package.module:name", "net:build"),
        ("net:", "is not of the form package.module:name", "net:name"),
    ],
)
def test_a_name_that_stands_for_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str, hint: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert problem in caught.value.problem
    assert hint in caught.value.hint


def test_a_folder_named_like_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.pt").mkdir()
    with pytest.raises(ModelError, match=r"net\.pt is a folder"):
        load_model(str(tmp_path / "net.pt"))


# --- torch.export


def test_an_exported_network_brings_its_input_shape(exported: tuple[Plain, Path]) -> None:
    net, path = exported
    loaded = load_model(str(path), trust=True)
    assert loaded.contract == InputContract(SHAPE)
    assert loaded.example.shape == (1, *SHAPE)
    assert loaded.source == str(path)
    assert all_eval(loaded.module)
    assert same(loaded.module, net)


def test_the_example_is_the_same_each_time(exported: tuple[Plain, Path]) -> None:
    first, second = (load_model(str(exported[1]), trust=True).example for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0


def test_an_exported_network_takes_weights(exported: tuple[Plain, Path], tmp_path: Path) -> None:
    other = Plain()
    safetensors.torch.save_file(other.state_dict(), tmp_path / "w.safetensors")
    assert same(load_model(str(exported[1]), trust=True, weights=tmp_path / "w.safetensors").module, other)


def test_an_exported_network_is_not_loaded_without_trust(exported: tuple[Plain, Path]) -> None:
    with pytest.raises(ModelError, match=r"torch\.export\.load evaluates text from the file") as caught:
        load_model(str(exported[1]))
    assert "--trust" in caught.value.hint


def test_loading_an_exported_network_really_runs_what_its_maker_wrote(exported: tuple[Plain, Path], tmp_path: Path) -> None:
    """The reason for asking for trust. If this fails, torch no longer evaluates shapes: look again at whether trust is needed."""
    path, ran = tmp_path / "evil.pt2", tmp_path / "ran"
    with zipfile.ZipFile(exported[1]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("models/model.json"):
                assert b"Symbol(" in data
                data = data.replace(b"Symbol(", f"__import__('os').makedirs('{ran}', exist_ok=True) or Symbol(".encode())
            target.writestr(name, data)
    with pytest.raises(ModelError, match="without trust"):
        load_model(str(path))
    assert not ran.exists()
    torch.export.load(path)
    assert ran.exists()


def test_a_network_exported_in_train_mode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)).train()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 4),), dynamic_shapes=({0: BATCH},)), path)
    with pytest.raises(ModelError, match="exported in train mode: dropout") as caught:
        load_model(str(path), trust=True)
    assert "model.eval()" in caught.value.hint


def test_an_exported_network_with_two_inputs_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Two(), (torch.zeros(2, 4), torch.zeros(2, 4))), path)
    with pytest.raises(ModelError, match="has 2 inputs"):
        load_model(str(path), trust=True)


def test_an_exported_network_of_any_picture_size_needs_the_shape(tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    shapes = {0: BATCH, 2: torch.export.Dim("height", min=8, max=64), 3: torch.export.Dim("width", min=8, max=64)}
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, *SHAPE),), dynamic_shapes=(shapes,)), path)
    with pytest.raises(ModelError, match=r"the input shape of .* is not known"):
        load_model(str(path), trust=True)
    assert load_model(str(path), trust=True, input_shape=(3, 32, 24)).example.shape == (1, 3, 32, 24)


@pytest.mark.parametrize("content", [b"text", b""])
def test_a_file_that_is_no_export_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(ModelError, match=r"net\.pt2 is no archive of torch\.export"):
        load_model(str(tmp_path / "net.pt2"), trust=True)


def test_a_pickle_named_pt2_is_refused(tmp_path: Path) -> None:
    torch.save(Plain().state_dict(), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match=r"is no archive of torch\.export"):
        load_model(str(tmp_path / "net.pt2"), trust=True)


def test_a_compiled_package_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as file:
        file.writestr("net/archive_format", "pt2")
        file.writestr("net/data/aotinductor/model/x.so", b"")
    with pytest.raises(ModelError, match="AOTInductor package"):
        load_model(str(tmp_path / "net.pt2"), trust=True)


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_export_is_refused(exported: tuple[Plain, Path], tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    with zipfile.ZipFile(exported[1]) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"{}" if name.endswith("model.json") else source.read(name))
    with pytest.raises(ModelError, match=r"net\.pt2 cannot be loaded") as caught:
        load_model(str(path), trust=True)
    assert torch.__version__ in caught.value.hint


# --- pickles


def test_a_pickled_module_is_loaded_when_trusted(tmp_path: Path) -> None:
    net = Plain()
    torch.save(net, tmp_path / "net.pt")
    loaded = load_model(str(tmp_path / "net.pt"), trust=True, input_shape=SHAPE)
    assert same(loaded.module, net)
    assert all_eval(loaded.module)


@pytest.mark.parametrize("suffix", ["pt", "pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_is_not_loaded_without_trust(tmp_path: Path, suffix: str, zipped: bool) -> None:
    path = tmp_path / f"net.{suffix}"
    torch.save(Plain(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match="unpickling runs any code") as caught:
        load_model(str(path), input_shape=SHAPE)
    assert "--trust" in caught.value.hint
    assert "--weights" in caught.value.hint


class Evil(nn.Module):
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_of_a_file_runs_without_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError):
        load_model("net.pt", input_shape=SHAPE)
    with pytest.raises(ModelError):
        read_weights(Path("net.pt"))
    assert not Path("ran").exists()


def test_a_data_parallel_wrapper_is_taken_off(tmp_path: Path) -> None:
    net = Plain()
    torch.save(nn.DataParallel(net), tmp_path / "net.pt")
    assert same(load_model(str(tmp_path / "net.pt"), trust=True, input_shape=SHAPE).module, net)


def test_a_pickle_of_the_users_classes_is_found_in_the_current_directory(user_module: str) -> None:
    sys.path.insert(0, os.getcwd())
    try:
        torch.save(__import__(user_module).Grey(), "net.pt")
    finally:
        sys.path.remove(os.getcwd())
        del sys.modules[user_module]
    assert load_model("net.pt", trust=True, input_shape=(1, 8, 8)).example.shape == (1, 1, 8, 8)


def test_a_pickle_without_the_code_of_its_classes_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Gone", type("Gone", (nn.Module,), {"__module__": __name__}), raising=False)
    torch.save(sys.modules[__name__].Gone(), tmp_path / "net.pt")
    monkeypatch.undo()
    with pytest.raises(ModelError, match=r"net\.pt cannot be unpickled.*Gone") as caught:
        load_model(str(tmp_path / "net.pt"), trust=True, input_shape=SHAPE)
    assert "code of its classes" in caught.value.hint


@pytest.mark.parametrize("trust", [True, False])
def test_a_state_dict_is_not_a_network(tmp_path: Path, trust: bool) -> None:
    path = tmp_path / "net.pt"
    torch.save({"state_dict": Plain().state_dict(), "epoch": 3}, path)
    with pytest.raises(ModelError, match=r"holds the weights \(a state_dict\) and not the network") as caught:
        load_model(str(path), trust=trust)
    assert f"package.module:factory --weights {path}" in caught.value.hint


def test_another_pickled_object_is_not_a_network(tmp_path: Path) -> None:
    torch.save(torch.zeros(3), tmp_path / "net.pt")
    with pytest.raises(ModelError, match="holds a Tensor and not the network"):
        load_model(str(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello, I am text", r"neither a zip file nor a pickle \(it starts with b'hello, I am text'\)"),
        (b"", "neither a zip file nor a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS"),
        (b"\x80\x02cut", "net.pt "),
    ],
)
def test_a_file_that_torch_did_not_write_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(ModelError, match=problem):
        load_model(str(tmp_path / "net.pt"), trust=True)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(Plain().state_dict(), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "cut.pt", "w") as target:
        for name in source.namelist()[:2]:
            target.writestr(name, source.read(name))
    with pytest.raises(ModelError, match=r"cut\.pt cannot be read"):
        load_model(str(tmp_path / "cut.pt"))


def test_torchscript_is_refused(tmp_path: Path, user_module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(Plain().eval(), torch.zeros(1, *SHAPE)).save(tmp_path / "net.pt")
        for name in ("net.pt", f"{user_module}:scripted"):
            with pytest.raises(ModelError, match="TorchScript") as caught:
                load_model(name, trust=True, input_shape=SHAPE)
            assert "torch.export" in caught.value.hint


def test_an_export_named_pt_is_told_its_name(exported: tuple[Plain, Path], tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(exported[1].read_bytes())
    with pytest.raises(ModelError, match=r"is an archive of torch\.export") as caught:
        load_model(str(tmp_path / "net.pt"), trust=True)
    assert "net.pt2" in caught.value.hint


# --- factories


def test_a_factory_is_found_in_the_current_directory(user_module: str) -> None:
    path = list(sys.path)
    loaded = load_model(f"{user_module}:bare", input_shape=SHAPE)
    assert isinstance(loaded.module, Plain)
    assert loaded.contract == InputContract(SHAPE)
    assert loaded.source == f"{user_module}:bare"
    assert sys.path == path


@pytest.mark.parametrize("name", ["bare", "built", "inside.make"])
def test_functions_modules_and_members_are_factories(user_module: str, name: str) -> None:
    assert isinstance(load_model(f"{user_module}:{name}", input_shape=SHAPE).module, Plain)


def test_a_factorys_attributes_are_defaults(user_module: str) -> None:
    contract = load_model(f"{user_module}:described").contract
    assert contract == InputContract(SHAPE, preprocess=Preprocess((20,), (16, 16), mean=(0.5,), std=(0.25,)), classes=tuple("abcde"))
    assert load_model(f"{user_module}:in_text").contract.shape == SHAPE
    assert load_model(f"{user_module}:with_steps").contract.preprocess == Preprocess(crop=(16, 16))


def test_a_single_channel_is_grey(user_module: str) -> None:
    loaded = load_model(f"{user_module}:Grey")
    assert loaded.contract == InputContract((1, 8, 8), color="L", preprocess=Preprocess(mean=(0.5,)))


def test_options_win_over_a_factorys_attributes(user_module: str) -> None:
    contract = load_model(
        f"{user_module}:described", input_shape=(3, 32, 32), preprocess="imagenet;resize=40;crop=32", classes=list("vwxyz")
    ).contract
    assert contract.shape == (3, 32, 32)
    assert contract.preprocess is not None
    assert contract.preprocess.mean == PRESETS["imagenet"].mean
    assert contract.classes == tuple("vwxyz")


def test_a_default_preprocess_for_another_size_is_dropped_aloud(user_module: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_model(f"{user_module}:described", input_shape=(3, 32, 32)).contract.preprocess is None
    assert "prepares pictures to 16x16, and the input is 3x32x32" in caplog.text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("bare", "the input shape of .* is not known"),
        ("wants", r"fails: TypeError: .*missing 1 required positional argument"),
        ("breaks", r"fails at .*user_model.*\.py:\d+: ZeroDivisionError: division by zero"),
        ("leaves", "fails at .*: SystemExit: usage"),
        ("gives_weights", r"returns a OrderedDict, not a torch\.nn\.Module"),
        ("thing", "is a int, not a function"),
        ("describe", "has no 'describe'"),
        ("inside.mak", "has no 'inside.mak'"),
    ],
)
def test_a_factory_that_builds_no_network_is_refused(user_module: str, name: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        load_model(f"{user_module}:{name}")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import no_such_module_at_all", r"fails at .*broken\.py:2: ModuleNotFoundError"),
        ("def f(:", r"fails at .*broken\.py:2: SyntaxError"),
        ("raise SystemExit(3)", r"fails at .*broken\.py:2: SystemExit: 3"),
    ],
)
def test_a_module_that_does_not_import_is_named_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text(f"\n{code}\n")
    with pytest.raises(ModelError, match=problem):
        load_model("broken:factory")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"preprocess": "crop=8"}, "the preprocess makes pictures of 8x8, and the network reads 16x16"),
        ({"preprocess": "resize=8x16"}, "the preprocess makes pictures of 8x16"),
        ({"preprocess": "nonsense=1"}, "unknown part"),
        ({"preprocess": "color=L"}, "a picture in L does not become an input"),
        ({"preprocess": "mean=1,2"}, "mean has 2 numbers"),
        ({"preprocess": "std=0"}, "a std is 0"),
        ({"input_shape": (3, 0, 3)}, "a dimension below 1"),
        ({"input_shape": (64,), "preprocess": "mean=0"}, "does not become an input of shape"),
    ],
)
def test_a_contract_that_contradicts_itself_is_refused(user_module: str, options: dict[str, object], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        load_model(f"{user_module}:bare", **{"input_shape": SHAPE, **options})


# --- weights


def saved(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "safetensors"])
def test_weights_are_read_from_every_kind_of_file(user_module: str, tmp_path: Path, suffix: str) -> None:
    net, path = Plain(), tmp_path / f"w.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path)
    assert same(load_model(f"{user_module}:bare", weights=path, input_shape=SHAPE).module, net)


@pytest.mark.parametrize("nesting", ["state_dict", "model", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_nesting_and_the_prefixes_of_wrappers_are_taken_off(user_module: str, tmp_path: Path, nesting: str | None, prefix: str) -> None:
    net = Plain()
    state: dict[str, object] = {prefix + key: value for key, value in net.state_dict().items()}
    path = saved(tmp_path / "w.pth", {nesting: state, "epoch": 90} if nesting else state)
    assert same(load_model(f"{user_module}:bare", weights=path, input_shape=SHAPE).module, net)


def test_a_prefix_that_the_network_has_itself_is_kept(user_module: str, tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in Plain().state_dict().items()}
    loaded = load_model(f"{user_module}:wrapped", weights=saved(tmp_path / "w.pth", state), input_shape=SHAPE)
    assert torch.equal(loaded.module.module.fc.weight, state["module.fc.weight"])


def test_old_weights_without_batch_counters_are_read(user_module: str, tmp_path: Path) -> None:
    net = Plain()
    state = {key: value for key, value in net.state_dict().items() if "num_batches" not in key}
    assert same(load_model(f"{user_module}:bare", weights=saved(tmp_path / "w.pth", state), input_shape=SHAPE).module, net)


def test_weights_of_another_network_are_refused_in_one_line(user_module: str, tmp_path: Path) -> None:
    state = Plain().state_dict()
    del state["fc.bias"], state["norm.weight"], state["stem.bias"]
    state["head.weight"] = torch.zeros(2)
    state["fc.weight"] = torch.zeros(10, 16)
    with pytest.raises(ModelError) as caught:
        load_model(f"{user_module}:bare", weights=saved(tmp_path / "w.pth", state), input_shape=SHAPE)
    problem = caught.value.problem
    assert "\n" not in problem
    assert "the weights of another network: of 11 keys, 3 missing (stem.bias, norm.weight, …), 1 unexpected (head.weight)" in problem
    assert "1 of another shape (fc.weight 10x16 instead of 5x16)" in problem
    assert "number of classes" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("w.pth", None, "there is no file"),
        ("w.npz", b"", "of a kind that is not read"),
        ("w.safetensors", b"text", r"w\.safetensors cannot be read"),
        ("w.pth", b"text", "neither a zip file nor a pickle"),
        ("w.pth", {}, "holds no state_dict"),
        ("w.pth", [torch.zeros(1)], "holds no state_dict"),
        ("w.pth", {"fc.weight": 3}, "holds no state_dict"),
        ("w.pth", Plain(), "the weights .* are not loaded: the file is a pickle of more than tensors"),
    ],
)
def test_files_that_hold_no_weights_are_refused(tmp_path: Path, name: str, content: object, problem: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ModelError, match=problem):
        read_weights(path)


# --- zoos


class Missing:
    """A finder for which one package is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, *_: object) -> None:
        if name == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def no_zoos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str | None], None]]:
    """A function that makes a package missing, or one with this code."""
    hidden = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ("torchvision", "timm")}
    for name in hidden:
        del sys.modules[name]

    def hide(package: str, code: str | None) -> None:
        if code is None:
            monkeypatch.setattr(sys, "meta_path", [Missing(package), *sys.meta_path])
            return
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)

    yield hide
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]
    sys.modules.update(hidden)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_zoo_that_is_not_installed_gets_a_hint(no_zoos: Callable[[str, str | None], None], package: str) -> None:
    no_zoos(package, None)
    with pytest.raises(ModelError, match=f"{package} is not installed") as caught:
        load_model(f"{package}:resnet18")
    assert f"pip install {package}" in caught.value.hint


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_zoo_that_does_not_import_gets_its_own_words(no_zoos: Callable[[str, str | None], None], package: str) -> None:
    no_zoos(package, "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(
        ModelError, match=f"{package} is installed and cannot be imported: RuntimeError: operator torchvision::nms does not exist"
    ) as caught:
        load_model(f"{package}:resnet18")
    assert torch.__version__ in caught.value.hint


def test_a_torchvision_network_brings_shape_preprocess_and_classes(torchvision: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_model("torchvision:squeezenet1_1")
    steps = Preprocess((256,), (224, 224), "bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert loaded.contract.shape == (3, 224, 224)
    assert loaded.contract.preprocess == steps
    assert loaded.contract.classes[:2] == ("tench", "goldfish")
    assert len(loaded.contract.classes) == 1000
    assert all_eval(loaded.module)
    assert loaded.has_random_weights


def test_weights_given_are_not_called_random(torchvision: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = saved(tmp_path / "w.pth", torchvision.models.squeezenet1_1(weights=None).state_dict())
    with caplog.at_level(logging.WARNING):
        load_model("torchvision:squeezenet1_1", weights=path)
    assert "random" not in caplog.text


def test_every_torchvision_preprocess_can_be_said(torchvision: ModuleType) -> None:
    for name in torchvision.models.list_models(module=torchvision.models):
        steps = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        assert models._steps(name, tuple(steps.resize_size), tuple(steps.crop_size * 2), steps.interpolation.value, steps.mean, steps.std) is not None


def test_the_old_keys_of_torchvisions_densenets_are_renamed(torchvision: ModuleType, tmp_path: Path) -> None:
    net = torchvision.models.densenet121(weights=None)
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in net.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    loaded = load_model("torchvision:densenet121", weights=saved(tmp_path / "w.pth", old))
    assert torch.equal(loaded.module.classifier.weight, net.classifier.weight)


def test_networks_whose_weights_depend_on_options_take_none(torchvision: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="torchvision:googlenet cannot take --weights"):
        load_model("torchvision:googlenet", weights=tmp_path / "w.pth")
    assert not load_model("torchvision:googlenet").module.aux_logits


@pytest.mark.parametrize(("name", "hint"), [("resnet81", "torchvision:resnet18"), ("zzz", "torchvision lists")])
def test_an_unknown_torchvision_name_gets_close_ones(torchvision: ModuleType, name: str, hint: str) -> None:
    with pytest.raises(ModelError, match=f"torchvision has no classifier '{name}'") as caught:
        load_model(f"torchvision:{name}")
    assert hint in caught.value.hint


def test_a_timm_network_brings_shape_and_preprocess(timm: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded = load_model("timm:test_resnet.r160_in1k")
    assert loaded.contract.shape == (3, 160, 160)
    assert loaded.contract.preprocess == Preprocess((168,), (160, 160), "bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert loaded.has_random_weights


@pytest.mark.parametrize("mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(200, 131), (80, 81)])
def test_pictures_become_what_timm_makes_of_them(timm: ModuleType, mode: str, size: tuple[int, int]) -> None:
    config = {
        "input_size": (3, 56, 56),
        "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.5, 0.2, 0.3),
        "crop_pct": 0.9,
        "crop_mode": mode,
    }
    contract = InputContract((3, 56, 56), preprocess=models._timm_steps("timm:x", config))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    expected = timm.data.create_transform(**config)(picture).numpy()
    assert np.abs(picture_to_input(picture, contract) - expected).max() < 1e-6


@pytest.mark.parametrize("change", [{"crop_mode": "border"}, {"input_size": (3, 64, 56)}, {"interpolation": "hamming"}])
def test_a_timm_preprocess_that_cannot_be_said_is_left_out_aloud(caplog: pytest.LogCaptureFixture, change: dict[str, object]) -> None:
    config = {"input_size": (3, 56, 56), "interpolation": "bicubic", "mean": (0.5,), "std": (0.5,), "crop_pct": 0.9, "crop_mode": "center"}
    with caplog.at_level(logging.WARNING):
        assert models._timm_steps("timm:x", config | change) is None
    assert "give --preprocess" in caplog.text


@pytest.mark.parametrize(
    ("name", "problem", "hint"),
    [
        ("test_resnt", "timm has no classifier 'test_resnt'", "timm:test_resnet"),
        ("hf_hub:someone/net", "timm has no classifier 'hf_hub:someone/net'", "timm"),
        ("test_resnet.bogus", r"cannot be built.*Invalid pretrained tag", "after the dot"),
    ],
)
def test_an_unknown_timm_name_is_refused(timm: ModuleType, name: str, problem: str, hint: str) -> None:
    with pytest.raises(ModelError, match=problem) as caught:
        load_model(f"timm:{name}")
    assert hint in caught.value.hint
