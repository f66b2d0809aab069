"""Every classifier of torchvision and one of each family of timm, captured and given three exits.

    python -m benchmarks.zoo --log zoo.jsonl --output docs/zoo.md      # an hour on two cores; goes on where it was stopped
    python -m benchmarks.zoo --only torchvision:resnet18 timm:davit_tiny

Of each network, with random weights: how many graph nodes and places for exits it has, how much of its cost the largest
single node holds, where three exits were put, and whether the program is the network: the full path's largest difference,
relative to the largest logit, at batch 1, 2 and 3 in eval() and, from one seed, in train(); the keys of its state_dict;
a backward pass through all exits. One process a network.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import exitify
from exitify.errors import ExitifyError

EXITS = 3
BATCHES = (1, 2, 3)
TOLERANCE = 1e-5


def define_missing_operators() -> None:
    """Two operators of torchvision that its wheel does not bring for a CPU build of torch; no classifier calls them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_library"] = library  # it unregisters what it defined when it goes


def names() -> list[str]:
    """All classifiers of torchvision, and of each timm family the one with the fewest parameters."""
    import timm
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models(module=models)] + [
        f"timm:{smallest(timm, family)}" for family in timm.list_modules()
    ]


def smallest(timm: Any, family: str) -> str:
    """The family's model with the fewest parameters, built without memory for them."""
    sizes = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except Exception:
            continue
    return min(sizes, key=lambda name: (sizes[name], name)) if sizes else timm.list_models(module=family)[0]


def judge(name: str) -> dict[str, Any]:
    """What became of one network."""
    from exitify.models import load_model
    from exitify.passes.choose_exits import ChooseExits
    from exitify.passes.cost import node_costs
    from exitify.pipeline import place

    define_missing_operators()
    torch.manual_seed(0)
    loaded = load_model(name)
    model, example = loaded.module, loaded.example
    keys = list(model.state_dict())
    started = time.perf_counter()
    captured = exitify.capture(model, example, source=name)
    program = place(captured, exits=EXITS)
    seconds = time.perf_counter() - started
    costs = node_costs(captured)
    total = sum(cost.macs for cost in costs.values())
    considered = ChooseExits(exits=str(EXITS)).decide(captured)[1]
    own = [key for key in program.state_dict() if not key.startswith("exit_heads.")]
    found: dict[str, Any] = {
        "model": name,
        "seconds": seconds,
        "nodes": len(program.graph.nodes),
        "places": sum(place.verdict == "exit" or place.verdict.startswith("not among") for place in considered),
        "largest": max(cost.macs for cost in costs.values()) / max(total, 1),
        "exits": [f"{point.place} ({share:.0%})" for point, share in zip(program.plan.exits, shares(program))],
        "crossing": [len(crossing(program, point.after)) for point in program.plan.exits],
        "keys": own == keys,
        "eval": {},
        "train": {},
    }
    wide = {batch: torch.randn(batch, *example.shape[1:], generator=torch.Generator().manual_seed(batch)) for batch in BATCHES}
    with torch.no_grad():
        for batch, x in wide.items():
            found["eval"][batch] = gap(program.eval()(x), model.eval()(x))
        for batch, x in wide.items():
            found["train"][batch] = train_gap(model, program, x)
    found["backward"] = backward(program, wide[2])
    return found


def shares(program: exitify.Program) -> list[float]:
    reach = program.plan.macs_at([point.name for point in program.plan.exits])
    return [reach[point.name] / program.plan.full_macs for point in program.plan.exits]


def crossing(program: exitify.Program, after: str) -> tuple[str, ...]:
    """The values that leave the segments run when the network stops there."""
    stretches = program.plan.stretches([point.name for point in program.plan.exits])
    place = next(i for i, point in enumerate(program.plan.exits) if point.after == after)
    made = {value for stretch in stretches[: place + 1] for value in stretch.outputs} | {program.plan.input}
    read = {value for stretch in stretches[place + 1 :] for value in stretch.inputs}
    return tuple(sorted(made & read))


def gap(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def train_gap(model: torch.nn.Module, program: exitify.Program, x: torch.Tensor) -> float | str:
    answers: list[Any] = []
    for module in (copy.deepcopy(model).train(), copy.deepcopy(program).train()):
        torch.manual_seed(0)
        try:
            answers.append(module(x) if not answers else module(x, all_exits=False))
        except ValueError as error:
            answers.append(str(error))
    if isinstance(answers[0], str):
        return f"both refuse: {answers[0]}" if answers[0] == answers[1] else f"only the model refuses: {answers[0]}"
    return gap(answers[1], answers[0]) if isinstance(answers[1], torch.Tensor) else f"only the program refuses: {answers[1]}"


def backward(program: exitify.Program, x: torch.Tensor) -> bool:
    """Whether a loss over all exits reaches every head, and the network's first weights, with finite gradients."""
    program.train()
    outputs = program(x)
    loss = sum((logits.float() ** 2).mean() for logits in outputs.logits)
    loss.backward()  # type: ignore[union-attr]
    gradients = {name: parameter.grad for name, parameter in program.named_parameters() if parameter.requires_grad}
    reached = [name for name, gradient in gradients.items() if gradient is not None]
    heads = {name for name in gradients if name.startswith("exit_heads.")}
    finite = all(bool(torch.isfinite(gradients[name]).all()) for name in reached)  # type: ignore[arg-type]
    return finite and heads <= set(reached) and len(reached) > 0.9 * len(gradients)


def holds(found: dict[str, Any]) -> bool:
    """Whether the program is the network, and exits reach into it."""
    if "error" in found:
        return False
    gaps = [value for kind in ("eval", "train") for value in found[kind].values()]
    same = all(value.startswith("both refuse") if isinstance(value, str) else value <= TOLERANCE for value in gaps)
    return same and found["keys"] and found["backward"] and found["largest"] < 0.5 and len(found["exits"]) == EXITS


def table(results: list[dict[str, Any]]) -> str:
    """The documentation's page."""
    lines = []
    for zoo in ("torchvision", "timm"):
        own = [found for found in results if found["model"].startswith(f"{zoo}:")]
        lines += [f"## {zoo}: {sum(map(holds, own))} of {len(own)}", ""]
        lines += ["| model | nodes | places | largest node | three exits after (of the cost) | tensors crossing | eval | train | s |"]
        lines += ["|---|---:|---:|---:|---|---|---:|---:|---:|"]
        for found in own:
            short = found["model"].removeprefix(f"{zoo}:")
            if "error" in found:
                lines.append(f"| **{short}** | | | | refused: {found['error']} | | | | |")
                continue
            shown = short if holds(found) else f"**{short}**"
            cells = [
                shown,
                found["nodes"],
                found["places"],
                f"{found['largest']:.1%}",
                ", ".join(found["exits"]),
                ", ".join(map(str, found["crossing"])),
            ]
            cells += [worst(found["eval"]), worst(found["train"]), f"{found['seconds']:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


def worst(gaps: dict[Any, Any]) -> str:
    numbers = [value for value in gaps.values() if not isinstance(value, str)]
    texts = {value for value in gaps.values() if isinstance(value, str) and not value.startswith("both refuse")}
    return ", ".join([f"{max(numbers):.0e}" if numbers and max(numbers) else "0" if numbers else "", *texts]).strip(", ")


INTRODUCTION = """# The zoos

Every classifier of torchvision, and of each of timm's families the model with the fewest parameters, random weights,
each given three exits: `python -m benchmarks.zoo --log zoo.jsonl --output docs/zoo.md`. *Nodes* are those of the traced
graph, *places* the values an exit may stand after (without the two asked-for ends of the network), *largest node* the
share of the multiply-adds in the largest piece that stays whole. *Tensors crossing* is how many values each cut hands on. *Eval*
and *train* are the largest difference between the program's full path and the network at batch 1, 2 and 3, relative
to the largest logit, in train() from one seed (batch 1 where the network itself takes it). A bold name does not hold.
*s* is what `exitify.transform` took on one of two shared cores.

"""


def in_process(name: str, threads: str) -> dict[str, Any]:
    """`judge` in a process of its own, which may die."""
    command = [sys.executable, "-m", "benchmarks.zoo", "--one", name]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": threads})
    last = (run.stdout.strip().splitlines() or [""])[-1]
    failed = (run.stderr.strip().splitlines() or [f"ended with {run.returncode}"])[-1]
    return json.loads(last) if last.startswith("{") else {"model": name, "error": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="networks at a time")
    parser.add_argument("--only", nargs="*", help="names to run, again if they were")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        try:
            print(json.dumps(judge(options.one)))
        except ExitifyError as error:
            print(json.dumps({"model": options.one, "error": error.problem}))
        return
    define_missing_operators()
    results = {found["model"]: found for found in map(json.loads, options.log.read_text().splitlines())} if options.log.exists() else {}
    wanted = options.only or names()
    with ThreadPoolExecutor(options.jobs) as pool:
        threads = str(max(1, (os.cpu_count() or 1) // options.jobs))
        pending = [pool.submit(in_process, name, threads) for name in wanted if name not in results or options.only]
        for done in as_completed(pending):
            found = done.result()
            results[found["model"]] = found
            with options.log.open("a") as log:
                log.write(json.dumps(found) + "\n")
            print("ok  " if holds(found) else "FAIL", json.dumps(found), flush=True)
    if options.output:
        options.output.write_text(INTRODUCTION + table([results[name] for name in wanted]))


if __name__ == "__main__":
    main()
