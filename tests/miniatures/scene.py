"""A picture of rectangles of which everything is known, and the files that data sets make of such."""

import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mask2former.data import catalog

WIDTH = 64


@dataclass(frozen=True)
class Region:
    """A rectangle of one category: a stuff area, an object, or a crowd of objects."""

    category: int  # position in the table
    box: tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside
    is_crowd: bool = False


@dataclass(frozen=True)
class Scene:
    """What a picture shows: regions, each in front of those before it; what they leave free has no category.

    Attributes:
        name: of the files, without suffix.
        number: of the image among all of its data set, from 1.
        size: (height, width).
        table: name of the table of categories.
        regions: the stuff areas first. Objects do not cover each other.
    """

    name: str
    number: int
    size: tuple[int, int]
    table: str
    regions: tuple[Region, ...]

    @cached_property
    def categories(self):
        return catalog.read_categories(self.table)

    @cached_property
    def index(self):
        """(H, W) position of the region in front, -1 where there is none."""
        index = np.full(self.size, -1)
        for position, region in enumerate(self.regions):
            left, top, right, bottom = region.box
            index[top:bottom, left:right] = position
        return index

    def mask(self, region):
        """(H, W) bool, where the region is in front."""
        return self.index == self.regions.index(region)

    @property
    def things(self):
        """The objects, crowds among them."""
        return [region for region in self.regions if self.categories[region.category].is_thing]

    @property
    def objects(self):
        """The objects without crowds."""
        return [region for region in self.things if not region.is_crowd]

    @property
    def labels(self):
        """{position of a category: (H, W) bool} of those that the picture shows, crowds included, in order."""
        present = sorted({region.category for region in self.regions})
        of = {c: [self.mask(r) for r in self.regions if r.category == c] for c in present}
        return {category: np.any(masks, axis=0) for category, masks in of.items()}

    def label_map(self, void, dtype=np.uint8, value=lambda category: category):
        """(H, W) positions of the categories, or what `value` makes of them."""
        pixels = np.full(self.size, void, dtype=dtype)
        for category, mask in self.labels.items():
            pixels[mask] = value(category)
        return pixels

    @property
    def segments(self):
        """(region, (H, W) bool) of panoptic annotations."""
        return [(region, self.mask(region)) for region in self.regions]

    @property
    def photo(self):
        """(H, W, 3) uint8, in the categories' colours with a little noise."""
        pixels = np.zeros((*self.size, 3))
        for region in self.regions:
            pixels[self.mask(region)] = self.categories[region.category].color
        noise = np.random.default_rng(self.number).integers(-12, 13, pixels.shape)
        return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def draw(table, names, *, stuff, things, crowd=True):
    """Two scenes of a train and two of a val half, all different.

    Above is the first stuff class, below the second but for a strip at the right without a category; on them are two
    objects of the first thing class, one of the second and a crowd of the first.

    Args:
        table: of categories.
        names: {half: names of the two scenes}.
        stuff: names of two categories, or none for no ground.
        things: names of two categories.
        crowd: whether there is one.
    """
    positions = {category.name: position for position, category in enumerate(catalog.read_categories(table))}
    ground = [positions[name] for name in stuff]
    many, one = (positions[name] for name in things)
    numbered = [(half, name) for half in names for name in names[half]]
    scenes = {half: [] for half in names}
    for i, (half, name) in enumerate(numbered):
        height, horizon = 48 + 4 * i, 8 + 2 * i
        objects = [
            Region(many, (4 + 2 * i, 16, 16 + 2 * i, 30)),
            Region(many, (42, 14 + i, 57, 26)),  # no object has less than 100 pixels, which Cityscapes leaves out
            Region(one, (26, 30, 38, 44)),
        ]
        if crowd:
            objects.append(Region(many, (42, 34, 58, 44), is_crowd=True))
        areas = ((0, 0, WIDTH, horizon), (0, horizon, WIDTH - 4, height))
        regions = [Region(category, area) for category, area in zip(ground, areas, strict=False)] + objects
        scenes[half].append(Scene(name, i + 1, (height, WIDTH), table, tuple(regions)))
    return scenes


def save(path, pixels, **options):
    """Writes an image and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)


def save_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def colors_of(ids):
    """(H, W) segment ids as COCO's panoptic PNGs store them."""
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)


def rle(mask):
    """(H, W) bool -> COCO's compressed RLE, as in JSON."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def polygon(region):
    """The region's rectangle as COCO's list of polygons."""
    left, top, right, bottom = region.box
    return [[left, top, right, top, right, bottom, left, bottom]]


def box_of(mask):
    """(H, W) bool -> [left, top, width, height]."""
    rows, columns = np.flatnonzero(mask.any(axis=1)).tolist(), np.flatnonzero(mask.any(axis=0)).tolist()
    return [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]


def instances_json(scenes, *, image_of, categories, segmentation):
    """COCO instances of the scenes of one half.

    Args:
        scenes: of the half.
        image_of: Scene -> its row in "images".
        categories: those that count.
        segmentation: (Scene, Region) -> the annotation's field.
    """
    allowed = {category.id for category in categories}
    annotations = [
        {
            "image_id": image_of(scene)["id"], "category_id": scene.categories[region.category].id,
            "iscrowd": int(region.is_crowd), "bbox": box_of(scene.mask(region)), "area": int(scene.mask(region).sum()),
            "segmentation": segmentation(scene, region),
        }
        for scene in scenes for region in scene.things if scene.categories[region.category].id in allowed
    ]  # fmt: skip
    return {
        "images": [image_of(scene) for scene in scenes],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations, 1)],
        "categories": [{"id": category.id, "name": category.name} for category in categories],
    }


def write_panoptic(scenes, folder, json_file, *, image_of, file_of, segment_id):
    """COCO's panoptic annotations of the scenes of one half.

    Args:
        scenes: of the half.
        folder: for the PNGs.
        json_file: for the rest.
        image_of: Scene -> its row in "images".
        file_of: Scene -> name of its PNG.
        segment_id: (Scene, Region, number from 1) -> id of a segment.
    """
    annotations = []
    for scene in scenes:
        ids, rows = np.zeros(scene.size, dtype=np.int64), []
        for number, (region, mask) in enumerate(scene.segments, 1):
            found = segment_id(scene, region, number)
            ids[mask] = found
            rows.append({
                "id": found, "category_id": scene.categories[region.category].id, "iscrowd": int(region.is_crowd),
                "area": int(mask.sum()), "bbox": box_of(mask),
            })  # fmt: skip
        save(folder / file_of(scene), colors_of(ids))
        row = {"image_id": image_of(scene)["id"], "file_name": file_of(scene), "segments_info": rows}
        annotations.append(row)
    categories = scenes[0].categories
    save_json(json_file, {
        "images": [image_of(scene) for scene in scenes],
        "annotations": annotations,
        "categories": [{"id": c.id, "name": c.name, "isthing": int(c.is_thing)} for c in categories],
    })  # fmt: skip
