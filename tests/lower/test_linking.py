"""The linker that is found, in order, and what is said when there is none or it fails."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from exitify.errors import ExitifyError
from exitify.lower.linking import NoLinker, link_with, linker

CROSS, LLD = "aarch64-linux-gnu-ld", "ld.lld"


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """A function that puts empty programs of these names on an otherwise empty PATH; no variable is set, no ziglang installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for architecture in ("AARCH64", "X86_64"):
        monkeypatch.delenv(f"EXITIFY_{architecture}_LD", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    def install(*names: str) -> Path:
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return install


def test_gnus_cross_linker_comes_first(tools):
    tools(CROSS, "ld", LLD)
    assert linker("aarch64", "x86_64") == [CROSS]
    assert linker("aarch64", "aarch64") == [CROSS]


def test_the_machines_own_links_for_its_own_architecture_alone(tools):
    tools("ld", LLD)
    assert linker("aarch64", "aarch64") == ["ld"]
    assert linker("x86_64", "x86_64") == ["ld"]
    assert linker("aarch64", "x86_64") == [LLD, "-m", "aarch64linux"]
    assert linker("x86_64", "aarch64") == [LLD, "-m", "elf_x86_64"]


def test_llvms_comes_before_ziglang(tools, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "ziglang" else None)
    assert linker("aarch64", "x86_64") == [sys.executable, "-m", "ziglang", "ld.lld", "-m", "aarch64linux"]
    tools(LLD)
    assert linker("aarch64", "x86_64") == [LLD, "-m", "aarch64linux"]


def test_a_variable_comes_before_all_others_and_is_one_architectures(tools, monkeypatch):
    folder = tools("ld", CROSS, "mine")
    for chosen in ("mine", str(folder / "mine")):
        monkeypatch.setenv("EXITIFY_AARCH64_LD", chosen)
        assert linker("aarch64", "x86_64") == [chosen]
    assert linker("x86_64", "x86_64") == ["ld"]
    monkeypatch.setenv("EXITIFY_AARCH64_LD", "")
    assert linker("aarch64", "x86_64") == [CROSS]


def test_a_variable_that_names_no_program_is_refused(tools, monkeypatch):
    tools("ld")
    monkeypatch.setenv("EXITIFY_X86_64_LD", "nowhere/ld")
    with pytest.raises(NoLinker, match=r"\$EXITIFY_X86_64_LD is 'nowhere/ld', which is no program"):
        linker("x86_64", "x86_64")


@pytest.mark.parametrize(("architecture", "package"), [("aarch64", "binutils-aarch64-linux-gnu"), ("x86_64", "binutils-x86-64-linux-gnu")])
def test_without_any_the_way_to_one_is_named(tools, architecture, package):
    tools("gcc")
    with pytest.raises(NoLinker, match=f"no linker for {architecture} was found") as refusal:
        linker(architecture, "riscv64")
    assert refusal.value.hint == f"install one: apt install {package}, or pip install ziglang"


def program(path: Path, text: str) -> str:
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return str(path)


def test_a_missing_symbol_is_an_error_when_the_library_is_loaded(tmp_path):
    """`-z now`; what the linker is told besides is the output and the objects."""
    said = tmp_path / "said"
    fake = program(tmp_path / "ld", f"import sys\nopen({str(said)!r}, 'w').write(' '.join(sys.argv[1:]))")
    link = link_with([fake, "-m", "aarch64linux"])
    assert link("out.so", ["a.o", "b.o"], options=["-x"]) is None
    assert said.read_text() == "-m aarch64linux -shared -z now --strip-all -o out.so a.o b.o"
    assert link.output_format == "so"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import sys\nprint('first'); print('a.o: unknown machine\\n', file=sys.stderr); sys.exit(1)", "a.o: unknown machine"),
        ("import sys\nprint('said on stdout'); sys.exit(1)", "said on stdout"),
        ("import sys\nsys.exit(7)", "7"),
    ],
)
def test_what_the_linker_says_last_is_the_message(tmp_path, text, told):
    fake = program(tmp_path / "ld", text)
    with pytest.raises(ExitifyError) as failure:
        link_with([fake])("out.so", [])
    assert failure.value.problem == f"linking with {fake} failed: {told}"
    assert "docs/tvm.md" in failure.value.hint


def test_a_linker_that_cannot_be_started_is_an_error_in_words(tmp_path):
    fake = tmp_path / "ld"
    fake.write_text("neither a script nor a program")
    fake.chmod(0o755)
    assert os.access(fake, os.X_OK)
    with pytest.raises(ExitifyError, match=r"linking with .*ld failed: "):
        link_with([str(fake)])("out.so", [])
