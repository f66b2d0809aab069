"""The pair of TVM packages that works, asked for before either is imported."""

from __future__ import annotations

import importlib.metadata

import pytest

from exitify import lower
from exitify.errors import EngineError


@pytest.fixture
def installed(monkeypatch):
    """A function that makes these the versions that are installed."""

    def change(**versions: str) -> None:
        def version(package: str) -> str:
            if package not in known:
                raise importlib.metadata.PackageNotFoundError(package)
            return known[package]

        known = {name.replace("_", "-"): number for name, number in versions.items()}
        monkeypatch.setattr(importlib.metadata, "version", version)

    return change


@pytest.mark.parametrize(
    ("tvm", "ffi"), [("0.27.0.post1", "0.1.14.post1"), ("0.27", "0.1.14"), ("0.27.9", "0.1.14.post0"), ("0.27.0rc1", "0.1.14.dev3")]
)
def test_the_pair_that_works_is_taken(installed, tvm, ffi):
    installed(apache_tvm=tvm, apache_tvm_ffi=ffi)
    lower._require_versions()


@pytest.mark.parametrize(
    ("tvm", "ffi", "problem", "hint"),
    [
        ("0.27.0.post1", "0.1.15.post2", "apache-tvm-ffi 0.1.15.post2 is installed", "pip install 'apache-tvm-ffi>=0.1.14,<0.1.15'"),
        ("0.27.0.post1", "0.1.13", "apache-tvm-ffi 0.1.13 is installed", "pip install 'apache-tvm-ffi>=0.1.14,<0.1.15'"),
        ("0.27.0.post1", "0.2", "apache-tvm-ffi 0.2 is installed", "pip install 'apache-tvm-ffi>=0.1.14,<0.1.15'"),
        ("0.28.0", "0.1.14", "apache-tvm 0.28.0 is installed", "pip install 'apache-tvm>=0.27,<0.28'"),
        ("0.26.1", "0.1.14", "apache-tvm 0.26.1 is installed", "pip install 'apache-tvm>=0.27,<0.28'"),
        ("1.0", "0.1.14", "apache-tvm 1.0 is installed", "pip install 'apache-tvm>=0.27,<0.28'"),
    ],
)
def test_a_pair_that_would_crash_is_refused_with_the_one_that_works(installed, tvm, ffi, problem, hint):
    installed(apache_tvm=tvm, apache_tvm_ffi=ffi)
    with pytest.raises(EngineError) as refusal:
        lower._require_versions()
    assert refusal.value.problem == f"{problem}, which exitify does not work with"
    assert refusal.value.hint == hint


@pytest.mark.parametrize("versions", [{}, {"apache_tvm": "0.27.0"}, {"apache_tvm_ffi": "0.1.14"}])
def test_a_package_that_is_missing_is_tvm_missing(installed, versions):
    """The command line says what to install by the module's name."""
    installed(**versions)
    with pytest.raises(ModuleNotFoundError) as missing:
        lower._require_versions()
    assert missing.value.name == "tvm"
