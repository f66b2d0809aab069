"""A head's scores as one kernel: what FORMAT.md says they are, in place of the thirty small operators that say it in ONNX."""

from __future__ import annotations

from typing import Any

import tvm
from onnx import ModelProto
from tvm import relax, te, tirx


def cut_output(model: ModelProto, name: str) -> None:
    """Remove, in place, one output from the model and every node that nothing else needs."""
    graph = model.graph
    outputs = [value for value in graph.output if value.name != name]
    wanted = {value.name for value in outputs}
    nodes = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            nodes.append(node)
    del graph.node[:], graph.output[:]
    graph.node.extend(reversed(nodes))
    graph.output.extend(outputs)


def with_scores(module: tvm.IRModule, logits: int, temperature: int) -> tvm.IRModule:
    """Return the module with one more output at the end of `main`: the scores `(N, 4)` of one of its outputs.

    Args:
        module: `main` returns a tuple.
        logits: Which output holds the logits. temperature: Which parameter is the temperature.
    """
    builder = relax.BlockBuilder()
    body = module["main"]
    outline = builder.add_func(body.with_attr("global_symbol", "outline"), "outline")
    params = [relax.Var(param.name, param.ty) for param in body.params]
    with builder.function("main", params):
        with builder.dataflow():
            outputs = builder.emit(relax.Call(outline, params))
            items = [builder.emit(relax.TupleGetItem(outputs, i)) for i in range(len(body.ret_ty.fields))]
            scores = builder.emit_te(scores_of, items[logits], params[temperature], primfunc_name_hint="scores")
            result = builder.emit_output(relax.Tuple([*items, scores]))
        builder.emit_func_output(result)
    made = builder.get()
    made["main"] = made["main"].inline_functions({outline: body})
    del made[outline]
    return made


def scores_of(logits: te.Tensor, temperature: te.Tensor) -> te.Tensor:
    """Largest probability, entropy, margin and entropy of p²/Σp², `(N, 4)`, of p = softmax(logits / T).

    Args:
        logits: `(N, classes)`, float32. temperature: A scalar, float32.
    """
    samples, classes = logits.shape
    lowest = tirx.min_value(logits.dtype)

    def over_classes(reduce: Any, value: Any, name: str) -> te.Tensor:
        k = te.reduce_axis((0, classes), name="k")
        return te.compute((samples,), lambda n: reduce(value(n, k), axis=k), name=name)

    scaled = te.compute((samples, classes), lambda n, c: logits[n, c] / temperature[()], name="scaled")
    first = over_classes(te.max, lambda n, c: scaled[n, c], "first")
    # The second largest is the largest of the others; where several are the largest, it is one of them. Sums and maxima alone, not one
    # reduction of pairs, which GPUs' schedules do not know.
    below = over_classes(te.max, lambda n, c: tirx.Select(scaled[n, c] < first[n], scaled[n, c], lowest), "below")
    largest = over_classes(te.sum, lambda n, c: tirx.Select(scaled[n, c] < first[n], 0.0, 1.0), "largest")
    powers = te.compute((samples, classes), lambda n, c: tirx.exp(scaled[n, c] - first[n]), name="powers")
    norm = over_classes(te.sum, lambda n, c: powers[n, c], "norm")
    # With d = l - max and e = exp(d): p = e / Σe, and the entropy is log Σe - Σ(e d) / Σe; p² / Σp² is the same with 2 d.
    spread = over_classes(te.sum, lambda n, c: powers[n, c] * (scaled[n, c] - first[n]), "spread")
    norm2 = over_classes(te.sum, lambda n, c: powers[n, c] * powers[n, c], "norm2")
    spread2 = over_classes(te.sum, lambda n, c: powers[n, c] * powers[n, c] * (scaled[n, c] - first[n]) * 2.0, "spread2")

    def score(n: tirx.Var, i: tirx.Var) -> tirx.PrimExpr:
        top1 = 1.0 / norm[n]
        margin = tirx.Select(largest[n] > 1.0, 0.0, (1.0 - tirx.exp(below[n] - first[n])) / norm[n])
        entropy = tirx.log(norm[n]) - spread[n] / norm[n]
        renyi = tirx.log(norm2[n]) - spread2[n] / norm2[n]
        return tirx.Select(i == 0, top1, tirx.Select(i == 1, entropy, tirx.Select(i == 2, margin, renyi)))

    return te.compute((samples, 4), score, name="scores")
