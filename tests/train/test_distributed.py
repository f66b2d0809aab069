"""Two processes that share every batch equal one: in a user's own loop, in `train_network`, and on the command line under torchrun.

Norms of batches would see a process's half alone, so the networks here have norms that look at one sample, or at rest.
"""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn

import exitify
from exitify import losses
from exitify.artifact.artifact import HEADS_FILE, WEIGHTS_FILE, Artifact
from exitify.data import Samples, load_samples
from exitify.errors import DataError
from exitify.passes.equilibrate_gradients import EquilibrateGradients
from exitify.program import HEADS, SKIP_NORMS, Program
from exitify.train.end_to_end import EpochReport, TrainingOptions, train_network
from exitify.train.skip_distillation import SkipAwareDistillation
from tests.models import CLASSES, SHAPE
from tests.residual_models import InARow
from tests.train.test_skip_distillation import GroupedBlock

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch is built without torch.distributed")

ROOT = Path(__file__).parent.parent.parent
RELATIVE = 1e-6
"""Of a tensor's length. float32 has 6e-8; a mean of two means is rounded otherwise than the mean, at every step."""

OPTIONS = {name: TrainingOptions(name, epochs=2, batch=16, learning_rate=0.02, augmentation="none") for name in ("equilibrium", "skip-distillation")}


def network() -> nn.Module:
    """Four residual blocks with GroupNorm; the same weights everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return InARow(8, *(GroupedBlock() for _ in range(4))).eval()


network.input_shape = SHAPE  # type: ignore[attr-defined]


def with_batch_norm() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        ).eval()  # fmt: skip


def transformed(model: nn.Module, *, exits: str | int = 2, skips: str = "none") -> Program:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return exitify.transform(model, torch.zeros(1, *SHAPE), exits=exits, skips=skips, head="linear").train()


def with_norms_at_rest() -> Program:
    program = transformed(with_batch_norm(), exits=1)
    for module in program.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return program


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        yield torch.randn(8, *SHAPE, generator=generator), torch.randint(CLASSES, (8,), generator=generator)


# --- a loop of the user's own


@dataclass(frozen=True)
class Case:
    """A network, and the losses of a batch, each of which is followed by its backward pass."""

    program: Callable[[], Program]
    losses: Callable[[nn.Module, torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]
    has_unused: bool = False


def of_outputs(loss: Callable[..., torch.Tensor]) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], Iterator[torch.Tensor]]:
    return lambda model, x, y: iter([loss(model(x), y)])


def learning_to_skip() -> Program:
    program = transformed(network(), exits=1, skips="auto")
    program.get_submodule(HEADS).requires_grad_(False)  # no loss reaches them
    return program


CASES = {
    "joint": Case(lambda: transformed(network()), of_outputs(losses.joint)),
    "equilibrium": Case(lambda: EquilibrateGradients()(transformed(network())), of_outputs(losses.joint)),
    "one-for-all": Case(lambda: transformed(network()), of_outputs(losses.one_for_all)),
    "norms at rest": Case(with_norms_at_rest, of_outputs(losses.joint)),
    "skip-distillation": Case(learning_to_skip, lambda model, x, y: SkipAwareDistillation(model).losses(x, y), has_unused=True),
}


def loop(case: Case, program: Program, share: slice, wrap: Callable[[nn.Module], nn.Module]) -> dict[str, torch.Tensor]:
    """What training on this share of every batch makes of the program."""
    model = wrap(program)
    optimizer = torch.optim.SGD([p for p in program.parameters() if p.requires_grad], 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for x, y in batches():
        optimizer.zero_grad()
        for loss in case.losses(model, x[share], y[share]):
            loss.backward()
        optimizer.step()
    return program.state_dict()


def one_of_two(rank: int, folder: str) -> None:
    """A process of two, which does everything that the tests look at."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        made = {}
        for name, case in CASES.items():
            wrap = lambda program, case=case: nn.parallel.DistributedDataParallel(program, find_unused_parameters=case.has_unused)  # noqa: E731
            made[name] = loop(case, case.program(), slice(rank * 4, rank * 4 + 4), wrap)
        torch.save(made, f"{folder}/loops{rank}.pt")
        for name, options in OPTIONS.items():
            reports: list[EpochReport] = []
            given = {"work": Path(folder, "work"), "threads": 1, "save_to": Path(folder, f"{name}.exitify"), "each_epoch": reports.append}
            trained, said = train_network(artifact(), samples(Path(folder)), network(), options, **given)
            trained.save(Path(folder, f"{name}{rank}.exitify"))
            torch.save(([vars(report) for report in said], len(reports)), f"{folder}/{name}{rank}.pt")
        try:
            train_network(artifact(), samples(Path(folder)), network(), replace(options, batch=15), work=Path(folder, "work"), threads=1)
        except DataError as error:
            Path(folder, f"refused{rank}").write_text(str(error))
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have written what they came to."""
    folder = tmp_path_factory.mktemp("two")
    samples(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).double().norm() <= RELATIVE * tensor.double().norm(), name


@pytest.mark.parametrize("name", CASES)
def test_a_wrapped_program_in_two_processes_is_one_that_sees_both_shares(done: Path, name: str) -> None:
    first, second = (torch.load(done / f"loops{rank}.pt")[name] for rank in range(2))
    program = CASES[name].program()
    before = copy.deepcopy(program.state_dict())
    alone = loop(CASES[name], program, slice(0, 8), lambda program: program)
    assert_same(first, alone)
    assert all(torch.equal(first[key], second[key]) for key in first)
    is_trained = {key for key, parameter in program.named_parameters() if parameter.requires_grad}
    assert {key for key in alone if not torch.equal(alone[key], before[key])} == is_trained  # all of them moved, so the comparison says something


# --- train_network


@functools.cache
def artifact() -> Artifact:
    return exitify.export(transformed(network(), exits=1, skips="auto"), heads_trained=False)


def samples(folder: Path) -> Samples:
    path = folder / "data.npz"
    if not path.exists():
        generator = np.random.default_rng(0)
        labels = np.arange(72) % CLASSES
        patterns = generator.standard_normal((CLASSES, *SHAPE))
        np.savez(path, x=(patterns[labels] + 0.5 * generator.standard_normal((72, *SHAPE))).astype(np.float32), y=labels)
    return load_samples(str(path), exitify.InputContract(SHAPE), classes=CLASSES)


def weights(artifact: Artifact) -> dict[str, torch.Tensor]:
    tensors = {**artifact.tensors(WEIGHTS_FILE), **artifact.tensors(HEADS_FILE)}
    return {name: torch.from_numpy(np.array(tensor)) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_train_network_in_two_processes_gives_what_it_gives_in_one(done: Path, tmp_path: Path, name: str) -> None:
    trained, reports = train_network(artifact(), samples(done), network(), OPTIONS[name], work=tmp_path, threads=1)
    first, second, saved = (Artifact.open(done / f"{name}{which}.exitify") for which in ("0", "1", ""))
    assert_same(weights(first), weights(trained))
    assert first.files == second.files == saved.files  # each returns the same, one wrote it
    told = [torch.load(done / f"{name}{rank}.pt") for rank in range(2)]
    assert told[0][0] == told[1][0]
    assert [calls for _, calls in told] == [2, 0]  # the first one speaks
    for report, one in zip((EpochReport(**said) for said in told[0][0]), reports, strict=True):
        assert report.loss == pytest.approx(one.loss, rel=1e-5)
        assert report.losses == pytest.approx(one.losses, rel=1e-5)
        assert report.accuracy == one.accuracy
    before, after = weights(artifact()), weights(trained)
    is_left = HEADS if name == "skip-distillation" else SKIP_NORMS
    assert {key for key in after if torch.equal(after[key], before[key])} == {key for key in after if key.startswith(is_left)}


def test_nothing_is_left_in_the_work_folder(done: Path) -> None:
    assert list((done / "work").iterdir()) == []


def test_a_batch_that_cannot_be_shared_is_refused_in_every_process(done: Path) -> None:
    for rank in range(2):
        text = (done / f"refused{rank}").read_text()
        assert text == "a batch of 15 cannot be shared by 2 processes with at least two samples each\n  hint: give a multiple of 2: --batch 12"


# --- under torchrun


def test_exitify_train_under_torchrun_gives_what_it_gives_alone(tmp_path: Path) -> None:
    artifact().save(tmp_path / "net.exitify")
    samples(tmp_path)
    command = (
        "-m", "exitify", "train", "net.exitify", "--data", "data.npz", "--model", "tests.train.test_distributed:network", "--augment", "none",
        "--epochs", "1", "--batch", "16", "--threads", "1", "--json", "-o",
    )  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    printed = []
    for start, output in (((), "one.exitify"), (torchrun, "two.exitify")):
        done = subprocess.run(
            [sys.executable, *start, *command, output], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.splitlines())
    assert [len(lines) for lines in printed] == [1, 1]  # one process speaks
    assert_same(weights(Artifact.open(tmp_path / "two.exitify")), weights(Artifact.open(tmp_path / "one.exitify")))
    assert not list(tmp_path.glob("*.train"))
