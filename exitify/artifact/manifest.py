"""What an artifact says of itself: the manifest, the input contract, the profiles. FORMAT.md is the specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from exitify.errors import DataError
from exitify.plan import FINAL, Plan

FORMAT = 7
"""The version of the format that this release writes, and the only one it reads."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input, in this order.

    resize: Shorter side in pixels, or `(height, width)`; None keeps the size.
    crop: `(height, width)` cut from the centre; None keeps everything.
    interpolation: Pillow's filter for the resize.
    scale: Factor on the bytes 0 … 255 (1/255 usually).
    mean, std: Subtracted and divided by, one a channel, after the scale.
    """

    resize: tuple[int, ...] | None = None
    crop: tuple[int, int] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class InputContract:
    """What the network reads, and what its answers are called.

    shape: Without the batch, `(C, H, W)` for pictures.
    dtype: NumPy's name.
    color: `RGB` or `L` (grey), for pictures.
    preprocess: None when the model came without; then pictures are refused and arrays must be ready.
    classes: Names of the classes, empty when not known.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    color: Literal["RGB", "L"] = "RGB"
    preprocess: Preprocess | None = None
    classes: tuple[str, ...] = ()

    def check(self) -> None:
        """Hold the contract against itself.

        Raises:
            DataError: a mean or std does not fit the channels, a std is zero, a size is not positive.
        """
        if not self.shape or min(self.shape) < 1:
            raise DataError(f"the input shape {self.shape} has a dimension below 1")
        steps = self.preprocess
        if steps is None:
            return
        channels = self.shape[0]
        for name, numbers in (("mean", steps.mean), ("std", steps.std)):
            if len(numbers) not in (1, channels):
                raise DataError(f"{name} has {len(numbers)} numbers, and the input {channels} channels", "give one number, or one a channel")
        if min(abs(s) for s in steps.std) == 0:
            raise DataError("a std is 0", "give what the training divided by")
        if len(self.shape) != 3 or channels != {"RGB": 3, "L": 1}[self.color]:
            raise DataError(f"a picture in {self.color} does not become an input of shape {self.shape}", "give --preprocess color=L for one channel")
        for size in (steps.resize, steps.crop):
            if size is not None and (len(size) not in (1, 2) or min(size) < 1 or max(size) > 16384):
                raise DataError(f"the size {size} is no side and no (height, width)")


@dataclass(frozen=True)
class ModelOrigin:
    """Where the network came from.

    source: The model as the user named it (`torchvision:resnet18`), empty when it came as an object.
    recipe: The passes that made the plan, in order; each text makes its pass again.
    """

    source: str
    recipe: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file in the container."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The artifact's first file.

    model_id: sha256 over plan, graphs and source weights; profiles and device states bind to it.
    heads_trained: Whether the heads have been trained; fresh ones say nothing.
    training_data: `Samples.identity()` of what they were trained on, empty when not known.
    gates: Those that were trained with the heads, by exit, as `ExitSetting.gate` has them, for the temperature 1; empty where none were.
    """

    format: int
    exitify: str
    model_id: str
    model: ModelOrigin
    input: InputContract
    plan: Plan
    heads_trained: bool
    training_data: str = ""
    gates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)


Policy = Literal["top1", "entropy", "margin", "renyi_entropy", "patience", "gates", "jei", "temporal"]
"""What an exit's score is, higher is surer; `exitify.runtime.policies` computes them all."""


@dataclass(frozen=True)
class ExitSetting:
    """How one exit decides.

    enabled: Whether its head is run at all.
    threshold: It is taken when its score reaches this.
    temperature: Divides its logits.
    gate: What a learned gate adds up: a weight for each of `exitify.plan.SCORES`, then its bias; empty where there is none.
    """

    enabled: bool
    threshold: float
    temperature: float
    gate: tuple[float, ...] = ()


@dataclass(frozen=True)
class Promise:
    """What a calibration promised, and what it rests on.

    kind: `max-drop` (accuracy against the full network), `budget-macs` (share of its multiply-adds), `budget-ms` (mean time of
        an answer), `risk` (disagreement with it).
    limit: The number asked for. confidence: At which a `risk`, or a `max-drop`, was proven; 0 where it was estimated.
    kept: Whether the promise could be made; if not, the profile takes no exit, or the best found, as `note` says.
    samples: How many calibration samples it rests on.
    accuracy, full_accuracy, disagreement, mean_macs_share: What to expect of the profile, and of the full network: estimated
        on those of the samples that thresholds were not found on.
    mean_ms: An answer's mean time where it was measured, else 0.
    note: What a reader must know besides, empty if nothing.
    """

    kind: Literal["max-drop", "budget-macs", "budget-ms", "risk"]
    limit: float
    confidence: float
    kept: bool
    samples: int
    accuracy: float
    full_accuracy: float
    disagreement: float
    mean_macs_share: float
    mean_ms: float
    note: str

    @property
    def asked(self) -> str:
        """What was asked for, in words."""
        proven = f" at {self.confidence:g}" if self.confidence else ""
        return {
            "max-drop": f"drop of at most {self.limit * 100:g} points{proven}",
            "budget-macs": f"{self.limit:g} of the multiply-adds",
            "budget-ms": f"{self.limit:g} ms an answer",
            "risk": f"{self.limit:g} other answers{proven}",
        }[self.kind]


@dataclass(frozen=True)
class Conformal:
    """How large an answer's set of classes must be to hold the true one (Angelopoulos and Bates 2021, arXiv:2107.07511).

    alpha: Share of answers whose set may miss it. kind: Which samples each quantile is of: all, at every exit alike (`general`); or each
        exit's own, those that leave there alone (`strict`), or others besides (`per_exit`, `gated`).
    quantiles: By exit, `final` among them: of 1 - p(true class) at the exit's temperature.
    samples: How many they rest on.
    """

    alpha: float
    kind: Literal["general", "per_exit", "strict", "gated"]
    quantiles: Mapping[str, float]
    samples: int


@dataclass(frozen=True)
class Profile:
    """When to stop: a policy with its settings, calibrated for one model.

    policy: Which score is held against the thresholds.
    skip: The mask that the thresholds belong to, one 0 or 1 a skip path; empty where the network has none.
    exits: One setting an exit of the plan.
    final_temperature: Divides the network's own logits.
    data: sha256 of the calibration samples' order, labels and pixels. engine: What recorded the outputs.
    conformal: What makes sets of classes of its answers, where that was calibrated.
    calibration_errors: Of each exit without and with its temperature, `final` among them, in [0, 1]: how far its probabilities are from
        the share of right answers (`exitify.calibration.temperature`); empty where that was not measured.
    """

    model_id: str
    policy: Policy
    exits: Mapping[str, ExitSetting]
    final_temperature: float
    skip: str
    promise: Promise
    engine: str
    data: str
    conformal: Conformal | None = None
    calibration_errors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the exits that are run, then `final`."""
        return (*(name for name, setting in self.exits.items() if setting.enabled), FINAL)


@dataclass(frozen=True)
class Conditions:
    """What a measured time or energy belongs to: on another board, or in another power mode, it says nothing.

    board: The target's name; the processor's where it is no board that exitify knows.
    power_mode: By nvpmodel's name, since ids differ from board to board; empty where there are none, or nobody says.
    clocks: `fixed` as `jetson_clocks` leaves them, `free` where they follow the load; empty where nobody says.
    """

    board: str
    power_mode: str
    clocks: Literal["fixed", "free", ""]

    def __str__(self) -> str:
        """For people: `orin-nano-8gb, 15W, clocks fixed`."""
        clocks = f"clocks {self.clocks}" if self.clocks else ""
        return ", ".join(part for part in (self.board, self.power_mode, clocks) if part)


@dataclass(frozen=True)
class MaskMeasured:
    """What one mask gives and costs, no exit taken.

    accuracy: On the samples. disagreement: Share of them on which the whole network answers otherwise.
    macs_share: Of the whole network's multiply-adds. ms: Median time of an answer.
    """

    accuracy: float
    disagreement: float
    macs_share: float
    ms: float


@dataclass(frozen=True)
class MaskTable:
    """What was measured of a network's masks, so that one can be chosen for a time.

    engine, threads, conditions: How and where times were measured. samples, data: How many, and sha256 of them.
    masks: By mask, `0110` for instance.
    """

    model_id: str
    engine: str
    threads: int
    conditions: Conditions
    samples: int
    data: str
    masks: Mapping[str, MaskMeasured]


@dataclass(frozen=True)
class SegmentTimes:
    """How long each segment takes on one machine, so that another can choose exits and masks for it.

    engine: With the library that it ran, `tvm:orin-nano-8gb.gpu`. threads, conditions: How and where.
    rounds: Readings that each median is of.
    whole_ms: The whole network without exits. segments: Each alone, milliseconds by name.
    """

    model_id: str
    engine: str
    threads: int
    conditions: Conditions
    rounds: int
    whole_ms: float
    segments: Mapping[str, float]


Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class CompiledSegment:
    """One segment in a library.

    graph: sha256 of the graph that it was compiled from.
    second_graph: The same for its norms' second set, empty where it has one.
    weights: Names of the derived tensors that its function takes behind the plan's inputs and parameters.
    second_weights: What it takes in their place while its norms' second set is used; as many, most of them the same.
    batches: Sizes of batches beside 1 for which there is a function too, with the same weights, ascending.
    error: Largest difference from the reference engine when it was compiled, over the largest magnitude of the output.
    """

    graph: str
    second_graph: str
    weights: tuple[str, ...]
    second_weights: tuple[str, ...]
    batches: tuple[int, ...]
    error: float


MARK = "exitify kernels "
"""What a library holds in place of CUDA source, followed by that source's sha256."""


@dataclass(frozen=True)
class GpuKernels:
    """The kernels beside a library for a GPU, `kernels.cubin` and `kernels.ptx`.

    architecture: That the machine code is for, `sm_87`. ptx: Version of the PTX language, `8.5`.
    compiler: CUDA version of what made both, `12.6`: the PTX needs a driver of this CUDA or newer, the machine code one of its major version.
    mark: What the library holds in their place.
    """

    architecture: str
    ptx: str
    compiler: str
    mark: str


@dataclass(frozen=True)
class TunedKernel:
    """What a search of schedules found for one kernel of a library.

    calls: How often a run of all segments on one sample calls it. trials: Candidates measured, those that failed counted.
    history: `(trials, ms)` where the least time of a call so far fell, in the order measured; first the default schedule's.
    chosen_ms: Of the schedule that the library has: the default's where nothing was better by more than noise.
    """

    calls: int
    trials: int
    history: tuple[tuple[int, float], ...]
    chosen_ms: float

    @property
    def default_ms(self) -> float:
        """A call by the default schedule."""
        return self.history[0][1]


@dataclass(frozen=True)
class Compiled:
    """A library for one target and what must hold for it to be loaded.

    target: Its name in the artifact: the board's, with `.gpu` for its GPU and `.fp16` for that precision. board: The board's name.
    triple: LLVM's. cpu: LLVM's name of the processor.
    features: What the processor must have, by the operating system's names.
    gpu: What runs on a GPU; None where all of it runs on the processor.
    precision: Of weights and of values within segments; between segments all values are as the plan says.
    tvm: Version of apache-tvm. tvm_ffi: Version of apache-tvm-ffi. The library runs on this pair alone.
    segments: What was compiled, by the segment's name, which is its function's name in the library.
    left_to: What runs the segments that are not in the library: `onnxruntime`, or nothing.
    in_blocks: Values that its functions take and give as `(1, ceil(C / block), H, W, block)`, zeros or any numbers past the last
        channel, where the plan says `(1, C, H, W)`. block: 0 where there are none.
    sources: sha256 of each source tensor that derived weights were computed from, by name.
    tolerance: Most that a segment's error may be.
    trials: Candidates that were measured for its kernels.
    kernels: What was found for each kernel that was searched, by name.
    """

    target: str
    board: str
    triple: str
    cpu: str
    features: tuple[str, ...]
    gpu: GpuKernels | None
    precision: Precision
    tvm: str
    tvm_ffi: str
    segments: Mapping[str, CompiledSegment]
    left_to: Literal["", "onnxruntime"]
    in_blocks: tuple[str, ...]
    block: int
    sources: Mapping[str, str]
    tolerance: float
    trials: int
    kernels: Mapping[str, TunedKernel]


def name_of(segment: str, batch: int) -> str:
    """What a segment's function for so many samples is called in a library."""
    return segment if batch == 1 else f"{segment}_batch{batch}"


def target_name(board: str, *, on_gpu: bool, precision: Precision) -> str:
    """What a library is called in an artifact: `orin-nano-8gb.gpu.fp16`."""
    return board + (".gpu" if on_gpu else "") + (".fp16" if precision == "fp16" else "")
