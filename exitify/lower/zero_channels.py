"""Channels of zeros beside an image's own, as the shortcuts of some residual networks have them: a convolution of ones and zeros.

TVM's importer makes a kernel of a Pad at once, which layouts cannot see through; a convolution stays in blocks of channels.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, helper

from exitify.lower.fold_norms import Arrays


def pads_as_convolutions(model: ModelProto, tensors: Arrays, channels: dict[str, int]) -> None:
    """Replace, in place, each Pad that adds zeros to the channels of an image alone.

    Args:
        model: Opset 20.
        tensors: Its initializers by name; the weights are added as `<value>:ones`.
        channels: How many there are of each image `(N, C, H, W)` in float32, by name.
    """
    for index, node in enumerate(model.graph.node):
        if node.op_type == "Pad" and node.input[0] in channels and (around := _channels_around(node, tensors)) is not None:
            before, after = around
            own = channels[node.input[0]]
            weight = np.zeros((before + own + after, own, 1, 1), np.float32)
            weight[np.arange(own) + before, np.arange(own)] = 1
            name = f"{node.output[0]}:ones"
            tensors[name] = weight
            model.graph.node.insert(index, helper.make_node("Conv", [node.input[0], name], list(node.output)))
            model.graph.node.remove(node)


def _channels_around(node: NodeProto, tensors: Arrays) -> tuple[int, int] | None:
    """Channels before and behind; None where it is another kind of Pad."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs = [*node.input, "", "", ""][:4]
    if attributes.get("mode", b"constant") != b"constant" or inputs[1] not in tensors or inputs[3]:
        return None
    if inputs[2] and (inputs[2] not in tensors or np.any(tensors[inputs[2]])):
        return None
    pads = [int(size) for size in tensors[inputs[1]].ravel()]
    if len(pads) != 8 or any(size for axis, size in enumerate(pads) if axis % 4 != 1) or min(pads) < 0:
        return None
    return pads[1], pads[5]
