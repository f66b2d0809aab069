"""Every error a user can cause, in one family: what is wrong, with value and place, then the way out."""

from __future__ import annotations


class ExitifyError(Exception):
    """Something the user can mend. The command line prints it in two lines and exits with 1.

    Args:
        problem: What is wrong, with the offending value and where it stands.
        hint: What to do about it.
    """

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}\n  hint: {self.hint}" if self.hint else self.problem


class ModelError(ExitifyError):
    """The model cannot be found, loaded, trusted or traced."""


class PlanError(ExitifyError):
    """An exit, a skip path or a segment does not fit the network."""


class DataError(ExitifyError):
    """Images, labels or an input array are not what the network reads."""


class CalibrationError(ExitifyError):
    """A promise cannot be computed from the samples given."""


class EngineError(ExitifyError):
    """The engine that should run the segments is missing or refuses them."""


class LibraryRefused(EngineError):
    """A compiled library does not fit the artifact, this machine or this TVM; it is refused before it is loaded."""


class RecordError(ExitifyError):
    """A JSON document does not have the fields and types its format names."""


class ArtifactError(ExitifyError):
    """An artifact is not whole, not ours, or not of a version this release reads. Its children name the clause."""


class NotAnArtifact(ArtifactError):
    """The file is no exitify artifact, or its container was altered (FORMAT.md, Container)."""


class TruncatedArtifact(ArtifactError):
    """The file ends before its directory says it does."""


class UnknownFormat(ArtifactError):
    """The format version is one that this release does not read."""


class UnsafePath(ArtifactError):
    """A file name in the container is absolute, leaves the folder, or is not canonical."""


class OversizedArtifact(ArtifactError):
    """A file in the container, or their number, is over the limit."""


class AlteredFile(ArtifactError):
    """A file's bytes do not have the hash that the manifest lists."""


class MissingFile(ArtifactError):
    """The manifest lists a file that the container lacks."""


class ExtraFile(ArtifactError):
    """The container holds a file that the manifest does not list."""


class MalformedManifest(ArtifactError):
    """The manifest, the plan, a profile or a graph is not well-formed or contradicts itself."""


class UnknownProfile(ExitifyError):
    """No profile has that name."""


class StateError(ExitifyError):
    """What a device has learnt cannot be read, or belongs to another artifact; the session goes on without it."""


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error, or its type when it says nothing, for a message of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def one_line(error: BaseException) -> str:
    """The type and the first line of somebody else's error."""
    said = first_line(error)
    return said if said == type(error).__name__ else f"{type(error).__name__}: {said}"
