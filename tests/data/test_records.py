"""Annotation files to records."""

import json

import numpy as np
import pytest
from PIL import Image

from mask2former.data import filter_empty, load_coco_instances, load_coco_panoptic, load_semantic_folder
from mask2former.data.catalog import Category

CATEGORIES = (
    Category(3, "car", True, (1, 0, 0)),
    Category(8, "cup", True, (2, 0, 0)),
    Category(200, "sky", False, (3, 0, 0)),
)
IMAGES = [{"id": n, "file_name": f"{n}.jpg", "height": 4, "width": 6} for n in (9, 2)]


def write(tmp_path, annotations):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps({"images": IMAGES, "annotations": annotations}))
    return file


def test_instances(tmp_path):
    polygon = [[0, 0, 3, 0, 3, 3]]
    rle = {"size": [4, 6], "counts": [0, 24]}
    file = write(tmp_path, [
        {"id": 1, "image_id": 9, "category_id": 8, "bbox": [0, 0, 3, 3], "iscrowd": 0, "area": 4.5,
         "segmentation": polygon},
        {"id": 2, "image_id": 9, "category_id": 3, "iscrowd": 1, "segmentation": rle},
    ])  # fmt: skip
    empty, full = load_coco_instances(file, "photos", CATEGORIES[:2])
    assert empty == {"file_name": "photos/2.jpg", "image_id": 2, "height": 4, "width": 6, "annotations": []}
    assert full["annotations"] == [
        {"bbox": [0, 0, 3, 3], "bbox_mode": 1, "segmentation": polygon, "category_id": 1, "iscrowd": 0},
        {"segmentation": rle, "category_id": 0, "iscrowd": 1},
    ]


def test_instances_refuse_what_does_not_fit(tmp_path):
    file = write(tmp_path, [{"id": 5, "image_id": 9, "category_id": 200}])
    with pytest.raises(ValueError, match=r"s.json: annotation 5 of image 9: category_id 200 .* 2 classes"):
        load_coco_instances(file, "photos", CATEGORIES[:2])
    file = write(tmp_path, [{"id": 5, "image_id": 77, "category_id": 3}])
    with pytest.raises(ValueError, match="annotation 5 of image 77: the file has no such image"):
        load_coco_instances(file, "photos", CATEGORIES)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"annotations.json is not valid JSON"):
        load_coco_instances(file, "photos", CATEGORIES)


def test_panoptic(tmp_path):
    file = write(tmp_path, [
        {"image_id": 9, "file_name": "9.png", "segments_info": [
            {"id": 70000, "category_id": 200, "iscrowd": 0, "area": 3, "bbox": [0, 0, 1, 3]},
            {"id": 7, "category_id": 8}]},
        {"image_id": 2, "file_name": "2.png", "segments_info": []},
    ])  # fmt: skip
    first, second = load_coco_panoptic(file, "photos", "pan", CATEGORIES, "sem")
    assert (first["image_id"], first["height"], first["width"]) == (9, 4, 6)
    assert first["file_name"] == "photos/9.jpg"
    assert first["pan_seg_file_name"] == "pan/9.png"
    assert first["sem_seg_file_name"] == "sem/9.png"
    assert first["segments_info"] == [
        {"id": 70000, "category_id": 2, "iscrowd": 0, "area": 3, "bbox": [0, 0, 1, 3], "isthing": False},
        {"id": 7, "category_id": 1, "iscrowd": 0, "isthing": True},
    ]
    assert second["segments_info"] == []
    assert "sem_seg_file_name" not in load_coco_panoptic(file, "photos", "pan", CATEGORIES)[0]


def test_panoptic_refuses_what_does_not_fit(tmp_path):
    segments = [{"id": 7, "category_id": 4}]
    file = write(tmp_path, [{"image_id": 9, "file_name": "9.png", "segments_info": segments}])
    with pytest.raises(ValueError, match=r"segment 7 of image 9: category_id 4 is not one of the 3 classes"):
        load_coco_panoptic(file, "photos", "pan", CATEGORIES)
    file = write(tmp_path, [{"image_id": 1, "file_name": "1.png", "segments_info": []}])
    with pytest.raises(ValueError, match="image 1: the file has no such image"):
        load_coco_panoptic(file, "photos", "pan", CATEGORIES)


@pytest.mark.parametrize(
    ("load", "content", "message"),
    [
        ("instances", [], "is no COCO file: it has no 'images'"),
        ("instances", {"images": [{"id": 4, "file_name": "a", "width": 1}]}, "image 4 has no 'height'"),
        ("instances", {"images": [], "annotations": [{"id": 3, "image_id": 1}]}, "tion 3 .*'category_id'"),
        ("panoptic", {"images": [], "annotations": [{"image_id": 1}]}, "image 1 has no 'file_name'"),
        ("panoptic", {"images": IMAGES, "annotations": [
            {"image_id": 9, "file_name": "9.png", "segments_info": [{"category_id": 3}]}]},
         "segment None of image 9 has no 'id'"),
    ],
)  # fmt: skip
def test_incomplete_files(tmp_path, load, content, message):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"annotations\.json.*{message}"):
        if load == "instances":
            load_coco_instances(file, "photos", CATEGORIES)
        else:
            load_coco_panoptic(file, "photos", "pan", CATEGORIES)


def test_semantic_folder(tmp_path, caplog):
    images = ["images/b/two.JPG", "images/one.jpg", "images/lonely.png"]
    labels = ["labels/b/two.png", "labels/one.png", "labels/other.png", "labels/one.txt"]
    for name in images + labels:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".png":
            Image.fromarray(np.zeros((3, 5), np.uint8)).save(path)
        else:
            path.touch()
    records = load_semantic_folder(tmp_path / "images", tmp_path / "labels")
    assert [r["image_id"] for r in records] == ["b/two", "one"]
    assert all((r["height"], r["width"]) == (3, 5) for r in records)
    assert records[0]["file_name"] == str(tmp_path / "images/b/two.JPG")
    assert records[0]["sem_seg_file_name"] == str(tmp_path / "labels/b/two.png")
    assert "2 files have no partner" in caplog.text
    with pytest.raises(FileNotFoundError, match="no image in"):
        load_semantic_folder(tmp_path / "images", tmp_path / "nothing")
    (tmp_path / "images/one.png").touch()
    with pytest.raises(ValueError, match="differ only in their suffix"):
        load_semantic_folder(tmp_path / "images", tmp_path / "labels")


def test_filter_empty_drops_images_without_objects():
    records = [
        {"image_id": 1, "annotations": []},
        {"image_id": 2, "annotations": [{"iscrowd": 1}]},
        {"image_id": 3, "annotations": [{"iscrowd": 1}, {"iscrowd": 0}]},
        {"image_id": 4, "annotations": [{}]},
        {"image_id": 5, "segments_info": []},
    ]
    assert [r["image_id"] for r in filter_empty(records)] == [3, 4, 5]
