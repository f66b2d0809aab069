"""Heads trained from the artifact alone: backbone at rest, features recorded once, all heads in one pass over them."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from exitify.artifact.artifact import HEADS_FILE, MASKS_FILE, Artifact, build_artifact
from exitify.artifact.memory import MEMORY_FILE
from exitify.artifact.tensors import write_tensors
from exitify.data import Samples
from exitify.errors import DataError, PlanError
from exitify.files import written_whole
from exitify.heads import ExitHead
from exitify.program import HEADS
from exitify.progress import Progress, silent
from exitify.records import dumps
from exitify.train.augment import Augmentation
from exitify.train.record import ROWS_A_CHUNK, FeatureFile, record


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained.

    epochs: Passes over the training rows; each reads one recorded copy, in turn.
    copies: How often each picture is augmented and recorded.
    augmentation: `none`, `crop`, `crop+flip`, or `auto`: crop, and flip where pictures are in colour.
    distillation: Weight of the divergence from the network's own answer, in [0, 1]; the rest is cross-entropy with the label.
    softening: Temperature of that divergence (Hinton et al. 2015, arXiv:1503.02531).
    learning_rate: Peak of a one-cycle schedule for SGD with Nesterov momentum, which goes from 0.95 to 0.85 and back.
    validation: Share of the samples set aside to choose each head's best epoch; they are recorded without augmentation.
    """

    epochs: int = 20
    copies: int = 4
    augmentation: str = "auto"
    distillation: float = 0.9
    softening: float = 3.0
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    batch: int = 250
    validation: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class HeadReport:
    """What training a head came to: accuracy on the validation samples, and the epoch kept."""

    exit: str
    accuracy: float
    epoch: int


def train_heads(
    artifact: Artifact,
    samples: Samples,
    options: HeadTraining | None = None,
    *,
    save_to: Path | None = None,
    work: Path | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[Artifact, list[HeadReport]]:
    """Return the artifact with trained heads, and how good each is.

    The backbone runs in ONNX Runtime from the artifact; nothing of it, statistics of its norms included, changes.
    Profiles are dropped, and what was measured of masks: they belong to the network with its former heads.

    Args:
        artifact: With exits.
        samples: Training pictures and labels.
        options: How to train.
        save_to: Where to save the trained artifact, before what was recorded for it is removed.
        work: Folder for recorded features and checkpoints, by default a folder `exitify-train` here. An interrupted training
            with the same data and options goes on from there, one with other epochs or rates uses what is recorded; at the
            end what it put there is removed.
        threads: CPU threads, by default all.
        progress: Called now and then.

    Raises:
        PlanError: the artifact has no exits. DataError: an unknown augmentation, too few samples, or the disk is full.
    """
    options = options or HeadTraining()
    if not artifact.plan.exits:
        raise PlanError("the artifact has no exits to train", "transform with `--exits auto` or a number")
    if options.augmentation not in ("auto", *get_args(Augmentation)):
        raise DataError(f"there is no augmentation {options.augmentation!r}", f"there are auto, {', '.join(get_args(Augmentation))}")
    threads = threads or torch.get_num_threads()
    train_rows, validation_rows = _split(samples, options)
    how: Any = options.augmentation
    if how == "auto":
        how = "crop+flip" if artifact.manifest.input.color == "RGB" else "crop"
    recorded = {"model": artifact.manifest.model_id, "data": samples.identity(), "how": how, "share": options.validation, "seed": options.seed}
    folder = (work or Path("exitify-train")) / _key(recorded)
    checkpoint = folder / f"checkpoint-{_key(options)}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    heads = load_heads(artifact)
    training = _Recorded(artifact, samples, heads, folder, threads, progress)
    files = []
    for copy_number in range(min(options.copies, options.epochs)):
        order = np.random.default_rng((options.seed, copy_number)).permutation(train_rows)
        files.append(training.file(f"train-{copy_number}", order, how, options.seed + 1 + copy_number))
    validation = training.file("validation", validation_rows, "none", 0)
    with _torch_threads(threads):
        best, reports = _fit(artifact, heads, files, validation, samples.labels, options, checkpoint, progress)
    tensors = {f"{HEADS}.{name}.{key}": tensor.numpy() for name, head in best.items() for key, tensor in head.state_dict().items()}
    kept = {
        path: data for path, data in artifact.files.items() if not path.startswith(("profiles/", "times/")) and path not in (MASKS_FILE, MEMORY_FILE)
    }
    manifest = replace(artifact.manifest, heads_trained=True, training_data=samples.identity())
    trained = build_artifact(manifest, {**kept, HEADS_FILE: write_tensors(tensors)})
    for name, times in artifact.times.items():  # how long a head takes does not depend on its numbers
        trained = trained.with_times(name, replace(times, model_id=trained.manifest.model_id))
    if save_to is not None:
        trained.save(save_to)
    shutil.rmtree(folder)
    if work is None and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
    return trained, reports


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_heads(artifact: Artifact) -> dict[str, ExitHead]:
    """The artifact's heads as torch modules, with its weights."""
    tensors = artifact.tensors(HEADS_FILE)
    heads = {}
    for point in artifact.plan.exits:
        head = ExitHead(point.head)
        prefix = f"{HEADS}.{point.name}."
        own = {key.removeprefix(prefix): torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items() if key.startswith(prefix)}
        head.load_state_dict(own)
        heads[point.name] = head
    return heads


@dataclass(frozen=True)
class _Recorded:
    """Makes feature files in a folder."""

    artifact: Artifact
    samples: Samples
    heads: dict[str, ExitHead]
    folder: Path
    threads: int
    progress: Progress

    def file(self, name: str, rows: NDArray[np.integer], how: Augmentation, seed: int) -> FeatureFile:
        points = self.artifact.plan.exits
        pools = [(point.after, str(head.pool)) for head, point in zip(self.heads.values(), points)]
        own = list(dict.fromkeys(pools))
        widths = tuple(pooled_shape(self.heads[points[pools.index(pool)].name], points[pools.index(pool)].head.shape).numel() for pool in own)
        columns = tuple(own.index(pool) for pool in pools)
        file = FeatureFile(self.folder / f"{name}.features", rows, widths, columns, points[0].head.classes)
        stage = lambda text, done, total: self.progress(f"{text} ({name})", done, total)  # noqa: E731
        record(self.artifact, self.heads, self.samples, file, how, seed=seed, threads=self.threads, progress=stage)
        return file


def pooled_shape(head: ExitHead, shape: tuple[int, ...]) -> torch.Size:
    """What is recorded for a head, without the batch."""
    with torch.inference_mode():
        result: torch.Tensor = head.pool(torch.zeros(1, *shape))
    return result.shape[1:]


def _split(samples: Samples, options: HeadTraining) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Rows to train on and rows to choose the epoch by, at random."""
    held_out = round(len(samples) * options.validation)
    if held_out < 2 or len(samples) - held_out < options.batch // 10:
        raise DataError(f"{len(samples)} samples are too few to train heads", f"give at least {max(options.batch // 5, 20)}")
    order = np.random.default_rng(options.seed).permutation(len(samples))
    return order[held_out:], order[:held_out]


def _key(record: object) -> str:
    """A name for what was recorded or trained: the same settings, the same name."""
    return hashlib.sha256(dumps(record)).hexdigest()[:16]


def _fit(
    artifact: Artifact,
    heads: dict[str, ExitHead],
    files: list[FeatureFile],
    validation: FeatureFile,
    labels: NDArray[np.integer],
    options: HeadTraining,
    checkpoint: Path,
    progress: Progress,
) -> tuple[dict[str, ExitHead], list[HeadReport]]:
    """Train all heads side by side; return each as it was after its best epoch."""
    shapes = [pooled_shape(heads[point.name], point.head.shape) for point in artifact.plan.exits]
    parameters = [parameter for head in heads.values() for parameter in head.parameters()]
    optimizer = torch.optim.SGD(parameters, options.learning_rate, momentum=0.9, weight_decay=options.weight_decay, nesterov=True)
    starts = range(0, len(files[0].rows), ROWS_A_CHUNK)
    batches = sum(-(-min(ROWS_A_CHUNK, len(files[0].rows) - start) // options.batch) for start in starts)
    steps = options.epochs * batches + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=steps, pct_start=0.15)
    best = {name: copy.deepcopy(head.state_dict()) for name, head in heads.items()}
    reports = {name: HeadReport(name, 0.0, -1) for name in heads}
    lowest = dict.fromkeys(heads, float("inf"))
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, head in heads.items():
            head.load_state_dict(state["heads"][name])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        best, lowest, first = state["best"], state["lowest"], state["epoch"]
        reports = {name: HeadReport(name, *kept) for name, kept in state["reports"].items()}
    for epoch in range(first, options.epochs):
        progress("training heads", epoch, options.epochs)
        _train_epoch(heads, shapes, files[epoch % len(files)], labels, optimizer, schedule, options, epoch)
        for name, (loss, accuracy) in _evaluate(heads, shapes, validation, labels, options).items():
            if loss < lowest[name]:
                lowest[name], reports[name] = loss, HeadReport(name, accuracy, epoch)
                best[name] = copy.deepcopy(heads[name].state_dict())
        state = {
            "heads": {name: head.state_dict() for name, head in heads.items()},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "best": best,
            "lowest": lowest,
            "epoch": epoch + 1,
            "reports": {name: (report.accuracy, report.epoch) for name, report in reports.items()},
        }
        _save_checkpoint(state, checkpoint)
    progress("training heads", options.epochs, options.epochs)
    for name, head in heads.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in best[name].values()) or reports[name].epoch < 0:
            raise DataError(f"training the head of {name} diverged", "lower the learning rate: --learning-rate 0.01")
        head.load_state_dict(best[name])
    return heads, list(reports.values())


def _train_epoch(
    heads: dict[str, ExitHead],
    shapes: list[torch.Size],
    file: FeatureFile,
    labels: NDArray[np.integer],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    options: HeadTraining,
    epoch: int,
) -> None:
    for head in heads.values():
        head.train()
    for features, teacher, rows in file.chunks(np.random.default_rng((options.seed, 7, epoch))):
        targets = torch.from_numpy(labels[rows])
        for batch in torch.split(torch.arange(len(rows)), options.batch):
            if len(batch) < 2:
                continue  # a norm cannot be estimated from one sample
            optimizer.zero_grad(set_to_none=True)
            for head, shape, feature in zip(heads.values(), shapes, features):
                # Heads share no weights, so their losses may be added, and stepped one by one to save memory.
                _loss(_from_pooled(head, feature[batch], shape), targets[batch], teacher[batch], options).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _evaluate(
    heads: dict[str, ExitHead], shapes: list[torch.Size], file: FeatureFile, labels: NDArray[np.integer], options: HeadTraining
) -> dict[str, tuple[float, float]]:
    """Mean loss and accuracy of each head."""
    sums = {name: np.zeros(2) for name in heads}
    with torch.inference_mode():
        for features, teacher, rows in file.chunks(np.random.default_rng(0)):
            targets = torch.from_numpy(labels[rows])
            for (name, head), shape, feature in zip(heads.items(), shapes, features):
                head.eval()
                logits = _from_pooled(head, feature, shape)
                loss = float(_loss(logits, targets, teacher, options))
                sums[name] += len(rows) * loss, float((logits.argmax(1) == targets).sum())
    return {name: (float(loss) / len(file.rows), float(correct) / len(file.rows)) for name, (loss, correct) in sums.items()}


def _from_pooled(head: ExitHead, pooled: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    logits: torch.Tensor = head.classifier(head.body(pooled.float().view(-1, *shape)))
    return logits


def _loss(logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor, options: HeadTraining) -> torch.Tensor:
    """(1 - a) cross-entropy + a T² KL(network at T || head at T), means over the batch."""
    t = options.softening
    divergence = functional.kl_div((logits / t).log_softmax(1), (teacher / t).log_softmax(1), log_target=True, reduction="batchmean")
    return (1 - options.distillation) * functional.cross_entropy(logits, targets) + options.distillation * t * t * divergence


def _save_checkpoint(state: dict[str, Any], path: Path) -> None:
    with written_whole(path) as stream:
        torch.save(state, stream)
