"""The training loops of the examples run as their README says, and every exit learns."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "training_loops"
README = (FOLDER / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]

LIGHTNING = """
import importlib.util, runpy, sys
from tests.conftest import _stub_operators
stubs = _stub_operators() if importlib.util.find_spec("torchvision") else []
runpy.run_module(sys.argv.pop(1), run_name="__main__")
"""
"""Lightning imports torchvision, whose operators do not load beside a CPU build of torch: they are declared, as in the zoos' tests."""

NEEDED = {"with_accelerate": "accelerate", "with_lightning": "lightning"}


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A line of the README as a process of its own, with this Python."""
    words = command.split()
    module = words[words.index("-m") + 1]
    name = module.rpartition(".")[2]
    if importlib.util.find_spec(NEEDED.get(name, "torch")) is None:
        pytest.skip(f"{NEEDED[name]} is not installed: pip install -e '.[loops]'")
    if words[0] == "torchrun":
        if not torch.distributed.is_available():
            pytest.skip("torch is built without torch.distributed")
        start = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", *words[1:]]
    else:
        start = ["-c", LIGHTNING, module] if name == "with_lightning" else words[1:]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *start, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_prints_the_accuracy_of_every_exit(command: str) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn's digits are the examples' data: pip install -e '.[demo]'")
    done = run(command, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^(\w+) +([\d.]+)% right$", done.stdout, re.MULTILINE)
    assert [name for name, _ in said] == ["exit1", "exit2", "final"]  # once, also from two processes
    assert all(float(right) > 80 for _, right in said), said


def test_every_loop_is_in_the_readme_and_marks_exitifys_two_lines() -> None:
    loops = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "task"))
    assert sorted({command.split()[-1].rpartition(".")[2] for command in COMMANDS}) == loops
    for name in loops:
        marked = re.findall(r"^.*# exitify: .*$", (FOLDER / f"{name}.py").read_text(), re.MULTILINE)
        assert [("transform(" in line, "losses." in line) for line in marked] == [(True, False), (False, True)]
