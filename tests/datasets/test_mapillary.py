"""Mapillary Vistas' instance annotations, checked pixel by pixel and through the catalog."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from mask2former.data import catalog
from tests.datasets import miniatures
from tests.datasets.miniatures import MAPILLARY_IDS, prepare, save, segment_colors

SCRIPT = "prepare_mapillary_vistas_ins_seg"


def test_instances(tmp_path, monkeypatch):
    root = miniatures.mapillary(tmp_path)
    assert prepare(SCRIPT, tmp_path) == 0
    content = json.loads((root / "mapillary_vistas_instance_val.json").read_text())
    assert content["images"] == [
        {"id": name, "file_name": f"{name}.jpg", "height": 4, "width": 6} for name in ("a", "b")
    ]
    assert len(content["categories"]) == 37
    keys = ("id", "image_id", "category_id", "area", "bbox", "iscrowd")
    assert [[annotation[key] for key in keys] for annotation in content["annotations"]] == [
        [1, "a", 56, 3, [0, 0, 2, 2], 0],
        [2, "a", 56, 4, [4, 2, 2, 2], 1],
        [3, "b", 56, 3, [0, 0, 2, 2], 0],
        [4, "b", 56, 4, [4, 2, 2, 2], 1],
    ]
    for annotation, segment in zip(content["annotations"], (56, 57, 56, 57), strict=True):
        assert (coco_masks.decode(annotation["segmentation"]) == (256 * segment == MAPILLARY_IDS)).all()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    record = catalog.get("mapillary_vistas_instance_val").load()[0]
    assert record["file_name"] == str(root / "validation/images/a.jpg")
    things = [category.name for category in catalog.get("mapillary_vistas_instance_val").metadata.categories]
    assert [things[annotation["category_id"]] for annotation in record["annotations"]] == ["Car", "Car"]
    panoptic = catalog.get("mapillary_vistas_panoptic_val").metadata
    assert panoptic.panoptic_json == root / "validation/panoptic/panoptic_2018.json"


def test_wrong_files_are_named(tmp_path, capsys):
    root = miniatures.mapillary(tmp_path)
    (root / "training/images/a.jpg").unlink()
    save(root / "training/panoptic/b.png", segment_colors(MAPILLARY_IDS.T))
    save(root / "validation/panoptic/a.png", segment_colors(np.where(MAPILLARY_IDS == 66, 0, MAPILLARY_IDS)))
    assert prepare(SCRIPT, tmp_path) == 1
    errors = capsys.readouterr().err
    assert errors.count("fault: ") == 3
    assert f"fault: {root}/training/images/a.jpg: there is no such file\n" in errors
    assert f"fault: {root}/training/panoptic/b.png: is 4 wide and 6 high, but" in errors
    assert f"fault: {root}/validation/panoptic/a.png: has no pixel of segments that" in errors
    assert not list(root.glob("*.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(55), "is not of v1.2: categories 56 are missing"),
        (lambda rows: rows[13].update(isthing=1), "is not of v1.2: categories 14 are missing, or things instead of"),
    ],
)
def test_other_versions_are_refused(tmp_path, capsys, change, message):
    root = miniatures.mapillary(tmp_path)
    file = root / "training/panoptic/panoptic_2018.json"
    content = json.loads(file.read_text())
    change(content["categories"])
    file.write_text(json.dumps(content))
    assert prepare(SCRIPT, tmp_path, "--split", "train") == 1
    assert f"fault: {file}: {message}" in capsys.readouterr().err
