"""Rules from the numbers of a data set to the settings of its training: pure functions of them and a `Recipe`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mask2former.own_data.findings import ImageScan, ObjectSize
from mask2former.own_data.recipes import REFERENCE_BATCH, Recipe

STEP_PX = 32  # of all sizes that are not the images' own
QUANTILE = 0.95
CROP_MARGIN = 2.0  # queries for each object that a crop shows, at the quantile
TIME_RESERVE = 0.1  # part of a time limit for starting, checkpoints and what the estimate misses


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long, and how much at once.

    Attributes:
        batch: images a step.
        learning_rate: of the transformer; the backbone's is what the config's base makes of it.
        iterations: number of steps.
        period: iterations between evaluations.
    """

    batch: int
    learning_rate: float
    iterations: int
    period: int


def test_side(scans: Sequence[ImageScan], is_thing: Sequence[bool], recipe: Recipe) -> int:
    """Length of the shorter side of a test image.

    The images' own (median), up to `recipe.shortest_side_px`; more where the median object, at that scale, would have
    a side below `recipe.object_side_px`, up to `recipe.largest_side_px`. An object's side is the square root of its
    pixels; first the median of each image is taken relative to its shorter side, then that of all images. Only things
    are objects.
    """
    sizes = [min(scan.size) for scan in scans if scan.size is not None]
    own = min(round(float(np.median(sizes))), recipe.shortest_side_px)
    relative = [
        float(np.median(sides)) / min(scan.size)
        for scan in scans
        if scan.size is not None
        and (sides := [math.sqrt(item.pixels) for item in scan.objects if is_thing[item.category]])
    ]
    if not relative:
        return own
    wanted = _to_step(recipe.object_side_px / float(np.median(relative)))
    return own if wanted <= own else min(wanted, recipe.largest_side_px)


def train_sides(side: int, recipe: Recipe) -> list[int]:
    """Lengths of the shorter side in training, for a test side."""
    return [round(side * scale) for scale in recipe.train_scales]


def crop_side(side: int, recipe: Recipe) -> int:
    """Side of the square crop: the recipe's, or less where images are smaller, in steps of `STEP_PX`."""
    return min(recipe.crop_px, max(STEP_PX, math.ceil(side / STEP_PX) * STEP_PX))


def num_queries(scans: Sequence[ImageScan], side: int, crop: int, recipe: Recipe) -> int:
    """Number of object queries.

    The larger of: the objects of a whole image, which the model sees in tests; and `CROP_MARGIN` times those that a
    crop shows in training at scale 1, both at the quantile `QUANTILE` of the images. Rounded up to tens, within the
    bounds of the recipe.
    """
    counts = [(len(scan.objects), objects_in_crop(scan, side, crop)) for scan in scans if scan.size is not None]
    if not counts:
        return recipe.min_queries
    whole, cropped = np.quantile(np.array(counts), QUANTILE, axis=0)
    wanted = math.ceil(max(whole, CROP_MARGIN * cropped) / 10) * 10
    return min(max(wanted, recipe.min_queries), recipe.max_queries)


def objects_in_crop(scan: ImageScan, side: int, crop: int) -> float:
    """Expected number of an image's objects that a random square crop touches, after the shorter side became `side`."""
    assert scan.size is not None
    scale = side / min(scan.size)
    return sum(_chance(item, scan.size, scale, crop) for item in scan.objects)


def batch_size(processes: int, recipe: Recipe) -> int:
    """Images a step on all processes together: at most `REFERENCE_BATCH`, at least one for each."""
    return max(min(recipe.images_per_process * processes, REFERENCE_BATCH // processes * processes), processes)


def schedule(images: int, processes: int, recipe: Recipe, iterations: int | None = None) -> Schedule:
    """The schedule.

    Args:
        images: that are trained on.
        processes: GPUs, or 1 for a CPU.
        recipe: gives `epochs` and `min_images_seen`, and the learning rate at `REFERENCE_BATCH`, which is scaled
            linearly.
        iterations: None: so many that each image is seen `epochs` times, and `min_images_seen` in all.
    """
    batch = batch_size(processes, recipe)
    if iterations is None:
        iterations = math.ceil(max(recipe.epochs * images, recipe.min_images_seen) / batch)
    return Schedule(
        batch=batch,
        learning_rate=recipe.learning_rate * batch / REFERENCE_BATCH,
        iterations=iterations,
        period=math.ceil(iterations / recipe.evaluations),
    )


def iterations_in(minutes: float, seconds_per_iteration: float, test_seconds: float) -> int:
    """Steps that fit into a time limit with the evaluation at its end, at least 1."""
    left = 60 * minutes * (1 - TIME_RESERVE) - test_seconds
    return max(int(left / seconds_per_iteration), 1)


def _chance(item: ObjectSize, size: tuple[int, int], scale: float, crop: int) -> float:
    """That a crop whose place is drawn evenly touches the object's box: in each direction the crop and the box are
    together as long as the part of the positions that touch, up to the edges.
    """
    chance = 1.0
    for edge, length in ((size[0], item.height), (size[1], item.width)):
        chance *= min((crop + length * scale) / (edge * scale), 1.0)
    return chance


def _to_step(length: float) -> int:
    return max(round(length / STEP_PX), 1) * STEP_PX
