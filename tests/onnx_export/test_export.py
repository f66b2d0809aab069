"""Out of torch: every exit says what torch says, every weight is stored once and as it was."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from exitify.artifact import container
from exitify.artifact.artifact import HEADS_FILE, MANIFEST, WEIGHTS_FILE, Artifact, graph_path, parse_artifact
from exitify.artifact.manifest import FORMAT, InputContract, Preprocess
from exitify.errors import DataError, MalformedManifest, ModelError, PlanError
from exitify.onnx_export import to_artifact as export_module
from exitify.onnx_export.static import export_static
from exitify.onnx_export.to_artifact import KEPT_INSIDE_BYTES, export
from exitify.pipeline import transform
from exitify.plan import FINAL
from exitify.program import SKIP_NORMS, Program
from exitify.records import dumps
from exitify.runtime.session import Session
from exitify.tracing import capture
from exitify.version import __version__
from tests.artifacts import EXITS, exported, inputs
from tests.helpers import with_exits
from tests.models import SHAPE

RTOL, ATOL = 1e-4, 1e-4
"""ONNX Runtime and torch sum convolutions in another order, and ONNX Runtime folds norms into them."""


def answers(program: Program, x: np.ndarray) -> dict[str, np.ndarray]:
    """What torch says at every exit."""
    with torch.no_grad():
        outputs = program.eval()(torch.from_numpy(x), all_exits=True)
    return {name: logits.numpy() for name, logits in zip(outputs.names, outputs.logits)}


def bytes_of(artifact: Artifact) -> bytes:
    stream = io.BytesIO()
    container.write(stream, {MANIFEST: dumps(artifact.manifest), **artifact.files})
    return stream.getvalue()


def graphs(artifact: Artifact) -> list[ModelProto]:
    return [onnx.load_model_from_string(bytes(artifact.files[graph_path(segment.name)])) for segment in artifact.plan.segments]


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (given,), (wanted,) = session.get_inputs(), session.get_outputs()
    return session.run([wanted.name], {given.name: x})[0]


# --- the artifact ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_every_exit_says_what_torch_says(name):
    program, artifact = exported(name)
    for batch in (1, 2, 5):
        x = inputs(batch, seed=batch)
        expected = answers(program, x)
        recorded = Session(artifact).record(x)
        assert list(recorded.logits) == list(expected) == [point.name for point in artifact.plan.exits] + [FINAL]
        for exit_name, logits in expected.items():
            np.testing.assert_allclose(recorded.logits[exit_name], logits, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", EXITS)
def test_every_weight_is_stored_once_and_as_it_was(name):
    program, artifact = exported(name)
    whole = bytes_of(artifact)
    stored = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    state = {path: tensor.numpy() for path, tensor in program.state_dict().items()}
    for path, tensor in state.items():
        assert stored[path].dtype == tensor.dtype
        assert stored[path].shape == tensor.shape
        assert stored[path].tobytes() == tensor.tobytes()
        if tensor.dtype == np.float32 and tensor.nbytes >= 16:
            assert whole.count(tensor.tobytes()) == 1, path
    assert stored.keys() == state.keys()  # nothing derived from a weight


@pytest.mark.parametrize("name", EXITS)
def test_no_weight_stands_in_a_graph_in_any_layout(name):
    """Not transposed either, as a linear layer over tokens would be if constants were folded."""
    program, artifact = exported(name)
    weights = [np.sort(tensor.numpy().ravel()) for tensor in program.state_dict().values() if tensor.numel() > 4 and tensor.is_floating_point()]
    for model in graphs(artifact):
        for tensor in model.graph.initializer:
            if not tensor.external_data:
                array = numpy_helper.to_array(tensor)
                assert array.nbytes <= KEPT_INSIDE_BYTES
                assert not any(array.size == weight.size and np.array_equal(np.sort(array.ravel()), weight) for weight in weights)


@pytest.mark.parametrize("name", ["identity", "shared", "depthwise"])
def test_norms_are_not_folded(name):
    program, artifact = exported(name)
    norms = {path: module for path, module in program.named_modules() if isinstance(module, nn.BatchNorm2d)}
    nodes = [node for model in graphs(artifact) for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert len(norms) >= 3
    assert {tuple(node.input[1:]) for node in nodes} == {tuple(f"{p}.{s}" for s in ("weight", "bias", "running_mean", "running_var")) for p in norms}
    stored = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    for path, norm in norms.items():
        assert stored[f"{path}.running_var"].tobytes() == norm.running_var.numpy().tobytes()


def test_heads_weights_are_inputs_of_their_segments():
    _, artifact = exported("identity")
    for point in artifact.plan.exits:
        parsed = artifact.graph(f"head_{point.name}")
        assert set(parsed.inputs) == {point.after, point.weight, point.bias, point.temperature}
        assert not {point.weight, point.bias, point.temperature} & parsed.initializers.keys()
        assert {found.location for found in parsed.external.values()} == {"heads.safetensors"}


def test_an_exit_inside_a_residual_branch_carries_what_is_needed_later():
    _, artifact = exported("identity")
    assert artifact.plan.segment("trunk_exit2").inputs == ("relu", "relu_1")


def test_a_value_that_the_network_overwrites_later_is_read_as_it_was():
    """`in_place` has its second exit before a ReLU that writes to its input."""
    _, artifact = exported("in_place")
    assert [point.after for point in artifact.plan.exits] == ["block1_relu", "add_1"]
    features = Session(artifact).record(inputs(64)).features["exit2"]
    assert (features < 0).any()  # means of what no ReLU has seen yet
    assert not any(node.op_type == "Identity" for model in graphs(artifact) for node in model.graph.node)


def test_values_that_are_one_tensor_keep_their_names():
    """Dropout does nothing any more; before it and after it are still two places."""
    _, artifact = exported("dropout")
    assert artifact.plan.segment("head_exit2").inputs == ("dropout",)
    assert artifact.plan.segment("trunk_final").inputs == ("dropout",)
    assert [node.op_type for node in graphs(artifact)[2].graph.node] == ["Identity"]
    recorded = Session(artifact).record(inputs(2))
    assert recorded.features["exit1"].tobytes() == recorded.features["exit2"].tobytes()


def test_features_may_be_the_value_itself():
    _, artifact = exported("shared")
    (stretch,) = [stretch for stretch in artifact.plan.stretches(("exit2",)) if stretch.exit == "exit2"]
    assert artifact.plan.segment("head_exit2").inputs == ("mean",)
    given = {"x": inputs(2), **artifact.tensors(HEADS_FILE), "exit_heads.exit2.temperature": np.array(1, np.float32)}
    run_stretch = Session(artifact).engine.prepare(replace(stretch, outputs=("mean", "exit2.z")))
    found = run_stretch({name: given[name] for name in (*stretch.inputs, *stretch.parameters)})
    assert found["mean"].tobytes() == found["exit2.z"].tobytes()


def test_nodes_are_named_by_modules_as_viewers_group_them():
    program, artifact = exported("identity")
    modules = {"", *(name for name, _ in program.named_modules())}
    names = []
    for segment in artifact.plan.segments:
        for node in onnx.load_from_string(bytes(artifact.files[graph_path(segment.name)])).graph.node:
            *path, operator = node.name.removeprefix("/").split("/")
            assert ".".join(path) in modules
            assert operator.partition("_")[0] == node.op_type
            names.append((node.name, node.output[0]))
    assert len({name for name, _ in names}) == len(set(names))  # a name stands for one node, in whichever segments it is
    whole = export_static(artifact)
    assert len({node.name for node in whole.graph.node}) == len(whole.graph.node)
    assert {node.name.rpartition("/")[0].replace("/", ".")[1:] for node in whole.graph.node if node.op_type == "Conv"} == {
        name for name, module in program.named_modules() if isinstance(module, nn.Conv2d) and not name.startswith("exit_heads")
    }


def test_a_network_without_exits_is_one_segment():
    _, artifact = exported("plain")
    assert [segment.name for segment in artifact.plan.segments] == ["trunk_final"]
    assert artifact.tensors(HEADS_FILE) == {}


@pytest.mark.parametrize("name", EXITS)
def test_what_was_exported_can_be_opened(name):
    _, artifact = exported(name)
    assert parse_artifact(bytes_of(artifact)).manifest == artifact.manifest


def test_the_manifest_says_where_the_network_came_from():
    program, artifact = exported("depthwise")
    manifest = artifact.manifest
    assert (manifest.format, manifest.exitify, manifest.heads_trained) == (FORMAT, __version__, True)
    assert manifest.model.recipe == program.recipe
    assert manifest.model.recipe[0] == "choose-exits{exits=hardswish_1,mul head=mlp}"
    assert manifest.input == InputContract(shape=SHAPE, dtype="float32", color="RGB")


class Tiny(nn.Module):
    """The smallest network with an exit: exporting it takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.drop(torch.relu(self.conv(x)).mean((2, 3))))


def tiny() -> Program:
    torch.manual_seed(0)
    return with_exits(capture(Tiny().eval(), torch.zeros(1, 1, 6, 6)), "relu")


def test_the_same_program_gives_the_same_bytes_in_any_mode():
    contract = InputContract((1, 6, 6), color="L", preprocess=Preprocess(), classes=("a", "b", "c"))
    first = export(tiny(), contract=contract, heads_trained=False)
    program = tiny().train()
    program.exit_heads.eval()
    before = {name: module.training for name, module in program.named_modules()}
    assert set(before.values()) == {True, False}
    assert bytes_of(export(program, contract=contract, heads_trained=False)) == bytes_of(first)
    assert {name: module.training for name, module in program.named_modules()} == before
    assert (first.manifest.input, first.manifest.heads_trained) == (contract, False)


# --- what is refused ------------------------------------------------------------------------------------------------


class NoOnnxForm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.special.i0e(x.mean((2, 3))))


def test_an_operator_without_an_onnx_form_is_refused():
    program = with_exits(capture(NoOnnxForm().eval(), torch.zeros(1, 1, 6, 6)), "none")
    with pytest.raises(ModelError, match=r"the network has no ONNX form: .*\n  hint: replace the operator"):
        export(program)


def test_weights_that_an_artifact_cannot_hold_are_refused():
    with pytest.raises(ModelError, match=r"'conv\.weight' is bfloat16, which an artifact cannot hold\n  hint: .*model\.float\(\)"):
        export(tiny().bfloat16())


def test_an_export_that_computes_something_else_is_refused(monkeypatch):
    program, artifact = exported("depthwise")
    record = Session.record
    export_module._compare(artifact, program)
    for change, gap in ((1.0, r"(0\.\d|1)"), (np.nan, "nan")):

        def wrong(self: Session, x: np.ndarray, skip: object, change: float = change) -> object:
            recording = record(self, x, skip)
            return replace(recording, logits={name: logits + (change if name == "exit2" else 0) for name, logits in recording.logits.items()})

        monkeypatch.setattr(Session, "record", wrong)
        with pytest.raises(ModelError, match=f"the exported network's exit2 differs from the model's by {gap}"):
            export_module._compare(artifact, program)


def test_an_export_that_could_not_be_opened_is_refused(monkeypatch):
    def refuse(_: Artifact) -> None:
        raise MalformedManifest("the plan is wrong")

    monkeypatch.setattr(export_module, "check_artifact", refuse)
    with pytest.raises(ModelError, match="the exported network could not be opened again: the plan is wrong\n  hint: report this"):
        export(tiny())


@pytest.mark.parametrize(
    ("contract", "message"),
    [
        (InputContract((1, 6, 7), color="L"), r"the contract says float32 \(1, 6, 7\), and the network reads float32 \(1, 6, 6\)"),
        (InputContract((1, 6, 6), dtype="uint8", color="L"), "the contract says uint8"),
        (InputContract((1, 6, 6), color="L", classes=("a", "b")), "2 classes are named, and the network has 3"),
        (InputContract((1, 6, 6), color="L", preprocess=Preprocess(std=(0.0,))), "a std is 0"),
    ],
)
def test_a_contract_that_does_not_fit_is_refused(contract, message):
    with pytest.raises(DataError, match=message):
        export(tiny(), contract=contract)


def test_a_program_that_is_not_on_the_cpu_is_refused():
    with pytest.raises(ModelError, match=r"the program is on meta, and is exported on the CPU\n  hint: export\(program\.cpu\(\)\)"):
        export(tiny().to("meta"))


# --- one static network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXITS)
def test_the_static_network_says_what_its_exit_says(name):
    program, artifact = exported(name)
    expected = answers(program, inputs(3))
    for exit_name in artifact.plan.exit_names:
        model = export_static(artifact, exit=exit_name)
        onnx.checker.check_model(model, full_check=True)
        np.testing.assert_allclose(run(model, inputs(3)), expected[exit_name], rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", ["identity", "transformer"])
def test_the_static_network_of_the_last_exit_is_the_original(name):
    program, artifact = exported(name)
    model = export_static(artifact)
    with torch.no_grad():
        expected = program.eval()(torch.from_numpy(inputs(3))).numpy()
    np.testing.assert_allclose(run(model, inputs(3)), expected, rtol=RTOL, atol=ATOL)
    assert not any(tensor.name.startswith("exit_heads.") for tensor in model.graph.initializer)


def test_a_static_network_computes_nothing_that_its_answer_does_not_need():
    """No scores, no temperature, nothing of the exits before."""
    _, artifact = exported("identity")
    model = export_static(artifact, exit="exit2")
    point = artifact.plan.exit("exit2")
    assert [value.name for value in model.graph.input] == [artifact.plan.input]
    assert [value.name for value in model.graph.output] == [point.logits]
    assert not {"LogSoftmax", "TopK", "Exp"} & {node.op_type for node in model.graph.node}
    names = {tensor.name for tensor in model.graph.initializer}
    assert names <= {name for node in model.graph.node for name in node.input}
    assert {point.weight, point.bias} <= names
    assert point.temperature not in names
    assert not any("exit_heads.exit1" in name for name in names)
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_a_static_network_takes_any_batch():
    _, artifact = exported("in_place")
    model = export_static(artifact, exit="exit1")
    assert [run(model, inputs(batch)).shape for batch in (1, 7)] == [(1, 5), (7, 5)]


def test_an_exit_with_an_untrained_head_is_no_network_of_its_own():
    _, artifact = exported("depthwise")
    fresh = Artifact(replace(artifact.manifest, heads_trained=False), artifact.files)
    with pytest.raises(PlanError, match="the head of exit1 is untrained, and its answers mean nothing\n  hint: run `exitify train` first"):
        export_static(fresh, exit="exit1")
    assert export_static(fresh) == export_static(artifact)


def test_an_unknown_exit_is_refused_with_those_there_are():
    _, artifact = exported("depthwise")
    with pytest.raises(PlanError, match=r"there is no exit 'exit3'\n  hint: this network has exit1, exit2, and final"):
        export_static(artifact, exit="exit3")


# --- skip paths


class TiedNorms(nn.Module):
    """Four residual blocks whose norms are modules of their own over one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(4))
        for block in self.blocks[1:]:
            block[1].weight = self.blocks[0][1].weight
        self.classify = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.classify(x.mean((2, 3)))


def answers_under_every_mask(program: Program, x: torch.Tensor) -> Artifact:
    """The artifact of the program, whose second norms are made unlike the first; held against torch."""
    with torch.no_grad():
        for parameter in program.get_submodule(SKIP_NORMS).parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5).add_(0.1)
        artifact = export(program)
        session = Session(artifact)
        for mask in itertools.product((False, True), repeat=len(program.plan.skips)):
            expected = program(x, skip=mask, all_exits=False).numpy()
            np.testing.assert_allclose(session.record(x.numpy(), mask).logits[FINAL], expected, rtol=1e-4, atol=1e-5)
    return artifact


def test_a_transformers_blocks_read_the_batchs_size_from_their_own_input(torchvision):
    model = torchvision.models.VisionTransformer(16, 8, 4, 2, 16, 32, num_classes=5).eval()
    nn.init.normal_(model.heads.head.weight)
    skips = "encoder.layers.encoder_layer_1,encoder.layers.encoder_layer_3"
    program = transform(model, torch.zeros(1, 3, 16, 16), exits="none", skips=skips).eval()
    artifact = answers_under_every_mask(program, torch.randn(3, 3, 16, 16))
    assert [s.inputs for s in artifact.plan.segments if s.kind == "block"] == [(path.before,) for path in program.plan.skips]


def test_tied_norms_have_second_sets_of_their_own():
    model = TiedNorms().eval()
    before = [block[1].weight for block in model.blocks]
    program = transform(model, torch.zeros(1, 3, 8, 8), exits="none", skips="auto").eval()
    answers_under_every_mask(program, torch.randn(3, 3, 8, 8))
    assert all(block[1].weight is weight for block, weight in zip(model.blocks, before))  # exporting unties nothing


def test_a_network_of_several_inputs_is_trained_here_and_not_exported():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).mean((2, 3)) * scale)

    program = capture(Two().eval(), (torch.zeros(1, 3, 8, 8), torch.ones(1, 4)))
    with pytest.raises(ModelError, match=r"the network reads 2 inputs \(x, scale\), and an artifact holds networks of one\n  hint: .*buffers"):
        export(program)
