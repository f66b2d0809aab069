"""An exported network trains as the network it was exported from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import exitify
from exitify.models import load_model
from exitify.program import ExitOutputs, Program
from exitify.tracing import capture
from tests.helpers import assert_close, images, run_segments, state
from tests.models import CLASSES, SHAPE, ZOO, warm_up

BATCH = torch.export.Dim("batch", min=1, max=64)


def through_a_file(model: nn.Module, folder: Path, *, strict: bool = False, decomposed: bool = False) -> nn.Module:
    exported = torch.export.export(model.eval(), (images(2),), dynamic_shapes=({0: BATCH},), strict=strict)
    torch.export.save(exported.run_decompositions() if decomposed else exported, folder / "model.pt2")
    return load_model(str(folder / "model.pt2"), trust=True).module


def captured(model: nn.Module, folder: Path, **how: bool) -> Program:
    return capture(through_a_file(warm_up(model), folder, **how), images())


def kinds(program: Program) -> dict[str, type[nn.Module]]:
    """The modules that a program calls, by path."""
    paths = [str(node.target) for node in program.graph.nodes if node.op == "call_module"]
    return {path: type(program.get_submodule(path)) for path in paths}


def functions(program: Program) -> list[str]:
    return [str(node.target).removeprefix("aten.").partition(".")[0] for node in program.graph.nodes if node.op == "call_function"]


def trained(module: nn.Module, x: torch.Tensor, seed: int) -> torch.Tensor:
    """The answer in train(), after a backward pass; draws begin at the seed."""
    module.train().zero_grad()
    torch.manual_seed(seed)
    answer = module(x)
    answer = answer.final if isinstance(answer, ExitOutputs) else answer
    F.cross_entropy(answer, torch.arange(len(x)) % CLASSES).backward()
    return answer.detach()


def assert_trains_alike(program: Program, model: nn.Module, seed: int, batch: int = 4) -> None:
    """Answers, gradients and running statistics. The same functions run on the same numbers: only memory may be laid out otherwise."""
    x = images(batch)
    assert_close(trained(program, x, seed), trained(model, x, seed))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert dict(program.named_parameters()).keys() == gradients.keys()
    for name, parameter in program.named_parameters():
        assert parameter.grad is not None, name
        assert_close(parameter.grad, gradients[name])
    after = model.state_dict()
    for name, tensor in program.state_dict().items():
        assert_close(tensor, after[name])


class Dropping(nn.Module):
    """Dropout as modules, one of them called twice, and as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.3, eps=1e-3)
        self.drop2d = nn.Dropout2d(0.2)
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(8, CLASSES))
        self.between = nn.Module()
        self.between.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop2d(F.relu(self.norm(self.stem(x))))
        x = F.dropout(self.between.drop(self.between.drop(x)), 0.3, self.training)
        return self.classifier(F.alpha_dropout(x.mean((2, 3)), 0.1, self.training))


class ResBlock(nn.Module):
    """torchvision's basic block."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        is_narrow = channels_in != channels
        self.downsample = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)) if is_narrow else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """resnet18's members and forward, narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 7, 2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 1, padding=1)
        self.layer1 = nn.Sequential(ResBlock(8, 8, 1), ResBlock(8, 8, 1))
        self.layer2 = nn.Sequential(ResBlock(8, 16, 2), ResBlock(16, 16, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {**ZOO, "dropping": Dropping, "resnet": ResNet}


@pytest.mark.parametrize("name", NETWORKS)
def test_in_eval_the_program_answers_as_the_network_at_any_batch_size(name, tmp_path):
    model = NETWORKS[name]()
    program = captured(model, tmp_path)
    assert not any(module.training for module in program.modules())
    for batch in (1, 2, 3):
        x = images(batch)
        assert_close(program(x), model(x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "stochastic"])
def test_in_train_the_program_draws_learns_and_updates_as_the_network(name, strict, tmp_path, seed):
    model = NETWORKS[name]()
    assert_trains_alike(captured(model, tmp_path, strict=strict), model, seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_layer_with_weights_is_left_a_function(name, tmp_path):
    model = NETWORKS[name]()
    program = captured(model, tmp_path)
    layers = {path: type(layer) for path, layer in model.named_modules() if list(layer.parameters(recurse=False)) and path}
    assert {path: kind for path, kind in kinds(program).items() if list(program.get_submodule(path).parameters())} == layers


def test_several_steps_of_an_optimizer_go_the_same_way(tmp_path, seed):
    model = ResNet()
    program = captured(model, tmp_path)
    for module in (program, model):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            trained(module, torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(step)), seed)
            optimizer.step()
    x = images(3)
    torch.testing.assert_close(program.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)  # three steps add up what one rounds


@pytest.mark.parametrize("name", NETWORKS)
def test_the_program_holds_the_parameters_of_the_file_under_their_keys_in_their_order(name, tmp_path):
    model = through_a_file(warm_up(NETWORKS[name]()), tmp_path)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys = list(model.state_dict())
    program = capture(model, images())
    assert list(program.state_dict()) == keys
    assert [name for name, _ in program.named_parameters()] == [name for name, _ in model.named_parameters()]
    held = {**dict(program.named_parameters()), **dict(program.named_buffers())}
    assert held.keys() == before.keys()
    assert all(held[key] is before[key] for key in before)


def test_a_network_exported_in_memory_keeps_its_very_parameters():
    model = warm_up(ResNet())
    program = capture(torch.export.export(model, (images(2),), dynamic_shapes=({0: BATCH},)).module(), images())
    assert all(parameter is model.get_parameter(name) for name, parameter in program.named_parameters())


def test_the_exported_network_stays_as_it_was(tmp_path):
    model = through_a_file(warm_up(Dropping()), tmp_path)
    names, x = [name for name, _ in model.named_modules()], images(2)
    before, answer = state(model), model(x)
    first, second = capture(model, images()), capture(model, images())
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert torch.equal(model(x), answer)
    assert kinds(first) == kinds(second)
    assert first.get_submodule("norm") is not second.get_submodule("norm")


def test_nodes_keep_the_names_that_the_file_gives_them(tmp_path):
    model = through_a_file(warm_up(Dropping()), tmp_path)
    computed = [node.name for node in model.graph.nodes if node.op == "call_function"]
    program = capture(model, images())
    assert [node.name for node in program.graph.nodes if node.op in ("call_module", "call_function")] == [n for n in computed if "sym" not in n]
    assert [node.name for node in program.graph.nodes if node.op == "get_attr"] == []


def test_dropouts_stand_where_they_were_or_else_under_the_name_of_their_node(tmp_path):
    program = captured(Dropping(), tmp_path)
    dropouts = {path: program.get_submodule(path) for path in kinds(program) if "drop" in path or path == "classifier.2"}
    assert {path: (type(dropout), dropout.p) for path, dropout in dropouts.items()} == {
        "drop2d": (nn.Dropout2d, 0.2),
        "between.drop": (nn.Dropout, 0.1),
        "raised_dropout_2": (nn.Dropout, 0.3),
        "raised_alpha_dropout": (nn.AlphaDropout, 0.1),
        "classifier.2": (nn.Dropout, 0.4),
    }
    assert [node.name for node in program.graph.nodes if node.target == "between.drop"] == ["dropout", "dropout_1"]


def test_batch_norm_keeps_its_momentum_and_eps(tmp_path):
    norm = captured(Dropping(), tmp_path).get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.momentum, norm.eps, norm.num_features, norm.affine, norm.track_running_stats) == (0.3, 1e-3, 8, True, True)
    assert int(norm.num_batches_tracked) == 3


def test_a_copy_of_the_program_trains_by_itself(tmp_path, seed):
    model = Dropping()
    program = captured(model, tmp_path)
    before = state(program)
    assert_trains_alike(copy.deepcopy(program), model, seed)
    assert all(torch.equal(tensor, before[key]) for key, tensor in program.state_dict().items())


# --- layers


class Around(nn.Module):
    """A part that reads `(N, 6, …)` between a convolution and a classifier."""

    def __init__(self, part: nn.Module, reshape: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.stem, self.part, self.fc = nn.Conv2d(3, 6, 3, stride=4, padding=1), part, nn.LazyLinear(CLASSES)
        self.reshape = reshape
        self(torch.zeros(2, *SHAPE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.part(self.reshape(self.stem(x))).flatten(1))


class Embedded(nn.Module):
    """A number for each position, looked up."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table((x * 3).long().clamp(0, 6))


def picture(x: torch.Tensor) -> torch.Tensor:
    return x


def line(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2)


def volume(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(3, (2, 2))


def tokens(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2)


def vector(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Tensor], torch.Tensor]]] = {
    "padding_same": (lambda: nn.Conv2d(6, 12, 4, padding="same", dilation=2, groups=3), picture),
    "padding_valid": (lambda: nn.Conv2d(6, 4, (1, 3), padding="valid", stride=(2, 1)), picture),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, stride=2, padding=(2, 1), dilation=(1, 2), groups=6, bias=False), picture),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2), line),
    "conv3d": (lambda: nn.Conv3d(6, 4, (1, 3, 2), padding=(0, 1, 2)), volume),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1, groups=2), line),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=(2, 3), padding=1, output_padding=(0, 1), dilation=2, bias=False), picture),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(6, 4, 2, stride=2), volume),
    "linear": (lambda: nn.Linear(16, 4, bias=False), line),
    "batch_norm_of_vectors": (lambda: nn.BatchNorm1d(6, momentum=0.5), vector),
    "batch_norm_of_lines": (lambda: nn.BatchNorm1d(6), line),
    "batch_norm_of_volumes": (lambda: nn.BatchNorm3d(6, affine=False), volume),
    "batch_norm_over_all_batches": (lambda: nn.BatchNorm2d(6, momentum=None), picture),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(6, affine=True), line),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True, momentum=0.4), picture),
    "instance_norm3d": (lambda: nn.InstanceNorm3d(6), volume),
    "group_norm": (lambda: nn.GroupNorm(3, 6, eps=1e-3), picture),
    "group_norm_without_weights": (lambda: nn.GroupNorm(2, 6, affine=False), line),
    "layer_norm": (lambda: nn.LayerNorm((4, 4), eps=1e-3), picture),
    "layer_norm_without_bias": (lambda: nn.LayerNorm(6, bias=False), tokens),
    "layer_norm_without_weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), tokens),
    "rms_norm": (lambda: nn.RMSNorm(6), tokens),
    "rms_norm_without_weights": (lambda: nn.RMSNorm(6, eps=1e-2, elementwise_affine=False), tokens),
    "dropout": (lambda: nn.Dropout(0.25), picture),
    "dropout_in_place": (lambda: nn.Dropout(0.25, inplace=True), picture),
    "dropout1d": (lambda: nn.Dropout1d(0.25), line),
    "dropout2d": (lambda: nn.Dropout2d(0.25), picture),
    "dropout3d": (lambda: nn.Dropout3d(0.25, inplace=True), volume),
    "alpha_dropout": (lambda: nn.AlphaDropout(0.25), vector),
    "feature_alpha_dropout": (lambda: nn.FeatureAlphaDropout(0.25), picture),
    "rrelu": (lambda: nn.RReLU(0.1, 0.4), picture),
}


def settings(module: nn.Module) -> dict[str, Any]:
    """What a module was made with."""
    return {name: value for name, value in vars(module).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_becomes_the_module_that_it_was(name, tmp_path, seed):
    make, reshape = LAYERS[name]
    model = Around(make(), reshape)
    program = captured(model, tmp_path)
    part = program.get_submodule("part")
    assert type(part) is type(model.part)
    assert settings(part) == settings(model.part)
    assert functions(program).count(name.partition("_of_")[0]) == 0
    assert_trains_alike(program, model, seed)
    x = images(3)
    assert_close(program.eval()(x), model.eval()(x))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": 0, "scale_grad_by_freq": True}])
def test_an_embedding_becomes_a_module(options, tmp_path, seed):
    model = Around(Embedded(**options), tokens)
    model.stem.requires_grad_(False)  # what is rounded to whole numbers hands no gradient on
    program = captured(model, tmp_path)
    table = program.get_submodule("part.table")
    assert settings(table) == settings(model.part.table)
    x = images(4)
    assert_close(trained(program, x, seed), trained(model, x, seed))
    assert_close(table.weight.grad, model.part.table.weight.grad)
    assert_close(program.get_parameter("fc.weight").grad, model.fc.weight.grad)


class Small(nn.Module):
    """A convolution, what a test does in between, and a classifier."""

    def __init__(self, between: Callable[[Small, torch.Tensor], torch.Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, CLASSES)
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6, 3, 3) * 0.1), nn.Parameter(torch.randn(6))
        for name, part in parts.items():
            self.add_module(name, part)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.between(self, self.stem(x)).mean((2, 3)))


class WithGain(nn.BatchNorm2d):
    """A batch norm with one tensor more than torch's."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.gain


def test_a_convolution_called_twice_is_one_module(tmp_path, seed):
    model = Small(lambda m, x: m.conv(F.relu(m.conv(F.conv2d(x, m.weight, m.bias)))), conv=nn.Conv2d(6, 6, 3, padding=1))
    program = captured(model, tmp_path)
    assert [node.name for node in program.graph.nodes if node.target == "conv"] == ["conv2d_2", "conv2d_3"]
    assert_trains_alike(program, model, seed)


def test_weights_called_in_two_ways_stay_functions(tmp_path, seed):
    def between(m: Small, x: torch.Tensor) -> torch.Tensor:
        return m.conv(x) + F.conv2d(x, m.conv.weight, m.conv.bias, padding=2, dilation=2) + F.conv2d(x, m.weight, m.bias, padding=1)

    model = Small(between, conv=nn.Conv2d(6, 6, 3, padding=1))
    program = captured(model, tmp_path)
    assert kinds(program) == {"stem": nn.Conv2d, "fc": nn.Linear}
    assert functions(program).count("conv2d") == 3
    assert_trains_alike(program, model, seed)


def test_a_convolution_over_a_parameter_of_the_root_stays_a_function(tmp_path, seed):
    model = Small(lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1))
    program = captured(model, tmp_path)
    assert kinds(program) == {"stem": nn.Conv2d, "fc": nn.Linear}
    assert [str(node.target) for node in program.graph.nodes if node.op == "get_attr"] == ["weight", "bias"]
    assert_trains_alike(program, model, seed)


def test_a_convolution_over_a_computed_weight_stays_a_function(tmp_path, seed):
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
    model = Small(lambda m, x: m.conv(F.conv2d(x, m.weight, m.bias)), conv=conv)
    program = captured(model, tmp_path)
    assert kinds(program) == {"stem": nn.Conv2d, "fc": nn.Linear}
    assert_trains_alike(program, model, seed)


def test_a_convolution_that_pads_with_what_is_there_is_a_module_behind_the_padding(tmp_path, seed):
    model = Around(nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), picture)
    program = captured(model, tmp_path)
    assert functions(program)[:2] == ["pad", "flatten"]
    assert kinds(program)["part"] is nn.Conv2d
    assert_trains_alike(program, model, seed)


def without_gradients(m: Small, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return m.part(x)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.part._flat_weights")
@pytest.mark.parametrize(
    ("part", "between", "node"),
    [
        (WithGain(6), lambda m, x: m.part(x), "batch_norm"),
        (nn.BatchNorm2d(6), without_gradients, "batch_norm"),
        (nn.LSTM(16, 16, 2, dropout=0.5, batch_first=True), lambda m, x: x + m.part(x[:, 0])[0][:, None], "lstm"),
    ],
    ids=["a norm with another tensor", "inside of no_grad", "recurrent"],
)
def test_what_stays_in_eval_is_said(part, between, node, tmp_path, caplog):
    model = Small(lambda m, x: between(m, F.conv2d(x, m.weight, m.bias, padding=1)), part=part)
    with caplog.at_level(logging.WARNING, logger="exitify"):
        program = captured(model, tmp_path)
    assert caplog.messages == [f"these parts of the exported network stay as in eval() while it is trained: {node}"]
    x = images(4)
    assert_close(program.train()(x).final, model.eval()(x))


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "stochastic"])
def test_nothing_is_said_of_a_network_that_trains_whole(name, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="exitify"):
        captured(NETWORKS[name](), tmp_path)
    assert caplog.messages == []


def test_what_an_export_leaves_out_does_not_come_back(tmp_path, seed):
    """Stochastic depth is not in the file: in train() every branch is there."""
    model = ZOO["stochastic"]()
    program = captured(model, tmp_path)
    model.block1.p = model.block2.p = 0
    assert_trains_alike(program, model, seed)


# --- exports of other kinds


def test_an_export_without_counters_of_batches_counts_under_no_key(tmp_path, seed):
    model = ResNet()
    exported = through_a_file(warm_up(model), tmp_path, strict=True)
    keys = list(exported.state_dict())
    assert not [key for key in keys if "num_batches_tracked" in key]
    program = capture(exported, images())
    trained(program, images(4), seed)
    assert int(program.get_buffer("bn1.num_batches_tracked")) == 1
    assert list(program.state_dict()) == keys
    weights = {key: torch.randn_like(tensor) for key, tensor in program.state_dict().items()}  # as a file of safetensors, without versions
    program.load_state_dict(weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in program.state_dict().items())
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"bn1.other\"\."):
        program.load_state_dict({**weights, "bn1.other": torch.zeros(1)})


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", ["resnet", "depthwise", "transformer"])
def test_a_decomposed_export_without_dropout_trains_as_the_network(name, tmp_path, seed):
    model = NETWORKS[name]()
    program = captured(model, tmp_path, decomposed=True)
    norms = {path: type(layer) for path, layer in model.named_modules() if isinstance(layer, (nn.BatchNorm2d, nn.LayerNorm, nn.Conv2d))}
    assert {path: kind for path, kind in kinds(program).items() if kind is not nn.Linear} == norms
    x = images(3)
    assert_close(program(x), model(x))
    assert_trains_alike(program, model, seed)


# --- on the way to a device


def test_exits_stand_after_modules_of_an_exported_network_and_train(tmp_path, seed):
    model = warm_up(ResNet())
    program = exitify.transform(through_a_file(model, tmp_path), images(), exits="layer1,layer2.0", skips="none")
    assert [(point.name, point.place) for point in program.plan.exits] == [("exit1", "layer1"), ("exit2", "layer2.0")]
    expected = trained(model, x := images(4), seed)
    program.train()
    outputs = program(x)
    assert_close(outputs.final, expected)
    sum(F.cross_entropy(logits, torch.arange(4)) for logits in outputs.logits).backward()
    assert all(parameter.grad is not None for parameter in program.parameters())


@pytest.mark.parametrize(("build", "exits"), [(Dropping, "drop2d"), (ResNet, "1")])
def test_an_exported_network_goes_into_an_artifact_with_its_answers(build, exits, tmp_path):
    model = warm_up(build())
    program = exitify.transform(through_a_file(model, tmp_path), images(), exits=exits).eval()
    x = images(2)
    assert_close(run_segments(program, x)[program.plan.output], model(x))
    session = exitify.Session(exitify.export(program), engine="onnxruntime", profile="none")
    assert_close(torch.from_numpy(session.run(x[0].numpy()).logits), model(x)[0])


def test_skip_paths_and_norms_of_an_exported_network_are_those_of_the_module(tmp_path, seed):
    model = warm_up(ResNet())
    of_file = exitify.transform(through_a_file(model, tmp_path), images(), exits="none", skips="auto")
    of_module = exitify.transform(model, images(), exits="none", skips="auto")
    assert [(path.name, len(path.norms)) for path in of_file.plan.skips] == [(path.name, len(path.norms)) for path in of_module.plan.skips]
    batches = [images(8), images(5)]
    assert exitify.reestimate_norms(of_file, batches) == exitify.reestimate_norms(of_module, batches) == 13
    second = of_module.state_dict()
    assert of_file.state_dict().keys() == second.keys()
    assert all(torch.allclose(tensor, second[key], rtol=1e-5, atol=1e-5) for key, tensor in of_file.state_dict().items())
