"""Names, lazy loading, errors of the catalog; the sample set in the repository."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mask2former.data import catalog, coco_datasets, read_image, read_label_map, read_panoptic_colors
from mask2former.data.catalog import CatalogEntry, Category, DatasetMetadata
from mask2former.data.targets import panoptic_segments

SAMPLE = Path(__file__).parents[2] / "datasets" / "sample"


def test_all_published_and_small_names_are_there():
    halves = ("train", "val")
    expected = {f"coco_2017_{s}{k}" for s in halves for k in ("", "_panoptic", "_panoptic_with_sem_seg")}
    kinds = ("", "_panoptic_with_sem_seg", "_sem_seg")
    expected |= {f"coco_mini_{s}{k}" for s in (*halves, "train16") for k in kinds}
    expected |= {f"coco_sample_{s}{k}" for s in (*halves, "train8") for k in kinds}
    assert expected <= set(catalog.names())


def test_category_table():
    categories = coco_datasets.coco_panoptic_categories()
    assert len(categories) == 133
    assert [c.is_thing for c in categories] == [True] * 80 + [False] * 53
    assert len({c.id for c in categories}) == len({c.name for c in categories}) == 133
    assert len({c.color for c in categories}) == 133
    assert all(isinstance(c.color, tuple) and all(0 <= v <= 255 for v in c.color) for c in categories)
    assert coco_datasets.coco_instance_categories() == categories[:80]
    assert (categories[0].name, categories[79].name, categories[80].id) == ("person", "toothbrush", 92)


def test_table_is_the_one_in_the_annotation_files():
    rows = json.loads((SAMPLE / "annotations" / "panoptic_val2017.json").read_text())["categories"]
    table = [(c.id, c.name, c.is_thing) for c in coco_datasets.coco_panoptic_categories()]
    assert table == [(row["id"], row["name"], bool(row["isthing"])) for row in rows]


@pytest.mark.parametrize(
    ("suffix", "evaluator_type", "num_classes", "paths"),
    [
        ("", "coco", 80, ["image_root", "instances_json"]),
        ("_panoptic", "coco_panoptic_seg", 133,
         ["image_root", "instances_json", "panoptic_json", "panoptic_root"]),
        ("_panoptic_with_sem_seg", "coco_panoptic_seg", 133,
         ["image_root", "instances_json", "panoptic_json", "panoptic_root", "sem_seg_root"]),
    ],
)  # fmt: skip
def test_metadata_follows_the_environment(monkeypatch, suffix, evaluator_type, num_classes, paths):
    for root in ("somewhere", "elsewhere"):
        monkeypatch.setenv("DETECTRON2_DATASETS", root)
        metadata = catalog.get(f"coco_2017_val{suffix}").metadata
        assert metadata.evaluator_type == evaluator_type
        assert metadata.num_classes == num_classes
        every = ("image_root", "instances_json", "panoptic_json", "panoptic_root", "sem_seg_root")
        given = [name for name in every if getattr(metadata, name) is not None]
        assert given == paths
        assert all(getattr(metadata, name).is_relative_to(Path(root) / "coco") for name in given)


def test_default_root(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert catalog.get("coco_2017_train").metadata.image_root == Path("datasets/coco/train2017")


def test_contiguous_ids():
    lookup = catalog.get("coco_2017_val").metadata.contiguous_ids
    assert (lookup[1], lookup[90], len(lookup)) == (0, 79, 80)


def test_missing_data_set_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name in catalog.names():
        if name.startswith(("coco_2017", "coco_mini")):
            with pytest.raises(FileNotFoundError, match=rf"'{name}' needs .*DETECTRON2_DATASETS.*README"):
                catalog.get(name).load()


def test_missing_semantic_folder_is_named(monkeypatch, tmp_path):
    root = tmp_path / "coco"
    for part in ("train2017", "panoptic_train2017", "annotations"):
        (root / part).mkdir(parents=True)
    for kind in ("panoptic", "instances"):
        content = {"images": [], "annotations": []}
        (root / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert catalog.get("coco_2017_train").load() == []
    assert catalog.get("coco_2017_train_panoptic").load() == []
    with pytest.raises(FileNotFoundError, match="panoptic_semseg_train2017"):
        catalog.get("coco_2017_train_panoptic_with_sem_seg").load()


def test_unknown_name_lists_similar_ones():
    with pytest.raises(KeyError, match="'coco_2017_trian'; similar names: coco_2017_train,"):
        catalog.get("coco_2017_trian")
    with pytest.raises(KeyError, match=r"known names: .*coco_sample_val"):
        catalog.get("?")


def test_register_refuses_a_different_entry(monkeypatch):
    monkeypatch.setattr(catalog, "_entries", {})
    metadata = DatasetMetadata(categories=(Category(7, "cell", True, (1, 2, 3)),), evaluator_type="coco")
    entry = CatalogEntry("cells", list, metadata)
    catalog.register(entry)
    catalog.register(CatalogEntry("cells", list, metadata))
    assert catalog.get("cells") is entry
    assert "cells" in catalog.names()
    with pytest.raises(ValueError, match="'cells'"):
        catalog.register(CatalogEntry("cells", dict, metadata))
    with pytest.raises(ValueError, match="'coco_2017_val'"):
        catalog.register(CatalogEntry("coco_2017_val", list, metadata))
    with pytest.raises(ValueError, match="'coco_2017_val'"):
        catalog.register_lazily("coco_2017_val", lambda: entry)


def write_mini(root, num_images):
    """A set in COCO's layout without pixels; image ids fall in the panoptic file, so that order matters."""
    ids = list(range(num_images, 0, -1))
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 6} for i in ids]
    panoptic = [{"image_id": i, "file_name": f"{i}.png", "segments_info": []} for i in ids]
    for folder in ("annotations", "train2017", "panoptic_train2017", "panoptic_semseg_train2017"):
        (root / folder).mkdir(parents=True)
    for kind, annotations in (("panoptic", panoptic), ("instances", [])):
        file = root / "annotations" / f"{kind}_train2017.json"
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    return ids


def test_train16_is_the_first_16_images_of_the_panoptic_file(monkeypatch, tmp_path):
    ids = write_mini(tmp_path / "coco_panoptic_mini", 20)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for suffix in ("", "_panoptic_with_sem_seg", "_sem_seg"):
        records = catalog.get(f"coco_mini_train16{suffix}").load()
        assert [record["image_id"] for record in records] == ids[:16]
        assert len(catalog.get(f"coco_mini_train{suffix}").load()) == 20


@pytest.mark.parametrize(("split", "size"), [("train", 26), ("val", 27)])
def test_sample_set_is_complete(split, size):
    instances = catalog.get(f"coco_sample_{split}").load()
    panoptic = catalog.get(f"coco_sample_{split}_panoptic_with_sem_seg").load()
    semantic = catalog.get(f"coco_sample_{split}_sem_seg").load()
    assert len(instances) == len(panoptic) == len(semantic) == size
    assert {r["image_id"] for r in instances} == {r["image_id"] for r in panoptic}
    assert [r["sem_seg_file_name"] for r in semantic] == [r["sem_seg_file_name"] for r in panoptic]
    assert not any("segments_info" in r or "pan_seg_file_name" in r for r in semantic)
    assert sum(len(r["annotations"]) for r in instances) == sum(
        segment["isthing"] for r in panoptic for segment in r["segments_info"]
    )
    for record in panoptic:
        assert read_image(record["file_name"]).shape == (record["height"], record["width"], 3)
        file = record["pan_seg_file_name"]
        segments = panoptic_segments(read_panoptic_colors(file), record["segments_info"], 133, file)
        np.testing.assert_array_equal(segments.label_map(255), read_label_map(record["sem_seg_file_name"]))


def test_sample_set_has_a_credit_for_each_photo_and_stays_small():
    with (SAMPLE / "CREDITS.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    photos = {f"{p.parent.name}/{p.name}" for p in SAMPLE.glob("*2017/*.jpg")}
    assert {row["file"] for row in rows} == photos
    assert len(rows) == len(photos) == 53
    free = {"Attribution License", "Attribution-ShareAlike License", "No known copyright restrictions"}
    assert {row["licence"] for row in rows} <= free
    assert all(row["photo"].startswith("http") and row["credit"] for row in rows)
    assert sum(p.stat().st_size for p in SAMPLE.rglob("*") if p.is_file()) < 12_000_000


def test_sample_set_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(coco_datasets, "_CHECKOUT_SAMPLE", tmp_path / "no_checkout")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert catalog.get("coco_sample_val").metadata.image_root == tmp_path / "sample" / "val2017"
