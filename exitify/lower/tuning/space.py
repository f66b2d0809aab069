"""What could be tried for a kernel: our schedules' own choices, and MetaSchedule's random programs for kernels that no schedule of ours is for."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule, Trace

from exitify.errors import first_line
from exitify.lower.library import AnyMachine, silent_stderr
from exitify.lower.processors import Machine
from exitify.lower.schedules import KINDS, convolution, default_schedule, fallback, gpu, product, windows, winograd
from exitify.lower.tuning.database import Choice, Known, choice_text

log = logging.getLogger(__name__)

WITH_CHOICES = {"convolution": convolution, "winograd": winograd, "windows": windows, "product": product}
"""Kinds of kernels whose schedules can be chosen, by the name under which a choice stands in the database."""


def candidates(kernel: tirx.PrimFunc, machine: AnyMachine, known: Known, seed: int) -> Iterator[Choice | None]:
    """Yield what to measure next, the default (None) first; ends when there is nothing left.

    `known` is read again before each: of our choices those nearest to the best come first. A kernel that only our schedules fit, for it reads
    what was packed for them, and that leave nothing to choose, has the default alone.
    """
    if choice_text(None) not in known.seconds:
        yield None
    if not isinstance(machine, Machine):
        yield from _in_turn([_random_programs(kernel, machine, known, seed, rules) for rules in _rules_for(kernel)])
        return
    ours = own_choices(kernel, machine)
    if ours:
        yield from _nearest(ours, known, random.Random(seed))  # noqa: S311
    elif all(kind is fallback or kind.schedule(kernel, machine.vectors) is None for kind in KINDS):
        yield from _random_programs(kernel, machine, known, seed)


def own_choices(kernel: tirx.PrimFunc, machine: Machine) -> list[Choice]:
    """The choices that the kernel's schedule leaves, the default's among them, as data."""
    return [{name: dataclasses.asdict(choice)} for name, kind in WITH_CHOICES.items() for choice in kind.choices(kernel, machine.vectors)]


def _rules_for(kernel: tirx.PrimFunc) -> tuple[str, ...]:
    """MetaSchedule's sets of rules for a GPU; those for tensor cores where there is float16 to multiply."""
    reads_half = any(str(parameter.dtype) == "float16" for parameter in kernel.params)
    return ("cuda-tensorcore", "cuda") if reads_half else ("cuda",)


def _in_turn(several: list[Iterator[Choice]]) -> Iterator[Choice]:
    """One of each, until all have ended."""
    while several:
        for one in list(several):
            try:
                yield next(one)
            except StopIteration:
                several.remove(one)


def apply(kernel: tirx.PrimFunc, choice: Choice | None, machine: AnyMachine) -> tirx.PrimFunc:
    """The kernel, scheduled.

    Raises:
        Exception: of TVM, when the choice does not fit the kernel.
    """
    if not isinstance(machine, Machine):
        return gpu.default_schedule(kernel, machine.target) if choice is None else _by_trace(kernel, choice)
    if choice is None:
        return default_schedule(kernel, machine.vectors).mod["main"]
    for name, kind in WITH_CHOICES.items():
        if name in choice:
            made = kind.schedule(kernel, machine.vectors, kind.Choice(**choice[name]))
            assert made is not None
            return made.mod["main"]
    return _by_trace(kernel, choice)


def _by_trace(kernel: tirx.PrimFunc, choice: Choice) -> tirx.PrimFunc:
    schedule = Schedule(kernel)
    Trace.apply_json_to_schedule(choice["trace"], schedule)
    return schedule.mod["main"]


def _nearest(choices: Sequence[Choice], known: Known, order: random.Random) -> Iterator[Choice]:
    """Choices that differ least from the best so far, in random order among equals."""
    order.shuffle(choices := list(choices[1:]))
    while True:
        open_ = [choice for choice in choices if choice_text(choice) not in known.seconds]
        if not open_:
            return
        measured = [choice for choice in choices if choice_text(choice) in known.seconds]
        best = min(measured, key=lambda choice: known.seconds[choice_text(choice)], default=None)
        yield min(open_, key=lambda choice: _distance(choice, best)) if best else open_[0]


def _distance(a: Choice, b: Choice) -> int:
    """In how many fields two choices of one kind differ."""
    (one,), (other,) = a.values(), b.values()
    return sum(one[field] != other[field] for field in one)


def _random_programs(kernel: tirx.PrimFunc, machine: AnyMachine, known: Known, seed: int, rules: str = "") -> Iterator[Choice]:
    """MetaSchedule's programs for the kernel, each once; none where its rules fail on it. rules: By name; those of the target otherwise."""
    with _quick_inspection():
        import tvm.s_tir.tensor_intrin  # what takes so long; a TuneContext imports it
        from tvm.s_tir import meta_schedule

    generator = meta_schedule.space_generator.PostOrderApply
    with silent_stderr():
        context = meta_schedule.TuneContext(
            tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}),
            target=machine.target,
            space_generator=generator(**dict.fromkeys(("sch_rules", "postprocs", "mutator_probs"), rules)) if rules else "post-order-apply",
            search_strategy="replay-trace",
            task_name="kernel",
            rand_state=seed + 1,
            num_threads=1,
        )
        try:
            spaces = context.generate_design_space()
        except Exception as error:  # a rule that takes for granted what this kernel has not, for instance a producer under the same loop
            log.info("MetaSchedule has no programs for %s: %s", kernel.attrs.get("global_symbol", "a kernel"), first_line(error))
            return
        context.pre_tuning(max_trials=10_000, num_trials_per_iter=1, design_spaces=spaces)
    for _ in range(1000):
        found = context.generate_measure_candidates()
        if not found:
            return
        choice = {"trace": _plain(found[0].sch.trace.as_json())}
        if choice_text(choice) not in known.seconds:
            yield choice


def _plain(value: Any) -> Any:
    """A trace as plain JSON values."""
    if isinstance(value, (str, type(None), bool, int, float)):
        return value
    if hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "__iter__"):
        return [_plain(item) for item in value]
    return getattr(value, "value", str(value))


@contextlib.contextmanager
def _quick_inspection() -> Iterator[None]:
    """MetaSchedule's import asks for the whole stack a few hundred times, 38 to 150 s; who called is all it wants to know."""
    slow = inspect.stack

    def quick(context: int = 1) -> list[inspect.FrameInfo]:
        frames = []
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            frames.append(inspect.FrameInfo(frame, code.co_filename, frame.f_lineno, code.co_name, None, None))
            frame = frame.f_back  # type: ignore[assignment]
        return frames

    inspect.stack = quick
    try:
        yield
    finally:
        inspect.stack = slow
