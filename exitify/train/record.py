"""What the heads read, computed once: the backbone runs in the engine, its values go to a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from exitify.artifact.artifact import Artifact
from exitify.data import Samples, rows_at_once
from exitify.errors import DataError
from exitify.heads import ExitHead
from exitify.pictures import pixels_to_inputs
from exitify.plan import Cost, Stretch
from exitify.progress import Progress
from exitify.runtime.engines import make_engine
from exitify.train.augment import Augmentation, augment

ROWS_A_CHUNK = 2500
"""Rows that are read and shuffled together."""


@dataclass(frozen=True)
class FeatureFile:
    """Pooled values of all exits, row by row, float16, and the network's own logits beside them.

    A row is the concatenation of pooled values; rows stand in a random order, which `rows` gives.
    Written front to back, so an interrupted recording goes on where the file ends.

    widths: Numbers in each pooled value. columns: Which of them each exit reads; heads that pool one value alike share it.
    """

    path: Path
    rows: NDArray[np.integer]
    widths: tuple[int, ...]
    columns: tuple[int, ...]
    classes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: features in float16, logits in float32."""
        return 2 * sum(self.widths) + 4 * self.classes

    def chunks(
        self, generator: np.random.Generator, size: int = ROWS_A_CHUNK
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, NDArray[np.integer]]]:
        """Yield features by exit, the network's logits, and which samples they are, in shuffled chunks with shuffled rows."""
        starts = np.arange(0, len(self.rows), size)
        generator.shuffle(starts)
        with open(self.path, "rb") as stream:
            for start in starts:
                count = min(size, len(self.rows) - int(start))
                stream.seek(int(start) * self.row_bytes)
                raw = np.frombuffer(stream.read(count * self.row_bytes), np.uint8).reshape(count, self.row_bytes)
                order = generator.permutation(count)
                raw = raw[order]
                split = 2 * sum(self.widths)
                features = torch.from_numpy(np.ascontiguousarray(raw[:, :split]).view(np.float16))
                logits = torch.from_numpy(np.ascontiguousarray(raw[:, split:]).view(np.float32))
                parts = torch.split(features, list(self.widths), dim=1)
                yield [parts[column] for column in self.columns], logits, self.rows[start : start + count][order]


def record(
    artifact: Artifact,
    heads: dict[str, ExitHead],
    samples: Samples,
    file: FeatureFile,
    how: Augmentation,
    *,
    seed: int,
    threads: int,
    progress: Progress,
) -> None:
    """Write the file, from where it ends to the last row.

    Raises:
        DataError: the disk is full (what was written stays, and a later call goes on there), or a value does not fit float16.
    """
    run = make_engine("auto", artifact, threads).prepare(backbone(artifact))
    plan = artifact.plan
    first = [plan.exits[file.columns.index(column)] for column in range(len(file.widths))]
    done = file.path.stat().st_size // file.row_bytes if file.path.exists() else 0
    at_once = rows_at_once(plan.values[plan.input])
    if done < len(file.rows):
        done -= done % at_once
    try:
        with open(file.path, "r+b" if file.path.exists() else "w+b") as stream:
            stream.truncate(done * file.row_bytes)
            stream.seek(done * file.row_bytes)
            for start in range(done, len(file.rows), at_once):
                progress("recording features", start, len(file.rows))
                rows = file.rows[start : start + at_once]
                generator = np.random.default_rng((seed, start))
                pixels = samples.pixels(rows)
                inputs = pixels_to_inputs(augment(pixels, how, generator), artifact.manifest.input) if pixels.dtype == np.uint8 else pixels
                values = run({plan.input: inputs})
                with torch.inference_mode():
                    pooled = [heads[point.name].pool(torch.from_numpy(values[point.after])).flatten(1).half().numpy() for point in first]
                for point, array in zip(first, pooled):
                    if not np.isfinite(array).all():
                        raise DataError(
                            f"the value that {point.name} reads, {point.after!r}, goes beyond float16's 65504, in which features are recorded",
                            "place the exit elsewhere, after a norm for instance",
                        )
                parts = [*(array.view(np.uint8) for array in pooled), np.ascontiguousarray(values[plan.output], np.float32).view(np.uint8)]
                stream.write(np.concatenate(parts, axis=1).tobytes())
    except OSError as error:
        needed = len(file.rows) * file.row_bytes / 2**30
        raise DataError(
            f"cannot write {file.path}: {os.strerror(error.errno or 0)}", f"recording needs {needed:.1f} GiB there; free some, or use --copies 1"
        ) from error
    progress("recording features", len(file.rows), len(file.rows))


def backbone(artifact: Artifact) -> Stretch:
    """The whole network without heads, giving the values that heads read and its own logits."""
    plan = artifact.plan
    trunks = [segment for segment in plan.segments if segment.kind != "head"]
    outputs = dict.fromkeys([*(point.after for point in plan.exits), plan.output])
    return Stretch(tuple(s.name for s in trunks), (plan.input,), tuple(outputs), (), "", sum((s.cost for s in trunks), Cost()))
