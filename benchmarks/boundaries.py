"""What a cut costs: the network in 1, 2, 4, … pieces without heads, and a session with no exit enabled, against one graph.

    python -m benchmarks.boundaries r56.exitify

One graph is the same network exported as one ONNX file, in ONNX Runtime with buffers bound once. Each contender is loaded
several times (where its weights land in memory moves a run by a percent), all run in turn, one thread, batch 1; every
call is timed after one of its own kind, so that caches are as in steady use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from exitify.artifact.artifact import Artifact
from exitify.benchmark import one_graph
from exitify.plan import Cost, Plan, Segment, Stretch
from exitify.runtime.engines import make_engine
from exitify.runtime.session import Session


def pieces(plan: Plan, count: int) -> list[Stretch]:
    """The network without heads in this many pieces."""
    trunks = [segment for segment in plan.segments if segment.kind == "trunk"]
    groups = [[trunks[i] for i in part] for part in np.array_split(np.arange(len(trunks)), count)]
    return [_piece(plan, group, [s for other in groups if other is not group for s in other]) for group in groups]


def _piece(plan: Plan, group: list[Segment], others: list[Segment]) -> Stretch:
    made = {value for segment in group for value in segment.outputs}
    wanted = {value for segment in others for value in segment.inputs} | {plan.output}
    inputs = dict.fromkeys(value for segment in group for value in segment.inputs if value not in made)
    outputs = [value for segment in group for value in segment.outputs if value in wanted]
    return Stretch(tuple(s.name for s in group), tuple(inputs), tuple(outputs), (), "", Cost())


def in_pieces(artifact: Artifact, count: int) -> Callable[[np.ndarray], None]:
    """A run of the network in this many pieces, on bound buffers."""
    bound = make_engine("onnxruntime", artifact, 1).bind(pieces(artifact.plan, count), {})

    def run(x: np.ndarray) -> None:
        bound.set_input(x)
        for i in range(count):
            bound.step(i)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--loads", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=300)
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    trunks = sum(segment.kind == "trunk" for segment in artifact.plan.segments)
    counts = sorted({1, 2, 4, trunks} & set(range(1, trunks + 1)))
    makers: dict[str, Callable[[], Callable[[np.ndarray], object]]] = {
        "one graph": lambda: one_graph(artifact, 1),
        "session, no exit enabled": lambda: Session(artifact, profile="none").run,
        **{f"{count} pieces": (lambda count=count: in_pieces(artifact, count)) for count in counts},
    }
    x = np.random.default_rng(0).standard_normal((1, *artifact.manifest.input.shape)).astype(np.float32)
    medians: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(options.loads):
        runs = {name: make() for name, make in makers.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                run(x)
                started = time.perf_counter_ns()
                run(x)
                times[name].append((time.perf_counter_ns() - started) / 1e3)
        for name, values in times.items():
            medians[name].append(float(np.median(values)))
    base = np.array(medians["one graph"])
    for name, values in medians.items():
        low, middle, high = np.percentile(np.array(values) / base, (25, 50, 75))
        line = f"{name:26s} {np.median(values):8.1f} µs, ratio {middle:.4f} (quartiles {low:.4f} to {high:.4f} over {options.loads} loads)"
        cut = int(name.split()[0]) - 1 if name.endswith("pieces") else 0
        if cut:
            each = (np.array(values) - np.array(medians["1 pieces"])) / cut
            line += f", {np.median(each):.1f} µs a boundary"
        print(line)


if __name__ == "__main__":
    main()
