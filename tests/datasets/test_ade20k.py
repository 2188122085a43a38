"""The three scripts for ADE20K's challenge release, checked pixel by pixel and through the catalog."""

import json
import re

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from mask2former.data import catalog
from mask2former.data.ade20k_raw import thing_categories
from mask2former.data.images import read_label_map
from tests.datasets import miniatures
from tests.datasets.miniatures import ADE_LABELS, pixels_of, prepare, save

# The second column of the challenge's categoryMapping.txt: the class among the 150 (from 1) of each of the 100.
SEMANTIC_OF_INSTANCE = [
    8, 9, 11, 13, 15, 16, 19, 20, 21, 23, 24, 25, 28, 31, 32, 33, 34, 36, 37, 38, 39, 40, 42, 43, 44, 45, 46, 48, 50,
    51, 54, 56, 57, 58, 59, 63, 65, 66, 67, 68, 70, 71, 72, 73, 74, 75, 76, 77, 79, 81, 82, 83, 84, 86, 87, 88, 89, 90,
    91, 93, 94, 96, 98, 99, 103, 104, 105, 108, 109, 111, 112, 113, 116, 117, 119, 120, 121, 122, 124, 125, 126, 127,
    128, 130, 131, 133, 134, 135, 136, 137, 138, 139, 140, 143, 144, 145, 147, 148, 149, 150,
]  # fmt: skip
W, B, F = 256 * 1, 256 * 2, 256 * 4  # segment ids of wall, building, floor
BED, WINDOW, FLAG = 256 * 8, 256 * 9, 256 * 150
SEGMENTS = np.array(
    [[W, W, W, 0, WINDOW + 3, WINDOW + 3],
     [W, W, W, 0, WINDOW + 3, WINDOW + 3],
     [BED + 1, BED + 1, BED + 2, BED + 2, BED + 2, 0],
     [F, F, 0, 0, 0, FLAG + 255]])  # fmt: skip


def test_instance_classes_are_the_things_in_their_order():
    assert [category.id + 1 for category in thing_categories()] == SEMANTIC_OF_INSTANCE
    assert [c.id for c in catalog.read_categories("ade20k_instance")] == [c - 1 for c in SEMANTIC_OF_INSTANCE]


def test_semantic(tmp_path, monkeypatch, capsys):
    root = miniatures.ade20k(tmp_path)
    assert prepare("prepare_ade20k_sem_seg", tmp_path) == 0
    assert "4 files written, 0 were there already, 0 faults" in capsys.readouterr().out
    labels, mode = pixels_of(root / "annotations_detectron2/training/ADE_train_00000002.png")
    assert mode == "L"
    assert labels.tolist() == [
        [0, 0, 0, 8, 8, 8],
        [0, 0, 0, 8, 8, 8],
        [7, 7, 7, 7, 255, 255],
        [3, 3, 7, 7, 255, 149],
    ]
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    records = catalog.get("ade20k_sem_seg_val").load()
    assert [record["image_id"] for record in records] == ["ADE_val_00000001", "ADE_val_00000002"]
    assert (read_label_map(records[0]["sem_seg_file_name"]) == labels).all()


def test_semantic_of_one_split(tmp_path):
    root = miniatures.ade20k(tmp_path)
    assert prepare("prepare_ade20k_sem_seg", tmp_path, "--split", "val") == 0
    assert [path.name for path in (root / "annotations_detectron2").iterdir()] == ["validation"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.full((4, 6), 151, np.uint8), r"classes must be in 0..150, got 151"),
        (np.full((4, 5), 1, np.uint8), r"is 5 wide and 4 high, but .*00002.jpg is 6 wide and 4 high"),
        (np.zeros((4, 6, 3), np.uint8), "one channel"),
    ],
)
def test_semantic_names_what_is_wrong(tmp_path, capsys, wrong, message):
    root = miniatures.ade20k(tmp_path)
    save(root / "annotations/training/ADE_train_00000002.png", wrong)
    assert prepare("prepare_ade20k_sem_seg", tmp_path) == 1
    lines = capsys.readouterr()
    [fault] = [line for line in lines.err.splitlines() if line.startswith("fault: ")]
    assert str(root / "annotations/training/ADE_train_00000002.png") in fault
    assert re.search(message, fault)
    assert "3 files written, 0 were there already, 1 faults" in lines.out
    assert not (root / "annotations_detectron2/training/ADE_train_00000002.png").exists()


def test_panoptic(tmp_path, monkeypatch):
    root = miniatures.ade20k(tmp_path)
    assert prepare("prepare_ade20k_pan_seg", tmp_path) == 0
    colors, mode = pixels_of(root / "ade20k_panoptic_train/ADE_train_00000001.png")
    assert mode == "RGB"
    assert (colors.astype(int) @ [1, 256, 65536] == SEGMENTS).all()
    content = json.loads((root / "ade20k_panoptic_train.json").read_text())
    assert content["images"] == [
        {"id": number, "file_name": f"ADE_train_0000000{number}.jpg", "height": 4, "width": 6} for number in (1, 2)
    ]
    assert len(content["categories"]) == 150
    assert sum(category["isthing"] for category in content["categories"]) == 100
    assert content["annotations"][1]["image_id"] == 2
    assert content["annotations"][1]["file_name"] == "ADE_train_00000002.png"
    assert content["annotations"][1]["segments_info"] == [
        {"id": W, "category_id": 0, "iscrowd": 0, "area": 6, "bbox": [0, 0, 3, 2]},
        {"id": F, "category_id": 3, "iscrowd": 0, "area": 2, "bbox": [0, 3, 2, 1]},
        {"id": BED + 1, "category_id": 7, "iscrowd": 0, "area": 2, "bbox": [0, 2, 2, 1]},
        {"id": BED + 2, "category_id": 7, "iscrowd": 0, "area": 3, "bbox": [2, 2, 3, 1]},
        {"id": WINDOW + 3, "category_id": 8, "iscrowd": 0, "area": 4, "bbox": [4, 0, 2, 2]},
        {"id": FLAG + 255, "category_id": 149, "iscrowd": 0, "area": 1, "bbox": [5, 3, 1, 1]},
    ]
    prepare("prepare_ade20k_sem_seg", tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    record = catalog.get("ade20k_panoptic_train").load()[0]
    assert record["file_name"] == str(root / "images/training/ADE_train_00000001.jpg")
    assert record["pan_seg_file_name"] == str(root / "ade20k_panoptic_train/ADE_train_00000001.png")
    assert record["sem_seg_file_name"] == str(root / "annotations_detectron2/training/ADE_train_00000001.png")
    assert [segment["isthing"] for segment in record["segments_info"]] == [False, False, True, True, True, True]


def test_stuff_under_an_object_is_the_object(tmp_path):
    root = miniatures.ade20k(tmp_path, count=1)
    labels = np.where(ADE_LABELS == 8, np.uint8(2), ADE_LABELS)  # building where there was bed
    save(root / "annotations/training/ADE_train_00000001.png", labels)
    assert prepare("prepare_ade20k_pan_seg", tmp_path, "--split", "train") == 0
    colors, _ = pixels_of(root / "ade20k_panoptic_train/ADE_train_00000001.png")
    expected = SEGMENTS.copy()
    expected[3, 2:4] = B
    assert (colors.astype(int) @ [1, 256, 65536] == expected).all()


def test_panoptic_without_any_segment(tmp_path):
    root = miniatures.ade20k(tmp_path, count=1)
    save(root / "annotations/training/ADE_train_00000001.png", np.zeros((4, 6), np.uint8))
    save(root / "annotations_instance/training/ADE_train_00000001.png", np.zeros((4, 6, 3), np.uint8))
    assert prepare("prepare_ade20k_pan_seg", tmp_path, "--split", "train") == 0
    [annotation] = json.loads((root / "ade20k_panoptic_train.json").read_text())["annotations"]
    assert annotation["segments_info"] == []
    assert not pixels_of(root / "ade20k_panoptic_train/ADE_train_00000001.png")[0].any()


def test_instances(tmp_path, monkeypatch):
    root = miniatures.ade20k(tmp_path)
    assert prepare("prepare_ade20k_ins_seg", tmp_path) == 0
    content = json.loads((root / "ade20k_instance_val.json").read_text())
    assert [category["id"] + 1 for category in content["categories"]] == SEMANTIC_OF_INSTANCE
    assert content["images"][1] == {"id": 2, "file_name": "ADE_val_00000002.jpg", "height": 4, "width": 6}
    annotations = content["annotations"]
    assert [annotation["id"] for annotation in annotations] == list(range(1, 9))
    assert [annotation["image_id"] for annotation in annotations] == [1] * 4 + [2] * 4
    assert [a["category_id"] for a in annotations[:4]] == [7, 7, 8, 149]
    assert [(a["area"], a["bbox"], a["iscrowd"]) for a in annotations[:4]] == [
        (2, [0, 2, 2, 1], 0),
        (3, [2, 2, 3, 1], 0),
        (4, [4, 0, 2, 2], 0),
        (1, [5, 3, 1, 1], 0),
    ]
    for annotation, number in zip(annotations[4:], (1, 2, 3, 255), strict=True):
        assert (coco_masks.decode(annotation["segmentation"]) == (number == miniatures.ADE_NUMBERS)).all()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    record = catalog.get("ade20k_instance_val").load()[1]
    assert record["image_id"] == 2
    assert [annotation["category_id"] for annotation in record["annotations"]] == [0, 0, 1, 99]


@pytest.mark.parametrize("name", ["prepare_ade20k_pan_seg", "prepare_ade20k_ins_seg"])
@pytest.mark.parametrize(
    ("place", "classes", "number", "message"),
    [
        ((0, 0), 101, 0, "classes (red) must be in 0..100, got 101"),
        ((2, 0), 2, 1, "object 1 (green) must have one class (red), got 1, 2"),
        ((0, 0), 0, 9, "object 9 (green) must have one class (red), got 0"),
    ],
)
def test_wrong_instances_are_named(tmp_path, capsys, name, place, classes, number, message):
    root = miniatures.ade20k(tmp_path)
    pixels = miniatures.ade_instances()
    pixels[place] = classes, number, 0
    file = root / "annotations_instance/training/ADE_train_00000001.png"
    save(file, pixels)
    assert prepare(name, tmp_path) == 1
    errors = capsys.readouterr().err
    assert f"fault: {file}: {message}\n" in errors
    kind = "panoptic" if "pan" in name else "instance"
    assert f"{root}/ade20k_{kind}_train.json is not written because of these faults" in errors
    assert not (root / f"ade20k_{kind}_train.json").exists()
    assert (root / f"ade20k_{kind}_val.json").exists()


def test_instances_of_another_size_are_named(tmp_path, capsys):
    root = miniatures.ade20k(tmp_path)
    for script in ("prepare_ade20k_pan_seg", "prepare_ade20k_ins_seg"):
        file = root / "annotations_instance/training/ADE_train_00000001.png"
        save(file, np.zeros((6, 4, 3), np.uint8))
        assert prepare(script, tmp_path, "--split", "train") == 1
        assert f"fault: {file}: is 4 wide and 6 high, but" in capsys.readouterr().err


def test_images_need_a_number(tmp_path, capsys):
    root = miniatures.ade20k(tmp_path)
    for folder, suffix in (("images", "jpg"), ("annotations_instance", "png")):
        (root / folder / f"training/ADE_train_00000001.{suffix}").rename(root / folder / f"training/living.{suffix}")
    assert prepare("prepare_ade20k_ins_seg", tmp_path, "--split", "train") == 1
    assert "living.jpg: must have a name like ADE_train_00000001" in capsys.readouterr().err
