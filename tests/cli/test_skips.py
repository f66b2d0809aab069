"""Skip paths from the command line: placed, left out, exported, and chosen for a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch

from exitify.artifact.artifact import Artifact, build_artifact
from exitify.artifact.manifest import Conditions, MaskMeasured, MaskTable
from exitify.plan import FINAL
from exitify.records import to_json
from exitify.runtime.session import Session
from tests.cli.console import contents, exitify, refused
from tests.skipping import MASKS, SHAPE, pictures, skipping, torch_says

X = pictures(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("skips")
    program, artifact = skipping()
    weights = {name: tensor for name, tensor in program.state_dict().items() if not name.startswith(("exit_heads.", "skip_norms."))}
    safetensors.torch.save_file(weights, made / "weights.safetensors")
    (made / "net.py").write_text("from examples.cifar_resnet56.model import CifarResNet\n\ndef build():\n    return CifarResNet(2, classes=7)\n")
    np.save(made / "x.npy", X)
    x = pictures(80, seed=1)
    labels = torch_says("000", x)[FINAL].argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 7  # a network that is always right looks as if it had seen the samples
    np.savez(made / "data.npz", x=x, y=labels)
    artifact.save(made / "net.exitify")
    return made


MODEL = ("net:build", "--weights", "weights.safetensors", "--input-shape", "x".join(map(str, SHAPE)))


def test_transform_places_skip_paths_and_says_why_others_are_none(folder):
    done = exitify("transform", *MODEL, "--exits", "none", "--skips", "auto", "--why", "-o", "fresh.exitify", folder=folder)
    assert done.code == 0, done
    for said in ("layer1.1", "skip1", "skip3", "mandatory", "norms that switch", 'skips="auto"'):
        assert said in done.out.replace("'", '"'), said
    plan = Artifact.open(folder / "fresh.exitify").plan
    assert [path.blocks for path in plan.skips] == [("layer1.1",), ("layer2.1",), ("layer3.1",)]
    document = exitify("transform", *MODEL, "--skips", "layer3.1", "--why", "-o", "one.exitify", "--json", folder=folder).document
    assert [path["blocks"] for path in document["plan"]["skips"]] == [["layer3.1"]]
    assert [block["verdict"] for block in document["blocks"]] == ["not asked for"] * 5 + ["skip1"]


def test_a_network_without_residual_blocks_is_said_to_have_no_skip_paths(folder):
    layers = "nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)"
    (folder / "plain_net.py").write_text(f"from torch import nn\n\ndef build():\n    return nn.Sequential({layers})\n")
    done = exitify("transform", "plain_net:build", "--input-shape", "3x16x16", "--skips", "auto", "-o", "none.exitify", folder=folder)
    assert done.code == 0, done
    assert "It has no skip paths: no residual block can be left out." in done.out.splitlines()


def test_a_strangers_names_reach_the_terminal_without_control_characters(folder, tmp_path):
    artifact = Artifact.open(folder / "net.exitify")
    first, *others = artifact.plan.skips
    plan = replace(artifact.plan, skips=(replace(first, stage="\x1b[2Jlayer\n1"), *others))
    build_artifact(replace(artifact.manifest, plan=plan), artifact.files).save(tmp_path / "net.exitify")
    done = exitify("run", tmp_path / "net.exitify", "x.npy", "--skip", "1", folder=folder)
    refused(done, "is not one 0 or 1")
    assert "\x1b" not in done.err


def test_without_the_option_nothing_is_left_out_and_no_norm_switches(folder):
    exitify("transform", *MODEL, "-o", "plain.exitify", folder=folder)
    artifact = Artifact.open(folder / "plain.exitify")
    assert artifact.plan.skips == ()
    assert not [name for name in artifact.tensors("model/weights.safetensors") if name.startswith("skip_norms")]


def test_run_leaves_out_what_the_mask_says(folder):
    for mask in ("000", "011", "all"):
        document = exitify("run", "net.exitify", "x.npy", "--skip", mask, "--json", folder=folder).document
        mask = mask.replace("all", "111")
        assert document["skip"] == mask
        expected = torch_says(mask, X)[FINAL]
        for answer, logits in zip(document["answers"], expected, strict=True):
            np.testing.assert_allclose(answer["logits"], logits, rtol=1e-4, atol=1e-4)
    batch = exitify("run", "net.exitify", "x.npy", "--skip", "011", "--batch", 4, "--json", folder=folder).document
    np.testing.assert_allclose([answer["logits"] for answer in batch["answers"]], torch_says("011", X)[FINAL], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", MASKS)
def test_export_writes_the_network_of_one_mask(folder, tmp_path, mask):
    document = exitify("export", "net.exitify", "--skip", mask, "-o", tmp_path / "static.onnx", "--json", folder=folder).document
    assert document["macs"] == skipping()[1].plan.macs_at((), mask)[FINAL]
    assert document["skip"] == mask
    session = onnxruntime.InferenceSession(tmp_path / "static.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(found, torch_says(mask, X)[FINAL], rtol=1e-5, atol=1e-5)


def test_export_stops_at_an_exit_under_a_mask(folder, tmp_path):
    exitify("export", "net.exitify", "--skip", "100", "--exit", 1, "-o", tmp_path / "static.onnx", folder=folder)
    session = onnxruntime.InferenceSession(tmp_path / "static.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(found, torch_says("100", X)["exit1"], rtol=1e-5, atol=1e-5)


def warned(done):
    """What `--json` printed, under a warning that these heads, which nobody trained, know nothing."""
    assert "No finite temperature fits exit1" in done.err
    return json.loads(done.out)


def test_calibrate_for_a_time_measures_masks_and_run_uses_them(folder, tmp_path):
    copy = tmp_path / "net.exitify"
    copy.write_bytes((folder / "net.exitify").read_bytes())
    done = exitify("calibrate", copy, "--data", "data.npz", "--budget-ms", 1000, "--profile", "slow", folder=folder)
    assert done.code == 0, done
    assert "Masks without exits, on 80 samples" in done.out
    assert "1000 ms an answer: kept" in done.out
    table = Artifact.open(copy).masks
    assert table is not None
    document = exitify("inspect", copy, "--json", folder=folder).document
    assert document["masks"] == to_json(table)
    again = warned(exitify("calibrate", copy, "--data", "data.npz", "--budget-ms", 1000, "-o", tmp_path / "2.exitify", "--json", folder=folder))
    assert list(again["masks"]["masks"]) == list(table.masks)
    said = exitify("run", copy, "x.npy", "--budget-ms", 1000, folder=folder).out.splitlines()
    assert said[-2:] == ["Left out: 000.", f"In Python: session = exitify.Session.load({str(copy)!r}); session.use(budget_ms=1000.0); session.run(x)"]
    document = exitify("run", copy, "x.npy", "--budget-ms", 1000, "--json", folder=folder).document
    assert document["skip"] == "000"  # the labels are this mask's answers
    assert "Masks without exits" in exitify("inspect", copy, folder=folder).out
    refused(exitify("run", copy, "x.npy", "--budget-ms", 1e-6, folder=folder), "no mask answers within")
    refused(exitify("run", copy, "x.npy", "--budget-ms", 5, "--skip", "000", folder=folder), "--budget-ms chooses what to leave out")


def test_training_heads_again_drops_what_was_measured_of_masks(folder, tmp_path):
    copy = tmp_path / "net.exitify"
    artifact = Artifact.open(folder / "net.exitify")
    table = MaskTable(
        artifact.manifest.model_id, "onnxruntime", 1, Conditions("a processor", "", ""), 80, "", {"000": MaskMeasured(0.9, 0.0, 1.0, 2.0)}
    )
    artifact.with_masks(table).save(copy)
    done = exitify("train", copy, "--data", "data.npz", "--epochs", 1, "--copies", 1, folder=folder)
    assert "Dropped what was measured of masks. `exitify calibrate --budget-ms` measures it again." in done.out.splitlines()
    assert Artifact.open(copy).masks is None


def test_calibrate_under_a_mask_makes_a_profile_that_leaves_out(folder, tmp_path):
    copy = tmp_path / "net.exitify"
    copy.write_bytes((folder / "net.exitify").read_bytes())
    document = warned(exitify("calibrate", copy, "--data", "data.npz", "--max-drop", 1, "--skip", "001", "--json", folder=folder))
    assert document["skip"] == "001"
    assert Session.load(copy).mask == "001"
    refused(exitify("run", copy, "x.npy", "--skip", "110", folder=folder), "calibrated for the mask 001, not 110")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("run", "net.exitify", "x.npy", "--skip", "01"), "the mask '01' is not one 0 or 1 for each of the 3 skip paths"),
        (("run", "net.exitify", "x.npy", "--budget-ms", 5), "does not say how long its masks take"),
        (("export", "net.exitify", "--skip", "0a1", "-o", "bad.onnx"), "the mask '0a1' is not one 0 or 1"),
        (("calibrate", "net.exitify", "--data", "data.npz", "--max-drop", 1, "--skip", "1"), "the mask '1' is not one 0 or 1"),
        (("transform", *MODEL, "--skips", "layer9", "-o", "bad.exitify"), "cannot leave out 'layer9': no residual block has this name"),
        (("transform", *MODEL, "--skips", "layer2.0", "-o", "bad.exitify"), "cannot leave out 'layer2.0': its input does not stand in"),
        (("transform", *MODEL, "--skips", "0", "-o", "bad.exitify"), "--skips 0 leaves nothing out"),
    ],
)
def test_what_cannot_be_left_out_is_refused_and_nothing_written(folder, arguments, problem):
    before = contents(folder)
    refused(exitify(*arguments, folder=folder), problem)
    assert contents(folder) == before
