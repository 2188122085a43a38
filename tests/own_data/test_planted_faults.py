"""Every planted fault is found and named with its file and line, and brings no other."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mask2former.own_data.check import check
from tests.own_data.changes import annotation, cut, edit, levels, paint, polygon, resave, segment, text_edit
from tests.own_data.small import KINDS

# A plant changes the files of a small set; then follow the code of the fault and what its message says.
INSTANCE = {
    "syntax": (
        lambda r: text_edit(r / "instances.json", '"iscrowd": 0', '"iscrowd": zero'),
        "json-syntax",
        "Expecting value",
    ),
    "truncated file": (lambda r: cut(r / "instances.json"), "json-syntax", "no JSON"),
    "no images": (
        lambda r: text_edit(r / "instances.json", '"images"', '"pictures"'),
        "json-structure",
        "list 'images'",
    ),
    "row": (
        lambda r: edit(r / "instances.json", lambda c: c["annotations"].append({"id": 99})),
        "missing-key",
        "no 'image_id'",
    ),
    "image missing": (lambda r: (r / "images/b.png").unlink(), "missing-image", "b.png"),
    "image truncated": (lambda r: cut(r / "images/b.png"), "unreadable-image", "b.png"),
    "image size": (lambda r: resave(r / "images/b.png", lambda p: p[:40]), "image-size-differs", "40x64 .* says 48x64"),
    "image id twice": (
        lambda r: edit(r / "instances.json", lambda c: c["images"].append({**c["images"][0], "file_name": "d.png"})),
        "duplicate-image-id",
        "d.png has the id 1 of a.png",
    ),
    "image file twice": (
        lambda r: edit(r / "instances.json", lambda c: c["images"].append({**c["images"][0], "id": 9})),
        "duplicate-file-name",
        "a.png is listed twice, as image 1 and 9",
    ),
    "height": (
        lambda r: edit(r / "instances.json", lambda c: c["images"][1].update(height=0)),
        "bad-image-size",
        "height 0",
    ),
    "file name": (
        lambda r: edit(r / "instances.json", lambda c: c["images"][1].update(file_name=5)),
        "bad-image-row",
        "got 2 and 5",
    ),
    "annotation id twice": (lambda r: annotation(r, id=1), "duplicate-annotation-id", "id 1 is given to entry 2 too"),
    "unknown image": (lambda r: annotation(r, image_id=77), "unknown-image", "is of image 77"),
    "unknown category": (
        lambda r: annotation(r, category_id=3),
        "unknown-category",
        "category_id 3, which is none of the 2",
    ),
    "category id twice": (
        lambda r: edit(r / "instances.json", lambda c: c["categories"].append({"id": 2, "name": "plum"})),
        "duplicate-category-id",
        "id 2 is given to 'plum' too",
    ),
    "category name twice": (
        lambda r: edit(r / "instances.json", lambda c: c["categories"].append({"id": 3, "name": "pear"})),
        "duplicate-category-name",
        "'pear'",
    ),
    "category name empty": (
        lambda r: edit(r / "instances.json", lambda c: c["categories"].append({"id": 3, "name": " "})),
        "empty-category-name",
        "' '",
    ),
    "category id text": (
        lambda r: edit(r / "instances.json", lambda c: c["categories"].append({"id": "3", "name": "x"})),
        "bad-category-id",
        "'3'",
    ),
    "no categories": (
        lambda r: edit(r / "instances.json", lambda c: c["categories"].clear()),
        "no-categories",
        "empty",
    ),
    "crowd": (lambda r: annotation(r, iscrowd=2), "bad-iscrowd", "iscrowd 2"),
    "no segmentation": (
        lambda r: annotation(r, segmentation=None),
        "bad-segmentation",
        "annotation 3 of b.png: .* got None",
    ),
    "two points": (lambda r: annotation(r, segmentation=polygon(1, 1, 5, 5)), "polygon-too-short", "3 points, got 2"),
    "odd polygon": (
        lambda r: annotation(r, segmentation=polygon(1, 1, 5, 5, 6, 6, 7)),
        "bad-segmentation",
        "even number of coordinates, got 7",
    ),
    "nan": (
        lambda r: annotation(r, segmentation=polygon(1, 1, 5, 5, 6, float("nan"))),
        "bad-segmentation",
        "finite numbers",
    ),
    "polygon outside": (
        lambda r: annotation(r, segmentation=polygon(70, 1, 90, 1, 90, 20)),
        "polygon-outside",
        "outside the image of 48x64",
    ),
    "rle size": (
        lambda r: annotation(r, segmentation={"size": [64, 48], "counts": [0, 3072]}),
        "rle-size-differs",
        "size 64x48 .* image 48x64",
    ),
    "rle counts": (
        lambda r: annotation(r, segmentation={"size": [48, 64], "counts": [5, 10]}),
        "bad-rle-counts",
        "add up to 3072 pixels, got 15",
    ),
    "rle text": (
        lambda r: annotation(r, segmentation={"size": [48, 64], "counts": "1\t"}),
        "bad-rle-counts",
        "damaged",
    ),
    "empty mask": (
        lambda r: annotation(r, segmentation={"size": [48, 64], "counts": [3072]}),
        "empty-mask",
        "annotation 3 .* covers no pixel",
    ),
    "empty list": (lambda r: annotation(r, segmentation=[]), "empty-mask", "list of polygons is empty"),
    "bbox of three": (lambda r: annotation(r, bbox=[1, 2, 3]), "bad-bbox", "list of four numbers"),
    "bbox negative": (lambda r: annotation(r, bbox=[5, 5, -12, 12]), "bad-bbox", "must be above 0"),
    "bbox outside": (lambda r: annotation(r, bbox=[5, 5, 100, 12]), "bad-bbox", "beyond the image"),
    "bbox wrong": (lambda r: annotation(r, bbox=[5, 5, 20, 12]), "bbox-differs", r"its mask has \[5, 5, 12, 12\]"),
    "no bbox": (
        lambda r: edit(r / "instances.json", lambda c: c["annotations"][2].pop("bbox")),
        "missing-key",
        "no 'bbox'",
    ),
    "area zero": (lambda r: annotation(r, area=0), "bad-area", "area 0"),
    "area wrong": (lambda r: annotation(r, area=500), "area-differs", "area 500, but its mask covers 144"),
    "folder": (lambda r: shutil.rmtree(r / "images"), "missing-path", "no such file or folder"),
}


def duplicate_mask(root):
    edit(root / "instances.json", lambda c: c["annotations"].append({**c["annotations"][2], "id": 50}))


INSTANCE["mask twice"] = (duplicate_mask, "duplicate-mask", "annotation 50 of b.png has the same mask as annotation 3")


def second_segment(content):
    content["annotations"][1]["segments_info"].append({**content["annotations"][1]["segments_info"][0]})


PANOPTIC = {
    "png missing": (lambda r: (r / "png/b.png").unlink(), "missing-png", "no panoptic PNG .*b.png"),
    "png truncated": (lambda r: cut(r / "png/b.png", 60), "unreadable-png", "b.png"),
    "png size": (
        lambda r: resave(r / "png/b.png", lambda p: p[:, :60]),
        "png-size-differs",
        "48x60 .* its image 48x64",
    ),
    "not in json": (lambda r: paint(r, 70000), "segment-not-in-json", r"segment 70000 .* \(5 pixels\)"),
    "not in png": (lambda r: segment(r, id=299), "segment-not-in-png", "segment 299 of b.png has no pixel"),
    "listed twice": (
        lambda r: edit(r / "panoptic.json", second_segment),
        "duplicate-segment-id",
        "segment 300 of b.png is listed twice",
    ),
    "void id": (lambda r: segment(r, id=0), "bad-segment-id", "0 is void"),
    "id text": (lambda r: segment(r, id="300"), "bad-segment-id", "whole number"),
    "category": (lambda r: segment(r, category_id=4), "unknown-category", "segment 300 of b.png has category_id 4"),
    "area": (lambda r: segment(r, area=143), "area-differs", "area 143, but 144 pixels"),
    "bbox": (lambda r: segment(r, bbox=[5, 5, 15, 12]), "bbox-differs", r"\[5, 5, 12, 12\] in the PNG"),
    "crowd": (lambda r: segment(r, iscrowd="no"), "bad-iscrowd", "iscrowd 'no'"),
    "isthing": (
        lambda r: edit(r / "panoptic.json", lambda c: c["categories"][0].update(isthing=2)),
        "bad-isthing",
        "isthing 2",
    ),
    "isthing missing": (
        lambda r: edit(r / "panoptic.json", lambda c: c["categories"][0].pop("isthing")),
        "missing-key",
        "no 'isthing'",
    ),
    "annotation twice": (
        lambda r: edit(r / "panoptic.json", lambda c: c["annotations"].append({**c["annotations"][0]})),
        "duplicate-annotation",
        "a.png has a second",
    ),
    "no segments": (
        lambda r: edit(r / "panoptic.json", lambda c: c["annotations"][0].pop("segments_info")),
        "missing-key",
        "segments_info",
    ),
}

SEMANTIC = {
    "label map missing": (lambda r: (r / "labels/b.png").unlink(), "missing-label-map", "no label map"),
    "image missing": (lambda r: (r / "images/b.jpg").unlink(), "missing-image", "no image"),
    "truncated": (lambda r: cut(r / "labels/b.png", 60), "unreadable-label-map", "b.png"),
    "colours": (
        lambda r: resave(r / "labels/b.png", lambda p: np.stack([p] * 3, 2)),
        "unreadable-label-map",
        "one channel",
    ),
    "size": (
        lambda r: resave(r / "labels/b.png", lambda p: p.T.copy()),
        "label-map-size-differs",
        "64x48 .* its image 48x64",
    ),
    "label": (
        lambda r: resave(r / "labels/b.png", lambda p: np.where(p == 2, 3, p).astype(np.uint16)),
        "label-out-of-range",
        r"below 3, .* got 3 \(81 pixels\)",
    ),
    "two images": (
        lambda r: shutil.copy(r / "images/b.jpg", r / "images/b.jpeg"),
        "ambiguous-name",
        "differ only in their suffix",
    ),
}

MASKS = "sets/b/masks"
OBJECT_MASKS = {
    "no image": (lambda r: (r / "sets/b/images/b.png").unlink(), "missing-image", "no image"),
    "two images": (
        lambda r: shutil.copy(r / "sets/b/images/b.png", r / "sets/b/images/c.png"),
        "ambiguous-name",
        "b.png, c.png",
    ),
    "truncated": (lambda r: cut(r / MASKS / "pear/2.png", 60), "unreadable-mask", "2.png"),
    "size": (
        lambda r: resave(r / MASKS / "pear/2.png", lambda p: p[1:]),
        "mask-size-differs",
        "47x64 .* its image 48x64",
    ),
    "empty": (lambda r: resave(r / MASKS / "pear/2.png", np.zeros_like), "empty-mask", "no pixel"),
    "twice": (
        lambda r: shutil.copy(r / MASKS / "pear/2.png", r / MASKS / "pear/9.png"),
        "duplicate-mask",
        "9.png has the same mask as 2.png",
    ),
    "no class": (lambda r: shutil.copy(r / MASKS / "pear/2.png", r / MASKS / "9.png"), "unknown-category", "got None"),
}

PLANTS = [
    pytest.param(kind, *plant, id=f"{kind}-{name}")
    for kind, plants in {
        "instance": INSTANCE,
        "panoptic": PANOPTIC,
        "semantic": SEMANTIC,
        "object_masks": OBJECT_MASKS,
    }.items()
    for name, plant in plants.items()
]


def test_there_are_enough_faults():
    assert len(PLANTS) >= 25
    assert len({plant.values[2] for plant in PLANTS}) >= 25


@pytest.mark.parametrize(("kind", "plant", "code", "message"), PLANTS)
def test_a_planted_fault_is_found_and_named(kind, plant, code, message, tmp_path):
    source = KINDS[kind](tmp_path)
    plant(tmp_path)
    found = [finding for finding in check(source, processes=1).findings if finding.level == "fault"]
    named = [finding for finding in found if finding.code == code]
    assert named, found
    assert any(re.search(message, finding.message) for finding in named), named
    for finding in named:
        assert Path(finding.file).is_relative_to(tmp_path)
        is_in_json = finding.file.endswith(".json") and code != "missing-path"
        assert (finding.position is not None) == is_in_json


# what a fault brings along in other places
ALSO = {
    "json-structure": {"unknown-image"},
    "bad-image-size": {"unknown-image"},
    "bad-image-row": {"unknown-image"},
    "no-categories": {"unknown-category"},
    "segment-not-in-png": {"segment-not-in-json"},
    "unknown-category": {"duplicate-mask"},
    "bad-segment-id": {"segment-not-in-png", "segment-not-in-json"},
}


@pytest.mark.parametrize(("kind", "plant", "code", "message"), PLANTS)
def test_nothing_else_is_called_a_fault(kind, plant, code, message, tmp_path):
    source = KINDS[kind](tmp_path)
    plant(tmp_path)
    assert set(levels(check(source, processes=1))) <= {code} | ALSO.get(code, set())


def test_the_line_is_that_of_the_annotation(tmp_path):
    source = KINDS["instance"](tmp_path)
    annotation(tmp_path, iscrowd=2)
    (finding,) = [f for f in check(source, processes=1).findings if f.level == "fault"]
    line = (tmp_path / "instances.json").read_text().splitlines()[finding.position.line - 1]
    assert json.loads(line.rstrip(","))["iscrowd"] == 2
    assert finding.where() == f"{tmp_path / 'instances.json'}:{finding.position.line}:1"


def test_the_line_of_a_syntax_error(tmp_path):
    source = KINDS["instance"](tmp_path)
    lines = (tmp_path / "instances.json").read_text().splitlines()
    lines[6] = lines[6].replace('"iscrowd"', "iscrowd")
    (tmp_path / "instances.json").write_text("\n".join(lines))
    (finding,) = check(source, processes=1).findings
    assert (finding.code, finding.position.line) == ("json-syntax", 7)
    assert lines[6][finding.position.column - 1 :].startswith("iscrowd")
