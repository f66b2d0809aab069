"""A captured network is the network: same weights, same names, same answers in both modes at any batch size."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from exitify.errors import ModelError
from exitify.program import Program
from exitify.tracing import capture
from tests.helpers import assert_close, captured, images, run_segments, state, with_exits
from tests.models import CLASSES, SHAPE, ZOO, warm_up


class Small(nn.Module):
    """A stem, a part that each test fills in, and a classifier."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.part, self.fc = nn.Conv2d(3, 4, 3, padding=1), part or nn.Identity(), nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.part(self.stem(x)).mean((2, 3)))


def targets(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("name", ZOO)
def test_a_program_holds_the_very_parameters_of_the_model_under_their_names(name):
    model = ZOO[name]()
    program = capture(model, images())
    assert list(program.state_dict()) == list(model.state_dict())
    original = dict(model.named_parameters()) | dict(model.named_buffers())
    held = dict(program.named_parameters()) | dict(program.named_buffers())
    assert held.keys() == original.keys()
    assert all(held[key] is original[key] for key in held)


# Both run the same kernels on the same numbers, nothing is re-associated: equal, not close.


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ZOO)
def test_in_eval_a_program_answers_as_the_model_at_any_batch_size(name, batch):
    model = warm_up(ZOO[name]())
    program = capture(model, images())
    x = images(batch)
    assert not program.training
    assert torch.equal(program(x), model(x))


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ZOO)
def test_in_train_a_program_draws_and_updates_as_the_model(name, batch, seed):
    model = warm_up(ZOO[name]())
    program = copy.deepcopy(capture(model, images()))
    x = images(batch)
    torch.manual_seed(seed)
    expected = model.train()(x)
    torch.manual_seed(seed)
    got = program.train()(x)
    assert torch.equal(got.final, expected)
    expected_state = model.state_dict()
    assert all(torch.equal(tensor, expected_state[key]) for key, tensor in program.state_dict().items())


@pytest.mark.parametrize("name", ["dropout", "stochastic"])
def test_random_parts_rest_in_eval_and_draw_in_train(name):
    program = captured(name)
    x = images(4)
    assert torch.equal(program(x), program(x))
    program.train()
    assert not torch.equal(program(x).final, program(x).final)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_capture_leaves_the_model_as_it_was(name, training):
    model = warm_up(ZOO[name]()).train(training)
    next(model.children()).train(not training)  # as a part that the user has frozen
    before, modes = state(model), {path: module.training for path, module in model.named_modules()}
    program = capture(model, torch.zeros(1, *SHAPE))
    assert program.training == training
    assert {path: module.training for path, module in model.named_modules()} == modes
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_values_have_shapes_without_the_batch_and_places_name_the_modules():
    program = captured("projection")
    assert program.values["x"].shape == (3, 16, 16)
    assert program.values["block1_conv1_0"].shape == (8, 8, 8)
    assert (program.values["fc"].shape, program.values["fc"].dtype) == ((CLASSES,), "float32")
    assert program.places["block1_conv1_0"] == "block1.conv1.0"
    assert program.places["relu_1"] == "block1"


def test_only_values_whose_first_dimension_is_the_batch_are_described():
    program = captured("transformer")
    assert program.values["block1_mlp_0"].shape == (17, 32)
    assert "permute" not in program.values  # (3, N, heads, tokens, width)
    assert "getattr_1" not in program.values  # a shape


def test_one_block_called_twice_stays_one_set_of_weights():
    program = captured("shared")
    assert targets(program).count("block.conv1.0") == 2
    assert sum(name.startswith("block.conv1.0") for name in program.state_dict()) == 1


def test_capturing_an_unnamed_model_records_no_source_and_a_named_one_its_name():
    assert capture(Small(), images()).source == ""
    assert capture(Small(), images(), source="timm:small").source == "timm:small"


class ReadsMode(nn.Module):
    """Reads `self.training`, and has a child called as a function of torch is."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(x) * 2 if self.training else x


@pytest.mark.parametrize("name", ["stochastic", "own dropout"])
def test_a_module_that_reads_its_mode_stays_one_node(name):
    program = captured("stochastic") if name == "stochastic" else capture(Small(ReadsMode()).eval(), images())
    assert {"block1", "block2"} <= set(targets(program)) if name == "stochastic" else "part" in targets(program)


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_starts_in_the_models_mode(training):
    program = capture(ZOO["dropout"]().train(training), images())
    assert {program.get_submodule(name).training for name in ("traced_dropout", "traced_dropout2d")} == {training}


def test_functional_dropout_follows_the_mode_and_adds_no_weights():
    model = warm_up(ZOO["dropout"]())
    program = capture(model, images())
    kept = [type(program.get_submodule(target)) for target in targets(program) if target.startswith("traced_")]
    assert kept == [nn.Dropout, nn.Dropout2d]
    assert [program.get_submodule(name).p for name in ("traced_dropout", "traced_dropout2d")] == [0.3, 0.2]
    assert not [name for name, _ in model.named_modules() if name.startswith("traced_")]


class BranchesOnValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.mean() > 0 else -x


def test_control_flow_inside_a_submodule_keeps_that_submodule_as_one_node():
    model = Small(nn.Sequential(nn.ReLU(), BranchesOnValues())).eval()
    program = capture(model, images())
    assert targets(program)[1:5] == ["stem", "part.0", "part.1", "mean"]
    for sign in (1, -1):
        x = sign * images(2).abs() * 10
        assert torch.equal(program(x), model(x))


class Settings:
    """No tensor, and nothing that a graph can hold."""


class BranchesWithSettings(BranchesOnValues):
    def forward(self, x: torch.Tensor, settings: Settings) -> torch.Tensor:
        return super().forward(x)


class MadeWithSettings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = BranchesWithSettings()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.branch(x, Settings())


def test_where_one_node_cannot_hold_the_arguments_the_module_around_becomes_the_node():
    program = capture(Small(MadeWithSettings()).eval(), images())
    assert "part" in targets(program)
    assert "part.branch" not in targets(program)


class BranchesAtTheTop(Small):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        if x.mean() > 0:
            x = -x
        return self.fc(x.mean((2, 3)))


def test_control_flow_at_the_top_is_refused_with_its_line():
    with pytest.raises(ModelError, match=r"BranchesAtTheTop cannot be traced: .*depends on the values of a tensor") as caught:
        capture(BranchesAtTheTop(), images())
    assert re.search(r"test_tracing\.py:\d+: if x\.mean\(\) > 0:\)$", caught.value.problem)
    assert "submodule of its own" in caught.value.hint


class PassesSettingsAtTheTop(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return self.fc(self.part(self.stem(x), Settings()).mean((2, 3)))


def test_a_module_at_the_top_that_can_be_no_node_is_refused_and_not_tried_for_ever():
    with pytest.raises(ModelError, match=r"PassesSettingsAtTheTop cannot be traced: argument of type.*Settings"):
        capture(PassesSettingsAtTheTop(BranchesWithSettings()), images())


class HoldsConstants(Small):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(3.0)  # neither parameter nor buffer

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x * self.scale + torch.arange(16.0))


def test_tensors_that_are_no_weights_come_along_and_the_model_gets_no_attribute():
    model = HoldsConstants().eval()
    attributes = list(vars(model))
    program = capture(model, images())
    x = images(2)
    assert torch.equal(program(x), model(x))
    assert torch.equal(copy.deepcopy(program)(x), model(x))
    assert list(program.state_dict()) == list(model.state_dict())
    assert list(vars(model)) == attributes


class ComputesMore(Small):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        _unused = self.part(x).relu()
        return self.fc(x.mean((2, 3)))


def test_what_nothing_reads_is_not_in_the_graph_and_its_weights_stay():
    model = ComputesMore(nn.Conv2d(4, 4, 1)).eval()
    program = capture(model, images())
    assert "part" not in targets(program)
    assert list(program.state_dict()) == list(model.state_dict())
    run_segments(with_exits(program, "stem"), images())


class OverwritesAndForgets(Small):
    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        self.part(x)
        F.leaky_relu(x, 0.2, inplace=True)
        x.mul_(2)
        return self.fc(x.mean((2, 3)))


class OverwritesAndReadsAgain(Small):
    def __init__(self, part: nn.Module) -> None:
        super().__init__(part)
        self.after = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        y = self.part(x)
        z = self.after(x)  # of the overwritten x
        return self.fc((y + z).mean((2, 3)))


@pytest.mark.parametrize("kind", [OverwritesAndForgets, OverwritesAndReadsAgain])
def test_who_reads_a_value_that_was_overwritten_reads_what_it_was_overwritten_with(kind):
    model = kind(nn.ReLU(inplace=True)).eval()
    program = capture(model, images())
    x = images(2)
    assert torch.equal(program(x, all_exits=True).final, model(x))
    exits = [name for name in program.values if name not in ("x", "stem", "fc")]
    for name in exits:  # each alone: a cut must not leave out an operation that only overwrites
        transformed = with_exits(program, name)
        assert torch.equal(run_segments(transformed, x)["fc"], model(x))
        assert torch.equal(run_segments(transformed, x)["exit1.logits"], with_exits_answer(transformed, x, name))


def with_exits_answer(program: Program, x: torch.Tensor, value: str) -> torch.Tensor:
    """The head's logits from the value as the whole network computes it, by torch's own interpreter."""
    seen: dict[str, torch.Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.name == value:
                seen[value] = result.clone()
            return result

    with torch.no_grad():
        Recorder(program, graph=program.graph).run(x)
        return program.get_submodule("exit_heads.exit1")(seen[value])


class And(Small):
    def forward(self, x: torch.Tensor) -> Any:
        a, b = x > 0, x < 1
        both = a & b
        return self.fc(self.stem(both.to(x.dtype) + a.to(x.dtype)).mean((2, 3)))


def test_an_operator_whose_name_ends_in_an_underscore_overwrites_nothing():
    program = capture(And().eval(), images())
    (first,) = [node for node in program.graph.nodes if node.name == "gt"]
    assert len(first.users) == 2


class TwoInputs(Small):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> Any:
        return super().forward(x * scale)


class OptionalInputs(Small):
    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None, *more: Any, power: int = 2, **options: Any) -> Any:
        x = x * scale if scale is not None else x
        return super().forward((x + len(more) + len(options)) ** power)


def test_arguments_that_can_be_left_out_are_left_out():
    model = OptionalInputs().eval()
    program = capture(model, images())
    x = images(3)
    assert torch.equal(program(x), model(x))
    assert [node.name for node in program.graph.nodes if node.op == "placeholder"] == ["x"]


class Answers(Small):
    """Returns what a test asks for."""

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        return self.make(super().forward(x))


class AuxiliaryInTrain(Small):
    def forward(self, x: torch.Tensor) -> Any:
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class ModeAtTheTop(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x * 2 if self.training else x)


class Counts(nn.Module):
    """Not the same twice."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.calls


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: {"fc.weight": torch.zeros(2)}, "dict is not a torch.nn.Module\n  hint: give the module itself"),
        (lambda: F.relu, "is not a torch.nn.Module"),
        (lambda: TwoInputs(), r"TwoInputs\.forward.* cannot be called with the example: .*scale"),
        (lambda: Small(nn.Conv2d(5, 4, 1)), "the model fails on an input of shape 3x16x16 at batch 1: .*channels.*\n  hint: check --input-shape"),
        (
            lambda: Answers(lambda y: (y, y)),
            r"the model returns 0 \(3, 5\), 1 \(3, 5\), and which of it are the class scores .*\n  hint: say it: --scores",
        ),
        (lambda: Answers(lambda y: {"logits": y[:, :, None]}), r"the model returns logits \(3, 5, 1\), and which of it"),
        (lambda: Answers(lambda y: y[:, :, None]), r"the model returns \(1, 5, 1\), and exits need class scores of shape \(N, classes\)"),
        (lambda: Answers(lambda y: y[:1]), r"the model returns \(1, 5\), and exits need"),
        (lambda: Answers(lambda y: y[:, 0]), r"the model returns \(1,\), and exits need"),
        (lambda: Answers(lambda y: y[:, :1]), "the model has a single output; exits need at least two class scores"),
        (
            lambda: AuxiliaryInTrain(),
            r"itself computes something else in train\(\) than in eval\(\) \(.*test_tracing.py:\d+\)\n  hint: .*aux_logits=False",
        ),
        (lambda: ModeAtTheTop(), r"itself computes something else in train\(\) than in eval\(\) \(.*\)\n  hint: .*submodule of its own"),
        (lambda: Small(Counts()), r"in eval\(\) at batch 1 the traced network differs from the model"),
    ],
)
def test_what_is_no_classifier_with_one_input_and_one_output_is_refused(make, problem):
    with pytest.raises(ModelError, match=problem):
        capture(make(), images())


@pytest.mark.parametrize("example", [torch.zeros(3), None, np.zeros((1, 3, 16, 16), np.float32)], ids=type)
def test_an_example_that_is_no_tensor_with_a_batch_is_refused(example):
    with pytest.raises(ModelError, match=r"the example input must be one tensor with a batch dimension\n  hint: .*torch.zeros"):
        capture(Small(), example)


class FixesBatchWhenTraced(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.reshape(1 if isinstance(x, torch.fx.Proxy) else x.shape[0], 3, 16, 16))


def test_a_network_traced_for_one_batch_size_is_refused():
    with pytest.raises(ModelError, match="the traced network fails at batch 2, where the model does not: shape"):
        capture(FixesBatchWhenTraced(), images())


@pytest.mark.parametrize("member", ["graph", "plan", "values", "places", "recipe", "source"])
def test_a_member_with_a_name_of_programs_own_is_refused(member):
    model = Small()
    model.add_module(member, nn.Linear(1, 1))
    with pytest.raises(ModelError, match=f"the model has a member called '{member}', a name that Program uses itself\n  hint: rename"):
        capture(model, images())


def exported(model: nn.Module, folder: Path, *, dynamic: bool) -> nn.Module:
    """Through a file, as a user's model.pt2 comes."""
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    torch.export.save(torch.export.export(model, (images(2),), dynamic_shapes=shapes), folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


@pytest.mark.parametrize("name", ["in_place", "transformer", "depthwise"])
def test_an_exported_network_is_captured_with_its_answers_and_weights(name, tmp_path):
    model = warm_up(ZOO[name]())
    program = capture(exported(model, tmp_path, dynamic=True), images())
    assert dict(program.named_parameters()).keys() == dict(model.named_parameters()).keys()
    for batch in (1, 2, 3):
        x = images(batch)
        # export may write one operation as others (`F.linear` as addmm): close, not equal
        assert_close(program(x), model(x))
        assert_close(program(x, all_exits=True).final, model(x))


def test_exits_in_an_exported_network_are_cut_as_in_the_model(tmp_path):
    model = warm_up(ZOO["in_place"]())
    program = with_exits(capture(exported(model, tmp_path, dynamic=True), images()), "block1")
    assert program.plan.exits[0].place == "block1.relu" or program.plan.exits[0].place.startswith("block1")
    x = images(2)
    values = run_segments(program, x)
    assert_close(values[program.plan.output], model(x))
    assert_close(values["exit1.z"], model.block1(model.stem(x)).mean((2, 3)))


def test_a_network_exported_for_one_batch_size_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"at batch 1: .*\n  hint: .*a \.pt2 must be exported with a dynamic batch dimension"):
        capture(exported(Small().eval(), tmp_path, dynamic=False), images())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "vit_b_16", "convnext_tiny"])
def test_torchvisions_networks_are_captured_and_cut(name, torchvision: ModuleType):
    small = {"vit_b_16": {"image_size": 32}}.get(name, {})
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **small).eval()
    x = torch.randn(1, 3, 32, 32)
    program = with_exits(capture(model, x), "2")
    assert torch.equal(run_segments(program, x)[program.plan.output], model(x))


@pytest.mark.parametrize("name", ["regnetx_002", "deit_tiny_patch16_224", "mixer_s32_224"])
def test_timms_networks_are_captured_and_cut(name, timm: ModuleType):
    model = timm.create_model(name, pretrained=False, num_classes=10, drop_path_rate=0.1).eval()
    x = torch.randn(1, 3, 224, 224)
    program = with_exits(capture(model, x), "2")
    assert torch.equal(run_segments(program, x)[program.plan.output], model(x))


@pytest.mark.data
def test_a_trained_network_keeps_its_accuracy_and_its_first_exit_reads_real_features(data_file):
    from safetensors.torch import load_file

    from examples.cifar_resnet56.model import resnet20

    model = resnet20().eval()
    model.load_state_dict(load_file(data_file("weights/cifar10_resnet20_akamaster.safetensors")))
    with np.load(data_file("cifar10.npz")) as data:
        x, y = data["x_test"][:200], torch.from_numpy(data["y_test"][:200].astype(np.int64))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(x) / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()
    program = with_exits(capture(model, x[:1]), "layer1,layer2")
    got = run_segments(program, x)[program.plan.output]
    assert torch.equal(got, model(x))
    # The weights' card says 91.73 % on all 10,000 test images; four standard errors of 200 images are 8 points.
    assert (got.argmax(1) == y).float().mean() > 0.83


class DropsBlocksByPythonsRandom(nn.Module):
    """Stochastic depth as some networks draw it: not from torch."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3)
        self.block = SkipsAtRandom()
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        return self.classifier(self.block(self.convolution(x)).mean(dim=(2, 3)))


class SkipsAtRandom(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        if self.training and (random.random() < 0.5 or np.random.rand() < 0.5):
            return x
        return x + self.inner(x)


@pytest.mark.parametrize("seed", range(4))
def test_depth_drawn_from_pythons_or_numpys_generator_is_captured(seed):
    random.seed(seed)
    np.random.seed(seed)
    before = random.getstate()
    program = capture(DropsBlocksByPythonsRandom(), images())
    assert random.getstate() == before
    assert program.training


class AsksForShapes(nn.Module):
    """Windows of a map, as Swin makes them: branches, loops and numbers that follow from the shape."""

    def __init__(self, window: int = 4) -> None:
        super().__init__()
        self.window, self.stem = window, nn.Conv2d(3, 4, 3, padding=1)
        self.mixes = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.fc = nn.Linear(4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        n, channels, height, width = x.shape
        if height % self.window or width != height:
            raise ValueError(f"{height} is no multiple of {self.window}")
        side = int((height * width) ** 0.5)
        assert x.shape[0] == n
        positions = torch.arange(side // self.window, dtype=torch.float32).mean()
        x = x.reshape(n, channels, side // self.window, self.window, -1, self.window).permute(0, 2, 4, 3, 5, 1).reshape(-1, self.window**2, channels)
        for i in range(x.size(2)):
            x = x + self.mixes[i](x)
        return self.fc(x.reshape(n, -1, channels).mean(1) + positions)


def test_control_flow_on_shapes_is_resolved_and_the_batch_stays_free():
    model = AsksForShapes().eval()
    program = capture(model, images())
    assert targets(program).count("mixes.0") == 1
    assert {"mixes.1", "mixes.2", "mixes.3", "fc"} <= set(targets(program))
    for batch in (1, 2, 3, 7):
        x = images(batch)
        assert torch.equal(program(x), model(x))


class AsksForTheBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.shape[0] > 2 else x + x


def test_a_branch_on_the_batch_size_stays_inside_one_node():
    model = Small(AsksForTheBatch()).eval()
    program = capture(model, images())
    assert "part" in targets(program)
    assert all(torch.equal(program(x), model(x)) for x in (images(1), images(2), images(3)))


class AsksForTheBatchAtTheTop(Small):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x if x.shape[0] > 2 else x + 1)


def test_a_branch_on_the_batch_size_at_the_top_is_refused_with_both_answers():
    with pytest.raises(ModelError, match=r"cannot be traced: .*depends on the batch size \(.* is False or True\) \(.*test_tracing\.py:\d+"):
        capture(AsksForTheBatchAtTheTop(), images())


class Deep(nn.Module):
    """A large module that reads its mode in a method, of which one small part depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = IdentityPart(), IdentityPart()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self._noise(self.first(x)))

    def _noise(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, self.training)


class IdentityPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.noisy = nn.Conv2d(4, 4, 1), Noisy()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            pass
        return self.noisy(self.conv(x)) + x


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x) if self.training else x


def test_of_modules_that_read_their_mode_only_the_innermost_that_depend_on_it_are_whole():
    program = capture(Small(Deep()).eval(), images())
    assert {"part.first.conv", "part.first.noisy", "part.second.conv", "part.second.noisy"} <= set(targets(program))
    assert not {"part", "part.first"} & set(targets(program))


def test_capture_leaves_the_generators_where_they_were():
    model = Small(Deep())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    capture(model, torch.zeros(1, *SHAPE))
    assert torch.equal(torch.rand(3), expected)


class ThreeInputs(nn.Module):
    """A picture, numbers beside it, and a mask that goes by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.block, self.fc = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Linear(6, 8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, CLASSES),
        )

    def forward(self, x: torch.Tensor, numbers: torch.Tensor, *, mask: torch.Tensor | None = None, power: int = 1) -> dict[str, Any]:
        x = self.stem(x).relu() + self.side(numbers)[:, :, None, None]
        features = self.block(x).relu() ** power
        pooled = features.mean((2, 3))
        if mask is not None:
            pooled = pooled * mask
        return {"logits": self.fc(pooled), "features": (features, pooled)}


def three_inputs(batch: int) -> dict[str, torch.Tensor]:
    return {"x": images(batch), "numbers": torch.randn(batch, 6), "mask": torch.rand(batch, 8)}


def test_several_inputs_some_by_name_and_a_dict_of_outputs():
    model = ThreeInputs().eval()
    program = with_exits(capture(model, three_inputs(1)), "block")
    assert program.plan.inputs == ("x", "numbers", "mask")
    for batch in (1, 2, 3):
        given = three_inputs(batch)
        got, expected = program(**given), model(**given)
        assert got.keys() == expected.keys()
        assert torch.equal(got["logits"], expected["logits"])
        assert all(map(torch.equal, got["features"], expected["features"]))
        outputs = program(**given, all_exits=True)
        assert torch.equal(outputs.final, expected["logits"])
        assert torch.equal(outputs.output["features"][1], expected["features"][1])
        assert outputs["exit1"].shape == (batch, CLASSES)
    first, last = (segment.inputs for segment in program.plan.segments if segment.kind == "trunk")
    assert first == ("x", "numbers")
    assert "mask" in last
    assert not {"x", "numbers"} & set(last)


def test_several_inputs_in_order_leave_out_what_the_example_leaves_out():
    model = ThreeInputs().eval()
    program = capture(model, (images(), torch.randn(1, 6)))
    given = images(2), torch.randn(2, 6)
    assert program.plan.inputs == ("x", "numbers")
    assert torch.equal(program(*given)["logits"], model(*given)["logits"])


@dataclasses.dataclass
class TwoAnswers:
    coarse: torch.Tensor
    fine: torch.Tensor


@pytest.mark.parametrize("scores", ["fine", "coarse"])
def test_which_output_holds_the_class_scores_can_be_said(scores):
    class Both(Small):
        def forward(self, x: torch.Tensor) -> Any:
            y = super().forward(x)
            return TwoAnswers(y, y * 2)

    model = Both().eval()
    with pytest.raises(ModelError, match=r"returns coarse \(3, 5\), fine \(3, 5\), and which of it are the class scores .* is not plain"):
        capture(model, images())
    program = capture(model, images(), scores=scores)
    x = images(2)
    assert torch.equal(program(x, all_exits=True).final, getattr(model(x), scores))
    assert isinstance(program(x), TwoAnswers)
    with pytest.raises(ModelError, match=r"returns nothing called 'other'\n  hint: it returns coarse, fine"):
        capture(model, images(), scores="other")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_is_traced_as_what_it_computes_and_its_place_is_said(reentrant, caplog):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    model = warm_up(Small(Checkpointed()))
    program = with_exits(capture(model, images()), "part.inner.1")
    assert "part recomputes its activations to save memory" in caplog.text
    x = images(3)
    assert torch.equal(program(x), model(x))
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(copy.deepcopy(program).train()(x, all_exits=False), expected)


class WritesThroughAView(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x[:, :2]
        half.mul_(2)
        return x + 1


def test_a_write_through_a_view_keeps_its_module_whole_so_that_no_cut_parts_it_from_its_readers():
    model = Small(WritesThroughAView()).eval()
    program = capture(model, images())
    assert "part" in targets(program)
    x = images(2)
    assert torch.equal(program(x), model(x))


def test_a_write_through_a_view_at_the_top_is_refused():
    class AtTheTop(Small):
        def forward(self, x: torch.Tensor) -> Any:
            x = self.stem(x)
            x[:, :2].relu_()
            return self.fc(x.mean((2, 3)))

    with pytest.raises(ModelError, match=r"AtTheTop writes to a tensor through a view of it \(relu_\), and reads it afterwards\n  hint: .*in-place"):
        capture(AtTheTop(), images())


def test_a_forward_that_keeps_tables_leaves_none_of_the_trace_in_its_modules():
    class KeepsTables(nn.Module):
        table: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = x
            return x * 2

    model = Small(KeepsTables()).eval()
    capture(model, images())
    assert not isinstance(getattr(model.part, "last", None), torch.fx.Proxy)


class ReturnsSizes(nn.Module):
    """Cannot be traced, and returns beside its tensor the sides of a map, as MViT's attention does."""

    def forward(self, x: torch.Tensor, sides: list[int]) -> tuple[torch.Tensor, list[int]]:
        x = x.clone()
        x[:, 0] = 0
        return x, [side // 2 for side in sides]


def test_sizes_that_a_module_kept_whole_returns_are_numbers_and_cross_no_cut():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.whole, self.body, self.fc = nn.Conv2d(3, 4, 3, padding=1), ReturnsSizes(), nn.Conv2d(4, 4, 1), nn.Linear(4, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x, (height, width) = self.whole(x, [x.shape[2], x.shape[3]])
            x = self.body(x).relu()
            return self.fc(F.adaptive_avg_pool2d(x, (height, width)).mean((2, 3)))

    model = Pooled().eval()
    program = capture(model, images())
    assert "whole" in targets(program)
    split = with_exits(program, "body")
    x = images(2)
    assert torch.equal(split(x), model(x))
    assert_close(run_segments(split, x)[split.plan.output], model(x))


class Remembers(nn.Module):
    """Caches by batch size, lists what it saw, counts in training, and cannot be traced through."""

    def __init__(self) -> None:
        super().__init__()
        self.by_batch: dict[int, torch.Tensor] = {}
        self.seen: list[torch.Tensor] = []
        self.table: torch.Tensor | None = None
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        self.seen.append(x)
        if self.table is None or self.table.shape[0] < len(x):
            self.table = torch.ones(len(x), 1, 1, 1)
        if len(x) not in self.by_batch:
            self.by_batch[len(x)] = torch.full((len(x), 1, 1, 1), 2.0)
        return x * self.by_batch[len(x)] * self.table[: len(x)]


class Notes(nn.Module):
    """The same habits, and traceable."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.last: dict[str, torch.Tensor] = {}
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        self.seen.append(x)
        self.last["x"] = x
        return x * 2


@pytest.mark.parametrize("part", [Remembers, Notes])
def test_what_a_module_keeps_while_it_runs_is_real_after_capture_and_counters_stand_where_they_stood(part):
    model = Small(part()).train()
    program = capture(model, images())
    assert int(model.part.steps) == 0
    kept = [
        *model.part.seen,
        *getattr(model.part, "by_batch", {}).values(),
        *getattr(model.part, "last", {}).values(),
        getattr(model.part, "table", None),
    ]
    assert all(type(value) is torch.Tensor for value in kept if value is not None)
    x = images(250)
    assert torch.equal(program.eval()(x), model.eval()(x))


class TakesSizes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros(x.shape) + torch.ones(x.size()) + torch.zeros(x.shape[0], 1, 1, 1)


def test_tensors_made_in_the_size_of_others_are_made_in_the_graph():
    model = Small(TakesSizes()).eval()
    program = capture(model, images())
    for x in (images(1), images(5)):
        assert torch.equal(program(x), model(x))


def test_a_shape_changed_in_place_is_not_asked_for_in_its_old_form():
    class SqueezesInPlace(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.mean((2, 3), keepdim=True)
            y.squeeze_(3)
            y.squeeze_(2)
            if y.ndim != 2:
                raise ValueError("bad")
            return x + y[:, :, None, None]

    model = Small(SqueezesInPlace()).eval()
    program = capture(model, images())
    assert "part" in targets(program)
    x = images(2)
    assert torch.equal(program(x), model(x))


class WithoutGradients(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.conv(x)


def test_a_module_that_switches_gradients_off_stays_whole_and_does_so_still():
    model = Small(WithoutGradients()).eval()
    program = capture(model, images())
    assert "part" in targets(program)
    program(images(2)).sum().backward()
    assert model.part.conv.weight.grad is None
    assert model.fc.weight.grad is not None


def test_a_region_without_gradients_at_the_top_is_said_to_have_them(caplog):
    class AtTheTop(Small):
        def forward(self, x: torch.Tensor) -> Any:
            with torch.no_grad():
                x = x * 2
            return super().forward(x)

    capture(AtTheTop().eval(), images())
    assert "switches gradients off for a part of its forward" in caplog.text
