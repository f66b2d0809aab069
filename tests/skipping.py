"""A network with skip paths, exits and a second set of norms unlike the first, exported once for all tests that run masks."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import torch
from torch import nn

from examples.cifar_resnet56.model import CifarResNet
from exitify.artifact.artifact import Artifact
from exitify.onnx_export.to_artifact import export
from exitify.passes.switch_norms import SwitchNorms
from exitify.pipeline import transform
from exitify.program import SKIP_NORMS, Program

SHAPE = (3, 16, 16)
EXITS = "layer1,layer2.0"
"""After a whole stage, and after a mandatory sub-path."""

MASKS = ["".join(flags) for flags in itertools.product("01", repeat=3)]


@functools.cache
def skipping(*, exits: str = EXITS) -> tuple[Program, Artifact]:
    """A CIFAR ResNet of two blocks a stage, and its artifact; every mask answers otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CifarResNet(2, classes=7)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(torch.randn(64, *SHAPE))
        torch.randn(2, *SHAPE)  # of the networks that a seed may give, one whose exits are worth little once something is left out
        program = transform(model.eval(), torch.zeros(1, *SHAPE), exits=exits, skips="auto", head="linear").eval()
        assert SwitchNorms.name in program.recipe[-2]
        with torch.no_grad():
            for name, tensor in program.get_submodule(SKIP_NORMS).state_dict().items():
                if tensor.is_floating_point():
                    tensor.mul_(torch.rand_like(tensor) * 0.6 + 0.7)
                    assert name
            for name, parameter in program.named_parameters():
                if name.endswith("classifier.weight"):
                    parameter.mul_(6)
    return program, export(program)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """Different inputs, `(count, *SHAPE)`."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE)).astype(np.float32)


def torch_says(mask: str, x: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of every exit under a mask, by torch."""
    program, _ = skipping()
    with torch.no_grad():
        outputs = program(torch.from_numpy(x), skip=mask, all_exits=True)
    return dict(zip(outputs.names, (logits.numpy() for logits in outputs.logits)))
