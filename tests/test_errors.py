"""What a user sees of an error."""

from __future__ import annotations

import inspect

from exitify import errors
from exitify.errors import ArtifactError, ExitifyError, PlanError


def test_an_error_is_its_problem_and_then_its_hint():
    error = PlanError("cannot exit after 'fc'", "exit earlier")
    assert (error.problem, error.hint, str(error)) == ("cannot exit after 'fc'", "exit earlier", "cannot exit after 'fc'\n  hint: exit earlier")


def test_without_a_hint_there_is_no_hint_line():
    assert str(PlanError("cannot exit after 'fc'")) == "cannot exit after 'fc'"


def test_one_class_catches_every_error_a_user_can_cause():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    assert len(kinds) > 10
    assert all(issubclass(kind, ExitifyError) for kind in kinds)
    assert issubclass(errors.TruncatedArtifact, ArtifactError)
