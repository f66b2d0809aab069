"""Reports by hand."""

from __future__ import annotations

from exitify.artifact.manifest import Conditions
from exitify.benchmark import BenchReport, Timing
from exitify.board.power import Energy

ENERGY = Energy(3.25, (3.0, 3.5), 9.0, 6.05, 4.8)


def timing(name: str, role: str, ratio: float, *, engine: str = "onnxruntime", noise: float = 0.012, **more: object) -> Timing:
    """A contender of a network that takes 2 ms."""
    mean = 2 * ratio
    values: dict[str, object] = {"accuracy": 0.93, "rss_mib": 80.0, **more}
    is_unit = role == "baseline"
    interval, rounds = ((1.0, 1.0), (1.0, 1.0)) if is_unit else ((ratio * 0.99, ratio * 1.01), (ratio * 0.995, ratio * 1.005))
    return Timing(
        name=name, role=role, engine=engine, mean_ms=mean, p50_ms=mean * 0.9, p95_ms=mean * 1.5, throughput=1e3 / mean,  # type: ignore[arg-type]
        ratio=ratio, interval=interval, rounds=rounds, noise=0.0 if is_unit else noise, **values,  # type: ignore[arg-type]
    )  # fmt: skip


def report(*, ours: float = 0.71, noise: float = 0.012, **changes: object) -> BenchReport:
    """Of ResNet-56, against torch and a smaller network."""
    timings = (
        timing("onnxruntime", "baseline", 1.0),
        timing("onnxruntime again", "again", 1.003),
        timing("torch", "against", 2.6, engine="torch", rss_mib=242.5),
        timing("small|er.onnx", "smaller", 0.4, accuracy=0.871, rss_mib=None),
        timing("exitify", "artifact", ours, noise=noise, accuracy=0.926, rss_mib=84.25),
    )
    values: dict[str, object] = {
        "timings": timings, "exits": {"exit1": 0.5, "exit2": 0.25, "final": 0.25}, "mean_macs_share": 0.641, "samples": 500, "rounds": 5,
        "threads": 1, "precision": "fp32", "network": "torchvision:resnet_18", "profile": "default",
        "conditions": Conditions("orin-nano-8gb", "15W", "fixed"), "others_share": 0.02,
        "versions": {"exitify": "0.1.0", "Python": "3.11.7", "onnxruntime": "1.32.0", "torch": "2.13.0+cpu"},
        **changes,
    }  # fmt: skip
    return BenchReport(**values)  # type: ignore[arg-type]
