"""How exits are trained and how they decide, compared on CIFAR-10 with ResNet-56: what an answer costs at half a point of accuracy.

    python -m benchmarks.cifar_methods train distillation --seed 0 --work DIR       # a row: heads alone, 3 minutes; resumable
    python -m benchmarks.cifar_methods train equilibrium --work DIR                 # end to end, 30 epochs, with a log; resumable
    python -m benchmarks.cifar_methods table --work DIR                             # all rows there are

All rows have the same six exits. Training reads the 30,000 training images. The 5,000 test images are halved 20 times: on one half
temperatures and thresholds are found, one an exit, as `calibrate --max-drop 0.005` does; the other half judges. Accuracy is
held against the network as it was before any training, and its multiply-adds are 1; heads on the way count.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import exitify
from examples.cifar_resnet56.run import CLASSES, PREPROCESS
from exitify.artifact.artifact import Artifact
from exitify.artifact.manifest import Policy
from exitify.calibration.calibrate import Outputs, record_outputs, settle_max_drop
from exitify.calibration.thresholds import NEVER, exits_taken
from exitify.data import load_samples
from exitify.models import LoadedModel, load_model
from exitify.train.end_to_end import TrainingOptions, train_network
from exitify.train.heads import HeadTraining

EXITS = "layer1.3:deep,layer1.7:deep,layer2.3:deep,layer2.7:deep,layer3.3:conv,layer3.6:conv"
"""Where a search by measured time put them (docs/placement.md)."""

SPLITS, MAX_DROP = 20, 0.005


@dataclass(frozen=True)
class Row:
    """A way to train exits.

    heads: How heads are trained alone; None for end to end. network: How all of it is trained.
    after: The row that it begins with. policies: What its exits decide by.
    """

    heads: HeadTraining | None = None
    network: TrainingOptions | None = None
    cascade: str = "none"
    head: str = ""
    after: str = ""
    policies: tuple[Policy, ...] = ("top1",)


ROWS = {
    "labels": Row(HeadTraining(distillation=0.0)),
    "distillation": Row(HeadTraining(), policies=("top1", "margin", "entropy", "renyi_entropy", "patience")),
    "isc-identity": Row(HeadTraining(), cascade="identity"),
    "isc-learned": Row(HeadTraining(), cascade="learned"),
    "isc-layer-norm": Row(HeadTraining(), cascade="layer_norm"),
    "boosted": Row(HeadTraining(), cascade="boosted"),
    "ensemble": Row(HeadTraining(), cascade="ensemble"),
    "jei": Row(HeadTraining(method="jei", cost_weight=0.5), policies=("top1", "gates", "jei")),
    "class-means": Row(HeadTraining(copies=1, method="class-means"), head="linear"),
    **{
        method: Row(
            network=TrainingOptions(method, 30, learning_rate=0.02, distillation=0.9, validation=0.02, precision="bf16"), after="distillation"
        )
        for method in ("joint", "equilibrium")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "table"])
    parser.add_argument("row", nargs="?", choices=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="of a row that is trained end to end")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data"))
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "train":
        train(options.row, options.seed, options.epochs, options.work, data)
    else:
        print(table(options.work, data))


def path_of(work: Path, row: str, seed: int) -> Path:
    return work / f"{row}-{seed}.exitify"


def train(name: str, seed: int, epochs: int | None, work: Path, data: Path) -> None:
    row, path = ROWS[name], path_of(work, name, seed)
    started = time.perf_counter()
    if row.heads is not None:
        artifact = fresh(row, seed, data)
        samples = load_samples(f"{data / 'cifar10.npz'}#train", artifact.manifest.input, classes=10)
        _, reports = exitify.train_heads(
            artifact, samples, replace(row.heads, seed=seed), save_to=path, work=work / "recorded", keep_recorded=True, progress=say
        )
        print(*(f"{report.exit} {report.accuracy:.4f} (epoch {report.epoch})" for report in reports), sep="\n")
    else:
        assert row.network is not None
        artifact = Artifact.open(path_of(work, row.after, seed))
        samples = load_samples(f"{data / 'cifar10.npz'}#train", artifact.manifest.input, classes=10)
        how = replace(row.network, seed=seed, epochs=epochs or row.network.epochs)
        train_network(
            artifact, samples, network(data).module, how, save_to=path, work=work / "networks", each_epoch=lambda report: print(report, flush=True)
        )
    print(f"{path}: {time.perf_counter() - started:.0f} s")


def network(data: Path) -> LoadedModel:
    weights = data / "weights" / "cifar10_resnet56_akamaster.safetensors"
    return load_model(
        "examples.cifar_resnet56.model:resnet56", weights=weights, input_shape=(3, 32, 32), preprocess=PREPROCESS, classes=CLASSES.split(",")
    )


def fresh(row: Row, seed: int, data: Path) -> Artifact:
    """The network with untrained heads."""
    loaded = network(data)
    exits = ",".join(place.split(":")[0] for place in EXITS.split(",")) if row.head else EXITS
    torch.manual_seed(seed)
    program = exitify.transform(loaded.module, loaded.example, exits=exits, head=row.head or "auto", cascade=row.cascade, source=loaded.source)
    return exitify.export(program, contract=loaded.contract, heads_trained=False)


def say(stage: str, done: int, total: int) -> None:
    if done == 0 or done == total:
        print(f"{stage} {done}/{total}", flush=True)


@dataclass
class Judged:
    """What 20 splits say of a row: one number a split and seed."""

    drop: list[float] = field(default_factory=list)
    macs: list[float] = field(default_factory=list)
    accuracy: list[NDArray[np.float64]] = field(default_factory=list)


def table(work: Path, data: Path) -> str:
    """One line a row and policy."""
    lines = [
        "| row | policy | seeds | multiply-adds at ≤ 0.5 points, heads counted | drop, points | its network alone, % right | exits alone, % right |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    before: NDArray[np.float32] | None = None
    for name, row in ROWS.items():
        paths = sorted(work.glob(f"{name}-[0-9].exitify"))
        by_policy = {policy: Judged() for policy in row.policies}
        for path in paths:
            artifact = Artifact.open(path)
            samples = load_samples(f"{data / 'cifar10.npz'}#test", artifact.manifest.input, classes=10)
            outputs = record_outputs(artifact, samples, threads=2)
            if before is None:  # the first rows train heads alone
                assert row.heads is not None
                before = outputs.logits[-1]
            for policy, judged in by_policy.items():
                judge(artifact, replace(outputs, whole=before), policy, judged)
        for policy, judged in by_policy.items():
            if judged.drop:
                drop, macs = np.array(judged.drop), np.array(judged.macs)
                error = drop.std(ddof=1) / np.sqrt(len(drop))
                spread = macs.std(ddof=1) / np.sqrt(len(macs))
                right = np.mean(judged.accuracy, axis=0) * 100
                lines.append(
                    f"| {name} | {policy} | {len(paths)} | {macs.mean():.3f} ± {spread:.3f} | {drop.mean() * 100:.2f} ± {error * 100:.2f} "
                    f"| {right[-1]:.2f} | {' '.join(f'{one:.1f}' for one in right[:-1])} |"
                )
    return "\n".join(lines)


def judge(artifact: Artifact, outputs: Outputs, policy: Policy, judged: Judged) -> None:
    """Find thresholds on one half, and judge them on the other, again and again."""
    plan = artifact.plan
    gates = tuple(artifact.manifest.gates.values()) if policy in ("gates", "jei") else ()
    predictions, count = outputs.logits.argmax(axis=2), len(outputs.labels)
    assert outputs.whole is not None
    right_before = outputs.whole.argmax(axis=1) == outputs.labels
    judged.accuracy.append((predictions == outputs.labels).mean(axis=1))
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(count)
        half, others = order[: count // 2], order[count // 2 :]
        settings = settle_max_drop(outputs.select(half), plan, MAX_DROP, policy=policy, gates=gates, seed=split)
        rest = outputs.select(others)
        taken = exits_taken(rest.confidence(settings.temperatures, policy, gates), settings.thresholds)
        macs = plan.macs_at([point.name for point, threshold in zip(plan.exits, settings.thresholds) if threshold < NEVER])
        cost = np.array([macs.get(exit_name, 0) for exit_name in plan.exit_names])[taken] / plan.full_macs
        right = predictions[taken, others] == outputs.labels[others]
        judged.drop.append(float(right_before[others].mean() - right.mean()))
        judged.macs.append(float(cost.mean()))


if __name__ == "__main__":
    main()
