"""What a check says of data without faults, of doubtful ones, and of real ones; the command around it."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mask2former.__main__ import main
from mask2former.own_data.check import check, class_counts, compare
from mask2former.own_data.report import report_dict, report_lines
from mask2former.own_data.source import Source
from tests.own_data.changes import annotation, edit, levels, parts_of, polygon, replaced, resave, segment
from tests.own_data.small import CATEGORIES, KINDS, NAMES
from tests.own_data.test_commands import flags

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "datasets/sample"


@pytest.mark.parametrize("kind", KINDS)
def test_data_without_faults_have_none(kind, tmp_path):
    checked = check(KINDS[kind](tmp_path), processes=1)
    assert levels(checked) == levels(checked, "warning") == []
    assert len(checked.scans) == 3


# ---- warnings and notes


def codes_of(checked, level):
    return set(levels(checked, level))


def test_images_without_objects_and_classes_without_images_are_warnings(tmp_path):
    source = KINDS["instance"](tmp_path)
    edit(tmp_path / "instances.json", lambda c: c.update(annotations=c["annotations"][:1]))
    checked = check(source, processes=1)
    assert levels(checked, "warning") == ["no-objects", "no-objects", "unused-category"]
    assert levels(checked) == []


def test_labels_counted_from_one_are_suspected(tmp_path):
    source = KINDS["semantic"](tmp_path)
    for name in NAMES:
        resave(tmp_path / f"labels/{name}.png", lambda p: np.where(p < 2, p + 1, p).astype(np.uint8))
    checked = check(source, processes=1)
    assert codes_of(checked, "warning") == {"unused-category", "no-label-zero"}
    assert check(replace(source, ignore_label=0), processes=1).faults != []  # 255 is now out of range


def test_the_ignored_label_may_be_a_class_which_is_said(tmp_path):
    source = KINDS["semantic"](tmp_path)
    for name in NAMES:
        resave(tmp_path / f"labels/{name}.png", lambda p: np.where(p == 255, 0, p).astype(np.uint8))
    checked = check(replace(source, ignore_label=0), processes=1)
    assert (levels(checked), codes_of(checked, "note")) == ([], {"ignored-class"})
    assert [scan.unlabelled for scan in checked.scans] == [3072 - 80 - 320, 3072 - 344 - 81, 3072 - 1200]


def test_overlaps_are_noted_or_forbidden(tmp_path):
    source = KINDS["instance"](tmp_path)
    row = {"id": 60, "image_id": 2, "category_id": 1, "iscrowd": 0, "area": 100, "bbox": [10, 10, 10, 10]}
    row["segmentation"] = polygon(10, 10, 20, 10, 20, 20, 10, 20)  # shares 7 x 7 pixels with annotation 3
    edit(tmp_path / "instances.json", lambda c: c["annotations"].append(row))
    checked = check(source, processes=1)
    assert (levels(checked), levels(checked, "note")) == ([], ["overlapping-masks"])
    (finding,) = check(source, processes=1, forbids_overlaps=True).faults
    assert "annotation 3 of b.png and annotation 60 of b.png share 49 pixels" in finding.message
    edit(tmp_path / "instances.json", lambda c: c["annotations"][-1].update(iscrowd=1))
    assert check(source, processes=1, forbids_overlaps=True).faults == []  # crowds lie over others


def test_several_objects_in_a_mask_are_suspected(tmp_path):
    source = KINDS["object_masks"](tmp_path)
    resave(tmp_path / "sets/b/masks/pear/2.png", lambda p: p // 255 * np.arange(1, 65, dtype=np.uint8))
    assert codes_of(check(source, processes=1), "warning") == {"mask-not-binary"}


def test_stuff_in_several_segments_and_gaps_in_the_ids(tmp_path):
    source = KINDS["panoptic"](tmp_path)
    assert codes_of(check(source, processes=1), "note") == {"category-id-gaps"}
    segment(tmp_path, category_id=5)
    assert codes_of(check(source, processes=1), "warning") == {"stuff-in-several-segments"}


def test_polygons_that_are_cut_off_at_the_edge(tmp_path):
    source = KINDS["instance"](tmp_path)
    annotation(tmp_path, segmentation=polygon(5, 5, 17, 5, 17, 17, 5, 17, -4, 11), bbox=[0, 5, 17, 12], area=170)
    checked = check(source, processes=1)
    assert (levels(checked), levels(checked, "warning")) == ([], ["polygon-beyond-edge"])
    assert "reaches 4.0 pixels beyond" in checked.findings[-1].message


def test_images_that_nothing_refers_to(tmp_path):
    source = KINDS["instance"](tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/other.png")
    assert codes_of(check(source, processes=1), "note") == {"unlisted-images"}


def test_the_same_picture_under_two_names_and_in_both_sets(tmp_path):
    source, other = KINDS["semantic"](tmp_path / "t"), KINDS["semantic"](tmp_path / "v")
    Image.open(tmp_path / "v/images/a.jpg").save(tmp_path / "v/images/c.png")  # the same pixels, another format
    (tmp_path / "v/images/c.jpg").unlink()
    train, val = (check(s, n, processes=1) for s, n in ((source, "train"), (other, "val")))
    assert codes_of(train, "warning") == set()
    assert codes_of(val, "warning") == {"same-image-twice"}
    together = compare(train, val)
    assert [(f.code, Path(f.file).name) for f in together] == [
        ("image-in-both-sets", "a.jpg"),
        ("image-in-both-sets", "b.jpg"),
        ("image-in-both-sets", "c.png"),
    ]


def test_sets_with_other_classes_do_not_belong_together(tmp_path):
    source = KINDS["semantic"](tmp_path)
    train, val = (
        check(source, "train", processes=1),
        check(replace(source, classes=("a", "b", "c")), "val", processes=1),
    )
    assert [f.code for f in compare(train, val) if f.level == "fault"] == ["classes-differ"]


def test_panoptic_data_with_instances_and_label_maps_are_checked_in_all_of_them(tmp_path):
    source = KINDS["panoptic"](tmp_path)
    instance, labels = KINDS["instance"](tmp_path), KINDS["semantic"](tmp_path)
    both = replace(source, coco_json=instance.coco_json, semantic_masks=labels.semantic_masks)
    assert check(both, processes=1).faults == []
    annotation(tmp_path, area=0)
    resave(tmp_path / "labels/b.png", lambda p: p + 3)
    checked = check(both, processes=1)
    assert sorted(levels(checked)) == ["bad-area", "label-out-of-range"]
    assert [count.objects for count in class_counts(checked)] == [3, 3, 3]


def test_counts_of_the_classes(tmp_path):
    counts = class_counts(check(KINDS["instance"](tmp_path), processes=1))
    assert [(c.objects, c.images, c.pixels) for c in counts] == [(3, 2, 80 + 144 + 200), (3, 3, 320 + 81 + 1200)]
    semantic = check(KINDS["semantic"](tmp_path / "s"), processes=1)
    assert [c.images for c in class_counts(semantic)] == [3, 2, 3]
    assert sum(scan.unlabelled for scan in semantic.scans) == 3 * 16


@pytest.mark.slow
def test_several_processes_find_the_same(tmp_path):
    source = KINDS["instance"](tmp_path)
    rows = [{"id": n, "file_name": f"{n}.png", "height": 48, "width": 64} for n in range(100, 170)]
    edit(tmp_path / "instances.json", lambda c: c["images"].extend(rows))
    one, two = check(source, processes=1), check(source, processes=2)
    assert one.findings == two.findings
    assert levels(one).count("missing-image") == 70


def test_no_value_in_a_file_makes_the_check_fail(tmp_path):
    """Each value of a row of each list is replaced by odd ones."""
    odd = [None, [], {}, "x", -1, 1e300, True, [None], {"size": 1}, [[1, 2, 3]]]
    for kind, file in (("instance", "instances.json"), ("panoptic", "panoptic.json")):
        source = KINDS[kind](tmp_path)
        original = json.loads((tmp_path / file).read_text())
        for place, _ in list(parts_of(original)):
            if len([step for step in place if isinstance(step, int)]) > 1 and place[-1] not in CATEGORIES[0]:
                continue
            if place and any(isinstance(step, int) and step > 0 for step in place):
                continue
            for value in odd[len(place) % 2 :: 2]:
                content = json.loads(json.dumps(original))
                (tmp_path / file).write_text(json.dumps(replaced(content, place, value)))
                found = check(source, processes=1, at_most=1).findings
                assert all(finding.position for finding in found if finding.file.endswith(".json"))


# ---- the command


def test_the_command_prints_writes_and_exits_by_what_it_found(tmp_path, capsys):
    source = KINDS["instance"](tmp_path)
    words = ["data", "check", *flags(source), "--processes", "1", "--json", str(tmp_path / "report.json")]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "3 images of 48x64 pixels" in text
    assert "0 faults, 0 warnings, 0 notes" in text
    (tmp_path / "images/c.png").unlink()
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "fault missing-image (1)" in text
    report = json.loads((tmp_path / "report.json").read_text())
    (finding,) = report["sets"][0]["findings"]
    assert (finding["code"], finding["level"]) == ("missing-image", "fault")
    assert f"{finding['file']}:{finding['line']}:1: there is no image" in text
    assert (
        report["sets"][0]["classes"][1] | {"id": 2, "name": "pear", "objects": 3, "images": 3}
        == report["sets"][0]["classes"][1]
    )


def test_warnings_are_no_failure_and_both_sets_are_compared(tmp_path, capsys):
    train, val = KINDS["semantic"](tmp_path / "t"), KINDS["semantic"](tmp_path / "v")
    words = ["--train", *flags(train), "--val", "--images", val.images, "--semantic-masks", val.semantic_masks]
    assert main(["data", "check", *words, "--processes", "1"]) == 0
    assert "warning image-in-both-sets (3)" in capsys.readouterr().out


def test_long_lists_are_cut_in_the_text_only(tmp_path):
    source = KINDS["instance"](tmp_path)
    rows = [{"id": n, "file_name": f"{n}.png", "height": 48, "width": 64} for n in range(100, 125)]
    edit(tmp_path / "instances.json", lambda c: c["images"].extend(rows))
    checked = check(source, processes=1)
    text = "\n".join(report_lines([checked], []))
    assert "fault missing-image (25)" in text
    assert text.count("there is no image") == 10
    assert "... and 15 more" in text
    assert len(report_dict([checked], [])["sets"][0]["findings"]) == 50  # also a warning each: no object


# ---- real data


def coco_source(root, split):
    return Source(
        panoptic_json=str(root / f"annotations/panoptic_{split}2017.json"),
        panoptic_png=str(root / f"panoptic_{split}2017"),
        images=str(root / f"{split}2017"),
        coco_json=str(root / f"annotations/instances_{split}2017.json"),
        semantic_masks=str(root / f"panoptic_semseg_{split}2017"),
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_sample_set_has_no_fault(split):
    checked = check(coco_source(SAMPLE, split), processes=1)
    assert checked.faults == []
    assert len(checked.scans) == {"train": 26, "val": 27}[split]


REAL = {
    "coco_panoptic_mini": coco_source,
    "camvid": lambda root, split: Source(
        semantic_masks=str(root / f"labels/{split}"),
        images=str(root / f"images/{split}"),
        classes=str(root / "classes.json"),
    ),
    "nuclei_dsb2018": lambda root, split: Source(
        coco_json=str(root / f"annotations/instances_{split}.json"), images=str(root / f"images/{split}")
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("name", REAL)
def test_real_data_have_no_fault(name, split):
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / name
    if not root.is_dir():
        pytest.skip(f"{root} is not there")
    checked = check(REAL[name](root, split))
    assert checked.faults == []
    assert len(checked.scans) > 0


# ---- the document


def test_the_document_lists_every_code_under_its_level():
    """Codes are looked up in the sources, so that none is forgotten."""
    folder = ROOT / "mask2former/own_data"
    sources = [*(folder / "checks").glob("*.py"), folder / "check.py"]
    used = {code for file in sources for code in re.findall(r'"([a-z]+(?:-[a-z]+)+)"', file.read_text("utf-8"))}
    text = (ROOT / "docs/custom_dataset.md").read_text("utf-8")
    cells = re.findall(r"^\| ((?:`[a-z-]+`(?:, )?)+) \|", text, re.M)
    listed = {code for cell in cells for code in re.findall(r"`([a-z]+(?:-[a-z]+)+)`", cell)}
    assert used == listed
