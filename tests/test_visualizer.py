"""The drawing: what it must leave alone, what must differ, and degenerate pictures."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("cv2", reason="the visualizer needs OpenCV")

from mask2former import label_drawing, visualizer
from mask2former.label_drawing import place
from mask2former.visualizer import Visualizer, _shades

CATEGORIES = [
    SimpleNamespace(name="person", color=(220, 20, 60), is_thing=True),
    SimpleNamespace(name="traffic light", color=[40, 90, 200], is_thing=True),
    SimpleNamespace(name="sky", color=(70, 130, 180), is_thing=False),
]


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)


@pytest.fixture
def drawing(picture):
    """A panoptic result with two people side by side, sky and void."""
    ids = np.zeros(picture.shape[:2], np.int32)
    ids[:40] = 3
    ids[50:110, 10:70], ids[50:110, 70:130] = 1, 2
    segments = [
        {"id": 1, "category_id": 0, "score": 0.87},
        SimpleNamespace(id=2, category_id=0, score=0.9),
        SimpleNamespace(id=3, category_id=2),
    ]
    return ids, segments


def as_instances(ids):
    return np.array([0, 0]), np.array([0.87, 0.9]), np.stack([ids == 1, ids == 2])


def draw_all(drawer, picture, drawing):
    ids, segments = drawing
    labels = np.array([255, 0, 0, 2], np.uint8)[ids]
    return [
        drawer.draw_panoptic(picture, ids, segments),
        drawer.draw_instances(picture, *as_instances(ids), boxes=[[10, 50, 70, 110], [70, 50, 130, 110]]),
        drawer.draw_semantic(picture, labels),
    ]


def test_shape_dtype_and_inputs_unchanged(picture, drawing):
    before = picture.copy(), drawing[0].copy()
    picture.flags.writeable = drawing[0].flags.writeable = False
    for result in draw_all(Visualizer(CATEGORIES), picture, drawing):
        assert result.shape == picture.shape and result.dtype == np.uint8
        assert not np.shares_memory(result, picture)
        assert (result != picture).any()
    np.testing.assert_array_equal(picture, before[0])
    np.testing.assert_array_equal(drawing[0], before[1])


def test_drawing_is_deterministic(picture, drawing):
    first = draw_all(Visualizer(CATEGORIES), picture, drawing)
    visualizer._shades.cache_clear()
    label_drawing.text_mask.cache_clear()
    for a, b in zip(first, draw_all(Visualizer(CATEGORIES), picture, drawing), strict=True):
        np.testing.assert_array_equal(a, b)


def test_background_is_untouched_and_segments_are_not(picture, drawing):
    ids = drawing[0]
    panoptic, _, semantic = draw_all(Visualizer(CATEGORIES, label_scale=0), picture, drawing)
    instances = Visualizer(CATEGORIES, label_scale=0).draw_instances(picture, *as_instances(ids))
    for result, painted in [(panoptic, ids > 0), (semantic, ids > 0), (instances, (ids == 1) | (ids == 2))]:
        np.testing.assert_array_equal(result[~painted], picture[~painted])
        assert (result != picture).any(-1)[painted].mean() > 0.95


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_fill_is_the_blend_of_picture_and_colour(picture, alpha):
    ids = np.zeros(picture.shape[:2], np.int64)
    ids[20:100, 20:100] = 7
    drawer = Visualizer(CATEGORIES, alpha=alpha, label_scale=0)
    result = drawer.draw_panoptic(picture, ids, [{"id": 7, "category_id": 0}])
    inside = np.s_[25:95, 25:95]
    expected = picture[inside] * (1 - alpha) + np.array([220, 20, 60]) * alpha
    assert np.abs(result[inside] - expected).max() <= 1


def test_border_stands_out_on_every_side(picture):
    grey = np.full_like(picture, 90)
    mask = np.zeros((1, *grey.shape[:2]), bool)
    mask[0, 20:60, 30:90] = True
    drawer = Visualizer(CATEGORIES, label_scale=0)
    result = drawer.draw_instances(grey, [0], None, mask).astype(int)
    edges = [result[20, 31:89], result[59, 31:89], result[21:59, 30], result[21:59, 89]]
    fill = result[40, 60]
    for edge in edges:
        assert (edge == edge[0]).all() and np.abs(edge[0] - fill).sum() > 60
    panoptic = drawer.draw_panoptic(grey, mask[0].astype(int), [{"id": 1, "category_id": 0}])
    np.testing.assert_array_equal(panoptic, result)


def test_neighbours_of_one_category_differ(picture, drawing):
    grey = np.full_like(picture, 128)
    drawer = Visualizer(CATEGORIES, label_scale=0)
    ids, segments = drawing
    results = [drawer.draw_panoptic(grey, ids, segments), drawer.draw_instances(grey, *as_instances(ids))]
    for result in results:
        left, right = result[80, 40].astype(int), result[80, 100].astype(int)
        assert np.abs(left - right).sum() > 30


@pytest.mark.parametrize("color", [(220, 20, 60), (0, 0, 0), (255, 255, 255), (128, 128, 128), (0, 0, 70)])
def test_shades_start_with_the_colour_and_all_differ(color):
    shades = _shades(color)
    assert shades[0] == color and len(set(shades)) == len(shades) >= 10
    steps = np.abs(np.diff(np.array(shades[:10]), axis=0)).sum(1)
    assert steps.min() > 20


def test_more_instances_than_shades_and_more_than_a_byte():
    ids = np.arange(1, 401).reshape(20, 20)
    segments = [{"id": i, "category_id": 0} for i in range(1, 401)]
    picture = np.zeros((20, 20, 3), np.uint8)
    assert Visualizer(CATEGORIES).draw_panoptic(picture, ids, segments).any()


def test_tracked_segments_keep_their_shade_and_show_their_id(picture):
    grey = np.full_like(picture, 128)
    ids = np.zeros(picture.shape[:2], int)
    ids[10:50, 10:70], ids[60:110, 10:70], ids[10:110, 90:150] = 7, 4, 9
    people = [{"id": 4, "category_id": 0, "score": 0.9}, {"id": 7, "category_id": 0, "score": 0.5}]
    sky = [{"id": 9, "category_id": 2, "score": 0.7}]
    plain = Visualizer(CATEGORIES, label_scale=0)
    both = plain.draw_panoptic(grey, ids, people + sky, tracked=True)
    alone = plain.draw_panoptic(grey, np.where(ids == 7, 7, 0), people[1:], tracked=True)
    np.testing.assert_array_equal(both[10:50, 10:70], alone[10:50, 10:70])
    assert (both[30, 40] != both[80, 40]).any()
    shade = np.array(_shades((220, 20, 60))[6]), np.array((70, 130, 180))  # the seventh for id 7; stuff has the first
    for point, color in zip((both[30, 40], both[60, 120]), shade, strict=True):
        assert np.abs(point - (color + 128) / 2).max() <= 1
    drawn = Visualizer(CATEGORIES).draw_panoptic(grey, ids, people + sky, tracked=True)
    for person in people:
        person["score"] = 0.1
    again = Visualizer(CATEGORIES).draw_panoptic(grey, ids, people + sky, tracked=True)
    np.testing.assert_array_equal(drawn, again)  # the score is not in the label
    assert (drawn != both).any()


def test_a_single_category_gets_all_hues_and_no_labels(picture):
    ids = np.arange(1, 7)[None].repeat(120, 0).repeat(27, 1)[:, :160]
    segments = [{"id": i, "category_id": 0, "score": 0.9} for i in range(1, 7)]
    grey = np.full_like(picture, 128)
    drawn = Visualizer(CATEGORIES[:1]).draw_panoptic(grey, ids, segments)
    np.testing.assert_array_equal(drawn, Visualizer(CATEGORIES[:1], label_scale=0).draw_panoptic(grey, ids, segments))
    strongest = {int(drawn[60, x].argmax()) for x in range(13, 160, 27)}
    assert strongest == {0, 1, 2}  # red, green and blue ones
    labelled = Visualizer(CATEGORIES[:1], label_scale=1).draw_panoptic(grey, ids, segments)
    assert (labelled != drawn).any()


def test_small_instance_lies_on_top_whatever_the_order(picture):
    grey = np.full_like(picture, 128)
    masks = np.zeros((2, *grey.shape[:2]), bool)
    masks[0, 10:110, 10:150], masks[1, 50:70, 60:100] = True, True
    drawer = Visualizer(CATEGORIES, label_scale=0)
    small_last = drawer.draw_instances(grey, [0, 1], [0.5, 0.6], masks)
    small_first = drawer.draw_instances(grey, [1, 0], [0.6, 0.5], masks[::-1])
    np.testing.assert_array_equal(small_last, small_first)
    alone = drawer.draw_instances(grey, [1], [0.6], masks[1:])
    np.testing.assert_array_equal(small_last[50:70, 60:100], alone[50:70, 60:100])


def test_label_is_inside_its_segment_when_there_is_room(picture, drawing):
    grey = np.full_like(picture, 128)
    ids, segments = drawing
    with_labels = Visualizer(CATEGORIES).draw_panoptic(grey, ids * (ids == 3), segments[2:])
    without = Visualizer(CATEGORIES, label_scale=0).draw_panoptic(grey, ids * (ids == 3), segments[2:])
    changed = (with_labels != without).any(-1)
    assert changed.any() and not changed[ids != 3].any()


def test_labels_do_not_overlap_and_stay_in_the_picture():
    shape, placed, found = (200, 300), [], 0
    rng = np.random.default_rng(0)
    for _ in range(60):
        mask = np.zeros(shape, np.uint8)
        y, x = int(rng.integers(0, 190)), int(rng.integers(0, 290))
        mask[y : y + int(rng.integers(1, 90)), x : x + int(rng.integers(1, 120))] = 1
        label = place(mask, 1, "person 87%", 9.0, shape, placed)
        if label is None:
            continue
        found += 1
        x0, y0, ink = label
        height, width = ink.shape
        assert 0 <= x0 <= shape[1] - width and 0 <= y0 <= shape[0] - height
        for left, top, w, h in placed:
            assert x0 >= left + w or x0 + width <= left or y0 >= top + h or y0 + height <= top
        placed.append((x0, y0, width, height))
    assert 5 <= found < 60


def test_label_goes_to_the_largest_part():
    mask = np.zeros((100, 300), np.uint8)
    mask[10:30, 5:60] = 1
    mask[40:90, 150:290] = 1
    x, y, ink = place(mask, 1, "sky", 10.0, mask.shape, [])
    assert x >= 150 and y >= 40 and x + ink.shape[1] <= 290 and y + ink.shape[0] <= 90


def test_tiny_segment_gets_no_label(picture):
    ids = np.zeros(picture.shape[:2], int)
    ids[60:62, 80:82] = 1
    result = Visualizer(CATEGORIES).draw_panoptic(picture, ids, [{"id": 1, "category_id": 0, "score": 0.9}])
    assert (result != picture).any(-1).sum() <= 4


def test_score_changes_the_label_of_things_only(picture, drawing):
    ids = np.ones(picture.shape[:2], int)
    for category, differ in ((0, True), (2, False)):
        drawn = [
            Visualizer(CATEGORIES).draw_panoptic(
                picture, ids, [{"id": 1, "category_id": category, "score": score}]
            )
            for score in (0.2, 0.9)
        ]
        assert (drawn[0] != drawn[1]).any() == differ


def test_empty_results_return_a_copy(picture):
    drawer, (height, width) = Visualizer(CATEGORIES), picture.shape[:2]
    results = [
        drawer.draw_panoptic(picture, np.zeros((height, width), int), []),
        drawer.draw_instances(picture, [], [], np.zeros((0, height, width), bool), np.zeros((0, 4))),
        drawer.draw_instances(picture, [], None, np.zeros((0, height, width), bool), []),
        drawer.draw_instances(picture, [1], [0.5], np.zeros((1, height, width), bool)),
        drawer.draw_semantic(picture, np.full((height, width), 255)),
    ]
    for result in results:
        np.testing.assert_array_equal(result, picture)
        assert not np.shares_memory(result, picture)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (20, 2000), (2, 2)])
def test_odd_shapes(shape):
    picture = np.full((*shape, 3), 128, np.uint8)
    ids = np.ones(shape, np.uint8)
    drawer = Visualizer(CATEGORIES)
    results = [
        drawer.draw_panoptic(picture, ids, [{"id": 1, "category_id": 0, "score": 1.0}]),
        drawer.draw_instances(picture, [0], [1.0], ids[None] == 1, [[0, 0, shape[1], shape[0]]]),
        drawer.draw_semantic(picture, ids),
    ]
    for result in results:
        assert result.shape == picture.shape and (result != picture).any(-1).all()


def test_a_long_picture_is_labelled():
    picture, ids = np.full((20, 2000, 3), 128, np.uint8), np.ones((20, 2000), int)
    segments = [{"id": 1, "category_id": 0}]
    plain = Visualizer(CATEGORIES, label_scale=0).draw_panoptic(picture, ids, segments)
    labelled = Visualizer(CATEGORIES).draw_panoptic(picture, ids, segments)
    changed = (labelled != plain).any(-1)
    assert 20 < changed.any(0).sum() < 200


def test_views_and_odd_dtypes_are_accepted(picture, drawing):
    ids, segments = drawing
    drawer = Visualizer(CATEGORIES)
    expected = drawer.draw_panoptic(picture[:, ::-1].copy(), ids[:, ::-1].copy(), segments)
    got = drawer.draw_panoptic(picture[:, ::-1], ids[:, ::-1].astype(np.uint64), segments)
    np.testing.assert_array_equal(got, expected)
    labels = np.where(ids > 0, 0, -1)
    unpainted = drawer.draw_semantic(picture, labels, ignore_label=-1)
    np.testing.assert_array_equal(unpainted[labels < 0], picture[labels < 0])
    drawer.draw_semantic(picture, np.zeros(ids.shape, np.uint8), ignore_label=-1)


def test_frames_are_clipped_to_the_picture(picture):
    mask = np.zeros((1, *picture.shape[:2]), bool)
    drawer = Visualizer(CATEGORIES)
    result = drawer.draw_instances(picture, [0], [0.5], mask, [[-50, -50, 1000, 1000]])
    changed = (result != picture).any(-1)
    assert changed[0].any() and changed[-1].any() and not changed[5:-5, 5:-5].any()


H, W = 120, 160
MASKS = np.zeros((1, H, W), bool)


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("draw_semantic", (np.zeros((H, W), np.uint8), MASKS[0]), ValueError, "image.*grey"),
        ("draw_semantic", (np.zeros((H, W, 1), np.uint8), MASKS[0]), ValueError, "image.*grey"),
        ("draw_semantic", (np.zeros((H, W, 4), np.uint8), MASKS[0]), ValueError, r"image.*\(120, 160, 4\)"),
        ("draw_semantic", (np.zeros((0, W, 3), np.uint8), MASKS[0]), ValueError, "image.*one pixel"),
        ("draw_semantic", (np.zeros((H, W, 3)), MASKS[0]), TypeError, "image.*float64"),
        ("draw_semantic", ([[1]], MASKS[0]), TypeError, "image.*list"),
        ("draw_semantic", (None, np.full((H, W), 3)), ValueError, r"label_map.*\[0, 3\), got 3"),
        ("draw_semantic", (None, np.full((H, W), -1)), ValueError, "label_map.*got -1"),
        ("draw_semantic", (None, np.zeros((H, W))), TypeError, "label_map.*float64"),
        ("draw_semantic", (None, np.zeros((W, H), int)), ValueError, r"label_map.*\(160, 120\)"),
        ("draw_panoptic", (None, np.full((H, W), 5), []), ValueError, r"ids: segments.*\[5\]"),
        ("draw_panoptic", (None, np.full((H, W), -1), []), ValueError, "ids.*-1"),
        ("draw_panoptic", (None, np.full((H, W), 2**24), []), ValueError, "ids.*16777216"),
        (
            "draw_panoptic",
            (None, np.zeros((H, W), int), [{"id": 1, "category_id": 0}] * 2),
            ValueError,
            "1 twice",
        ),
        ("draw_panoptic", (None, np.zeros((H, W), int), [{"id": 0, "category_id": 0}]), ValueError, "got 0"),
        (
            "draw_panoptic",
            (None, np.zeros((H, W), int), [{"id": 1, "category_id": 3}]),
            ValueError,
            r"segments.*\[0, 3\), got 3",
        ),
        ("draw_instances", (None, [3], [0.5], MASKS), ValueError, r"labels.*\[0, 3\), got 3"),
        ("draw_instances", (None, [0, 1], [0.5], MASKS), ValueError, r"labels.*\(1,\).*\(2,\)"),
        ("draw_instances", (None, [0.5], [0.5], MASKS), TypeError, "labels.*float64"),
        ("draw_instances", (None, [0], [0.5, 1], MASKS), ValueError, r"scores.*\(1,\).*\(2,\)"),
        ("draw_instances", (None, [0], [np.nan], MASKS), ValueError, "scores.*nan"),
        ("draw_instances", (None, [0], [0.5], MASKS * 1.0), TypeError, "masks.*float64"),
        ("draw_instances", (None, [0], [0.5], MASKS[0]), ValueError, r"masks.*\(120, 160\)"),
        ("draw_instances", (None, [0], [0.5], MASKS[:, 1:]), ValueError, r"masks.*\(1, 119, 160\)"),
        ("draw_instances", (None, [0], [0.5], MASKS, [[1, 2, 3]]), ValueError, r"boxes.*\(1, 4\)"),
    ],
)
def test_wrong_input_is_named(picture, method, arguments, error, message):
    image = picture if arguments[0] is None else arguments[0]
    with pytest.raises(error, match=message):
        getattr(Visualizer(CATEGORIES), method)(image, *arguments[1:])


@pytest.mark.parametrize(
    ("categories", "options", "message"),
    [
        ([], {}, "categories"),
        ([SimpleNamespace(name="a", color=(0, 0, 256), is_thing=True)], {}, r"categories\[0\]\.color.*256"),
        ([SimpleNamespace(name="a", color=(0, 0), is_thing=True)], {}, r"categories\[0\]\.color"),
        (CATEGORIES, {"alpha": 1.5}, r"alpha.*1\.5"),
        (CATEGORIES, {"label_scale": -1}, "label_scale.*-1"),
        (CATEGORIES, {"label_scale": float("nan")}, "label_scale.*nan"),
    ],
)
def test_wrong_construction_is_refused(categories, options, message):
    with pytest.raises(ValueError, match=message):
        Visualizer(categories, **options)
