"""The plan by itself: what runs for which exits, what it costs, what it refuses. No torch here, as on the device."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitify.errors import PlanError, RecordError
from exitify.plan import FINAL, SCORES, Cost, ExitPoint, HeadSpec, Plan, Segment, Value
from exitify.records import dumps, from_json, loads, to_json

CLASSES, WIDTH = 5, 8


def an_exit(name: str, after: str) -> ExitPoint:
    return ExitPoint(name, after, f"place of {after}", HeadSpec("linear", "nchw", (WIDTH, 4, 4), 1, WIDTH, CLASSES))


def a_head(point: ExitPoint, macs: int) -> Segment:
    outputs, parameters = (point.logits, point.features, point.scores), (point.weight, point.bias, point.temperature)
    return Segment(f"head_{point.name}", "head", (f"call_{point.name}",), (point.after,), outputs, parameters, Cost(macs, macs, macs))


def a_trunk(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], macs: int) -> Segment:
    return Segment(name, "trunk", tuple(f"node_{output}" for output in outputs), inputs, outputs, (), Cost(macs, macs, macs))


def a_plan(output: str, exits: list[ExitPoint], segments: list[Segment]) -> Plan:
    values = {name: Value((WIDTH, 4, 4), "float32") for segment in segments for name in (*segment.inputs, *segment.outputs)}
    values[output] = Value((CLASSES,), "float32")
    for point in exits:
        values |= {
            point.logits: Value((CLASSES,), "float32"),
            point.features: Value((WIDTH,), "float32"),
            point.scores: Value((len(SCORES),), "float32"),
        }
    return Plan("x", output, tuple(exits), tuple(segments), values)


def hand_plan() -> Plan:
    """x -> a -> b -> y; c is a side branch from a that only exit2 and the end read; exit1 after a, exit2 after c, exit3 after b."""
    first, second, third = an_exit("exit1", "a"), an_exit("exit2", "c"), an_exit("exit3", "b")
    segments = [
        a_trunk("trunk_a", ("x",), ("a",), 100),
        a_head(first, 1),
        a_trunk("trunk_c", ("a",), ("c",), 20),
        a_head(second, 2),
        a_trunk("trunk_b", ("a",), ("b",), 300),
        a_head(third, 4),
        a_trunk("trunk_y", ("b", "c"), ("y",), 50),
    ]
    return a_plan("y", [first, second, third], segments)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans with one to six trunk segments, each of which reads any values before it and writes one or two, and exits after any of them."""
    known, segments, exits = ["x"], [], []
    for i in range(draw(st.integers(1, 6))):
        inputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        outputs = [f"v{i}{letter}" for letter in "ab"[: draw(st.integers(1, 2))]]
        segments.append(a_trunk(f"trunk{i}", tuple(inputs), tuple(outputs), draw(st.integers(0, 100))))
        known += outputs
        if draw(st.booleans()):
            exits.append(an_exit(f"exit{len(exits) + 1}", draw(st.sampled_from(known))))
            segments.append(a_head(exits[-1], draw(st.integers(0, 10))))
    segments.append(a_trunk("trunk_final", tuple(draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))), ("y",), 7))
    return a_plan("y", exits, segments)


def needed_for(plan: Plan, values: tuple[str, ...]) -> set[str]:
    """Segments that these values need: walk the list from its end."""
    wanted, needed = set(values), set()
    for segment in reversed(plan.segments):
        if wanted & set(segment.outputs):
            needed.add(segment.name)
            wanted |= set(segment.inputs)
    return needed


def assert_runs(plan: Plan, enabled: tuple[str, ...]) -> None:
    """Execute the stretches on names alone, and hold them against what each exit needs."""
    stretches = plan.stretches(enabled)
    wanted = {point.name: (point.logits, point.features, point.scores) for point in plan.exits} | {FINAL: (plan.output,)}
    assert [stretch.exit for stretch in stretches] == [name for name in plan.exit_names if name in (*enabled, FINAL)]
    available, ran = {plan.input}, []
    needed_so_far: set[str] = set()
    for stretch in stretches:
        assert set(stretch.inputs) <= available, f"{stretch.exit} reads what no stretch before it hands over"
        inside = set(stretch.inputs)
        for segment in map(plan.segment, stretch.segments):
            assert set(segment.inputs) <= inside, f"{segment.name} reads what its stretch neither takes nor computes"
            inside |= set(segment.outputs)
        assert set(stretch.outputs) <= inside
        available |= set(stretch.outputs)
        assert set(wanted[stretch.exit]) <= available
        ran += stretch.segments
        needed_so_far |= needed_for(plan, wanted[stretch.exit])
        assert set(ran) == needed_so_far, f"reaching {stretch.exit} costs more or less than it needs"
        assert stretch.cost == sum((plan.segment(name).cost for name in stretch.segments), Cost())
        assert stretch.parameters == tuple(name for s in stretch.segments for name in plan.segment(s).parameters)
    assert len(ran) == len(set(ran)), "a segment ran twice"
    order = [segment.name for segment in plan.segments]
    assert all([order.index(name) for name in s.segments] == sorted(order.index(name) for name in s.segments) for s in stretches)
    disabled = [point.name for point in plan.exits if point.name not in enabled]
    assert not {f"head_{name}" for name in disabled} & set(ran)


@pytest.mark.parametrize("enabled", [s for n in range(4) for s in itertools.combinations(("exit1", "exit2", "exit3"), n)], ids="+".join)
def test_for_every_subset_of_exits_each_needed_segment_runs_once_and_no_other(enabled):
    assert_runs(hand_plan(), enabled)


@given(plans(), st.data())
def test_for_any_plan_and_any_subset_each_needed_segment_runs_once_and_no_other(plan, data):
    plan.check()
    enabled = tuple(point.name for point in plan.exits if data.draw(st.booleans(), label=point.name))
    assert_runs(plan, enabled)


def test_without_exits_the_whole_network_is_one_stretch():
    (stretch,) = hand_plan().stretches(())
    assert stretch.segments == ("trunk_a", "trunk_c", "trunk_b", "trunk_y")
    assert (stretch.inputs, stretch.outputs, stretch.parameters, stretch.exit) == (("x",), ("y",), (), FINAL)


def test_a_stretch_hands_over_what_a_later_one_reads_and_nothing_else():
    first, last = hand_plan().stretches(["exit2"])
    assert first.segments == ("trunk_a", "trunk_c", "head_exit2")
    assert first.outputs == ("a", "c", "exit2.logits", "exit2.z", "exit2.scores")
    assert last.inputs == ("a", "c")
    assert last.outputs == ("y",)


def test_the_cost_of_an_exit_counts_the_heads_tried_on_the_way():
    # trunk_a 100, trunk_c 20, trunk_b 300, trunk_y 50; heads 1, 2, 4.
    plan = hand_plan()
    assert plan.macs_at(()) == {"final": 470}
    assert plan.macs_at(["exit1"]) == {"exit1": 101, "final": 471}
    assert plan.macs_at(["exit3"]) == {"exit3": 404, "final": 474}
    assert plan.macs_at(["exit1", "exit2", "exit3"]) == {"exit1": 101, "exit2": 123, "exit3": 427, "final": 477}


def test_the_full_cost_is_that_of_the_network_without_exits():
    assert hand_plan().full_macs == 470


@given(plans())
def test_the_cost_grows_from_exit_to_exit(plan):
    costs = list(plan.macs_at([point.name for point in plan.exits]).values())
    assert costs == sorted(costs)
    assert plan.full_macs <= costs[-1]


@given(plans())
def test_a_plan_written_as_json_and_read_is_the_same_plan(plan):
    again = from_json(Plan, loads(dumps(plan), "plan"), "plan")
    assert again == plan
    assert again.text() == plan.text()
    assert dumps(again) == dumps(plan)
    again.check()


def test_reading_stretches_first_does_not_change_what_is_written():
    plan = hand_plan()
    before = dumps(plan)
    plan.macs_at(["exit1"])
    assert dumps(plan) == before


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("exits", 0, "head", "kind"), "lstm", r"plan.exits\[0\].head.kind is 'lstm', not one of linear, conv, deep, mlp, own"),
        (("exits", 0, "head", "shape", 1), "4", r"plan.exits\[0\].head.shape\[1\] is '4', not an integer"),
        (("segments", 1, "kind"), "loop", r"plan.segments\[1\].kind is 'loop', not one of trunk, block, head"),
        (("segments", 0, "cost", "macs"), 1.5, r"plan.segments\[0\].cost.macs is 1.5, not an integer"),
        (("values", "y", "shape"), None, r"plan.values.y.shape is None, not an array"),
        (("output",), 1, "plan.output is 1, not a string"),
    ],
)
def test_a_plan_with_a_wrong_type_is_refused_with_its_place(path, value, problem):
    data = to_json(hand_plan())
    place = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(RecordError, match=problem):
        from_json(Plan, data, "plan")


def test_exits_are_found_by_name():
    assert hand_plan().exit("exit2").after == "c"
    assert hand_plan().exit_names == ("exit1", "exit2", "exit3", "final")
    assert Plan("x", "y").exit_names == ("final",)


def test_an_unknown_exit_is_refused_with_those_there_are():
    with pytest.raises(PlanError, match="there is no exit 'exit9'\n  hint: this network has exit1, exit2, exit3, and final"):
        hand_plan().exit("exit9")
    with pytest.raises(PlanError, match="this network has no early exits, and final"):
        Plan("x", "y").exit("exit1")


def test_a_good_plan_passes():
    hand_plan().check()
    Plan("x", "y").check()


def replaced(plan: Plan, index: int, **changes: object) -> Plan:
    segments = list(plan.segments)
    segments[index] = dataclasses.replace(segments[index], **changes)
    return dataclasses.replace(plan, segments=tuple(segments))


def renamed_exit(plan: Plan, name: str) -> Plan:
    return dataclasses.replace(plan, exits=(dataclasses.replace(plan.exits[0], name=name), *plan.exits[1:]))


def without(plan: Plan, *values: str) -> Plan:
    return dataclasses.replace(plan, values={name: value for name, value in plan.values.items() if name not in values})


def broken_plans() -> dict[str, tuple[Plan, str]]:
    plan = hand_plan()
    narrow = plan.values | {"exit1.z": Value((WIDTH + 1,), "float32")}
    return {
        "segment twice": (replaced(plan, 2, name="trunk_a"), "the segment name 'trunk_a' is used twice"),
        "exit twice": (renamed_exit(plan, "exit2"), "the exit name 'exit2' is used twice"),
        "value twice": (replaced(plan, 2, outputs=("a",)), "the value name 'a' is used twice"),
        "the input as a value": (replaced(plan, 2, outputs=("x",)), "the value name 'x' is used twice"),
        "node twice": (replaced(plan, 2, nodes=("node_a",)), "the node name 'node_a' is used twice"),
        "reads what comes later": (replaced(plan, 0, inputs=("b",)), "segment 'trunk_a' reads 'b', which nothing before it computes"),
        "reads itself": (replaced(plan, 0, inputs=("a",)), "segment 'trunk_a' reads 'a', which nothing before it computes"),
        "reads the unknown": (replaced(plan, 0, inputs=("nowhere",)), "segment 'trunk_a' reads 'nowhere'"),
        "no shape of a value": (without(plan, "a"), "the plan does not say what 'a' looks like"),
        "no shape of the input": (without(plan, "x"), "the plan does not say what 'x' looks like"),
        "no shape of the output": (without(plan, "y"), "the plan does not say what 'y' looks like"),
        "nobody computes the output": (replaced(plan, 6, outputs=()), "no segment computes the network's output 'y'"),
        "no head": (dataclasses.replace(plan, segments=(plan.segments[0], *plan.segments[2:])), "no segment computes 'exit1.logits' with shape"),
        "a head of another width": (
            dataclasses.replace(plan, values=narrow),
            r"no segment computes 'exit1.z' with shape \(8,\), as exit 'exit1' needs",
        ),
        "called final": (renamed_exit(plan, "final"), "an exit cannot be called 'final'\n  hint: use letters, digits and _"),
        "called as a path": (renamed_exit(plan, "../exit1"), "an exit cannot be called '../exit1'"),
        "called nothing": (renamed_exit(plan, ""), "an exit cannot be called ''"),
    }


@pytest.mark.parametrize("name", sorted(broken_plans()))
def test_a_plan_that_contradicts_itself_is_refused(name):
    plan, problem = broken_plans()[name]
    with pytest.raises(PlanError, match=problem):
        plan.check()


def test_an_exit_that_needs_the_networks_own_answer_is_refused():
    point = an_exit("exit1", "y")
    with pytest.raises(PlanError, match="exit 'exit1' needs the network's own output\n  hint: exit before it"):
        a_plan("y", [point], [a_trunk("trunk", ("x",), ("y",), 10), a_head(point, 1)]).check()


def test_the_text_of_a_plan():
    assert hand_plan().text() == (
        "plan x -> y\n"
        "  exit exit1 after a (place of a) at 0.215: linear 8x4x4 -> 8 -> 5\n"
        "  exit exit2 after c (place of c) at 0.262: linear 8x4x4 -> 8 -> 5\n"
        "  exit exit3 after b (place of b) at 0.909: linear 8x4x4 -> 8 -> 5\n"
        "  trunk trunk_a: x -> a | 1 nodes, 100 MACs\n"
        "  head head_exit1: a -> exit1.logits, exit1.z, exit1.scores | 1 nodes, 1 MACs\n"
        "  trunk trunk_c: a -> c | 1 nodes, 20 MACs\n"
        "  head head_exit2: c -> exit2.logits, exit2.z, exit2.scores | 1 nodes, 2 MACs\n"
        "  trunk trunk_b: a -> b | 1 nodes, 300 MACs\n"
        "  head head_exit3: b -> exit3.logits, exit3.z, exit3.scores | 1 nodes, 4 MACs\n"
        "  trunk trunk_y: b, c -> y | 1 nodes, 50 MACs\n"
    )


def test_the_text_of_a_plan_without_segments_says_no_shares():
    plan = dataclasses.replace(hand_plan(), segments=())
    assert plan.text().splitlines()[1] == "  exit exit1 after a (place of a): linear 8x4x4 -> 8 -> 5"


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("float32", 4), ("float16", 2), ("bfloat16", 2), ("float64", 8), ("int64", 8), ("int16", 2), ("int8", 1), ("uint8", 1), ("bool", 1)],
)
def test_the_size_of_a_value_is_that_of_one_sample(dtype, size):
    assert Value((3, 5, 7), dtype).size_bytes == 105 * size


def test_costs_add_up_item_by_item():
    assert Cost(1, 20, 300) + Cost(4, 50, 600) == Cost(5, 70, 900)


def test_an_exit_that_the_plan_does_not_have_is_refused_rather_than_ignored():
    with pytest.raises(PlanError, match="there is no exit 'exit9'"):
        hand_plan().stretches(("exit9",))


def with_first_head(**changes) -> Plan:
    whole = hand_plan()
    first, *others = whole.exits
    return dataclasses.replace(whole, exits=(dataclasses.replace(first, head=dataclasses.replace(first.head, **changes)), *others))


@pytest.mark.parametrize(
    "steps",
    [
        ("softmax", "mean"), ("linear:0", "mean"), ("layer_norm", "mean"), ("layer_norm:x", "mean"), ("dropout:0.2;x", "mean"),
        ("mean ",), ("mean", "mean"), (),
        ("dropout:5", "mean"), ("group_norm:7:1e-05", "mean"), ("linear:8", "mean"), ("mean", "linear:9"), ("mean", "linear:99999", "linear:99999"),
        ("mean", "linear:1٣"), ("layer_norm:1e999", "mean"), ("mean", *["relu"] * 20),
    ],
)  # fmt: skip
def test_a_head_with_steps_that_no_head_has_is_refused(steps):
    plan = with_first_head(kind="own", steps=steps)
    with pytest.raises(PlanError, match=r"the head of exit '\w+' has steps that no head has"):
        plan.check()


def test_only_an_own_head_has_steps():
    plan = with_first_head(steps=("mean",))
    with pytest.raises(PlanError, match="has steps that no head has: mean"):
        plan.check()
    width = hand_plan().exits[0].head.width
    with_first_head(
        kind="own", steps=("layer_norm:1e-06", "relu", "mean", "linear:12", "group_norm:4:1e-05", f"linear:{width}", "dropout:0.2")
    ).check()
