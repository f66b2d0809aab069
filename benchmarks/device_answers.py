"""Answers of `exitify run` in an environment without torch against torch's own, on picture files and on arrays.

    python -m benchmarks.device_answers r56.exitify --python /path/to/device/python --images 200

torch runs the original ResNet-56 on its own preparation of the same pixels. With `--profile` an early exit may answer:
then its label is compared with that of the same exit, recomputed in this process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from examples.cifar_resnet56.model import resnet56
from exitify.runtime.session import Session

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data"))
    pictures = np.load(data / "cifar10.npz")["x_test"][: options.images]
    network = resnet56().eval()
    network.load_state_dict(load_file(data / "weights" / "cifar10_resnet56_akamaster.safetensors"))
    x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD
    with torch.inference_mode():
        expected = network(x).numpy()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.png" for i in range(len(pictures))]
        for path, pixels in zip(files, pictures):
            Image.fromarray(pixels).save(path)
        np.save(Path(folder) / "ready.npy", x.numpy())
        for name, inputs in (("picture files", [str(path) for path in files]), ("arrays", [str(Path(folder) / "ready.npy")])):
            for profile in ("none", "default"):
                compare(options, name, inputs, profile, x.numpy(), expected)
    session = Session.load(options.artifact)
    one = [session.run(row) for row in x.numpy()]
    with ThreadPoolExecutor(4) as pool:
        four = list(pool.map(session.run, x.numpy()))
    same = sum(a.exit == b.exit and np.array_equal(a.logits, b.logits) for a, b in zip(one, four))
    print(f"4 threads against 1: {same} of {len(one)} answers the same to the bit")


def compare(options: argparse.Namespace, name: str, inputs: list[str], profile: str, x: np.ndarray, expected: np.ndarray) -> None:
    """Run the command in the other environment; print how its answers compare."""
    command = [options.python, "-m", "exitify", "run", str(options.artifact), *inputs, "--profile", profile, "--json"]
    answers = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["answers"]
    logits = np.array([answer["logits"] for answer in answers])
    if profile == "none":
        agree = (logits.argmax(1) == expected.argmax(1)).sum()
        print(f"{name}, no exit: {agree} of {len(expected)} labels as torch's, logits within {np.abs(logits - expected).max():.1e}")
        return
    session = Session.load(options.artifact, profile=profile)
    here = [session.run(row) for row in x]
    agree = sum(a["label"] == b.label and a["exit"] == b.exit for a, b in zip(answers, here))
    gap = max(np.abs(np.array(a["logits"]) - b.logits).max() for a, b in zip(answers, here))
    print(f"{name}, profile {profile!r}: {agree} of {len(here)} labels and exits as in this process, logits within {gap:.1e}")


if __name__ == "__main__":
    main()
