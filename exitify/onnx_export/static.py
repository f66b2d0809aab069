"""One static ONNX network out of an artifact: the whole network, or up to one exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx
from onnx import numpy_helper

from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact
from exitify.artifact.onnx_graph import join
from exitify.errors import PlanError
from exitify.plan import FINAL, Stretch


def export_static(
    artifact: Artifact,
    *,
    exit: str = FINAL,  # noqa: A002 - the field's word
    skip: str | Sequence[bool] | None = None,
) -> onnx.ModelProto:
    """Return the network that always stops at this exit and always leaves these skip paths out, weights inside, for any ONNX runtime.

    Args:
        artifact: With trained heads, if it is an early exit's network that is wanted.
        exit: Name of an exit, or `final` for the network without exits.
        skip: A mask, `0110` for instance (see `Plan.mask`); None leaves nothing out.

    Returns:
        One graph, opset 20: the artifact's input to `(N, classes)` logits, named as in the artifact.

    Raises:
        PlanError: there is no such exit, or its head is untrained; or the mask is none of this network.
    """
    stretch = static_stretch(artifact, exit, skip)
    if exit != FINAL and not artifact.manifest.heads_trained:
        raise PlanError(f"the head of {exit} is untrained, and its answers mean nothing", "run `exitify train` first")
    graphs = [artifact.graph(name, stretch.skipped) for name in stretch.segments]
    model = onnx.load_model_from_string(join(graphs, stretch.inputs, stretch.outputs, artifact.plan.values))
    weights = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    inside = {tensor.name for tensor in model.graph.initializer}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(weights[name], name) for name in stretch.parameters if name in read - inside and name in weights
    )
    _drop_unused(model)
    onnx.checker.check_model(model)
    return model


def static_stretch(artifact: Artifact, exit: str, skip: str | Sequence[bool] | None = None) -> Stretch:  # noqa: A002 - the field's word
    """What a network that always stops at this exit and leaves these skip paths out runs, giving its logits."""
    plan = artifact.plan
    if exit == FINAL:
        (stretch,) = plan.stretches((), skip)
        return stretch
    point = plan.exit(exit)
    first = plan.stretches((exit,), skip)[0]
    return replace(first, outputs=(point.logits,))


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove what the outputs do not need: the scores, above all."""
    wanted = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
