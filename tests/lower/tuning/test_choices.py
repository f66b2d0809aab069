"""What the tuner may try: every choice computes the same, is plain JSON, and nothing packed for our schedules meets MetaSchedule."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tvm import relax, tirx

from exitify.lower import library
from exitify.lower.library import Kernels
from exitify.lower.processors import Machine
from exitify.lower.schedules import windows
from exitify.lower.tuning import space
from exitify.lower.tuning.database import Known, choice_text
from tests.lower.kernels import HERE, UNITS, Array, lowered, machine_with, module_of, run, stages

DEPTHWISE = (
    # channels, height, width, kernel, stride, padding
    (17, 12, 13, 3, 1, 1),
    (30, 14, 14, 3, 2, 1),
    (5, 7, 9, 5, 1, 2),
    (24, 8, 16, 7, 1, 3),
    (3, 6, 7, 1, 1, 0),
)
POOLS = ((17, 13, 12, 3, 2, 1), (24, 8, 8, 2, 2, 0))


def arrays() -> tuple[list[Array], list[Array]]:
    draw = np.random.default_rng(0)
    images = [draw.standard_normal((1, *sizes[:3])).astype(np.float32) for sizes in (*DEPTHWISE, *POOLS)]
    return images, [draw.standard_normal((sizes[0], 1, sizes[3], sizes[3])).astype(np.float32) for sizes in DEPTHWISE]


def write(emit, *images):
    _, weights = arrays()
    for image, weight, (channels, _, _, _, stride, padding) in zip(images, weights, DEPTHWISE):
        value = emit(relax.op.nn.conv2d(image, relax.const(weight), stride, padding, 1, channels))
        yield emit(relax.op.nn.relu(value))
    for image, (channels, _, _, kernel, stride, padding) in zip(images[len(DEPTHWISE) :], POOLS):
        ones = relax.const(np.ones((channels, 1, 1, 1), np.float32))
        blocked = emit(relax.op.nn.conv2d(image, ones, 1, 0, 1, channels))
        yield emit(relax.op.nn.max_pool2d(blocked, (kernel, kernel), (stride, stride), (padding,) * 4))


def expected() -> list[Array]:
    images, weights = arrays()
    convolved = [
        torch.nn.functional.conv2d(torch.from_numpy(image), torch.from_numpy(weight), None, stride, padding, 1, channels).relu().numpy()
        for image, weight, (channels, _, _, _, stride, padding) in zip(images, weights, DEPTHWISE)
    ]
    pooled = [
        torch.nn.functional.max_pool2d(torch.from_numpy(image), kernel, stride, padding).numpy()
        for image, (_, _, _, kernel, stride, padding) in zip(images[len(DEPTHWISE) :], POOLS)
    ]
    return convolved + pooled


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_every_choice_for_windows_computes_the_same(vectors, seed):
    machine, draw = machine_with(vectors), random.Random(seed)
    images, _ = arrays()
    kernels = lowered(module_of(images, write), machine)
    tried = {name: windows.choices(kernel, vectors) for name, kernel in kernels.kernels.items()}
    tried = {name: choices for name, choices in tried.items() if choices}
    assert len(tried) >= len(DEPTHWISE) + len(POOLS)
    assert sum(len(choices) > 4 for choices in tried.values()) >= 5
    for _ in range(4):
        chosen = {name: {"windows": vars(draw.choice(choices))} for name, choices in tried.items()}
        scheduled = {name: space.apply(kernels.kernels[name], json.loads(choice_text(choice)), machine) for name, choice in chosen.items()}
        found = run(kernels, images, machine, {**library.scheduled_by_default(kernels, machine), **scheduled})
        for array, known in zip(found, expected()):
            np.testing.assert_allclose(array, known, rtol=1e-5, atol=1e-5)


def test_the_first_choice_is_the_default():
    kernels = lowered(module_of(arrays()[0], write))
    for kernel in kernels.kernels.values():
        for choice in space.own_choices(kernel, HERE)[:1]:
            assert str(space.apply(kernel, choice, HERE)) == str(space.apply(kernel, None, HERE))


def test_each_choice_is_tried_once_and_ends():
    kernel = next(kernel for kernel in lowered(module_of(arrays()[0], write)).kernels.values() if "window" in stages(kernel))
    known, found = Known(), []
    for choice in space.candidates(kernel, HERE, known, 0):
        found.append(choice_text(choice))
        known.seconds[found[-1]] = random.random()
    assert len(found) == len(set(found)) == len(space.own_choices(kernel, HERE))


def packed() -> tuple[list[Array], Callable[..., list[relax.Expr]]]:
    """Inputs, and what writes a product and a Winograd convolution of them."""
    draw = np.random.default_rng(0).standard_normal
    x, image = draw((12, 48)).astype(np.float32), draw((1, 64, 24, 24)).astype(np.float32)
    product, kernel = draw((48, 80)).astype(np.float32), draw((64, 64, 3, 3)).astype(np.float32)

    def write(emit, x, image):
        convolved = emit(relax.op.nn.conv2d(image, relax.const(kernel), padding=1))
        return [emit(relax.op.nn.relu(emit(relax.op.matmul(x, relax.const(product))))), emit(relax.op.nn.relu(convolved))]

    return [x, image], write


def packed_kernels(machine: Machine) -> tuple[Kernels, dict[str, tirx.PrimFunc]]:
    """All kernels of the two, and those that read what was packed."""
    inputs, write = packed()
    kernels = lowered(module_of(inputs, write), machine)
    found = {name: one for name, one in kernels.kernels.items() if {"product", "winograd"} & set(stages(one))}
    assert len(found) == 2
    return kernels, found


def test_what_is_packed_for_our_schedules_is_not_handed_to_metaschedule():
    for one in packed_kernels(HERE)[1].values():
        known, tried = Known(), []
        for choice in space.candidates(one, HERE, known, 0):
            tried.append(choice)
            known.seconds[choice_text(choice)] = 1.0
        ours = space.own_choices(one, HERE)
        assert tried[0] is None
        assert sorted(map(choice_text, tried[1:])) == sorted(map(choice_text, ours[1:]))
        assert len(ours) > 3, ours


@pytest.mark.parametrize("vectors", UNITS, ids=str)
def test_every_choice_for_products_and_winograd_computes_the_same_bits(vectors, seed):
    machine, draw, inputs = machine_with(vectors), random.Random(seed), packed()[0]
    kernels, found = packed_kernels(machine)
    default = library.scheduled_by_default(kernels, machine)
    expected = run(kernels, inputs, machine)
    for _ in range(5):
        chosen = {name: draw.choice(space.own_choices(one, machine)) for name, one in found.items()}
        scheduled = {name: space.apply(found[name], json.loads(choice_text(choice)), machine) for name, choice in chosen.items()}
        for array, known in zip(run(kernels, inputs, machine, {**default, **scheduled}), expected):
            np.testing.assert_array_equal(array, known, err_msg=str(chosen))


def test_a_kernel_on_which_metaschedules_rules_fail_has_the_default_alone(monkeypatch, caplog):
    from tvm.s_tir import meta_schedule

    def fails(self):
        raise RuntimeError("no such producer\nand a long text")

    monkeypatch.setattr(meta_schedule.TuneContext, "generate_design_space", fails)
    kernels = lowered(module_of([np.ones((3, 8, 5), np.float32)], lambda emit, x: [emit(relax.op.exp(x))]))
    (kernel,) = kernels.kernels.values()
    with caplog.at_level("INFO"):
        assert list(space.candidates(kernel, HERE, Known({choice_text(None): 1.0}), 0)) == []
    assert "no such producer" in caplog.text
    assert "long text" not in caplog.text
