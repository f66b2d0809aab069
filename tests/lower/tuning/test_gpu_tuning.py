"""Kernels for a GPU tuned on TVM's own CUDA runtime, over the driver of `tests.fake_cuda`: what it takes to launch, not what it takes to compute."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tvm

from exitify.errors import ExitifyError
from exitify.lower.graphics import GpuMachine, gpu_machine_of
from exitify.lower.library import Kernels, lower_segments
from exitify.lower.linking import linker
from exitify.lower.pipeline import compile_artifact
from exitify.lower.tuning import space, worker
from exitify.lower.tuning.database import Database, Known
from exitify.lower.tuning.measure import LocalRunner
from exitify.lower.tuning.search import tune, unheard
from exitify.lower.tuning.tasks import Task, tasks_of
from exitify.runtime.session import Session
from exitify.targets import load_target, processor
from tests.artifacts import exported, inputs
from tests.fake_cuda import FakeGpu
from tests.gpu import GPU, ORIN, sources_seen

TUNE = """
import sys
from pathlib import Path
from exitify.artifact.artifact import Artifact
from exitify.errors import EngineError
from exitify.lower.pipeline import compile_artifact
from exitify.lower.tuning.database import Database
from exitify.targets import load_target
path, folder, precision, trials = sys.argv[1:]
artifact, database = Artifact.open(path), Database(Path(folder))
try:
    compile_artifact(artifact, load_target("cuda"), device="gpu", precision=precision, trials=int(trials), database=database)
except EngineError as error:
    print(error.problem)
"""

ANSWER = """
import json, sys
import numpy as np
from exitify.runtime.session import Session
session = Session.load(sys.argv[1], engine="tvm", profile="none")
print(json.dumps([session.engine.compiled.target, [session.run(row).logits.tolist() for row in np.load(sys.argv[2])]]))
"""


def kernels_of(precision: str) -> tuple[Kernels, list[Task]]:
    machine = gpu_machine_of(load_target("cuda"), ORIN)
    artifact = exported("identity")[1]
    kernels = lower_segments(artifact, artifact.plan.segments, machine, precision=precision)  # type: ignore[arg-type]
    return kernels, tasks_of(kernels, machine)


def test_a_search_measures_launches_on_the_gpu_and_keeps_what_it_measured(gpu: FakeGpu, tmp_path: Path) -> None:
    trials = 16
    path = exported("identity")[1].save(tmp_path / "net.exitify")
    said = gpu.python(TUNE, path, tmp_path / "db", "fp32", trials)
    assert "on this GPU differs from the reference by" in said  # this driver computes nothing: what is at hand is checked, and caught
    lines = [json.loads(line) for file in (tmp_path / "db").iterdir() for line in file.read_text().splitlines()]
    measured = [line for line in lines if "seconds" in line]
    assert len(measured) == trials
    assert sum(bool(line["seconds"]) for line in measured) > trials / 2
    assert gpu.launched()


def test_where_no_kernel_can_be_timed_the_search_ends_and_nothing_is_kept_against_them(tmp_path: Path) -> None:
    """There is no GPU in this process: that is no kernel's fault."""
    _, tasks = kernels_of("fp32")
    machine, database = gpu_machine_of(load_target("cuda"), ORIN, "12.6"), Database(tmp_path / "db")
    runner = LocalRunner(machine)
    try:
        with pytest.raises(ExitifyError, match=r"^TVM's CUDA runtime cannot be loaded: "):
            tune(tasks, machine, database, runner, 4, unheard)
    finally:
        runner.close()
    assert {database.read(task.key).searched for task in tasks} == {0}
    assert not any(database.read(task.key).seconds for task in tasks)


def test_gpus_are_tuned_apart_from_one_another_and_from_processors() -> None:
    kernels, _ = kernels_of("fp32")
    machines = [
        gpu_machine_of(load_target(name), arch) for name, arch in (("cuda", "sm_87"), ("cuda", "sm_90"), ("orin-nano-8gb", ""), ("agx-orin-64gb", ""))
    ]
    keys = [{task.key for task in tasks_of(kernels, machine)} for machine in (*machines, machines[0].host)]
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            assert not one & other


@pytest.mark.parametrize(("precision", "has_tensor_cores"), [("fp32", False), ("fp16", True)])
def test_tensor_cores_are_tried_for_what_multiplies_float16_alone(precision: str, has_tensor_cores: bool) -> None:
    _, tasks = kernels_of(precision)
    rules = {task.name: space._rules_for(task.kernel) for task in tasks}
    assert ("cuda-tensorcore" in {name for found in rules.values() for name in found}) == has_tensor_cores
    assert all("cuda" in found for found in rules.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_of_searched_schedules_says_what_onnxruntime_says(precision: str, gpu: FakeGpu, tmp_path: Path) -> None:
    """Each kernel by one of the first programs that the search would try, whatever its time."""
    machine = gpu_machine_of(load_target("cuda"), ORIN)
    _, tasks = kernels_of(precision)
    database, searched = Database(tmp_path / "db"), 0
    for task in tasks:
        for choice in list(_first(space.candidates(task.kernel, machine, Known({}, None, 0), 0), 4))[2:]:
            if not builds(task, choice, machine, tmp_path / "kernel.so"):
                continue
            database.searched(task.key, choice, 1)
            searched += 1
            break
    assert searched > len(tasks) / 2
    with sources_seen() as sources:
        artifact = compile_artifact(
            exported("identity")[1],
            load_target("cuda"),
            device="gpu",
            architecture=ORIN,
            precision=precision,
            database=database,  # type: ignore[arg-type]
        )
    (source,) = sources
    assert ("wmma::mma_sync(" in source) == (precision == "fp16")
    np.save(tmp_path / "x.npy", inputs(2))
    said = gpu.python(ANSWER, artifact.save(tmp_path / "net.exitify"), tmp_path / "x.npy", kernels=gpu.kernels_of(source, f"tuned-{precision}"))
    target, logits = json.loads(said)
    assert target.startswith(GPU)
    expected = [Session(exported("identity")[1], profile="none").run(row).logits for row in inputs(2)]
    np.testing.assert_allclose(logits, expected, atol=(1e-4 if precision == "fp32" else 1e-2) * np.abs(expected).max())


def builds(task: Task, choice: dict, machine: GpuMachine, path: Path) -> bool:
    """Whether TVM makes code of it; of random programs it refuses some."""
    try:
        module = tvm.IRModule({"main": space.apply(task.kernel, choice, machine).with_attr("global_symbol", "main")})
        worker.built(module, machine.description, "12.6", linker(processor.architecture(), processor.architecture()), path)
    except Exception:
        return False
    return True


def _first(found, count):
    return [choice for choice, _ in zip(found, range(count))]
