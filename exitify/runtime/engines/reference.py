"""ONNX's own reference evaluator: slow, in plain NumPy, and what every other engine is checked against."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx.reference import ReferenceEvaluator

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
        evaluator = ReferenceEvaluator(model)

        def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
            return dict(zip(stretch.outputs, evaluator.run(list(stretch.outputs), dict(inputs))))

        return run
