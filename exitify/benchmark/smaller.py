"""A smaller static network from an ONNX file that may be a stranger's: looked at before anything runs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exitify.artifact.manifest import InputContract
from exitify.benchmark.contenders import InOnnxRuntime
from exitify.errors import ModelError, first_line

STANDARD = ("", "ai.onnx", "ai.onnx.ml")
"""Domains of ONNX's own operators. Others may name libraries and files to load."""


def smaller_network(path: Path, contract: InputContract, classes: int) -> InOnnxRuntime:
    """The network in this file as a contender.

    Args:
        path: An ONNX file: `exitify export --exit 2` writes one. What it keeps outside must lie in its folder.
        contract: What the artifact's network reads; the file's network must read the same.
        classes: How many class scores its first output must give.

    Raises:
        ModelError: no such file or none of ONNX; an operator that is not ONNX's own; data outside of the file's folder; several inputs,
            or another input or output. ModuleNotFoundError: the onnx package is not installed.
    """
    import onnx
    from onnx import helper

    if not path.is_file():
        raise ModelError(f"there is no file {path}", "`exitify export net.exitify --exit 2 -o small.onnx` writes a smaller network")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no common class
        raise ModelError(f"{path} is no ONNX file: {first_line(error)}", "export it again") from error
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto) and message.domain not in STANDARD:
            raise ModelError(
                f"{path} has the operator {message.domain}.{message.op_type}, which is not ONNX's own", "export it without custom operators"
            )
        if isinstance(message, onnx.TensorProto) and message.data_location == onnx.TensorProto.EXTERNAL:
            _check_location(path, message)
    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in initial]
    if len(inputs) != 1 or not model.graph.output:
        raise ModelError(
            f"{path} has {len(inputs)} inputs and {len(model.graph.output)} outputs", "give a network of one input that gives class scores"
        )
    read, given = _shape(inputs[0]), _shape(model.graph.output[0])
    dtype = str(helper.tensor_dtype_to_np_dtype(inputs[0].type.tensor_type.elem_type))
    if dtype != contract.dtype or read[1:] != contract.shape or read[0] not in (0, 1):
        raise ModelError(
            f"{path} reads {dtype} {_text(read)}, and the artifact {contract.dtype} {_text((0, *contract.shape))}",
            "give a network that reads the same samples",
        )
    if given not in ((0, classes), (1, classes)):
        raise ModelError(
            f"the first output of {path} is {_text(given)}, and the artifact gives {_text((0, classes))}", "give a network of the same classes"
        )
    return InOnnxRuntime(path.name, "smaller", path.resolve(), (1, *contract.shape), dtype, classes)


def _messages(message: Any) -> Iterator[Any]:
    """The message and all within it: graphs in attributes and functions have nodes and tensors of their own."""
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)


def _check_location(path: Path, tensor: Any) -> None:
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    folder = path.resolve().parent
    outside = (folder / location).resolve()  # links followed, so that none leads elsewhere
    if not location or not outside.is_relative_to(folder) or not outside.is_file():
        raise ModelError(f"{path} keeps {tensor.name!r} in {location!r}, which is no file in its folder", "export it with its weights inside")


def _shape(value: Any) -> tuple[int, ...]:
    """Sizes, 0 for one that is free."""
    return tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim) or (-1,)


def _text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(str(size) if size else 'N' for size in shape)})" if shape != (-1,) else "of no known shape"
