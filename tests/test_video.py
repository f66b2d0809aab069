"""The example of a video holds the answers of real digits that change slowly, at the cost it says, and reads frames from where it says."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sklearn", reason="scikit-learn's digits are the examples' data: pip install -e '.[demo]'")

from examples.video import digits
from examples.video.run import frames_of, main, watch
from exitify import ExitifyError, Session
from exitify.pictures import prepare_pictures
from tests.artifacts import with_contract
from tests.example_artifact import example_artifact

ROOT = Path(__file__).parent.parent
README = (ROOT / "examples" / "video" / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
CONTRACT = example_artifact().manifest.input


def film(count: int) -> list[np.ndarray]:
    return list(itertools.islice(digits.scenes(CONTRACT), count))


# --- the stream ------------------------------------------------------------------------------------------------------------


def test_a_frame_is_held_within_a_digits_scene_and_never_across_two_of_different_digits() -> None:
    count = 20
    watched = watch(Session(example_artifact(), profile="none"), film(count * digits.FRAMES), hold=0.9)
    held = np.array([answer.held for answer in watched.streamed]).reshape(count, digits.FRAMES)
    alone = np.array([answer.label for answer in watched.alone]).reshape(count, digits.FRAMES)
    streamed = np.array([answer.label for answer in watched.streamed]).reshape(count, digits.FRAMES)
    assert held[:, 1:].mean() > 0.8
    changes = alone[1:, 0] != alone[:-1, -1]
    assert changes.sum() > 10
    assert not held[1:, 0][changes].any()
    assert (streamed == alone).mean() > 0.95


def test_against_the_whole_network_held_frames_cost_what_their_exit_costs() -> None:
    session = Session(example_artifact(), profile="none")
    plan = session.artifact.plan
    watched = watch(session, film(90), hold=0.9)
    assert {answer.macs for answer in watched.alone} == {plan.full_macs}
    reached = plan.macs_at([point.name for point in plan.exits])
    assert all(answer.macs == reached[answer.exit] for answer in watched.streamed)
    assert sum(answer.macs for answer in watched.streamed) < sum(answer.macs for answer in watched.alone) / 2


def test_nothing_is_held_at_a_similarity_that_noise_never_reaches() -> None:
    """The tests above would hold of a film in which nothing moves."""
    watched = watch(Session(example_artifact(), profile="none"), film(60), hold=1.0)
    assert not any(answer.held for answer in watched.streamed)
    assert [answer.label for answer in watched.streamed] == [answer.label for answer in watched.alone]


def test_the_films_digits_are_none_that_the_digits_example_trains_or_calibrates_on(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    from examples.digits import run

    made = run.digits(tmp_path)
    order = np.random.default_rng(0).permutation(len(load_digits().images))
    assert len(made["train"]) + len(made["calibrate"]) == digits.FIRST
    np.testing.assert_array_equal(made["judge"].labels, load_digits().target[order[digits.FIRST :]])


def test_frames_follow_each_other_closely_and_digits_do_not() -> None:
    frames = np.stack(film(5 * digits.FRAMES)).astype(np.float64)
    assert frames.shape[1:] == (16, 16, 1)
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    cuts = np.arange(1, 5) * digits.FRAMES - 1
    assert np.delete(steps, cuts).max() < steps[cuts].min()


# --- where frames come from ------------------------------------------------------------------------------------------------


def test_a_folder_and_an_array_give_the_frames_that_are_in_them(tmp_path: Path) -> None:
    pixels = np.stack(film(12))
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in reversed(list(enumerate(pixels))):
        Image.fromarray(frame[..., 0]).save(folder / f"{number:04}.png")
    (folder / "notes.txt").write_text("no frame")
    np.save(tmp_path / "frames.npy", pixels)
    ready = prepare_pictures(pixels, CONTRACT)
    np.testing.assert_array_equal(np.stack(list(frames_of(str(folder), CONTRACT))), ready)
    np.testing.assert_array_equal(np.stack(list(frames_of(str(tmp_path / "frames.npy"), CONTRACT))), pixels)
    session = Session(example_artifact())
    told = [
        [answer.label for answer in watch(session, frames_of(str(tmp_path / name), CONTRACT), hold=0.95).streamed] for name in os.listdir(tmp_path)
    ]
    assert told[0] == told[1]


class Capture:
    """As OpenCV's `VideoCapture`: three frames, blue above all."""

    opened: object = None
    released = 0

    def __init__(self, source: object) -> None:
        Capture.opened, self.left = source, 3

    def isOpened(self) -> bool:
        return self.opened != 7

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.left -= 1
        return (True, np.array([[[200, 100, 50]]], np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        Capture.released += 1


def test_a_camera_is_opened_by_its_number_its_colours_are_put_in_order_and_it_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    opencv = SimpleNamespace(VideoCapture=Capture, COLOR_BGR2RGB=4, cvtColor=lambda pixels, code: pixels[..., ::-1] if code == 4 else None)
    monkeypatch.setitem(sys.modules, "cv2", opencv)
    monkeypatch.setattr(Capture, "released", 0)
    frames = list(frames_of("camera:2", CONTRACT))
    assert (Capture.opened, Capture.released, len(frames)) == (2, 1, 3)
    np.testing.assert_array_equal(frames[0], [[[50, 100, 200]]])
    with pytest.raises(ExitifyError, match="OpenCV cannot open camera:7"):
        next(frames_of("camera:7", CONTRACT))
    assert Capture.released == 2


def test_a_film_is_read_by_opencv(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"MJPG"), 30, (32, 32))
    for _ in range(5):
        writer.write(np.full((32, 32, 3), (200, 100, 50), np.uint8))
    writer.release()
    frames = list(frames_of(path, CONTRACT))
    assert len(frames) == 5
    np.testing.assert_allclose(frames[0].mean(axis=(0, 1)), (50, 100, 200), atol=4)


def test_without_opencv_a_film_is_refused_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "film.mp4").write_bytes(b"film")
    with pytest.raises(ExitifyError, match=r"is read by OpenCV, which is not installed\n  hint: pip install opencv-python-headless"):
        next(frames_of(str(tmp_path / "film.mp4"), CONTRACT))


def test_what_holds_no_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExitifyError, match=r"there is no folder, \.npy or film nowhere"):
        frames_of("nowhere", CONTRACT)
    with pytest.raises(ExitifyError, match="holds no pictures"):
        frames_of(str(tmp_path), CONTRACT)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "several", x=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    for name in ("objects.npy", "several.npy"):
        with pytest.raises(ExitifyError, match=r"is no array of frames"):
            frames_of(str(tmp_path / name), CONTRACT)
    with pytest.raises(ExitifyError, match="there are no frames"):
        watch(Session(example_artifact()), [], hold=0.9)
    with pytest.raises(ExitifyError, match="pictures cannot become inputs"):
        next(digits.scenes(with_contract(example_artifact(), preprocess=None).manifest.input))


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_a_command_of_the_readme_says_what_was_held_and_what_it_costs_without_torch(command: str, tmp_path: Path) -> None:
    """The first, which tests/test_examples.py runs, is spared: its artifact stands there."""
    assert COMMANDS[0] == "python -m examples.digits.run"
    example_artifact().save(tmp_path / "digits.exitify")
    module, *arguments = command.split()[2:]
    start = (
        f"import runpy, sys; sys.argv = {[module, *arguments]}; runpy.run_module({module!r}, run_name='__main__'); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "600 frames" in done.stdout
    held, cost, alone, differ = (
        float(number)
        for number in re.search(
            r"Held: ([\d.]+)% .*Mean cost: ([\d.]+)% .* frame by frame ([\d.]+)%.*Other answers than frame by frame: ([\d.]+)%",
            done.stdout,
            re.DOTALL,
        ).groups()
    )
    assert held > 70
    assert cost < alone
    assert differ < 15
    if "none" in command:
        assert alone == 100


def test_what_cannot_be_is_said_in_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = str(example_artifact().save(tmp_path / "digits.exitify"))
    for arguments, problem in (
        (["nowhere.exitify"], "cannot open nowhere.exitify"),
        ([artifact, "--hold", "2"], "a similarity of 2.0 is none"),
        ([artifact, "--frames", "nowhere"], "there is no folder"),
        ([artifact, "--profile", "fast"], "no profile 'fast'"),
    ):
        monkeypatch.setattr(sys, "argv", ["run", *arguments])
        with pytest.raises(SystemExit, match=rf"exitify: .*{problem}.*\n  hint: "):
            main()
