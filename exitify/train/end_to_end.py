"""The whole network trained with its exits: the artifact's recipe replayed on the model, then ordinary SGD. Also in several processes."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed, nn
from torch.nn import functional

from exitify import losses
from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact, build_artifact
from exitify.data import Samples
from exitify.errors import DataError, ModelError, PlanError
from exitify.onnx_export.to_artifact import export
from exitify.passes import make_pass
from exitify.passes.cost import example_input
from exitify.passes.equilibrate_gradients import EquilibrateGradients
from exitify.pictures import pixels_to_inputs
from exitify.plan import Plan, mask_text
from exitify.program import HEADS, SKIP_NORMS, ExitOutputs, Program, extract
from exitify.progress import Progress, silent
from exitify.runtime.session import Session
from exitify.tracing import capture
from exitify.train.augment import Augmentation, augment
from exitify.train.norms import reestimate_norms
from exitify.train.sample_weights import SampleWeights
from exitify.train.skip_distillation import SkipAwareDistillation, program_of
from exitify.train.work import name_of, save_checkpoint, torch_threads

log = logging.getLogger(__name__)

Schedule = Literal["cosine", "step"]
"""Half a cosine from the learning rate down to zero; or a tenth of it after half of the training, a hundredth after three quarters."""

Precision = Literal["fp32", "bf16"]
"""Of products and convolutions in training, by `torch.autocast`; weights stay float32."""

Losses = Callable[[torch.Tensor, torch.Tensor, float, losses.Criterion], Iterable[torch.Tensor]]
"""From inputs, labels, the share of the training that is done, in [0, 1), and the loss of one exit, to losses whose gradients
add up. Each follows one forward pass, and is asked for after the backward pass of the one before, as DistributedDataParallel wants it."""


@runtime_checkable
class Stateful(Protocol):
    """Losses that learn themselves."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


FINITE_EVERY = 50
"""After so many steps the losses so far are looked at: to look at each would keep a GPU waiting."""

NORM_SAMPLES = 2048
"""On so many samples second sets of norms are measured before the network learns to leave blocks out."""


@dataclass(frozen=True)
class Method:
    """A way to train a network with its exits.

    losses: Makes the losses of a model in `train()`, a Program or what wraps one, and the optimizer of its parameters. Where they have
        a state of their own, `state_dict` and `load_state_dict`, checkpoints hold it.
    rewrite: What the program becomes while it is trained; the weights are shared, and nothing of it is exported.
    learns: `exits`: the network and its heads; `skips`: the network with all skip paths and with none, heads are left for later.
    own_criterion: Why it has no place for distillation from the network as it was; empty where it has.
    """

    losses: Callable[[nn.Module, torch.optim.Optimizer], Losses]
    rewrite: Callable[[Program], Program] | None = None
    learns: Literal["exits", "skips"] = "exits"
    own_criterion: str = ""


def of_outputs(
    loss: Callable[[ExitOutputs, torch.Tensor, Plan, float, losses.Criterion], torch.Tensor],
) -> Callable[[nn.Module, torch.optim.Optimizer], Losses]:
    """A method's losses where one forward pass has one loss."""

    def bound(model: nn.Module, _optimizer: torch.optim.Optimizer) -> Losses:
        plan = program_of(model).plan
        return lambda x, y, done, criterion: (loss(model(x, all_exits=True), y, plan, done, criterion),)

    return bound


def _joint(outputs: ExitOutputs, y: torch.Tensor, plan: Plan, done: float, criterion: losses.Criterion) -> torch.Tensor:
    return losses.joint(outputs, y, criterion=criterion)


def _ramp(outputs: ExitOutputs, y: torch.Tensor, plan: Plan, done: float, criterion: losses.Criterion) -> torch.Tensor:
    return losses.joint(outputs, y, losses.ramp(plan, done), criterion)


def _one_for_all(outputs: ExitOutputs, y: torch.Tensor, plan: Plan, done: float, criterion: losses.Criterion) -> torch.Tensor:
    return losses.one_for_all(outputs, y, criterion=criterion)


def _skip_distillation(model: nn.Module, _optimizer: torch.optim.Optimizer) -> Losses:
    method = SkipAwareDistillation(model)
    return lambda x, y, done, criterion: method.losses(x, y)


class _SampleWeights:
    """Samples weighed at each exit by what a step of the optimizer would do; what weighs them learns too."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        method = SampleWeights(model, step=optimizer)
        self.method, self.state_dict, self.load_state_dict = method, method.state_dict, method.load_state_dict

    def __call__(self, x: torch.Tensor, y: torch.Tensor, _done: float, _criterion: losses.Criterion) -> tuple[torch.Tensor]:
        return (self.method(x, y),)


METHODS: Mapping[str, Method] = {
    "joint": Method(of_outputs(_joint)),
    "ramp": Method(of_outputs(_ramp)),
    "equilibrium": Method(of_outputs(_joint), rewrite=EquilibrateGradients()),
    "one-for-all": Method(of_outputs(_one_for_all)),
    "sample-weights": Method(_SampleWeights, own_criterion="weighs what samples lose on their labels"),
    "skip-distillation": Method(_skip_distillation, learns="skips", own_criterion="distils from the network as it becomes, not as it was"),
}
"""Every method by its name; one more is one more line."""


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained end to end.

    method: One of `METHODS`: every exit's loss alike; `ramp`, early exits' from next to nothing up to their cost; `equilibrium`,
        alike, with gradients that do not grow with the number of exits; `one-for-all`, the last exit teaches the others;
        `sample-weights`, each exit's samples weighed by what makes exits good at those that will leave there;
        `skip-distillation`, the network teaches itself with its skip paths left out.
    distillation: Weight of the divergence from what the network answered before the training, against the label, in every exit's loss,
        in [0, 1]: a network that knows its training samples by heart has little to learn from their labels.
    softening: Temperature of that divergence (Hinton et al. 2015, arXiv:1503.02531).
    epochs: Passes over the training samples; the last batch of each, where it is not full, is left out.
    batch: Samples a step, of all processes together.
    learning_rate: Of SGD with Nesterov momentum, where the schedule begins.
    weight_decay: On weights; none on norms and biases.
    augmentation: `none`, `crop`, `crop+flip`, or `auto`: crop, and flip where pictures are in colour. Ready inputs stay as they are.
    validation: Share of the samples set aside, on which every epoch is judged, without augmentation.
    seed: Of the samples' order, their augmentation and what is random in the network.
    """

    method: str = "joint"
    epochs: int = 20
    batch: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    augmentation: str = "auto"
    distillation: float = 0.0
    softening: float = 3.0
    precision: Precision = "fp32"
    validation: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class EpochReport:
    """What the network was after an epoch.

    epoch: Counted from 0.
    loss: Mean over the epoch's steps of what was trained on.
    losses, accuracy: Cross-entropy (nats) and share of right answers of every exit on the samples set aside; with `skip-distillation`
        also of `base`, the network with all skip paths left out.
    """

    epoch: int
    loss: float
    losses: Mapping[str, float]
    accuracy: Mapping[str, float]

    def __str__(self) -> str:
        right = ", ".join(f"{name} {self.accuracy[name]:.2%} (loss {self.losses[name]:.4f})" for name in self.accuracy)
        return f"epoch {self.epoch + 1}: loss {self.loss:.4f}; set aside: {right}"


def train_network(
    artifact: Artifact,
    samples: Samples,
    model: nn.Module,
    options: TrainingOptions | None = None,
    *,
    scores: str | int | None = None,
    save_to: Path | None = None,
    work: Path | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress = silent,
    each_epoch: Callable[[EpochReport], None] | None = None,
) -> tuple[Artifact, list[EpochReport]]:
    """Return the artifact with network and heads trained together, as after the last epoch, and what each epoch came to.

    The result has another `model_id`: profiles, times, masks and libraries are of the former network, and are not taken over.

    Called in each of several processes, under `torchrun` for instance, each computes its share of every batch; all return the
    same, and the first one writes. Norms of batches then see a process's share alone, and augmentation and dropout are drawn by
    each process for itself; everything else is as in one process.

    Args:
        artifact: Its recipe and its weights are what training begins with.
        samples: Pictures or ready inputs, and labels.
        model: The network that the artifact was made from, with any weights; it stays as it is.
        options: How to train.
        scores: Where its class scores are in what it returns, as for `capture`.
        save_to: Where to save the trained artifact, before the checkpoint is removed.
        work: Folder for the checkpoint, by default a folder `exitify-train` here. An interrupted training with the same artifact,
            data and options goes on there after its last whole epoch, to the same result (on a CPU with as many threads and
            processes to the same bytes); at the end what it put there is removed. All processes must see it.
        threads: CPU threads of each process, by default all.
        device: `cpu` or `cuda`.
        progress: Called at every step.
        each_epoch: Called with each epoch's report, in the first process.

    Raises:
        ModelError: the artifact's recipe or weights do not fit the model, or that computes something else; there is no such device.
        PlanError: the method needs exits or skip paths, and the artifact has none.
        DataError: an option out of range, too few samples, or the loss diverged (the checkpoint of the epoch before is kept).
    """
    options = options or TrainingOptions()
    method = _check(options, artifact)
    place = _device(device)
    with torch_threads(threads or torch.get_num_threads()), _processes(place) as (rank, count):
        train_rows, validation_rows = _split(samples, options, count)
        program = replay(artifact, model, scores=scores)
        key = {"model": artifact.manifest.model_id, "input": artifact.manifest.input, "data": samples.identity(), "options": options}
        folder = (work or Path("exitify-train")) / name_of(key)
        data = _Data(samples, artifact, _augmentation(options, artifact), place)
        training = _Training(program, method, options, data, place, rank, count)
        reports = training.run(train_rows, validation_rows, folder / "checkpoint.pt", progress, each_epoch)
        exported = export(training.trained(), contract=artifact.manifest.input, heads_trained=method.learns == "exits" or not artifact.plan.exits)
        trained = build_artifact(replace(exported.manifest, training_data=samples.identity()), exported.files)
        if rank == 0:
            if save_to is not None:
                trained.save(save_to)
            shutil.rmtree(folder, ignore_errors=True)
            if work is None and not any(folder.parent.iterdir()):
                folder.parent.rmdir()
    return trained, reports


# --- the network ----------------------------------------------------------------------------------------------------


def replay(artifact: Artifact, model: nn.Module, *, scores: str | int | None = None) -> Program:
    """Return the artifact's network as a Program: its recipe replayed on a copy of the model, with the artifact's weights.

    Raises:
        ModelError: the recipe does not replay on the model, the weights do not fit it, or it computes something else than the artifact.
    """
    manifest, plan = artifact.manifest, artifact.plan
    source = manifest.model.source
    hint = f"give the model that the artifact was made from{f', {source}' if source else ''}"
    with torch.random.fork_rng(devices=[]):  # fresh heads draw random numbers, and get the artifact's weights then
        try:
            program = capture(copy.deepcopy(model), example_input(plan.values[plan.input]), source=source, scores=scores)
            for text in manifest.model.recipe:
                program = make_pass(text)(program)
        except PlanError as error:
            raise ModelError(f"the artifact's recipe does not replay on {type(model).__name__}: {error.problem}", hint) from error
    difference = _difference(program.plan, plan)
    if difference:
        raise ModelError(f"the artifact's recipe gives {type(model).__name__} {difference}", hint)
    _put_weights(program, artifact, hint)
    _require_same_answers(program, artifact, hint)
    return program


def _difference(found: Plan, wanted: Plan) -> str:
    """What the first plan has otherwise than the second; costs and what segments really read, which `export` finds, apart."""
    parts: dict[str, Callable[[Plan], list[str]]] = {
        "exits": lambda plan: [f"{point.name} after {point.after}: {point.head} {point.previous}".strip() for point in plan.exits],
        "skip paths": lambda plan: [f"{path.name} over {', '.join(path.blocks)}" for path in plan.skips],
        "segments": lambda plan: [f"{segment.name} of {len(segment.nodes)} operations to {', '.join(segment.outputs)}" for segment in plan.segments],
        "values": lambda plan: [f"{name} {value.dtype} {value.shape}" for name, value in sorted(plan.values.items())],
    }
    for what, described in parts.items():
        ours, theirs = described(found), described(wanted)
        for got, expected in zip([*ours, *[""] * len(theirs)], [*theirs, *[""] * len(ours)]):
            if got != expected:
                return f"other {what} than it has: {got or 'none more'}, instead of {expected or 'none more'}"
    return ""


def _put_weights(program: Program, artifact: Artifact, hint: str) -> None:
    tensors = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    own = program.state_dict()
    for name, tensor in own.items():
        if name not in tensors:
            raise ModelError(f"the artifact has no weight {name!r}, which the model has", hint)
        if tuple(tensor.shape) != tensors[name].shape:
            raise ModelError(f"the weight {name!r} is {tensors[name].shape} in the artifact and {tuple(tensor.shape)} in the model", hint)
    program.load_state_dict({name: torch.from_numpy(np.array(tensors[name])) for name in own})


def _require_same_answers(program: Program, artifact: Artifact, hint: str) -> None:
    """Run both on one input: a model with the same weights may still compute something else with them."""
    value = program.values[program.plan.input]
    x = torch.rand(2, *value.shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, value.dtype))
    session = Session(artifact)
    program.eval()
    for skip in dict.fromkeys((program.plan.mask("none"), program.plan.mask("all"))):
        with torch.no_grad():
            found: ExitOutputs = program(x, skip=skip, all_exits=True)
        expected = session.record(x.numpy(), skip).logits
        for name, logits in zip(found.names, found.logits):
            gap = np.abs(logits.numpy() - expected[name]).max() / max(float(np.abs(expected[name]).max()), 1.0)
            if not gap <= 1e-3:
                masked = f" with the mask {mask_text(skip)}" if any(skip) else ""
                raise ModelError(f"the model's {name}{masked} differs from the artifact's by {gap:.2g} with the same weights", hint)


def other_weight(model: nn.Module, artifact: Artifact) -> str:
    """The first of the model's weights that is not the artifact's, empty where all are."""
    tensors = artifact.tensors(WEIGHTS_FILE)
    for name, tensor in model.state_dict().items():
        if name not in tensors or not np.array_equal(tensors[name], tensor.cpu().numpy()):
            return name
    return ""


def parameter_groups(program: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What SGD is to train, in two groups: weights, and norms' parameters and biases, which do not decay."""
    decaying: dict[nn.Parameter, None] = {}
    others: dict[nn.Parameter, None] = {}
    for module in program.modules():
        is_norm = "norm" in type(module).__name__.lower()
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                (others if is_norm or parameter.ndim < 2 else decaying)[parameter] = None
    decaying = {parameter: None for parameter in decaying if parameter not in others}
    return [{"params": list(decaying), "weight_decay": weight_decay}, {"params": list(others), "weight_decay": 0.0}]


def learning_rate(options: TrainingOptions, done: float) -> float:
    """The rate where this share of the training is done, in [0, 1)."""
    if options.schedule == "step":
        return options.learning_rate * (1.0 if done < 0.5 else 0.1 if done < 0.75 else 0.01)
    return options.learning_rate * (1 + math.cos(math.pi * done)) / 2


# --- what goes in ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """Makes batches: inputs `(N, ...)` and labels `(N,)` on the device."""

    samples: Samples
    artifact: Artifact
    how: Augmentation
    device: torch.device

    def batch(self, rows: NDArray[np.integer], generator: np.random.Generator | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """These samples, augmented where there is a generator."""
        pixels = self.samples.pixels(rows)
        if self.samples.are_pictures:
            pixels = augment(pixels, self.how, generator) if generator is not None else pixels
            pixels = pixels_to_inputs(pixels, self.artifact.manifest.input)
        x, y = torch.from_numpy(pixels), torch.from_numpy(self.samples.labels[rows])
        return x.to(self.device), y.to(self.device)


def _augmentation(options: TrainingOptions, artifact: Artifact) -> Augmentation:
    how: Any = options.augmentation
    return ("crop+flip" if artifact.manifest.input.color == "RGB" else "crop") if how == "auto" else how


def _split(samples: Samples, options: TrainingOptions, processes: int) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
    """Rows to train on and rows to judge by, at random."""
    if options.batch % processes or options.batch < 2 * processes:
        raise DataError(
            f"a batch of {options.batch} cannot be shared by {processes} processes with at least two samples each",
            f"give a multiple of {processes}: --batch {2 * processes * max(1, options.batch // (2 * processes))}",
        )
    held_out = round(len(samples) * options.validation)
    if held_out < 2 or len(samples) - held_out < options.batch:
        raise DataError(
            f"{len(samples)} samples are too few: {held_out} of them set aside leave {len(samples) - held_out} for batches of {options.batch}",
            "give more of them, or a smaller --batch",
        )
    order = np.random.default_rng(options.seed).permutation(len(samples))
    return order[held_out:], order[:held_out]


def _check(options: TrainingOptions, artifact: Artifact) -> Method:
    """The method, where it and the other options can be."""
    if options.method not in METHODS:
        raise DataError(f"there is no method {options.method!r}", f"there are {', '.join(METHODS)}")
    known = {"schedule": get_args(Schedule), "augmentation": ("auto", *get_args(Augmentation)), "precision": get_args(Precision)}
    for name, names in known.items():
        if getattr(options, name) not in names:
            raise DataError(f"there is no {name} {getattr(options, name)!r}", f"there are {', '.join(names)}")
    ranges = {
        "epochs": (options.epochs >= 1, "at least 1"),
        "learning_rate": (0 < options.learning_rate < math.inf, "above 0"),
        "momentum": (0 < options.momentum < 1, "between 0 and 1"),
        "weight_decay": (0 <= options.weight_decay < math.inf, "at least 0"),
        "distillation": (0 <= options.distillation <= 1, "from 0 to 1"),
        "softening": (0 < options.softening < math.inf, "above 0"),
        "validation": (0 < options.validation < 1, "between 0 and 1"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise DataError(f"{name} is {getattr(options, name)}", f"it must be {wanted}")
    method = METHODS[options.method]
    if method.learns == "exits" and not artifact.plan.exits:
        raise PlanError(f"the artifact has no exits to train with {options.method}", "transform with `--exits auto` or a number")
    if method.learns == "skips" and not artifact.plan.skips:
        raise PlanError(f"the artifact has no skip paths to train with {options.method}", "transform with `--skips auto`")
    if method.own_criterion and options.distillation:
        raise DataError(f"{options.method} {method.own_criterion}", "leave out --distillation")
    if method.learns == "exits" and artifact.plan.skips:
        log.warning(
            "%s does not train skip paths: what leaving them out has learnt will fit the network less; skip-distillation trains both", options.method
        )
    return method


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ModelError(f"there is no device {name!r}", "there are cpu and cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("there is no CUDA device that this torch can use", "leave --device out, or install torch for CUDA")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


# --- several processes ----------------------------------------------------------------------------------------------


@contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Which of how many processes this is: of the group there is, of the one that torchrun or accelerate prepared, or alone."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if distributed.is_available() and distributed.is_initialized():
        yield distributed.get_rank(), distributed.get_world_size()
        return
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield 0, 1
        return
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield distributed.get_rank(), distributed.get_world_size()
    finally:
        distributed.destroy_process_group()


# --- training -------------------------------------------------------------------------------------------------------


class _Training:
    """A program in training.

    program: As it is exported. inner: As it is trained; it shares the weights. model: What wraps that, in several processes.
    """

    def __init__(
        self, program: Program, method: Method, options: TrainingOptions, data: _Data, device: torch.device, rank: int, processes: int
    ) -> None:
        self.program, self.method, self.options, self.data, self.device = program, method, options, data, device
        self.rank, self.processes = rank, processes
        self.teacher = _without_exits(program).to(device) if options.distillation else None
        plain = program.replace(equilibrium="")  # how gradients flow is the method's to say, whatever the recipe did
        self.inner = (method.rewrite(plain) if method.rewrite is not None else plain).to(device)
        _freeze_what_is_not_learnt(self.inner, method)
        self.model: nn.Module = self.inner
        if processes > 1:
            self.model = nn.parallel.DistributedDataParallel(
                self.inner, [device] if device.type == "cuda" else None, find_unused_parameters=method.learns == "skips"
            )
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.inner, options.weight_decay), options.learning_rate, momentum=options.momentum, nesterov=True
        )
        with torch.random.fork_rng(devices=[]):  # a method's own parameters are drawn anew, and come from the checkpoint after an interruption
            torch.manual_seed(options.seed)
            self.losses = method.losses(self.model, self.optimizer)

    def run(
        self,
        train_rows: NDArray[np.integer],
        validation_rows: NDArray[np.integer],
        checkpoint: Path,
        progress: Progress,
        each_epoch: Callable[[EpochReport], None] | None,
    ) -> list[EpochReport]:
        """Train from the last checkpoint to the last epoch."""
        reports = self._resume(checkpoint)
        if not reports and self.method.learns == "skips":
            rows = train_rows[:NORM_SAMPLES]
            parts = np.array_split(rows, -(-len(rows) // self.options.batch))
            reestimate_norms(self.inner, (self.data.batch(part, np.random.default_rng((self.options.seed, i)))[0] for i, part in enumerate(parts)))
        for epoch in range(len(reports), self.options.epochs):
            loss = self._epoch(epoch, train_rows, progress)
            if not math.isfinite(loss) or not self._is_finite():
                kept = f"; the checkpoint before it is kept in {checkpoint.parent}" if reports else ""
                raise DataError(
                    f"the loss diverged in epoch {epoch + 1}{kept}", f"lower the learning rate: --learning-rate {self.options.learning_rate / 10:g}"
                )
            report = EpochReport(epoch, loss, *self._judge(validation_rows))
            reports.append(report)
            if self.rank == 0:
                log.info("%s", report)
                self._save(checkpoint, reports)
                if each_epoch is not None:
                    each_epoch(report)
        progress("training", 1, 1)
        return reports

    def trained(self) -> Program:
        """The program, on the CPU, with what was learnt."""
        self._share_buffers()
        self.program.cpu().load_state_dict(self.inner.cpu().state_dict())
        return self.program.eval()

    def _epoch(self, epoch: int, rows: NDArray[np.integer], progress: Progress) -> float:
        """Train once over the rows; return the mean loss of all processes, which is not finite if it diverged."""
        batch, steps = self.options.batch, len(rows) // self.options.batch
        order = np.random.default_rng((self.options.seed, epoch)).permutation(rows)[: steps * batch].reshape(steps, self.processes, -1)[:, self.rank]
        generator = np.random.default_rng((self.options.seed, epoch, self.rank))
        total = torch.zeros((), device=self.device, dtype=torch.float64)
        self.model.train()
        # Seeded anew in each epoch, so that one that is done again after an interruption draws the same numbers.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(int(generator.integers(2**63)))
            for step, own in enumerate(order):
                progress("training", epoch * steps + step, self.options.epochs * steps)
                done = (epoch * steps + step) / (self.options.epochs * steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.options, done)
                self.optimizer.zero_grad(set_to_none=True)
                for loss in self._losses(*self.data.batch(own, generator), done):
                    loss.backward()  # type: ignore[no-untyped-call]
                    total += loss.detach()
                self.optimizer.step()
                if step % FINITE_EVERY == FINITE_EVERY - 1 and not math.isfinite(self._sum(total)):
                    return math.nan
        return self._sum(total) / (steps * self.processes)

    def _losses(self, x: torch.Tensor, y: torch.Tensor, done: float) -> Iterator[torch.Tensor]:
        """The method's losses, each computed in the precision asked for and handed out where gradients are in their own."""

        def autocast() -> torch.autocast:
            return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.precision == "bf16")

        criterion: losses.Criterion = functional.cross_entropy
        if self.teacher is not None:
            with torch.no_grad(), autocast():
                answer = self.teacher(x, all_exits=True).final
            criterion = functools.partial(_distilled, answer, self.options)
        with autocast():
            following = iter(self.losses(x, y, done, criterion))
            loss = next(following, None)
        while loss is not None:
            yield loss
            with autocast():
                loss = next(following, None)

    def _judge(self, rows: NDArray[np.integer]) -> tuple[dict[str, float], dict[str, float]]:
        """Cross-entropy and share of right answers, by exit."""
        self._share_buffers()
        self.inner.eval()
        names = [*self.inner.plan.exit_names, *(["base"] if self.method.learns == "skips" else [])]
        sums = torch.zeros(2, len(names), device=self.device, dtype=torch.float64)
        own = rows[self.rank :: self.processes]
        for start in range(0, len(own), self.options.batch):
            x, y = self.data.batch(own[start : start + self.options.batch])
            with torch.no_grad():
                logits = list(self.inner(x, all_exits=True).logits)
                if self.method.learns == "skips":
                    logits.append(self.inner(x, skip="all", all_exits=True).final)
                sums[0] += torch.stack([functional.cross_entropy(found, y, reduction="sum") for found in logits])
                sums[1] += torch.stack([(found.argmax(1) == y).sum() for found in logits])
        if self.processes > 1:
            distributed.all_reduce(sums)
        means = (sums / len(rows)).tolist()
        return dict(zip(names, means[0])), dict(zip(names, means[1]))

    def _is_finite(self) -> bool:
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.inner.parameters())

    def _sum(self, total: torch.Tensor) -> float:
        """The sum over all processes."""
        if self.processes > 1:
            total = total.clone()
            distributed.all_reduce(total)
        return float(total)

    def _share_buffers(self) -> None:
        """Let all processes have the statistics of the first one's norms."""
        if self.processes > 1:
            for buffer in self.inner.buffers():
                distributed.broadcast(buffer, 0)

    def _resume(self, path: Path) -> list[EpochReport]:
        if not path.exists():
            return []
        state = torch.load(path, weights_only=True, map_location=self.device)
        self.inner.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(self.losses, Stateful):
            self.losses.load_state_dict(state["losses"])
        return [EpochReport(**report) for report in state["reports"]]

    def _save(self, path: Path, reports: list[EpochReport]) -> None:
        """Write what the next epoch begins with; rates and random numbers follow from which epoch it is."""
        state = {"model": self.inner.state_dict(), "optimizer": self.optimizer.state_dict(), "reports": [asdict(report) for report in reports]}
        if isinstance(self.losses, Stateful):
            state["losses"] = self.losses.state_dict()
        save_checkpoint(state, path)


def _distilled(answer: torch.Tensor, options: TrainingOptions, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(1 - a) cross-entropy + a T² KL(answer at T || logits at T), means over the batch."""
    t = options.softening
    divergence = functional.kl_div((logits.float() / t).log_softmax(1), (answer.float() / t).log_softmax(1), log_target=True, reduction="batchmean")
    return (1 - options.distillation) * functional.cross_entropy(logits, y) + options.distillation * t * t * divergence


def _without_exits(program: Program) -> Program:
    """A copy of the network alone, at rest."""
    bare = program.replace(plan=replace(program.plan, exits=(), skips=(), segments=()))
    return copy.deepcopy(bare).eval().requires_grad_(False)


def _freeze_what_is_not_learnt(program: Program, method: Method) -> None:
    """Take gradients from parameters that no loss reaches: DistributedDataParallel would wait for them."""
    heads = [program.head_node(point.name) for point in program.plan.exits]
    reaching = extract(program.graph, [*heads, next(node for node in program.graph.nodes if node.name == program.plan.output)])
    read = {str(node.target) for node in reaching.nodes if node.op in ("call_module", "get_attr")}
    if method.learns == "skips":
        read = {name for name in read if not name.startswith(f"{HEADS}.")} | {f"{SKIP_NORMS}.{name}" for name in read}
    for name, parameter in program.named_parameters():
        owners = {name[:i] for i, letter in enumerate(name) if letter == "."} | {name}
        if not owners & read:
            parameter.requires_grad_(False)
