"""The artifact against the same network untransformed, with times that a repeated run finds again."""

from exitify.benchmark.compare import bench
from exitify.benchmark.contenders import AGAINST, one_graph
from exitify.benchmark.markdown import markdown
from exitify.benchmark.report import BenchReport, Timing

__all__ = ["AGAINST", "BenchReport", "Timing", "bench", "markdown", "one_graph"]
