"""Records to training samples: the same target from every source, dropped objects, canvas, errors."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mask2former.data import LargeScaleJitter, ResizeCropColor, SegmentationMapper, catalog
from mask2former.data.augmentations import jitter_offset, scaled_size
from mask2former.data.geometry import View
from mask2former.data.images import read_panoptic_ids
from mask2former.data.mapper import read_image
from mask2former.data.segmentations import mask_from_segmentation

HEIGHT, WIDTH = 40, 60
BOXES = [(2, 3, 20, 16), (30, 10, 25, 25), (0, 30, 8, 8)]  # x, y, width, height; they do not touch
LABELS = [3, 0, 3]

AUGMENTATIONS = {
    "none": lambda image, rng, labels=None: View.of(image),
    "jitter": LargeScaleJitter(image_size=48, min_scale=0.1, max_scale=2.0),
    "resize_crop": ResizeCropColor(min_sizes=[20, 40, 80], max_size=120, crop_size=(32, 24)),
    "vertical": ResizeCropColor(
        min_sizes=[10, 90], max_size=200, sampling="range", crop_type="relative_range", crop_size=(0.3, 0.3),
        flip="vertical",
    ),
}  # fmt: skip


def masks_of(boxes=BOXES, height=HEIGHT, width=WIDTH):
    masks = np.zeros((len(boxes), height, width), dtype=bool)
    for mask, (x, y, w, h) in zip(masks, boxes, strict=True):
        mask[y : y + h, x : x + w] = True
    return masks


def save(path, pixels):
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def scene(tmp_path):
    """A record with all kinds of annotations of the same three boxes, the last a crowd in instances and
    panoptic; the semantic map has the same two other boxes.
    """
    masks = masks_of()
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    classes = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    segment_ids = [70000, 513, 8]
    for mask, segment_id in zip(masks, segment_ids, strict=True):
        ids[mask] = segment_id
    for mask, label in zip(masks[:2], LABELS, strict=False):
        classes[mask] = label
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    crowds = [0, 0, 1]
    return {
        "file_name": save(tmp_path / "photo.png", image),
        "image_id": 1,
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {"category_id": label, "iscrowd": crowd, "segmentation": mask}
            for label, crowd, mask in zip(LABELS, crowds, masks, strict=True)
        ],
        "pan_seg_file_name": save(tmp_path / "panoptic.png", colors),
        "segments_info": [
            {"id": i, "category_id": label, "iscrowd": crowd}
            for i, label, crowd in zip(segment_ids, LABELS, crowds, strict=True)
        ],
        "sem_seg_file_name": save(tmp_path / "semantic.png", classes),
    }


def mapper(source="instance", augmentation="none", **changes):
    arguments = {"source": source, "num_classes": 4, "augmentation": AUGMENTATIONS[augmentation], **changes}
    return SegmentationMapper(**arguments)


def polygon_of(box):
    x, y, w, h = box
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def encodings(masks):
    """The boxes as polygons, RLE of three kinds, and bitmaps."""
    coco_mask = pytest.importorskip("pycocotools.mask")
    compressed = [coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    uncompressed = []
    for mask in masks:
        column_order = mask.T.ravel().astype(np.int8)
        ends = [*np.flatnonzero(np.diff(column_order, prepend=0)), column_order.size]
        uncompressed.append({"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()})
    return {
        "polygon": [polygon_of(box) for box in BOXES],
        "compressed": compressed,
        "text": [{**rle, "counts": rle["counts"].decode()} for rle in compressed],
        "uncompressed": uncompressed,
        "bitmap": list(masks),
    }


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_an_object_gives_the_same_target_from_every_source(scene, augmentation):
    for seed in range(12):
        expected = mapper("panoptic", augmentation)(scene, np.random.default_rng(seed))
        for segmentations in encodings(masks_of()).values():
            record = copy.deepcopy(scene)
            for annotation, segmentation in zip(record["annotations"], segmentations, strict=True):
                annotation["segmentation"] = segmentation
            sample = mapper("instance", augmentation)(record, np.random.default_rng(seed))
            assert torch.equal(sample.image, expected.image)
            assert torch.equal(sample.target.labels, expected.target.labels)
            assert torch.equal(sample.target.masks, expected.target.masks)
        semantic = mapper("semantic", augmentation)(scene, np.random.default_rng(seed)).target
        order = expected.target.labels.argsort()
        assert torch.equal(semantic.labels, expected.target.labels[order])
        assert torch.equal(semantic.masks, expected.target.masks[order])


def plain_jitter(pixels, masks, rng, *, side, low, high):
    """Large-scale jittering in the order of the published steps: each image and each mask as a whole, one by one."""
    if rng.uniform() < 0.5:
        pixels, masks = pixels[:, ::-1], [mask[:, ::-1] for mask in masks]
    h, w = scaled_size(pixels.shape[:2], (side, side), rng.uniform(low, high))
    top, left = jitter_offset((h, w), side, rng.uniform())
    image = np.full((side, side, 3), 128, np.uint8)
    part = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))[top:, left:][:side, :side]
    image[: part.shape[0], : part.shape[1]] = part
    results = np.zeros((len(masks), side, side), bool)
    for result, mask in zip(results, masks, strict=True):
        resized = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((w, h), Image.Resampling.NEAREST))
        result[: part.shape[0], : part.shape[1]] = resized[top:, left:][:side, :side] != 0
    return image, results


@pytest.mark.parametrize("name", ["coco_sample_val", "coco_sample_val_panoptic_with_sem_seg"])
def test_samples_are_those_of_the_plain_order(name):
    """Nothing that is cut off, shared or put off on the way changes a bit, at scales of trainings."""
    pytest.importorskip("pycocotools")
    jitter = {"low": 0.1, "high": 2.0, "side": 512}
    augmentation = LargeScaleJitter(image_size=512, min_scale=0.1, max_scale=2.0)
    source = "panoptic" if "panoptic" in name else "instance"
    real = SegmentationMapper(source=source, num_classes=133, augmentation=augmentation)
    dropped = 0
    for seed, record in enumerate(catalog.get(name).load()[:12]):
        if source == "panoptic":
            ids = read_panoptic_ids(record["pan_seg_file_name"])
            masks = [ids == s["id"] for s in record["segments_info"] if not s["iscrowd"]]
            labels = [s["category_id"] for s in record["segments_info"] if not s["iscrowd"]]
        else:
            size = record["height"], record["width"]
            objects = [a for a in record["annotations"] if not a["iscrowd"]]
            masks = [mask_from_segmentation(a["segmentation"], *size) for a in objects]
            labels = [a["category_id"] for a in objects]
        pixels = read_image(record["file_name"])
        image, expected = plain_jitter(pixels, masks, np.random.default_rng(seed), **jitter)
        sample = real(record, np.random.default_rng(seed))
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), image)
        shown = expected.any(axis=(1, 2))
        np.testing.assert_array_equal(sample.target.masks.numpy(), expected[shown])
        assert sample.target.labels.tolist() == np.array(labels)[shown].tolist()
        dropped += (~shown).sum()
    assert dropped > 0


def test_a_sample_is_small(scene):
    """What goes from worker to trainer: label maps, not a mask for each object."""
    for source in ("semantic", "panoptic", "instance"):
        image, target = mapper(source, "jitter")(scene, np.random.default_rng(0))
        assert target.maps.shape == (1, 48, 48)
        assert target.maps.dtype == torch.uint8
        assert image.is_contiguous()
        assert len(pickle.dumps(target.maps.numpy())) < 48 * 48 + 500


@pytest.mark.parametrize("source", ["semantic", "panoptic", "instance"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_no_mask_is_empty_and_none_lies_on_padding(scene, source, augmentation):
    counts = set()
    for seed in range(30):
        image, target = mapper(source, augmentation)(scene, np.random.default_rng(seed))
        assert image.dtype == torch.uint8
        assert target.masks.dtype == torch.bool
        assert target.labels.dtype == torch.int64
        assert target.masks.shape == (len(target.labels), *image.shape[1:])
        assert target.masks.flatten(1).any(dim=1).all()
        if augmentation == "jitter":
            padding = (image == 128).all(dim=0)
            assert not (target.masks & padding).any()
        counts.add(len(target.labels))
    if augmentation == "resize_crop":
        assert min(counts) < 2  # otherwise nothing was ever dropped
    assert max(counts) == 2  # and the crowd never is a target


def test_void_stays_void(scene):
    """Padding and void never become a mask, even where a class has the number of the ignore label."""
    for ignore, num_classes in ((255, 4), (3, 4)):
        semantic = mapper("semantic", "jitter", ignore_label=ignore, num_classes=num_classes)
        if ignore == 3:
            classes = np.array(Image.open(scene["sem_seg_file_name"]))
            save(scene["sem_seg_file_name"], np.where(classes == 255, 3, classes % 3).astype(np.uint8))
        for seed in range(8):
            target = semantic(scene, np.random.default_rng(seed)).target
            assert ignore not in target.labels
            assert not target.masks.all(dim=0).any() or len(target.labels) == 1
            assert (target.masks.sum(dim=0) <= 1).all()


@pytest.mark.parametrize("source", ["semantic", "panoptic", "instance"])
def test_images_without_objects(scene, source):
    save(scene["sem_seg_file_name"], np.full((HEIGHT, WIDTH), 255, np.uint8))
    scene["annotations"] = scene["annotations"][2:]
    scene["segments_info"] = []
    target = mapper(source, "jitter")(scene, np.random.default_rng(0)).target
    assert target.masks.shape == (0, 48, 48)
    assert target.masks.dtype == torch.bool
    assert target.labels.shape == (0,)


def test_canvas(scene):
    plain = mapper()(scene, np.random.default_rng(0))
    for divisor, size in ((32, (64, 64)), (50, (50, 100)), (20, (40, 60)), (0, (40, 60)), (-1, (40, 60))):
        image, target = mapper(size_divisibility=divisor)(scene, np.random.default_rng(0))
        assert image.shape == (3, *size)
        assert target.masks.shape == (2, *size)
        assert torch.equal(image[:, :HEIGHT, :WIDTH], plain.image)
        assert torch.equal(target.masks[:, :HEIGHT, :WIDTH], plain.target.masks)
        assert (image[:, HEIGHT:] == 128).all()
        assert (image[:, :, WIDTH:] == 128).all()
        assert not target.masks[:, HEIGHT:].any()
        assert not target.masks[:, :, WIDTH:].any()


def test_channel_order(scene):
    pixels = read_image(scene["file_name"])
    rgb, bgr = (mapper(image_format=order)(scene, np.random.default_rng(0)).image for order in ("RGB", "BGR"))
    np.testing.assert_array_equal(rgb.numpy(), pixels.transpose(2, 0, 1))
    assert torch.equal(bgr, rgb.flip(0))
    # Colours are distorted as RGB whatever the order of the result.
    for seed in range(8):
        rgb, bgr = (
            mapper(augmentation="resize_crop", image_format=order)(scene, np.random.default_rng(seed)).image
            for order in ("RGB", "BGR")
        )
        assert torch.equal(bgr, rgb.flip(0))


@pytest.mark.parametrize("source", ["semantic", "panoptic", "instance"])
def test_mapper_is_pure(scene, source):
    before = copy.deepcopy(scene)
    mapped = pickle.loads(pickle.dumps(mapper(source, "resize_crop")))
    first, again = (mapped(scene, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.target.masks, again.target.masks)
    for new, old in zip(scene["annotations"], before["annotations"], strict=True):
        np.testing.assert_array_equal(new.pop("segmentation"), old.pop("segmentation"))
    assert scene == before


def test_the_constraint_sees_labels_of_maps_alone(scene):
    seen = {}

    def augmentation(image, rng, labels=None):
        seen["labels"] = labels and labels()
        return View.of(image)

    expected = np.full((HEIGHT, WIDTH), -1)
    for mask, label in zip(masks_of(), LABELS, strict=True):
        expected[mask] = label
    for source in ("panoptic", "semantic", "instance"):
        SegmentationMapper(source=source, num_classes=4, augmentation=augmentation)(
            scene, np.random.default_rng(0)
        )
        if source == "instance":
            assert seen["labels"] is None
            continue
        if source == "semantic":
            expected[masks_of()[2]] = -1
        np.testing.assert_array_equal(seen["labels"], expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1)])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_extreme_shapes(tmp_path, shape, augmentation):
    record = {
        "file_name": save(tmp_path / "a.png", np.zeros((*shape, 3), np.uint8)),
        "height": shape[0], "width": shape[1],
        "sem_seg_file_name": save(tmp_path / "b.png", np.full(shape, 2, np.uint8)),
    }  # fmt: skip
    for seed in range(6):
        image, target = mapper("semantic", augmentation)(record, np.random.default_rng(seed))
        assert image.shape[1:] == target.masks.shape[1:]
        assert target.labels.tolist() == [2]


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1", "CMYK"])
def test_images_of_every_mode(tmp_path, scene, mode):
    image = eight_bits = Image.open(scene["file_name"]).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        assert image.mode == mode
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    image.save(path)
    sample = mapper()(scene | {"file_name": str(path)}, np.random.default_rng(0))
    assert sample.image.shape == (3, HEIGHT, WIDTH)
    expected = np.asarray(eight_bits.convert("RGB"))
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), expected)


def test_size_errors(scene, tmp_path):
    with pytest.raises(ValueError, match=r"photo.png: the size is 40x60 .*its record says 41x60"):
        mapper()(scene | {"height": 41}, np.random.default_rng(0))
    small = save(tmp_path / "small.png", np.zeros((HEIGHT, WIDTH - 1), np.uint8))
    for source, key in (("semantic", "sem_seg_file_name"), ("panoptic", "pan_seg_file_name")):
        with pytest.raises(ValueError, match=r"small.png: the size is 40x59 .*its image has 40x60"):
            mapper(source)(scene | {key: small}, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("source", "file"), [("semantic", "semantic.p"), ("panoptic", "panoptic.p"), ("instance", "photo.p")]
)
def test_ids_out_of_range_name_the_file(scene, source, file):
    with pytest.raises(ValueError, match=rf"{file}.*category id 3 is outside \[0, 3\)"):
        mapper(source, num_classes=3)(scene, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("source", "key"),
    [("semantic", "sem_seg_file_name"), ("panoptic", "pan_seg_file_name"), ("panoptic", "segments_info"),
     ("instance", "annotations")],
)  # fmt: skip
def test_missing_annotations(scene, source, key):
    del scene[key]
    with pytest.raises(ValueError, match=rf"photo.png: source '{source}' needs '{key}'"):
        mapper(source)(scene, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "depth"}, "source must be one of semantic, panoptic, instance, got 'depth'"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"image_format": "HSV"}, "image_format must be 'RGB' or 'BGR', got 'HSV'"),
    ],
)
def test_arguments_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        mapper(**changes)


@pytest.mark.parametrize(
    ("name", "source"),
    [("coco_sample_val", "instance"), ("coco_sample_val_panoptic_with_sem_seg", "panoptic"),
     ("coco_sample_val_sem_seg", "semantic")],
)  # fmt: skip
def test_real_images(name, source):
    pytest.importorskip("pycocotools")
    entry = catalog.get(name)
    jitter = LargeScaleJitter(image_size=128, min_scale=0.5, max_scale=1.5)
    real = SegmentationMapper(source=source, num_classes=entry.metadata.num_classes, augmentation=jitter)
    found = 0
    for position, record in enumerate(entry.load()):
        image, target = real(record, np.random.default_rng(position))
        assert image.shape == (3, 128, 128)
        assert target.masks.flatten(1).any(dim=1).all()
        found += len(target.labels)
    assert found > 50


def test_package_imports_without_pycocotools_and_detectron2():
    code = (
        "import sys; sys.modules.update(pycocotools=None, detectron2=None, fvcore=None, cv2=None);"
        "import mask2former.data; assert mask2former.data.catalog.names()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
