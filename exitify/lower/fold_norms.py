"""Norms folded into the convolution before them: arithmetic on weights, so that a norm costs nothing at run time.

A norm that switches between two sets of weights stays beside the convolution, as one factor and one summand a channel: both
sets are then arguments of one kernel, over one copy of the convolution's weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set as AbstractSet

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

Arrays = dict[str, NDArray[np.generic]]


def fold_norms(model: ModelProto, tensors: Arrays, switching: AbstractSet[str] = frozenset()) -> None:
    """Fold, in place, each BatchNormalization that alone reads a convolution with known weights into those weights.

    At inference a norm is x * scale + shift a channel. A norm that stands elsewhere stays.

    Args:
        model: Opset 20, norms in inference form.
        tensors: Its initializers by name; derived ones are added as `<value>:weight` and `<value>:bias`,
            which no module's parameters are called: a value may have its norm's own name.
        switching: Initializers that have a second set.
    """
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(value.name for value in graph.output)
    made_by = {name: node for node in graph.node for name in node.output}
    kept: list[NodeProto] = []
    for node in graph.node:
        convolution = made_by.get(node.input[0]) if node.op_type == "BatchNormalization" else None
        folds = convolution is not None and convolution.op_type == "Conv" and readers[node.input[0]] == 1
        if convolution is None or not folds or not tensors.keys() >= {*convolution.input[1:], *node.input[1:]}:
            kept.append(node)
            continue
        scale, shift = _scale_and_shift(node, tensors)
        bias = tensors[convolution.input[2]].astype(np.float64) if len(convolution.input) > 2 else 0.0
        shift = bias * scale + shift
        if not switching.isdisjoint(node.input[1:]):
            kept += _beside(node, tensors[convolution.input[1]], scale, shift, tensors)
            del convolution.input[2:]
            continue
        weight = tensors[convolution.input[1]].astype(np.float64)
        value = node.output[0]
        folded = {f"{value}:weight": weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), f"{value}:bias": shift}
        tensors.update({name: array.astype(tensors[convolution.input[1]].dtype) for name, array in folded.items()})
        del convolution.input[1:]
        convolution.input.extend(folded)
        convolution.output[0] = value
        made_by[value] = convolution
    del graph.node[:]
    graph.node.extend(kept)


def _beside(norm: NodeProto, weight: NDArray[np.generic], scale: NDArray[np.float64], shift: NDArray[np.float64], tensors: Arrays) -> list[NodeProto]:
    """The norm as a product and a sum, with a factor and a summand for each channel."""
    value, (scaled, factor, summand) = norm.output[0], (f"{norm.output[0]}:{part}" for part in ("scaled", "scale", "shift"))
    shape = (-1, *[1] * (weight.ndim - 2))
    tensors.update({factor: scale.reshape(shape).astype(weight.dtype), summand: shift.reshape(shape).astype(weight.dtype)})
    return [helper.make_node("Mul", [norm.input[0], factor], [scaled]), helper.make_node("Add", [scaled, summand], [value])]


def _scale_and_shift(norm: NodeProto, tensors: Arrays) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the norm does to each channel, in float64."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in norm.attribute}
    gamma, beta, mean, variance = (tensors[name].astype(np.float64) for name in norm.input[1:])
    scale = gamma / np.sqrt(variance + attributes.get("epsilon", 1e-5))
    return scale, beta - mean * scale
