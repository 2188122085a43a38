"""Annotations to masks: the same object from every source, void, crowds, errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mask2former.data.geometry import View
from mask2former.data.segmentations import patch_from_segmentation
from mask2former.data.targets import (
    mask_from_bitmap,
    mask_from_polygons,
    mask_from_rle,
    mask_from_segmentation,
    object_masks,
    panoptic_ids,
    panoptic_segments,
    semantic_segments,
    stacked,
)

SQUARE = [[1, 1, 4, 1, 4, 3, 1, 3]]


def plain_view(height, width):
    return View.of(np.zeros((height, width, 3), np.uint8))


def counts_of(mask):
    """Run lengths in column order, by a loop."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if bool(pixel) == value:
            runs[-1] += 1
        else:
            runs.append(1)
            value = not value
    return runs


def rle_or_bitmap(mask):
    return mask, {"size": list(mask.shape), "counts": counts_of(mask)}


bitmaps = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


@given(bitmaps)
def test_rle_of_both_kinds_gives_the_bitmap_back(bitmap):
    coco_mask = pytest.importorskip("pycocotools.mask")
    height, width = bitmap.shape
    compressed = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    as_text = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    uncompressed = {"size": [height, width], "counts": counts_of(bitmap)}
    for segmentation in (compressed, as_text, uncompressed, bitmap, bitmap * 7.0):
        mask = mask_from_segmentation(segmentation, height, width)
        assert mask.dtype == np.bool_
        np.testing.assert_array_equal(mask, bitmap)


def test_polygons():
    pytest.importorskip("pycocotools")
    expected = np.zeros((5, 6), dtype=bool)
    expected[1:3, 1:4] = True
    np.testing.assert_array_equal(mask_from_polygons(SQUARE, 5, 6), expected)
    expected[4, 5] = True
    two = [*SQUARE, [5, 4, 6, 4, 6, 5, 5, 5]]
    np.testing.assert_array_equal(mask_from_polygons(two, 5, 6), expected)


def test_polygons_without_area():
    """Four numbers would be a box for pycocotools; they are two points here."""
    for polygons in ([], [[1, 1, 3, 3]], [[1, 1]], [[]]):
        assert not mask_from_polygons(polygons, 5, 6).any()


@pytest.mark.parametrize("polygon", [[1, 1, 2, 2, 3], [[1, 1], [2, 2], [3, 3]], [1, 1, 2, 2, np.nan, 3]])
def test_malformed_polygons(polygon):
    with pytest.raises(ValueError, match="even number of finite coordinates"):
        mask_from_polygons([polygon], 5, 6)


def test_wrong_sizes():
    with pytest.raises(ValueError, match=r"RLE size \(6, 5\) differs from .*\(5, 6\)"):
        mask_from_rle({"size": [6, 5], "counts": [30]}, 5, 6)
    with pytest.raises(ValueError, match="add up to 30 pixels, got 29"):
        mask_from_rle({"size": [5, 6], "counts": [9, 20]}, 5, 6)
    with pytest.raises(ValueError, match="add up to 30 pixels"):
        mask_from_rle({"size": [5, 6], "counts": [31, -1]}, 5, 6)
    for damaged in ("", "0", "zz", "PP`0", b"\xff\xfe", "\u00e9", "T1", "P", "`" * 9 + "0"):
        with pytest.raises(ValueError, match="RLE counts"):
            mask_from_rle({"size": [5, 6], "counts": damaged}, 5, 6)
    for key in ("size", "counts"):
        rle = {"size": [5, 6], "counts": [30]}
        del rle[key]
        with pytest.raises(ValueError, match=f"an RLE needs 'size' and 'counts', it lacks '{key}'"):
            mask_from_rle(rle, 5, 6)
    with pytest.raises(ValueError, match=r"bitmap shape \(6, 5\)"):
        mask_from_bitmap(np.zeros((6, 5)), 5, 6)
    for odd in ("ab", 3, None):
        with pytest.raises(ValueError, match="list of polygons, an RLE dict or an array"):
            mask_from_segmentation(odd, 5, 6)


def test_object_masks_leave_crowds_out():
    bitmap = np.eye(3, dtype=bool)
    annotations = [
        {"category_id": 1, "iscrowd": 1, "segmentation": bitmap},
        {"category_id": 99, "iscrowd": 1},
        {"category_id": 2, "iscrowd": 0, "segmentation": bitmap},
        {"category_id": 0, "segmentation": ~bitmap},
    ]
    objects = object_masks(annotations, 3, 3, 3, "a.jpg").target(plain_view(3, 3))
    assert objects.labels.tolist() == [2, 0]
    np.testing.assert_array_equal(objects.masks.numpy(), [bitmap, ~bitmap])
    target = object_masks([], 4, 5, 3, "a.jpg").target(plain_view(4, 5))
    assert target.labels.shape == (0,)
    assert target.masks.shape == (0, 4, 5)


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ({"category_id": 3, "segmentation": []}, r"a.jpg: annotation 0: category id 3 is outside \[0, 3\)"),
        ({"category_id": -1, "segmentation": []}, "category id -1"),
        ({"category_id": 1}, "a.jpg: annotation 0 has no segmentation"),
        ({"category_id": 1, "segmentation": {"size": [1, 1], "counts": [1]}}, "annotation 0: RLE size"),
    ],
)
def test_object_masks_errors_name_the_file(annotation, message):
    with pytest.raises(ValueError, match=message):
        object_masks([annotation], 3, 3, 3, "a.jpg")


def test_panoptic_ids_are_base_256():
    colors = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[255, 255, 255], [0, 0, 0], [7, 2, 3]]], np.uint8)
    assert panoptic_ids(colors).tolist() == [[1, 256, 65536], [16777215, 0, 7 + 512 + 3 * 65536]]


def segments(*rows):
    return [{"id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd in rows]


def test_panoptic_void_crowd_and_absent_segments():
    ids = np.array([[0, 9, 9, 300], [0, 9, 5, 300], [77, 77, 5, 5]])
    info = segments((300, 1, 0), (5, 2, 1), (9, 0, 0), (8, 3, 0))
    found = panoptic_segments(ids, info, 4, "p.png")
    target = found.target(plain_view(3, 4))
    assert target.labels.tolist() == [1, 0]
    assert target.labels.dtype == torch.int64
    assert target.masks.dtype == torch.bool
    np.testing.assert_array_equal(target.masks.numpy(), [ids == 300, ids == 9])
    # 0 and the unlisted id 77 are void; the crowd has a category.
    np.testing.assert_array_equal(found.label_map(-1), [[-1, 0, 0, 1], [-1, 0, 2, 1], [-1, -1, 2, 2]])


def test_panoptic_without_segments():
    for info in ([], segments((5, 1, 1))):
        target = panoptic_segments(np.full((2, 3), 5), info, 4, "p.png").target(plain_view(2, 3))
        assert target.labels.shape == (0,)
        assert target.masks.shape == (0, 2, 3)
        assert target.masks.dtype == torch.bool


def test_panoptic_errors():
    ids = np.zeros((2, 2), int)
    with pytest.raises(ValueError, match=r"p.png: segment 6: category id 4 is outside \[0, 4\)"):
        panoptic_segments(ids, segments((6, 4, 0)), 4, "p.png")
    with pytest.raises(ValueError, match=r"p.png: segments_info lists segment 6 twice"):
        panoptic_segments(ids, segments((6, 1, 0), (3, 1, 0), (6, 2, 0)), 4, "p.png")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("ignore", [255, 65535, 5, -1])
def test_semantic(dtype, ignore):
    num_classes = 300 if ignore == 65535 and dtype != np.uint8 else 5
    high = num_classes - 1
    if (ignore < 0 and np.dtype(dtype).kind == "u") or ignore > np.iinfo(dtype).max:
        label_map = np.array([[0, 0, high], [2, 2, high]], dtype=dtype)
    else:
        label_map = np.array([[0, ignore, high], [2, ignore, high]], dtype=dtype)
    found = semantic_segments(label_map, ignore, num_classes, "s.png")
    target = found.target(plain_view(2, 3))
    assert target.labels.tolist() == [0, 2, high]
    np.testing.assert_array_equal(target.masks.numpy(), [label_map == k for k in (0, 2, high)])
    np.testing.assert_array_equal(found.label_map(ignore), label_map)


def test_semantic_of_ignored_pixels_alone():
    for ignore in (255, 65535):
        label_map = np.full((2, 3), ignore, dtype=np.uint16)
        target = semantic_segments(label_map, ignore, 150, "s.png").target(plain_view(2, 3))
        assert target.masks.shape == (0, 2, 3)


def test_semantic_256_classes_in_8_bits():
    label_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
    target = semantic_segments(label_map, 65535, 256, "s.png").target(plain_view(16, 16))
    assert target.labels.tolist() == list(range(256))
    assert (target.masks.sum(dim=(1, 2)) == 1).all()


def test_semantic_errors():
    for value in (5, 254, -2):
        label_map = np.array([[0, value]], dtype=np.int32)
        with pytest.raises(ValueError, match=rf"s.png: category id {value} is outside \[0, 5\)"):
            semantic_segments(label_map, 255, 5, "s.png")


@given(bitmaps)
def test_patches_hold_the_object_and_no_more(bitmap):
    """Whatever the runs of the RLE: several in a column, over the end of a column, of length 0."""
    height, width = bitmap.shape
    for segmentation in rle_or_bitmap(bitmap):
        patch = patch_from_segmentation(segmentation, height, width)
        whole = np.zeros_like(bitmap)
        whole[patch.place] = patch.pixels
        np.testing.assert_array_equal(whole, bitmap)
        if isinstance(segmentation, np.ndarray) and bitmap.any():
            assert patch.pixels[0].any() and patch.pixels[-1].any()
            assert patch.pixels[:, 0].any() and patch.pixels[:, -1].any()


@given(st.lists(st.lists(st.floats(-3, 14), min_size=3, max_size=5).map(lambda xs: xs + xs[::-1]), max_size=3))
def test_patches_of_polygons_are_their_masks(polygons):
    """Of any polygons, also without area and over the edges."""
    pytest.importorskip("pycocotools")
    patch = patch_from_segmentation(polygons, 9, 11)
    whole = np.zeros((9, 11), dtype=bool)
    whole[patch.place] = patch.pixels
    np.testing.assert_array_equal(whole, mask_from_polygons(polygons, 9, 11))


def test_runs_of_length_0():
    expected = np.isin(np.arange(20), range(6, 11)).reshape(5, 4).T
    for counts in ([6, 5, 9], [0, 0, 6, 5, 9, 0], [6, 2, 0, 3, 9, 0, 0], [2, 0, 4, 5, 4, 0, 5]):
        patch = patch_from_segmentation({"size": [4, 5], "counts": counts}, 4, 5)
        whole = np.zeros_like(expected)
        whole[patch.place] = patch.pixels
        np.testing.assert_array_equal(whole, expected)
        assert patch.left == 1
    empty = patch_from_segmentation({"size": [4, 5], "counts": [3, 0, 17]}, 4, 5)
    assert empty.pixels.size == 0


def test_more_objects_than_a_map_has_values():
    """600 objects: 300 side by side, the same again on top."""
    column = np.zeros((1, 300), dtype=bool)
    masks = [column.copy() for _ in range(600)]
    for number, mask in enumerate(masks):
        mask[0, number % 300] = True
    patches = [patch_from_segmentation(mask, 1, 300) for mask in masks]
    target = stacked(list(range(600)), patches, 1, 300).target(plain_view(1, 300))
    assert len(target.maps) == 3  # 255, 255 and 90 objects
    assert target.labels.tolist() == list(range(600))
    np.testing.assert_array_equal(target.masks.numpy(), masks)


def test_objects_share_a_map_where_they_can():
    first = np.zeros((4, 6), dtype=bool)
    first[:, :3] = True
    second, both = ~first, np.ones_like(first)
    patches = [patch_from_segmentation(mask, 4, 6) for mask in (first, second, both, first)]
    maps = stacked([0, 1, 2, 3], patches, 4, 6)
    target = maps.target(plain_view(4, 6))
    assert target.objects[:, 1].tolist() == [0, 0, 1, 2]
    np.testing.assert_array_equal(target.masks.numpy(), [first, second, both, first])
    # maps that a view does not show do not come along
    corner = maps.target(plain_view(4, 6).crop(0, 4, 2, 2))
    assert corner.labels.tolist() == [1, 2]
    assert corner.objects[:, 1].tolist() == [0, 1]
    assert corner.maps.shape == (2, 2, 2)


@given(hnp.arrays(np.bool_, (3, 5, 7)), st.data())
def test_objects_in_a_view_are_gathered_pixel_by_pixel(masks, data):
    """Label maps of patches against a naive loop; objects that do not show lose their label too."""

    def ends():
        return data.draw(st.integers(1, 9))

    view = plain_view(5, 7).resize(ends(), ends())
    if data.draw(st.booleans()):
        view = view.flip_horizontal()
    top, left = (data.draw(st.integers(0, edge - 1)) for edge in view.size)
    view = view.crop(top, left, ends(), ends()).pad(ends(), ends())
    expected = np.zeros((3, *view.size), dtype=bool)
    for y, row in enumerate(view.rows):
        for x, col in enumerate(view.cols):
            if row >= 0 and col >= 0:
                expected[:, y, x] = masks[:, row, col]
    patches = [patch_from_segmentation(data.draw(st.sampled_from(rle_or_bitmap(mask))), 5, 7) for mask in masks]
    target = stacked([4, 5, 6], patches, 5, 7).target(view)
    kept = expected.any(axis=(1, 2))
    np.testing.assert_array_equal(target.masks.numpy(), expected[kept])
    assert target.labels.tolist() == np.array([4, 5, 6])[kept].tolist()
