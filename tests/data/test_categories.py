"""The tables of categories: sizes, anchors in the published orders, agreement of tables that overlap."""

import pytest

from mask2former.data import catalog, mapillary_datasets
from mask2former.data.catalog import generated_color

# table: classes, things, {position: (id, name)}
TABLES = {
    "coco_panoptic": (133, 80, {0: (1, "person"), 79: (90, "toothbrush"), 132: (200, "rug-merged")}),
    "ade20k_150": (150, 100, {0: (0, "wall"), 7: (7, "bed"), 12: (12, "person"), 149: (149, "flag")}),
    "ade20k_instance": (100, 100, {0: (7, "bed"), 3: (12, "person"), 99: (149, "flag")}),
    "ade20k_full": (847, 0, {0: (0, "wall"), 2: (2, "sky"), 846: (846, "adding machine, totalizer, totaliser")}),
    "cityscapes": (19, 8, {0: (7, "road"), 10: (23, "sky"), 11: (24, "person"), 18: (33, "bicycle")}),
    "mapillary_vistas": (65, 37, {0: (1, "Bird"), 13: (14, "Road"), 55: (56, "Car"), 64: (65, "Ego Vehicle")}),
    "coco_stuff": (171, 80, {0: (1, "person"), 79: (90, "toothbrush"), 80: (92, "banner"), 170: (182, "wood")}),
    "lvis_v1": (1203, 1203, {0: (1, "aerosol_can"), 1202: (1203, "zucchini")}),
}  # fmt: skip
WITHOUT_COLORS = {"ade20k_full", "lvis_v1"}


@pytest.mark.parametrize("table", TABLES)
def test_size_and_order(table):
    num_classes, num_things, anchors = TABLES[table]
    categories = catalog.read_categories(table)
    assert len(categories) == len({c.id for c in categories}) == len({c.name for c in categories}) == num_classes
    assert sum(c.is_thing for c in categories) == num_things
    assert {position: (categories[position].id, categories[position].name) for position in anchors} == anchors
    assert [c.id for c in categories] == sorted(c.id for c in categories)


@pytest.mark.parametrize("table", TABLES)
def test_colors_are_bytes_and_differ(table):
    categories = catalog.read_categories(table)
    assert all(len(c.color) == 3 and all(0 <= v <= 255 for v in c.color) for c in categories)
    repeated = 1 if table == "ade20k_150" else 0  # ADE20K's own palette has one colour twice
    assert len({c.color for c in categories}) == len(categories) - repeated
    generated = [c.color == generated_color(position) for position, c in enumerate(categories)]
    if table in WITHOUT_COLORS:
        assert all(generated)
    elif table != "coco_stuff":  # whose stuff has no colours but those that COCO's panoptic classes share
        assert not any(generated)


def test_every_table_is_tested():
    folder = catalog._CATEGORY_FOLDER
    assert {file.stem for file in folder.iterdir()} == set(TABLES)


def test_ade20k_instances_are_the_things_of_the_150_classes():
    things = [c for c in catalog.read_categories("ade20k_150") if c.is_thing]
    instances = catalog.read_categories("ade20k_instance")
    assert [(c.id, c.color) for c in instances] == [(c.id, c.color) for c in things]


def test_coco_stuff_shares_ids_names_and_colors_with_cocos_panoptic_classes():
    stuff = {c.id: c for c in catalog.read_categories("coco_stuff")}
    shared = [c for c in catalog.read_categories("coco_panoptic") if c.id in stuff]
    assert shared == [stuff[c.id] for c in shared]
    assert len(shared) == 80 + 36  # the merged classes have ids of their own


def test_mapillary_things_in_their_order():
    things = mapillary_datasets.thing_categories()
    assert [c.name for c in things[:3]] == ["Bird", "Ground Animal", "Crosswalk - Plain"]
    assert (len(things), things[-1].name, things[-1].id) == (37, "Wheeled Slow", 63)


def test_known_colors():
    """One of each data set that has its own."""
    colors = {table: {c.name: c.color for c in catalog.read_categories(table)} for table in TABLES}
    assert colors["coco_panoptic"]["person"] == (220, 20, 60)
    assert colors["ade20k_150"]["wall"] == (120, 120, 120)
    assert colors["cityscapes"]["road"] == (128, 64, 128)
    assert colors["mapillary_vistas"]["Bird"] == (165, 42, 42)


def test_generated_colors_are_bright_enough_and_do_not_change():
    assert generated_color(0) == (242, 36, 36)
    assert all(max(generated_color(position)) >= 120 for position in range(2000))


def test_cityscapes_are_those_of_its_own_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels", reason="cityscapesScripts is not installed").labels
    evaluated = sorted((label for label in labels if 0 <= label.trainId < 255), key=lambda label: label.trainId)
    expected = [(label.id, label.name, label.hasInstances, tuple(label.color)) for label in evaluated]
    found = [(c.id, c.name, c.is_thing, c.color) for c in catalog.read_categories("cityscapes")]
    assert found == expected
