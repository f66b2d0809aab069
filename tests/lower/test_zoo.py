"""One network of every torchvision family, untuned and tuned with two trials a task: TVM's answers are torch's."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

from exitify.artifact.artifact import Artifact
from exitify.lower.library import lower_segments, silent_stderr
from exitify.lower.pipeline import compile_artifact
from exitify.lower.processors import Machine, machine_of
from exitify.lower.tuning.database import Database
from exitify.lower.tuning.tasks import tasks_of
from exitify.onnx_export.to_artifact import export
from exitify.pipeline import transform
from exitify.plan import FINAL
from exitify.runtime.session import Session
from exitify.targets import load_target

SHARE = 1e-4
"""Of the largest logit: how far TVM's may be from torch's."""


@dataclass(frozen=True)
class Family:
    """A network that stands for its family, and the smallest input that it is quick on. options: What it is built with."""

    name: str
    size: int = 64
    options: dict[str, object] = field(default_factory=dict)


FAMILIES = {
    "alexnet": Family("alexnet"),
    "convnext": Family("convnext_tiny"),
    "densenet": Family("densenet121"),
    "efficientnet_b": Family("efficientnet_b0"),
    "efficientnet_v2": Family("efficientnet_v2_s"),
    "googlenet": Family("googlenet", options={"aux_logits": False, "init_weights": False}),
    "inception": Family("inception_v3", 96, {"aux_logits": False, "init_weights": False}),
    "maxvit": Family("MaxVit", options={
        "input_size": (64, 64), "partition_size": 2, "stem_channels": 64, "block_channels": [64, 128, 256, 512],
        "block_layers": [2, 2, 5, 2], "head_dim": 32, "stochastic_depth_prob": 0.2,
    }),
    "mnasnet": Family("mnasnet0_5"),
    "mobilenet_v2": Family("mobilenet_v2"),
    "mobilenet_v3": Family("mobilenet_v3_small"),
    "regnet_x": Family("regnet_x_400mf"),
    "regnet_y": Family("regnet_y_400mf"),
    "resnet": Family("resnet18"),
    "resnext": Family("resnext50_32x4d"),
    "shufflenet": Family("shufflenet_v2_x1_0"),
    "squeezenet": Family("squeezenet1_1"),
    "swin_v2": Family("swin_v2_t"),
    "swin": Family("swin_t"),
    "vgg": Family("vgg11"),
    "vit": Family("vit_b_16", options={"image_size": 64}),
    "wide_resnet": Family("wide_resnet50_2"),
}  # fmt: skip
"""By the beginning of their names. maxvit_t is built for 224 pixels, where it takes long: its class, for fewer."""


def test_every_family_of_torchvision_is_here(torchvision):
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) > 70
    assert [name for name in names if not name.startswith(tuple(FAMILIES))] == []
    assert [beginning for beginning in FAMILIES if not any(name.startswith(beginning) for name in names)] == []


def built(torchvision, family: Family) -> nn.Module:
    """The network with random weights that let its input through: norms know their input, and no layer is 0 or nearly so."""
    make = getattr(torchvision.models, family.name, None) or getattr(torchvision.models.maxvit, family.name)
    model = make(**family.options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 1.0
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0.5, 0.1)
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(0, 0.05)
        for name, parameter in model.named_parameters():
            if name.endswith("layer_scale"):
                parameter.uniform_(0.5, 1)
        model.train()(torch.randn(32, 3, family.size, family.size))  # of few samples some channels would hardly vary, and rounding be blown up
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("trials_a_task", [0, 2])
@pytest.mark.parametrize("beginning", FAMILIES)
def test_a_compiled_network_says_what_torch_says(torchvision, tmp_path, beginning, trials_a_task):
    family = FAMILIES[beginning]
    model = built(torchvision, family)
    x = torch.randn(2, 3, family.size, family.size)
    with torch.no_grad():
        expected = model(x).numpy()
    exported, target = export(transform(model, x[:1], exits="none")), load_target("host")
    trials = trials_a_task * number_of_tasks(exported, machine_of(target)) if trials_a_task else 0
    artifact = compile_artifact(exported, target, trials=trials, database=Database(tmp_path / "db"))
    compiled = artifact.targets["host"]
    assert compiled.left_to == ""
    assert (compiled.trials > 0) == (trials > 0)
    found = Session(artifact, engine="tvm", threads=1).record(x.numpy()).logits[FINAL]
    largest = np.abs(expected).max()
    error = np.abs(found - expected).max() / largest
    print(f"{beginning}, {compiled.trials} trials: {error:.1e} of the largest logit")
    assert error <= SHARE
    assert np.abs(expected[0] - expected[1]).max() > 100 * SHARE * largest  # the answers depend on the input


def number_of_tasks(artifact: Artifact, machine: Machine) -> int:
    with silent_stderr():
        return len(tasks_of(lower_segments(artifact, artifact.plan.segments, machine), machine))
