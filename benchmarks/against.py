"""Networks with exits against the same untransformed, in several engines, several times: repeated runs agree within the noise that they state.

    python -m benchmarks.against r56.exitify --log against.jsonl --output against.md      # over an hour; goes on where it was stopped
    python -m benchmarks.against r56.exitify --only resnet56 --samples 100 --rounds 2

`resnet56`: the artifact given, with its default profile if it has one, on CIFAR-10's test images. `resnet50`: torchvision's with random weights and
three exits of which no profile takes any, so the full path with nothing gained: what exits cost a network that does not use them. On noise, and its
accuracy says nothing. Each repeat is a run of `exitify.bench` of its own, written to the log when it ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import exitify
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import InputContract
from exitify.benchmark import BenchReport, Timing
from exitify.benchmark.noise import agree
from exitify.benchmark.report import percent, versions_text
from exitify.cli.use import original_module
from exitify.cli.verbosity import progress_bar
from exitify.data import Samples, load_samples
from exitify.records import from_json, to_json

AGAINST = ("onnxruntime", "torch", "inductor")
RANDOM = "resnet50"
"""The network whose weights are random."""

Subject = tuple[Artifact, Samples, Any]
"""An artifact, what it answers, and the original module."""


def resnet56(path: Path) -> Subject:
    artifact = Artifact.open(path)
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz"
    samples = load_samples(f"{data}#test", artifact.manifest.input, classes=artifact.plan.classes)
    return artifact, samples, original_module(artifact, "examples.cifar_resnet56.model:resnet56", trust=False)


def resnet50(most: int) -> Subject:
    import torch

    from exitify.models import load_model

    torch.manual_seed(0)
    loaded = load_model("benchmarks.networks:ResNet50", input_shape=(3, 224, 224))
    program = exitify.transform(loaded.module, loaded.example, exits=3, source=loaded.source)
    artifact = exitify.export(program, contract=loaded.contract, heads_trained=False)
    return artifact, noise_samples(loaded.contract, artifact.plan.classes, most), loaded.module


def noise_samples(contract: InputContract, classes: int, count: int) -> Samples:
    """Ready inputs and labels that mean nothing."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        x = rng.standard_normal((count, *contract.shape), np.float32)
        np.savez(Path(folder) / "noise.npz", x=x, y=rng.integers(classes, size=count))
        return load_samples(f"{folder}/noise.npz", contract, classes=classes)


def read_log(path: Path, options: dict[str, Any]) -> dict[tuple[str, int], BenchReport]:
    """The repeats that are done, by network and number.

    Raises:
        SystemExit: they were made with other options.
    """
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if record["options"] != options:
            raise SystemExit(f"{path} holds repeats with {record['options']}, and these are to be with {options}: give another --log")
        found[record["network"], record["repeat"]] = from_json(BenchReport, record["report"], str(path))
    return found


def markdown(networks: Sequence[str], reports: dict[tuple[str, int], BenchReport]) -> str:
    """One table of all networks and contenders, over their repeats; networks without a repeat are left out."""
    lines = [
        "| network | | engine | accuracy | mean ms | ratio | noise stated | repeats that agree | RSS MiB |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    notes = []
    for network in networks:
        repeats = [report for (name, _), report in sorted(reports.items()) if name == network]
        for rows in zip(*(report.timings for report in repeats)):
            lines.append(f"| {' | '.join([network, *row_cells(rows, is_random=network == RANDOM)])} |")
        if repeats:
            first = repeats[0]
            profile = f"profile {first.profile}" if first.profile else "no profile, so the full path"
            threads = f"{first.threads} thread{'s' * (first.threads > 1)}"
            notes.append(
                f"{network}: {len(repeats)} repeats of {first.samples} samples in each of {first.rounds} rounds, batch 1, {threads}, "
                f"{first.precision}, {first.conditions}; {profile}. {versions_text(first)}."
            )
    notes += [
        "Times and ratios: the median over repeats, and the lowest and highest. Ratios are to the untransformed network in the engine that runs the "
        "artifact, `again` being its second copy. A later repeat agrees with an earlier one when its ratio is within the noise that the earlier one "
        "stated; the largest is shown.",
        f"{RANDOM} has random weights and answers noise: accuracy says nothing, and is left out.",
    ]
    return "\n".join([*lines, "", *itertools.chain.from_iterable((note, "") for note in notes)])


def row_cells(repeats: Sequence[Timing], *, is_random: bool) -> list[str]:
    """One contender over its repeats."""
    first = repeats[0]
    accuracy = "random weights" if is_random else percent(first.accuracy, 2)
    cells = [first.label, first.engine, accuracy, spread([timing.mean_ms for timing in repeats])]
    if first.role == "baseline":
        cells += ["1", "", ""]
    else:
        pairs = list(itertools.combinations(repeats, 2))
        agreeing = sum(agree(earlier.ratio, later.ratio, earlier.noise) for earlier, later in pairs)
        noise = max(timing.noise for timing in repeats)
        cells += [spread([timing.ratio for timing in repeats]), f"± {percent(noise)}", f"{agreeing} of {len(pairs)} pairs" if pairs else ""]
    resident = [timing.rss_mib for timing in repeats if timing.rss_mib is not None]
    return [*cells, f"{np.median(resident):.0f}" if resident else ""]


def spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="ResNet-56, as examples/cifar_resnet56 makes it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=500, help="of CIFAR-10, a round")
    parser.add_argument("--pictures", type=int, default=200, help="of noise, a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=("resnet56", "resnet50"))
    parser.add_argument("--log", type=Path, default=Path("against.jsonl"))
    parser.add_argument("--output", type=Path, help="where the table goes, too")
    options = parser.parse_args()
    makers: dict[str, Callable[[], Subject]] = {"resnet56": lambda: resnet56(options.artifact), "resnet50": lambda: resnet50(options.pictures)}
    networks = [name for name in makers if not options.only or name in options.only]
    given = {name: getattr(options, name) for name in ("rounds", "samples", "pictures", "threads")}
    given["model_id"] = Artifact.open(options.artifact).manifest.model_id
    reports = read_log(options.log, given)
    made: dict[str, Subject] = {}
    for repeat, network in itertools.product(range(options.repeats), networks):
        if (network, repeat) in reports:
            continue
        artifact, samples, model = made[network] if network in made else made.setdefault(network, makers[network]())
        most = options.samples if network == "resnet56" else options.pictures
        with progress_bar() as progress:
            report = exitify.bench(
                artifact, samples, against=AGAINST, model=model, most=most, rounds=options.rounds, threads=options.threads, progress=progress
            )
        reports[network, repeat] = report
        with options.log.open("a") as log:
            log.write(json.dumps({"network": network, "repeat": repeat, "options": given, "report": to_json(report)}) + "\n")
        print(f"{network}, repeat {repeat}: {report.artifact.ratio:.3f} ± {percent(report.artifact.noise)}", flush=True)
    table = markdown(networks, {key: report for key, report in reports.items() if key[1] < options.repeats})
    print(table, end="")
    if options.output:
        options.output.write_text(table)


if __name__ == "__main__":
    main()
