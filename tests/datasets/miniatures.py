"""Data sets of some 4 x 6 pixels in the layout in which one downloads them, and the scripts that prepare them."""

import importlib.util
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "datasets"
HEIGHT, WIDTH = 4, 6


def script(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle looks for its functions
    spec.loader.exec_module(module)
    return module


def prepare(name, root, *arguments):
    """Runs a script in this process; the exit code."""
    return script(name).main(["--root", str(root), "--workers", "1", *arguments])


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


def pixels_of(path):
    """The stored values, and Pillow's mode."""
    with Image.open(path) as image:
        return np.array(image), image.mode


def photo(path, *, height=HEIGHT, width=WIDTH):
    save(path, np.full((height, width, 3), 90, np.uint8))


def snapshot(root):
    """All files below a folder with content, and the time of their last change."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


ADE_HALVES = {"training": "ADE_train_0000000", "validation": "ADE_val_0000000"}
# Wall, building, floor (stuff 0, 1, 3), bed and windowpane (things 7, 8), flag (thing 149), other.
ADE_LABELS = np.array(
    [[1, 1, 1, 9, 9, 9],
     [1, 1, 1, 9, 9, 9],
     [8, 8, 8, 8, 0, 0],
     [4, 4, 8, 8, 0, 150]], np.uint8)  # fmt: skip
# Two beds (instance class 1), a window (2) and a flag (100). The left of the window and two pixels of bed are no
# object; the lower bed lies on one pixel of "other".
ADE_CLASSES = np.array(
    [[0, 0, 0, 0, 2, 2],
     [0, 0, 0, 0, 2, 2],
     [1, 1, 1, 1, 1, 0],
     [0, 0, 0, 0, 0, 100]], np.uint8)  # fmt: skip
ADE_NUMBERS = np.array(
    [[0, 0, 0, 0, 3, 3],
     [0, 0, 0, 0, 3, 3],
     [1, 1, 2, 2, 2, 0],
     [0, 0, 0, 0, 0, 255]], np.uint8)  # fmt: skip


def ade_instances(classes=ADE_CLASSES, numbers=ADE_NUMBERS):
    """Pixels of annotations_instance; blue has something that must not matter."""
    return np.stack([classes, numbers, np.full_like(classes, 77)], axis=-1)


def ade20k(root, count=2):
    """`ADEChallengeData2016` with `count` images a split, all alike."""
    challenge = root / "ADEChallengeData2016"
    for half, start in ADE_HALVES.items():
        for number in range(1, count + 1):
            name = f"{start}{number}"
            photo(challenge / "images" / half / f"{name}.jpg")
            save(challenge / "annotations" / half / f"{name}.png", ADE_LABELS)
            save(challenge / "annotations_instance" / half / f"{name}.png", ade_instances())
    return challenge


# Names of the classes 1, 2, ...: all of the 847, from the last to the first, after one that is not among them.
def ade_object_names():
    from mask2former.data.catalog import read_categories

    return ["no such class", *(category.name for category in reversed(read_categories("ade20k_full")))]


def ade_class(label):
    """The number in the release of the class with a label."""
    return 1 + 847 - label


def ade_seg(classes):
    """Pixels of *_seg.png for a map of class numbers; blue is the object."""
    classes = np.asarray(classes)
    return np.stack([classes // 256 * 10, classes % 256, np.ones_like(classes)], axis=-1).astype(np.uint8)


def ade20k_full(root, *, index=None):
    """`ADE20K_2021_17_01` with three small images and a large one.

    Args:
        root: folder of the data sets.
        index: what the index holds besides files and names.
    """
    release = root / "ADE20K_2021_17_01"
    names = {
        "training/urban/street/ADE_train_00000001": [[1, ade_class(0), 0], [ade_class(300), ade_class(846), 1]],
        "training/nature/ADE_frame_00000007": [[ade_class(5)] * 3] * 2,
        "validation/urban/street/ADE_val_00000001": [[ade_class(2)] * 3] * 2,
    }
    for name, classes in names.items():
        path = release / "images" / "ADE" / name
        photo(path.with_suffix(".jpg"), height=2, width=3)
        save(path.with_name(path.name + "_seg.png"), ade_seg(classes))
    files = [Path("ADE20K_2021_17_01/images/ADE", f"{name}.jpg") for name in names]
    content = {
        "filename": [file.name for file in files],
        "folder": [file.parent.as_posix() for file in files],
        "objectnames": ade_object_names(),
        "objectPresence": np.zeros((848, 3), np.int64),
    }
    write_index(release, content | (index or {}))
    return release


def write_index(release, content):
    (release / "index_ade20k.pkl").write_bytes(pickle.dumps(content, protocol=4))


def segment_colors(ids):
    ids = np.asarray(ids)
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def panoptic(json_file, png_folder, ids, segments, categories, *, names=("a", "b"), id_of=str):
    """A panoptic JSON file and PNGs, all images alike."""
    images, annotations = [], []
    height, width = np.shape(ids)
    for name in names:
        save(png_folder / f"{name}.png", segment_colors(ids))
        images.append({"id": id_of(name), "file_name": f"{name}.jpg", "height": height, "width": width})
        annotations.append({"image_id": id_of(name), "file_name": f"{name}.png", "segments_info": segments})
    json_file.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file.write_text(json.dumps(content))
    return content


COCO_IDS = np.array(
    [[70000, 70000, 0, 5, 5, 5],
     [70000, 70000, 0, 5, 5, 5],
     [300, 300, 300, 5, 5, 5],
     [300, 300, 300, 0, 0, 301]])  # fmt: skip
COCO_SEGMENTS = [
    {"id": 70000, "category_id": 1, "iscrowd": 1},  # person, the first
    {"id": 5, "category_id": 200, "iscrowd": 0},  # rug-merged, the last
    {"id": 300, "category_id": 90, "iscrowd": 0},  # toothbrush, the 80th
    {"id": 301, "category_id": 92, "iscrowd": 0},  # banner, the 81st
]


def coco_panoptic(root):
    """`coco` with two images a split, all alike."""
    for split in ("train", "val"):
        name = f"panoptic_{split}2017"
        categories = [{"id": number, "isthing": 1} for number in (1, 90)]
        panoptic(root / "coco/annotations" / f"{name}.json", root / "coco" / name, COCO_IDS, COCO_SEGMENTS, categories)
    return root / "coco"


STUFF_LABELS = np.array(
    [[0, 1, 1, 11, 11, 13],
     [0, 1, 1, 11, 11, 13],
     [90, 90, 90, 92, 92, 92],
     [182, 182, 182, 182, 182, 182]], np.uint16)  # fmt: skip
# The same in v1.0, whose classes are 2..172 and where 1 is "unlabeled": 12 (street sign) does not exist, so that
# 11 (fire hydrant) is its 12 and 13 (stop sign) its 13.
STUFF_LABELS_1_0 = np.array(
    [[1, 2, 2, 12, 12, 13],
     [1, 2, 2, 12, 12, 13],
     [81, 81, 81, 82, 82, 82],
     [172, 172, 172, 172, 172, 172]], np.uint16)  # fmt: skip


def mat(path, labels, num_names):
    path.parent.mkdir(parents=True, exist_ok=True)
    names = np.array([f"class {number}" for number in range(num_names)], object)
    content = {"S": labels, "names": names, "captions": np.array(["a street"], object)}
    scipy.io.savemat(path, content, do_compression=True)


def coco_stuff_10k(root, *, labels=STUFF_LABELS, num_names=182):
    """`coco/coco_stuff_10k` with two images for training and one for testing, all alike."""
    release = root / "coco" / "coco_stuff_10k"
    lists = {"train": ["COCO_train2014_000000000077", "COCO_train2014_000000000084"], "test": ["COCO_train2014_9"]}
    for split, names in lists.items():
        for name in names:
            photo(release / "images" / f"{name}.jpg")
            mat(release / "annotations" / f"{name}.mat", labels, num_names)
        (release / "imageLists").mkdir(exist_ok=True)
        (release / "imageLists" / f"{split}.txt").write_text("\r\n".join(names) + "\r\n\r\n")
    return release


# Two cars (category 56) of which one is a crowd, road (14), something unlabelled (66).
MAPILLARY_IDS = np.array(
    [[56 * 256, 56 * 256, 0, 0, 0, 0],
     [56 * 256, 0, 0, 0, 0, 0],
     [14, 14, 14, 14, 57 * 256, 57 * 256],
     [14, 14, 66, 66, 57 * 256, 57 * 256]])  # fmt: skip
MAPILLARY_SEGMENTS = [
    {"id": 14, "category_id": 14, "iscrowd": 0},
    {"id": 56 * 256, "category_id": 56, "iscrowd": 0},
    {"id": 57 * 256, "category_id": 56, "iscrowd": 1},
    {"id": 66, "category_id": 66, "iscrowd": 0},
]


def mapillary_categories():
    """Those of panoptic_2018.json: 65 classes, and "Unlabeled"."""
    from mask2former.data.catalog import read_categories

    rows = [{"id": c.id, "name": c.name, "isthing": int(c.is_thing)} for c in read_categories("mapillary_vistas")]
    return [*rows, {"id": 66, "name": "Unlabeled", "isthing": 0}]


def mapillary(root):
    """`mapillary_vistas` with two images a split, all alike."""
    release = root / "mapillary_vistas"
    for half in ("training", "validation"):
        folder = release / half / "panoptic"
        panoptic(folder / "panoptic_2018.json", folder, MAPILLARY_IDS, MAPILLARY_SEGMENTS, mapillary_categories())
        for name in ("a", "b"):
            photo(release / half / "images" / f"{name}.jpg")
    return release
