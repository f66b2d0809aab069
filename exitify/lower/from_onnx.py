"""One segment of an artifact as a Relax function: its graph, norms folded, weights as constants, for one batch size."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnxscript.optimizer
import tvm
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from tvm.relax.frontend.onnx import from_onnx

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, graph_path
from exitify.errors import EngineError, first_line
from exitify.lower.fold_constants import fold_constants
from exitify.lower.fold_norms import Arrays, fold_norms
from exitify.lower.head_scores import cut_output, with_scores
from exitify.lower.zero_channels import pads_as_convolutions
from exitify.plan import Segment


class NotLowered(EngineError):
    """TVM cannot take a segment: an operator is missing, or takes a form that TVM does not know."""


def not_lowered(segment: Segment, why: str) -> NotLowered:
    """The refusal of a segment, with the way round it."""
    return NotLowered(f"TVM cannot take the segment {segment.name!r}: {why}", "leave such segments to ONNX Runtime: --fallback onnxruntime")


def segment_module(artifact: Artifact, segment: Segment, *, second: bool = False, batch: int = 1) -> tvm.IRModule:
    """Return a module whose `main` computes the segment's outputs from its inputs and parameters, in the plan's order.

    Args:
        second: Whether its norms take their second set; the module differs in constants alone. batch: How many samples.

    Raises:
        NotLowered: TVM's importer does not know an operator; the message names it.
    """
    model = onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name, second=second)]))
    weights = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    model = _at_batch(model, batch)
    channels = _channels(model) if any(node.op_type == "Pad" for node in model.graph.node) else {}
    tensors: Arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        tensors[node.output[0]] = _constant(node)
        model.graph.node.remove(node)
    point = next((point for point in artifact.plan.exits if point.logits in segment.outputs), None)
    if point is not None:
        cut_output(model, point.scores)
    switching: set[str] = set()
    if segment.has_two_norm_sets:
        first, other = (artifact.graph(segment.name, skipped).external.keys() for skipped in ((), (segment.follows,)))
        switching = first ^ other
    fold_constants(model, tensors)
    fold_norms(model, tensors, switching)
    pads_as_convolutions(model, tensors, channels)
    read = {name for node in model.graph.node for name in node.input}
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in tensors.items() if name in read)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names with dots are given underscores; nothing here reads them
            module = from_onnx(model)
    except Exception as error:
        raise not_lowered(segment, first_line(error)) from error
    if point is None:
        return module
    inputs = (*segment.inputs, *segment.parameters)
    return with_scores(module, segment.outputs.index(point.logits), inputs.index(point.temperature))


def _at_batch(model: ModelProto, batch: int) -> ModelProto:
    """The model for so many samples, what it computes from shapes replaced by constants: TVM's importer wants those known."""
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = batch
    for _ in range(3):  # what one round folds gives the next one shapes
        if not any(node.op_type == "Shape" for node in model.graph.node):
            break
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        onnxscript.optimizer.fold_constants(model)
    return model


def _channels(model: ModelProto) -> dict[str, int]:
    """How many channels there are of each image in float32, by name."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    looks = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return {name: look.shape.dim[1].dim_value for name, look in looks.items() if len(look.shape.dim) == 4 and look.elem_type == TensorProto.FLOAT}


def _constant(node: NodeProto) -> NDArray[np.generic]:
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    return numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value, np.float32 if "float" in attribute.name else np.int64)
