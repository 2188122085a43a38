"""The numbers behind `data config`: two recipes, one for a CPU and one for GPUs; see docs/custom_dataset.md."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mask2former.own_data.source import Kind

REFERENCE_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What does not depend on the data, and the constants of the rules for what does.

    Attributes:
        what: for people.
        bases: config to inherit from, below the folder `configs`, by kind of data.
        settings: keys that the recipe sets, whatever the data are.
        learning_rate: at `REFERENCE_BATCH` images a step; it is scaled with the batch.
        images_per_process: images a step and process, at most `REFERENCE_BATCH` in all.
        object_side_px: the scale is chosen so that the median object has about this side,
        shortest_side_px: but the shorter side of a test image is never smaller than the images are, up to this,
        largest_side_px: and never larger than this.
        train_scales: lengths of the shorter side in training, relative to that in tests.
        crop_px: side of the square that training sees.
        min_queries: of the model,
        max_queries: and at most so many.
        epochs: a schedule without a time limit shows each image so often,
        min_images_seen: and at least so many images in all.
        evaluations: during the training, with a checkpoint each; the last is at its end.
        seconds_per_iteration: fixed part of a step's time, for --budget-minutes; None: not known.
        seconds_per_megapixel: the part that grows with the pixels of the batch.
        seconds_per_test_image: of the evaluation.
    """

    what: str
    bases: Mapping[Kind, str]
    settings: Mapping[str, Any]
    learning_rate: float
    images_per_process: int
    object_side_px: float
    shortest_side_px: int
    largest_side_px: int
    train_scales: tuple[float, ...]
    crop_px: int
    min_queries: int
    max_queries: int
    epochs: int
    min_images_seen: int
    evaluations: int
    seconds_per_iteration: float | None
    seconds_per_megapixel: float
    seconds_per_test_image: float


_TINY = "quick_schedules/Base-tiny.yaml"

# Found by a few short trials on nuclei_dsb2018, which were not enough to tell each setting's part: crops that show few
# objects, enlarged, and positions added to the image's patches (APE) ended a plateau on which the losses of masks
# stayed for a thousand steps without them; a narrow model makes twice as many steps in the same time.
CPU = Recipe(
    what="a model of 2 M parameters from random weights, for a CPU",
    bases={"instance": _TINY, "object_masks": _TINY, "panoptic": _TINY, "semantic": _TINY},
    settings={
        "MODEL.DEVICE": "cpu",
        "MODEL.SWIN.APE": True,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 64,
        "MODEL.SEM_SEG_HEAD.MASK_DIM": 64,
        "MODEL.MASK_FORMER.HIDDEN_DIM": 64,
        "MODEL.MASK_FORMER.NHEADS": 4,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 256,
        "MODEL.MASK_FORMER.ENCODER_DIM_FEEDFORWARD": 256,
        "MODEL.MASK_FORMER.DEC_LAYERS": 5,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
    },
    learning_rate=4e-3,  # 1e-3 at batch 4
    images_per_process=4,
    object_side_px=16.0,
    shortest_side_px=384,
    largest_side_px=512,
    train_scales=(0.8, 0.9, 1.0, 1.25, 1.5, 1.8),
    crop_px=256,
    min_queries=30,
    max_queries=100,
    epochs=30,
    min_images_seen=12_000,
    evaluations=1,
    seconds_per_iteration=0.05,
    seconds_per_megapixel=1.5,
    seconds_per_test_image=0.4,
)

_COCO_INSTANCE = "coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"

GPU = Recipe(
    what="the published R50 model from ImageNet weights, for GPUs",
    bases={
        "instance": _COCO_INSTANCE,
        "object_masks": _COCO_INSTANCE,
        "panoptic": "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
        "semantic": "ade20k/semantic-segmentation/maskformer2_R50_bs16_160k.yaml",
    },
    settings={
        "MODEL.DEVICE": "cuda",
        "SOLVER.LR_SCHEDULER_NAME": "WarmupPolyLR",
    },
    learning_rate=1e-4,
    images_per_process=4,
    object_side_px=40.0,
    shortest_side_px=800,
    largest_side_px=1024,
    train_scales=(0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.375, 1.5, 1.75, 2.0),
    crop_px=640,
    min_queries=100,
    max_queries=300,
    epochs=50,
    min_images_seen=160_000,
    evaluations=10,
    seconds_per_iteration=None,
    seconds_per_megapixel=0.0,
    seconds_per_test_image=0.0,
)

RECIPES = {"cpu": CPU, "cuda": GPU}
