"""RevCol-T has the paper's size, its columns can be reversed, and an exit after one cuts five tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import exitify
from examples.revcol_t.model import LEAST_ALPHA, Level, RevCol, StochasticDepth, revcol_t
from tests.helpers import assert_close, assert_same_in_both_modes, run_segments

CHANNELS, CLASSES = (8, 12, 16, 20), 5


def tiny() -> RevCol:
    """Three columns, as if trained: layer scales near 1 instead of 1e-6, alphas between 0.3 and 1 of either sign."""
    model = RevCol(CHANNELS, blocks=(1, 2, 1, 1), columns=3, classes=CLASSES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.normal_(1, 0.2)
            elif name.endswith("alpha"):
                parameter.uniform_(0.3, 1).mul_(torch.randn_like(parameter).sign())
    return model.eval()


def images(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64)


@pytest.fixture(scope="module")
def full_size() -> nn.Module:
    """Without memory for its weights."""
    with torch.device("meta"):
        return revcol_t().eval()


def test_revcol_t_has_the_papers_30_million_parameters(full_size):
    assert sum(parameter.numel() for parameter in full_size.parameters()) == pytest.approx(30e6, rel=0.02)


def test_revcol_t_costs_the_papers_4_5_billion_multiply_adds(full_size):
    with FlopCounterMode(display=False) as counter:
        scores = full_size(torch.empty(1, *revcol_t.input_shape, device="meta"))
    assert scores.shape == (1, 1000)
    assert counter.get_total_flops() / 2 == pytest.approx(4.5e9, rel=0.02)


def test_the_head_of_revcol_t_is_a_norm_and_a_linear_layer_of_514024_parameters(full_size):
    assert sum(parameter.numel() for parameter in full_size.head.parameters()) == 514_024


def test_stochastic_depth_rises_to_a_tenth_over_the_blocks_of_each_column(full_size):
    for column in full_size.columns:
        rates = [module.rate for module in column.modules() if isinstance(module, StochasticDepth)]
        assert rates == pytest.approx([0.1 * i / 9 for i in range(10)])


def test_stochastic_depth_drops_whole_samples_in_train_mode_alone_and_keeps_the_mean():
    drop, x = StochasticDepth(0.25), torch.ones(4000, 2, 3, 3)
    y = drop.train()(x)
    kept = y[:, 0, 0, 0] != 0
    assert torch.equal(y, kept[:, None, None, None] * x / 0.75)
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.04)  # six standard deviations
    assert torch.equal(drop.eval()(x), x)


def test_a_column_gives_back_the_levels_of_the_column_before():
    model = tiny()
    with torch.no_grad():
        stem = model.stem(images(2))
        before = model.columns[0](stem)
        for column in model.columns[1:]:
            levels = column(stem, before)
            for got, expected in zip(column.reverse(stem, levels), before, strict=True):
                assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
            before = levels


def test_reversing_needs_the_alphas_and_the_blocks():
    """What the test above would say of a reverse that left either out."""
    model = tiny()
    with torch.no_grad():
        stem = model.stem(images())
        before = model.columns[0](stem)
        levels = model.columns[1](stem, before)
        for change in (lambda level: level.alpha.mul_(1.01), lambda level: level.blocks[0].scale.mul_(1.01)):
            column = copy.deepcopy(model.columns[1])
            for level in column.children():
                change(level)
            for got, expected in zip(column.reverse(stem, levels), before, strict=True):
                assert (got - expected).abs().max() > 1e-4 * expected.abs().max()


def test_no_column_stands_before_the_first():
    model = tiny()
    stem = model.stem(images())
    with pytest.raises(ValueError, match="no column stands before the first"):
        model.columns[0].reverse(stem, model.columns[0](stem))


def test_the_last_level_of_every_later_column_depends_on_five_tensors():
    model = tiny()
    stem = model.stem(images()).detach()
    before = [level.detach() for level in model.columns[0](stem)]
    assert [tuple(level.shape[1:]) for level in before] == [(8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)]
    for column in model.columns[1:]:
        five = [tensor.clone().requires_grad_() for tensor in (stem, *before)]
        last = column(five[0], five[1:])[-1]
        gradients = torch.autograd.grad((last * torch.randn_like(last)).sum(), five)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_an_exit_after_a_column_cuts_five_tensors():
    model = tiny()
    program = exitify.transform(model, images(), exits="columns.0,columns.1", head="linear")
    segments = {segment.name: segment for segment in program.plan.segments}
    shapes = [(8, 16, 16), (8, 16, 16), (12, 8, 8), (16, 4, 4), (20, 2, 2)]
    trunks = [segment for name, segment in segments.items() if name.startswith("trunk")]
    assert [len(trunk.inputs) for trunk in trunks] == [1, 5, 5]
    for trunk in trunks[1:]:
        assert [program.values[name].shape for name in trunk.inputs] == shapes
    x = images(2)
    assert_close(run_segments(program, x)[program.plan.output], model(x))


@pytest.mark.parametrize("start", [0.0, 1e-9, -1e-9, 9e-4, -9e-4, 2e-3, -0.7])
def test_alpha_in_use_is_never_below_a_thousandth_and_keeps_its_sign(start):
    level = Level(4, [0.0], None, 6, is_first=False)
    with torch.no_grad():
        level.alpha.fill_(start)
    used = level.factor()
    assert used.abs().min() >= torch.tensor(LEAST_ALPHA)
    assert torch.equal(used < 0, level.alpha < 0)
    if abs(start) >= LEAST_ALPHA:
        assert torch.equal(used, level.alpha)
    assert torch.equal(level.alpha.detach(), torch.full((4, 1, 1), start))  # using it writes nothing
    used.sum().backward()
    assert torch.equal(level.alpha.grad, torch.ones(4, 1, 1))  # no alpha is stuck below


def test_a_level_with_all_alphas_at_zero_can_still_be_reversed():
    level = Level(4, [0.0], None, None, is_first=False).double()
    with torch.no_grad():
        level.alpha.zero_()
        below, before = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
        value = level(below, None, before)
        assert torch.equal(value, LEAST_ALPHA * before + level.fresh(below, None))
        torch.testing.assert_close(level.reverse(value, below, None), before)


def test_alphas_start_at_a_half_and_the_first_column_has_none():
    model = RevCol(CHANNELS, (1, 1, 1, 1), columns=2, classes=CLASSES)
    alphas = {name: alpha for name, alpha in model.named_parameters() if name.endswith("alpha")}
    assert list(alphas) == [f"columns.1.level{i}.alpha" for i in range(4)]
    assert all((alpha == 0.5).all() for alpha in alphas.values())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_captured_revcol_answers_as_the_model_in_both_modes(batch, seed):
    model = tiny()
    program = copy.deepcopy(exitify.capture(model, images()))
    assert_same_in_both_modes(program, model, images(batch), seed)


def test_stochastic_depth_stays_one_node_of_a_captured_revcol():
    program = exitify.capture(tiny(), images())
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    assert sum(name.endswith(".drop") for name in called) == 3 * 5


def test_the_factory_tells_its_input_and_how_many_classes():
    with torch.device("meta"):
        assert revcol_t(classes=7)(torch.empty(2, *revcol_t.input_shape, device="meta")).shape == (2, 7)
    contract = exitify.load_model("examples.revcol_t.model:revcol_t").contract
    assert contract.shape == (3, 224, 224)
    assert contract.preprocess.crop == (224, 224)
