"""A pass is a value: its text makes it again, a recipe replays, and what goes wrong names it."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exitify.errors import PlanError
from exitify.passes import PASSES, make_pass
from exitify.passes.attach_heads import AttachHeads
from exitify.passes.base import Pass
from exitify.passes.choose_exits import ChooseExits
from exitify.passes.cut_segments import CutSegments
from exitify.plan import Plan
from exitify.program import Program
from tests.helpers import captured, cuttable_places, images, state, with_exits
from tests.models import ZOO

names = st.from_regex(r"[A-Za-z_][\w.]*", fullmatch=True)


@given(
    st.sampled_from(["auto", "none"]) | st.integers(0, 99).map(str) | st.lists(names, min_size=1).map(",".join),
    st.sampled_from(["auto", "linear", "conv", "mlp"]),
)
def test_the_text_of_a_pass_makes_it_again(exits, head):
    made = ChooseExits(exits, head)
    assert make_pass(str(made)) == made


@pytest.mark.parametrize("made", [ChooseExits(), ChooseExits("layer1, layer2", "conv"), ChooseExits(""), AttachHeads(), CutSegments()], ids=str)
def test_the_text_of_these_passes_makes_them_again(made):
    assert make_pass(str(made)) == made


def test_the_text_of_a_pass_is_its_name_and_its_options():
    assert str(ChooseExits("layer1", "conv")) == "choose-exits{exits=layer1 head=conv}"
    assert str(CutSegments()) == "cut-segments"


def test_options_left_out_have_their_defaults():
    assert make_pass("choose-exits") == make_pass("choose-exits{}") == ChooseExits()
    assert make_pass("choose-exits{head=mlp}") == ChooseExits(head="mlp")


@pytest.mark.parametrize("name", PASSES)
def test_every_registered_pass_has_the_name_it_is_registered_under(name):
    assert str(make_pass(name)).partition("{")[0] == name


@pytest.mark.parametrize("text", ["", "chose-exits", "choose-exits{exits=1", "exitify.passes.base:Pass", "choose-exits{exits=1}; rm"])
def test_an_unknown_pass_is_refused_with_those_there_are(text):
    with pytest.raises(
        PlanError, match=r"there is no pass .*\n  hint: there are choose-skips, choose-exits, cascade-exits, attach-heads, switch-norms, cut-segments"
    ):
        make_pass(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("choose-exits{exit=1}", "pass 'choose-exits' has no option 'exit'\n  hint: it has exits, head"),
        ("choose-exits{auto}", "pass 'choose-exits' has no option 'auto'"),
        ("choose-exits{name=other}", "pass 'choose-exits' has no option 'name'"),
        ("cut-segments{exits=1}", "pass 'cut-segments' has no option 'exits'\n  hint: it has none"),
    ],
)
def test_an_unknown_option_is_refused_with_those_there_are(text, problem):
    with pytest.raises(PlanError, match=problem):
        make_pass(text)


@pytest.mark.parametrize("name", ZOO)
def test_a_recipe_replayed_gives_the_same_plan(name):
    places = cuttable_places(name)
    program = captured(name)
    transformed = with_exits(program, f"{places[0]},{places[-1]}")
    assert len(transformed.recipe) == 3
    replayed = program
    for text in transformed.recipe:
        replayed = make_pass(text)(replayed)
    assert replayed.plan == transformed.plan
    assert replayed.plan.text() == transformed.plan.text()
    assert str(replayed.graph) == str(transformed.graph)
    assert replayed.recipe == transformed.recipe


def test_the_recipe_grows_by_one_line_a_pass():
    program = captured("identity")
    first = ChooseExits("2")(program)
    assert (program.recipe, first.recipe) == ((), ("choose-exits{exits=2 head=auto}",))
    assert AttachHeads()(first).recipe == (*first.recipe, "attach-heads")


def snapshot(program: Program) -> tuple[object, ...]:
    return str(program.graph), list(program.graph.nodes), program.plan, program.recipe, dict(program.values), list(program._modules.items())


@pytest.mark.parametrize("name", ZOO)
def test_every_pass_leaves_the_program_given_as_it_was_and_shares_its_weights(name):
    program = captured(name).train()
    for step in (ChooseExits(cuttable_places(name)[0]), AttachHeads(), CutSegments()):
        before, weights, modes = snapshot(program), state(program), [module.training for module in program.modules()]
        result = step(program)
        assert snapshot(program) == before
        after = program.state_dict()
        assert all(torch.equal(weights[key], after[key]) for key in weights)
        assert [module.training for module in program.modules()] == modes
        own = dict(result.named_parameters())
        assert all(own[key] is parameter for key, parameter in program.named_parameters())
        assert result is not program
        assert result.training
        program = result


@pytest.mark.parametrize("name", ZOO)
def test_the_passes_leave_the_answers_as_they_were(name):
    program = captured(name)
    x = images(2)
    assert torch.equal(with_exits(program, ",".join(cuttable_places(name)))(x), program(x))


@dataclass(frozen=True)
class Fails(Pass):
    """Raises what it is told."""

    name: ClassVar[str] = "fails"
    how: str = "apply"

    def apply(self, program: Program) -> Program:
        if self.how == "apply":
            raise ZeroDivisionError("no exits at all")
        return program.replace(plan=Plan("nothing", "fc"))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_an_error_in_a_pass_keeps_its_type_and_names_the_pass_once():
    with pytest.raises(ZeroDivisionError, match=r"^no exits at all") as caught:
        Fails()(captured("plain"))
    assert caught.value.__notes__ == ["in pass fails{how=apply}"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes before Python 3.11")
def test_a_result_that_does_not_verify_is_an_error_of_that_pass():
    with pytest.raises(PlanError, match="the plan names 'nothing'") as caught:
        Fails("verify")(captured("plain"))
    assert caught.value.__notes__ == ["in pass fails{how=verify}"]


def test_the_folder_passes_is_imported_as_exitify_passes_alone():
    assert importlib.import_module("exitify.passes").make_pass is make_pass
    done = subprocess.run([sys.executable, "-c", "import passes"], capture_output=True, text=True, check=False)
    assert "import it by that name" in done.stderr
    assert done.returncode == 1
