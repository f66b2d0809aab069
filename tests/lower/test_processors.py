"""What code is made for: each target's triple, features and vector unit, and processors that are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exitify.lower.processors import Machine, machine_of
from exitify.lower.vectors import Vectors
from exitify.targets import Target, TargetError, load_target, processor, target_names

V2, V3, V4 = (processor.x86_level_features(f"x86-64-v{n}") for n in (2, 3, 4))

ORIN = Machine("aarch64-linux-gnu", "cortex-a78ae", ("+neon", "+fullfp16", "+dotprod"), ("asimd", "asimddp", "asimdhp"), 0, Vectors(4, 32), "")
MACHINES = {
    "aarch64-cpu": Machine("aarch64-linux-gnu", "generic", ("+neon",), ("asimd",), 4, Vectors(4, 32), "aarch64-cpu"),
    "agx-orin-64gb": replace(ORIN, cores=12, tuned_on="agx-orin-64gb"),
    "agx-orin-32gb": replace(ORIN, cores=8, tuned_on="agx-orin-32gb"),
    "orin-nx-16gb": replace(ORIN, cores=8, tuned_on="orin-nx-16gb"),
    "orin-nx-8gb": replace(ORIN, cores=6, tuned_on="orin-nx-8gb"),
    "orin-nano-8gb": replace(ORIN, cores=6, tuned_on="orin-nano-8gb"),
    "orin-nano-4gb": replace(ORIN, cores=6, tuned_on="orin-nano-4gb"),
}


@pytest.fixture
def pretend(monkeypatch):
    """A function that makes this machine another one."""

    def change(architecture: str, *features: str) -> None:
        monkeypatch.setattr(processor, "architecture", lambda: architecture)
        monkeypatch.setattr(processor, "features", lambda: frozenset(features))
        monkeypatch.setattr(processor, "model_name", lambda: "a processor")

    return change


def with_cpu(**changes: object) -> Target:
    board = load_target("host")
    return replace(board, name="mine", cpu=replace(board.cpu, **changes))


@pytest.mark.parametrize("name", MACHINES)
def test_a_boards_processor_is_what_its_file_says(name):
    assert machine_of(load_target(name)) == MACHINES[name]


def test_every_target_is_tested_here():
    assert {*MACHINES, "host", "cuda"} == set(target_names())


@pytest.mark.parametrize("name", target_names())
def test_llvm_knows_every_targets_processor_and_features(name, capfd):
    """LLVM warns of names that it does not know, and goes on."""
    machine = machine_of(load_target(name))
    assert machine.target.attrs["mcpu"] == machine.cpu
    assert list(machine.target.attrs.get("mattr", [])) == list(machine.attributes)
    assert "is not a recognized" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("features", "level", "needed", "vectors", "attributes"),
    [
        ((*V4, "amx"), "x86-64-v4", V4, Vectors(16, 32), ("-prefer-256-bit",)),
        (V4[1:], "x86-64-v2", V2, Vectors(4, 16), ()),  # V4[0] is of the third level
        ((*V3, "avx512f"), "x86-64-v3", V3, Vectors(8, 16), ()),
        (V2, "x86-64-v2", V2, Vectors(4, 16), ()),
        ((), "x86-64-v2", V2, Vectors(4, 16), ()),
    ],
)
def test_this_machines_level_is_the_highest_that_it_has_whole(pretend, features, level, needed, vectors, attributes):
    pretend("x86_64", *features)
    machine = machine_of(load_target("host"))
    assert (machine.triple, machine.cpu, machine.features) == ("x86_64-linux-gnu", level, needed)
    assert (machine.vectors, machine.attributes, machine.tuned_on) == (vectors, attributes, "a processor")
    assert machine.cores > 0
    assert machine.is_here == (set(needed) <= set(features))


def test_an_arm_machine_at_hand_is_asked_what_it_can_do(pretend):
    pretend("aarch64", "asimd", "asimdhp", "fphp")
    machine = machine_of(load_target("host"))
    assert (machine.triple, machine.cpu, machine.attributes) == ("aarch64-linux-gnu", "generic", ("+neon", "+fullfp16"))
    assert (machine.features, machine.vectors, machine.is_here) == (("asimd", "asimdhp"), Vectors(4, 32), True)


def test_a_board_is_here_where_its_architecture_and_all_its_features_are(pretend):
    orin = machine_of(load_target("agx-orin-64gb"))
    pretend("aarch64", "asimd", "asimdhp", "asimddp", "fphp")
    assert orin.is_here
    pretend("aarch64", "asimd", "asimdhp")
    assert not orin.is_here
    pretend("x86_64", "asimd", "asimdhp", "asimddp")
    assert not orin.is_here


def test_a_level_can_be_asked_for_by_name():
    machine = machine_of(with_cpu(triple="x86_64-linux-gnu", name="x86-64-v3", cores=3))
    assert (machine.cpu, machine.vectors, machine.cores, machine.tuned_on) == ("x86-64-v3", Vectors(8, 16), 3, "mine")


def test_an_x86_processor_that_is_no_level_is_refused():
    with pytest.raises(TargetError, match="the target 'mine' has the processor 'skylake'") as refusal:
        machine_of(with_cpu(triple="x86_64-linux-gnu", name="skylake"))
    assert refusal.value.hint == "exitify compiles for x86-64-v4, x86-64-v3, x86-64-v2"


@pytest.mark.parametrize("triple", ["riscv64-linux-gnu", "armv7l-linux-gnueabihf", "nonsense"])
def test_an_architecture_without_schedules_is_refused(triple):
    with pytest.raises(TargetError, match=f"the target 'mine' is for '{triple}'") as refusal:
        machine_of(with_cpu(triple=triple, name="generic"))
    assert refusal.value.hint == "exitify compiles for aarch64 and x86_64"


def test_a_machine_at_hand_without_schedules_is_refused(pretend):
    pretend("ppc64le")
    with pytest.raises(TargetError, match="the target 'host' is for 'ppc64le-linux-gnu'"):
        machine_of(load_target("host"))
