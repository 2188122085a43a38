"""Small data sets of every kind, written to disk: three images of 48 x 64 with a few rectangles, without faults."""

import json

import numpy as np
from PIL import Image

from mask2former.own_data.object_masks import bounding_box, coco_rle
from mask2former.own_data.source import Source

SIZE = (48, 64)
NAMES = ("a", "b", "c")
# (category, x, y, width, height); categories 1 apple, 2 pear are things, 5 sky is stuff
OBJECTS = {
    "a": [(1, 2, 3, 10, 8), (2, 20, 10, 16, 20)],
    "b": [(1, 5, 5, 12, 12), (1, 30, 20, 20, 10), (2, 40, 2, 9, 9)],
    "c": [(2, 0, 0, 30, 40)],
}
CATEGORIES = [{"id": 1, "name": "apple"}, {"id": 2, "name": "pear"}]


def rectangle(x, y, width, height):
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def write_images(folder, suffix=".png"):
    """Images that all differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        pixels = np.random.default_rng(number).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{suffix}")
    return folder


def image_rows(suffix=".png"):
    return [
        {"id": number, "file_name": f"{name}{suffix}", "height": SIZE[0], "width": SIZE[1]}
        for number, name in enumerate(NAMES, start=1)
    ]


def instance_set(root):
    """COCO instances: RLE, a polygon and an uncompressed RLE."""
    annotations = []
    for image_id, name in enumerate(NAMES, start=1):
        for category, *box in OBJECTS[name]:
            mask = rectangle(*box)
            row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
            row |= {"area": int(mask.sum()), "bbox": bounding_box(mask), "segmentation": coco_rle(mask)}
            annotations.append(row)
    x, y, width, height = annotations[0]["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    annotations[0]["segmentation"] = [corners]
    flat = rectangle(*annotations[1]["bbox"]).T.ravel()
    ends = np.flatnonzero(np.diff(flat.astype(int))) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    annotations[1]["segmentation"] = {"size": list(SIZE), "counts": counts}
    content = {"images": image_rows(), "annotations": annotations, "categories": CATEGORIES}
    write_json(root / "instances.json", content)
    return Source(coco_json=str(root / "instances.json"), images=str(write_images(root / "images")))


def panoptic_set(root):
    """COCO panoptic: the objects, and sky in the last rows; the rest is void."""
    annotations = []
    (root / "png").mkdir(parents=True, exist_ok=True)
    for image_id, name in enumerate(NAMES, start=1):
        ids, segments = np.zeros(SIZE, dtype=np.int64), []
        for number, (category, *box) in enumerate([*OBJECTS[name], (5, 0, 44, 64, 4)], start=1):
            mask, segment = rectangle(*box), number * 300
            ids[mask] = segment
            row = {"id": segment, "category_id": category, "iscrowd": 0}
            segments.append(row | {"area": int(mask.sum()), "bbox": bounding_box(mask)})
        write_panoptic(root / "png" / f"{name}.png", ids)
        annotations.append({"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{**row, "isthing": 1} for row in CATEGORIES] + [{"id": 5, "name": "sky", "isthing": 0}]
    content = {"images": image_rows(), "annotations": annotations, "categories": categories}
    write_json(root / "panoptic.json", content)
    return Source(
        panoptic_json=str(root / "panoptic.json"),
        panoptic_png=str(root / "png"),
        images=str(write_images(root / "images")),
    )


def write_panoptic(path, ids):
    Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)).save(path)


def semantic_set(root):
    """Label maps: 0 background, 1 apple, 2 pear, 255 in one corner; images are JPEG."""
    (root / "labels").mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        labels = np.zeros(SIZE, dtype=np.uint8)
        for category, *box in OBJECTS[name]:
            labels[rectangle(*box)] = category
        labels[-4:, -4:] = 255
        Image.fromarray(labels).save(root / "labels" / f"{name}.png")
    write_images(root / "images", ".jpg")
    return Source(
        semantic_masks=str(root / "labels"), images=str(root / "images"), classes=("background", "apple", "pear")
    )


def object_mask_set(root):
    """The layout of the Data Science Bowl 2018 with the classes as folders."""
    names = {row["id"]: row["name"] for row in CATEGORIES}
    write_images(root / "all")
    for name in NAMES:
        (root / "sets" / name / "images").mkdir(parents=True, exist_ok=True)
        (root / "all" / f"{name}.png").rename(root / "sets" / name / "images" / f"{name}.png")
        for number, (category, *box) in enumerate(OBJECTS[name]):
            folder = root / "sets" / name / "masks" / names[category]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rectangle(*box).astype(np.uint8) * 255).save(folder / f"{number}.png")
    return Source(object_masks=str(root / "sets"))


def write_json(path, content):
    """One annotation, image and category a line, as a person would like to read it."""
    parts = []
    for key, rows in content.items():
        lines = ",\n".join(json.dumps(row) for row in rows)
        parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


KINDS = {
    "instance": instance_set,
    "panoptic": panoptic_set,
    "semantic": semantic_set,
    "object_masks": object_mask_set,
}
