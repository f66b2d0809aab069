"""The artifact: one file with plan, graphs, weights and profiles. Opening and inspecting it executes nothing."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from exitify.artifact import container
from exitify.artifact.container import Buffer
from exitify.artifact.manifest import FORMAT, FileEntry, Manifest, Profile
from exitify.artifact.onnx_graph import Segment, parse
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
from exitify.plan import Plan
from exitify.records import dumps, from_json, loads

MANIFEST = "manifest.json"
WEIGHTS = "model/weights.safetensors"
HEADS = "model/heads.safetensors"
LARGEST_RECORD = 16 * 2**20
"""Most bytes of the manifest, and of a profile."""

_PROFILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
T = TypeVar("T")


def graph_path(segment: str) -> str:
    """Where a segment's ONNX model stands in the container."""
    return f"model/{segment}.onnx"


@dataclass(frozen=True)
class Artifact:
    """A network with its exits, as stored. Frozen: each change returns a new one.

    Attributes:
        manifest: What it says of itself.
        files: Everything else, by path; views into the file it was opened from.
    """

    manifest: Manifest
    files: Mapping[str, Buffer]

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

    def tensors(self, path: str) -> dict[str, NDArray[np.generic]]:
        """The tensors of `WEIGHTS` or `HEADS`, read in place."""
        return read_tensors(memoryview(self.files[path]), path)

    def graph(self, segment: str) -> Segment:
        """A segment's ONNX graph."""
        path = graph_path(segment)
        return parse(bytes(self.files[path]), path)

    def with_profile(self, name: str, profile: Profile) -> Artifact:
        """The same artifact with this profile added, or put in place of the one of that name."""
        check_profile_name(name)
        return build_artifact(self.manifest, {**self.files, f"profiles/{name}.json": dumps(profile)})

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


def check_profile_name(name: str) -> None:
    """Refuse a name that cannot be a file's.

    Raises:
        ExitifyError: it holds something other than letters, digits, `_`, `.`, `-`.
    """
    if not _PROFILE_NAME.fullmatch(name):
        raise ExitifyError(f"a profile cannot be called {name!r}", "use up to 64 letters, digits, _, . and -")


def build_artifact(manifest: Manifest, files: Mapping[str, Buffer]) -> Artifact:
    """Return an artifact of these files, with their sizes and hashes and the model's identity in its manifest."""
    listed = {path: FileEntry(hashlib.sha256(data).hexdigest(), memoryview(data).nbytes) for path, data in files.items()}
    return Artifact(replace(manifest, files=listed, model_id=model_id(manifest.plan, listed)), dict(files))


def model_id(plan: Plan, files: Mapping[str, FileEntry]) -> str:
    """The identity to which profiles, targets and device states bind: sha256 over the plan and the hashes of graphs and weights."""
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
    _translate("the plan", manifest.plan.check)
    _translate("the input contract", manifest.input.check)
    _check_model(artifact)
    _check_profiles(artifact)
    return artifact


def _read_manifest(data: memoryview) -> Manifest:
    if len(data) > LARGEST_RECORD:
        raise OversizedArtifact(f"{MANIFEST} has {len(data)} bytes, and may have {LARGEST_RECORD}")
    document = _translate(MANIFEST, lambda: loads(bytes(data), MANIFEST))
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT or type(version) is not int:
        raise UnknownFormat(
            f"the artifact has format {version!r}, and this release reads {FORMAT}", "install the exitify that wrote it, or transform the model again"
        )
    return _translate(MANIFEST, lambda: from_json(Manifest, document, MANIFEST))


def _check_files(manifest: Manifest, files: Mapping[str, memoryview]) -> None:
    for path, entry in manifest.files.items():
        if path not in files:
            raise MissingFile(f"the artifact lacks {path!r}, which its manifest lists", "get the artifact again")
        if entry.bytes != len(files[path]) or entry.sha256 != hashlib.sha256(files[path]).hexdigest():
            raise AlteredFile(f"{path!r} in the artifact was altered: its sha256 is not the manifest's", "get the artifact again")
    allowed = {WEIGHTS, HEADS, *(graph_path(segment.name) for segment in manifest.plan.segments)}
    for path in files:
        if path not in manifest.files:
            raise ExtraFile(f"the artifact holds {path!r}, which its manifest does not list", "do not use this file")
        is_profile = path.startswith("profiles/") and path.endswith(".json") and path.count("/") == 1
        if path not in allowed and not is_profile:
            raise ExtraFile(f"the artifact holds {path!r}, which format {FORMAT} does not know", "do not use this file")
    for path in allowed:
        if path not in files:
            raise MissingFile(f"the artifact lacks {path!r}", "get the artifact again")
    if manifest.model_id != model_id(manifest.plan, manifest.files):
        raise AlteredFile("the artifact's model_id is not that of its plan, graphs and weights", "get the artifact again")


def _check_model(artifact: Artifact) -> None:
    """Every graph has the plan's inputs and outputs, every tensor outside is where the weights have it, every head has its shape."""
    spans = {path: tensor_spans(memoryview(artifact.files[path]), path) for path in (WEIGHTS, HEADS)}
    for segment in artifact.plan.segments:
        where = graph_path(segment.name)
        graph = artifact.graph(segment.name)
        if set(graph.inputs) != {*segment.inputs, *segment.parameters} or set(graph.outputs) != set(segment.outputs):
            raise MalformedManifest(f"{where} does not have the inputs and outputs that the plan names")
        for name, external in graph.external.items():
            span = spans.get(f"model/{external.location}", {}).get(name)
            if span is None or span[2:] != (external.offset, external.offset + external.length):
                raise MalformedManifest(f"{where} reads {name!r} from {external.location!r}, where the artifact has no such tensor")
    for point in artifact.plan.exits:
        expected = {point.weight: (point.head.classes, point.head.width), point.bias: (point.head.classes,)}
        for name, shape in expected.items():
            span = spans[HEADS].get(name)
            if span is None or span[:2] != (np.dtype(np.float32), shape):
                raise MalformedManifest(f"{HEADS} lacks {name!r} as float32 {shape}")
    value = artifact.plan.values[artifact.plan.input]
    if (value.shape, value.dtype) != (artifact.manifest.input.shape, artifact.manifest.input.dtype):
        raise MalformedManifest("the input contract and the plan describe different inputs")


def _check_profiles(artifact: Artifact) -> None:
    exits = {point.name for point in artifact.plan.exits}
    for name, profile in artifact.profiles.items():
        if not _PROFILE_NAME.fullmatch(name) or set(profile.exits) != exits or profile.model_id != artifact.manifest.model_id:
            raise MalformedManifest(f"profile {name!r} was made for another network", "calibrate again: `exitify calibrate`")
        temperatures = [profile.final_temperature, *(setting.temperature for setting in profile.exits.values())]
        if min(temperatures) <= 0:
            raise MalformedManifest(
                f"profile {name!r} has a temperature of {min(temperatures)}, and it must be above 0", "calibrate again: `exitify calibrate`"
            )


def _read_record(kind: type[T], data: Buffer, where: str) -> T:
    if memoryview(data).nbytes > LARGEST_RECORD:
        raise OversizedArtifact(f"{where} has {memoryview(data).nbytes} bytes, and may have {LARGEST_RECORD}")
    return _translate(where, lambda: from_json(kind, loads(bytes(data), where), where))


def _translate(where: str, work: Callable[[], T]) -> T:
    """What `work` returns; its errors become the artifact's."""
    try:
        return work()
    except ArtifactError:
        raise
    except ExitifyError as error:
        problem = error.problem if where in error.problem else f"{where}: {error.problem}"
        raise MalformedManifest(problem, error.hint or "get the artifact again") from error
