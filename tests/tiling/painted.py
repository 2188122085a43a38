"""Pictures whose segments are known, and a predictor that reads them from the colours."""

from typing import Any, NamedTuple

import numpy as np

from mask2former.data.catalog import Category

CATEGORIES = (
    Category(7, "cell", True, (220, 20, 60)),
    Category(9, "car", True, (0, 0, 142)),
    Category(21, "sky", False, (70, 130, 180)),
    Category(22, "grass", False, (107, 142, 35)),
)
CELL, CAR, SKY, GRASS = range(4)


class PaintedSegment(NamedTuple):
    id: int
    category_id: int
    is_thing: bool
    score: float
    area: int


class PaintedPanoptic(NamedTuple):
    ids: Any
    segments: list[PaintedSegment]


class PaintedInstances(NamedTuple):
    labels: Any
    scores: Any
    masks: Any


class PaintedSemantic(NamedTuple):
    labels: Any


class PaintedPredictor:
    """The first band is 1 + the class (0: nothing), the second one the number of the object.

    ``score`` gives the score of all that is in a call, by the number of the call from 0.
    """

    categories = CATEGORIES

    def __init__(self, score=lambda call: 0.9):
        self.score = score
        self.calls = []
        self.thresholds = []

    def __call__(self, image, task, *, threshold=None):
        score = self.score(len(self.calls))
        self.calls.append(image)
        self.thresholds.append(threshold)
        classes, numbers = image[..., 0].astype(int), image[..., 1].astype(int)
        if task == "semantic":
            return PaintedSemantic(np.maximum(classes - 1, 0).astype(np.int32))
        is_thing = np.isin(classes, (1 + CELL, 1 + CAR))
        codes = np.where(is_thing, classes * 1000 + numbers, classes)
        areas = np.bincount(codes.ravel())
        present = [int(code) for code in np.flatnonzero(areas) if code]
        if task == "instance":
            things = [code for code in present if code >= 1000]
            masks = np.array([codes == code for code in things], bool).reshape(-1, *codes.shape)
            labels = np.array([code // 1000 - 1 for code in things], np.int64)
            return PaintedInstances(labels, np.full(len(things), score, np.float32), masks)
        table, segments = np.zeros(len(areas), np.int32), []
        for id, code in enumerate(present, 1):
            table[code] = id
            label = (code // 1000 if code >= 1000 else code) - 1
            segments.append(PaintedSegment(id, label, code >= 1000, score, int(areas[code])))
        return PaintedPanoptic(table[codes], segments)


class ForgetfulPredictor(PaintedPredictor):
    """Keeps none of the pictures."""

    def __call__(self, *arguments, **options):
        result = super().__call__(*arguments, **options)
        self.calls.clear()
        return result


def canvas(height, width, background=None, bands=3):
    """(height, width, bands) uint8 of one stuff class, or of nothing."""
    picture = np.zeros((height, width, bands), np.uint8)
    picture[..., 0] = 0 if background is None else 1 + background
    return picture


def paint(picture, label, number, rows, columns):
    """A rectangle."""
    picture[slice(*rows), slice(*columns), :2] = (1 + label, number)


def paint_disc(picture, label, number, centre, radius):
    y, x = np.ogrid[: picture.shape[0], : picture.shape[1]]
    picture[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2, :2] = (1 + label, number)


def scene():
    """120 x 150: with tiles of 50 and an overlap of 10, and with other sizes, objects lie in all ways."""
    picture = canvas(120, 150, GRASS)
    paint(picture, SKY, 0, (0, 30), (0, 150))  # stuff over all columns
    paint(picture, SKY, 0, (100, 120), (60, 70))  # and again, apart
    paint(picture, CELL, 1, (5, 15), (5, 15))  # in one tile
    paint_disc(picture, CELL, 2, (15, 45), 9)  # over a vertical seam
    paint_disc(picture, CELL, 3, (45, 20), 8)  # over a horizontal one
    paint_disc(picture, CAR, 1, (45, 45), 12)  # over four tiles
    paint(picture, CELL, 4, (10, 90), (75, 145))  # larger than a tile
    paint(picture, CELL, 5, (90, 110), (75, 105))  # below it, touching: another cell
    paint(picture, CELL, 6, (90, 110), (105, 145))  # and beside that one
    paint(picture, CAR, 7, (60, 64), (0, 70))  # long and thin
    paint(picture, CELL, 8, (70, 95), (38, 48))  # in an overlap
    picture[112:118, 5:55, 0] = 0  # nothing
    return picture
