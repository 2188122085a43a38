"""Tiled results are those of the whole picture, where the predictor says the same of both."""

from itertools import pairwise

import numpy as np
import pytest

from mask2former.tiling import segment_large
from mask2former.tiling.grid import TileGrid, spans
from tests.tiling.painted import (
    CAR,
    CATEGORIES,
    CELL,
    GRASS,
    SKY,
    PaintedPredictor,
    canvas,
    paint,
    scene,
)

TILES = [(50, 10), (50, 20), (40, 13), (64, 1), (33, 16), (119, 30), (500, 50), (30, 25)]


def _check_panoptic(result, picture):
    whole = PaintedPredictor()(picture, "panoptic")
    assert result.ids.dtype == np.uint32
    pairs = np.unique(np.stack([result.ids.ravel(), whole.ids.ravel()]), axis=1).T.tolist()
    partner = dict(pairs)
    assert len(pairs) == len(partner) == len(set(partner.values()))  # the same pixels belong together
    assert partner.get(0, 0) == 0
    assert [s.id for s in result.segments] == list(range(1, len(whole.segments) + 1))
    expected = {s.id: s for s in whole.segments}
    for segment in result.segments:
        theirs, inside = expected[partner[segment.id]], np.nonzero(result.ids == segment.id)
        assert (segment.category_id, segment.is_thing, segment.area) == theirs[1:3] + theirs[4:]
        assert segment.name == CATEGORIES[segment.category_id].name
        assert segment.score == pytest.approx(0.9)
        y, x = inside
        assert segment.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def _decoded(instance, size):
    mask_tools = pytest.importorskip("pycocotools.mask")
    return mask_tools.decode({"size": list(size), "counts": instance.counts.encode()}).astype(bool)


def _check_instances(result, picture):
    size = picture.shape[:2]
    whole = PaintedPredictor()(picture, "instance")
    assert result.size == size
    assert result.count == len(result.instances) == len(whole.labels)
    found = {(i.category_id, _decoded(i, size).tobytes()) for i in result.instances}
    assert found == {(label, mask.tobytes()) for label, mask in zip(whole.labels, whole.masks, strict=True)}
    for instance in result.instances:
        y, x = np.nonzero(_decoded(instance, size))
        assert instance.area == len(y)
        assert instance.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)
        assert instance.score == pytest.approx(0.9)


@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_panoptic_equals_the_whole_picture(tile, overlap):
    picture = scene()
    _check_panoptic(segment_large(PaintedPredictor(), picture, tile=tile, overlap=overlap), picture)


@pytest.mark.parametrize(("tile", "overlap"), TILES)
def test_instances_equal_the_whole_picture(tile, overlap):
    picture = scene()
    _check_instances(segment_large(PaintedPredictor(), picture, "instance", tile=tile, overlap=overlap), picture)


@pytest.mark.parametrize(("tile", "overlap"), [*TILES, (50, 0), (1, 0)])
def test_semantic_equals_the_whole_picture(tile, overlap):
    picture = scene()[:40, :60] if tile == 1 else scene()
    result = segment_large(PaintedPredictor(), picture, "semantic", tile=tile, overlap=overlap)
    labels = PaintedPredictor()(picture, "semantic").labels
    assert result.labels.dtype == np.uint8
    assert np.array_equal(result.labels, labels)
    assert result.areas == tuple(np.bincount(labels.ravel(), minlength=4).tolist())
    assert result.names == ("cell", "car", "sky", "grass")


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_without_overlap_parts_are_joined_along_the_seam(task):
    picture = canvas(60, 60, SKY)
    paint(picture, CELL, 1, (5, 55), (10, 20))  # over the horizontal seam
    paint(picture, CELL, 2, (5, 55), (20, 28))  # beside it, touching
    paint(picture, CAR, 3, (20, 50), (28, 40))  # over four tiles
    paint(picture, CELL, 4, (2, 30), (45, 50))  # ends at the seam
    result = segment_large(PaintedPredictor(), picture, task, tile=30, overlap=0)
    (_check_panoptic if task == "panoptic" else _check_instances)(result, picture)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
@pytest.mark.parametrize("cut", range(20, 31))
def test_two_cells_that_touch_at_the_seam_stay_two(task, cut):
    """The tiles are 0..30 and 20..50, so that they meet at 25."""
    picture = canvas(50, 50, GRASS)
    paint(picture, CELL, 1, (5, cut), (10, 40))
    paint(picture, CELL, 2, (cut, 45), (10, 40))
    result = segment_large(PaintedPredictor(), picture, task, tile=30, overlap=10)
    (_check_panoptic if task == "panoptic" else _check_instances)(result, picture)


def test_stuff_is_one_segment_of_a_class_however_far_apart():
    picture = canvas(90, 90)
    paint(picture, SKY, 0, (0, 10), (0, 10))
    paint(picture, SKY, 0, (80, 90), (80, 90))
    result = segment_large(PaintedPredictor(), picture, tile=30, overlap=5)
    assert [(s.category_id, s.area, s.box) for s in result.segments] == [(SKY, 200, (0, 0, 90, 90))]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_picture_of_nothing(task):
    result = segment_large(PaintedPredictor(), canvas(70, 80), task, tile=30, overlap=4)
    if task == "panoptic":
        assert result.segments == ()
        assert not result.ids.any()
    else:
        assert result.instances == ()
        assert result.count == 0


def test_one_pixel():
    picture = canvas(1, 1, GRASS)
    result = segment_large(PaintedPredictor(), picture, tile=30, overlap=4)
    assert result.ids.tolist() == [[1]]


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_scores_are_weighted_by_pixels(task):
    """Two tiles meet at column 25; ten columns of the cell are left of it and thirty right."""
    picture = canvas(10, 60)
    paint(picture, CELL, 1, (2, 8), (15, 55))
    predictor = PaintedPredictor(score=lambda call: (0.5, 0.9)[call])
    result = segment_large(predictor, picture, task, tile=35, overlap=10)
    (found,) = result.segments if task == "panoptic" else result.instances
    assert len(predictor.calls) == 2
    cut = spans(60, 35, 10)[0].own_stop
    left = cut - 15
    assert 0 < left < 40
    assert found.score == pytest.approx((0.5 * left + 0.9 * (40 - left)) / 40)


class _Frayed(PaintedPredictor):
    """Sees nothing in the three outermost rows and columns of a tile."""

    def __call__(self, image, task, **options):
        image = image.copy()
        for edge in (np.s_[:3], np.s_[-3:], np.s_[:, :3], np.s_[:, -3:]):
            image[edge] = 0
        return super().__call__(image, task, **options)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_what_is_wrong_at_the_border_of_a_tile_is_not_seen(task):
    picture = scene()
    picture[[0, 1, 2, -1, -2, -3]] = 0
    picture[:, [0, 1, 2, -1, -2, -3]] = 0
    result = segment_large(_Frayed(), picture, task, tile=50, overlap=20)
    (_check_panoptic if task == "panoptic" else _check_instances)(result, picture)


@pytest.mark.parametrize("task", ["panoptic", "instance"])
@pytest.mark.parametrize(("match_iou", "count"), [(0.6, 1), (0.7, 2)])
def test_parts_need_the_least_overlap(task, match_iou, count):
    """Both tiles look at columns 20 to 30; the left one sees rows 0 to 10 of the cell there, the right one 4 to 10."""

    class Lopsided(PaintedPredictor):
        def __call__(self, image, task, **options):
            image = image.copy()
            if self.calls:
                image[:4] = 0
            return super().__call__(image, task, **options)

    picture = canvas(10, 50)
    paint(picture, CELL, 1, (0, 10), (5, 45))
    result = segment_large(Lopsided(), picture, task, tile=30, overlap=10, match_iou=match_iou)
    assert len(result.segments if task == "panoptic" else result.instances) == count


def test_threshold_is_passed_on_and_otherwise_left_to_the_predictor():
    predictor = PaintedPredictor()
    segment_large(predictor, scene(), tile=80, overlap=10)
    segment_large(predictor, canvas(5, 5), "instance", threshold=0.3)
    assert predictor.thresholds == [None] * 4 + [0.3]


def test_progress():
    seen = []
    segment_large(PaintedPredictor(), scene(), tile=80, overlap=10, progress=lambda *numbers: seen.append(numbers))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "depth"}, "task must be one of panoptic, instance, semantic, got 'depth'"),
        ({"tile": 0}, "tile must be at least 1, got 0"),
        ({"overlap": 1024}, "overlap must be at least 0 and less than tile = 1024, got 1024"),
        ({"overlap": -1}, "overlap must be at least 0 and less than tile = 1024, got -1"),
        ({"threshold": 1.5}, "threshold must be in"),
        ({"match_iou": 0.0}, "match_iou must be above 0 and at most 1, got 0.0"),
        ({"bands": (1, 2)}, "bands must be one or three of 1 to 3, got 1, 2"),
        ({"bands": (1, 2, 4)}, "bands must be one or three of 1 to 3, got 1, 2, 4"),
        ({"value_range": (5, 5)}, "value_range must be two increasing numbers, got 5, 5"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        segment_large(PaintedPredictor(), scene(), **changes)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 3, 1), (0, 4, 3), (4, 4, 0)])
def test_wrong_shapes_are_named(shape):
    with pytest.raises(ValueError, match="the raster must"):
        segment_large(PaintedPredictor(), np.zeros(shape, np.uint8))


def test_pixels_of_other_types_need_a_range():
    picture = scene().astype(np.float32)
    with pytest.raises(ValueError, match="value_range must be given for pixels that are not uint8 or uint16, got floa"):
        segment_large(PaintedPredictor(), picture)
    predictor = PaintedPredictor()
    segment_large(predictor, picture * 10, tile=200, value_range=(0, 2550))
    assert np.array_equal(predictor.calls[0], scene())
    assert predictor.calls[0].dtype == np.uint8


def test_values_out_of_range_are_clipped():
    predictor = PaintedPredictor()
    picture = np.array([[[-5.0, 10, 20], [np.nan, 15, 99]]])
    segment_large(predictor, picture, "semantic", value_range=(10, 20))
    assert predictor.calls[0].tolist() == [[[0, 0, 255], [0, 128, 255]]]


@pytest.mark.parametrize(
    ("bands", "count", "chosen"),
    [(None, 5, [0, 1, 2]), (None, 2, [0]), (None, 1, [0]), ((4, 2, 1), 4, [3, 1, 0]), ((2,), 3, [1])],
)
def test_bands(bands, count, chosen):
    seen = []

    class Recorder(PaintedPredictor):
        def __call__(self, image, task, **options):
            seen.append(image)
            return super().__call__(np.repeat(image[..., :1], 3, axis=2), task, **options)

    picture = np.random.default_rng(0).integers(0, 5, (9, 8, count), np.uint16)
    segment_large(Recorder(), picture, "semantic", bands=bands)
    assert np.array_equal(seen[0], picture[..., chosen])
    assert seen[0].dtype == np.uint16


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [(100, 30, 10), (31, 30, 0), (100, 99, 98), (29, 30, 5), (64, 8, 3)]
)
def test_tiles_cover_an_axis_and_share_what_was_asked_for(size, tile, overlap):
    found = spans(size, tile, overlap)
    assert all(span.stop - span.start == min(tile, size) for span in found)
    assert all(span.start <= span.own_start < span.own_stop <= span.stop for span in found)
    assert [span.own_start for span in found] == [0, *(span.own_stop for span in found[:-1])]
    assert found[-1].own_stop == size
    for first, second in pairwise(found):
        assert first.stop - second.start >= overlap
        assert second.own_start - second.start >= overlap // 2
    fewer = len(found) - 1
    assert fewer == 0 or tile + (fewer - 1) * (tile - overlap) < size


def test_tiles_decide_each_pixel_once():
    grid, decided = TileGrid((47, 61), 20, 7), np.zeros((47, 61), int)
    for tile in grid:
        decided[tile.own.slices] += 1
    assert (decided == 1).all()
    assert len(list(grid)) == len(grid)
