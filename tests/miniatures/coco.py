"""COCO with its panoptic annotations, COCO-Stuff-10k, and LVIS on COCO's images."""

import numpy as np

from mask2former.data import catalog
from tests.miniatures.scene import draw, instances_json, polygon, rle, save, save_json, write_panoptic


def _coco_names(prefix=""):
    return {"train": [f"{prefix}000000000009", f"{prefix}000000000025"],
            "val": [f"{prefix}000000000139", f"{prefix}000000000285"]}  # fmt: skip


def _image_row(scene):
    height, width = scene.size
    return {"id": int(scene.name), "file_name": f"{scene.name}.jpg", "height": height, "width": width}


def coco(datasets, folder="coco"):
    """`coco` with instances (objects as polygons, crowds as RLE), panoptic annotations and the prepared label maps."""
    scenes = draw("coco_panoptic", _coco_names(), stuff=("sea", "sand"), things=("person", "kite"))
    root = datasets / folder
    things = [category for category in catalog.read_categories("coco_panoptic") if category.is_thing]
    for half in scenes:
        for scene in scenes[half]:
            save(root / f"{half}2017" / f"{scene.name}.jpg", scene.photo, quality=95)
            save(root / f"panoptic_semseg_{half}2017" / f"{scene.name}.png", scene.label_map(255))
        content = instances_json(
            scenes[half], image_of=_image_row, categories=things,
            segmentation=lambda s, r: rle(s.mask(r)) if r.is_crowd else polygon(r),
        )  # fmt: skip
        save_json(root / "annotations" / f"instances_{half}2017.json", content)
        write_panoptic(
            scenes[half], root / f"panoptic_{half}2017", root / "annotations" / f"panoptic_{half}2017.json",
            image_of=_image_row, file_of=lambda s: f"{s.name}.png", segment_id=lambda s, r, number: 70000 + number,
        )  # fmt: skip
    return scenes


def lvis(datasets):
    """`lvis` and its images; one of the validation images is in COCO's training folder."""
    scenes = draw("lvis_v1", _coco_names(), stuff=(), things=("person", "bird"), crowd=False)
    for half in scenes:
        folders = dict(zip([s.name for s in scenes[half]], (f"{half}2017", "train2017"), strict=True))

        def image_row(scene, folders=folders):
            height, width = scene.size
            url = f"http://images.cocodataset.org/{folders[scene.name]}/{scene.name}.jpg"
            return {"id": int(scene.name), "coco_url": url, "height": height, "width": width,
                    "neg_category_ids": [3, 7], "not_exhaustive_category_ids": [1]}  # fmt: skip

        for scene in scenes[half]:
            save(datasets / "coco" / folders[scene.name] / f"{scene.name}.jpg", scene.photo, quality=95)
        categories = catalog.read_categories("lvis_v1")
        content = instances_json(
            scenes[half], image_of=image_row, categories=categories, segmentation=lambda s, r: polygon(r)
        )
        frequencies = {categories[r.category].id: "rcf"[i] for i, r in enumerate(scenes[half][0].objects)}
        for row in content["categories"]:
            row["frequency"] = frequencies.get(row["id"], "f")
        for row in content["annotations"]:
            del row["iscrowd"]  # LVIS has no such field
        save_json(datasets / "lvis" / f"lvis_v1_{half}.json", content)
    return scenes


def _stuff_scenes():
    names = {half: [f"COCO_train2014_{name}" for name in found] for half, found in _coco_names().items()}
    scenes = draw("coco_stuff", names, stuff=("sky-other", "grass"), things=("person", "kite"), crowd=False)
    return {"train": scenes["train"], "test": scenes["val"]}


def coco_stuff_raw(datasets):
    """`coco/coco_stuff_10k` v1.1: MATLAB files with "S" (0 unlabelled, else the id of the class) and "names"."""
    from scipy.io import savemat

    scenes, root = _stuff_scenes(), datasets / "coco" / "coco_stuff_10k"
    categories = catalog.read_categories("coco_stuff")
    names = {category.id: category.name for category in categories}
    every = np.array([[names.get(number, f"no pixels {number}")] for number in range(1, 183)], dtype=object)
    (root / "annotations").mkdir(parents=True)
    (root / "imageLists").mkdir()
    for part, found in scenes.items():
        for scene in found:
            save(root / "images" / f"{scene.name}.jpg", scene.photo, quality=95)
            values = scene.label_map(0, np.int32, lambda c: categories[c].id)
            savemat(root / "annotations" / f"{scene.name}.mat", {"S": values, "names": every})
        lines = "".join(f"{scene.name}\n" for scene in found)
        (root / "imageLists" / f"{part}.txt").write_text(lines, encoding="utf-8")
    return scenes


def coco_stuff_prepared(datasets):
    """`coco/coco_stuff_10k` with what the script makes."""
    scenes, root = _stuff_scenes(), datasets / "coco" / "coco_stuff_10k"
    for part, found in scenes.items():
        for scene in found:
            save(root / "images_detectron2" / part / f"{scene.name}.jpg", scene.photo, quality=95)
            save(root / "annotations_detectron2" / part / f"{scene.name}.png", scene.label_map(255))
    return scenes
