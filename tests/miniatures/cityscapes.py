"""Cityscapes' fine annotations, with what cityscapesScripts' csCreateTrainIdLabelImgs and csCreatePanopticImgs make."""

import numpy as np

from tests.miniatures.scene import draw, save, save_json, write_panoptic

OUT_OF_ROI = 3  # a label id that no metric counts
CITIES = {"train": ("aachen", "ulm"), "val": ("frankfurt", "munster")}


def image_id(scene):
    return scene.name


def cityscapes(datasets, *, derived=True):
    """`cityscapes`; without `derived` only what one downloads."""
    names = {half: [f"{city}_00000{n}_000019" for n, city in enumerate(cities)] for half, cities in CITIES.items()}
    scenes = draw("cityscapes", names, stuff=("sky", "road"), things=("car", "person"))
    root = datasets / "cityscapes"
    for half in CITIES:
        for scene in scenes[half]:
            city = scene.name.split("_")[0]
            save(root / "leftImg8bit" / half / city / f"{scene.name}_leftImg8bit.png", scene.photo)
            _annotations(root / "gtFine" / half / city, scene, derived)
        if derived:
            _panoptic(root / "gtFine", half, scenes[half])
    return scenes


def _annotations(folder, scene, derived):
    ids = [category.id for category in scene.categories]
    save(folder / f"{scene.name}_gtFine_labelIds.png", scene.label_map(OUT_OF_ROI, value=lambda c: ids[c]))
    save(folder / f"{scene.name}_gtFine_instanceIds.png", instance_ids(scene))
    height, width = scene.size
    outlines = [
        {"label": scene.categories[r.category].name + ("group" if r.is_crowd else ""), "polygon": _corners(r)}
        for r in scene.regions
    ]
    content = {"imgHeight": height, "imgWidth": width, "objects": outlines}
    save_json(folder / f"{scene.name}_gtFine_polygons.json", content)
    if derived:
        save(folder / f"{scene.name}_gtFine_labelTrainIds.png", scene.label_map(255))


def _corners(region):
    """Cityscapes' polygons cover their corners."""
    left, top, right, bottom = region.box
    return [[left, top], [right - 1, top], [right - 1, bottom - 1], [left, bottom - 1]]


def instance_ids(scene):
    """(H, W) uint16: id of the category, and for single objects 1000 times it plus their number from 0."""
    pixels = np.full(scene.size, OUT_OF_ROI, dtype=np.uint16)
    counts = {}
    for region in scene.regions:
        value = scene.categories[region.category].id
        if region in scene.objects:
            counts[value] = counts.get(value, -1) + 1
            value = 1000 * value + counts[value]
        pixels[scene.mask(region)] = value
    return pixels


def _panoptic(folder, half, scenes):
    def image_row(scene):
        height, width = scene.size
        file_name = f"{scene.name}_gtFine_leftImg8bit.png"  # as the script writes it; there is no such file
        return {"id": scene.name, "width": width, "height": height, "file_name": file_name}

    def segment_id(scene, region, number):
        return int(instance_ids(scene)[scene.mask(region)][0])

    write_panoptic(
        scenes, folder / f"cityscapes_panoptic_{half}", folder / f"cityscapes_panoptic_{half}.json",
        image_of=image_row, file_of=lambda s: f"{s.name}_gtFine_panoptic.png", segment_id=segment_id,
    )  # fmt: skip
