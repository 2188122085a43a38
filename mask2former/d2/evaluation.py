"""The core's metrics as Detectron2 evaluators: same names of results, gathered over all processes."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from mask2former.config import inference_arguments
from mask2former.d2.data import is_thing_of
from mask2former.data import read_label_map, read_panoptic_colors
from mask2former.data.targets import panoptic_ids
from mask2former.evaluation import InstanceAP, PanopticQuality, SemanticIoU
from mask2former.evaluation.tasks import evaluated_tasks


class _CoreEvaluator(DatasetEvaluator):
    """Feeds a core metric; ``make`` gives a fresh one, ``update`` takes one image."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._metric = make()

    def reset(self) -> None:
        self._metric = self._make()

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for record, output in zip(inputs, outputs, strict=True):
            self.update(record, output)

    def update(self, record: dict[str, Any], output: dict[str, Any]) -> None:
        raise TypeError(f"{type(self).__name__} must define update")

    def _merged(self) -> Any | None:
        """The metric over all processes, on the main one; None on the others."""
        comm.synchronize()
        metrics = comm.gather(self._metric)
        if not comm.is_main_process():
            return None
        merged = self._make()
        for metric in metrics:
            merged.merge(metric)
        return merged


class PanopticEvaluator(_CoreEvaluator):
    """Panoptic quality, from the record's panoptic PNG and segments -> "panoptic_seg"."""

    def __init__(self, dataset_name: str, num_classes: int) -> None:
        is_thing = is_thing_of(MetadataCatalog.get(dataset_name), num_classes)
        super().__init__(lambda: PanopticQuality(is_thing=is_thing))

    def update(self, record: dict[str, Any], output: dict[str, Any]) -> None:
        ids, segments = output["panoptic_seg"]
        target_ids = panoptic_ids(read_panoptic_colors(record["pan_seg_file_name"]))
        self._metric.update(ids.cpu().numpy(), segments, target_ids, record["segments_info"])

    def evaluate(self) -> dict[str, Any] | None:
        metric = self._merged()
        return None if metric is None else OrderedDict(panoptic_seg=metric.compute())


class SemanticEvaluator(_CoreEvaluator):
    """mIoU and its relatives, from the record's label map -> "sem_seg"."""

    def __init__(self, dataset_name: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        super().__init__(
            lambda: SemanticIoU(class_names=metadata.stuff_classes, ignore_label=metadata.ignore_label)
        )

    def update(self, record: dict[str, Any], output: dict[str, Any]) -> None:
        predicted = output["sem_seg"].argmax(0).cpu().numpy()
        self._metric.update(predicted, read_label_map(record["sem_seg_file_name"]))

    def evaluate(self) -> dict[str, Any] | None:
        metric = self._merged()
        return None if metric is None else OrderedDict(sem_seg=metric.compute())


class InstanceEvaluator(_CoreEvaluator):
    """COCO average precision of masks and boxes -> "segm" and "bbox"; writes the detections as COCO JSON."""

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        contiguous = metadata.thing_dataset_id_to_contiguous_id
        category_ids = sorted(contiguous, key=contiguous.__getitem__)
        self._labels = {label: place for place, label in enumerate(sorted(contiguous.values()))}
        self._output_dir = output_dir
        super().__init__(lambda: InstanceAP(coco_json=metadata.json_file, category_ids=category_ids))

    def update(self, record: dict[str, Any], output: dict[str, Any]) -> None:
        instances = output["instances"].to("cpu")
        is_known = [label in self._labels for label in instances.pred_classes.tolist()]
        instances = instances[torch.tensor(is_known, dtype=torch.bool)]  # no stuff, which has no average precision
        self._metric.update(
            record["image_id"],
            [self._labels[label] for label in instances.pred_classes.tolist()],
            instances.scores.numpy(),
            instances.pred_masks.numpy(),
            instances.pred_boxes.tensor.numpy(),
        )

    def evaluate(self) -> dict[str, Any] | None:
        metric = self._merged()
        if metric is None:
            return None
        if self._output_dir is not None:
            folder = Path(self._output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            metric.save(folder / "coco_instances_results.json")
        return OrderedDict(metric.compute())


# the published name
InstanceSegEvaluator = InstanceEvaluator


def build_evaluator(cfg: Any, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluators for a data set's ``evaluator_type`` and the results that the config asks for.

    Raises:
        ValueError: if the type is unknown, or no result that is on fits the data set.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = getattr(metadata, "evaluator_type", None)
    makers = {
        "panoptic": lambda: PanopticEvaluator(dataset_name, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES),
        "instance": lambda: InstanceEvaluator(dataset_name, output_dir),
        "semantic": lambda: SemanticEvaluator(dataset_name),
    }
    settings = inference_arguments(cfg)
    tasks = evaluated_tasks(dataset_name, kind, settings, lambda task: _has_ground_truth(metadata, task))
    return DatasetEvaluators([makers[task]() for task in tasks])


def _has_ground_truth(metadata: Any, task: str) -> bool:
    """Whether a panoptic data set comes with the files of a task."""
    field = {"panoptic": "panoptic_json", "instance": "json_file", "semantic": "sem_seg_root"}[task]
    return getattr(metadata, field, None) is not None
