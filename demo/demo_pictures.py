"""Segments pictures one by one, and says what is in them."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from demo_models import Segmenter
    from demo_results import Results

    from mask2former.predictor import PanopticPicture, PictureResult

_LISTED = 8


def segment_pictures(segmenter: Segmenter, pictures: Sequence[Path], results: Results) -> tuple[int, float]:
    """Segment and draw pictures and print a line on each. One that cannot be read or written is reported and left out.

    Returns:
        How many could be done, and the seconds that reading, segmenting and drawing them took.
    """
    from tqdm import tqdm

    from mask2former.data.images import read_image

    done, total = 0, 0.0
    for path in tqdm(pictures, unit="picture", disable=None):
        start = time.perf_counter()
        try:
            pixels = read_image(path)
            result = segmenter(pixels)
            drawing = segmenter.draw(pixels, result)
            seconds, words = time.perf_counter() - start, summary(result)
            note = results.add_picture(path, drawing, words)
        except (OSError, ValueError, MemoryError) as error:
            tqdm.write(f"demo: skipped {path}: {error}", file=sys.stderr)
            continue
        done, total = done + 1, total + seconds
        tqdm.write(f"{path.name}{note}: {words} [{seconds:.2f} s]")
    return done, total


def summary(result: PictureResult) -> str:
    """What was found in a picture, in a few words."""
    from mask2former.predictor import InstancePicture, PanopticPicture

    if isinstance(result, PanopticPicture):
        return _listed("segment", _panoptic_words(result))
    if isinstance(result, InstancePicture):
        if len(result.names) > _LISTED and len(set(result.names)) == 1:
            low, high = result.scores.min(), result.scores.max()
            return f"{len(result.names)} instances: {result.names[0]} {low:.0%} to {high:.0%}"
        words = [f"{n} {s:.0%}" for n, s in zip(result.names, result.scores.tolist(), strict=True)]
        return _listed("instance", words)
    areas = np.bincount(result.labels.ravel(), minlength=len(result.names)) / result.labels.size
    order = np.argsort(-areas, kind="stable")
    words = [f"{result.names[i]} {areas[i]:.0%} of the area" for i in order[: np.count_nonzero(areas)]]
    return _listed("class", words)


def _panoptic_words(result: PanopticPicture) -> list[str]:
    by_score = sorted(result.segments, key=lambda segment: -segment.score)
    return [f"{segment.name} {segment.score:.0%}" for segment in by_score]


def _listed(noun: str, words: list[str]) -> str:
    plural = "" if len(words) == 1 else "es" if noun.endswith("s") else "s"
    if not words:
        return f"no {noun}{plural}"
    more = f", and {len(words) - _LISTED} more" if len(words) > _LISTED else ""
    return f"{len(words)} {noun}{plural}: {', '.join(words[:_LISTED])}{more}"
