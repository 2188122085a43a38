"""Shared parts of the Detectron2 tests; each module skips itself, with the reason, where Detectron2 is missing."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def tiny_cfg(tmp_path):
    """The smoke config on four images of the sample set, at 64 pixels."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from mask2former.d2 import get_config
    from mask2former.data import catalog

    names = {}
    for split in ("train", "val"):
        whole = f"coco_sample_{split}_panoptic_with_sem_seg"
        names[split] = f"four_of_{whole}"
        if names[split] not in DatasetCatalog:
            DatasetCatalog.register(names[split], lambda whole=whole: catalog.get(whole).load()[:4])
            fields = {k: v for k, v in MetadataCatalog.get(whole).as_dict().items() if k != "name"}
            MetadataCatalog.get(names[split]).set(**fields)
    return get_config(
        REPOSITORY / "configs/quick_schedules/smoke.yaml",
        [
            "OUTPUT_DIR", str(tmp_path / "output"),
            "DATASETS.TRAIN", f"('{names['train']}',)",
            "DATASETS.TEST", f"('{names['val']}',)",
            "INPUT.IMAGE_SIZE", "64",
            "INPUT.MIN_SIZE_TEST", "64",
            "INPUT.MAX_SIZE_TEST", "96",
            "SOLVER.IMS_PER_BATCH", "2",
            "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "128",
            "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "20",
        ],
    )  # fmt: skip
