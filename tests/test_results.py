"""Results by hand: their properties, COCO JSON as pycocotools and panopticapi read it, PNG and drawings."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mask2former.data.catalog import Category
from mask2former.data.images import read_label_map, read_panoptic_ids
from mask2former.results import InstancePicture, PanopticPicture, Segment, SemanticPicture

CATEGORIES = (
    Category(18, "dog", True, (255, 0, 0)),
    Category(90, "sky", False, (0, 0, 255)),
    Category(3, "caf\u00e9", True, (0, 255, 0)),
)

IDS = np.array(
    [
        [5, 5, 5, 5, 5, 5],
        [5, 5, 70000, 70000, 70000, 5],
        [0, 0, 70000, 300, 300, 0],
        [0, 0, 0, 300, 300, 300],
    ],
    np.int32,
)


def panoptic() -> PanopticPicture:
    segments = (
        Segment(5, 1, "sky", False, 0.75, 9),
        Segment(300, 2, "caf\u00e9", True, 0.5, 5),
        Segment(70000, 0, "dog", True, 1.0, 4),
    )
    return PanopticPicture(IDS, segments, CATEGORIES)


def instances() -> InstancePicture:
    """The first two overlap in one pixel, the last one has none."""
    masks = np.zeros((3, 3, 5), bool)
    masks[0, 0:2, 1:3] = True
    masks[1, 1:3, 2:5] = True
    masks[1, 2, 3] = False
    return InstancePicture(
        labels=np.array([2, 0, 2]),
        scores=np.array([0.75, 0.5, 0.25], np.float32),
        masks=masks,
        boxes=np.array([[1, 0, 3, 2], [2, 1, 5, 3], [0, 0, 0, 0]], np.float32),
        categories=CATEGORIES,
    )


def semantic() -> SemanticPicture:
    return SemanticPicture(np.array([[0, 0, 2], [0, 2, 2]], np.int32), CATEGORIES)


def decoded(rle: Any) -> np.ndarray:
    return coco_masks.decode(rle).astype(bool)


def compressed(counts: list[int], height: int, width: int) -> Any:
    """RLE from run lengths, column by column, beginning with what is not in the mask."""
    rle = coco_masks.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode()}


# ---- properties


def test_panoptic_properties() -> None:
    result = panoptic()
    assert result.names == ("sky", "caf\u00e9", "dog")
    assert result.dataset_category_ids == (90, 3, 18)
    assert result.scores.tolist() == [0.75, 0.5, 1.0]
    assert result.areas.tolist() == [9, 5, 4]
    np.testing.assert_array_equal(result.masks, [IDS == 5, IDS == 300, IDS == 70000])
    assert result.boxes.tolist() == [[0, 0, 6, 2], [3, 2, 6, 4], [2, 1, 5, 3]]
    assert (result.scores.dtype, result.areas.dtype, result.boxes.dtype) == (np.float32, np.int64, np.float32)
    assert result.rle()[1] == compressed([14, 2, 2, 2, 3, 1], 4, 6)
    for rle, mask in zip(result.rle(), result.masks, strict=True):
        np.testing.assert_array_equal(decoded(rle), mask)


def test_a_segment_without_pixels_has_no_box() -> None:
    result = PanopticPicture(np.ones((2, 2), np.int32), (Segment(9, 0, "dog", True, 1.0, 0),), CATEGORIES)
    assert result.boxes.tolist() == [[0, 0, 0, 0]]
    assert not decoded(result.rle()[0]).any()


def test_instance_properties() -> None:
    result = instances()
    assert result.names == ("caf\u00e9", "dog", "caf\u00e9")
    assert result.dataset_category_ids == (3, 18, 3)
    assert result.areas.tolist() == [4, 5, 0]
    assert result.rle() == [
        compressed([3, 2, 1, 2, 7], 3, 5),
        compressed([7, 2, 1, 1, 2, 2], 3, 5),
        compressed([15], 3, 5),
    ]


def test_semantic_properties() -> None:
    result = semantic()
    assert result.names == ("dog", "sky", "caf\u00e9")
    assert result.dataset_category_ids == (18, 90, 3)
    assert result.areas.tolist() == [3, 0, 3]
    assert result.rle() == {0: compressed([0, 3, 3], 2, 3), 2: compressed([3, 3], 2, 3)}


def nothing_found() -> list[Any]:
    none = InstancePicture(
        labels=np.zeros(0, np.int64),
        scores=np.zeros(0, np.float32),
        masks=np.zeros((0, 4, 6), bool),
        boxes=np.zeros((0, 4), np.float32),
        categories=CATEGORIES,
    )
    return [PanopticPicture(np.zeros((4, 6), np.int32), (), CATEGORIES), none]


@pytest.mark.parametrize("result", nothing_found())
def test_nothing_found(result: Any, tmp_path: Path) -> None:
    assert result.names == result.dataset_category_ids == ()
    assert result.boxes.shape == (0, 4)
    assert result.masks.shape == (0, 4, 6)
    assert result.areas.shape == result.scores.shape == (0,)
    assert result.rle() == []
    entry = result.to_coco_json(1)
    assert entry == [] or entry["segments_info"] == []
    result.to_png(tmp_path / "a.png")
    assert not np.asarray(Image.open(tmp_path / "a.png")).any()


# ---- COCO JSON


def test_panoptic_json() -> None:
    entry = panoptic().to_coco_json(np.int64(7), file_name="caf\u00e9.png")
    assert json.loads(json.dumps(entry)) == {
        "image_id": 7,
        "file_name": "caf\u00e9.png",
        "segments_info": [
            {"id": 5, "category_id": 90, "iscrowd": 0, "area": 9, "bbox": [0, 0, 6, 2]},
            {"id": 300, "category_id": 3, "iscrowd": 0, "area": 5, "bbox": [3, 2, 3, 2]},
            {"id": 70000, "category_id": 18, "iscrowd": 0, "area": 4, "bbox": [2, 1, 3, 2]},
        ],
    }
    assert panoptic().to_coco_json(image_id="a/b")["file_name"] == "a/b.png"


@pytest.mark.parametrize("result", [panoptic(), instances(), semantic()])
def test_image_ids_are_whole_or_text(result: Any) -> None:
    with pytest.raises(TypeError):
        result.to_coco_json(1.5)
    json.dumps(result.to_coco_json(np.uint8(3)))


def test_panopticapi_reads_panoptic_json(tmp_path: Path) -> None:
    evaluation = pytest.importorskip("panopticapi.evaluation", reason="panopticapi is not installed")
    folder, result = tmp_path / "segments", panoptic()
    folder.mkdir()
    result.to_png(folder / "7.png")
    categories = [{"id": c.id, "name": c.name, "isthing": int(c.is_thing)} for c in CATEGORIES]
    document = {"images": [{"id": 7}], "annotations": [result.to_coco_json(7)], "categories": categories}
    (tmp_path / "segments.json").write_text(json.dumps(document))
    both = {"gt_json_file": str(tmp_path / "segments.json"), "gt_folder": str(folder)}
    with contextlib.redirect_stdout(io.StringIO()):
        found = evaluation.pq_compute(**both, pred_json_file=both["gt_json_file"], pred_folder=both["gt_folder"])
    assert found["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 3}


def ground_truth(masks: np.ndarray, labels: list[int]) -> COCO:
    """Annotations of image 7, whatever a result says."""
    annotations = []
    for number, (mask, label) in enumerate(zip(masks, labels, strict=True), start=1):
        rle = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        values = {"segmentation": rle, "area": float(mask.sum()), "bbox": coco_masks.toBbox(rle).tolist()}
        annotations.append({"id": number, "image_id": 7, "category_id": CATEGORIES[label].id, "iscrowd": 0, **values})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": 7, "height": masks.shape[1], "width": masks.shape[2]}],
        "categories": [{"id": c.id, "name": c.name} for c in CATEGORIES],
        "annotations": annotations,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def loaded(truth: COCO, entries: Any, folder: Path) -> COCO:
    (folder / "results.json").write_text(json.dumps(entries))
    with contextlib.redirect_stdout(io.StringIO()):
        return truth.loadRes(str(folder / "results.json"))


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_pycocotools_reads_instance_json(tmp_path: Path, kind: str) -> None:
    result = instances()
    entries = result.to_coco_json(7)
    assert [entry["bbox"] for entry in entries] == [[1, 0, 2, 2], [2, 1, 3, 2], [0, 0, 0, 0]]
    assert [entry["score"] for entry in entries] == [0.75, 0.5, 0.25]
    assert {tuple(entry) for entry in entries} == {("image_id", "category_id", "segmentation", "bbox", "score")}
    truth = ground_truth(result.masks[:2], [2, 0])
    found = loaded(truth, entries, tmp_path)
    for annotation, mask in zip(found.dataset["annotations"], result.masks, strict=True):
        np.testing.assert_array_equal(found.annToMask(annotation).astype(bool), mask)
    evaluation = COCOeval(truth, found, kind)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_pycocotools_reads_semantic_json(tmp_path: Path) -> None:
    result = semantic()
    entries = result.to_coco_json(7)
    assert [(e["image_id"], e["category_id"]) for e in entries] == [(7, 18), (7, 3)]
    found = loaded(ground_truth(np.zeros((0, 2, 3)), []), entries, tmp_path)
    for annotation, label in zip(found.dataset["annotations"], (0, 2), strict=True):
        np.testing.assert_array_equal(found.annToMask(annotation).astype(bool), result.labels == label)
        assert annotation["area"] == 3


# ---- PNG


def test_panoptic_png(tmp_path: Path) -> None:
    panoptic().to_png(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels[0, 0].tolist() == [5, 0, 0]
    assert pixels[3, 3].tolist() == [44, 1, 0]  # 300
    assert pixels[1, 2].tolist() == [112, 17, 1]  # 70000
    np.testing.assert_array_equal(read_panoptic_ids(tmp_path / "a.png"), IDS)


def test_panoptic_png_holds_24_bits(tmp_path: Path) -> None:
    ids = np.array([[(1 << 24) - 1]], np.int32)
    PanopticPicture(ids, (), CATEGORIES).to_png(tmp_path / "a.png")
    assert read_panoptic_ids(tmp_path / "a.png").item() == (1 << 24) - 1
    with pytest.raises(ValueError, match=r"ids must be below 2\*\*24 for a PNG, got 16777216"):
        PanopticPicture(ids + 1, (), CATEGORIES).to_png(tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_instance_png_has_the_best_on_top(tmp_path: Path) -> None:
    instances().to_png(tmp_path / "a.png")
    found = read_label_map(tmp_path / "a.png")
    assert found.dtype == np.uint16
    assert found.tolist() == [[0, 1, 1, 0, 0], [0, 1, 1, 2, 2], [0, 0, 2, 0, 2]]


def test_instance_png_holds_16_bits(tmp_path: Path) -> None:
    masks = np.zeros((65536, 1, 2), bool)
    masks[65534, 0, 1] = True

    def of(count: int) -> InstancePicture:
        zeros = np.zeros(count, np.int64)
        return InstancePicture(zeros, zeros.astype(np.float32), masks[:count], np.zeros((count, 4)), CATEGORIES)

    of(65535).to_png(tmp_path / "a.png")
    assert read_label_map(tmp_path / "a.png").tolist() == [[0, 65535]]
    with pytest.raises(ValueError, match="at most 65535 instances go into a PNG, got 65536"):
        of(65536).to_png(tmp_path / "b.png")


@pytest.mark.parametrize(("count", "dtype"), [(3, np.uint8), (255, np.uint8), (256, np.uint16)])
def test_semantic_png(tmp_path: Path, count: int, dtype: Any) -> None:
    labels = np.array([[0, count - 1], [1, 2]], np.int32)
    SemanticPicture(labels, CATEGORIES[:1] * count).to_png(tmp_path / "a.png")
    found = read_label_map(tmp_path / "a.png")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize("result", [panoptic(), instances(), semantic()])
def test_png_replaces_whole_or_leaves_nothing(tmp_path: Path, result: Any) -> None:
    (tmp_path / "a.png").write_text("old")
    result.to_png(str(tmp_path / "a.png"))
    assert Image.open(tmp_path / "a.png").format == "PNG"
    with pytest.raises(FileNotFoundError):
        result.to_png(tmp_path / "no folder" / "a.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        result.to_png(tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "folder"]


# ---- drawings


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_drawings_are_those_of_the_visualizer(task: str) -> None:
    visualizer = pytest.importorskip("mask2former.visualizer", reason="OpenCV is not installed").Visualizer(CATEGORIES)
    grey = np.arange(60 * 80, dtype=np.uint32).reshape(60, 80) % 200
    image, enlarged = np.stack([grey.astype(np.uint8)] * 3, axis=-1), np.ones((15, 16), np.uint8)
    if task == "panoptic":
        found = PanopticPicture(np.kron(IDS, enlarged)[:, :80], panoptic().segments, CATEGORIES)
        expected = visualizer.draw_panoptic(image, found.ids, found.segments)
    elif task == "instance":
        masks = np.stack([grey < 90, grey > 70])
        labels, scores = np.array([2, 0]), np.array([0.9, 0.8], np.float32)
        found = InstancePicture(labels, scores, masks, np.zeros((2, 4), np.float32), CATEGORIES)
        expected = visualizer.draw_instances(image, labels, scores, masks)
    else:
        found = SemanticPicture((grey // 80).astype(np.int32), CATEGORIES)
        expected = visualizer.draw_semantic(image, found.labels)
    np.testing.assert_array_equal(found.draw(grey.astype(np.uint8)), expected)
    np.testing.assert_array_equal(found.draw(Image.fromarray(image)), expected)
    assert not np.array_equal(expected, image)
    with pytest.raises(ValueError, match="shape"):
        found.draw(image[:, 1:])
