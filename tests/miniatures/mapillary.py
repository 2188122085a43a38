"""Mapillary Vistas v1.2, with its panoptic annotations, and the instance annotations that a script makes of them."""

import numpy as np
from PIL import Image

from mask2former.data import catalog
from tests.miniatures.scene import draw, instances_json, rle, save, save_json, write_panoptic

FOLDERS = {"train": "training", "val": "validation"}
UNLABELED = 65


def _image_row(scene):
    height, width = scene.size
    return {"id": scene.name, "file_name": f"{scene.name}.jpg", "height": height, "width": width}


def mapillary_raw(datasets):
    """`mapillary_vistas`; label maps have a palette, as in the data set."""
    names = {"train": ["-0Ym3xF_TnIg1cOp", "0AbcD-efGhIjKlMn"], "val": ["_1zYxW-vUtSrQpOn", "2qwErTyUiOpAsDfG"]}
    scenes = draw("mapillary_vistas", names, stuff=("Sky", "Road"), things=("Car", "Person"))
    palette = [value for category in catalog.read_categories("mapillary_vistas") for value in category.color]
    for half, folder in FOLDERS.items():
        part = datasets / "mapillary_vistas" / folder
        for scene in scenes[half]:
            save(part / "images" / f"{scene.name}.jpg", scene.photo, quality=95)
            labels = Image.fromarray(scene.label_map(UNLABELED))
            labels.putpalette([*palette, 0, 0, 0])
            save(part / "labels" / f"{scene.name}.png", labels)
            instances = scene.label_map(UNLABELED, np.uint16) * 256
            for number, region in enumerate(scene.objects):
                instances[scene.mask(region)] += number
            save(part / "instances" / f"{scene.name}.png", instances.astype(np.uint16))
        write_panoptic(
            scenes[half], part / "panoptic", part / "panoptic" / "panoptic_2018.json",
            image_of=_image_row, file_of=lambda s: f"{s.name}.png", segment_id=lambda s, r, number: 66000 + number,
        )  # fmt: skip
    return scenes


def mapillary_prepared(datasets):
    """The same with `mapillary_vistas_instance_{train,val}.json`."""
    scenes = mapillary_raw(datasets)
    things = [category for category in catalog.read_categories("mapillary_vistas") if category.is_thing]
    for half in FOLDERS:
        content = instances_json(
            scenes[half], image_of=_image_row, categories=things, segmentation=lambda s, r: rle(s.mask(r))
        )
        save_json(datasets / "mapillary_vistas" / f"mapillary_vistas_instance_{half}.json", content)
    return scenes
