"""A network with skip paths, and samples of it."""

from __future__ import annotations

import numpy as np
import pytest

from exitify.artifact.artifact import Artifact
from exitify.data import Samples, load_samples
from exitify.plan import FINAL
from tests.skipping import pictures, skipping, torch_says


@pytest.fixture(scope="package")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Inputs whose labels are the whole network's answers, but for a tenth of them."""
    x = pictures(120, seed=3)
    labels = torch_says("000", x)[FINAL].argmax(axis=1)
    labels[::10] = (labels[::10] + 1) % 7
    path = tmp_path_factory.mktemp("masks") / "samples.npz"
    np.savez(path, x=x, y=labels)
    return load_samples(str(path), skipping()[1].manifest.input, classes=7)


@pytest.fixture
def artifact() -> Artifact:
    return skipping()[1]
