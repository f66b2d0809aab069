"""Skip paths on CIFAR-10, trained from scratch: is the network worse for being able to skip, and what brings what?

    python -m benchmarks.cifar_skips train --work DIR [--only skips --seeds 0] [--device cuda --depth 56 --epochs 100]
    python -m benchmarks.cifar_skips report --work DIR

Every network has the same data, epochs, optimizer, schedule and seeds. `train` goes on where it was interrupted, an epoch
at a time; several may run beside each other with other `--only` or `--seeds`. `report` prints accuracies on the test images
and their differences from the networks that were trained alone, paired over seeds and images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

import exitify
from examples.cifar_resnet56.model import CifarResNet
from exitify.files import written_whole
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.choose_skips import ChooseSkips
from exitify.passes.switch_norms import SwitchNorms
from exitify.plan import mask_text
from exitify.train.augment import augment

BATCH, PEAK, WEIGHT_DECAY = 128, 0.1, 5e-4
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    blocks: A stage of n blocks has this many of them; None is a network with skip paths.
    switch: Whether norms switch. distil, features: See `SkipAwareDistillation`.
    """

    blocks: str | None = None
    switch: bool = True
    distil: bool = True
    features: str = "pooled"


RECIPES = {
    "alone": Recipe(blocks="all"),
    "base-alone": Recipe(blocks="mandatory"),
    "skips": Recipe(),
    "implicit": Recipe(features="none"),
    "no-distillation": Recipe(distil=False),
    "no-switch": Recipe(switch=False),
    "neither": Recipe(distil=False, switch=False),
}
"""The paper's table 4, and the two networks that it is held against."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "report"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.what == "report":
        report(options.work, options.depth)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    with np.load(Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz") as archive:
        data = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    for seed, name in itertools.product(options.seeds.split(","), options.only.split(",")):
        train(name, int(seed), options.epochs, options.depth, options.device, data, options.work)


def build(recipe: Recipe, depth: int) -> nn.Module:
    """The network with fresh weights."""
    blocks = (depth - 2) // 6
    if recipe.blocks is not None:
        return CifarResNet(blocks if recipe.blocks == "all" else (blocks + 1) // 2)
    program = exitify.capture(CifarResNet(blocks), torch.zeros(1, 3, 32, 32))
    for step in (ChooseSkips(), ChooseExits(exits="none"), *([SwitchNorms()] if recipe.switch else [])):
        program = step(program)
    return program


def train(name: str, seed: int, epochs: int, depth: int, device: str, data: dict[str, NDArray[Any]], work: Path) -> None:
    """Train one network, from where it is to the last epoch, and write down what it says of the test images."""
    path, result = (work / f"resnet{depth}-{name}-{seed}.{kind}" for kind in ("pt", "npz"))
    if result.exists():
        return
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model = build(recipe, depth).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    method = None if recipe.blocks else exitify.SkipAwareDistillation(
        model, distil=recipe.distil, features=recipe.features, criterion=lambda logits, y: functional.cross_entropy(logits.float(), y)  # type: ignore[arg-type]
    )  # fmt: skip
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, PEAK, momentum=0.9, nesterov=True)
    batches = len(data["y_train"]) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=epochs * batches + 1, pct_start=0.1, cycle_momentum=False)
    first = 0
    if path.exists():
        state = torch.load(path, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    for epoch in range(first, epochs):
        started, total = time.perf_counter(), 0.0
        generator = np.random.default_rng((seed, epoch))
        order = generator.permutation(len(data["y_train"]))
        for batch in np.split(order[: batches * BATCH], batches):
            x = to_inputs(augment(data["x_train"][batch], "crop+flip", generator), device)
            y = torch.from_numpy(data["y_train"][batch]).long().to(device)
            with torch.autocast(device, torch.bfloat16):
                loss = method(x, y) if method else functional.cross_entropy(model(x).float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "epoch": epoch + 1}
        with written_whole(path) as stream:
            torch.save(state, stream)
        right = {mask: float((logits.argmax(1) == data["y_test"]).mean()) for mask, logits in judge(model, data, device, every=False).items()}
        line = {"network": name, "seed": seed, "epoch": epoch, "loss": total / batches, "right": right, "seconds": time.perf_counter() - started}
        with open(work / f"resnet{depth}.log", "a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    with written_whole(result) as stream:
        np.savez(stream, y=data["y_test"], **judge(model, data, device, every=True))  # type: ignore[arg-type]


def judge(model: nn.Module, data: dict[str, NDArray[Any]], device: str, *, every: bool) -> dict[str, NDArray[np.float32]]:
    """Logits of the test images by mask: of all masks, or of the whole network and the one with every path left out."""
    paths = len(model.plan.skips) if isinstance(model, exitify.Program) else 0
    masks = list(itertools.product((False, True), repeat=paths)) if every or not paths else [(False,) * paths, (True,) * paths]
    model.eval()
    found: dict[str, list[NDArray[np.float32]]] = {mask_text(mask): [] for mask in masks}
    with torch.inference_mode():
        for start in range(0, len(data["y_test"]), 500):
            x = to_inputs(data["x_test"][start : start + 500], device)
            for mask in masks:
                found[mask_text(mask)].append((model(x, skip=mask) if paths else model(x)).float().cpu().numpy())
    model.train()
    return {mask or "network": np.concatenate(parts) for mask, parts in found.items()}


def to_inputs(pictures: NDArray[np.uint8], device: str) -> torch.Tensor:
    """Normalised `(N, 3, 32, 32)`, channels last in memory."""
    scaled = (pictures.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(scaled).permute(0, 3, 1, 2).to(device)


def report(work: Path, depth: int) -> None:
    """Print means over seeds, and differences from the networks trained alone with their standard errors."""
    right: dict[str, dict[int, dict[str, NDArray[np.bool_]]]] = {}
    for path in sorted(work.glob(f"resnet{depth}-*.npz")):
        name, _, seed = path.stem.removeprefix(f"resnet{depth}-").rpartition("-")
        with np.load(path) as archive:
            right.setdefault(name, {})[int(seed)] = {mask: archive[mask].argmax(1) == archive["y"] for mask in archive.files if mask != "y"}
    for name, seeds in right.items():
        print(f"{name} ({len(seeds)} seeds)")
        for mask in next(iter(seeds.values())):
            shares = [100 * float(found[mask].mean()) for found in seeds.values()]
            print(f"  {mask:8} {np.mean(shares):6.2f} % ({', '.join(f'{share:.2f}' for share in shares)})", end="")
            rival = {"0": "alone", "1": "base-alone"}.get(mask[0]) if len(set(mask)) == 1 else None
            if rival in right and name != rival:
                print(f"  against {rival}: {_difference(seeds, mask, right[rival])}", end="")
            print()


def _difference(ours: dict[int, dict[str, Any]], mask: str, theirs: dict[int, dict[str, Any]]) -> str:
    """Mean difference in points, with its standard error from images paired within each seed, and from seeds."""
    shared = sorted(ours.keys() & theirs.keys())
    per_image = np.array([ours[seed][mask].astype(float) - theirs[seed]["network"] for seed in shared])
    mean = 100 * per_image.mean()
    from_images = 100 * per_image.mean(axis=0).std(ddof=1) / np.sqrt(per_image.shape[1])
    text = f"{mean:+.2f} points, standard error {from_images:.2f} over images"
    if len(shared) > 1:
        text += f", {100 * per_image.mean(axis=1).std(ddof=1) / np.sqrt(len(shared)):.2f} over {len(shared)} seeds"
    return text


if __name__ == "__main__":
    main()
