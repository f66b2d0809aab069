"""A video, answered as a stream and frame by frame: what was held, where frames stopped, what it costs, how often the answers differ.

python -m examples.video.run digits.exitify
python -m examples.video.run net.exitify --frames PICTURES/ (or frames.npy, film.mp4, camera:0) --hold 0.9

Without --frames: scikit-learn's scans of digits that the digits example did not train on, each in sight for a second, drifting, in changing
light, with a camera's noise. Films and cameras are read by OpenCV (pip install opencv-python-headless). No torch.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from examples.video.digits import scenes
from exitify import Answer, ExitifyError, Session
from exitify.artifact.manifest import InputContract
from exitify.errors import DataError, ModelError, one_line
from exitify.pictures import picture_suffixes, picture_to_input
from exitify.plan import Plan

Frame = NDArray[Any]
"""What `Session.run` takes: a picture, uint8 `(H, W, C)`, or an input that is ready."""


@dataclass(frozen=True)
class Watched:
    """Both answers to every frame, in order."""

    streamed: tuple[Answer, ...]
    alone: tuple[Answer, ...]


def watch(session: Session, frames: Iterable[Frame], hold: float, every: int = 30) -> Watched:
    """Answer every frame twice: as one of a stream, and by itself under the same profile.

    Args:
        frames: In order.
        hold, every: See `Session.stream`.

    Raises:
        DataError: there are no frames, or one that the network does not read; `hold` or `every` is out of range.
    """
    stream = session.stream(hold=hold, every=every)
    pairs = [(stream.run(frame), session.run(frame)) for frame in frames]
    if not pairs:
        raise DataError("there are no frames", "give a film that has some")
    return Watched(tuple(streamed for streamed, _ in pairs), tuple(alone for _, alone in pairs))


def frames_of(source: str, contract: InputContract) -> Iterator[Frame]:
    """The frames of a folder of pictures (by their names), of an array `(N, ...)` in a .npy, of a film, or of a camera (`camera:0`).

    Raises:
        DataError: there is nothing of that name, or it cannot be read. ModelError: it takes OpenCV, which is not installed.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in picture_suffixes())
        if not files:
            raise DataError(f"{path} holds no pictures", "give a folder of frames, named so that they sort in time")
        return (picture_to_input(file, contract) for file in files)
    if path.suffix == ".npy" and path.is_file():
        try:
            frames = np.lib.format.open_memmap(path, mode="r")
        except ValueError as error:
            raise DataError(f"{path} is no array of frames: {one_line(error)}", "write it with numpy.save, without objects") from error
        return iter(np.atleast_1d(np.asarray(frames)))
    if source.startswith("camera:") or path.is_file():
        return _filmed(source, contract)
    raise DataError(f"there is no folder, .npy or film {source}", "give one, or camera:0; relative paths start in the current directory")


def _filmed(source: str, contract: InputContract) -> Iterator[Frame]:
    try:
        import cv2
    except ImportError as error:
        raise ModelError(f"{source} is read by OpenCV, which is not installed", "pip install opencv-python-headless") from error
    kind, _, number = source.partition(":")
    capture = cv2.VideoCapture(int(number) if kind == "camera" and number.isdigit() else source)
    try:
        if not capture.isOpened():
            raise DataError(f"OpenCV cannot open {source}", "give a film that it plays, or camera:0 for the first camera")
        while True:
            there, pixels = capture.read()
            if not there:
                return
            yield cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    finally:
        capture.release()


def report(watched: Watched, plan: Plan) -> None:
    """Print where frames stopped, and what that costs against answering each by itself."""
    count = len(watched.streamed)
    streamed = Counter((answer.exit, answer.held) for answer in watched.streamed)
    alone = Counter(answer.exit for answer in watched.alone)
    table = Table(title=f"{count} frames, by the exit that each stopped at", title_justify="left")
    for column in ("", "held", "answered", "frame by frame"):
        table.add_column(column, justify="left" if not column else "right")
    for name in plan.exit_names:
        table.add_row(name, *(str(number) for number in (streamed[name, True], streamed[name, False], alone[name])))
    Console(width=100).print(table)
    macs, macs_alone = (np.mean([answer.macs for answer in answers]) / plan.full_macs for answers in (watched.streamed, watched.alone))
    ms, ms_alone = (np.mean([answer.ms for answer in answers]) for answers in (watched.streamed, watched.alone))
    held = sum(answer.held for answer in watched.streamed)
    differ = sum(one.label != other.label for one, other in zip(watched.streamed, watched.alone))
    print(f"Held: {held / count:.1%} of the frames.")
    print(f"Mean cost: {macs:.1%} of the network's multiply-adds, frame by frame {macs_alone:.1%}.")
    print(f"Mean time: {ms:.3f} ms, frame by frame {ms_alone:.3f} ms.")
    print(f"Other answers than frame by frame: {differ / count:.1%}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--frames", help="a folder of pictures, a .npy, a film, camera:0")
    parser.add_argument("--most", type=int, default=600, help="frames to answer")
    parser.add_argument("--hold", type=float, default=0.95, help="least similarity at which an answer holds, 0 to 1")
    parser.add_argument("--every", type=int, default=30, help="after so many held frames the whole network answers one")
    parser.add_argument("--profile", help="by default the one called default, if there is one; none takes no exit of its own")
    options = parser.parse_args()
    try:
        session = Session.load(options.artifact, profile=options.profile)
        frames = scenes(session.contract) if options.frames is None else frames_of(options.frames, session.contract)
        watched = watch(session, itertools.islice(frames, options.most), options.hold, options.every)
        report(watched, session.artifact.plan)
    except ExitifyError as error:
        raise SystemExit(f"exitify: {error}") from error


if __name__ == "__main__":
    main()
