"""What a graph computes from constants alone, computed: masks of shifted windows, for one. TVM would compile a kernel for each operator to do so."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exitify.lower.fold_norms import Arrays

RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial")
"""Operators whose results are not those of their inputs."""


def fold_constants(model: ModelProto, tensors: Arrays) -> None:
    """Remove, in place, the nodes that read nothing but constants, and add to these what others read of their results.

    Args:
        tensors: The constants by name.
    """
    graph = model.graph
    given = {value.name for value in graph.output}
    found: list[NodeProto] = []
    known = set(tensors)
    for node in graph.node:
        if _is_plain(node) and known.issuperset(filter(None, node.input)) and given.isdisjoint(node.output):
            found.append(node)
            known.update(node.output)
    if not found:
        return
    kept = [node for node in graph.node if not any(node is one for one in found)]
    wanted = sorted({name for node in kept for name in node.input} & (known - set(tensors)))
    read = {name for node in found for name in node.input} & tensors.keys()
    values = [helper.make_tensor_value_info(name, 0, None) for name in wanted]
    constants = helper.make_graph(found, "constants", [], values, [numpy_helper.from_array(tensors[name], name) for name in read])
    results: Any = ReferenceEvaluator(helper.make_model(constants, opset_imports=model.opset_import)).run(None, {})
    tensors.update(zip(wanted, results))
    del graph.node[:]
    graph.node.extend(kept)


def _is_plain(node: NodeProto) -> bool:
    return not node.domain and node.op_type not in RANDOM and not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
