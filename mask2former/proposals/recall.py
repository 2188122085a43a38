"""Average recall of the proposals of every prediction on a data set with ground truth."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mask2former.data.augmentations import whole_image
from mask2former.data.catalog import DatasetMetadata
from mask2former.data.mapper import SegmentationMapper, Source
from mask2former.data.records import Record
from mask2former.evaluation.proposal_recall import ProposalRecall, mask_ious
from mask2former.predictor import Predictor
from mask2former.proposals.regions import propose

LIMITS = (10, 100)


class RecallReport(NamedTuple):
    """What was found.

    Attributes:
        images: that were looked at.
        segments: of the ground truth in them, without crowds.
        layers: for each prediction, by `Proposals.layer`, "AR@10" and "AR@100" in percent, and if the data set has
            things and stuff "AR@100_th" and "AR@100_st" of these alone; nan where there was nothing to find.
    """

    images: int
    segments: int
    layers: dict[str, dict[str, float]]


def proposal_recall(predictor: Predictor, records: Iterable[Record], metadata: DatasetMetadata) -> RecallReport:
    """Compare proposals with the segments of a data set, whatever their categories.

    The model needs not know the data set's categories. Ground truth is, of each record, its panoptic segments, things
    and stuff; else its objects; else the regions of the classes in its label map. Crowds and ignored pixels are none.

    Args:
        predictor: its model proposes, in float32, at the size that its settings say.
        records: of the data set.
        metadata: of the data set.

    Raises:
        ValueError: if the model has no proposals, or a record's files do not fit it.
        FileNotFoundError: if a file of a record is missing.
    """
    is_thing = np.array([category.is_thing for category in metadata.categories])
    both_kinds = bool(is_thing.any() and not is_thing.all())
    metrics: dict[str, _LayerRecall] = {}
    images = 0
    for record in records:
        pixels, labels, masks = _with_truth(record, metadata)
        images += 1
        planes, size = predictor.model_input(pixels)
        for found in propose(predictor.model, planes, size, limit=max(LIMITS)):
            ious = mask_ious(found.masks.cpu().numpy(), masks)
            metrics.setdefault(found.layer, _LayerRecall(both_kinds)).update(ious, is_thing[labels])
    segments = next(iter(metrics.values())).overall.count if metrics else 0
    return RecallReport(images, segments, {layer: metric.compute() for layer, metric in metrics.items()})


class _LayerRecall:
    """Recall of all segments and, if there are both kinds, of things and of stuff."""

    def __init__(self, both_kinds: bool) -> None:
        self.overall = ProposalRecall(limits=LIMITS)
        self._kinds = {name: ProposalRecall(limits=LIMITS[-1:]) for name in (("th", "st") if both_kinds else ())}

    def update(self, ious: NDArray[np.float64], is_thing: NDArray[np.bool_]) -> None:
        self.overall.update(ious)
        for name, metric in self._kinds.items():
            metric.update(ious[:, is_thing if name == "th" else ~is_thing])

    def compute(self) -> dict[str, float]:
        parts = {f"{key}_{name}": v for name, metric in self._kinds.items() for key, v in metric.compute().items()}
        return self.overall.compute() | parts


def _with_truth(
    record: Mapping[str, Any], metadata: DatasetMetadata
) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
    """The image (H, W, 3), and labels (N,) and masks (N, H, W) of its segments."""
    source: Source = "semantic"
    if "pan_seg_file_name" in record:
        source = "panoptic"
    elif "annotations" in record:
        source = "instance"
    mapper = SegmentationMapper(
        source=source,
        num_classes=metadata.num_classes,
        augmentation=whole_image,
        ignore_label=metadata.ignore_label,
    )
    image, target = mapper(record, np.random.default_rng(0))
    return image.permute(1, 2, 0).numpy(), target.labels.numpy(), target.masks.numpy()
