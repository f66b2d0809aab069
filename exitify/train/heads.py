"""Heads trained from the artifact alone: backbone at rest, features recorded once, all heads in one pass over them."""

from __future__ import annotations

import copy
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from exitify.artifact.artifact import HEADS_FILE, MASKS_FILE, WEIGHTS_FILE, Artifact, build_artifact, graph_path
from exitify.artifact.memory import MEMORY_FILE
from exitify.artifact.tensors import write_tensors
from exitify.data import Samples
from exitify.errors import DataError, PlanError
from exitify.heads import ExitHead
from exitify.plan import Plan
from exitify.program import HEADS, ExitOutputs
from exitify.progress import Progress, silent
from exitify.train.augment import Augmentation
from exitify.train.jei_dnn import JeiDnn
from exitify.train.record import ROWS_A_CHUNK, FeatureFile, record
from exitify.train.work import name_of, save_checkpoint, torch_threads

Method = Literal["distillation", "jei", "class-means"]
"""What heads learn from: labels and the network's own answer; the samples that gates send to them, and the gates with them
(`exitify.train.jei_dnn`); or nothing but the mean of each class."""

METHODS = get_args(Method)

JEI_WARMUP = 0.3
"""Share of the epochs in which heads are warmed up before gates and heads learn in turn."""


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained.

    method: See `Method`.
    cost_weight: With `jei`, what the whole network's cost is worth in nats of cross-entropy.
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
    method: Method = "distillation"
    cost_weight: float = 1.0


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
    keep_recorded: bool = False,
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
        keep_recorded: Leave what was recorded in `work`, for other methods and heads at the same places.
        progress: Called now and then.

    Raises:
        PlanError: the artifact has no exits, or heads that this method cannot train.
        DataError: an unknown augmentation, too few samples, or the disk is full.
    """
    options = options or HeadTraining()
    if not artifact.plan.exits:
        raise PlanError("the artifact has no exits to train", "transform with `--exits auto` or a number")
    if options.augmentation not in ("auto", *get_args(Augmentation)):
        raise DataError(f"there is no augmentation {options.augmentation!r}", f"there are auto, {', '.join(get_args(Augmentation))}")
    _check_method(artifact.plan, options)
    threads = threads or torch.get_num_threads()
    train_rows, validation_rows = _split(samples, options)
    how: Any = options.augmentation
    if how == "auto":
        how = "crop+flip" if artifact.manifest.input.color == "RGB" else "crop"
    heads = load_heads(artifact)
    recorded = {
        "values": _values_recorded(artifact, heads),
        "data": samples.identity(),
        "how": how,
        "share": options.validation,
        "seed": options.seed,
    }
    folder = (work or Path("exitify-train")) / name_of(recorded)
    checkpoint = folder / f"checkpoint-{name_of([artifact.manifest.model_id, artifact.manifest.input, options])}.pt"
    folder.mkdir(parents=True, exist_ok=True)
    training = _Recorded(artifact, samples, heads, folder, threads, progress)
    files = []
    copies = 1 if options.method == "class-means" else min(options.copies, options.epochs)
    for copy_number in range(copies):
        order = np.random.default_rng((options.seed, copy_number)).permutation(train_rows)
        files.append(training.file(f"train-{copy_number}", order, how, options.seed + 1 + copy_number))
    validation = training.file("validation", validation_rows, "none", 0)
    with torch_threads(threads):
        side_by_side = _Heads(artifact.plan, heads, {point.name: pooled_shape(heads[point.name], point.head.shape) for point in artifact.plan.exits})
        gates: dict[str, tuple[float, ...]] = {}
        if options.method == "class-means":
            reports = _fit_class_means(side_by_side, files[0], validation, samples.labels, options)
        else:
            gates, reports = _fit(side_by_side, files, validation, samples.labels, options, checkpoint, progress)
    tensors = {f"{HEADS}.{name}.{key}": tensor.numpy() for name, head in heads.items() for key, tensor in head.state_dict().items()}
    kept = {
        path: data for path, data in artifact.files.items() if not path.startswith(("profiles/", "times/")) and path not in (MASKS_FILE, MEMORY_FILE)
    }
    manifest = replace(artifact.manifest, heads_trained=True, training_data=samples.identity(), gates=gates)
    trained = build_artifact(manifest, {**kept, HEADS_FILE: write_tensors(tensors)})
    for name, times in artifact.times.items():  # how long a head takes does not depend on its numbers
        trained = trained.with_times(name, replace(times, model_id=trained.manifest.model_id))
    if save_to is not None:
        trained.save(save_to)
    checkpoint.unlink(missing_ok=True)
    if keep_recorded:
        return trained, reports
    if not any(folder.glob("checkpoint-*.pt")):  # others that were interrupted go on with what is recorded
        shutil.rmtree(folder)
    if work is None and not any(folder.parent.iterdir()):
        folder.parent.rmdir()
    return trained, reports


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


def _values_recorded(artifact: Artifact, heads: Mapping[str, ExitHead]) -> dict[str, object]:
    """What decides the recorded numbers: the backbone, how pictures become its inputs, and what heads pool of which of its values."""
    parts = [WEIGHTS_FILE, *(graph_path(segment.name) for segment in artifact.plan.segments if segment.kind != "head")]
    files = [hashlib.sha256(artifact.files[path]).hexdigest() for path in parts]
    return {"files": files, "input": artifact.manifest.input, "read": [(point.after, str(heads[point.name].pool)) for point in artifact.plan.exits]}


def _check_method(plan: Plan, options: HeadTraining) -> None:
    if options.method not in METHODS:
        raise PlanError(f"there is no way to train heads called {options.method!r}", f"there are {', '.join(METHODS)}")
    if options.method == "jei" and options.epochs < 2:
        raise PlanError("gates learn after the heads have warmed up, and one epoch is all warm-up", "give --epochs 2 or more")
    if options.method == "class-means":
        wrong = [point.name for point in plan.exits if point.head.kind != "linear" or point.head.path]
        if wrong:
            raise PlanError(f"class means make linear heads, and {', '.join(wrong)} have others", "transform with `--head linear`")


@dataclass(frozen=True)
class _Heads:
    """All heads of a plan side by side, fed from recorded values."""

    plan: Plan
    modules: Mapping[str, ExitHead]
    shapes: Mapping[str, torch.Size]

    def train(self, mode: bool) -> None:
        for head in self.modules.values():
            head.train(mode)

    @property
    def are_tied(self) -> bool:
        """Whether a head's loss reaches another head."""
        return any(point.head.path == "learned" for point in self.plan.exits)

    def logits(self, features: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each exit's logits, `(N, classes)`, in order; a head is run when it is asked for."""
        said: dict[str, torch.Tensor] = {}
        for point, pooled in zip(self.plan.exits, features):
            head, shape = self.modules[point.name], self.shapes[point.name]
            logits = head.after_pool(pooled.float().view(-1, *shape), said.get(point.previous))
            said[point.name] = logits if self.are_tied else logits.detach()
            yield point.name, logits

    def state(self) -> dict[str, dict[str, torch.Tensor]]:
        return {name: copy.deepcopy(head.state_dict()) for name, head in self.modules.items()}

    def load(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, head in self.modules.items():
            head.load_state_dict(state[name])


def _fit(
    heads: _Heads,
    files: list[FeatureFile],
    validation: FeatureFile,
    labels: NDArray[np.integer],
    options: HeadTraining,
    checkpoint: Path,
    progress: Progress,
) -> tuple[dict[str, tuple[float, ...]], list[HeadReport]]:
    """Train all heads side by side, leave each as it was after its best epoch, and return the gates, if any."""
    starts = range(0, len(files[0].rows), ROWS_A_CHUNK)
    batches = sum(-(-min(ROWS_A_CHUNK, len(files[0].rows) - start) // options.batch) for start in starts)
    method = None
    if options.method == "jei":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(options.seed)
            warmup = max(1, round(JEI_WARMUP * options.epochs)) * batches
            method = JeiDnn(heads.plan, cost_weight=options.cost_weight, warmup=warmup, switch_every=max(1, batches // 2))
    parameters = [parameter for head in heads.modules.values() for parameter in head.parameters()]
    parameters += list(method.parameters()) if method else []
    optimizer = torch.optim.SGD(parameters, options.learning_rate, momentum=0.9, weight_decay=options.weight_decay, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.epochs * batches + 1, pct_start=0.15)
    best = heads.state()
    reports = {name: HeadReport(name, 0.0, -1) for name in heads.modules}
    lowest = dict.fromkeys(heads.modules, float("inf"))
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        heads.load(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        if method:
            method.load_state_dict(state["method"])
        best, lowest, first = state["best"], state["lowest"], state["epoch"]
        reports = {name: HeadReport(name, *kept) for name, kept in state["reports"].items()}
    for epoch in range(first, options.epochs):
        progress("training heads", epoch, options.epochs)
        _train_epoch(heads, files[epoch % len(files)], labels, optimizer, schedule, options, epoch, method=method)
        found = _evaluate(heads, validation, labels, options)
        if method is not None:
            method.reweight(_recorded_outputs(heads, validation, labels))
        if any(point.previous for point in heads.plan.exits):  # what a head has learnt holds for the earlier ones as they were then
            together = sum(loss for loss, _ in found.values())
            found = {name: (together, accuracy) for name, (_, accuracy) in found.items()}
        for name, (loss, accuracy) in found.items():
            is_finite = loss < float("inf")
            if loss < lowest[name] or (method and is_finite):  # with gates a head learns a part of the samples, and its loss on all tells nothing
                lowest[name], reports[name] = loss, HeadReport(name, accuracy, epoch)
                best[name] = copy.deepcopy(heads.modules[name].state_dict())
        state = {
            "heads": {name: head.state_dict() for name, head in heads.modules.items()},
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "best": best,
            "lowest": lowest,
            "epoch": epoch + 1,
            "reports": {name: (report.accuracy, report.epoch) for name, report in reports.items()},
            **({"method": method.state_dict()} if method else {}),
        }
        save_checkpoint(state, checkpoint)
    progress("training heads", options.epochs, options.epochs)
    for name in heads.modules:
        if not all(bool(torch.isfinite(tensor).all()) for tensor in best[name].values()) or reports[name].epoch < 0:
            raise DataError(f"training the head of {name} diverged", "lower the learning rate: --learning-rate 0.01")
    heads.load(best)
    return method.gate_settings() if method else {}, list(reports.values())


def _train_epoch(
    heads: _Heads,
    file: FeatureFile,
    labels: NDArray[np.integer],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    options: HeadTraining,
    epoch: int,
    *,
    method: JeiDnn | None = None,
) -> None:
    heads.train(True)
    for features, teacher, rows in file.chunks(np.random.default_rng((options.seed, 7, epoch))):
        targets = torch.from_numpy(labels[rows])
        for batch in torch.split(torch.arange(len(rows)), options.batch):
            if len(batch) < 2:
                continue  # a norm cannot be estimated from one sample
            optimizer.zero_grad(set_to_none=True)
            heads.train(method is None or method.phase != "gates")  # a gate learns what a head says on a device
            said = heads.logits([feature[batch] for feature in features])
            if method is not None:
                outputs = ExitOutputs(heads.plan.exit_names, (*(logits for _, logits in said), teacher[batch]))
                method.loss(outputs, targets[batch]).backward()  # type: ignore[no-untyped-call]
            elif heads.are_tied:
                torch.stack([_loss(logits, targets[batch], teacher[batch], options) for _, logits in said]).sum().backward()  # type: ignore[no-untyped-call]
            else:  # heads share no weights, so their losses may be added, and stepped one by one to save memory
                for _, logits in said:
                    _loss(logits, targets[batch], teacher[batch], options).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _evaluate(heads: _Heads, file: FeatureFile, labels: NDArray[np.integer], options: HeadTraining) -> dict[str, tuple[float, float]]:
    """Mean loss and accuracy of each head."""
    sums = {name: np.zeros(2) for name in heads.modules}
    heads.train(False)
    with torch.inference_mode():
        for features, teacher, rows in file.chunks(np.random.default_rng(0)):
            targets = torch.from_numpy(labels[rows])
            for name, logits in heads.logits(features):
                loss = float(_loss(logits, targets, teacher, options))
                sums[name] += len(rows) * loss, float((logits.argmax(1) == targets).sum())
    return {name: (float(loss) / len(file.rows), float(correct) / len(file.rows)) for name, (loss, correct) in sums.items()}


def _recorded_outputs(heads: _Heads, file: FeatureFile, labels: NDArray[np.integer]) -> Iterator[tuple[ExitOutputs, torch.Tensor]]:
    """What all exits, as they are, say of recorded samples, and the labels, chunk by chunk."""
    heads.train(False)
    for features, teacher, rows in file.chunks(np.random.default_rng(0)):
        with torch.no_grad():
            yield ExitOutputs(heads.plan.exit_names, (*(logits for _, logits in heads.logits(features)), teacher)), torch.from_numpy(labels[rows])


def _fit_class_means(
    heads: _Heads, file: FeatureFile, validation: FeatureFile, labels: NDArray[np.integer], options: HeadTraining
) -> list[HeadReport]:
    """Give each linear head the mean of each class's features m: its logits are minus squared distances, but for what all classes share.

    -|z - m|² = 2 m·z - |m|² - |z|². They are divided by twice the variance within classes, the mean over features: those of
    equal normal distributions around the means, so that probabilities mean something before a temperature is fitted.
    Source: Gormez, Dasari and Koyuncu 2022 (E²CM), who take the nearest mean.

    Raises:
        DataError: a class has no samples.
    """
    classes = heads.plan.classes
    counts = torch.zeros(classes)
    sums = {name: torch.zeros(classes, head.classifier.in_features, dtype=torch.float64) for name, head in heads.modules.items()}
    squares = dict.fromkeys(heads.modules, 0.0)
    with torch.inference_mode():
        for features, _, rows in file.chunks(np.random.default_rng(0)):
            targets = torch.from_numpy(labels[rows])
            counts += torch.bincount(targets, minlength=classes)
            for name, feature in zip(heads.modules, features):
                sums[name].index_add_(0, targets, feature.double())
                squares[name] += float(feature.double().square().sum())
    if not counts.all():
        raise DataError(f"class {int((counts == 0).nonzero()[0])} has no samples, and so no mean", "give samples of every class")
    for name, head in heads.modules.items():
        means = sums[name] / counts[:, None]
        within = (squares[name] - float((counts[:, None] * means.square()).sum())) / means.shape[1] / float(counts.sum())
        scale = 1 / max(2 * within, torch.finfo(torch.float32).tiny)
        with torch.no_grad():
            head.classifier.weight.copy_(2 * scale * means)
            head.classifier.bias.copy_(-scale * means.square().sum(dim=1))
    return [HeadReport(name, accuracy, 0) for name, (_, accuracy) in _evaluate(heads, validation, labels, options).items()]


def _loss(logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor, options: HeadTraining) -> torch.Tensor:
    """(1 - a) cross-entropy + a T² KL(network at T || head at T), means over the batch."""
    t = options.softening
    divergence = functional.kl_div((logits / t).log_softmax(1), (teacher / t).log_softmax(1), log_target=True, reduction="batchmean")
    return (1 - options.distillation) * functional.cross_entropy(logits, targets) + options.distillation * t * t * divergence
