"""The cost ranking of a convolution's tiles: record measurements, fit `exitify/lower/ranking.json` to them, and judge it on shapes it has not seen.

    OMP_NUM_THREADS=1 TVM_NUM_THREADS=1 python -m benchmarks.tiles record tiles.jsonl         # half an hour on a core; goes on where it was stopped
    python -m benchmarks.tiles judge tiles.jsonl
    python -m benchmarks.tiles fit tiles.jsonl --output exitify/lower/ranking.json

A record is one convolution with ReLU, packed for one tile and scheduled as by default, its weights cold: seconds of the thread's own time, the
median of several. For AVX-512 and, compiled for x86-64-v3 and `Vectors(8, 16)`, for AVX2. Of each shape all tiles are measured that fill the
registers as they should, and some others. It is judged four times, on each fourth of the shapes by a fit to the other three.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import te, tirx

from exitify.lower import ranking
from exitify.lower.convolution import Shape, channels_together, packed_convolution
from exitify.lower.library import silent_stderr
from exitify.lower.processors import Machine, machine_of
from exitify.lower.schedules import convolution
from exitify.lower.vectors import Tile, Vectors
from exitify.targets import load_target, processor

COLD, COPIES = 2 << 20, 8
OTHERS = 8
"""Tiles measured of a shape beside all that fill the registers as they should."""
FOLDS = 4
SHAPES = (
    # channels, filters, height, width, kernel, stride: of the eight networks, large images cut to some rows
    (64, 256, 28, 56, 1, 1), (256, 64, 28, 56, 1, 1), (512, 128, 14, 28, 1, 1), (128, 512, 28, 28, 1, 1), (256, 1024, 14, 14, 1, 1),
    (1024, 256, 14, 14, 1, 1), (2048, 512, 7, 7, 1, 1), (512, 2048, 7, 7, 1, 1), (256, 512, 28, 56, 1, 2), (512, 1024, 28, 28, 1, 2),
    (64, 64, 14, 56, 3, 1), (128, 128, 14, 28, 3, 1), (256, 256, 14, 14, 3, 1), (512, 512, 7, 7, 3, 1), (64, 128, 28, 56, 3, 2),
    (128, 256, 28, 28, 3, 2), (256, 512, 14, 14, 3, 2), (3, 64, 64, 224, 7, 2), (3, 32, 64, 224, 3, 2), (3, 16, 64, 224, 3, 2),
    (32, 16, 28, 112, 1, 1), (16, 96, 28, 112, 1, 1), (96, 24, 56, 56, 1, 1), (24, 144, 56, 56, 1, 1), (144, 32, 28, 28, 1, 1),
    (32, 192, 28, 28, 1, 1), (192, 64, 14, 14, 1, 1), (64, 384, 14, 14, 1, 1), (384, 96, 14, 14, 1, 1), (96, 576, 14, 14, 1, 1),
    (576, 160, 7, 7, 1, 1), (160, 960, 7, 7, 1, 1), (320, 1280, 7, 7, 1, 1), (72, 24, 28, 28, 1, 1), (24, 88, 28, 28, 1, 1),
    (40, 240, 14, 14, 1, 1), (120, 48, 14, 14, 1, 1), (288, 96, 7, 7, 1, 1), (112, 672, 14, 14, 1, 1), (672, 192, 7, 7, 1, 1),
    (672, 28, 1, 1, 1, 1), (28, 672, 1, 1, 1, 1), (96, 192, 28, 28, 2, 2), (384, 768, 14, 14, 2, 2), (3, 96, 56, 224, 4, 4),
    (3, 384, 64, 224, 16, 16),
    # odd ones
    (17, 33, 13, 13, 3, 1), (5, 48, 30, 30, 5, 1), (48, 80, 19, 23, 3, 1), (100, 100, 11, 11, 1, 1), (24, 64, 28, 28, 5, 1),
    (16, 16, 32, 32, 3, 1), (32, 32, 16, 16, 3, 1), (64, 64, 8, 8, 3, 1), (30, 112, 17, 35, 1, 1), (80, 192, 35, 35, 3, 1),
)  # fmt: skip


def shape_of(sizes: tuple[int, ...]) -> Shape:
    channels, filters, height, width, kernel, stride = sizes
    border = 0 if kernel == stride else kernel // 2
    return Shape(channels, height, width, filters, (kernel, kernel), (stride, stride), (border,) * 4, (1, 1))


def fold_of(sizes: tuple[int, ...]) -> int:
    return SHAPES.index(sizes) % FOLDS


def machines() -> Iterator[Machine]:
    """AVX-512 where there is, and AVX2 by the same processor."""
    here = machine_of(load_target("host"))
    assert here.architecture == "x86_64"
    yield here
    if here.vectors.lanes > 8:
        yield replace(here, cpu="x86-64-v3", attributes=(), vectors=Vectors(8, 16))


# --- recording


def record(path: Path, seconds: float) -> None:
    known = {key_of(found) for found in read(path)} if path.exists() else set()
    draw = random.Random(0)
    with path.open("a", encoding="utf-8") as stream:
        for machine in machines():
            for sizes in SHAPES:
                shape = shape_of(sizes)
                whole = all_tiles(machine.vectors, shape)
                tiles = [tile for tile in whole if 6 <= math.prod(tile) <= machine.vectors.accumulators]
                others = [tile for tile in whole if tile not in tiles]
                tiles += draw.sample(others, min(OTHERS, len(others)))
                runs = {tile: run_of(shape, tile, machine) for tile in tiles if (machine.vectors.lanes, sizes, tile) not in known}
                for tile, found in timed(runs, seconds).items():
                    line = {"lanes": machine.vectors.lanes, "registers": machine.vectors.registers, "shape": sizes, "tile": tile, "seconds": found}
                    stream.write(json.dumps(line) + "\n")
                stream.flush()
                print(machine.vectors, sizes, len(runs), flush=True)


def key_of(found: dict[str, Any]) -> tuple[int, tuple[int, ...], tuple[int, int]]:
    return found["lanes"], tuple(found["shape"]), tuple(found["tile"])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def all_tiles(vectors: Vectors, shape: Shape) -> list[tuple[int, int]]:
    """Vectors of filters and pixels, some of which need more registers than there are."""
    most = vectors.registers - 3
    blocks = -(-shape.filters // vectors.lanes)
    widths = [width for width in (1, 2, 3, 4) if blocks % width == 0]
    return [(width, pixels) for width in widths for pixels in range(1, min(most // width, shape.columns, 20) + 1)]


def run_of(shape: Shape, tile: tuple[int, int], machine: Machine) -> list[Callable[[], Any]]:
    """Calls of the convolution, each with weights of its own."""
    lanes = machine.vectors.lanes
    width, pixels = tile
    several = channels_together(shape.channels, lanes)
    image = (1, -(-shape.channels // lanes), shape.height, shape.width, lanes)
    packed = (-(-shape.filters // (width * lanes)), shape.channels // several, *shape.kernel, several, width * lanes)
    data, weight = te.placeholder(image, "float32", "data"), te.placeholder(packed, "float32", "weight")
    result = packed_convolution(data, weight, shape, Tile(width * lanes, pixels), lanes)
    result = te.compute(result.shape, lambda *at: tirx.max(result[at], tirx.const(0.0, "float32")), name="relu")
    kernel = te.create_prim_func([data, weight, result]).with_attr("tirx.noalias", True)
    made = convolution.schedule(kernel, machine.vectors)
    assert made is not None
    with silent_stderr():
        function = tvm.compile(tvm.IRModule({"main": made.mod["main"].with_attr("global_symbol", "main")}), target=machine.target)["main"]
    draw = np.random.default_rng(0)
    given = tvm.runtime.tensor(draw.standard_normal(image, np.float32))
    written = tvm.runtime.empty([int(size) for size in result.shape], "float32")
    copies = min(COPIES, COLD // (4 * math.prod(packed)) + 1)
    weights = [tvm.runtime.tensor(draw.standard_normal(packed, np.float32)) for _ in range(copies)]
    return [lambda one=one: function(given, one, written) for one in weights]


def timed(runs: dict[tuple[int, int], list[Callable[[], Any]]], seconds: float) -> dict[tuple[int, int], float]:
    """Median seconds of a call, all tiles in turn, at least seven rounds."""
    times: dict[tuple[int, int], list[float]] = {tile: [] for tile in runs}
    for _ in range(7):
        for tile, calls in runs.items():
            count, started = 0, time.thread_time()
            while count == 0 or time.thread_time() - started < seconds / 7:
                for call in calls:
                    call()
                count += len(calls)
            times[tile].append((time.thread_time() - started) / count)
    return {tile: float(np.median(found)) for tile, found in times.items()}


# --- fitting


def fitted(records: list[dict[str, Any]]) -> tuple[dict[str, float], list[float]]:
    """Coefficients, and what is left of each log time, for one vector unit.

    Least squares of log time, each shape with a factor of its own; what is left beyond a tenth counts by its size and not its square, for a few
    tiles, one in fifty, meet code of LLVM's that takes several times as long as that of their neighbours.
    """
    from scipy.optimize import least_squares

    found = [terms_of(one) for one in records]
    names = list(found[0])
    values = np.array([[one[name] for name in names] for one in found])
    relative = values / values[:, :1]
    logs = np.log([one["seconds"] for one in records]) - np.log(values[:, 0])
    number = {sizes: i for i, sizes in enumerate(dict.fromkeys(tuple(one["shape"]) for one in records))}
    member = np.array([number[tuple(one["shape"])] for one in records])
    count = len(names)
    small = np.log(np.where(np.arange(count) == 0, 1.0, 0.01))

    def left(parameters: Any) -> Any:
        return logs - np.log(relative @ np.exp(parameters[:count])) - parameters[count:][member]

    def residuals(parameters: Any) -> Any:
        unlike = left(parameters)
        damped = np.sign(unlike) * 0.1 * np.sqrt(2 * (np.sqrt(1 + (unlike / 0.1) ** 2) - 1))
        return np.concatenate([damped, 0.01 * (parameters[:count] - small)])  # a term that the data does not need goes towards nothing

    start = np.concatenate([np.maximum(small, np.log(0.1)), [np.median(logs[member == i]) for i in range(len(number))]])
    solved = least_squares(residuals, start, max_nfev=300).x
    return {name: float(f"{value:.3g}") for name, value in zip(names, np.exp(solved[:count] - solved[0]))}, left(solved).tolist()


def terms_of(found: dict[str, Any]) -> dict[str, float]:
    return ranking.terms(shape_of(tuple(found["shape"])), *found["tile"], found["lanes"], found["registers"])


def fit(path: Path, output: Path) -> None:
    records = read(path)
    by_lanes = {lanes: [found for found in records if found["lanes"] == lanes] for lanes in sorted({found["lanes"] for found in records})}
    known = {str(lanes): fitted(own) for lanes, own in by_lanes.items()}
    errors = {
        lanes: f"{np.median(np.abs(left)):.3f} median, {np.sqrt(np.mean(np.square(left))):.3f} root mean square" for lanes, (_, left) in known.items()
    }
    provenance = {
        "processor": processor.model_name(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "measurements": {lanes: len(own) for lanes, own in by_lanes.items()},
        "shapes": len({tuple(found["shape"]) for found in records}),
        "units": {str(own[0]["lanes"]): f"{own[0]['lanes']} lanes, {own[0]['registers']} registers" for own in by_lanes.values()},
        "error": errors,
        "error_of": "log time within a shape, absolute",
        "commands": [
            "python -m benchmarks.tiles record tiles.jsonl",
            "python -m benchmarks.tiles fit tiles.jsonl --output exitify/lower/ranking.json",
        ],
        "not_measured": "a processor with NEON: it takes the coefficients of 8 lanes, its terms counted in its own vectors and registers",
    }
    output.write_text(json.dumps({"coefficients": {lanes: one for lanes, (one, _) in known.items()}, "provenance": provenance}, indent=1) + "\n")
    print(output.read_text())


# --- judging


def by_hand(shape: Shape, tile: tuple[int, int], vectors: Vectors) -> float:
    """The price by the constants that stood here before, set by hand."""
    width, pixels = tile
    filters = math.ceil(shape.filters / (width * vectors.lanes)) * width * vectors.lanes / shape.filters
    columns = math.ceil(shape.columns / pixels) * pixels / shape.columns
    return filters * columns * (1.05 + 0.25 * (width + pixels) / (width * pixels) + 0.5 * max(0.0, 1 - width * pixels / 6))


def judge(path: Path) -> None:
    """How much longer the chosen tile takes than the best, both of those that may be chosen and were measured."""
    records = read(path)
    lost: dict[tuple[int, str], list[float]] = {}
    for lanes in sorted({found["lanes"] for found in records}):
        own = [found for found in records if found["lanes"] == lanes]
        vectors = Vectors(lanes, own[0]["registers"])
        folds = [fitted([found for found in own if fold_of(tuple(found["shape"])) != fold])[0] for fold in range(FOLDS)]
        for sizes in SHAPES:
            shape, known = shape_of(sizes), folds[fold_of(sizes)]
            tiles = {tuple(found["tile"]): found["seconds"] for found in own if tuple(found["shape"]) == sizes}
            tiles = {tile: seconds for tile, seconds in tiles.items() if math.prod(tile) <= vectors.accumulators}

            def fitted_price(tile: tuple[int, int], shape: Shape = shape, known: dict[str, float] = known, vectors: Vectors = vectors) -> float:
                values = ranking.terms(shape, *tile, vectors.lanes, vectors.registers)
                return sum(known[name] * value for name, value in values.items())

            chosen = {"by hand": min(tiles, key=lambda tile: by_hand(shape, tile, vectors)), "fitted": min(tiles, key=fitted_price)}
            best = min(tiles.values())
            for name, tile in chosen.items():
                lost.setdefault((lanes, name), []).append(tiles[tile] / best)
            said = "; ".join(f"{name} {tile} {tiles[tile] / best:.3f}" for name, tile in chosen.items())
            print(f"{lanes:3d} {sizes!s:32s} best {min(tiles, key=tiles.__getitem__)} {1e6 * best:8.1f} µs  {said}")
    for (lanes, name), values in lost.items():
        median, ninth = np.percentile(values, (50, 90))
        mean = f"mean {np.mean(values):.3f}, median {median:.3f}, 90th percentile {ninth:.3f}, worst {max(values):.3f}"
        print(f"{lanes} lanes, {name}: {len(values)} shapes, of the best tile's time {mean}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("record", "fit", "judge"))
    parser.add_argument("records", type=Path)
    parser.add_argument("--output", type=Path, default=ranking.FILE)
    parser.add_argument("--seconds", type=float, default=0.012, help="Of timing, a tile.")
    chosen = parser.parse_args()
    if chosen.step == "record":
        record(chosen.records, chosen.seconds)
    elif chosen.step == "fit":
        fit(chosen.records, chosen.output)
    else:
        judge(chosen.records)


if __name__ == "__main__":
    main()
