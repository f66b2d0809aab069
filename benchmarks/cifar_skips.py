"""Skip paths on CIFAR-10, trained from scratch: is the network worse for being able to skip, and what brings what?

    python -m benchmarks.cifar_skips train --work DIR [--only skips --seeds 0]
    python -m benchmarks.cifar_skips train --work DIR --device cuda --depth 56 --epochs 100 --every 10 --only alone,base-alone,skips
    python -m benchmarks.cifar_skips report --work DIR [--depth 56 --plot curves.png]

Every network has the same data, epochs, optimizer, schedule and seeds. `train` goes on where it was interrupted, at the last
checkpoint; on a GPU all networks are trained beside each other, each step a CUDA graph, on a CPU one after the other (several
processes may run with other `--only` or `--seeds`). `report` prints accuracies on the test images and their differences from
the networks that were trained alone, paired over seeds and images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
from exitify.program import SKIP_NORMS

BATCH, PEAK, WEIGHT_DECAY = 128, 0.1, 5e-4
MEAN, STD = np.array((0.485, 0.456, 0.406), np.float32), np.array((0.229, 0.224, 0.225), np.float32)
EAGER_STEPS = 3
"""Steps before a CUDA graph is captured: cuDNN has chosen its kernels then, and the optimizer has its buffers."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    blocks: A stage of n blocks has this many of them; None is a network with skip paths.
    switch: Whether norms switch. distil, features: See `SkipAwareDistillation`.
    start: The share of the epochs after which the network begins to learn to leave blocks out; until then it is trained whole.
    """

    blocks: str | None = None
    switch: bool = True
    distil: bool = True
    features: str = "pooled"
    start: float = 0.0


RECIPES = {
    "alone": Recipe(blocks="all"),
    "base-alone": Recipe(blocks="mandatory"),
    "skips": Recipe(),
    "implicit": Recipe(features="none"),
    "late": Recipe(start=0.5),
    "no-distillation": Recipe(distil=False),
    "no-switch": Recipe(switch=False),
    "neither": Recipe(distil=False, switch=False),
}
"""The paper's table 4, the two networks that it is held against, and one that is trained first and adapted then."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "report"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--every", type=int, default=1, help="epochs between two checkpoints, each with a line in the log")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.what == "report":
        report(options.work, options.depth)
        if options.plot:
            draw(options.work, options.depth, options.plot)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    runs = [(name, int(seed)) for seed in options.seeds.split(",") for name in options.only.split(",")]
    runs = [run for run in runs if not result_of(options.work, options.depth, *run).exists()]
    train(runs, options.depth, options.epochs, options.every, options.device, load(options.device), options.work)


def load(device: str) -> dict[str, torch.Tensor]:
    """Pictures `(N, 32, 32, 3)`, uint8, and labels of CIFAR-10, and the mean and deviation that pictures are normalised by."""
    with np.load(Path(os.environ.get("EXITIFY_DATA", "../shared/data")) / "cifar10.npz") as archive:
        found = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    found = {name: values.astype(np.int64) if name[0] == "y" else values for name, values in found.items()}
    return {name: torch.from_numpy(values).to(device) for name, values in (found | {"mean": MEAN, "std": STD}).items()}


def result_of(work: Path, depth: int, name: str, seed: int) -> Path:
    """Where a trained network's logits of the test images stand."""
    return work / f"resnet{depth}-{name}-{seed}.npz"


def build(recipe: Recipe, depth: int) -> nn.Module:
    """The network with fresh weights."""
    blocks = (depth - 2) // 6
    if recipe.blocks is not None:
        return CifarResNet(blocks if recipe.blocks == "all" else (blocks + 1) // 2)
    program = exitify.capture(CifarResNet(blocks), torch.zeros(1, 3, 32, 32))
    for step in (ChooseSkips(), ChooseExits(exits="none"), *([SwitchNorms()] if recipe.switch else [])):
        program = step(program)
    return program


def train(runs: Sequence[tuple[str, int]], depth: int, epochs: int, every: int, device: str, data: dict[str, torch.Tensor], work: Path) -> None:
    """Train these networks, by recipe and seed, from where they are to the last epoch, and write down what they say of the test images."""
    torch.backends.cudnn.benchmark = True
    for group in [runs] if device == "cuda" else [[run] for run in runs]:
        networks = [Training(name, seed, depth, epochs, device, data, work) for name, seed in group]
        for epoch in range(min((network.epoch for network in networks), default=epochs), epochs):
            started, going = time.perf_counter(), [network for network in networks if network.epoch == epoch]
            for network in going:
                network.shuffle()
            for _ in range(going[0].batches):
                for network in going:
                    network.step()
            for network in going:
                network.epoch += 1
                if network.epoch % every == 0 or network.epoch == epochs:
                    network.checkpoint(time.perf_counter() - started)
        for network in networks:
            with written_whole(result_of(work, depth, network.name, network.seed)) as stream:
                np.savez_compressed(stream, y=data["y_test"].cpu(), **network.judge(every=True))  # type: ignore[arg-type]


class Training:
    """A network in training; goes on from its last checkpoint.

    epoch: The next one. batches: Steps in an epoch.
    """

    def __init__(self, name: str, seed: int, depth: int, epochs: int, device: str, data: dict[str, torch.Tensor], work: Path) -> None:
        self.name, self.seed, self.device, self.data, self.epoch = name, seed, device, data, 0
        self.path, self.log = work / f"resnet{depth}-{name}-{seed}.pt", work / f"resnet{depth}.log"
        self.batches = len(data["y_train"]) // BATCH
        self.stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.steps = 0
        self.recipe, self.start = RECIPES[name], round(RECIPES[name].start * epochs)
        torch.manual_seed(seed)
        self.model = build(self.recipe, depth).to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self.method: exitify.SkipAwareDistillation | None = None
        weights = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in self.model.parameters() if parameter.ndim <= 1]
        groups = [{"params": weights, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        self.rate, self.rates = torch.zeros((), device=device), learning_rates(epochs * self.batches).to(device)
        self.optimizer = torch.optim.SGD(groups, self.rate, momentum=0.9, nesterov=True, fused=True)
        for parameter in self.model.parameters():  # else fused SGD fails where a parameter gets its first gradient later than others
            self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.pictures = torch.zeros(self.batches, BATCH, *data["x_train"].shape[1:], dtype=torch.uint8, device=device)
        self.labels = torch.zeros(self.batches, BATCH, dtype=torch.long, device=device)
        self.batch, self.total = torch.zeros(1, dtype=torch.long, device=device), torch.zeros((), device=device)
        self.done = torch.zeros(1, dtype=torch.long, device=device)
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location=device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
            self.epoch = state["epoch"]
        if self.epoch > self.start:
            self.leave_out()

    def leave_out(self) -> None:
        """From here on the network learns to leave its skip paths out."""
        self.graph, self.steps = None, 0
        if self.recipe.blocks is None:
            self.method = exitify.SkipAwareDistillation(
                self.model, distil=self.recipe.distil, features=self.recipe.features, criterion=_cross_entropy  # type: ignore[arg-type]
            )  # fmt: skip

    def shuffle(self) -> None:
        """Lay out the next epoch's batches, augmented."""
        generator = np.random.default_rng((self.seed, self.epoch))
        with self._on_stream():
            order = torch.from_numpy(generator.permutation(len(self.data["y_train"]))[: self.batches * BATCH]).to(self.device)
            self.pictures.copy_(moved(self.data["x_train"][order], generator).view_as(self.pictures))
            self.labels.copy_(self.data["y_train"][order].view_as(self.labels))
            self.batch.zero_()
            self.total.zero_()
            self.done.fill_(self.epoch * self.batches)
            if self.epoch == self.start:
                if self.start and isinstance(self.model, exitify.Program):
                    copy_norms(self.model)
                    exitify.reestimate_norms(self.model, (self._to_inputs(batch) for batch in self.pictures[:40]))
                self.leave_out()

    def step(self) -> None:
        """One batch: the next of this epoch."""
        if self.graph is not None:
            with self._on_stream():
                self.graph.replay()
        elif self.stream is not None and self.steps >= EAGER_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self._step()
            self.step()
        else:
            with self._on_stream():
                self._step()
        self.steps += 1

    def _step(self) -> None:
        # Which batch it is and the learning rate are read from tensors: a captured step is then the same for all batches.
        x = self._to_inputs(self.pictures.index_select(0, self.batch)[0])
        y = self.labels.index_select(0, self.batch)[0]
        self.rate.copy_(self.rates.index_select(0, self.done)[0])
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.stream is not None):
            loss = self.method(x, y) if self.method else _cross_entropy(self._logits(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.total += loss.detach()
        self.batch += 1
        self.done += 1

    def checkpoint(self, seconds: float) -> None:
        """Write the state, and a line into the log. seconds: What the epoch took, all networks together."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": self.epoch}
        judged = self.judge(every=False)  # waits for what is still running
        with written_whole(self.path) as stream:
            torch.save(state, stream)
        labels = self.data["y_test"].cpu().numpy()
        right = {mask: float((logits.argmax(1) == labels).mean()) for mask, logits in judged.items()}
        line = {"network": self.name, "seed": self.seed, "epoch": self.epoch, "loss": float(self.total) / self.batches}
        text = json.dumps({**line, "right": right, "seconds": seconds})
        with open(self.log, "a") as log:
            log.write(text + "\n")
        print(text, flush=True)

    def judge(self, *, every: bool) -> dict[str, NDArray[np.float32]]:
        """Logits of the test images by mask: of all masks, or of the whole network and the one with every path left out."""
        model, test = self.model, self.data["x_test"]
        paths = len(model.plan.skips) if isinstance(model, exitify.Program) else 0
        masks = list(itertools.product((False, True), repeat=paths)) if every or not paths else [(False,) * paths, (True,) * paths]
        model.eval()
        found: dict[str, list[NDArray[np.float32]]] = {mask_text(mask): [] for mask in masks}
        with torch.inference_mode(), self._on_stream():
            for start in range(0, len(test), 500):
                x = self._to_inputs(test[start : start + 500])
                for mask in masks:
                    found[mask_text(mask)].append((model(x, skip=mask) if paths else model(x)).float().cpu().numpy())
        model.train()
        return {mask or "network": np.concatenate(parts) for mask, parts in found.items()}

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        outputs = self.model(x)
        return outputs.final if isinstance(self.model, exitify.Program) else outputs

    def _to_inputs(self, pictures: torch.Tensor) -> torch.Tensor:
        """Normalised `(N, 3, 32, 32)` from bytes `(N, 32, 32, 3)`, channels last in memory."""
        return ((pictures.float() / 255 - self.data["mean"]) / self.data["std"]).permute(0, 3, 1, 2)

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()


def copy_norms(program: exitify.Program) -> None:
    """Let the second sets of norms be what the first are now, as they are when a trained network is transformed."""
    state = program.state_dict()
    second = {name: state[name.removeprefix(f"{SKIP_NORMS}.")] for name in state if name.startswith(f"{SKIP_NORMS}.")}
    program.load_state_dict(second, strict=False)


def learning_rates(steps: int) -> torch.Tensor:
    """The rate of each step: up to `PEAK` over a tenth of them, then down, both as half a cosine."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return torch.tensor(rates)


def _cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float(), y)


def moved(pictures: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Bytes `(N, 32, 32, 3)` shifted by up to four pixels, and half of them mirrored: `exitify.train.augment` on any device."""
    count, side = pictures.shape[:2]
    top, left, mirrored = (torch.from_numpy(generator.integers(0, most, count)).to(pictures.device)[:, None] for most in (9, 9, 2))
    steps = torch.arange(side, device=pictures.device)
    rows, columns = top + steps, left + torch.where(mirrored == 1, side - 1 - steps, steps)
    padded = functional.pad(pictures, (0, 0, 4, 4, 4, 4))
    return padded[torch.arange(count, device=pictures.device)[:, None, None], rows[:, :, None], columns[:, None, :]]


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


def draw(work: Path, depth: int, target: Path) -> None:
    """Accuracy by epoch, from the log: the mean over seeds, of the whole networks and of those without what can be left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
    for text in (work / f"resnet{depth}.log").read_text().splitlines():
        line = json.loads(text)
        for mask, right in line["right"].items():
            curves.setdefault((line["network"], mask), {}).setdefault(line["epoch"], {})[line["seed"]] = 100 * right
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for (name, mask), by_epoch in curves.items():
        panel = panels[int(name == "base-alone" or mask[0] == "1")]
        epochs = sorted(by_epoch)
        panel.plot(epochs, [np.mean(list(by_epoch[epoch].values())) for epoch in epochs], label=name)
    for panel, title in zip(panels, ("the whole network", "every skip path left out")):
        panel.set(title=title, xlabel="epoch", ylim=(70, None))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("accuracy on test images, %")
    figure.tight_layout()
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()
