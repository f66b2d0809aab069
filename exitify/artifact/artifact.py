"""The artifact: one file with plan, graphs, weights, profiles and libraries. Opening and inspecting it executes nothing."""

from __future__ import annotations

import functools
import hashlib
import math
import mmap
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exitify.artifact import container
from exitify.artifact.container import Buffer
from exitify.artifact.manifest import (
    FORMAT,
    MARK,
    Compiled,
    ExitSetting,
    FileEntry,
    Manifest,
    MaskTable,
    Policy,
    Profile,
    SegmentTimes,
    TunedKernel,
    target_name,
)
from exitify.artifact.memory import MEMORY_FILE, Memory, read_memory, write_memory
from exitify.artifact.onnx_graph import ELEMENT_TYPES, Graph, Parameter, identity, merge, parse, value_info
from exitify.artifact.tensors import read_tensors, tensor_spans
from exitify.errors import (
    AlteredFile,
    ArtifactError,
    ExitifyError,
    ExtraFile,
    MalformedManifest,
    MissingFile,
    NotAnArtifact,
    OversizedArtifact,
    UnknownFormat,
    UnknownProfile,
)
from exitify.files import written_whole
from exitify.plan import SCORES, Plan, Value
from exitify.records import dumps, from_json, loads

MANIFEST = "manifest.json"
WEIGHTS_FILE = "model/weights.safetensors"
HEADS_FILE = "model/heads.safetensors"
MASKS_FILE = "masks.json"
LARGEST_RECORD = 16 * 2**20
"""Most bytes of the manifest, of a profile, and of what a library says of itself."""
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-3, 1e3
"""Beyond these, float32 softmax says nothing; calibration stays within 0.05 and 20."""
LONGEST_MS = 3_600_000.0
"""An hour: no segment takes longer, and sums of such times stay finite."""

_AGAIN = "get the artifact again"
_CALIBRATE_AGAIN = "calibrate again: `exitify calibrate`"
NO_PROFILE = "none"
"""What asks for the network without exits, and so no profile's name."""

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
_TARGET_FILES = ("compiled.json", "library.so", "weights.safetensors")
_KERNEL_FILES = ("kernels.cubin", "kernels.ptx")
"""What a target with a GPU has besides: machine code for its architecture, and PTX for newer ones."""
_MARK = re.compile(f"{MARK}[0-9a-f]{{64}}")
_ARCHITECTURE, _VERSION = re.compile(r"sm_[0-9]{2,3}"), re.compile(r"[0-9]{1,3}\.[0-9]{1,3}")
T = TypeVar("T")


def graph_path(segment: str, *, second: bool = False) -> str:
    """Where a segment's ONNX model stands in the container, with its norms' first or second set."""
    return f"model/{segment}.second_norms.onnx" if second else f"model/{segment}.onnx"


def target_path(target: str, name: str) -> str:
    """Where a target's `compiled.json`, `library.so`, `weights.safetensors` or `kernels.cubin` stands in the container."""
    return f"targets/{target}/{name}"


@dataclass(frozen=True)
class Artifact:
    """A network with its exits, as stored. Frozen: each change returns a new one.

    Attributes:
        manifest: What it says of itself.
        files: Everything else, by path; views into the file it was opened from.
    """

    manifest: Manifest
    files: Mapping[str, Buffer] = field(repr=False)

    @property
    def plan(self) -> Plan:
        """Exits and segments."""
        return self.manifest.plan

    @property
    def profiles(self) -> dict[str, Profile]:
        """The calibrated profiles by name, oldest first."""
        paths = [path for path in self.files if path.startswith("profiles/")]
        return {Path(path).stem: _read_record(Profile, self.files[path], path) for path in paths}

    def profile(self, name: str) -> Profile:
        """The profile of that name.

        Raises:
            UnknownProfile: there is none; the hint lists those there are.
        """
        profiles = self.profiles
        if name not in profiles:
            hint = f"it has {', '.join(profiles)}" if profiles else "`exitify calibrate` makes one"
            raise UnknownProfile(f"the artifact has no profile {name!r}", hint)
        return profiles[name]

    @property
    def targets(self) -> dict[str, Compiled]:
        """The libraries by their target's name, oldest first."""
        paths = [path for path in self.files if path.startswith("targets/") and path.endswith("/compiled.json")]
        return {path.split("/")[1]: _read_record(Compiled, self.files[path], path) for path in paths}

    def with_target(self, compiled: Compiled, library: bytes, weights: bytes, kernels: tuple[bytes, bytes] | None = None) -> Artifact:
        """The same artifact with this library added, or put in place of the one for that target.

        Args:
            compiled: What must hold for it to be loaded. library: A shared object. weights: Its derived tensors, safetensors.
            kernels: For a GPU, machine code and PTX.

        Raises:
            MalformedManifest: they do not fit each other. ExitifyError: the target's name cannot be a file's.
        """
        check_name("target", compiled.target)
        parts = dict(zip((*_TARGET_FILES, *_KERNEL_FILES), (dumps(compiled), library, weights, *(kernels or ()))))
        changed = build_artifact(self.manifest, {**self.files, **{target_path(compiled.target, name): data for name, data in parts.items()}})
        _check_targets(changed)
        return changed

    def tensors(self, path: str) -> dict[str, NDArray[np.generic]]:
        """The tensors of a safetensors file in the container (`WEIGHTS_FILE` for instance), read in place."""
        return read_tensors(memoryview(self.files[path]), path)

    def classifiers(self) -> dict[str, NDArray[np.generic]]:
        """The last layer of every head, weight and bias by name: what heads are given, and may be given others for."""
        heads = self.tensors(HEADS_FILE)
        return {name: heads[name] for point in self.plan.exits for name in (point.weight, point.bias)}

    def graph(self, segment: str, skipped: Collection[str] = ()) -> Graph:
        """A segment's ONNX graph, as it runs while these skip paths are left out."""
        found = self.plan.segment(segment)
        is_second = found.follows in skipped
        if is_second and found.kind == "block":
            return identity(found.inputs[0], found.outputs[0], self.plan.values[found.outputs[0]])
        path = graph_path(segment, second=is_second)
        return parse(bytes(self.files[path]), path)

    @property
    def masks(self) -> MaskTable | None:
        """What was measured of the masks, if anything was."""
        return _read_record(MaskTable, self.files[MASKS_FILE], MASKS_FILE) if MASKS_FILE in self.files else None

    def with_masks(self, table: MaskTable) -> Artifact:
        """The same artifact with these measurements of its masks, in place of older ones.

        Raises:
            MalformedManifest: they are another network's.
        """
        changed = build_artifact(self.manifest, {**self.files, MASKS_FILE: dumps(table)})
        _check_masks(changed)
        return changed

    @property
    def memory(self) -> Memory | None:
        """What it remembers of calibration samples, if anything."""
        return read_memory(self.files[MEMORY_FILE], self.plan, self.manifest.model_id) if MEMORY_FILE in self.files else None

    def with_memory(self, memory: Memory) -> Artifact:
        """The same artifact with this memory, in place of an older one.

        Raises:
            MalformedManifest: it is another network's.
        """
        changed = build_artifact(self.manifest, {**self.files, MEMORY_FILE: write_memory(memory, self.manifest.model_id)})
        _check_memory(changed)
        return changed

    @property
    def times(self) -> dict[str, SegmentTimes]:
        """What was measured of the segments, by name, oldest first."""
        paths = [path for path in self.files if path.startswith("times/")]
        return {Path(path).stem: _read_record(SegmentTimes, self.files[path], path) for path in paths}

    def with_times(self, name: str, times: SegmentTimes) -> Artifact:
        """The same artifact with these times added, or put in place of those of that name.

        Raises:
            MalformedManifest: they belong to another network. ExitifyError: the name cannot be a file's.
        """
        check_name("record of times", name)
        changed = build_artifact(self.manifest, {**self.files, f"times/{name}.json": dumps(times)})
        _check_times(changed)
        return changed

    def with_profile(self, name: str, profile: Profile) -> Artifact:
        """The same artifact with this profile added, or put in place of the one of that name.

        Raises:
            MalformedManifest: the profile is another network's, or has a number that cannot be. ExitifyError: the name cannot be a file's.
        """
        check_name("profile", name)
        _check_profile(self, name, profile)  # as it is: what is not finite cannot be written
        changed = build_artifact(self.manifest, {**self.files, f"profiles/{name}.json": dumps(profile)})
        _check_profiles(changed)
        return changed

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the artifact: to a temporary file in the same folder, then renamed, so that a reader sees the old or the new.

        Raises:
            NotWritten: the file cannot be written; what stood there before is whole.
        """
        with written_whole(path) as stream:
            container.write(stream, {MANIFEST: dumps(self.manifest), **self.files})
        return Path(path)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Artifact:
        """Open an artifact and check all of it: container, hashes, manifest, plan, weights, profiles.

        Raises:
            ArtifactError: one child for each way in which it can be wrong; see FORMAT.md.
        """
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                buffer: Buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise ArtifactError(
                f"cannot open {path}: {error.strerror}", "give the path of a .exitify file; `exitify transform` writes one"
            ) from error
        try:
            return parse_artifact(buffer)
        except ArtifactError as error:
            raise type(error)(f"{path}: {error.problem}", error.hint) from error


def check_name(what: str, name: str) -> None:
    """Refuse a name that cannot be a file's.

    Raises:
        ExitifyError: it holds something other than letters, digits, `_`, `.`, `-`.
    """
    if not _FILE_NAME.fullmatch(name) or name == NO_PROFILE:
        raise ExitifyError(f"a {what} cannot be called {name!r}", "use up to 64 letters, digits, _, . and -")


def build_artifact(manifest: Manifest, files: Mapping[str, Buffer]) -> Artifact:
    """Return an artifact of these files, with their sizes and hashes and the model's identity in its manifest."""
    listed = {path: FileEntry(hashlib.sha256(data).hexdigest(), memoryview(data).nbytes) for path, data in files.items()}
    return Artifact(replace(manifest, files=listed, model_id=model_id(manifest.plan, listed)), dict(files))


def model_id(plan: Plan, files: Mapping[str, FileEntry]) -> str:
    """The identity to which profiles and device states bind: sha256 over the plan and the hashes of graphs and weights."""
    hashes = {path: entry.sha256 for path, entry in sorted(files.items()) if path.startswith("model/")}
    return hashlib.sha256(dumps({"plan": plan, "files": hashes})).hexdigest()


def parse_artifact(buffer: Buffer) -> Artifact:
    """Return the artifact in these bytes, checked (see `Artifact.open`)."""
    files: dict[str, memoryview] = container.read(buffer)
    if next(iter(files), "") != MANIFEST:
        raise NotAnArtifact(
            "the file is a zip, but its first file is not manifest.json", "`exitify transform MODEL -o net.exitify` writes an artifact"
        )
    manifest = _read_manifest(files.pop(MANIFEST))
    _check_files(manifest, files)
    artifact = Artifact(manifest, files)
    check_artifact(artifact)
    return artifact


def check_artifact(artifact: Artifact) -> None:
    """Hold plan, graphs, weights and profiles against each other.

    Raises:
        MalformedManifest: one of them contradicts another; see FORMAT.md.
    """
    _translate("the plan", artifact.plan.check)
    _translate("the input contract", artifact.manifest.input.check)
    _check_plan(artifact)
    _check_model(artifact)
    _check_profiles(artifact)
    _check_masks(artifact)
    _check_times(artifact)
    _check_memory(artifact)
    _check_targets(artifact)


def _read_manifest(data: memoryview) -> Manifest:
    if len(data) > LARGEST_RECORD:
        raise OversizedArtifact(f"{MANIFEST} has {len(data)} bytes, and may have {LARGEST_RECORD}", "do not use this file")
    document = _translate(MANIFEST, lambda: loads(bytes(data), MANIFEST))
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT or type(version) is not int:
        raise UnknownFormat(
            f"the artifact has format {version!r:.40}, and this release reads {FORMAT}",
            "install the exitify that wrote it, or transform the model again",
        )
    return _translate(MANIFEST, lambda: from_json(Manifest, document, MANIFEST))


def _check_files(manifest: Manifest, files: Mapping[str, memoryview]) -> None:
    for path, entry in manifest.files.items():
        if path not in files:
            raise MissingFile(f"the artifact lacks {path!r}, which its manifest lists", _AGAIN)
        if entry.bytes != len(files[path]) or entry.sha256 != hashlib.sha256(files[path]).hexdigest():
            raise AlteredFile(f"{path!r} in the artifact was altered: its sha256 is not the manifest's", _AGAIN)
    allowed = {WEIGHTS_FILE, HEADS_FILE, *model_paths(manifest.plan)}
    for path in files:
        if path not in manifest.files:
            raise ExtraFile(f"the artifact holds {path!r}, which its manifest does not list", "do not use this file")
        is_record = path.startswith(("profiles/", "times/")) and path.endswith(".json") and path.count("/") == 1
        is_compiled = (
            path.startswith("targets/") and path.count("/") == 2 and path.endswith(tuple(f"/{name}" for name in (*_TARGET_FILES, *_KERNEL_FILES)))
        )
        if path not in allowed and path not in (MASKS_FILE, MEMORY_FILE) and not is_record and not is_compiled:
            raise ExtraFile(f"the artifact holds {path!r}, which format {FORMAT} does not know", "do not use this file")
    for path in allowed:
        if path not in files:
            raise MissingFile(f"the artifact lacks {path!r}", _AGAIN)
    if manifest.model_id != model_id(manifest.plan, manifest.files):
        raise AlteredFile("the artifact's model_id is not that of its plan, graphs and weights", _AGAIN)


def _check_plan(artifact: Artifact) -> None:
    """What the runtime takes for granted, beyond `Plan.check`."""
    plan = artifact.plan
    for segment in plan.segments:
        if "/" in segment.name:
            raise MalformedManifest(f"the plan's segment {segment.name!r} has a / in its name", _AGAIN)
        counts = (segment.cost.macs, segment.cost.parameters, segment.cost.moved_bytes)
        if min(counts) < 0 or max(counts) >= 2**48:
            raise MalformedManifest(f"the plan's segment {segment.name!r} cannot cost {segment.cost}", _AGAIN)
    for name, value in plan.values.items():
        if value.dtype not in ELEMENT_TYPES or min(value.shape, default=1) < 1 or value.size_bytes > container.MOST_BYTES:
            raise MalformedManifest(f"the plan's value {name!r} cannot be {value.dtype} {str(value.shape)[:80]}", _AGAIN)
    made = {value for segment in plan.segments for value in segment.outputs}
    if plan.output not in made or len(plan.values[plan.output].shape) != 1:
        raise MalformedManifest(f"the plan's output {plan.output!r} is not the scores of some classes, computed by a segment", _AGAIN)
    heads = [segment for segment in plan.segments if segment.kind == "head" or segment.parameters]
    for point in plan.exits:
        moved = point.inputs, (point.logits, point.features, point.scores), (point.weight, point.bias, point.temperature)
        if [(head.inputs, head.outputs, head.parameters) for head in heads].count(moved) != 1:
            raise MalformedManifest(f"the plan has no head for exit {point.name!r}, with the inputs and outputs that FORMAT.md says", _AGAIN)
        if point.head.classes != plan.classes or point.head.shape != plan.values[point.after].shape:
            raise MalformedManifest(f"the head of exit {point.name!r} does not fit the value that it reads, or the number of classes", _AGAIN)
    gates = artifact.manifest.gates
    if gates and (
        set(gates) != {point.name for point in plan.exits} or any(len(g) != len(SCORES) + 1 or not np.isfinite(g).all() for g in gates.values())
    ):
        raise MalformedManifest(f"the manifest's gates are not {len(SCORES) + 1} finite numbers for each exit", _AGAIN)
    if len(heads) != len(plan.exits):
        raise MalformedManifest(f"the plan has {len(heads)} heads for {len(plan.exits)} exits", _AGAIN)
    for stretch in plan.stretches(plan.exit_names):
        if not stretch.segments:
            raise MalformedManifest(f"in the plan nothing is left to run for exit {stretch.exit!r}: one before it needs it", _AGAIN)
    value = plan.values[plan.input]
    if (value.shape, value.dtype) != (artifact.manifest.input.shape, artifact.manifest.input.dtype):
        raise MalformedManifest("the input contract and the plan describe different inputs", _AGAIN)


def _check_model(artifact: Artifact) -> None:
    """Every graph has the plan's inputs and outputs, every tensor outside is where the weights have it, every head has its shape."""
    plan = artifact.plan
    spans = {path: tensor_spans(memoryview(artifact.files[path]), path) for path in (WEIGHTS_FILE, HEADS_FILE)}
    looks: dict[str, Value] = {**plan.values, **parameter_values(plan)}
    first = {segment.name: artifact.graph(segment.name) for segment in plan.segments}
    second = {segment.name: artifact.graph(segment.name, {segment.follows}) for segment in plan.segments if segment.follows}
    stored = [(segment, False) for segment in plan.segments] + [(segment, True) for segment in plan.segments if segment.has_two_norm_sets]
    for segment, is_second in stored:
        where, graph = graph_path(segment.name, second=is_second), (second if is_second else first)[segment.name]
        reads, writes = (*segment.inputs, *segment.parameters), segment.outputs
        for found, names in ((graph.inputs, reads), (graph.outputs, writes)):
            if found != {name: value_info(name, looks[name]) for name in names}:
                raise MalformedManifest(f"{where} does not have the inputs and outputs that the plan names", _AGAIN)
        for name, external in graph.external.items():
            span = spans.get(f"model/{external.location}", {}).get(name)
            expected = (np.dtype(external.dtype), external.shape, external.offset, external.offset + external.length)
            if span != expected:
                raise MalformedManifest(f"{where} reads {name!r} from {external.location!r}, where the artifact has no such tensor", _AGAIN)
    merge(first.values(), "the model")
    # Two graphs meet under some mask only if they meet under one of these: nothing left out, everything, or one path.
    every = {path.name for path in plan.skips}
    for what, skipped in (("every skip path", every), *((name, {name}) for name in every)):
        merge([(second if s.follows in skipped else first)[s.name] for s in plan.segments], f"the model with {what} left out")
    for point in plan.exits:
        for name in (point.weight, point.bias):
            span = spans[HEADS_FILE].get(name)
            if span is None or span[:2] != (np.dtype(looks[name].dtype), looks[name].shape):
                raise MalformedManifest(f"{HEADS_FILE} lacks {name!r} as {looks[name].dtype} {looks[name].shape}", _AGAIN)


def model_paths(plan: Plan) -> list[str]:
    """Where the graphs of all segments stand, second sets of norms included."""
    first = [graph_path(segment.name) for segment in plan.segments]
    return first + [graph_path(segment.name, second=True) for segment in plan.segments if segment.has_two_norm_sets]


def parameter_values(plan: Plan) -> dict[str, Parameter]:
    """What the tensors look like that heads take as inputs."""
    values: dict[str, Parameter] = {}
    for point in plan.exits:
        values[point.weight] = Parameter((point.head.classes, point.head.features), "float32")
        values[point.bias] = Parameter((point.head.classes,), "float32")
        values[point.temperature] = Parameter((), "float32")
    return values


def _check_profiles(artifact: Artifact) -> None:
    for name, profile in artifact.profiles.items():
        _translate("a profile", functools.partial(check_name, "profile", name))
        _check_profile(artifact, name, profile)


def _check_profile(artifact: Artifact, name: str, profile: Profile) -> None:
    if set(profile.exits) != {point.name for point in artifact.plan.exits} or profile.model_id != artifact.manifest.model_id:
        raise MalformedManifest(f"profile {name!r} was made for another network", _CALIBRATE_AGAIN)
    if not _is_mask(artifact.plan, profile.skip):
        raise MalformedManifest(f"profile {name!r} has the mask {profile.skip[:80]!r}, which is none of this network", _AGAIN)
    for temperature in (profile.final_temperature, *(setting.temperature for setting in profile.exits.values())):
        if not LEAST_TEMPERATURE <= temperature <= MOST_TEMPERATURE:
            raise MalformedManifest(
                f"profile {name!r} has a temperature of {temperature}, not one from {LEAST_TEMPERATURE} to {MOST_TEMPERATURE}", _CALIBRATE_AGAIN
            )
    for exit_name, setting in profile.exits.items():
        problem = setting_problem(setting, profile.policy)
        if problem:
            raise MalformedManifest(f"profile {name!r} has {problem} at {exit_name}", _CALIBRATE_AGAIN)
    errors = profile.calibration_errors
    if set(errors) not in (set(), set(artifact.plan.exit_names)) or not all(
        len(pair) == 2 and all(0 <= e <= 1 for e in pair) for pair in errors.values()
    ):
        raise MalformedManifest(
            f"profile {name!r} has calibration errors that are not two numbers from 0 to 1 for each exit and final", _CALIBRATE_AGAIN
        )
    sets = profile.conformal
    if sets is None:
        return
    if not 0 < sets.alpha < 1 or sets.samples < 1:
        raise MalformedManifest(f"profile {name!r} has sets for alpha {sets.alpha} from {sets.samples} samples", _CALIBRATE_AGAIN)
    if set(sets.quantiles) != set(artifact.plan.exit_names):
        raise MalformedManifest(f"profile {name!r} has quantiles for {', '.join(sets.quantiles)[:80]}, not for each exit and final", _CALIBRATE_AGAIN)
    for exit_name, quantile in sets.quantiles.items():
        if not 0 <= quantile <= 1:
            raise MalformedManifest(f"profile {name!r} has a quantile of {quantile} at {exit_name}, not one from 0 to 1", _CALIBRATE_AGAIN)


def setting_problem(setting: ExitSetting, policy: Policy) -> str:
    """Why an exit cannot decide so under a policy; empty where it can."""
    if not math.isfinite(setting.threshold):
        return f"a threshold of {setting.threshold}"
    if len(setting.gate) not in (0, len(SCORES) + 1) or not all(abs(weight) < 1e300 for weight in setting.gate):
        return f"a gate of {len(setting.gate)} numbers, not of {len(SCORES) + 1} finite ones,"
    if setting.enabled and not setting.gate and policy in ("gates", "jei"):
        return f"the policy {policy} and no gate"
    return ""


def _is_mask(plan: Plan, text: str) -> bool:
    return len(text) == len(plan.skips) and not set(text) - {"0", "1"}


def _check_masks(artifact: Artifact) -> None:
    table = artifact.masks
    if table is None:
        return
    if table.model_id != artifact.manifest.model_id:
        raise MalformedManifest(f"{MASKS_FILE} was measured on another network", "calibrate again: `exitify calibrate --budget-ms`")
    for mask in table.masks:
        if not _is_mask(artifact.plan, mask):
            raise MalformedManifest(f"{MASKS_FILE} has the mask {mask[:80]!r}, which is none of this network", _AGAIN)
    if not table.masks or min(measured.ms for measured in table.masks.values()) <= 0:
        raise MalformedManifest(f"{MASKS_FILE} has no masks, or one that takes no time", _AGAIN)


def _check_memory(artifact: Artifact) -> None:
    _translate(MEMORY_FILE, lambda: artifact.memory)


def _check_times(artifact: Artifact) -> None:
    segments = {segment.name for segment in artifact.plan.segments}
    for name, times in artifact.times.items():
        _translate("times", functools.partial(check_name, "record of times", name))
        if times.model_id != artifact.manifest.model_id or set(times.segments) != segments:
            raise MalformedManifest(f"the times {name!r} were measured on another network", "measure again: `exitify measure`")
        if not 0 < min(times.whole_ms, *times.segments.values()) <= max(times.whole_ms, *times.segments.values()) < LONGEST_MS:
            raise MalformedManifest(f"the times {name!r} have a segment that takes no time, or more than an hour", _AGAIN)


def _check_targets(artifact: Artifact) -> None:
    """Each target has its files, and they fit each other. Whether a library fits the model and the machine, its engine says."""
    folders = {path.split("/")[1] for path in artifact.files if path.startswith("targets/")}
    for name in sorted(folders):
        for file in _TARGET_FILES:
            if target_path(name, file) not in artifact.files:
                raise MissingFile(f"the artifact lacks {target_path(name, file)!r}", _AGAIN)
    known = {segment.name for segment in artifact.plan.segments}
    for name, compiled in artifact.targets.items():
        _translate("a target", functools.partial(check_name, "target", name))
        if compiled.target != name or target_name(compiled.board, on_gpu=compiled.gpu is not None, precision=compiled.precision) != name:
            raise MalformedManifest(f"the library for {name!r} says that it is for {compiled.target[:80]!r}", _AGAIN)
        for file in _KERNEL_FILES:
            if (target_path(name, file) in artifact.files) != (compiled.gpu is not None):
                raise MalformedManifest(f"the library for {name!r} has kernels for a GPU and names none, or the other way round", _AGAIN)
        if compiled.gpu is not None and not _MARK.fullmatch(compiled.gpu.mark):
            raise MalformedManifest(f"the library for {name!r} has the mark {compiled.gpu.mark[:80]!r}", _AGAIN)
        if compiled.gpu is not None and not (
            _ARCHITECTURE.fullmatch(compiled.gpu.architecture) and _VERSION.fullmatch(compiled.gpu.ptx) and _VERSION.fullmatch(compiled.gpu.compiler)
        ):
            raise MalformedManifest(f"the library for {name!r} is for no GPU, PTX and CUDA that there can be", _AGAIN)
        for word in (compiled.triple, compiled.cpu, *compiled.features, compiled.tvm, compiled.tvm_ffi):
            if not _WORD.fullmatch(word):  # they stand in messages, one of them in a command to copy
                raise MalformedManifest(f"the library for {name!r} names {word[:80]!r} as a part of its machine or of TVM", _AGAIN)
        if not set(compiled.segments) <= known or (not compiled.left_to and set(compiled.segments) != known):
            raise MalformedManifest(f"the library for {name!r} was compiled for other segments", "compile again: `exitify compile`")
        for kernel, tuned in compiled.kernels.items():
            if not _is_found(tuned):
                raise MalformedManifest(f"the library for {name!r} has the kernel {kernel[:80]!r} tuned as no search does it", _AGAIN)
        if not set(compiled.in_blocks) <= artifact.plan.maps_between(compiled.segments) or (compiled.block > 0) != bool(compiled.in_blocks):
            raise MalformedManifest(f"the library for {name!r} keeps other values in blocks of channels than it can", _AGAIN)
        for segment, made in compiled.segments.items():
            expected = len(made.weights) if artifact.plan.segment(segment).has_two_norm_sets else 0
            if list(made.batches) != sorted(set(made.batches)) or min(made.batches, default=2) < 2:
                raise MalformedManifest(f"the library for {name!r} has {segment!r} for batches of {list(made.batches)}", _AGAIN)
            if len(made.second_weights) != expected:
                raise MalformedManifest(f"the library for {name!r} does not give {segment!r} weights for each of its sets of norms", _AGAIN)
        path = target_path(name, "weights.safetensors")
        listed = [weight for segment in compiled.segments.values() for weight in {*segment.weights, *segment.second_weights}]
        if sorted(listed) != sorted(tensor_spans(memoryview(artifact.files[path]), path)):
            raise MalformedManifest(f"{path} does not hold the tensors that the library for {name!r} takes", _AGAIN)


def _is_found(tuned: TunedKernel) -> bool:
    """Whether a search can have gone so: trials go up, and times down from the default's."""
    trials, times = [at for at, _ in tuned.history], [ms for _, ms in tuned.history]
    return (
        min(tuned.calls, tuned.trials, len(trials)) >= 1
        and trials == sorted(set(trials))
        and 1 <= trials[0] <= trials[-1] <= tuned.trials
        and times == sorted(set(times), reverse=True)
        and 0 < times[-1] <= tuned.chosen_ms <= times[0] < LONGEST_MS
    )


def _read_record(kind: type[T], data: Buffer, where: str) -> T:
    if memoryview(data).nbytes > LARGEST_RECORD:
        raise OversizedArtifact(f"{where} has {memoryview(data).nbytes} bytes, and may have {LARGEST_RECORD}", "do not use this file")
    return _translate(where, lambda: from_json(kind, loads(bytes(data), where), where))


def _translate(where: str, work: Callable[[], T]) -> T:
    """What `work` returns; its errors become the artifact's."""
    try:
        return work()
    except ArtifactError:
        raise
    except ExitifyError as error:
        problem = error.problem if where in error.problem else f"{where}: {error.problem}"
        raise MalformedManifest(problem, error.hint or _AGAIN) from error
