"""Every data set from a miniature in its real layout: records, targets, metadata, what is missing."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mask2former.data import SegmentationMapper, catalog, filter_empty
from mask2former.data.geometry import View
from mask2former.data.records import XYWH_ABS
from tests import miniatures

WRITERS = {
    "ade20k_sem_seg": miniatures.ade20k_prepared,
    "ade20k_panoptic": miniatures.ade20k_prepared,
    "ade20k_instance": miniatures.ade20k_prepared,
    "ade20k_full_sem_seg": miniatures.ade20k_full_prepared,
    "cityscapes_fine_sem_seg": miniatures.cityscapes,
    "cityscapes_fine_panoptic": miniatures.cityscapes,
    "cityscapes_fine_instance_seg": miniatures.cityscapes,
    "mapillary_vistas_sem_seg": miniatures.mapillary_raw,
    "mapillary_vistas_panoptic": miniatures.mapillary_raw,
    "mapillary_vistas_instance": miniatures.mapillary_prepared,
    "lvis_v1": miniatures.lvis,
    "coco_2017": miniatures.coco,
    "coco_2017_panoptic": miniatures.coco,
    "coco_2017_panoptic_with_sem_seg": miniatures.coco,
    "coco_2017_stuff_10k_sem_seg": miniatures.coco_stuff_prepared,
}
IGNORE_LABELS = {"ade20k_full_sem_seg": 65535, "mapillary_vistas_sem_seg": 65, "mapillary_vistas_panoptic": 65}
# name without the half -> evaluator_type, classes, things among them, sources of targets
PUBLISHED = {
    "ade20k_sem_seg": ("sem_seg", 150, 100, ["semantic"]),
    "ade20k_panoptic": ("ade20k_panoptic_seg", 150, 100, ["semantic", "panoptic"]),
    "ade20k_instance": ("coco", 100, 100, ["instance"]),
    "ade20k_full_sem_seg": ("sem_seg", 847, 0, ["semantic"]),
    "cityscapes_fine_sem_seg": ("cityscapes_sem_seg", 19, 8, ["semantic"]),
    "cityscapes_fine_panoptic": ("cityscapes_panoptic_seg", 19, 8, ["semantic", "panoptic"]),
    "cityscapes_fine_instance_seg": ("cityscapes_instance", 8, 8, ["instance"]),
    "mapillary_vistas_sem_seg": ("sem_seg", 65, 37, ["semantic"]),
    "mapillary_vistas_panoptic": ("mapillary_vistas_panoptic_seg", 65, 37, ["semantic", "panoptic"]),
    "mapillary_vistas_instance": ("coco", 37, 37, ["instance"]),
    "lvis_v1": ("lvis", 1203, 1203, ["instance"]),
    "coco_2017": ("coco", 80, 80, ["instance"]),
    "coco_2017_panoptic": ("coco_panoptic_seg", 133, 80, ["panoptic"]),
    "coco_2017_panoptic_with_sem_seg": ("coco_panoptic_seg", 133, 80, ["semantic", "panoptic"]),
    "coco_2017_stuff_10k_sem_seg": ("sem_seg", 171, 80, ["semantic"]),
}


def full_name(family, half):
    """COCO has the half of its names in the middle."""
    tail = family.removeprefix("coco_2017")
    return f"coco_2017_{half}{tail}" if tail != family else f"{family}_{half}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Writes a miniature once; -> (its folder, its scenes)."""
    done = {}

    def write(family):
        writer = WRITERS[family]
        if writer not in done:
            folder = tmp_path_factory.mktemp(writer.__name__)
            done[writer] = (folder, writer(folder))
        return done[writer]

    return write


@pytest.fixture
def miniature(written, monkeypatch):
    """family -> {name of a data set: (its entry, its scenes)}, with $DETECTRON2_DATASETS set."""

    def find(family):
        folder, scenes = written(family)
        monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
        return {full_name(family, half): (catalog.get(full_name(family, half)), of) for half, of in scenes.items()}

    return find


def unaugmented(source, metadata, **changes):
    return SegmentationMapper(
        source=source, num_classes=metadata.num_classes, ignore_label=metadata.ignore_label,
        augmentation=lambda image, rng, labels=None: View.of(image), **changes,
    )  # fmt: skip


def expected_target(scene, source, metadata):
    """(category id of the data set, (H, W) bool) of each object of a target, in no order."""
    ids = [category.id for category in scene.categories]
    if source == "semantic":
        return [(ids[category], mask) for category, mask in scene.labels.items()]
    regions = scene.objects if source == "instance" else [r for r in scene.regions if not r.is_crowd]
    return [(ids[region.category], scene.mask(region)) for region in regions]


def in_order(pairs):
    return sorted(((label, mask.tobytes()) for label, mask in pairs))


def test_every_name_has_a_miniature():
    """All but the small sets of COCO's layout, which other tests load."""
    program = "from mask2former.data import catalog; print(*catalog.names())"
    # A process of its own: in this one, other tests have registered names.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = {name for name in done.stdout.split() if not name.startswith(("coco_mini", "coco_sample"))}
    halves = {family: ("train", "test" if "stuff_10k" in family else "val") for family in WRITERS}
    assert names == {full_name(family, half) for family, of in halves.items() for half in of}


@pytest.mark.parametrize("family", WRITERS)
def test_records_have_the_pictures_and_their_sizes(miniature, family):
    for name, (entry, scenes) in miniature(family).items():
        records = entry.load()
        assert entry.name == name
        found = {Path(r["file_name"]).name.split("_leftImg8bit")[0].split(".")[0]: r for r in records}
        assert sorted(found) == sorted(scene.name for scene in scenes)
        for scene in scenes:
            record = found[scene.name]
            assert (record["height"], record["width"]) == scene.size
            assert Path(record["file_name"]).is_file()
        assert len({record["image_id"] for record in records}) == len(scenes)


@pytest.mark.parametrize(("family", "source"), [(f, s) for f, row in PUBLISHED.items() for s in row[3]])
def test_targets_are_what_the_pictures_show(miniature, family, source):
    for entry, scenes in miniature(family).values():
        mapper = unaugmented(source, entry.metadata)
        records = {Path(r["file_name"]).name.split("_leftImg8bit")[0].split(".")[0]: r for r in entry.load()}
        for scene in scenes:
            image, target = mapper(records[scene.name], np.random.default_rng(0))
            ids = [entry.metadata.categories[label].id for label in target.labels.tolist()]
            found = zip(ids, target.masks.numpy(), strict=True)
            assert in_order(found) == in_order(expected_target(scene, source, entry.metadata))
            difference = np.abs(image.numpy().transpose(1, 2, 0).astype(int) - scene.photo)
            assert np.median(difference) < 16  # the same photo, but for JPEG


@pytest.mark.parametrize("family", PUBLISHED)
def test_metadata_are_the_published_ones(miniature, family):
    kind, num_classes, num_things, sources = PUBLISHED[family]
    for name, (entry, _) in miniature(family).items():
        metadata = entry.metadata
        assert (metadata.evaluator_type, metadata.num_classes) == (kind, num_classes)
        assert sum(category.is_thing for category in metadata.categories) == num_things
        assert metadata.ignore_label == IGNORE_LABELS.get(family, 255)
        assert metadata.label_divisor == 1000
        assert (metadata.panoptic_json is not None) == ("panoptic" in sources)
        assert (metadata.panoptic_root is not None) == ("panoptic" in sources)
        assert (metadata.sem_seg_root is not None) == ("semantic" in sources)
        has_instances = name.startswith("coco_2017") and "stuff" not in name
        has_instances |= family in ("ade20k_panoptic", "ade20k_instance", "mapillary_vistas_instance", "lvis_v1")
        assert (metadata.instances_json is not None) == has_instances
        paths = ("image_root", "panoptic_json", "panoptic_root", "sem_seg_root", "instances_json")
        given = [getattr(metadata, path) for path in paths if getattr(metadata, path) is not None]
        assert all(path.exists() for path in given)


@pytest.mark.parametrize("family", WRITERS)
def test_each_missing_path_is_named(written, monkeypatch, tmp_path, family):
    """Of a copy of the miniature, one path after the other goes; the message names it and the data set."""
    folder, scenes = written(family)
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(copy))
    name = full_name(family, next(iter(scenes)))
    metadata = catalog.get(name).metadata
    paths = [metadata.image_root, metadata.panoptic_json, metadata.panoptic_root, metadata.sem_seg_root]
    if metadata.evaluator_type in ("coco", "lvis"):  # others read instances in the evaluation only
        paths.append(metadata.instances_json)
    for path in filter(None, paths):
        aside = tmp_path / "aside"
        path.rename(aside)
        with pytest.raises(FileNotFoundError, match=rf"'{name}' needs .*{path.name}.*DETECTRON2_DATASETS.*README"):
            catalog.get(name).load()
        aside.rename(path)
    catalog.get(name).load()


@pytest.mark.parametrize(
    ("family", "path", "maker"),
    [
        ("ade20k_sem_seg", "ADEChallengeData2016/annotations_detectron2", "datasets/prepare_ade20k_sem_seg.py"),
        ("ade20k_panoptic", "ADEChallengeData2016/ade20k_panoptic_train", "datasets/prepare_ade20k_pan_seg.py"),
        ("ade20k_panoptic", "ADEChallengeData2016/annotations_detectron2", "datasets/prepare_ade20k_sem_seg.py"),
        ("ade20k_instance", "ADEChallengeData2016/ade20k_instance_train.json", "datasets/prepare_ade20k_ins_seg.py"),
        ("ade20k_full_sem_seg", "ADE20K_2021_17_01", "datasets/prepare_ade20k_full_sem_seg.py"),
        ("mapillary_vistas_instance", "mapillary_vistas/mapillary_vistas_instance_train.json",
         "datasets/prepare_mapillary_vistas_ins_seg.py"),
        ("coco_2017_stuff_10k_sem_seg", "coco/coco_stuff_10k/images_detectron2",
         "datasets/prepare_coco_stuff_10k_sem_seg.py"),
        ("cityscapes_fine_panoptic", "cityscapes/gtFine/cityscapes_panoptic_train.json", "csCreatePanopticImgs"),
        ("cityscapes_fine_panoptic",
         "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png", "csCreateTrainIdLabelImgs"),
        ("cityscapes_fine_sem_seg",
         "cityscapes/gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png", "csCreateTrainIdLabelImgs"),
    ],
)  # fmt: skip
def test_what_a_script_makes_is_said(written, monkeypatch, tmp_path, family, path, maker):
    copy = tmp_path / "data"
    shutil.copytree(written(family)[0], copy)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(copy))
    (copy / path).rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=f"which .*{maker} makes"):
        catalog.get(full_name(family, "train")).load()


def test_registering_again_does_nothing(miniature):
    from mask2former.data import (
        ade20k_datasets,
        cityscapes_datasets,
        coco_datasets,
        lvis_datasets,
        mapillary_datasets,
    )

    before = catalog.names()
    for module in (ade20k_datasets, cityscapes_datasets, coco_datasets, lvis_datasets, mapillary_datasets):
        module.register_all()
    assert catalog.names() == before
    for entry, _ in miniature("ade20k_panoptic").values():
        assert entry == catalog.get(entry.name)
        assert entry != replace(entry, name="another")


def test_cityscapes_records_name_the_instance_ids(miniature):
    for family in ("cityscapes_fine_sem_seg", "cityscapes_fine_panoptic", "cityscapes_fine_instance_seg"):
        for entry, scenes in miniature(family).values():
            records = entry.load()
            assert [r["image_id"] for r in records] == sorted(scene.name for scene in scenes)
            for record in records:
                file = Path(record["instance_ids_file_name"])
                assert file.name == f"{record['image_id']}_gtFine_instanceIds.png"
                assert file.is_file()


def test_cityscapes_annotations_are_read_when_needed(miniature):
    entry, scenes = miniature("cityscapes_fine_instance_seg")["cityscapes_fine_instance_seg_val"]
    annotations, scene = entry.load()[0]["annotations"], scenes[0]
    cars = [r for r in scene.things if scene.categories[r.category].name == "car"]
    person = next(r for r in scene.things if scene.categories[r.category].name == "person")
    crowd = next(r for r in cars if r.is_crowd)
    expected = [crowd, person, *(r for r in cars if not r.is_crowd)]  # by value: 26, 24000, 26000, 26001
    assert len(annotations) == 4
    for found in (list(annotations), annotations[:], [annotations[i] for i in range(4)]):
        for annotation, region in zip(found, expected, strict=True):
            left, top, right, bottom = region.box
            assert annotation["iscrowd"] == region.is_crowd
            assert annotation["bbox"] == [left, top, right - left, bottom - top]
            assert annotation["bbox_mode"] == XYWH_ABS
            np.testing.assert_array_equal(annotation["segmentation"], scene.mask(region))
    assert [a["category_id"] for a in annotations] == [2, 0, 2, 2]
    assert [a["category_id"] for a in annotations[1:3]] == [0, 2]
    with pytest.raises(IndexError):
        annotations[4]


def test_cityscapes_pictures_without_objects_are_left_out_of_trainings(miniature, tmp_path):
    entry, scenes = miniature("cityscapes_fine_instance_seg")["cityscapes_fine_instance_seg_train"]
    from mask2former.data.cityscapes_datasets import InstanceIdAnnotations
    from tests.miniatures.scene import save

    files = {"crowd": np.full((8, 8), 26, np.uint16), "road": np.full((8, 8), 7, np.uint16)}
    for name, pixels in files.items():
        save(tmp_path / f"{name}.png", pixels)
    records = entry.load()
    empty = [{"annotations": InstanceIdAnnotations(str(tmp_path / f"{name}.png"))} for name in files]
    assert filter_empty([empty[0], records[0], empty[1], records[1]]) == records
    assert len(empty[1]["annotations"]) == 0
    assert len(empty[0]["annotations"]) == 1
    assert len(scenes) == len(records) == 2


def test_lvis_pictures_come_from_both_folders_and_keep_what_is_not_there(miniature):
    entry, _ = miniature("lvis_v1")["lvis_v1_val"]
    records = entry.load()
    assert [Path(r["file_name"]).parent.name for r in records] == ["val2017", "train2017"]
    for record in records:
        assert record["neg_category_ids"] == [3, 7]
        assert record["not_exhaustive_category_ids"] == [1]
        assert all(a["iscrowd"] == 0 and isinstance(a["segmentation"], list) for a in record["annotations"])


@pytest.mark.parametrize("family", ["ade20k_instance", "coco_2017"])
def test_polygons_and_rle_give_the_same_target(miniature, family):
    """ADE20K comes with RLE, COCO with polygons."""
    for entry, scenes in miniature(family).values():
        mapper, record = unaugmented("instance", entry.metadata), entry.load()[0]
        kinds = {type(a["segmentation"]) for a in record["annotations"] if not a["iscrowd"]}
        assert kinds == {list if family == "coco_2017" else dict}
        other = [
            a | {"segmentation": _other_form(scenes[0], a)} for a in record["annotations"] if not a["iscrowd"]
        ]
        rng = np.random.default_rng(0)
        found, expected = mapper(record | {"annotations": other}, rng).target, mapper(record, rng).target
        np.testing.assert_array_equal(found.masks.numpy(), expected.masks.numpy())
        assert len(expected.labels) == 3


def _other_form(scene, annotation):
    from tests.miniatures.scene import polygon, rle

    x, y, width, height = annotation["bbox"]
    region = next(r for r in scene.objects if r.box == (x, y, x + width, y + height))
    return rle(scene.mask(region)) if isinstance(annotation["segmentation"], list) else polygon(region)
