"""Training samples: this project's mappers against Detectron2's `DatasetMapper`, in one run.

    DETECTRON2_DATASETS=... OMP_NUM_THREADS=1 python benchmarks/loader.py          coco_mini_train, 100 images
    python benchmarks/loader.py --dataset coco_sample_train --images 20

Large-scale jittering to `--size`: each image has the same scale on both sides, and the scales are spread evenly over
0.1 to 2. Instances come from the same records, as RLE, which is what the data set has, and traced as polygons (with
OpenCV). Detectron2's mapper has ResizeScale, FixedSizeCrop and RandomFlip, masks, no recomputed boxes; with the mask
format "polygon" it makes no masks, which is left to the model. It crops polygons with shapely.

Prints two Markdown tables. The first has CPU milliseconds an image in this one process on one thread, medians of whole
passes in turns, and the bytes of a sample. The second has a PyTorch DataLoader with workers: CPU milliseconds an image
of all processes together, and images a second on the clock. Without Detectron2 only this project is timed.
"""

import argparse
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import PIL
import torch
from torch.utils.data import DataLoader, Dataset

from mask2former.data import LargeScaleJitter, SegmentationMapper, catalog
from mask2former.data.targets import mask_from_segmentation

Record = dict[str, Any]
Sample = Callable[[int], Any]
LOW, HIGH = 0.1, 2.0


@dataclass
class Side:
    """One mapper on one form of the records.

    Attributes:
        name: in the tables.
        sample: maps the image of a number.
        peer: name of the side it is compared with; None for a peer.
    """

    name: str
    sample: Sample
    peer: str | None = None


def scales(count: int) -> np.ndarray:
    """(count,) evenly over the range, in an order that has nothing to do with the images."""
    steps = LOW + (HIGH - LOW) * (np.arange(count) + 0.5) / count
    return np.random.default_rng(0).permutation(steps)


def ours(source: Any, records: Sequence[Record], size: int, num_classes: int) -> Sample:
    """This project's mapper."""
    mappers = [
        SegmentationMapper(
            source=source,
            num_classes=num_classes,
            augmentation=LargeScaleJitter(image_size=size, min_scale=scale, max_scale=scale),
        )
        for scale in scales(len(records))
    ]
    return lambda i: mappers[i](records[i], np.random.default_rng(i))


def theirs(mask_format: str, records: Sequence[Record], size: int) -> Sample:
    """Detectron2's mapper."""
    from detectron2.data import DatasetMapper  # noqa: TID251
    from detectron2.data import transforms as T  # noqa: TID251

    mappers = [
        DatasetMapper(
            is_train=True,
            augmentations=[
                T.ResizeScale(scale, scale, size, size),
                T.FixedSizeCrop((size, size)),
                T.RandomFlip(),
            ],
            image_format="RGB",
            use_instance_mask=True,
            instance_mask_format=mask_format,
            recompute_boxes=False,
        )
        for scale in scales(len(records))
    ]

    def sample(i: int) -> Any:
        np.random.seed(i)  # noqa: NPY002 (Detectron2 draws from the global generator)
        return mappers[i](records[i])

    return sample


def with_polygons(record: Record) -> Record:
    """The record with its RLE traced; objects of less than three corners are left out."""
    import cv2

    annotations = []
    for annotation in record["annotations"]:
        mask = mask_from_segmentation(annotation["segmentation"], record["height"], record["width"])
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        polygons = [contour.ravel().astype(float).tolist() for contour in contours if len(contour) >= 3]
        if polygons:
            annotations.append(annotation | {"segmentation": polygons})
    return record | {"annotations": annotations}


def sides(dataset: str, images: int, size: int) -> tuple[list[Side], int]:
    """All that is compared, and the number of images; images without objects are left out."""
    instance, panoptic = catalog.get(dataset), catalog.get(f"{dataset}_panoptic_with_sem_seg")
    by_id = {record["image_id"]: record for record in instance.load()}
    chosen = [r for r in panoptic.load() if by_id.get(r["image_id"], {}).get("annotations")][:images]
    rle = [by_id[record["image_id"]] for record in chosen]
    things, classes = (entry.metadata.num_classes for entry in (instance, panoptic))
    found = [
        Side("instances, RLE", ours("instance", rle, size, things), "Detectron2, RLE to bitmasks"),
        Side("panoptic", ours("panoptic", chosen, size, classes), "Detectron2, RLE to bitmasks"),
    ]
    has_peer = find_spec("detectron2") is not None
    if has_peer:
        found.append(Side("Detectron2, RLE to bitmasks", theirs("bitmask", rle, size)))
    if find_spec("cv2") is not None:
        traced = [with_polygons(record) for record in rle]
        found.append(
            Side("instances, polygons", ours("instance", traced, size, things), "Detectron2, polygons to bitmasks")
        )
        if has_peer and find_spec("shapely") is not None:  # with which Detectron2 crops polygons
            found.append(Side("Detectron2, polygons to bitmasks", theirs("bitmask", traced, size)))
            found.append(Side("Detectron2, polygons stay polygons", theirs("polygon", traced, size)))
    return found, len(chosen)


def size_of(value: Any) -> int:
    """Bytes of all tensors and arrays inside."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return int(value.nbytes)
    if isinstance(value, dict):
        return sum(size_of(part) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(size_of(part) for part in value)
    return sum(size_of(part) for part in vars(value).values()) if hasattr(value, "__dict__") else 0


def timed(found: Sequence[Side], images: int, repeats: int) -> dict[str, float]:
    """CPU milliseconds an image, medians."""
    times: dict[str, list[float]] = {side.name: [] for side in found}
    for turn in range(repeats + 1):  # the first one warms up
        for side in found:
            start = time.process_time()
            for i in range(images):
                side.sample(i)
            if turn:
                times[side.name].append((time.process_time() - start) / images * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


class Samples(Dataset[Any]):
    """What the loader's workers map."""

    def __init__(self, sample: Sample, images: int) -> None:
        self.sample, self.images = sample, images

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


def one_thread(worker: int) -> None:
    """Workers take one thread each, as PyTorch has it too."""
    torch.set_num_threads(1)


def loaded(side: Side, images: int, workers: int) -> tuple[float, float]:
    """CPU seconds of all processes, and seconds on the clock, of one pass."""
    start, cpu = time.perf_counter(), cpu_seconds()
    loader = DataLoader(
        Samples(side.sample, images),
        batch_size=4,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=one_thread,
    )
    for _ in loader:
        pass
    del loader  # its workers have ended, or their time would not be counted
    return cpu_seconds() - cpu, time.perf_counter() - start


def cpu_seconds() -> float:
    """Of this process and of all that it has started and that have ended."""
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def print_mapping(found: Sequence[Side], images: int, repeats: int) -> None:
    """The first table."""
    milliseconds = timed(found, images, repeats)
    print("| mapper | CPU ms an image | images a CPU second | times faster | MiB of a sample |\n|---|---|---|---|---|")
    for side in found:
        mine = milliseconds[side.name]
        ratio = f"{milliseconds[side.peer] / mine:.2f}" if side.peer in milliseconds else ""
        mebibytes = statistics.mean(size_of(side.sample(i)) for i in range(images)) / 2**20
        print(f"| {side.name} | {mine:.2f} | {1e3 / mine:.1f} | {ratio} | {mebibytes:.2f} |", flush=True)


def print_loading(found: Sequence[Side], images: int, repeats: int, workers: int) -> None:
    """The second table."""
    print(f"\n| DataLoader, {workers} workers | CPU ms an image | times faster | images a second |\n|---|---|---|---|")
    passes: dict[str, list[tuple[float, float]]] = {side.name: [] for side in found}
    for _ in range(repeats):
        for side in found:
            passes[side.name].append(loaded(side, images, workers))
    medians = {name: [statistics.median(v) / images for v in zip(*p, strict=True)] for name, p in passes.items()}
    for side in found:
        cpu, clock = medians[side.name]
        ratio = f"{medians[side.peer][0] / cpu:.2f}" if side.peer in medians else ""
        print(f"| {side.name} | {cpu * 1e3:.2f} | {ratio} | {1 / clock:.1f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="coco_mini_train")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found, images = sides(args.dataset, args.images, args.size)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, NumPy {np.__version__}, Pillow {PIL.__version__}; "
        f"{args.dataset}, {images} images, {args.size} pixels\n"
    )
    print_mapping(found, images, args.repeats)
    print_loading(found, images, args.repeats, args.workers)


if __name__ == "__main__":
    main()
