"""CIFAR-10 with a trained ResNet-56, the whole way through the command line.

    EXITIFY_DATA=../shared/data python -m examples.cifar_resnet56.run

Needs in $EXITIFY_DATA: `cifar10.npz` (x_train, y_train, x_test, y_test: uint8 pictures and labels, from Krizhevsky's
CIFAR-10) and `weights/cifar10_resnet56_akamaster.safetensors` (akamaster/pytorch_resnet_cifar10, BSD-2). Takes about six
minutes on two cores, most of them to record what the heads read and to train them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

CLASSES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
PREPROCESS = "mean=0.485,0.456,0.406;std=0.229,0.224,0.225"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("r56.exitify"))
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    data = Path(os.environ.get("EXITIFY_DATA", "../shared/data"))
    pictures, weights = data / "cifar10.npz", data / "weights" / "cifar10_resnet56_akamaster.safetensors"
    for needed in (pictures, weights):
        if not needed.exists():
            sys.exit(f"{needed} is missing: set EXITIFY_DATA to the folder that holds it (see the top of {__file__})")
    calibrate, judge = split_test_images(pictures, options.output.parent)
    model = ["examples.cifar_resnet56.model:resnet56", "--weights", str(weights), "--input-shape", "3x32x32"]
    output = str(options.output)
    exitify("transform", *model, "--preprocess", PREPROCESS, "--classes", CLASSES, "-o", output)
    exitify("train", output, "--data", f"{pictures}#train", "--epochs", str(options.epochs))
    exitify("calibrate", output, "--data", str(calibrate), "--max-drop", "0.005")
    exitify("calibrate", output, "--data", str(calibrate), "--risk", "0.02@0.95", "--profile", "careful")
    exitify("inspect", output, "--html", str(options.output.with_suffix(".html")), "--data", str(judge))
    exitify("bench", output, "--data", str(judge))


def split_test_images(pictures: Path, folder: Path) -> tuple[Path, Path]:
    """Write the test images as two halves: to calibrate on, and to judge on."""
    with np.load(pictures) as archive:
        x, y = archive["x_test"], archive["y_test"]
    order = np.random.default_rng(0).permutation(len(x))
    halves = folder / "cifar_calibrate.npz", folder / "cifar_judge.npz"
    for path, rows in zip(halves, np.array_split(order, 2)):
        np.savez(path, x=x[rows], y=y[rows])
    return halves


def exitify(*arguments: str) -> None:
    """Run a command as a user would."""
    print(f"\n$ exitify {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "exitify", *arguments], check=True)  # noqa: S603 - our own command


if __name__ == "__main__":
    main()
