"""ADE20K: the Places challenge's release and the full one, as downloaded and as prepared."""

import pickle

import numpy as np

from mask2former.data import catalog
from tests.miniatures.scene import draw, instances_json, rle, save, save_json, write_panoptic

FOLDERS = {"train": "training", "val": "validation"}
FULL_SCENE_FOLDER = {"train": "urban/street", "val": "home_or_hotel/bedroom"}


def _scenes():
    names = {half: [f"ADE_{half}_{n:08d}" for n in (1, 2)] for half in FOLDERS}
    return draw("ade20k_150", names, stuff=("sky", "road, route"), things=("car", "person"), crowd=False)


def _number(scene):
    return int(scene.name.rsplit("_", 1)[1])


def _image_row(scene):
    height, width = scene.size
    return {"id": _number(scene), "file_name": f"{scene.name}.jpg", "height": height, "width": width}


def _photos(root, scenes):
    for half, folder in FOLDERS.items():
        for scene in scenes[half]:
            save(root / "images" / folder / f"{scene.name}.jpg", scene.photo, quality=95)


def ade20k_raw(datasets):
    """`ADEChallengeData2016` with `annotations` and `annotations_instance`."""
    scenes, root = _scenes(), datasets / "ADEChallengeData2016"
    _photos(root, scenes)
    things = [category.id for category in catalog.read_categories("ade20k_instance")]
    for half, folder in FOLDERS.items():
        for scene in scenes[half]:
            save(root / "annotations" / folder / f"{scene.name}.png", scene.label_map(0, value=lambda c: c + 1))
            colors = np.zeros((*scene.size, 3), dtype=np.uint8)
            for number, region in enumerate(scene.objects, 1):
                colors[scene.mask(region)] = (things.index(region.category) + 1, number, 0)
            save(root / "annotations_instance" / folder / f"{scene.name}.png", colors)
    return scenes


def ade20k_prepared(datasets):
    """`ADEChallengeData2016` with what the three scripts make."""
    scenes, root = _scenes(), datasets / "ADEChallengeData2016"
    _photos(root, scenes)
    for half, folder in FOLDERS.items():
        for scene in scenes[half]:
            save(root / "annotations_detectron2" / folder / f"{scene.name}.png", scene.label_map(255))
        things = catalog.read_categories("ade20k_instance")
        content = instances_json(
            scenes[half], image_of=_image_row, categories=things, segmentation=lambda s, r: rle(s.mask(r))
        )
        save_json(root / f"ade20k_instance_{half}.json", content)
        write_panoptic(
            scenes[half], root / f"ade20k_panoptic_{half}", root / f"ade20k_panoptic_{half}.json",
            image_of=_image_row, file_of=lambda s: f"{s.name}.png",
            segment_id=lambda s, region, number: number * (region in s.things) + 256 * (region.category + 1),
        )  # fmt: skip
    return scenes


def _full_scenes():
    names = {half: [f"ADE_{half}_{n:08d}" for n in (16869, 16870)] for half in FOLDERS}
    things = ("car, auto, automobile, machine, motorcar", "umbrella stand")  # the second's label needs 16 bits
    scenes = draw("ade20k_full", names, stuff=("sky", "road, route"), things=things, crowd=False)
    assert max(scenes["train"][0].labels) > 255
    return scenes


def ade20k_full_raw(datasets):
    """`ADE20K_2021_17_01` with its index, in which each class has another number than in the table."""
    scenes, root = _full_scenes(), datasets / "ADE20K_2021_17_01"
    object_names = sorted([c.name for c in catalog.read_categories("ade20k_full")] + ["aardvark", "zebra finch"])
    index = {"filename": [], "folder": [], "objectnames": object_names}
    for half, folder in FOLDERS.items():
        relative = f"images/ADE/{folder}/{FULL_SCENE_FOLDER[half]}"
        for scene in scenes[half]:
            index["filename"].append(f"{scene.name}.jpg")
            index["folder"].append(f"{root.name}/{relative}")
            save(root / relative / f"{scene.name}.jpg", scene.photo, quality=95)
            names = [category.name for category in scene.categories]
            numbers = scene.label_map(0, np.int64, lambda c, names=names: object_names.index(names[c]) + 1)
            colors = np.stack([numbers // 256 * 10, numbers % 256, numbers * 0], axis=-1).astype(np.uint8)
            save(root / relative / f"{scene.name}_seg.png", colors)
    (root / "index_ade20k.pkl").write_bytes(pickle.dumps(index))
    return scenes


def ade20k_full_prepared(datasets):
    """`ADE20K_2021_17_01` with what the script makes."""
    scenes, root = _full_scenes(), datasets / "ADE20K_2021_17_01"
    for half, folder in FOLDERS.items():
        for scene in scenes[half]:
            save(root / "images_detectron2" / folder / f"{scene.name}.jpg", scene.photo, quality=95)
            labels = scene.label_map(65535, np.uint16)
            save(root / "annotations_detectron2" / folder / f"{scene.name}.tif", labels)
    return scenes
