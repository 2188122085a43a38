"""Geometry of the augmentations, step by step and as a whole; sizes, limits, the category constraint."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mask2former.data.augmentations import (
    LargeScaleJitter,
    ResizeCropColor,
    ResizeShortestEdge,
    crop_size_for,
    is_mixed,
    jitter_offset,
    random_flip,
    scaled_size,
    shortest_edge_size,
)
from mask2former.data.geometry import View, nearest_indices

edges = st.integers(1, 40)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(height, width):
    return np.random.default_rng(5).integers(0, 2**30, (height, width), dtype=np.int32)


@given(edges, edges, st.data())
def test_one_gather_equals_pillow_step_by_step(height, width, data):
    source, image = ids(height, width), noise(height, width)
    view, stepped, pixels = View.of(image), source, image
    for _ in range(data.draw(st.integers(1, 5))):
        step = data.draw(st.sampled_from(["flip_horizontal", "flip_vertical", "resize", "crop"]))
        if step == "flip_horizontal":
            view, stepped, pixels = view.flip_horizontal(), stepped[:, ::-1], pixels[:, ::-1]
        elif step == "flip_vertical":
            view, stepped, pixels = view.flip_vertical(), stepped[::-1], pixels[::-1]
        elif step == "resize":
            h, w = data.draw(edges), data.draw(edges)
            view = view.resize(h, w)
            stepped = np.asarray(Image.fromarray(stepped).resize((w, h), Image.Resampling.NEAREST))
            pixels = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))
        else:
            top, left = (data.draw(st.integers(0, edge - 1)) for edge in view.size)
            h, w = data.draw(edges), data.draw(edges)
            view = view.crop(top, left, h, w)
            stepped, pixels = (a[top : top + h, left : left + w] for a in (stepped, pixels))
    np.testing.assert_array_equal(view.gather(source, fill=-7), stepped)
    np.testing.assert_array_equal(view.image, pixels)
    h, w = data.draw(edges), data.draw(edges)
    padded = view.pad(h, w)
    extra = [(0, max(want - have, 0)) for want, have in zip((h, w), view.size, strict=True)]
    np.testing.assert_array_equal(padded.gather(source, fill=-7), np.pad(stepped, extra, constant_values=-7))
    np.testing.assert_array_equal(padded.image, np.pad(pixels, [*extra, (0, 0)], constant_values=128))


@settings(max_examples=60, deadline=None)
@given(st.tuples(*4 * [st.integers(1, 300)]), st.data())
def test_a_window_is_cut_out_of_the_whole_resize(sizes, data):
    """To the last bit: large windows and small ones, at the edges and inside, when enlarging and when shrinking."""
    height, width, h, w = sizes
    image = noise(height, width, seed=sum(sizes))
    top, left = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    rows, cols = data.draw(st.integers(1, h - top)), data.draw(st.integers(1, w - left))
    whole = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    view = View.of(image).resize(h, w).crop(top, left, rows, cols)
    np.testing.assert_array_equal(view.image, whole[top : top + rows, left : left + cols])
    planes = view.pad(rows + 2, cols + 1).planes("BGR")
    np.testing.assert_array_equal(planes[:, :rows, :cols], view.image.transpose(2, 0, 1)[::-1])
    assert (planes[:, rows:] == 128).all()
    assert (planes[:, :, cols:] == 128).all()


@pytest.mark.parametrize("scale", [0.1, 0.37, 0.99, 1.0, 1.31, 2.0])
def test_a_window_is_cut_out_of_the_whole_resize_of_a_photo(scale):
    """At the sizes of a training."""
    image = noise(480, 640)
    h, w = scaled_size((480, 640), (1024, 1024), scale)
    for fraction in (0.0, 0.3, 1.0):
        top, left = jitter_offset((h, w), 1024, fraction)
        view = View.of(image).resize(h, w).crop(top, left, 1024, 1024)
        whole = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(view.image, whole[top : top + 1024, left : left + 1024])


@settings(max_examples=300)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_nearest_indices_are_pillows_for_other_modes_too(old, new):
    indices = nearest_indices(old, new)
    assert indices.shape == (new,)
    assert indices.min() >= 0
    assert indices.max() < old
    ramp = Image.fromarray((np.arange(old) % 251).astype(np.uint8)[:, None])
    resized = np.asarray(ramp.resize((1, new), Image.Resampling.NEAREST))[:, 0]
    np.testing.assert_array_equal(indices % 251, resized)


def test_steps_leave_the_input_alone():
    image = noise(6, 9)
    before = image.copy()
    LargeScaleJitter(image_size=16, min_scale=0.5, max_scale=2.0)(image, np.random.default_rng(0))
    ResizeCropColor(min_sizes=[8], max_size=20, crop_size=(4, 4))(image, np.random.default_rng(0))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (48, 64), (300, 200)])
def test_jitter_has_a_fixed_size(size):
    jitter = LargeScaleJitter(image_size=64, min_scale=0.1, max_scale=2.0)
    for seed in range(6):
        view = jitter(noise(*size), np.random.default_rng(seed))
        assert view.image.shape == (64, 64, 3)
        assert view.size == (64, 64)
        outside = (view.rows < 0)[:, None] | (view.cols < 0)[None]
        assert (view.image[outside] == 128).all()
        assert not outside.all()


def test_jitter_scales_uniformly():
    jitter = LargeScaleJitter(image_size=100, min_scale=0.1, max_scale=1.0, flip="none")
    rng = np.random.default_rng(0)
    widths = np.array([(jitter(noise(20, 40), rng).cols >= 0).sum() for _ in range(600)])
    assert widths.min() <= 12
    assert widths.max() >= 98
    assert abs(widths.mean() - 55) < 3


def test_scaled_size():
    assert scaled_size((480, 640), (1024, 1024), 1.0) == (768, 1024)
    assert scaled_size((640, 480), (1024, 1024), 0.1) == (102, 77)
    assert scaled_size((5, 10), (5, 5), 1.0) == (2, 5)  # 2.5 goes to the even neighbour
    assert scaled_size((1, 4000), (1024, 1024), 0.1) == (1, 102)


def test_jitter_offset():
    assert jitter_offset((150, 90), 100, 0.5) == (25, 0)
    assert jitter_offset((150, 200), 100, 0.3) == (15, 30)


@pytest.mark.parametrize(
    ("size", "shortest", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 1000), 800, 1333, (533, 1333)),
        ((500, 500), 640, 500, (500, 500)),
        ((1, 1), 800, 1333, (800, 800)),
        ((1, 100000), 800, 1333, (1, 1333)),
        ((100000, 1), 800, 1333, (1333, 1)),
    ],
)
def test_shortest_edge(size, shortest, longest, expected):
    assert shortest_edge_size(size, shortest, longest) == expected
    resize = ResizeShortestEdge(shortest=shortest, longest=longest)
    assert resize.output_size(*size) == expected


def test_resize_for_inference():
    image = noise(30, 50)
    resized = ResizeShortestEdge(shortest=20, longest=100)(image)
    expected = np.asarray(Image.fromarray(image).resize((33, 20), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resized, expected)
    np.testing.assert_array_equal(ResizeShortestEdge(shortest=0, longest=10)(image), image)


def test_resize_choice_and_range():
    image = noise(8, 16)
    plain = {"max_size": 1000, "color_aug": False, "flip": "none"}
    for sampling, sizes, expected in (
        ("choice", [4, 8, 20], {4, 8, 20}),
        ("range", [4, 7], {4, 5, 6, 7}),
        ("choice", [0], {8}),
    ):
        augment = ResizeCropColor(min_sizes=sizes, sampling=sampling, **plain)
        rng = np.random.default_rng(0)
        seen = {augment(image, rng).size for _ in range(60)}
        assert seen == {(edge, 2 * edge) for edge in expected}


@pytest.mark.parametrize(
    ("crop_type", "crop_size", "size", "low", "high"),
    [
        ("absolute", (5, 9), (20, 30), (5, 9), (5, 9)),
        ("absolute", (5, 9), (3, 4), (3, 4), (3, 4)),
        ("absolute_range", (5, 9), (20, 7), (5, 5), (9, 7)),
        ("absolute_range", (5, 9), (3, 4), (3, 4), (3, 4)),
        ("relative", (0.5, 0.25), (20, 30), (10, 8), (10, 8)),
        ("relative", (0.1, 0.1), (1, 2), (1, 1), (1, 1)),
        ("relative_range", (0.5, 0.9), (20, 30), (10, 27), (20, 30)),
    ],
)
def test_crop_sizes(crop_type, crop_size, size, low, high):
    rng = np.random.default_rng(0)
    seen = np.array([crop_size_for(size, crop_type, crop_size, rng) for _ in range(400)])
    assert tuple(seen.min(axis=0)) == low
    assert tuple(seen.max(axis=0)) == high


def test_crops_reach_every_place():
    augment = ResizeCropColor(min_sizes=[0], max_size=9, crop_size=(2, 3), color_aug=False, flip="none")
    rng = np.random.default_rng(0)
    seen = {(v.rows[0], v.cols[0]) for v in (augment(noise(4, 5), rng) for _ in range(300))}
    assert seen == {(y, x) for y in range(3) for x in range(3)}


def test_is_mixed():
    two = np.array([[0, 0, 0, 1]], dtype=np.int32)
    assert not is_mixed(two, 0.75)  # exactly the limit is too much
    assert is_mixed(two, 0.76)
    assert not is_mixed(np.zeros((2, 2), np.int32), 0.75)
    assert not is_mixed(np.full((2, 2), -1, np.int32), 0.75)
    # unlabelled pixels neither count as a category nor for the area
    assert not is_mixed(np.array([[0, -1, -1, -1]], dtype=np.int32), 0.75)
    assert is_mixed(np.array([[0, 1, -1, -1]], dtype=np.int32), 0.75)


def test_category_constraint_avoids_crops_of_one_category():
    """Half of the picture is one category; few places show both well."""
    labels = np.zeros((8, 64), dtype=np.int32)
    labels[:, 32:] = 1
    arguments = {"min_sizes": [0], "max_size": 99, "crop_size": (8, 16), "color_aug": False, "flip": "none"}
    image = noise(8, 64)

    def share_of_mixed(augment, source):
        rng = np.random.default_rng(0)
        views = [augment(image, rng, source) for _ in range(200)]
        return np.mean([is_mixed(view.gather(labels, fill=-1), 0.75) for view in views])

    free = share_of_mixed(ResizeCropColor(**arguments), lambda: labels)
    constrained = ResizeCropColor(**arguments, single_category_max_area=0.75)
    bound = share_of_mixed(constrained, lambda: labels)
    assert 0.05 < free < 0.3
    # Ten tries fail with probability (1 - free) ** 10.
    assert abs(bound - (1 - (1 - free) ** 10)) < 0.1
    assert abs(share_of_mixed(constrained, None) - free) < 0.1


def test_constraint_gives_up_after_ten_tries():
    labels = np.zeros((8, 8), dtype=np.int32)
    augment = ResizeCropColor(min_sizes=[0], max_size=9, crop_size=(4, 4), single_category_max_area=0.5)
    assert augment(noise(8, 8), np.random.default_rng(0), lambda: labels).size == (4, 4)


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_flip_half_of_the_time(flip):
    view = View.of(noise(4, 6))
    rng = np.random.default_rng(0)
    flipped = [random_flip(view, flip, rng) for _ in range(400)]
    horizontal = np.mean([v.cols[0] == 5 for v in flipped])
    vertical = np.mean([v.rows[0] == 3 for v in flipped])
    expected = {"horizontal": (0.5, 0), "vertical": (0, 0.5), "none": (0, 0)}[flip]
    assert abs(horizontal - expected[0]) < 0.1
    assert abs(vertical - expected[1]) < 0.1


def test_augmentations_are_a_function_of_the_generator():
    image = noise(40, 50)
    for augment in (
        LargeScaleJitter(image_size=32, min_scale=0.1, max_scale=2.0),
        ResizeCropColor(min_sizes=[20, 30, 40], max_size=90, crop_size=(16, 16)),
    ):
        first, again = (augment(image, np.random.default_rng(3)) for _ in range(2))
        np.testing.assert_array_equal(first.image, again.image)
        np.testing.assert_array_equal(first.rows, again.rows)
        np.testing.assert_array_equal(first.cols, again.cols)
        others = [augment(image, np.random.default_rng(seed)).image for seed in range(8)]
        assert len({other.tobytes() for other in others}) > 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LargeScaleJitter(image_size=0, min_scale=1, max_scale=1), "image_size must be at least 1"),
        (lambda: LargeScaleJitter(image_size=9, min_scale=0, max_scale=1), "0 < min <= max, got 0, 1"),
        (lambda: LargeScaleJitter(image_size=9, min_scale=2, max_scale=1), "got 2, 1"),
        (lambda: LargeScaleJitter(image_size=9, min_scale=1, max_scale=1, flip="up"), "got 'up'"),
        (lambda: ResizeCropColor(min_sizes=[], max_size=9), "min_sizes must hold"),
        (lambda: ResizeCropColor(min_sizes=[1, 2, 3], max_size=9, sampling="range"), "exactly two"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=9, sampling="all"), "got 'all'"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=0), "max_size must be at least 1"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=9, crop_type="round", crop_size=(1, 1)), "'round'"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=9, crop_size=(0, 1)), "at least 1 when"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=9, crop_type="relative", crop_size=(2, 1)),
         r"\(0, 1\]"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=9, crop_type="absolute_range", crop_size=(3, 2)),
         r"\(lowest, highest\)"),
        (lambda: ResizeCropColor(min_sizes=[1], max_size=9, single_category_max_area=0), r"\(0, 1\], got 0"),
        (lambda: ResizeShortestEdge(shortest=-1, longest=3), "shortest must be >= 0, got -1"),
        (lambda: ResizeShortestEdge(shortest=1, longest=0), "longest must be at least 1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()
