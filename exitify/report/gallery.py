"""The samples that an exit is surest of, and those that it hardly takes, as small pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from exitify.report.behaviour import Behaviour
from exitify.report.evidence import Evidence

EACH = 8
LARGEST = 96
"""Pixels of a picture's longer side in a page."""


@dataclass(frozen=True)
class Shown:
    """A sample in a page.

    picture: A `data:` address. label: Its class. answer: What it is given, and how sure that is.
    """

    picture: str
    label: int
    answer: int
    probability: float

    @property
    def is_right(self) -> bool:
        """Whether the answer is its class."""
        return self.label == self.answer


def gallery(evidence: Evidence, done: Behaviour, each: int = EACH) -> dict[int, tuple[list[Shown], list[Shown]]]:
    """By exit, the samples that leave there easiest and hardest: with the highest and the lowest score. Empty where samples are no pictures."""
    samples = evidence.samples
    if samples is None or not samples.are_pictures:
        return {}
    found: dict[int, tuple[list[Shown], list[Shown]]] = {}
    for exit_number in np.unique(done.taken):
        here = np.flatnonzero(done.taken == exit_number)
        ranked = here[np.lexsort((-done.probability[here], -done.sureness[here]))]  # a policy that counts has many alike
        picked = ranked[:each], ranked[each:][::-1][:each]  # none in both
        easiest, hardest = (
            [Shown(_data_uri(samples.pixels([row])[0]), int(done.labels[row]), int(done.answers[row]), float(done.probability[row])) for row in rows]
            for rows in picked
        )
        found[int(exit_number)] = easiest, hardest
    return found


def _data_uri(pixels: np.ndarray) -> str:
    """A picture `(H, W, C)` in bytes as an address: small ones without loss."""
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    kind = "png" if max(picture.size) <= LARGEST else "jpeg"
    picture.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    picture.save(stream, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
