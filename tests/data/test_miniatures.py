"""The miniatures are what the data sets' own programs make or take."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import miniatures


@pytest.mark.parametrize("script", ["createTrainIdLabelImgs", "createPanopticImgs"])
def test_derived_files_of_cityscapes_are_those_of_its_own_scripts(tmp_path, script):
    pytest.importorskip("cityscapesscripts", reason="cityscapesScripts is not installed")
    raw, whole = tmp_path / "raw", tmp_path / "whole"
    miniatures.cityscapes(raw, derived=False)
    miniatures.cityscapes(whole)
    command = [sys.executable, "-m", f"cityscapesscripts.preparation.{script}"]
    if script == "createPanopticImgs":
        command += ["--dataset-folder", str(raw / "cityscapes/gtFine"), "--set-names", "train", "val"]
    environment = {"CITYSCAPES_DATASET": str(raw / "cityscapes"), "PATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=120)
    pattern = "**/*_labelTrainIds.png" if script == "createTrainIdLabelImgs" else "**/*_panoptic.png"
    made = sorted(path.relative_to(raw) for path in raw.glob(pattern))
    assert len(made) == 4
    assert made == sorted(path.relative_to(whole) for path in whole.glob(pattern))
    for path in made:
        np.testing.assert_array_equal(np.asarray(Image.open(raw / path)), np.asarray(Image.open(whole / path)))
    if script == "createPanopticImgs":
        for half in ("train", "val"):
            file = f"cityscapes/gtFine/cityscapes_panoptic_{half}.json"
            theirs, ours = (json.loads((root / file).read_text()) for root in (raw, whole))
            assert in_any_order(theirs["annotations"]) == in_any_order(ours["annotations"])
            assert theirs["images"] == ours["images"]


def in_any_order(annotations):
    """Segments in the order of their ids, without the fields that only ours or theirs have."""
    keys = ("id", "category_id", "area", "bbox", "iscrowd")
    return [
        row | {"segments_info": sorted(tuple(map(str, (s[k] for k in keys))) for s in row["segments_info"])}
        for row in annotations
    ]


def test_lvis_files_are_read_by_its_own_package(tmp_path):
    lvis = pytest.importorskip("lvis", reason="lvis is not installed")
    scenes = miniatures.lvis(tmp_path)
    truth = lvis.LVIS(str(tmp_path / "lvis" / "lvis_v1_val.json"))
    for scene in scenes["val"]:
        annotations = truth.load_anns(truth.get_ann_ids(img_ids=[int(scene.name)]))
        masks = [truth.ann_to_mask(annotation).astype(bool) for annotation in annotations]
        for mask, region in zip(masks, scene.objects, strict=True):
            np.testing.assert_array_equal(mask, scene.mask(region))


def test_pictures_differ_from_each_other_and_leave_something_unlabelled(tmp_path):
    scenes = miniatures.ade20k_raw(tmp_path)
    every = [*scenes["train"], *scenes["val"]]
    assert len({scene.regions for scene in every}) == len({scene.size for scene in every}) == 4
    for scene in every:
        assert (scene.index == -1).sum() > 50
        assert len(scene.objects) == 3
        covered = [scene.mask(region).sum() for region in scene.objects]
        assert covered == [(r[2] - r[0]) * (r[3] - r[1]) for r in (region.box for region in scene.objects)]


def test_ade20k_raw_and_prepared_show_the_same(tmp_path):
    raw, prepared = miniatures.ade20k_raw(tmp_path / "a"), miniatures.ade20k_prepared(tmp_path / "b")
    assert raw == prepared
    for half, folder in (("train", "training"), ("val", "validation")):
        for scene in raw[half]:
            end = f"{folder}/{scene.name}.png"
            with_zero = np.asarray(Image.open(tmp_path / "a/ADEChallengeData2016/annotations" / end)).astype(int)
            labels = np.asarray(Image.open(tmp_path / "b/ADEChallengeData2016/annotations_detectron2" / end))
            np.testing.assert_array_equal(np.where(with_zero == 0, 255, with_zero - 1), labels)
