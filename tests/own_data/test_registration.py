"""DATASETS.CUSTOM: from keys to records that train, in both engines."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mask2former.data import SegmentationMapper, catalog, coco_datasets
from mask2former.data.geometry import View
from mask2former.own_data import Source, register_custom_datasets
from mask2former.own_data.classes import categories_of, generated_color
from mask2former.own_data.registration import CustomDataset
from tests.own_data.small import KINDS, NAMES, OBJECTS, instance_set, object_mask_set, panoptic_set, semantic_set

_numbers = itertools.count()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def name():
    """The catalog is one for all tests."""
    return f"own_{next(_numbers)}"


def register(name, source, **others):
    register_custom_datasets(datasets=[{"NAME": name, **source.to_mapping()}], **others)
    return catalog.get(name)


def targets_of(entry, source):
    """{image: {(category name, pixels)}} by the core's mapper without augmentation."""
    mapper = SegmentationMapper(
        source=source,
        num_classes=entry.metadata.num_classes,
        augmentation=lambda image, rng, labels=None: View.of(image),
    )
    found = {}
    for record in entry.load():
        target = mapper(record, np.random.default_rng(0)).target
        names = [entry.metadata.categories[label].name for label in target.labels]
        found[record["file_name"][-5:-4]] = sorted(zip(names, target.masks.sum((1, 2)).tolist(), strict=True))
    return found


NAME_OF = {1: "apple", 2: "pear"}
AREAS = {name: sorted((NAME_OF[c], w * h) for c, _, _, w, h in OBJECTS[name]) for name in NAMES}


@pytest.mark.parametrize("kind", ["instance", "object_masks"])
def test_instances_give_the_objects_that_were_drawn(kind, name, tmp_path):
    entry = register(name, KINDS[kind](tmp_path))
    assert targets_of(entry, "instance") == AREAS
    assert entry.metadata.evaluator_type == "coco"
    content = json.loads(entry.metadata.instances_json.read_text())
    assert {row["id"] for row in content["images"]} == {record["image_id"] for record in entry.load()}
    assert [(c.id, c.name, c.is_thing) for c in entry.metadata.categories] == [(1, "apple", True), (2, "pear", True)]


def test_panoptic_has_stuff_and_names_what_can_be_evaluated(name, tmp_path):
    entry = register(name, panoptic_set(tmp_path))
    assert targets_of(entry, "panoptic") == {image: [*areas, ("sky", 64 * 4)] for image, areas in AREAS.items()}
    metadata = entry.metadata
    assert metadata.evaluator_type == "coco_panoptic_seg"
    assert (metadata.instances_json, metadata.sem_seg_root) == (None, None)
    assert [c.is_thing for c in metadata.categories] == [True, True, False]


def test_label_maps_give_one_segment_for_each_class(name, tmp_path):
    entry = register(name, semantic_set(tmp_path), trained=[name], ignore_value=255)
    assert targets_of(entry, "semantic")["b"] == [("apple", 344), ("background", 3072 - 344 - 81 - 16), ("pear", 81)]
    assert entry.metadata.evaluator_type == "sem_seg"
    assert [c.name for c in entry.metadata.categories] == ["background", "apple", "pear"]


def test_ids_with_gaps_and_an_order_of_ones_own(name, tmp_path):
    source = instance_set(tmp_path)
    file = tmp_path / "instances.json"
    file.write_text(
        file.read_text()
        .replace('"category_id": 1', '"category_id": 90')
        .replace('{"id": 1, "name"', '{"id": 90, "name"')
    )
    assert [c.name for c in categories_of(source)] == ["pear", "apple"]  # by id
    entry = register(name, replace(source, classes=("apple", "pear")))
    assert [(c.id, c.name) for c in entry.metadata.categories] == [(90, "apple"), (2, "pear")]
    assert targets_of(entry, "instance") == AREAS
    with pytest.raises(ValueError, match=r"names of the categories.*differ in \['apple', 'plum'\]"):
        categories_of(replace(source, classes=("plum", "pear")))


@pytest.mark.parametrize("text", ["background\n\napple\npear\n", '["background", "apple", "pear"]'])
def test_classes_from_a_file(text, tmp_path):
    file = tmp_path / ("c.json" if text.startswith("[") else "c.txt")
    file.write_text(text)
    source = replace(semantic_set(tmp_path), classes=str(file))
    assert [c.name for c in categories_of(source)] == ["background", "apple", "pear"]


def test_colours_of_a_file_are_kept_and_positions_must_be_the_ids(tmp_path):
    file = tmp_path / "c.json"
    source = replace(semantic_set(tmp_path), classes=str(file))
    file.write_text('[{"id": 0, "name": "x", "color": [1, 2, 3]}, {"name": "y", "color": [1, 2, 999]}]')
    assert [c.color for c in categories_of(source)] == [(1, 2, 3), generated_color(1)]
    file.write_text('[{"id": 1, "name": "x"}]')
    with pytest.raises(ValueError, match="'x' must have the id 0, its position"):
        categories_of(source)


def test_generated_colours_differ():
    assert len({generated_color(i) for i in range(150)}) == 150


def test_one_class_where_masks_lie_in_no_folder_of_a_class(name, tmp_path):
    source = object_mask_set(tmp_path)
    for masks in (tmp_path / "sets").glob("*/masks"):
        for file in list(masks.rglob("*.png")):
            file.rename(masks / file.name)
        for folder in ("apple", "pear"):
            if (masks / folder).is_dir():
                (masks / folder).rmdir()
    assert [c.name for c in categories_of(source)] == ["object"]
    entry = register(name, replace(source, classes=("nucleus",)))
    assert targets_of(entry, "instance")["a"] == [("nucleus", 80), ("nucleus", 320)]


def test_masks_and_images_in_folders_of_their_own(name, tmp_path):
    object_mask_set(tmp_path)
    for image in NAMES:
        (tmp_path / "sets" / image / "images" / f"{image}.png").rename(tmp_path / "all" / f"{image}.png")
        for folder in list((tmp_path / "sets" / image / "masks").iterdir()):
            folder.rename(tmp_path / "sets" / image / folder.name)
        (tmp_path / "sets" / image / "masks").rmdir()
        (tmp_path / "sets" / image / "images").rmdir()
    source = Source(object_masks=str(tmp_path / "sets"), images=str(tmp_path / "all"))
    assert targets_of(register(name, source), "instance") == AREAS


def test_converted_masks_are_kept_until_a_file_changes(name, tmp_path, cache):
    source = object_mask_set(tmp_path)
    first = CustomDataset(name, source)().metadata.instances_json
    assert first.is_relative_to(cache)
    assert CustomDataset(name, source)().metadata.instances_json == first
    from mask2former.own_data.object_masks import coco_json_of

    coco_json_of.cache_clear()  # another process
    assert CustomDataset(name, source)().metadata.instances_json == first
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(tmp_path / "sets/a/masks/pear/9.png")
    coco_json_of.cache_clear()
    assert CustomDataset(name, source)().metadata.instances_json != first


def test_folders_of_masks_that_cannot_be_used_are_named(name, tmp_path):
    source = object_mask_set(tmp_path)
    bad = tmp_path / "sets/a/masks/pear/9.png"
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(bad)
    with pytest.raises(ValueError, match=r"own.*pear.9.png: the mask must .* not empty, got 48x64, 0 pixels"):
        register(name, source)


def test_sixteen_bit_masks_are_not_scaled_away(tmp_path):
    from mask2former.data.images import read_binary_mask

    pixels = np.zeros((4, 5), np.uint16)
    pixels[1, 2] = 1
    Image.fromarray(pixels).save(tmp_path / "m.png")
    assert np.array_equal(read_binary_mask(tmp_path / "m.png"), pixels > 0)
    opaque = np.zeros((4, 5, 4), np.uint8)
    opaque[..., 3] = 255
    opaque[3, 4, 1] = 7
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    assert np.argwhere(read_binary_mask(tmp_path / "rgba.png")).tolist() == [[3, 4]]


def test_relative_paths_are_below_the_working_folder_or_the_data_sets(name, tmp_path, monkeypatch):
    instance_set(tmp_path / "root/fruit")
    source = Source(coco_json="fruit/instances.json", images="fruit/images")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(coco_datasets.ROOT_VARIABLE, str(tmp_path / "root"))
    assert len(register(name, source).load()) == 3
    monkeypatch.setenv(coco_datasets.ROOT_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=f"{name!r} of DATASETS.CUSTOM: COCO_JSON names fruit/instances.json"):
        catalog.get(name)
    monkeypatch.chdir(tmp_path / "root")
    assert len(catalog.get(name).load()) == 3


def test_the_same_list_again_is_fine_but_not_the_same_name_for_other_files(name, tmp_path):
    source = instance_set(tmp_path)
    register(name, source)
    register(name, source)
    with pytest.raises(ValueError, match=f"already registered as {name!r}"):
        register(name, replace(source, images=str(tmp_path)))
    with pytest.raises(ValueError, match="already registered as 'coco_2017_train'"):
        register("coco_2017_train", source)


GOOD = {"NAME": "x", "COCO_JSON": "a", "IMAGES": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("x", r"DATASETS.CUSTOM\[0\] must be mappings of keys, got 'x'"),
        ({**GOOD, "NAME": ""}, "NAME must be the data set's name, got ''"),
        ({**GOOD, "COLOUR": 1}, "'x': COLOUR is no key; the keys are IMAGES, COCO_JSON"),
        ({"NAME": "x", "IMAGES": "b"}, "one of PANOPTIC_JSON, COCO_JSON, OBJECT_MASKS, SEMANTIC_MASKS must be given"),
        ({"NAME": "x", "COCO_JSON": "a"}, "COCO_JSON needs IMAGES"),
        ({**GOOD, "PANOPTIC_JSON": "c"}, "PANOPTIC_JSON needs PANOPTIC_PNG"),
        ({"NAME": "x", "SEMANTIC_MASKS": "a", "IMAGES": "b"}, "SEMANTIC_MASKS needs CLASSES"),
        ({**GOOD, "OBJECT_MASKS": "c"}, "OBJECT_MASKS must not stand beside COCO_JSON"),
        ({**GOOD, "IMAGES": 3}, "IMAGES must be the name of a file or folder, got 3"),
        ({**GOOD, "CLASSES": [1]}, r"CLASSES must be a list of names or a file with them, got \[1\]"),
        ({**GOOD, "IGNORE_LABEL": "255"}, "IGNORE_LABEL must be a whole number from 0, got '255'"),
    ],
)
def test_wrong_lists_are_refused_with_key_and_value(row, message):
    with pytest.raises(ValueError, match=message):
        register_custom_datasets(datasets=[row])


def test_training_must_ignore_what_the_label_maps_ignore(name, tmp_path):
    source = replace(semantic_set(tmp_path), ignore_label=0)
    with pytest.raises(ValueError, match=f"IGNORE_VALUE must be 0, the IGNORE_LABEL of data set {name!r}, got 255"):
        register(name, source, trained=[name], ignore_value=255)
    assert register(name, source, ignore_value=255).metadata.ignore_label == 0
