"""Exits searched with data against as many spaced by cost, and what the search answers on a network with few pictures.

    python -m benchmarks.placement cifar --work WORK      # a quarter of an hour on two cores; goes on where it was stopped
    python -m benchmarks.placement mobilenet

cifar: ResNet-56 in `$EXITIFY_DATA`. Probes are trained on its training pictures, exits chosen on half of the test pictures; as many are
placed evenly by cost. The heads of both are trained alike and long, thresholds found on that same half, and mean latency compared at equal
accuracy on the other half: the time of a run that ends at each exit is measured, both networks in turn, one thread, ONNX Runtime.

mobilenet: MobileNetV2 with ImageNet weights and 200 pictures, one of a class: every segment against torch, and the search's answer.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import exitify
from exitify.artifact.artifact import NO_PROFILE, Artifact
from exitify.artifact.manifest import ExitSetting, Profile, Promise
from exitify.calibration.calibrate import Outputs, excess_error, record_outputs, recorded_outputs
from exitify.calibration.segment_times import measure_segments, shares_of_time
from exitify.calibration.temperature import fit_temperature
from exitify.calibration.thresholds import NEVER, Recorded, judge, price_path
from exitify.data import Samples, load_samples
from exitify.models import load_model
from exitify.pipeline import place
from exitify.runtime.session import Session
from exitify.train.heads import train_heads

DROPS = (0.0025, 0.005, 0.0075, 0.01)
DATA = Path(os.environ.get("EXITIFY_DATA", "../shared/data"))


# --- ResNet-56 ------------------------------------------------------------------------------------------------------


def cifar(work: Path) -> None:
    from examples.cifar_resnet56.run import CLASSES, PREPROCESS, split_test_images

    work.mkdir(parents=True, exist_ok=True)
    weights = DATA / "weights" / "cifar10_resnet56_akamaster.safetensors"
    model = load_model(
        "examples.cifar_resnet56.model:resnet56", weights=weights, input_shape=(3, 32, 32), preprocess=PREPROCESS, classes=CLASSES.split(",")
    )
    captured = exitify.capture(model.module, model.example, source=model.source)
    train = load_samples(f"{DATA / 'cifar10.npz'}#train", model.contract, classes=10)
    chosen_by, judged = (load_samples(str(path), model.contract, classes=10) for path in split_test_images(DATA / "cifar10.npz", work))
    searched = work / "searched.exitify"
    if not searched.exists():
        started = time.perf_counter()
        found = exitify.place_by_data(
            captured, train, contract=model.contract, held_out=chosen_by, max_drop=0.005, work=work / "probes", progress=told
        )
        seconds = time.perf_counter() - started
        print(f"search: {seconds:.0f} s, {len(found.probes)} probes; expected {found.cost:.3f} of the time, bound {found.bound:.3f}")
        for probe in found.probes:
            worth = probe.worth
            print(
                f"  {probe.place:10} {probe.head.text:8} reached for {probe.share:.3f}, head {probe.head_share:.4f}, right {probe.accuracy:.3f}, "
                f"leave {worth.leaves:.3f}, saves {worth.saves:.4f}, costs {worth.costs:.4f}: {probe.verdict}"
            )
        found.artifact.save(searched)
    count = len(Artifact.open(searched).plan.exits)
    made = {}
    for name in ("searched", "spaced"):
        trained = work / f"{name}_trained.exitify"
        if not trained.exists():
            untrained = Artifact.open(searched)
            if name == "spaced":
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    untrained = exitify.export(place(captured, exits=count), contract=model.contract, heads_trained=False)
            train_heads(untrained, train, save_to=trained, work=work / f"{name}_train", progress=told)
        made[name] = Artifact.open(trained)
        print(f"{name}: " + ", ".join(f"{point.place} {point.head.text}" for point in made[name].plan.exits))
    compare(made, chosen_by, judged)


def told(stage: str, done: int, total: int) -> None:
    if done == 0:
        print(f"  {time.strftime('%H:%M:%S')} {stage}", file=sys.stderr, flush=True)


def compare(made: dict[str, Artifact], chosen_by: Samples, judged: Samples, resamples: int = 200) -> None:
    """Print mean latency at equal accuracy, and how sure that is: judged pictures drawn anew, the same for both."""
    latencies = measure(made)
    curves: dict[str, tuple[Recorded, list[Any]]] = {}
    for name, artifact in made.items():
        known = record_outputs(artifact, chosen_by, threads=2)
        temperatures = np.array([fit_temperature(logits, known.labels) for logits in known.logits])
        unseen = record_outputs(artifact, judged, threads=2)
        path = [
            np.full(len(artifact.plan.exits), NEVER),
            *price_path(priced(artifact, known, temperatures, latencies[name], excess_error(known, temperatures))),
        ]
        curves[name] = priced(artifact, unseen, temperatures, latencies[name], wrong(unseen)), path
        right = (unseen.logits.argmax(2) == unseen.labels).mean(1)
        print(f"{name}: heads right on {' '.join(f'{share:.3f}' for share in right)}; a run that ends at each takes "
              f"{' '.join(f'{ms:.3f}' for ms in latencies[name][0])} of the network's {latencies['whole_ms'][0][0]:.3f} ms")  # fmt: skip
    generator = np.random.default_rng(0)
    draws = [np.arange(len(judged)), *(generator.integers(0, len(judged), len(judged)) for _ in range(resamples))]
    ratios = np.array([[at(curves["searched"], drop, rows) / at(curves["spaced"], drop, rows) for drop in DROPS] for rows in draws])
    for i, drop in enumerate(DROPS):
        own = [at(curves[name], drop, draws[0]) for name in ("searched", "spaced")]
        told_apart = f"ratio {ratios[0, i]:.3f} ± {ratios[1:, i].std():.3f}"
        print(f"{drop * 100:.2f} points below: searched {own[0]:.3f}, spaced {own[1]:.3f} of the time, {told_apart}")
    print(f"mean ratio {ratios[0].mean():.3f} ± {ratios[1:].mean(1).std():.3f}")


def wrong(outputs: Outputs) -> np.ndarray:
    """Errors beyond the whole network's, as observed."""
    errors = (outputs.logits.argmax(axis=2) != outputs.labels).astype(float)
    return errors - errors[-1]


def priced(artifact: Artifact, outputs: Outputs, temperatures: np.ndarray, latency: Any, loss: np.ndarray) -> Recorded:
    recorded = recorded_outputs(outputs, temperatures, artifact.plan, "top1", loss)
    ends, heads = latency
    return replace(recorded, reach_cost=ends - np.append(np.cumsum(heads), heads.sum()), try_cost=heads)


def at(curve: tuple[Recorded, list[Any]], drop: float, rows: np.ndarray) -> float:
    """Mean latency where a network loses just so much, between the settings on both sides of that."""
    recorded, path = curve
    points = np.array([judge(recorded.select(rows), thresholds) for thresholds in path])
    losses, costs = np.maximum.accumulate(points[:, 0]), np.minimum.accumulate(points[:, 1])
    return float(np.interp(drop, losses, costs))


def measure(made: dict[str, Artifact], rounds: int = 400) -> dict[str, Any]:
    """Of each network: a run that ends at each exit, all heads before it tried, and each head; as shares of the network without exits."""
    x = np.random.default_rng(0).standard_normal((1, 3, 32, 32)).astype(np.float32)
    calls = {}
    for name, artifact in made.items():
        for k, _ in enumerate([*artifact.plan.exits, None]):
            settings = {point.name: ExitSetting(True, -1.0 if i == k else 2.0, 1.0) for i, point in enumerate(artifact.plan.exits)}
            promise = Promise("max-drop", 0.0, 0.0, True, 0, 0.0, 0.0, 0.0, 0.0, 0.0, "")
            profile = Profile(artifact.manifest.model_id, "top1", settings, 1.0, "0" * len(artifact.plan.skips), promise, "", "")
            calls[name, k] = Session(artifact.with_profile("timed", profile), engine="onnxruntime", profile="timed", threads=1)
    calls["whole", 0] = Session(made["spaced"], engine="onnxruntime", profile=NO_PROFILE, threads=1)
    readings: dict[Any, list[float]] = {key: [] for key in calls}
    for i in range(rounds + 20):
        for key, session in calls.items():
            started = time.perf_counter()
            session.run(x)
            if i >= 20:
                readings[key].append(time.perf_counter() - started)
    medians = {key: float(np.median(found)) for key, found in readings.items()}
    whole = medians["whole", 0]
    found: dict[str, Any] = {"whole_ms": (np.array([whole * 1000]), None)}
    for name, artifact in made.items():
        heads = shares_of_time(artifact.plan, measure_segments(artifact, engine="onnxruntime", threads=1), ())[1]
        found[name] = np.array([medians[name, k] / whole for k in range(len(artifact.plan.exits) + 1)]), heads
    return found


# --- MobileNetV2 ----------------------------------------------------------------------------------------------------


def mobilenetv2() -> torch.nn.Module:
    """As its weights want it: padded as TensorFlow does."""
    import timm

    network: torch.nn.Module = timm.create_model("mobilenetv2_100", pad_type="same")
    return network


def mobilenet() -> None:
    from benchmarks.zoo import define_missing_operators

    define_missing_operators()
    weights = DATA / "weights" / "imagenet_mobilenetv2_100_224_coral.safetensors"
    model = load_model("benchmarks.placement:mobilenetv2", weights=weights, input_shape=(3, 224, 224), preprocess="mean=0.5;std=0.5")
    pictures = imagenet(model.contract)
    captured = exitify.capture(model.module, model.example, source=model.source)
    program = place(captured, exits=3)
    artifact = exitify.export(program, contract=model.contract, heads_trained=False)
    worst, same = fidelity(program, artifact, pictures)
    print("largest difference of each segment's outputs from torch, relative to their largest value, on 200 pictures:")
    for name, gap in worst.items():
        print(f"  {name:14} {gap:.1e}")
    print(f"the same class as torch on {same:.1%}; labels right on {accuracy(artifact, pictures):.1%}")
    order = np.random.default_rng(0).permutation(len(pictures))
    some, others = pictures.subset(order[:120]), pictures.subset(order[120:])
    for unit in ("ms", "macs"):
        found = exitify.place_by_data(captured, some, contract=model.contract, held_out=others, max_drop=0.005, unit=unit, progress=told)  # type: ignore[arg-type]
        exits = ", ".join(f"{point.place} {point.head.text}" for point in found.program.plan.exits)
        print(f"by {unit}: {exits or 'none'}; {found.reason or f'{found.cost:.3f} of the cost'}. {found.warning}")


def imagenet(contract: Any) -> Samples:
    """The 200 pictures under their class numbers, which the folder of classes does not tell by itself."""
    from exitify.pictures import picture_pixels

    lines = [line.split("\t") for line in (DATA / "imagenet_sample" / "classes.tsv").read_text().splitlines()[1:]]
    names = {wnid: int(index) for index, wnid, *_ in lines}
    paths = sorted((DATA / "imagenet_sample").glob("*/*.jpg"))
    pixels = np.stack([picture_pixels(path, contract) for path in paths])
    target = Path(os.environ.get("TMPDIR", "/tmp")) / "exitify_imagenet_sample.npz"
    np.savez(target, x=pixels, y=np.array([names[path.parent.name] for path in paths]))
    return load_samples(str(target), contract, classes=1000)


def fidelity(program: exitify.Program, artifact: Artifact, pictures: Samples) -> tuple[dict[str, float], float]:
    """Each segment alone, on what torch's segments before it give, against torch's."""
    from exitify.runtime.engines import make_engine
    from tests.helpers import run_segments

    engine = make_engine("onnxruntime", artifact, 2)
    stretches = {segment.name: exitify.plan.Stretch((segment.name,), segment.inputs, segment.outputs, segment.parameters, "", segment.cost)
                 for segment in artifact.plan.segments}  # fmt: skip
    runs = {name: engine.prepare(stretch) for name, stretch in stretches.items()}
    parameters = {name: np.ascontiguousarray(array) for name, array in artifact.classifiers().items()}
    parameters |= {point.temperature: np.array(1.0, np.float32) for point in artifact.plan.exits}
    worst, agree = dict.fromkeys(runs, 0.0), []
    for x, _ in pictures.batches(20):
        values = {name: value.numpy() for name, value in run_segments(program, torch.from_numpy(x)).items()}
        for name, run in runs.items():
            stretch = stretches[name]
            got = run({value: values[value] for value in stretch.inputs} | {key: parameters[key] for key in stretch.parameters})
            for value in stretch.outputs:
                gap = np.abs(got[value] - values[value]).max() / max(np.abs(values[value]).max(), 1e-9)
                worst[name] = max(worst[name], float(gap))
        session = Session(artifact, engine="onnxruntime", profile=NO_PROFILE, threads=2)
        agree.append(session.record(x).logits["final"].argmax(1) == values[program.plan.output].argmax(1))
    return worst, float(np.concatenate(agree).mean())


def accuracy(artifact: Artifact, pictures: Samples) -> float:
    outputs = record_outputs(artifact, pictures, threads=2)
    return float((outputs.full.argmax(1) == outputs.labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cifar", "mobilenet"])
    parser.add_argument("--work", type=Path, default=Path("placement"))
    options = parser.parse_args()
    cifar(options.work) if options.what == "cifar" else mobilenet()


if __name__ == "__main__":
    main()
