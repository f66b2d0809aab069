"""Batches (`exitify.runtime.batches`): every sample goes through every step up to its exit, once, in calls as large as the engine likes them."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exitify.runtime.batches import Batch, Helpers
from exitify.runtime.session import Session
from tests.artifacts import inputs, profile_for
from tests.compiled import thresholds
from tests.runtime.test_batches import SIZES, in_batches
from tests.runtime.test_tvm_engine import alike


@dataclass
class Network:
    """An engine whose steps add their number to what they read, and note who called them with which samples.

    sizes: By step. leaves_at: By sample, the step after which it has its answer.
    """

    sizes: list[tuple[int, ...]]
    leaves_at: list[int]
    threads: int = 1
    shares_samples: bool = False
    calls: list[tuple[int, list[int], int]] = field(default_factory=list)
    asked: list[tuple[int, list[int]]] = field(default_factory=list)
    fails_at: int = -1
    has_begun: threading.Barrier | None = None

    def batches(self, stretch):
        return self.sizes[stretch.number]

    @contextlib.contextmanager
    def alone(self, *, always=False):
        yield

    def steps(self):
        return [
            SimpleNamespace(
                stretch=SimpleNamespace(number=k, inputs=(f"map{k}",), outputs=(f"map{k + 1}", f"logits{k}"), parameters=()),
                run=lambda values, parameters, k=k: self.run(k, values),
                logits=f"logits{k}",
                scores="",
            )
            for k in range(len(self.sizes))
        ]

    def run(self, k, values):
        x = values[f"map{k}"]
        assert x.shape[1:] == (3,)
        assert x.flags.c_contiguous
        number = x[:, 0].astype(int)
        assert (x[:, 1] == sum(range(k))).all(), "through all steps before, in order"
        if self.has_begun:
            self.has_begun.wait(10)
        if self.fails_at == k:
            raise RuntimeError(f"step {k}")
        self.calls.append((k, number.tolist(), threading.get_ident()))
        return {f"map{k + 1}": x + np.float32([0, k, 0]), f"logits{k}": x[:, :1].copy()}

    def decide(self, k, numbers, said):
        assert said[f"logits{k}"][:, 0].tolist() == numbers.tolist()
        assert self.threads > 1 or sorted(numbers.tolist()) == numbers.tolist()
        self.asked.append((k, numbers.tolist()))
        return np.array([self.leaves_at[n] > k for n in numbers])

    def answer(self, *, together=False, helpers=None):
        x = np.zeros((len(self.leaves_at), 3), np.float32)
        x[:, 0] = np.arange(len(x))
        Batch(self, self.steps(), {}, {"map0": x}, self.decide, together=together).run(helpers or Helpers())

    def seen(self, k):
        return sorted(n for step, numbers, _ in self.calls if step == k for n in numbers)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), together=st.booleans(), threads=st.integers(1, 3))
def test_each_sample_is_computed_once_by_each_step_up_to_its_exit(data, together, threads):
    steps = data.draw(st.integers(1, 4))
    sizes = [data.draw(st.sampled_from([(), (1,), (2, 1), (8, 1), (4, 2, 1)])) for _ in range(steps)]
    network = Network(sizes, data.draw(st.lists(st.integers(0, steps - 1), min_size=1, max_size=20)), threads, threads > 1)
    network.answer(together=together)
    assert not together or all(numbers == sorted(numbers) for _, numbers in network.asked)
    for k in range(steps):
        expected = [n for n, last in enumerate(network.leaves_at) if last >= k]
        assert network.seen(k) == expected
        assert all(not sizes[k] or len(numbers) in sizes[k] for step, numbers, _ in network.calls if step == k)
        asked = [numbers for step, numbers in network.asked if step == k]
        assert sorted(n for numbers in asked for n in numbers) == expected
        assert not together or len(asked) == (len(expected) > 0)


def test_what_is_left_at_an_exit_waits_for_more_and_those_furthest_on_go_first():
    network = Network([(4, 1), (4, 1)], [0, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1])
    network.answer()
    assert [(step, numbers) for step, numbers, _ in network.calls] == [
        (0, [0, 1, 2, 3]),
        (0, [4, 5, 6, 7]),
        (1, [2, 3, 6, 7]),
        (0, [8, 9, 10, 11]),
        (1, [9]),
        (1, [10]),
        (1, [11]),
    ]


def test_an_engine_to_which_all_sizes_are_alike_is_given_everything_that_waits():
    network = Network([(), ()], [0, 1, 1, 0, 1])
    network.answer()
    assert [(step, numbers) for step, numbers, _ in network.calls] == [(0, [0, 1, 2, 3, 4]), (1, [1, 2, 4])]


def test_threads_share_a_batch_that_has_a_full_call_for_each():
    network = Network([(2, 1)], [0] * 4, threads=2, shares_samples=True, has_begun=threading.Barrier(2))  # passed by two at once alone
    network.answer()
    assert len({thread for _, _, thread in network.calls}) == 2
    for others in ({"leaves_at": [0] * 3}, {"shares_samples": False}, {"threads": 1}):
        network = Network(**{"sizes": [(2, 1)], "leaves_at": [0] * 4, "threads": 2, "shares_samples": True, **others})
        network.answer()
        assert {thread for _, _, thread in network.calls} == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_step_raises_ends_the_batch(threads):
    network, helpers = Network([(2, 1), (2, 1)], [1] * 8, threads, threads > 1, fails_at=1), Helpers()
    with pytest.raises(RuntimeError, match="step 1"):
        network.answer(helpers=helpers)
    assert helpers.executor(1).submit(int).result(5) == 0, "the helper is free again"


def test_what_a_helper_raises_reaches_the_caller():
    network = Network([(2, 1)], [0] * 4, threads=2, shares_samples=True, has_begun=threading.Barrier(2))
    run, caller = network.run, threading.get_ident()

    def fails_elsewhere(k, values):
        found = run(k, values)
        if threading.get_ident() != caller:
            raise RuntimeError("of the helper's")
        return found

    network.run = fails_elsewhere
    with pytest.raises(RuntimeError, match="of the helper's"):
        network.answer()


def test_a_batch_does_not_wait_for_helpers_that_are_busy_with_another():
    helpers, goes_on = Helpers(), threading.Event()
    busy = helpers.executor(1).submit(goes_on.wait, 30)
    network = Network([(2, 1)], [0] * 4, threads=2, shares_samples=True)
    network.answer(helpers=helpers)
    assert not busy.done()
    assert network.seen(0) == [0, 1, 2, 3]
    goes_on.set()


def test_threads_answer_as_one_does():
    artifact, x = in_batches("identity"), inputs(40)
    artifact = artifact.with_profile("default", profile_for(artifact, thresholds(artifact, x)))
    expected = Session(artifact, engine="tvm").run_batch(x)
    assert len({answer.exit for answer in expected}) == 3
    session = Session(artifact, engine="tvm", threads=2)
    assert len(x) >= 2 * max(SIZES)
    for _ in range(5):
        alike(session.run_batch(x), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_helpers_of_its_own():
    helpers = Helpers()
    helpers.executor(1).submit(int).result()
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.write(writes, b"%d" % helpers.executor(1).submit(lambda: 7).result(5))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reads, 1) == b"7"
