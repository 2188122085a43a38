"""Two processes that gather their metrics give what one process gives."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from mask2former.data.catalog import Category, DatasetMetadata
from mask2former.evaluation.cityscapes_labels import CLASSES
from mask2former.evaluation.tasks import make_tasks, merged_results
from mask2former.modeling.postprocessing import masks_to_boxes
from tests.miniatures.scene import colors_of, save, save_json

ALL_ON = {"panoptic_on": True, "instance_on": True, "semantic_on": True}
COUNT, HEIGHT, WIDTH = 5, 40, 60


def write_images(folder):
    """Blocks of Cityscapes' classes, in the files of Cityscapes and of COCO and LVIS; -> records."""
    rng = np.random.default_rng(0)
    records, annotations = [], []
    for i in range(COUNT):
        labels = np.kron(rng.integers(0, 19, (2, 3)), np.ones((20, 20), int))
        label_ids = np.array([c.label_id for c in CLASSES])[labels]
        number = np.kron(np.arange(6).reshape(2, 3), np.ones((20, 20), int))
        is_thing = np.array([c.mean_size is not None for c in CLASSES])[labels]
        ids = np.where(is_thing, label_ids * 1000 + number, label_ids)
        save(folder / f"{i}_labels.png", labels.astype(np.uint8))
        save(folder / f"{i}_ids.png", ids.astype(np.uint16))
        save(folder / f"{i}_panoptic.png", colors_of(number + 1))
        segments = [
            {"id": n + 1, "category_id": int(labels[number == n][0]), "iscrowd": 0, "isthing": True} for n in range(6)
        ]
        for n in range(6):
            y, x = n // 3 * 20, n % 3 * 20
            corners = [x, y, x + 20, y, x + 20, y + 20, x, y + 20]
            annotations.append({
                "id": len(annotations) + 1, "image_id": i, "category_id": int(labels[number == n][0]),
                "bbox": [x, y, 20, 20], "area": 400, "segmentation": [corners],
            })  # fmt: skip
        records.append({
            "image_id": i, "pan_seg_file_name": str(folder / f"{i}_panoptic.png"), "segments_info": segments,
            "sem_seg_file_name": str(folder / f"{i}_labels.png"),
            "instance_ids_file_name": str(folder / f"{i}_ids.png"),
        })  # fmt: skip
    save_json(folder / "instances.json", {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "neg_category_ids": list(range(19)),
                    "not_exhaustive_category_ids": []} for i in range(COUNT)],
        "annotations": annotations,
        "categories": [{"id": i, "name": c.name, "frequency": "rcf"[i % 3]} for i, c in enumerate(CLASSES)],
    })  # fmt: skip
    return records


def all_tasks(folder):
    categories = tuple(Category(i, c.name, c.mean_size is not None, (0, 0, 0)) for i, c in enumerate(CLASSES))
    tasks = []
    for kind in ("coco_panoptic_seg", "cityscapes_instance", "cityscapes_sem_seg", "lvis"):
        metadata = DatasetMetadata(
            categories=categories, evaluator_type=kind, instances_json=folder / "instances.json", sem_seg_root=folder
        )
        tasks.append(make_tasks("made", metadata, ALL_ON, with_boundary=True))
    return tasks


def prediction(record):
    """The truth, moved a few pixels, by the number of the image alone."""
    rng = np.random.default_rng(record["image_id"])
    number = np.kron(np.arange(6).reshape(2, 3), np.ones((20, 20), int))
    moved = np.roll(number, rng.integers(-3, 4, 2), (0, 1))
    categories = [s["category_id"] if rng.random() < 0.8 else int(rng.integers(19)) for s in record["segments_info"]]
    masks = torch.from_numpy(np.stack([moved == n for n in range(6)]))
    return SimpleNamespace(
        panoptic=SimpleNamespace(
            ids=torch.from_numpy(moved + 1), segments=[{"id": n + 1, "category_id": categories[n]} for n in range(6)]
        ),
        instances=SimpleNamespace(
            labels=torch.tensor(categories), scores=torch.from_numpy(rng.random(6)), masks=masks,
            boxes=masks_to_boxes(masks),
        ),
        semantic=torch.nn.functional.one_hot(torch.tensor(categories)[torch.from_numpy(moved)], 19).permute(2, 0, 1),
    )  # fmt: skip


def run(rank, world_size, folder):
    """One process: its images, and on the first one the results as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size)
    records = json.loads((folder / "records.json").read_text())
    gathered = []

    def gather(part):
        found = [None] * world_size if rank == 0 else None
        dist.gather_object(part, found)
        return found or []

    for tasks in all_tasks(folder):
        for record in records[rank::world_size]:
            for task in tasks:
                task.update(record, prediction(record))
        gathered.append(merged_results(tasks, gather))
    if rank == 0:
        (folder / f"results{world_size}.json").write_text(json.dumps(gathered))
    else:
        assert gathered == [None] * len(gathered)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    save_json(tmp_path / "records.json", write_images(tmp_path))
    run(0, 1, tmp_path)
    torch.multiprocessing.spawn(run, (2, tmp_path), nprocs=2)
    alone, together = (json.loads((tmp_path / f"results{n}.json").read_text()) for n in (1, 2))
    names = [list(results) for results in alone]
    assert names == [
        ["panoptic_seg", "boundary_panoptic_seg", "segm", "bbox", "boundary", "sem_seg"],
        ["segm"], ["sem_seg"], ["segm", "bbox", "boundary"],
    ]  # fmt: skip
    for one, two in zip(alone, together, strict=True):
        for name, expected in one.items():
            assert two[name] == pytest.approx(expected, rel=1e-9, nan_ok=True), name
            assert 1 < next(v for v in expected.values() if not math.isnan(v)) < 99
