"""What `benchmarks.kernels` times: the operator alone, on both sides, the same numbers; times themselves are asserted nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from benchmarks import kernels, peaks
from benchmarks.kernels import Case, Node, Row
from tests.lower.kernels import HERE

CASES = {
    "convolution": Case("", "", "", (1, 17, 6, 7), (Node("Conv", ((24, 17, 3, 3), (24,)), (("pads", (1, 1, 1, 1)),)), Node("Relu"))),
    "residual": Case("", "", "", (1, 16, 5, 5), (Node("Conv", ((32, 16, 1, 1), (32,))), Node("Add", residual=True), Node("Relu"))),
    "pooling": kernels._in_blocks("", "", "", (1, 32, 9, 9), Node("MaxPool", attributes=(("kernel_shape", (3, 3)), ("strides", (2, 2))))),
    "gate": kernels._in_blocks("", "", "", (1, 48, 5, 5), Node("Mul", inputs=((1, 48, 1, 1),))),
    "product": Case("", "", "", (1, 13, 24), (Node("MatMul", ((24, 40),)), Node("Add", ((40,),)), Node("Gelu"))),
    "softmax": Case("", "", "", (3, 7, 13), (Node("Softmax", attributes=(("axis", -1),)),)),
}


@pytest.mark.parametrize("name", CASES)
def test_both_sides_compute_the_same_and_conversions_are_left_out(name: str, tmp_path: Path):
    case = CASES[name]
    model = kernels.model_of(case)
    calls, found = kernels.our_calls(model, case, HERE)
    timed = [call.name for call in calls if call.is_timed]
    assert len(timed) == 1
    assert not any(called.startswith(kernels.CONVERSIONS) for called in timed)
    proto, inputs = kernels.cut(model, 1, tmp_path)
    assert len(proto.graph.output) == 1
    expected = onnxruntime.InferenceSession(model.proto.SerializeToString(), kernels.options(1)).run(None, model.inputs)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    cut = onnxruntime.InferenceSession(proto.SerializeToString(), kernels.options(1)).run(None, inputs)[0]
    np.testing.assert_allclose(
        np.sort(cut[cut != 0]), np.sort(expected[expected != 0]), rtol=1e-4, atol=1e-4
    )  # in another order, with channels added


def test_what_comes_before_the_operator_is_not_timed():
    case = CASES["pooling"]
    calls, _ = kernels.our_calls(kernels.model_of(case), case, HERE)
    assert [call.is_timed for call in calls if not call.name.startswith(kernels.CONVERSIONS)] == [False, False, True]


def test_each_copy_has_weights_of_its_own():
    case = CASES["convolution"]
    model = kernels.model_of(case)
    calls, found = kernels.our_calls(model, case, HERE)
    kernel = next(call for call in calls if call.is_timed)
    assert kernel.weights
    for run in kernels.bound_calls(calls, 2):
        kernel.arguments[-1].copyfrom(np.zeros(kernel.arguments[-1].shape, np.float32))
        run()
        assert float(np.abs(kernel.arguments[-1].numpy()).max()) == pytest.approx(float(np.abs(found).max()), rel=1e-5)


def test_bytes_come_from_the_nearest_cache_that_holds_them():
    most = peaks.Peaks(1e9, ((1000, 100.0), (10_000, 10.0), (peaks.MEMORY, 1.0)))
    assert most.seconds_for(500) == pytest.approx(5)
    assert most.seconds_for(12_000) == pytest.approx(10 + 1000 + 1000)
    assert [most.bandwidth(held) for held in (1000, 1001, 1e6)] == [100.0, 10.0, 1.0]
    assert [peaks.called(size) for size in (48 << 10, 32 << 20, peaks.MEMORY)] == ["48 KiB", "32 MiB", "memory"]


def test_the_table_says_how_much_of_the_roof_is_reached(tmp_path: Path):
    rows = [
        Row("3x3", "64 @ 56", "resnet18", 1e8, 1e6, 1e-3, (2e-3, 1e-3, 3e-3), (4e-3, 4e-3, 4e-3), 0.5, ("convolution",), 0.0),
        Row("mean", "64 @ 56", "resnet18", 0.0, 1e6, 1e-5, (2e-5, 2e-5, 2e-5), (1e-5, 1e-5, 1e-5), 2.0, ("mean",), 0.0),
    ]
    assert kernels.table(rows).splitlines()[2:] == [
        "| 3x3 | 64 @ 56 | resnet18 | 2000 (1000 to 3000) | 4000 (4000 to 4000) | 0.50 | 50.0 GMAC/s | 50% | 25% |",
        "| mean | 64 @ 56 | resnet18 | 20 (20 to 20) | 10 (10 to 10) | 2.00 | 50.0 GB/s | 50% | 100% |",
    ]
    assert kernels.summary(rows).splitlines()[-1] == "| mean | 1 | 2.00 | 2.00 (64 @ 56) | 50% |"
    kernels.draw(rows, peaks.Peaks(1e11, ((1000, 1e11), (peaks.MEMORY, 1e10))), 1, tmp_path / "kernels")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels.png", "kernels.svg"]
