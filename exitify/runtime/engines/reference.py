"""ONNX's own reference evaluator: slow, in plain NumPy, and what every other engine is checked against."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from exitify.errors import EngineError
from exitify.plan import Stretch
from exitify.runtime.engines.base import Array, Engine, Runner


class ReferenceEngine(Engine):
    """Needs the onnx package. One sample of a ResNet-56 takes about a second."""

    name = "reference"

    def prepare(self, stretch: Stretch) -> Runner:
        data, outside = self.joined(stretch)
        model = onnx.load_model_from_string(data)
        for tensor in model.graph.initializer:
            if tensor.name in outside:
                tensor.CopyFrom(onnx.numpy_helper.from_array(outside[tensor.name], tensor.name))
        for node in model.graph.node:
            _drop_ceil_mode(node)
        with _named(stretch):
            evaluator = ReferenceEvaluator(model, new_ops=[LogSoftmax])

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            with _named(stretch), np.errstate(all="ignore"):  # its sigmoid computes both branches everywhere
                return dict(zip(stretch.outputs, evaluator.run(list(stretch.outputs), dict(inputs))))

        return run


class LogSoftmax(OpRun):
    """As ONNX means it. The evaluator's own is the logarithm of a softmax, which is 0 for a class that is 104 below the best."""

    op_domain = ""

    def _run(self, x: Array, axis: int = -1) -> tuple[Array]:
        below = x - x.max(axis=axis, keepdims=True)
        return (below - np.log(np.exp(below).sum(axis=axis, keepdims=True)),)


def _drop_ceil_mode(node: onnx.NodeProto) -> None:
    """Where a pool's stride is 1, `ceil_mode` says nothing; the evaluator's MaxPool adds rows and columns there."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    is_dense = "strides" not in attributes or set(attributes["strides"].ints) == {1}
    if node.op_type == "MaxPool" and "ceil_mode" in attributes and is_dense:
        node.attribute.remove(attributes["ceil_mode"])


@contextlib.contextmanager
def _named(stretch: Stretch) -> Iterator[None]:
    """Whatever the evaluator raises, as an EngineError that names the segments."""
    try:
        yield
    except Exception as error:
        hint = "use the engine onnxruntime; this one is for checks"
        raise EngineError(f"the reference engine failed in {', '.join(stretch.segments)}: {error}", hint) from error
