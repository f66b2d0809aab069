"""How much memory a contender needs: in a process of its own that holds nothing else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

from exitify.benchmark.contenders import Contender
from exitify.benchmark.worker import Tell, call_alone
from exitify.runtime.engines.base import Array


def rss_alone(contender: Contender, threads: int, inputs: Array) -> float:
    """The most memory that is resident while a process that holds this contender alone answers, in MiB.

    The process starts a new interpreter, imports what the contender needs (NumPy and this package are in all of them; torch only in torch's),
    loads it as a round of the benchmark does, and answers all inputs twice. The first pass is warm-up: engines allocate on the way. What
    counts is the peak of the second, as the kernel keeps it (VmHWM, set back in between), so that what only loading or compiling needed and
    gave back does not count, and what it left behind does. Resident pages count wherever they come from: code of libraries, and weights that are
    mapped from a file, which other processes may share. An artifact is counted with its session. Where the kernel does not let its peak
    be set back (others than Linux), the peak includes loading.

    Args:
        contender: What to load. threads: That it may use. inputs: `(N, *shape)`, a few that make it use all that it has.

    Raises:
        NotHandedOver: the contender cannot go to another process.
    """
    peak: int = call_alone(_hold_alone, contender, threads, inputs)
    return peak / 2**20


def _hold_alone(contender: Contender, threads: int, inputs: Array, tell: Tell) -> int:
    """What runs there."""
    return peak_rss(contender.load(threads).run, inputs)


def peak_rss(run: Callable[[Array], object], inputs: Array) -> int:
    """Answer all inputs twice, and return the second pass's peak of resident memory, in bytes."""
    for start in range(len(inputs)):
        run(inputs[start : start + 1])
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    for start in range(len(inputs)):
        run(inputs[start : start + 1])
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
