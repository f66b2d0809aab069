"""From the model as the user names it (a file, `package.module:factory`, `timm:NAME`, `torchvision:NAME`) to a module and what it reads."""

from __future__ import annotations

import difflib
import importlib
import logging
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from exitify.artifact.manifest import InputContract, Preprocess
from exitify.errors import DataError, ExitifyError, ModelError, one_line
from exitify.imports import current_directory_importable, import_object, place_of
from exitify.pictures import FILTERS, Color, parse_preprocess

log = logging.getLogger(__name__)

FORMS = "model.pt2, model.pt, package.module:factory, torchvision:NAME or timm:NAME"
NESTINGS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""


@dataclass(frozen=True)
class LoadedModel:
    """A network and what is known about it.

    Attributes:
        module: In eval mode, on the CPU unless a factory put it elsewhere.
        example: One input, `(1, *contract.shape)`: random numbers from a fixed seed, zeros for integers.
        contract: Shape, preprocess and classes, checked against each other.
        source: As the user named the model.
        has_random_weights: Whether nobody gave it any: zoos build their networks so, and nothing is downloaded.
    """

    module: nn.Module
    example: torch.Tensor
    contract: InputContract
    source: str
    has_random_weights: bool = False


@dataclass(frozen=True)
class _Found:
    """A module, and what its origin says about its input; None where it says nothing."""

    module: nn.Module
    shape: tuple[int, ...] | None = None
    dtype: str = "float32"
    preprocess: Preprocess | None = None
    color: Color | None = None
    classes: tuple[str, ...] = ()
    is_random: bool = False


def load_model(
    name: str,
    *,
    weights: Path | None = None,
    input_shape: tuple[int, ...] | None = None,
    preprocess: str | None = None,
    classes: Sequence[str] = (),
    trust: bool = False,
) -> LoadedModel:
    """Return the network that `name` stands for, with its weights and its input contract.

    Args:
        name: `model.pt2` (torch.export), `model.pt` or `.pth` (a pickled module), `package.module:factory` (called without
            arguments; the current directory is searched first), `torchvision:NAME` or `timm:NAME` (nothing is downloaded).
        weights: A state_dict, `.safetensors` or `.pth`, `.pt`, `.bin`, read without unpickling code. All keys must fit.
        input_shape: Without the batch. Else the `.pt2`'s own, timm's or torchvision's, or the factory's attribute `input_shape`.
        preprocess: Text for `exitify.pictures.parse_preprocess`. Else timm's or torchvision's, or the factory's `preprocess`.
        classes: Names of the classes. Else torchvision's, or the factory's `classes`.
        trust: Whether `.pt2`, `.pt` and `.pth` may be loaded: each can run code that its maker put there.

    Raises:
        ModelError: the model or its weights are missing, damaged, not trusted, not what their name says, or do not fit.
        DataError: shape, preprocess and classes contradict each other.
    """
    found = _find(name, trust=trust, has_weights=weights is not None)
    if isinstance(found.module, torch.jit.ScriptModule):
        raise ModelError(f"{name} is TorchScript, whose code cannot be transformed", "give the module before torch.jit, or torch.export it")
    if weights is not None:
        _put_weights(found.module, read_weights(weights), weights, renamed=_old_densenet_key if name.startswith("torchvision:densenet") else None)
    contract = _contract(name, found, input_shape, preprocess, tuple(classes))
    _set_eval(found.module)
    return LoadedModel(found.module, _example(contract), contract, name, found.is_random and weights is None)


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the shape written as `3x224x224`, without the batch.

    Raises:
        ModelError: the text is no such shape.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", text):
        raise ModelError(f"{text!r} is no input shape", "write it without the batch: --input-shape 3x224x224")
    return tuple(map(int, text.split("x")))


def _find(name: str, *, trust: bool, has_weights: bool) -> _Found:
    suffix = Path(name).suffix
    if suffix == ".pt2":
        return _from_export(Path(name), trust=trust)
    if suffix in (".pt", ".pth"):
        return _Found(_from_pickle(Path(name), trust=trust))
    origin, colon, rest = name.partition(":")
    if origin == "torchvision" and colon:
        return _from_torchvision(rest, has_weights=has_weights)
    if origin == "timm" and colon:
        return _from_timm(rest)
    if colon:
        return _from_factory(name)
    if suffix in (".safetensors", ".bin", ".ckpt"):
        raise ModelError(f"{name} holds weights and not the network", f"give package.module:factory --weights {name}")
    if suffix == ".onnx":
        raise ModelError(f"{name} is an ONNX network, and exits are added to PyTorch ones", f"give {FORMS}")
    raise ModelError(f"{name!r} names no model", f"give {FORMS}; a network of torchvision: torchvision:{Path(name).name or 'resnet18'}")


# --- files ----------------------------------------------------------------------------------------------------------


def _require_file(path: Path) -> None:
    if not path.exists():
        raise ModelError(f"there is no file {path}", "relative paths start in the current directory")
    if not path.is_file():
        raise ModelError(f"{path} is a folder", f"give {FORMS}")


def _entries(path: Path) -> set[str]:
    """Names in a zip file, below its top folder; empty when it is none."""
    try:
        with zipfile.ZipFile(path) as file:
            return {name.partition("/")[2] for name in file.namelist()}
    except (zipfile.BadZipFile, OSError):
        return set()


def _from_export(path: Path, *, trust: bool) -> _Found:
    """A program of torch.export.

    `torch.export.load` runs code of the file's maker, so it needs trust. In torch 2.13: shapes are strings that sympy
    evaluates (`serialize.py: _parse_sym_expr`), guards are strings given to `exec` (`_unlift.py`), tensors and objects
    marked so are unpickled, example inputs are when they do not load without, and AOTInductor parts are shared libraries.
    """
    _require_file(path)
    entries = _entries(path)
    if "archive_format" not in entries or not any(entry.startswith("models/") for entry in entries):
        what = "an AOTInductor package, compiled already" if "archive_format" in entries else "no archive of torch.export"
        raise ModelError(f"{path} is {what}", "make it with torch.export.save(torch.export.export(model.eval(), …), path)")
    if not trust:
        raise ModelError(
            f"{path} is not loaded without trust: torch.export.load evaluates text from the file and unpickles parts of it, which can run any code",
            "if you know who made it: --trust. Without: package.module:factory --weights W.safetensors",
        )
    try:
        program = torch.export.load(path)
        module = program.module()
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded: {one_line(error)}", f"export it again with this torch ({torch.__version__})") from error
    _refuse_train_mode(module, path)
    wanted = program.graph_signature.user_inputs
    inputs = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in wanted]
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        raise ModelError(f"{path} has {len(inputs)} inputs; exitify reads networks with one tensor", "wrap the network in a module with one input")
    shape = tuple(inputs[0].shape[1:])
    known = bool(shape) and all(isinstance(side, int) for side in shape)
    return _Found(module, shape if known else None, str(inputs[0].dtype).removeprefix("torch."))


def _refuse_train_mode(module: nn.Module, path: Path) -> None:
    for node in cast(torch.fx.GraphModule, module).graph.nodes:
        arguments = node.target._schema.arguments if isinstance(node.target, torch._ops.OpOverload) else ()
        given = {argument.name: value for argument, value in zip(arguments, node.args)} | dict(node.kwargs)
        has_no_statistics = "running_mean" in given and given["running_mean"] is None  # it computes the same in both modes
        if (given.get("train") is True or given.get("training") is True) and not has_no_statistics:
            raise ModelError(f"{path} was exported in train mode: {node.name} runs as in training", "call model.eval() before torch.export.export")


def _from_pickle(path: Path, *, trust: bool) -> nn.Module:
    """A pickled module; what is none is told apart without unpickling code."""
    _require_file(path)
    _refuse_other_files(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not trust:
            raise ModelError(
                f"{path} is not loaded without trust: it is a pickle of more than tensors, and unpickling runs any code that is in it",
                "if you know who made it: --trust. Without: package.module:factory --weights W.safetensors",
            ) from error
        data = _unpickle(path)
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}", "it may be cut off; copy or save it again") from error
    if isinstance(data, nn.DataParallel):
        data = data.module
    if not isinstance(data, nn.Module):
        holds = "the weights (a state_dict)" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise ModelError(f"{path} holds {holds} and not the network", f"give package.module:factory --weights {path}")
    return data


def _refuse_other_files(path: Path) -> None:
    entries = _entries(path)
    if "archive_format" in entries:
        raise ModelError(f"{path} is an archive of torch.export", f"name it {path.with_suffix('.pt2').name}")
    if "constants.pkl" in entries:
        raise ModelError(f"{path} is TorchScript, whose code cannot be transformed", "give the module before torch.jit, or torch.export it")
    with path.open("rb") as file:
        start = file.read(64)
    if "data.pkl" in entries or start.startswith(b"\x80"):
        return
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a pointer of Git LFS, not the file itself", "git lfs pull")
    raise ModelError(f"{path} was not written by torch.save: it is neither a zip file nor a pickle (it starts with {start[:16]!r})", f"give {FORMS}")


def _unpickle(path: Path) -> Any:
    with current_directory_importable():
        try:
            return torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            hint = "a pickle needs the code of its classes: run where that can be imported, or give package.module:factory --weights W"
            raise ModelError(f"{path} cannot be unpickled{place_of(error)}: {one_line(error)}", hint) from error


# --- code and zoos --------------------------------------------------------------------------------------------------


def _from_factory(name: str) -> _Found:
    with current_directory_importable():
        factory = import_object(name, ModelError)
        module = factory if isinstance(factory, nn.Module) else _built(name, factory)
    shape = getattr(factory, "input_shape", None)
    told = getattr(factory, "preprocess", None)
    steps, color = parse_preprocess(told) if isinstance(told, str) else (told if isinstance(told, Preprocess) else None, None)
    names = getattr(factory, "classes", None)
    return _Found(
        module,
        tuple(shape) if isinstance(shape, (tuple, list)) else parse_shape(shape) if isinstance(shape, str) else None,
        preprocess=steps,
        color=color,
        classes=tuple(names) if isinstance(names, (tuple, list)) else (),
    )


def _built(name: str, factory: Any) -> nn.Module:
    if not callable(factory):
        raise ModelError(f"{name} is a {type(factory).__name__}, not a function", "give a function without arguments that returns the module")
    try:
        module = factory()
    except ExitifyError:
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name} fails{place_of(error)}: {one_line(error)}", "it is called without arguments, and returns the module") from error
    if not isinstance(module, nn.Module):
        raise ModelError(
            f"{name} returns a {type(module).__name__}, not a torch.nn.Module", "give a function without arguments that returns the module"
        )
    return module


def _from_torchvision(name: str, *, has_weights: bool) -> _Found:
    models = _zoo("torchvision", "torchvision.models")
    _require_known("torchvision", name, models.list_models(module=models))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        if has_weights:
            raise ModelError(
                f"torchvision:{name} cannot take --weights: torchvision's own need transform_input=True, others do not, and the file does not tell",
                f"give a factory that calls torchvision.models.{name} with the options the weights were trained with",
            )
        options = {"aux_logits": False, "init_weights": False}
    module = models.get_model(name, weights=None, **options)
    trained = models.get_model_weights(name)
    own_size = getattr(module, "image_size", None)  # a vision transformer's, which other weights of its may not have
    default = next((weights for weights in trained if weights.transforms().crop_size == [own_size]), trained.DEFAULT)
    steps = default.transforms()
    preprocess = _steps(
        f"torchvision:{name}", tuple(steps.resize_size), (*steps.crop_size, *steps.crop_size)[:2], steps.interpolation.value, steps.mean, steps.std
    )
    shape = (3, *preprocess.crop) if preprocess is not None and preprocess.crop is not None else None
    return _Found(module, shape, preprocess=preprocess, color="RGB", classes=tuple(default.meta["categories"]), is_random=True)


def _from_timm(name: str) -> _Found:
    timm = _zoo("timm", "timm")
    if not timm.is_model(name):
        _require_known("timm", name, timm.list_models())
    try:
        module = timm.create_model(name, pretrained=False)
    except Exception as error:
        raise ModelError(
            f"timm:{name} cannot be built{place_of(error)}: {one_line(error)}", "check the part after the dot; timm.list_pretrained() lists them"
        ) from error
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    preprocess = _timm_steps(f"timm:{name}", config) if channels in (1, 3) else None
    color: Color = "L" if channels == 1 else "RGB"
    return _Found(module, (channels, height, width), preprocess=preprocess, color=color, is_random=True)


def _timm_steps(name: str, config: Mapping[str, Any]) -> Preprocess | None:
    """The evaluation transform (`transforms_imagenet_eval`), of timm, where our steps can say it."""
    size = tuple(config["input_size"][1:])
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in size)
    if config["crop_mode"] == "squash":
        return _steps(name, scaled, size, config["interpolation"], config["mean"], config["std"])
    if config["crop_mode"] == "center" and scaled[0] == scaled[1]:
        return _steps(name, scaled[:1], size, config["interpolation"], config["mean"], config["std"])
    log.warning("%s prepares pictures in a way that has no name here (crop mode %s for %s); give --preprocess", name, config["crop_mode"], size)
    return None


def _steps(
    name: str, resize: tuple[int, ...], crop: tuple[int, ...], interpolation: str, mean: Sequence[float], std: Sequence[float]
) -> Preprocess | None:
    if interpolation not in FILTERS:
        log.warning("%s resizes pictures with the filter %s, which is not built here; give --preprocess", name, interpolation)
        return None
    return Preprocess(resize, (crop[0], crop[1]), cast(Any, interpolation), mean=tuple(map(float, mean)), std=tuple(map(float, std)))


def _zoo(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise ModelError(f"{package} is not installed", f"pip install {package}") from error
        hint = f"its version must fit torch {torch.__version__}; or give package.module:factory"
        raise ModelError(f"{package} is installed and cannot be imported: {one_line(error)}", hint) from error


def _require_known(package: str, name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = (
            f"did you mean {' or '.join(f'{package}:{match}' for match in close)}?"
            if close
            else f"{package} lists {len(known)}, such as {package}:{known[0]}"
        )
        raise ModelError(f"{package} has no classifier {name!r}", hint)


# --- weights --------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state_dict in a file, out of its nesting (`{"state_dict": …}`, `{"model": …}`). No code in the file runs.

    Args:
        path: `.safetensors`, or `.pth`, `.pt`, `.bin` as `torch.save` writes them.

    Raises:
        ModelError: the file is missing, damaged, of another kind, or holds more than tensors.
    """
    _require_file(path)
    if path.suffix == ".safetensors":
        data: Any = _read_safetensors(path)
    elif path.suffix in (".pth", ".pt", ".bin"):
        data = _read_checkpoint(path)
    else:
        raise ModelError(f"the weights {path} are of a kind that is not read", "give .safetensors, or .pth, .pt, .bin with a state_dict")
    for nesting in NESTINGS:
        if isinstance(data, Mapping) and isinstance(data.get(nesting), Mapping):
            data = data[nesting]
    if not isinstance(data, Mapping) or not data or not all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in data.items()):
        raise ModelError(f"{path} holds no state_dict", "save one: torch.save(model.state_dict(), path)")
    return dict(data)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}", "it may be cut off; copy or save it again") from error


def _read_checkpoint(path: Path) -> Any:
    _refuse_other_files(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"the weights {path} are not loaded: the file is a pickle of more than tensors, and unpickling runs any code that is in it",
            "where it was made, save the tensors alone: torch.save(model.state_dict(), path)",
        ) from error
    except Exception as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}", "it may be cut off; copy or save it again") from error


def _put_weights(module: nn.Module, state: Mapping[str, torch.Tensor], path: Path, *, renamed: Callable[[str], str] | None = None) -> None:
    """Load all of `state`, or say in one line what does not fit."""
    own = module.state_dict()
    state = _unwrapped(state, own)
    if renamed is not None:
        state = {renamed(key): value for key, value in state.items()}
    reshaped = [key for key, value in state.items() if isinstance(own.get(key), torch.Tensor) and own[key].shape != value.shape]
    try:
        missing, unexpected = module.load_state_dict({key: value for key, value in state.items() if key not in reshaped}, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{path} cannot be loaded into the network: {one_line(error)}", "give the weights of this very network") from error
    missing = [key for key in missing if key not in reshaped]
    if not (missing or unexpected or reshaped):
        return
    shapes = [f"{key} {_shown(state[key])} instead of {_shown(own[key])}" for key in reshaped]
    parts = [
        f"{len(keys)} {what} ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape"))
        if keys
    ]
    raise ModelError(
        f"{path} holds the weights of another network: of {len(own)} keys, {', '.join(parts)}",
        "give the factory that builds the network they were trained in (its number of classes too)",
    )


def _unwrapped(state: Mapping[str, torch.Tensor], own: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """The same without the prefixes of wrappers that the network itself does not have."""
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            return _unwrapped({key.removeprefix(prefix): value for key, value in state.items()}, own)
    return state


def _shown(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _old_densenet_key(key: str) -> str:
    """The densenet files of torchvision have `norm.1` where its modules have `norm1`."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)


# --- the contract ---------------------------------------------------------------------------------------------------


def _contract(name: str, found: _Found, input_shape: tuple[int, ...] | None, text: str | None, classes: tuple[str, ...]) -> InputContract:
    steps, color = parse_preprocess(text) if text is not None else (found.preprocess, found.color)
    shape = input_shape or found.shape
    if shape is None:
        raise ModelError(f"the input shape of {name} is not known", "give it without the batch: --input-shape 3x224x224")
    ends = _end_size(steps)
    if text is None and ends is not None and ends != shape[1:]:
        log.warning("%s prepares pictures to %s, and the input is %s; give --preprocess", name, "x".join(map(str, ends)), "x".join(map(str, shape)))
        steps = ends = None
    contract = InputContract(shape, found.dtype, color or ("L" if shape[0] == 1 else "RGB"), steps, classes or found.classes)
    contract.check()
    if ends is not None and ends != shape[1:]:
        raise DataError(
            f"the preprocess makes pictures of {ends[0]}x{ends[1]}, and the network reads {shape[1]}x{shape[2]}",
            f"add ;crop={shape[1]}x{shape[2]} to it, or give another --input-shape",
        )
    return contract


def _end_size(steps: Preprocess | None) -> tuple[int, ...] | None:
    """Height and width that every picture ends in, when the steps alone tell."""
    if steps is None or steps.crop is not None:
        return None if steps is None else steps.crop
    return steps.resize if steps.resize is not None and len(steps.resize) == 2 else None


def _example(contract: InputContract) -> torch.Tensor:
    dtype = getattr(torch, contract.dtype)
    size = (1, *contract.shape)
    if not dtype.is_floating_point:
        return torch.zeros(size, dtype=dtype)
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)


def _set_eval(module: nn.Module) -> None:
    """Eval mode; exported programs refuse `eval()` and are in it already."""
    try:
        module.eval()
    except NotImplementedError:
        for part in module.modules():
            part.training = False
