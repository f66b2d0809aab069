"""The training loops of the examples run as their README says, every exit learns, and what each adds to the loop does what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn's digits are the examples' data: pip install -e '.[demo]'")

from examples.digits.model import DigitsNet
from examples.training_loops import compiled, resumed, task
from exitify import losses, transform

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "training_loops"
README = (FOLDER / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]

BESIDE_TORCHVISION = """
import importlib.util, runpy, sys
from tests.conftest import _stub_operators
stubs = _stub_operators() if importlib.util.find_spec("torchvision") else []
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__")
"""
"""Lightning and transformers import torchvision, whose operators do not load beside a CPU build of torch: they are declared, as in the
zoos' tests."""

IMPORTING_TORCHVISION = ("with_lightning", "with_transformers")
NEEDED = {"with_accelerate": "accelerate", "with_lightning": "lightning", "with_tensorboard": "tensorboard", "with_transformers": "transformers"}


def needs_a_compiler() -> None:
    """Skip where torch.compile cannot make code for the processor."""
    if shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("torch.compile needs Python's headers")


def run(command: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line of the README as a process of its own, with this Python, that leaves its files in a folder."""
    words = command.split()
    at = words.index("-m")
    name = words[at + 1].rpartition(".")[2]
    if importlib.util.find_spec(NEEDED.get(name, "torch")) is None:
        pytest.skip(f"{NEEDED[name]} is not installed: pip install -e '.[loops]'")
    if name == "compiled":
        needs_a_compiler()
    if name in IMPORTING_TORCHVISION:
        script = folder / "beside_torchvision.py"
        script.write_text(BESIDE_TORCHVISION)
        words[at] = str(script)
    start = words[1:]
    if words[0] == "torchrun":
        if not torch.distributed.is_available():
            pytest.skip("torch is built without torch.distributed")
        start = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", *start]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *start, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


def said(printed: str) -> list[tuple[str, float]]:
    return [(name, float(right)) for name, right in re.findall(r"^(\w+) +([\d.]+)% right$", printed, re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_prints_the_accuracy_of_every_exit(command: str, tmp_path: Path) -> None:
    done = run(command, "--epochs", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [name for name, _ in said(done.stdout)] == ["exit1", "exit2", "final"]  # once, also from two processes
    assert all(right > 80 for _, right in said(done.stdout)), done.stdout


def test_every_loop_is_in_the_readme_and_marks_exitifys_two_lines() -> None:
    loops = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "task"))
    assert sorted({re.findall(r"training_loops\.(\w+)", command)[0] for command in COMMANDS}) == loops
    for name in loops:
        marked = re.findall(r"^.*# exitify: .*$", (FOLDER / f"{name}.py").read_text(), re.MULTILINE)
        assert sorted(("transform(" in line, "losses." in line) for line in marked) == [(False, True), (True, False)], name
        assert f"[{name}.py]({name}.py)" in README


# --- torch.compile ---------------------------------------------------------------------------------------------------------


def compare_compiled() -> None:
    """Hold a compiled network against the eager one, in float64: in float32 sums in another order turn a few units of a ReLU on or off."""
    compiled.EXAMPLE = task.EXAMPLE.double()
    torch.manual_seed(0)
    network = transform(DigitsNet(), task.EXAMPLE, exits=task.EXITS).double()
    names, statistics = list(network.state_dict()), network.get_buffer("stem.1.running_mean").clone()
    model = compiled.compiled(network)
    assert torch.equal(network.get_buffer("stem.1.running_mean"), statistics)
    x, y = (tensor[: task.BATCH] for tensor in task.digits()[0].tensors)
    model.train()
    found = []
    for each in (network, model):
        outputs = each(x.double())
        losses.joint(outputs, y).backward()
        found.append([*outputs.logits, *(parameter.grad.clone() for parameter in network.parameters())])
        network.zero_grad()
    for eager, by_inductor in zip(*found):
        torch.testing.assert_close(by_inductor, eager, rtol=1e-9, atol=1e-12)
    assert list(network.state_dict()) == names
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] == 1
    assert not counted["graph_break"]


def test_a_compiled_network_is_one_graph_with_the_eager_ones_logits_and_gradients_and_leaves_its_names_alone() -> None:
    """In a process of its own: Inductor imports setuptools, beside which a wheel (tests/test_layout.py) can no longer be built."""
    needs_a_compiler()
    command = [sys.executable, "-c", "from tests.test_training_loops import compare_compiled; compare_compiled()"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_without_a_call_before_the_graph_breaks() -> None:
    """What the README says of the first call; the day that torch.compile looks into it, the call can go."""
    network = transform(DigitsNet(), task.EXAMPLE, exits=task.EXITS)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Graph.__init__"):
        torch.compile(network, fullgraph=True, backend="eager")(task.EXAMPLE.repeat(2, 1, 1, 1))


# --- checkpoints -----------------------------------------------------------------------------------------------------------

EPOCHS, EVERY, STEPS = 2, 10, 44


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a training that nobody interrupted."""
    return resumed.train(task.digits()[0], EPOCHS, tmp_path_factory.mktemp("straight") / "digits.pt", EVERY).state_dict()


def interrupted(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, at: int) -> None:
    """A training that Ctrl-C ends in the step of this number."""
    with monkeypatch.context() as patched:
        steps = counted(patched, at)
        with pytest.raises(KeyboardInterrupt):
            resumed.train(task.digits()[0], EPOCHS, checkpoint, EVERY)
    assert len(steps) == at


def counted(monkeypatch: pytest.MonkeyPatch, at: int = STEPS + 1) -> list[None]:
    """A list that grows with every step; step `at` is interrupted."""
    steps: list[None] = []
    joint = losses.joint

    def counting(*arguments: object) -> torch.Tensor:
        steps.append(None)
        if len(steps) == at:
            raise KeyboardInterrupt
        return joint(*arguments)

    monkeypatch.setattr(losses, "joint", counting)
    return steps


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize(("at", "left"), [(5, STEPS), (17, STEPS - 10), (23, STEPS - 20), (STEPS, STEPS - 40)])
def test_an_interrupted_training_ends_with_the_bits_of_one_that_was_not(at: int, left: int, straight, tmp_path: Path, monkeypatch) -> None:
    checkpoint = tmp_path / "digits.pt"
    interrupted(monkeypatch, checkpoint, at)
    steps = counted(monkeypatch)
    again = resumed.train(task.digits()[0], EPOCHS, checkpoint, EVERY)
    assert len(steps) == left
    assert same(again.state_dict(), straight)


def test_random_numbers_from_elsewhere_make_another_network(straight, tmp_path: Path, monkeypatch) -> None:
    """The test above would hold of a training in which nothing is drawn."""
    checkpoint = tmp_path / "digits.pt"
    interrupted(monkeypatch, checkpoint, 23)
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "random": torch.Generator().manual_seed(1).get_state()}, checkpoint)
    assert not same(resumed.train(task.digits()[0], EPOCHS, checkpoint, EVERY).state_dict(), straight)


def test_an_interruption_while_a_checkpoint_is_written_leaves_the_one_before(straight, tmp_path: Path, monkeypatch) -> None:
    checkpoint = tmp_path / "digits.pt"
    save, saved = torch.save, []

    def interrupting(state: dict[str, object], stream) -> None:
        saved.append(state["steps"])
        if len(saved) == 3:
            stream.write(b"half")
            raise KeyboardInterrupt
        save(state, stream)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", interrupting)
        with pytest.raises(KeyboardInterrupt):
            resumed.train(task.digits()[0], EPOCHS, checkpoint, EVERY)
    assert saved == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["digits.pt"]
    assert torch.load(checkpoint, weights_only=True)["steps"] == 20
    assert same(resumed.train(task.digits()[0], EPOCHS, checkpoint, EVERY).state_dict(), straight)


def test_a_checkpoint_of_a_longer_training_is_refused(tmp_path: Path, monkeypatch) -> None:
    checkpoint = tmp_path / "digits.pt"
    interrupted(monkeypatch, checkpoint, 15)
    with pytest.raises(SystemExit, match=r"is of a training of 2 epochs: give --epochs 2, or remove it"):
        resumed.train(task.digits()[0], 3, checkpoint, EVERY)


# --- TensorBoard -----------------------------------------------------------------------------------------------------------


def test_tensorboard_has_the_loss_of_every_exit_by_step_and_its_accuracy_by_epoch(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install -e '.[loops]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = next(command for command in COMMANDS if "with_tensorboard" in command)
    done = run(command, "--epochs", "2", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "runs" / "digits"))
    events.Reload()
    names = ["exit1", "exit2", "final"]
    assert sorted(events.Tags()["scalars"]) == sorted([f"{kind}/{name}" for kind in ("loss", "accuracy") for name in names])
    for name in names:
        loss = events.Scalars(f"loss/{name}")
        assert [event.step for event in loss] == list(range(STEPS))
        assert np.mean([event.value for event in loss[:5]]) > 2 * np.mean([event.value for event in loss[-5:]])
        assert [event.step for event in events.Scalars(f"accuracy/{name}")] == [0, 1]
    last = {name: 100 * events.Scalars(f"accuracy/{name}")[-1].value for name in names}
    assert said(done.stdout) == [(name, pytest.approx(right, abs=0.051)) for name, right in last.items()]
