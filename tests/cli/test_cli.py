"""The command line: the whole way from a network to answers, exit codes, and what is refused."""

from __future__ import annotations

import functools
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from exitify.artifact import container
from exitify.artifact.artifact import WEIGHTS_FILE, Artifact
from exitify.benchmark import compare as benchmark
from exitify.board.power import find_rails, measure
from exitify.cli import app
from exitify.pictures import pixels_to_inputs
from exitify.runtime.session import Session
from exitify.train import heads as training
from tests import digits, digits_net
from tests.board import sysfs
from tests.cli.console import BUFFERED, COMMAND, Done, contents, exitify, process, refused

MODEL = ("digits_net:build", "--weights", "weights.safetensors")
PLACES = ("--exits", "stage2,stage3", "--head", "conv")
TRAINING = ("--data", "train.npz", "--epochs", 10, "--copies", 1, "--learning-rate", 0.2, "--threads", 1)


def fill(folder: Path) -> Path:
    """A user's folder: a model, its weights, data, and inputs to answer."""
    shutil.copy(digits_net.__file__, folder / "digits_net.py")
    safetensors.torch.save_file(digits.network().state_dict(), folder / "weights.safetensors")
    for part in ("train", "calibration", "test"):
        digits.write_npz(folder / f"{part}.npz", part)
    np.save(folder / "x.npy", digits.samples_of("test").inputs(slice(0, 20)))
    Image.fromarray(digits.pictures()["test"][0][0, :, :, 0]).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield fill(tmp_path_factory.mktemp("workshop"))
    sys.modules.pop("digits_net", None)


@pytest.fixture(scope="module")
def journey(workshop: Path) -> dict[str, Any]:
    """The three commands that make an artifact, with the document that each printed; each step's file is kept."""
    documents = {"transform": exitify("transform", *MODEL, *PLACES, "-o", "fresh.exitify", "--json", folder=workshop).document}
    shutil.copy(workshop / "fresh.exitify", workshop / "net.exitify")
    documents["train"] = exitify("train", "net.exitify", *TRAINING, "--json", folder=workshop).document
    shutil.copy(workshop / "net.exitify", workshop / "trained.exitify")
    documents["calibrate"] = exitify("calibrate", "net.exitify", "--data", "calibration.npz", "--max-drop", 0.02, "--json", folder=workshop).document
    return documents


@pytest.fixture
def made(workshop: Path, journey: dict[str, Any]) -> Path:
    """The folder with all artifacts made."""
    assert journey
    return workshop


def torch_says(x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return digits.network()(torch.from_numpy(x)).numpy()


# --- the whole way


def test_transform_writes_the_network_with_its_exits(journey: dict[str, Any], made: Path) -> None:
    document, artifact = journey["transform"], Artifact.open(made / "fresh.exitify")
    assert document["output"] == "fresh.exitify"
    assert document["model_id"] == artifact.manifest.model_id
    assert [(point["name"], point["place"]) for point in document["plan"]["exits"]] == [("exit1", "stage2"), ("exit2", "stage3")]
    assert document["considered"] == []
    assert artifact.manifest.model.source == "digits_net:build"
    assert artifact.manifest.input.classes == tuple(f"digit {i}" for i in range(10))
    assert not artifact.manifest.heads_trained
    weights = artifact.tensors(WEIGHTS_FILE)
    for name, tensor in digits.network().state_dict().items():
        np.testing.assert_array_equal(weights[name], tensor.numpy())


def test_transform_is_the_same_twice(made: Path, tmp_path: Path) -> None:
    """Also after another command has drawn random numbers: `--seed` decides."""
    torch.rand(17)
    exitify("transform", *MODEL, *PLACES, "-o", tmp_path / "again.exitify", folder=made)
    assert (tmp_path / "again.exitify").read_bytes() == (made / "fresh.exitify").read_bytes()


def test_train_names_each_head(journey: dict[str, Any], made: Path) -> None:
    document = journey["train"]
    assert [head["exit"] for head in document["heads"]] == ["exit1", "exit2"]
    assert min(head["accuracy"] for head in document["heads"]) > 0.6
    assert document["model_id"] == Artifact.open(made / "trained.exitify").manifest.model_id != journey["transform"]["model_id"]


def test_train_leaves_no_work_folder(made: Path) -> None:
    assert not [path for path in made.iterdir() if path.is_dir() and path.name != "__pycache__"]


def test_calibrate_prints_the_profile_it_stores(journey: dict[str, Any], made: Path) -> None:
    document, stored = journey["calibrate"], Artifact.open(made / "net.exitify").profile("default")
    assert document["profile"] == "default"
    assert document["promise"]["kind"] == "max-drop"
    assert document["promise"]["limit"] == 0.02
    assert document["promise"]["kept"] is True
    assert document["promise"]["samples"] == 500
    assert {name: setting["threshold"] for name, setting in document["exits"].items()} == {n: s.threshold for n, s in stored.exits.items()}
    assert any(setting["enabled"] for setting in document["exits"].values())


def test_run_without_a_profile_says_what_torch_says(made: Path) -> None:
    document = exitify("run", "trained.exitify", "x.npy", "--json", folder=made).document
    logits = torch_says(np.load(made / "x.npy"))
    assert document["profile"] is None
    assert document["engine"] == "onnxruntime"
    assert [answer["input"] for answer in document["answers"]] == [f"x.npy[{i}]" for i in range(20)]
    assert [answer["label"] for answer in document["answers"]] == logits.argmax(1).tolist()
    assert [answer["name"] for answer in document["answers"]] == [f"digit {label}" for label in logits.argmax(1)]
    assert {answer["exit"] for answer in document["answers"]} == {"final"}
    np.testing.assert_allclose([answer["logits"] for answer in document["answers"]], logits, rtol=1e-4, atol=1e-4)
    for answer in document["answers"]:
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch", [1, 8])
def test_run_with_a_profile_stops_where_the_session_stops(made: Path, batch: int) -> None:
    document = exitify("run", "net.exitify", "x.npy", "--batch", batch, "--json", folder=made).document
    session = Session.load(made / "net.exitify")
    expected = [session.run(x) for x in np.load(made / "x.npy")]
    assert document["profile"] == "default"
    assert [(a["label"], a["exit"], a["macs"]) for a in document["answers"]] == [(a.label, a.exit, a.macs) for a in expected]
    assert {a["exit"] for a in document["answers"]} > {"final"} or "final" not in {a["exit"] for a in document["answers"]}


def test_run_reads_pictures_and_arrays_alike(made: Path) -> None:
    np.save(made / "first.npy", np.load(made / "x.npy")[0])
    document = exitify("run", "net.exitify", "picture.png", "first.npy", "--json", folder=made).document
    picture, array = document["answers"]
    assert (picture["input"], array["input"]) == ("picture.png", "first.npy")
    assert picture["logits"] == array["logits"]


def test_run_with_the_reference_engine_says_the_same(made: Path) -> None:
    fast, slow = (exitify("run", "net.exitify", "x.npy", "--engine", engine, "--json", folder=made).document for engine in ("auto", "reference"))
    assert (fast["engine"], slow["engine"]) == ("onnxruntime", "reference")
    assert [a["label"] for a in fast["answers"]] == [a["label"] for a in slow["answers"]]


def test_bench_compares_with_the_network_in_torch_and_onnxruntime(made: Path) -> None:
    document = exitify(
        "bench", "net.exitify", "--data", "test.npz", "--against", "onnxruntime,torch", "--model", "digits_net:build", "--samples", 30,
        "--rounds", 1, "--no-memory", "--json", folder=made,
    ).document  # fmt: skip
    assert [timing["name"] for timing in document["timings"]] == ["onnxruntime", "onnxruntime again", "torch", "exitify"]
    assert document["timings"][0]["accuracy"] == document["timings"][2]["accuracy"] > 0.8
    assert document["samples"] == 30
    assert sum(document["exits"].values()) == pytest.approx(1)


def test_bench_measures_what_answers_take_from_a_boards_supply(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rails = find_rails(sysfs.board(tmp_path, milliamps=1210))
    monkeypatch.setattr(benchmark, "find_rails", lambda: rails)
    monkeypatch.setattr(benchmark, "measure", functools.partial(measure, seconds=0.05, idle=0.05, rounds=2, wait=lambda seconds: None))
    arguments = ("bench", "net.exitify", "--data", "test.npz", "--samples", 20, "--rounds", 1, "--no-memory", "--energy")
    document = exitify(*arguments, "--json", folder=made).document
    for timing in document["timings"]:
        energy = timing["energy"]
        assert (energy["watts"], energy["idle_watts"], energy["mj"]) == pytest.approx((6.05, 6.05, 0.0), abs=1e-6)
        assert energy["total_mj"] > 0
    assert document["conditions"]["power_mode"] == ""
    done = exitify(*arguments, folder=made)
    assert (done.code, done.err) == (0, "")
    for text in ("mJ above idle", "lowest to highest", "6.05"):
        assert text in done.out


def test_energy_on_a_machine_that_is_no_jetson_is_refused(made: Path) -> None:
    done = exitify("bench", "net.exitify", "--data", "test.npz", "--energy", folder=made)
    assert (done.code, done.err) == (1, "exitify: energy is measured on a Jetson, and this machine is none\n  hint: leave --energy out\n")


def test_times_taken_here_serve_a_calibration(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "timed.exitify"
    called = exitify("measure", "net.exitify", "-o", path, "--json", folder=made).document["name"]
    times = Artifact.open(path).times[called]
    budget = 10 * times.whole_ms
    done = exitify("calibrate", path, "--data", "calibration.npz", "--budget-ms", budget, "--times", called, "--json", folder=made).document
    assert done["promise"]["kept"]
    assert done["promise"]["mean_ms"] <= budget
    assert Artifact.open(path).times == {called: times}


def test_inspect_tells_everything_and_changes_nothing(journey: dict[str, Any], made: Path) -> None:
    before = contents(made)
    document = exitify("inspect", "net.exitify", "--json", folder=made).document
    assert document["model_id"] == journey["train"]["model_id"]
    assert document["heads_trained"] is True
    assert document["plan"] == journey["transform"]["plan"]
    assert document["profiles"]["default"]["promise"] == journey["calibrate"]["promise"]
    assert contents(made) == before


@pytest.mark.parametrize(("name", "exit_name"), [("final", "final"), ("1", "exit1"), ("exit2", "exit2")])
def test_export_writes_a_network_that_always_stops_there(made: Path, name: str, exit_name: str) -> None:
    document = exitify("export", "net.exitify", "-o", "static.onnx", "--exit", name, "--json", folder=made).document
    x = np.load(made / "x.npy")
    network = onnxruntime.InferenceSession(made / "static.onnx", providers=["CPUExecutionProvider"])
    (logits,) = network.run(document["outputs"], {document["inputs"][0]: x})
    recorded = Session.load(made / "net.exitify").record(x).logits[exit_name]
    assert document["exit"] == exit_name
    assert document["macs"] == Artifact.open(made / "net.exitify").plan.macs_at([] if exit_name == "final" else [exit_name])[exit_name]
    np.testing.assert_allclose(logits, recorded, rtol=1e-4, atol=1e-4)


def test_output_leaves_the_artifact_as_it_was(made: Path, tmp_path: Path) -> None:
    before = (made / "trained.exitify").read_bytes()
    done = exitify("calibrate", "trained.exitify", "--data", "calibration.npz", "--budget-macs", 0.5, "-o", tmp_path / "o.exitify", folder=made)
    assert done.code == 0
    assert (made / "trained.exitify").read_bytes() == before
    assert Artifact.open(tmp_path / "o.exitify").profile("default").promise.kind == "budget-macs"


def test_a_risk_is_read_as_rate_and_confidence(made: Path, tmp_path: Path) -> None:
    arguments = ("calibrate", "trained.exitify", "--data", "calibration.npz", "--profile", "careful", "-o", tmp_path / "o.exitify", "--json")
    both = exitify(*arguments, "--risk", "0.1@0.9", folder=made).document["promise"]
    assert (both["kind"], both["limit"], both["confidence"]) == ("risk", 0.1, 0.9)
    alone = exitify(*arguments, "--risk", "0.1", folder=made).document["promise"]
    assert (alone["limit"], alone["confidence"]) == (0.1, 0.95)
    assert list(Artifact.open(tmp_path / "o.exitify").profiles) == ["careful"]


def test_auto_may_place_no_exit_and_says_why(made: Path, tmp_path: Path) -> None:
    done = exitify("transform", *MODEL, "-o", tmp_path / "none.exitify", folder=made)
    assert done.code == 0
    assert "an exit would add" in done.out
    assert "It has no exits." in done.out
    assert Artifact.open(tmp_path / "none.exitify").plan.exits == ()


TABLES = {
    "transform": (
        ("transform", *MODEL, *PLACES, "-o", "OUT", "--why"),
        ("Exits of a network", "Places considered", "stage3", "Wrote"),
    ),
    "train": (
        ("train", "net.exitify", "--data", "train.npz", "--epochs", 1, "--copies", 1, "-o", "OUT"),
        ("best epoch", "Dropped the profiles default"),
    ),
    "calibrate": (
        ("calibrate", "trained.exitify", "--data", "calibration.npz", "--max-drop", 0.02, "-o", "OUT"),
        ("threshold", "Promise: drop of at most 2 points: kept, on 500 samples"),
    ),
    "run": (("run", "trained.exitify", "x.npy"), ("x.npy[19]", "digit ", "No profile is in use")),
    "bench": (
        ("bench", "net.exitify", "--data", "test.npz", "--samples", 20, "--rounds", 1, "--no-memory"),
        ("20 samples, batch 1, 1 thread", "onnxruntime", "Left at: exit1"),
    ),
    "measure": (
        ("measure", "net.exitify", "--name", "here", "-o", "OUT"),
        ("Times here: onnxruntime, 1 thread, ", "the network without exits", "--times here"),
    ),
    "export": (("export", "net.exitify", "-o", "OUT"), ("multiply-adds, 1.000 of the whole network",)),
}


@pytest.mark.parametrize("command", TABLES)
def test_a_command_prints_what_a_person_reads_and_the_python_that_does_the_same(made: Path, tmp_path: Path, command: str) -> None:
    arguments, shown = TABLES[command]
    done = exitify(*(tmp_path / "out" if argument == "OUT" else argument for argument in arguments), folder=made)
    assert (done.code, done.err) == (0, "")
    for text in shown:
        assert text in done.out
    assert done.out.splitlines()[-1].startswith("In Python: exitify.")


def test_inspect_prints_exits_and_profiles(made: Path) -> None:
    done = exitify("inspect", "net.exitify", folder=made)
    assert (done.code, done.err) == (0, "")
    for text in ("digits_net:build; heads trained", "input float32 (N, 1, 16, 16)", "10 classes: digit 0", "Profile 'default', by top1"):
        assert text in done.out


def test_warnings_go_to_stderr_and_leave_json_alone(made: Path, tmp_path: Path) -> None:
    x, y = digits.pictures()["calibration"]
    folder = tmp_path / "pictures"
    for number in range(60):
        (folder / f"digit {y[number]}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[number, :, :, 0]).save(folder / f"digit {y[number]}" / f"{number}.png")
    named = exitify("calibrate", "trained.exitify", "--data", folder, "--max-drop", 0.02, "-o", tmp_path / "o", "--json", folder=made)
    assert named.document["promise"]["samples"] == 60
    for path in folder.iterdir():
        path.rename(path.with_name(f"1{path.name[-1]}"))
    shutil.move(folder / "11", folder / "9")  # no longer in the order of their numbers
    other = exitify("calibrate", "trained.exitify", "--data", folder, "--max-drop", 0.02, "-o", tmp_path / "o", "--json", folder=made)
    assert other.err.startswith("exitify: ")  # refused, or warned of: the names are none of the classes'
    assert "Traceback" not in other.err


# --- exit codes


@pytest.fixture(scope="module")
def shelf(workshop: Path, journey: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every bad file, beside the good ones. No refused command may change it."""
    assert journey
    folder = fill(tmp_path_factory.mktemp("shelf"))
    for name in ("fresh", "trained", "net"):
        shutil.copy(workshop / f"{name}.exitify", folder)
    (folder / "text.pt").write_text("not a network\n")
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)), folder / "pickled.pt")
    x = np.load(folder / "x.npy")
    np.save(folder / "wrong_shape.npy", np.zeros((2, 8, 8), np.float32))
    np.save(folder / "wrong_sides.npy", np.zeros((2, 1, 8, 8), np.float32))
    np.save(folder / "nan.npy", np.where(np.arange(256).reshape(1, 1, 16, 16) == 77, np.nan, x[:1]))
    np.save(folder / "objects.npy", np.array([{}, None]), allow_pickle=True)
    (folder / "text.npy").write_text("not an array\n")
    (folder / "empty.npy").touch()
    shutil.copy(folder / "test.npz", folder / "several.npy")
    (folder / "text.png").write_text("not a picture\n")
    digits_x, digits_y = digits.pictures()["calibration"]
    np.savez(folder / "one_class.npz", x=digits_x, y=np.zeros_like(digits_y))
    np.savez(folder / "eleven.npz", x=digits_x, y=digits_y + 1)
    np.savez(folder / "few.npz", x=digits_x[:20], y=digits_y[:20])
    np.savez(folder / "no_labels.npz", x=digits_x)
    (folder / "empty").mkdir()
    (folder / "hollow" / "digit 0").mkdir(parents=True)
    (folder / "hollow" / "digit 1").mkdir()
    _bad_artifacts(folder)
    return folder


def _bad_artifacts(folder: Path) -> None:
    whole = (folder / "net.exitify").read_bytes()
    files = {name: bytes(data) for name, data in container.read(whole).items()}
    start = whole.index(files[WEIGHTS_FILE])

    def flipped(place: int) -> bytes:
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    def rewritten(changed: dict[str, bytes]) -> bytes:
        stream = io.BytesIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(container, "check_name", lambda _name: None)  # as a stranger's program would write it
            container.write(stream, changed)
        return stream.getvalue()

    for name, data in {
        "cut": whole[: len(whole) // 2],
        "cut_by_one": whole[:-1],
        "empty": b"",
        "text": b"not an artifact\n",
        "flipped_start": flipped(10),
        "flipped_weight": flipped(start + len(files[WEIGHTS_FILE]) - 5),
        "flipped_directory": flipped(len(whole) - 60),
        "longer": whole + b"!",
        "version": rewritten({**files, "manifest.json": files["manifest.json"].replace(b'"format": 7', b'"format": 8', 1)}),
        "leaves_folder": rewritten({**files, "../../evil.json": b"{}"}),
        "absolute": rewritten({**files, "/etc/evil": b"{}"}),
    }.items():
        (folder / f"{name}.exitify").write_bytes(data)


TO = ("-o", "out.exitify")
DATA = ("--data", "calibration.npz")
BAD = {
    # transform
    "missing model": (("transform", "nothere.pt", *TO), r"there is no file nothere\.pt"),
    "no model's name": (("transform", "resnet", *TO), "'resnet' names no model"),
    "missing module": (("transform", "nothere:build", *TO), "there is no module 'nothere'"),
    "missing factory": (("transform", "digits_net:buidl", *TO), "has no 'buidl'"),
    "text as .pt": (("transform", "text.pt", *TO), r"text\.pt was not written by torch\.save"),
    "text as .pt, trusted": (("transform", "text.pt", "--trust", *TO), r"text\.pt was not written by torch\.save"),
    "pickle": (("transform", "pickled.pt", "--input-shape", "1x16x16", *TO), r"pickled\.pt is not loaded without trust"),
    "weights of another network": (
        ("transform", "digits_net:build_for_five", "--input-shape", "1x16x16", "--weights", "weights.safetensors", *TO),
        "holds the weights of another network",
    ),
    "missing weights": (("transform", "digits_net:build", "--weights", "nothere.safetensors", *TO), "there is no file nothere"),
    "another shape": (("transform", *MODEL, "--input-shape", "3x16x16", *TO), r"does not become an input of shape \(3, 16, 16\)"),
    "a shape it cannot read": (("transform", "digits_net:build_without_preprocess", "--input-shape", "3x16x16", *TO), ".*"),
    "a shape too small": (("transform", "digits_net:build_without_preprocess", "--input-shape", "1x1x1", *TO), ".*"),
    "no shape": (("transform", "digits_net:build_without_preprocess", *TO), "the input shape of .* is not known"),
    "text as shape": (("transform", *MODEL, "--input-shape", "big", *TO), "'big' is no input shape"),
    "text as preprocess": (("transform", *MODEL, "--preprocess", "imagnet", *TO), "no preprocess 'imagnet'"),
    "unknown exit": (("transform", *MODEL, "--exits", "stage9", *TO), "cannot exit after 'stage9': the network has no module"),
    "exit at the answer": (("transform", *MODEL, "--exits", "fc", *TO), "cannot exit after 'fc': it is the network's own answer"),
    "too many exits": (("transform", *MODEL, "--exits", "99", *TO), "99 exits asked for"),
    "unknown head": (("transform", *MODEL, "--exits", "stage2", "--head", "huge", *TO), "no head 'huge'"),
    "too few class names": (("transform", *MODEL, "--exits", "stage2", "--classes", "a,b", *TO), "2 classes are named, and the network has 10"),
    "transform to nowhere": (("transform", *MODEL, "-o", "nowhere/out.exitify"), "there is no folder nowhere"),
    "transform to a folder": (("transform", *MODEL, "-o", "empty"), "cannot write empty: it is a folder"),
    # train
    "one class to train": (("train", "fresh.exitify", "--data", "one_class.npz"), "samples of 1 class"),
    "labels outside": (("train", "fresh.exitify", "--data", "eleven.npz"), r"has the label 10, outside 0 … 9"),
    "too few to train": (("train", "fresh.exitify", "--data", "few.npz"), "20 samples are too few"),
    "no labels": (("train", "fresh.exitify", "--data", "no_labels.npz"), "has no x and y"),
    "missing data": (("train", "fresh.exitify", "--data", "nothere"), "there is no nothere"),
    "empty data folder": (("train", "fresh.exitify", "--data", "empty"), "empty has no sub-folders"),
    "hollow data folder": (("train", "fresh.exitify", "--data", "hollow"), "hollow/digit 0 holds no pictures"),
    "unknown augmentation": (("train", "fresh.exitify", *DATA, "--augment", "flip"), "no augmentation 'flip'"),
    "train to nowhere": (("train", "fresh.exitify", *DATA, "-o", "nowhere/out.exitify"), "there is no folder nowhere"),
    "train a missing artifact": (("train", "nothere.exitify", *DATA), r"cannot open nothere\.exitify"),
    # calibrate
    "no promise": (("calibrate", "trained.exitify", *DATA), "one promise must be asked for"),
    "two promises": (("calibrate", "trained.exitify", *DATA, "--max-drop", 0.01, "--budget-macs", 0.5), "one promise must be asked for"),
    "untrained heads": (("calibrate", "fresh.exitify", *DATA, "--max-drop", 0.01), "heads are untrained"),
    "risk without a number": (("calibrate", "trained.exitify", *DATA, "--risk", "2%@0.95"), r"--risk '2%@0\.95' is no RATE@CONFIDENCE"),
    "empty risk": (("calibrate", "trained.exitify", *DATA, "--risk", ""), "--risk '' is no RATE@CONFIDENCE"),
    "risk over one": (("calibrate", "trained.exitify", *DATA, "--risk", "2@0.95"), r"--risk 2@0\.95 is no rate and confidence"),
    "risk not a number": (("calibrate", "trained.exitify", *DATA, "--risk", "nan@0.95"), r"--risk nan@0\.95 is no rate"),
    "drop over one": (("calibrate", "trained.exitify", *DATA, "--max-drop", 5), "--max-drop 5 is no share"),
    "infinite budget": (("calibrate", "trained.exitify", *DATA, "--budget-macs", "inf"), "--budget-macs inf is no share"),
    "too few to prove": (("calibrate", "trained.exitify", *DATA, "--risk", "0.001@0.99"), "500 samples cannot prove a disagreement"),
    "unknown policy": (("calibrate", "trained.exitify", *DATA, "--max-drop", 0.01, "--policy", "luck"), "no policy 'luck'"),
    "profile that leaves the folder": (
        ("calibrate", "trained.exitify", *DATA, "--max-drop", 0.01, "--profile", "../up"),
        r"cannot be called '\.\./up'",
    ),
    "one class to calibrate": (("calibrate", "trained.exitify", "--data", "one_class.npz", "--max-drop", 0.01), "samples of 1 class"),
    "too few to calibrate": (("calibrate", "trained.exitify", "--data", "few.npz", "--max-drop", 0.01), "20 samples are too few"),
    "empty folder to calibrate": (("calibrate", "trained.exitify", "--data", "empty", "--max-drop", 0.01), "empty has no sub-folders"),
    "calibrate to nowhere": (("calibrate", "trained.exitify", *DATA, "--max-drop", 0.01, "-o", "nowhere/out"), "there is no folder nowhere"),
    # run
    "input of another shape": (
        ("run", "net.exitify", "wrong_shape.npy"),
        r"the input has shape \(1, 2, 8, 8\), and the network reads \(N, 1, 16, 16\)",
    ),
    "inputs of another size": (("run", "net.exitify", "wrong_sides.npy"), r"shape \(1, 1, 8, 8\), and the network reads \(N, 1, 16, 16\)"),
    "NaN": (("run", "net.exitify", "nan.npy"), r"the input holds nan at \(0, 0, 4, 13\)"),
    "NaN in a batch": (("run", "net.exitify", "nan.npy", "--batch", 4), "the input holds nan at"),
    "shapes in one batch": (("run", "net.exitify", "x.npy", "wrong_sides.npy", "--batch", 64), "cannot be answered as one batch"),
    "objects in an array": (("run", "net.exitify", "objects.npy"), r"objects\.npy is not a \.npy array"),
    "text as .npy": (("run", "net.exitify", "text.npy"), r"text\.npy is not a \.npy array"),
    "nothing as .npy": (("run", "net.exitify", "empty.npy"), r"empty\.npy is not a \.npy array"),
    "several arrays": (("run", "net.exitify", "several.npy"), r"several\.npy holds several arrays"),
    "text as picture": (("run", "net.exitify", "text.png"), r"text\.png cannot be read as a picture"),
    "missing input": (("run", "net.exitify", "nothere.png"), r"there is no file nothere\.png"),
    "folder as input": (("run", "net.exitify", "empty"), "there is no file empty"),
    "unknown profile": (("run", "net.exitify", "x.npy", "--profile", "fast"), "no profile 'fast'"),
    "profile of none": (("run", "trained.exitify", "x.npy", "--profile", "default"), "no profile 'default'"),
    "unknown engine": (("run", "net.exitify", "x.npy", "--engine", "tvm9"), "no engine 'tvm9'"),
    "missing provider": (("run", "net.exitify", "x.npy", "--engine", "onnxruntime:quantum"), "no 'quantum' provider"),
    "folder as artifact": (("run", "empty", "x.npy"), "cannot open empty"),
    # bench
    "unknown contender": (("bench", "net.exitify", "--data", "test.npz", "--against", "tvm9"), "no contender 'tvm9'"),
    "torch without the model": (("bench", "net.exitify", "--data", "test.npz", "--against", "torch"), "needs the original model"),
    "another model": (
        ("bench", "net.exitify", "--data", "test.npz", "--against", "torch", "--model", "digits_net:build_for_five"),
        "is not the model of this artifact",
    ),
    "bench an unknown profile": (("bench", "net.exitify", "--data", "test.npz", "--profile", "fast"), "no profile 'fast'"),
    # export
    "export an unknown exit": (("export", "net.exitify", "-o", "out.onnx", "--exit", "9"), "there is no exit 'exit9'"),
    "export to nowhere": (("export", "net.exitify", "-o", "nowhere/out.onnx"), "there is no folder nowhere"),
    # artifacts
    "cut": (("inspect", "cut.exitify"), r"cut\.exitify: the artifact is cut off"),
    "cut by a byte": (("inspect", "cut_by_one.exitify"), r"cut_by_one\.exitify: the artifact is cut off"),
    "empty": (("inspect", "empty.exitify"), "the file is not an exitify artifact"),
    "text": (("inspect", "text.exitify"), "the file is not an exitify artifact"),
    "other zip": (("inspect", "test.npz"), r"test\.npz: "),
    "flipped in a header": (("inspect", "flipped_start.exitify"), "altered"),
    "flipped in a weight": (("inspect", "flipped_weight.exitify"), "altered"),
    "flipped in the directory": (("inspect", "flipped_directory.exitify"), r"flipped_directory\.exitify: "),
    "with a byte more": (("inspect", "longer.exitify"), "1 bytes after its end"),
    "of the next version": (("inspect", "version.exitify"), "format 8, and this release reads 7"),
    "a path that leaves the folder": (("inspect", "leaves_folder.exitify"), r"'\.\./\.\./evil\.json' in the artifact is not a plain relative path"),
    "an absolute path": (("inspect", "absolute.exitify"), "'/etc/evil' in the artifact is not a plain relative path"),
    "flipped, run": (("run", "flipped_weight.exitify", "x.npy"), "altered"),
    "flipped, trained": (("train", "flipped_weight.exitify", *DATA), "altered"),
    "cut, calibrated": (("calibrate", "cut.exitify", *DATA, "--max-drop", 0.01), "cut off"),
    "cut, exported": (("export", "cut.exitify", "-o", "out.onnx"), "cut off"),
    "cut, timed": (("bench", "cut.exitify", "--data", "test.npz"), "cut off"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_two_lines_and_nothing_is_changed(shelf: Path, case: str) -> None:
    arguments, problem = BAD[case]
    before = contents(shelf)
    refused(exitify(*arguments, folder=shelf), problem)
    assert contents(shelf) == before


@pytest.mark.parametrize("case", ["cut", "NaN", "pickle"])
def test_a_process_of_its_own_ends_the_same_way(shelf: Path, case: str) -> None:
    arguments, problem = BAD[case]
    before = contents(shelf)
    done = process(*arguments, folder=shelf)
    refused(Done(done.returncode, done.stdout, done.stderr), problem)
    assert contents(shelf) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("run",),
        ("run", "net.exitify"),
        ("run", "net.exitify", "x.npy", "--fast"),
        ("run", "net.exitify", "x.npy", "--batch", 0),
        ("run", "net.exitify", "x.npy", "--threads", "many"),
        ("transform", "digits_net:build"),
        ("transform", "digits_net:build", "-o", "out", "--seed", -1),
        ("train", "net.exitify"),
        ("train", "net.exitify", "--data", "train.npz", "--epochs", 0),
        ("train", "net.exitify", "--data", "train.npz", "--distillation", 1.5),
        ("train", "net.exitify", "--data", "train.npz", "--seed", 2**32),
        ("calibrate", "net.exitify", "--data", "train.npz", "--max-drop", "little"),
        ("calibrate", "net.exitify", "--data", "train.npz", "--max-drop", 0.1, "--seed", -1),
        ("bench", "net.exitify", "--data", "test.npz", "--samples", 1),
    ],
    ids=lambda arguments: " ".join(map(str, arguments)),
)
def test_a_wrong_usage_ends_with_two(shelf: Path, arguments: tuple[object, ...]) -> None:
    before = contents(shelf)
    done = exitify(*arguments, folder=shelf)
    assert done.code == 2
    assert done.out == ""
    assert "Usage: exitify" in done.err
    assert "Traceback" not in done.err
    assert contents(shelf) == before


@pytest.mark.parametrize(
    "command",
    [
        "",
        "transform",
        "train",
        "calibrate",
        "compile",
        "run",
        "bench",
        "measure",
        "inspect",
        "export",
        "targets",
        "doctor",
        "board serve",
        "board tracker",
        "board sidecar",
    ],
)
def test_every_command_has_help(tmp_path: Path, command: str) -> None:
    done = exitify(*command.split(), "--help", folder=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert f"Usage: exitify {command}".strip() in done.out


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = exitify("--help", folder=tmp_path)
    for command in app.app.registered_commands:
        assert command.callback is not None
        assert f" {command.callback.__name__} " in done.out


def test_a_bug_is_a_traceback_and_no_polite_error(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Artifact, "open", lambda _path: {}["gone"])
    with pytest.raises(KeyError, match="gone"):
        exitify("inspect", "net.exitify", folder=made)


# --- interrupted, and cut off


def test_an_interrupted_command_says_so_and_exits_with_one(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(_path: object) -> Artifact:
        raise KeyboardInterrupt

    monkeypatch.setattr(Artifact, "open", press)
    refused(exitify("inspect", "net.exitify", folder=made), "interrupted; nothing was changed")


def test_an_interrupted_training_leaves_the_artifact_and_goes_on_to_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    shutil.copy(made / "fresh.exitify", tmp_path / "net.exitify")
    train_epoch: Callable[..., None] = training._train_epoch
    epochs = []

    def press(*given: Any, **named: Any) -> None:
        epochs.append(given[-1])
        if len(epochs) == 5:
            raise KeyboardInterrupt
        train_epoch(*given, **named)

    monkeypatch.setattr(training, "_train_epoch", press)
    refused(exitify("train", "net.exitify", *TRAINING, folder=tmp_path), "interrupted; nothing was changed")
    assert (tmp_path / "net.exitify").read_bytes() == (made / "fresh.exitify").read_bytes()
    assert (tmp_path / "net.train").is_dir()
    assert exitify("train", "net.exitify", *TRAINING, folder=tmp_path).code == 0
    assert epochs == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]
    assert (tmp_path / "net.exitify").read_bytes() == (made / "trained.exitify").read_bytes()
    assert not (tmp_path / "net.train").exists()


def test_a_work_folder_of_the_users_own_is_left(made: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    arguments = ("--data", "train.npz", "--epochs", 1, "--copies", 1, "-o", tmp_path / "out", "--work", tmp_path / "work")
    assert exitify("train", "fresh.exitify", *arguments, folder=made).code == 0
    assert list((tmp_path / "work").iterdir()) == []


LARGE = ("run", "net.exitify", *["x.npy"] * 60)
"""Its output is larger than a pipe holds."""


@pytest.mark.parametrize("extra", [(), ("--json",)], ids=["table", "json"])
def test_closing_the_output_early_is_no_error(made: Path, extra: tuple[str, ...]) -> None:
    """As `exitify run … | head -1` does."""
    command = [*COMMAND, *LARGE, *extra]
    with subprocess.Popen(command, cwd=made, env=BUFFERED, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert len(running.stdout.read(10)) == 10
        running.stdout.close()
        assert running.stderr.read() == ""
        assert running.wait(60) in (0, 1)


@pytest.mark.parametrize("arguments", [("export", "net.exitify", "-o", "static.onnx"), ("run", "net.exitify", "picture.png")], ids=["print", "table"])
def test_output_that_nobody_reads_is_no_error(made: Path, arguments: tuple[str, ...]) -> None:
    """So little that it is flushed at the very end, where Python itself would complain."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], cwd=made, env=BUFFERED, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    finally:
        os.close(write_end)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


def test_the_console_script_is_the_same_command(made: Path) -> None:
    script = Path(sys.executable).with_name("exitify")
    if not script.exists():
        pytest.skip(f"{script} is not installed: pip install -e .")
    done = subprocess.run([script, "run", "net.exitify", "x.npy", "--json"], cwd=made, capture_output=True, text=True, timeout=60, check=False)
    labels = [answer["label"] for answer in Done(done.returncode, done.stdout, done.stderr).document["answers"]]
    session = Session.load(made / "net.exitify")
    assert labels == [session.run(x).label for x in np.load(made / "x.npy")]


def test_pictures_become_the_inputs_that_the_network_was_trained_on(made: Path) -> None:
    x = digits.pictures()["test"][0][:1]
    (answer,) = exitify("run", "trained.exitify", "picture.png", "--json", folder=made).document["answers"]
    np.testing.assert_allclose(answer["logits"], torch_says(pixels_to_inputs(x, digits.loaded().contract))[0], rtol=1e-4, atol=1e-4)


# --- exits by data


def test_transform_with_data_searches_exits_and_says_what_each_is_worth(made: Path, tmp_path: Path) -> None:
    options = ("--data", "train.npz", "--held-out", "calibration.npz", "--max-drop", "0.05", "--cost", "macs", "--work", tmp_path / "work")
    run = exitify("transform", *MODEL, *options, "-o", tmp_path / "searched.exitify", "--why", folder=made)
    assert run.code == 0, run
    text = " ".join(run.out.split())
    assert "in shares of the network's" in text
    assert "saves" in text
    assert "costs" in text
    assert "Places considered" in text
    assert "exitify.place_by_data(exitify.capture(model.module, model.example, source='digits_net:build'), samples, contract=model.contract" in text
    again = exitify("transform", *MODEL, *options, "-o", tmp_path / "again.exitify", "--json", folder=made).document
    assert {"probes", "unit", "cost", "bound", "gap", "reason", "considered"} <= again.keys()
    assert again["unit"] == "macs"
    assert all({"accuracy", "worth", "verdict", "crossing"} <= probe.keys() for probe in again["probes"])
    assert (tmp_path / "again.exitify").read_bytes() == (tmp_path / "searched.exitify").read_bytes()


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--max-drop", "0.01"), "--max-drop serves the search for exits, which needs labelled pictures"),
        (("--cost", "macs"), "--cost serves the search for exits"),
        (("--threads", "2"), "--threads serves the search for exits"),
        (("--exits", "stage2:conv,stage2:linear"), "two heads are asked for after 'stage2_2': conv and linear"),
        (("--held-out", "calibration.npz"), "--held-out serves the search for exits"),
        (("--data", "train.npz", "--exits", "3"), "--data serves the search for exits, and --exits 3 says where they are"),
        (("--data", "train.npz", "--cost", "energy"), "there is no cost 'energy'"),
        (("--data", "train.npz", "--max-drop", "0.01", "--budget-ms", "3"), "exits are placed for one promise"),
        (("--head", "lstm"), "there is no head 'lstm'"),
        (("--scores", "logits"), "the model returns nothing called 'logits'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(made: Path, tmp_path: Path, options: tuple[str, ...], problem: str) -> None:
    refused(exitify("transform", *MODEL, *options, "-o", tmp_path / "no.exitify", folder=made), re.escape(problem))
    assert not (tmp_path / "no.exitify").exists()
