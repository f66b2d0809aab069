"""A batch on its way through the network: samples wait before each stretch until there are enough for one call, and those furthest on go first.

What is left at an exit goes on with what was left there of others, so that calls stay as large as the engine likes them, and feature maps are
read again soon after they were written. Where the engine lets threads share a batch's samples, each takes the next call that is ready.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from exitify.runtime.engines.base import Array, Engine, aligned
from exitify.runtime.steps import Step

Decide = Callable[[int, Array, Mapping[str, Array]], Array]
"""Of a step's number, the samples' numbers in the batch `(n,)`, ascending where it is asked about all at once, and the step's logits and scores by
name `(n, …)`: which of them go on, a mask. It keeps the answers of the others."""


@dataclass(frozen=True)
class _Samples:
    """Samples at one place in the network.

    numbers: `(n,)`, theirs in the batch. values: By name, what is read from here on. at: `(n,)`, their rows of the values; None for all rows.
    """

    numbers: Array
    values: Mapping[str, Array]
    at: Array | None = None

    def split(self, count: int) -> tuple[_Samples, _Samples]:
        """The first so many, and the others."""
        numbers = self.numbers[:count], self.numbers[count:]
        if self.at is not None:
            return _Samples(numbers[0], self.values, self.at[:count]), _Samples(numbers[1], self.values, self.at[count:])
        first, others = ({name: value[part] for name, value in self.values.items()} for part in (slice(count), slice(count, None)))
        return _Samples(numbers[0], first), _Samples(numbers[1], others)

    def rows(self, chosen: Array) -> _Samples:
        """Those at these places, in ascending order; nothing is copied yet."""
        if len(chosen) == len(self.numbers):
            return self
        return _Samples(self.numbers[chosen], self.values, chosen if self.at is None else self.at[chosen])


def _joined(parts: Sequence[_Samples]) -> _Samples:
    """The samples of all parts, side by side where engines take them as they are."""
    if len(parts) == 1 and parts[0].at is None:
        return parts[0]
    count = sum(len(part.numbers) for part in parts)
    values: dict[str, Array] = {}
    for name, like in parts[0].values.items():
        values[name] = aligned((count, *like.shape[1:]), like.dtype)
        start = 0
        for part in parts:
            stop = start + len(part.numbers)
            if part.at is None:
                values[name][start:stop] = part.values[name]
            else:
                np.take(part.values[name], part.at, axis=0, out=values[name][start:stop], mode="clip")
            start = stop
    return _Samples(np.concatenate([part.numbers for part in parts]), values)


@dataclass
class _Line:
    """Samples that wait before a step, and those that it has computed and that wait for a decision on all."""

    waiting: deque[_Samples] = field(default_factory=deque)
    count: int = 0
    computed: list[tuple[_Samples, dict[str, Array]]] = field(default_factory=list)

    def add(self, samples: _Samples) -> None:
        self.waiting.append(samples)
        self.count += len(samples.numbers)

    def take(self, count: int) -> list[_Samples]:
        """The first so many, in the parts that they came in."""
        parts: list[_Samples] = []
        self.count -= count
        while count:
            part = self.waiting.popleft()
            if len(part.numbers) > count:
                part, rest = part.split(count)
                self.waiting.appendleft(rest)
            parts.append(part)
            count -= len(part.numbers)
        return parts


class Batch:
    """One batch, from its inputs to the last answer."""

    def __init__(
        self, engine: Engine, steps: Sequence[Step], parameters: Mapping[str, Array], inputs: Mapping[str, Array], decide: Decide, *, together: bool
    ) -> None:
        """Let all samples wait for the first step.

        Args:
            parameters: What stretches take, by name. inputs: What the first stretch reads, `(N, …)`.
            decide: See there; called by one thread at a time.
            together: Whether it is asked about all samples that reach a step at once, in place of those of each call.
        """
        self.engine, self.steps, self.parameters, self.decide, self.together = engine, steps, parameters, decide, together
        self._sizes = [engine.batches(step.stretch) for step in steps]
        self._lines = [_Line() for _ in steps]
        made = {name: index for index, step in enumerate(steps) for name in step.stretch.outputs}
        self._read_from = [
            {name for later in steps[index:] for name in later.stretch.inputs if made.get(name, -1) < index} for index in range(len(steps) + 1)
        ]
        (self._left,) = {len(value) for value in inputs.values()}
        self._lines[0].add(_Samples(np.arange(self._left), inputs))
        self._changed = threading.Condition()
        self._stopped = False
        self._threads = 1

    def run(self, helpers: Helpers) -> None:
        """Compute until every sample has its answer: by several threads where the engine lets them, and there is a full call for each."""
        engine, largest = self.engine, max((sizes[0] for sizes in self._sizes if sizes), default=0)
        if not (engine.shares_samples and largest and self._left >= largest * engine.threads):
            self._work()
            return
        self._threads = engine.threads

        def help_out() -> None:
            with engine.alone(always=True):
                self._work()

        futures = [helpers.executor(engine.threads - 1).submit(help_out) for _ in range(engine.threads - 1)]
        try:
            with engine.alone():
                self._work()
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            begun = [future for future in futures if not future.cancel()]  # others wait for threads that help with another batch
            wait(begun)
        for future in begun:
            future.result()

    def _work(self) -> None:
        """Compute what is ready, until nothing is left or another thread failed."""
        try:
            while (taken := self._next()) is not None:
                index, parts = taken
                samples = _joined(parts)
                found = self.steps[index].run(samples.values, self.parameters)
                with self._changed:
                    self._note(index, samples, found)
                    self._changed.notify_all()
        except BaseException:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            raise

    def _next(self) -> tuple[int, list[_Samples]] | None:
        """The next call: of the last step with enough for a full one, else of the first with any. None when all have their answers.

        Towards the end a full one has no more than leaves each thread as many.
        """
        with self._changed:
            while self._left and not self._stopped:
                waiting = [index for index, line in enumerate(self._lines) if line.count]
                share = -(-self._left // self._threads)
                for index in reversed(waiting):
                    full = self._size(index, share)
                    if self._lines[index].count >= full:
                        return index, self._lines[index].take(full)
                if waiting:
                    line = self._lines[waiting[0]]
                    return waiting[0], line.take(self._size(waiting[0], line.count))
                self._changed.wait()
            return None

    def _size(self, index: int, most: int) -> int:
        """The largest size of a step's calls up to this one."""
        return next((size for size in self._sizes[index] if size <= most), most)

    def _note(self, index: int, samples: _Samples, found: dict[str, Array]) -> None:
        """Decide on what a call has computed, and let what goes on wait for the next step."""
        step, line = self.steps[index], self._lines[index]
        said = {name: found[name] for name in (step.logits, step.scores) if name}
        carried = {name: found[name] if name in found else samples.values[name] for name in self._read_from[index + 1]}
        line.computed.append((_Samples(samples.numbers, carried), said))
        if self.together and sum(len(part.numbers) for part, _ in line.computed) < self._left:
            return
        computed, line.computed, numbers = line.computed, [], samples.numbers
        if len(computed) > 1:
            computed.sort(key=lambda one: int(one[0].numbers[0]))
            numbers = np.concatenate([part.numbers for part, _ in computed])
            said = {name: np.concatenate([told[name] for _, told in computed]) for name in said}
        goes_on = self.decide(index, numbers, said)
        start = 0
        for part, _ in computed:
            stop = start + len(part.numbers)
            rows = np.flatnonzero(goes_on[start:stop])
            self._left -= len(part.numbers) - len(rows)
            if len(rows):
                self._lines[index + 1].add(part.rows(rows))
            start = stop


class Helpers:
    """Threads that help with batches, kept between them; a process that was forked has its own."""

    def __init__(self) -> None:
        self._made: tuple[int, int, ThreadPoolExecutor] | None = None
        self._making = threading.Lock()

    def executor(self, count: int) -> Executor:
        """So many threads."""
        with self._making:
            if self._made is None or self._made[:2] != (os.getpid(), count):
                self._made = os.getpid(), count, ThreadPoolExecutor(count, thread_name_prefix="exitify-batch")
            return self._made[2]
