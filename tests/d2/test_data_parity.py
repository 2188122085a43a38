"""The core's augmentations against Detectron2's transforms, with the same parameters drawn."""

import json

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="compares with Detectron2, which is not installed")

from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json
from detectron2.projects.point_rend import ColorAugSSDTransform
from detectron2.projects.point_rend import color_augmentation as d2_color
from fvcore.transforms import transform as fv

from mask2former.data import ResizeShortestEdge, catalog, color, filter_empty, read_image
from mask2former.data.augmentations import (
    crop_size_for,
    is_mixed,
    jitter_offset,
    scaled_size,
    shortest_edge_size,
)
from mask2former.data.geometry import View

SIZES = [(48, 64), (64, 48), (33, 101), (1, 1), (7, 300), (300, 7)]


def scene(height, width):
    """An image and an 8-bit map; Detectron2 resizes 8-bit maps with Pillow, as we do all maps."""
    rng = np.random.default_rng(height * 1000 + width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 200, (height, width), dtype=np.uint8)


def follow(view, transform):
    """Makes the steps that Detectron2 has drawn."""
    for step in transform.transforms if isinstance(transform, fv.TransformList) else [transform]:
        if isinstance(step, fv.HFlipTransform):
            view = view.flip_horizontal()
        elif isinstance(step, fv.VFlipTransform):
            view = view.flip_vertical()
        elif isinstance(step, T.ResizeTransform):
            view = view.resize(step.new_h, step.new_w)
        elif isinstance(step, fv.CropTransform):
            view = view.crop(step.y0, step.x0, step.h, step.w)
        elif isinstance(step, fv.PadTransform):
            view = view.pad(view.size[0] + step.y1, view.size[1] + step.x1)
        else:
            assert isinstance(step, fv.NoOpTransform)
    return view


def assert_same(augmentations, height, width, seed):
    image, label_map = scene(height, width)
    np.random.seed(seed)  # noqa: NPY002 (Detectron2 draws from the global generator)
    augmented = T.AugInput(image, sem_seg=label_map)
    transform = T.AugmentationList(augmentations)(augmented)
    view = follow(View.of(image), transform)
    np.testing.assert_array_equal(view.image, augmented.image)
    np.testing.assert_array_equal(view.gather(label_map, fill=255), augmented.sem_seg)
    return view, transform


@pytest.mark.parametrize("size", SIZES)
def test_large_scale_jitter(size):
    for seed in range(8):
        low = 0.1 if min(size) > 10 else 1.9  # Detectron2 fails when an edge is rounded to zero
        steps = [T.RandomFlip(), T.ResizeScale(low, 2.0, 160, 160), T.FixedSizeCrop((160, 160))]
        view, _ = assert_same(steps, *size, seed)
        assert view.size == (160, 160)


@pytest.mark.parametrize("size", SIZES)
def test_resize_crop_flip(size):
    for seed in range(8):
        assert_same(
            [
                T.ResizeShortestEdge([20, 40, 80], 2000, "choice"),
                T.RandomCrop_CategoryAreaConstraint("absolute", (32, 24), 0.75, 255),
                T.RandomFlip(horizontal=False, vertical=True),
            ],
            *size,
            seed,
        )


def test_scaled_size_and_offset():
    rng = np.random.default_rng(0)
    for _ in range(500):
        size = tuple(int(edge) for edge in rng.integers(20, 900, 2))
        target, scale, fraction = int(rng.integers(16, 1200)), rng.uniform(0.1, 2.0), rng.uniform()
        image = np.zeros((*size, 3), np.uint8)
        resize = T.ResizeScale(0.1, 2.0, target, target)._get_resize(image, scale)
        assert scaled_size(size, (target, target), scale) == (max(resize.new_h, 1), max(resize.new_w, 1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np.random, "uniform", lambda *_, value=fraction: value)
            crop = T.FixedSizeCrop((target, target))._get_crop(image)
        assert jitter_offset(size, target, fraction) == (crop.y0, crop.x0)


def test_shortest_edge_size():
    rng = np.random.default_rng(0)
    for height, width, shortest, longest in rng.integers(1, 3000, (2000, 4)).tolist():
        expected = T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
        assert shortest_edge_size((height, width), shortest, longest) == tuple(max(e, 1) for e in expected)


def test_resize_for_inference():
    image, _ = scene(48, 64)
    expected = T.ResizeShortestEdge([80, 80], 100).get_transform(image).apply_image(image)
    np.testing.assert_array_equal(ResizeShortestEdge(shortest=80, longest=100)(image), expected)


class Replay:
    """Gives the same numbers to both sides: a stand-in for numpy's global functions and for a generator."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.integers_given = []

    def rand(self, count):
        return self.rng.random(count)

    random = rand

    def randint(self, low, high=None):
        self.integers_given.append(self.rng.integers(low, high))
        return self.integers_given[-1]

    integers = randint


@pytest.mark.parametrize(
    ("crop_type", "crop_size"),
    [
        ("absolute", (5, 90)), ("absolute_range", (5, 90)),
        ("relative", (0.31, 0.9)), ("relative_range", (0.3, 0.6)),
    ],
)  # fmt: skip
def test_crop_sizes(monkeypatch, crop_type, crop_size):
    for seed in range(100):
        size = tuple(int(edge) for edge in np.random.default_rng(seed).integers(4, 200, 2))
        theirs, ours = Replay(seed), Replay(seed)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "rand", theirs.rand)
            patch.setattr(np.random, "randint", theirs.randint)
            expected = T.RandomCrop(crop_type, crop_size).get_crop_size(size)
        assert crop_size_for(size, crop_type, crop_size, ours) == tuple(expected)


def test_category_constraint(monkeypatch):
    """Detectron2 keeps the first of ten windows that our rule accepts, or the tenth."""
    rng = np.random.default_rng(0)
    label_map = np.kron(rng.integers(0, 4, (5, 6)), np.ones((16, 16))).astype(np.uint8)
    label_map[label_map == 3] = 255
    category = np.where(label_map == 255, -1, label_map.astype(np.int32))
    crop = T.RandomCrop_CategoryAreaConstraint("absolute", (20, 20), 0.6, 255)
    stopped = set()
    for seed in range(200):
        replay = Replay(seed)
        monkeypatch.setattr(np.random, "randint", replay.randint)
        chosen = crop.get_transform(np.zeros((80, 96, 3), np.uint8), label_map)
        tried = list(zip(replay.integers_given[::2], replay.integers_given[1::2], strict=True))
        verdicts = [is_mixed(category[y : y + 20, x : x + 20], 0.6) for y, x in tried]
        assert (chosen.y0, chosen.x0) == tried[-1]
        assert verdicts[:-1] == [False] * (len(verdicts) - 1)
        assert verdicts[-1] or len(verdicts) == 10
        stopped.add(len(verdicts))
    assert {1, 2, 3} <= stopped


def test_color(monkeypatch):
    """Each distortion with Detectron2's amount; OpenCV's vector path truncates where we round."""
    image, _ = scene(48, 64)
    theirs = ColorAugSSDTransform("BGR")
    monkeypatch.setattr(d2_color.random, "randrange", lambda _: 1)
    bgr = np.ascontiguousarray(image[..., ::-1])
    for amount in (-31.7, 0.0, 18.2):
        monkeypatch.setattr(d2_color.random, "uniform", lambda *_, a=amount: a)
        np.testing.assert_array_equal(color.adjust_brightness(image, amount), theirs.brightness(image))
    for amount in (0.5, 0.93, 1.4987):
        monkeypatch.setattr(d2_color.random, "uniform", lambda *_, a=amount: a)
        np.testing.assert_array_equal(color.adjust_contrast(image, amount), theirs.contrast(image))
        close(color.adjust_saturation(image, amount), theirs.saturation(bgr)[..., ::-1])
    for amount in (-18, 0, 7):
        monkeypatch.setattr(d2_color.random, "randint", lambda *_, a=amount: a)
        close(color.adjust_hue(image, amount), theirs.hue(bgr)[..., ::-1])


def close(ours, theirs):
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_color_constants():
    theirs = ColorAugSSDTransform("RGB")
    assert theirs.brightness_delta == color.BRIGHTNESS_DELTA
    assert (theirs.contrast_low, theirs.contrast_high) == color.CONTRAST_RANGE
    assert (theirs.saturation_low, theirs.saturation_high) == color.SATURATION_RANGE
    assert theirs.hue_delta == color.HUE_DELTA


def test_records_are_detectron2s():
    pytest.importorskip("pycocotools")
    entry = catalog.get("coco_sample_val")
    metadata = entry.metadata
    theirs = load_coco_json(str(metadata.instances_json), str(metadata.image_root), "core_parity_sample")
    ours = entry.load()
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
    assert filter_empty(ours) == filter_images_with_only_crowd_annotations(theirs)


def test_images_are_read_alike():
    for record in catalog.get("coco_sample_val").load()[:8]:
        for order in ("RGB", "BGR"):
            theirs = detection_utils.read_image(record["file_name"], order)
            np.testing.assert_array_equal(read_image(record["file_name"], order), theirs)
