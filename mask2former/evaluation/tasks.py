"""Which tasks a data set is evaluated for, and how its records and a model's results feed the metrics.

Both engines use this: they bring results and gather metrics over their processes, and decide nothing else.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mask2former.data.catalog import Category, DatasetMetadata
from mask2former.data.images import read_label_map, read_panoptic_ids
from mask2former.data.records import Record
from mask2former.evaluation.average_precision import InstanceAP
from mask2former.evaluation.boundary import DILATION_RATIO
from mask2former.evaluation.cityscapes_ap import CityscapesAP
from mask2former.evaluation.cityscapes_iou import CityscapesIoU
from mask2former.evaluation.class_names import distinct_names
from mask2former.evaluation.lvis_ap import LvisAP
from mask2former.evaluation.panoptic_quality import PanopticQuality, SegmentLike
from mask2former.evaluation.semantic_iou import SemanticIoU

Results = dict[str, dict[str, float]]
"""Numbers in percent by Detectron2's names: {"panoptic_seg": {"PQ": 51.9, ...}, "segm": {"AP": ...}, ...}."""


class Metric(Protocol):
    """What all metrics have in common."""

    def merge(self, other: Any) -> None: ...
    def compute(self) -> Mapping[str, Any]: ...


class PanopticSegments(Protocol):
    """Segments of one image: ids (H, W), 0 is void, and what they are."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def segments(self) -> Sequence[SegmentLike | Mapping[str, Any]]: ...


class Instances(Protocol):
    """Instances of one image: (N,), (N,), (N, H, W) bool and (N, 4) x1, y1, x2, y2.

    If there are ``queries`` (N,) as well, those of one query have one mask.
    """

    @property
    def labels(self) -> Tensor: ...
    @property
    def scores(self) -> Tensor: ...
    @property
    def masks(self) -> Tensor: ...
    @property
    def boxes(self) -> Tensor: ...


class Result(Protocol):
    """Results of one image on any device, such as `mask2former.inference.ImageResult`; None for a task that is off."""

    @property
    def semantic(self) -> Tensor | None: ...  # (K, H, W) scores or (H, W) labels
    @property
    def panoptic(self) -> PanopticSegments | None: ...
    @property
    def instances(self) -> Instances | None: ...


class Task:
    """Feeds the metrics of one task, image by image.

    What ``update`` does has two steps, so that the second one can be done in the background (`BackgroundUpdates`).

    Attributes:
        metrics: by name. What one process sends to another.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.metrics: dict[str, Any] = dict(metrics)

    def update(self, record: Record, result: Result) -> None:
        """Takes the results of the image of a record, which says where its ground truth is."""
        self.count(record, self.take(result))

    def take(self, result: Result) -> Any:
        """What the metrics need of a result, in the host's memory: first step, in the thread that has predicted it."""
        raise NotImplementedError

    def count(self, record: Record, taken: Any) -> None:
        """Reads the ground truth and feeds the metrics with what was taken: second step, one image after the other."""
        raise NotImplementedError

    def merge(self, others: Iterable[Mapping[str, Metric]]) -> None:
        """Adds the images that other processes have seen."""
        for metrics in others:
            for name, metric in metrics.items():
                self.metrics[name].merge(metric)

    def results(self) -> Results:
        """Results of all images."""
        return {name: dict(metric.compute()) for name, metric in self.metrics.items()}

    def save(self, folder: Path) -> None:
        """Writes what the task has besides its results into a folder."""


class PanopticTask(Task):
    """Panoptic quality, from the record's panoptic PNG and segments."""

    def __init__(self, metadata: DatasetMetadata, *, with_boundary: bool = False) -> None:
        is_thing, names = [c.is_thing for c in metadata.categories], _names(metadata.categories)
        metrics = {"panoptic_seg": PanopticQuality(is_thing=is_thing, class_names=names)}
        if with_boundary:
            metrics["boundary_panoptic_seg"] = PanopticQuality(
                is_thing=is_thing, class_names=names, dilation_ratio=DILATION_RATIO
            )
        super().__init__(metrics)

    def take(self, result: Result) -> tuple[npt.NDArray[np.integer], Sequence[Any]]:
        assert result.panoptic is not None
        return result.panoptic.ids.cpu().numpy(), result.panoptic.segments

    def count(self, record: Record, taken: tuple[npt.NDArray[np.integer], Sequence[Any]]) -> None:
        target_ids = read_panoptic_ids(record["pan_seg_file_name"])
        for metric in self.metrics.values():
            metric.update(*taken, target_ids, record["segments_info"])


class SemanticTask(Task):
    """mIoU and its relatives, from the record's label map."""

    def __init__(self, metadata: DatasetMetadata) -> None:
        names = _names(metadata.categories)
        super().__init__({"sem_seg": SemanticIoU(class_names=names, ignore_label=metadata.ignore_label)})

    def take(self, result: Result) -> npt.NDArray[np.integer]:
        return _labels(result)

    def count(self, record: Record, taken: npt.NDArray[np.integer]) -> None:
        self.metrics["sem_seg"].update(taken, read_label_map(record["sem_seg_file_name"]))


class CityscapesSemanticTask(Task):
    """IoU and iIoU as Cityscapes has them, from the record's label map and instance ids."""

    def __init__(self, metadata: DatasetMetadata) -> None:
        names = _names(metadata.categories)
        super().__init__({"sem_seg": CityscapesIoU(class_names=names, ignore_label=metadata.ignore_label)})

    def take(self, result: Result) -> npt.NDArray[np.integer]:
        return _labels(result)

    def count(self, record: Record, taken: npt.NDArray[np.integer]) -> None:
        target, ids = read_label_map(record["sem_seg_file_name"]), read_label_map(record["instance_ids_file_name"])
        self.metrics["sem_seg"].update(taken, target, ids)


class InstanceTask(Task):
    """COCO's average precision of masks and boxes, from the data set's annotation file; stuff is left out."""

    metric_class: type[InstanceAP] = InstanceAP
    detections_file = "coco_instances_results.json"

    def __init__(self, metadata: DatasetMetadata, *, with_boundary: bool = False) -> None:
        self._things = _Things(metadata.categories)
        if metadata.instances_json is None:
            raise ValueError("metadata.instances_json must be the annotations of the data set, got None")
        metric = self.metric_class(
            coco_json=metadata.instances_json,
            category_ids=[category.id for category in self._things.categories],
            iou_types=("segm", "bbox", *(["boundary"] if with_boundary else [])),
        )
        super().__init__({"instances": metric})

    def take(self, result: Result) -> "_Found":
        return self._things.select(result)

    def count(self, record: Record, taken: "_Found") -> None:
        self.metrics["instances"].update(record["image_id"], **taken._asdict())

    def results(self) -> Results:
        return dict(self.metrics["instances"].compute())

    def save(self, folder: Path) -> None:
        self.metrics["instances"].save(folder / self.detections_file)


class LvisTask(InstanceTask):
    """LVIS's average precision of masks and boxes."""

    metric_class = LvisAP
    detections_file = "lvis_instances_results.json"


class CityscapesInstanceTask(Task):
    """Cityscapes' average precision of masks, from the record's instance ids; stuff is left out."""

    def __init__(self, metadata: DatasetMetadata) -> None:
        self._things = _Things(metadata.categories)
        super().__init__({"segm": CityscapesAP(class_names=_names(self._things.categories))})

    def take(self, result: Result) -> "_Found":
        return self._things.select(result)

    def count(self, record: Record, taken: "_Found") -> None:
        ids = read_label_map(record["instance_ids_file_name"])
        self.metrics["segm"].update(taken.labels, taken.scores, taken.masks[taken.mask_of], ids)


class _Found(NamedTuple):
    """The instances of one image that are things, best score first.

    Attributes:
        labels: (N,) int64 places among the things.
        scores: (N,) float32.
        masks: (M, H, W) bool, those of several instances once.
        boxes: (N, 4) x1, y1, x2, y2.
        mask_of: (N,) int64 places in ``masks``.
    """

    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    masks: npt.NDArray[np.bool_]
    boxes: npt.NDArray[np.float32]
    mask_of: npt.NDArray[np.int64]


class _Things:
    """The things among the categories of a model, and the instances of these."""

    def __init__(self, categories: Sequence[Category]) -> None:
        self.categories = tuple(category for category in categories if category.is_thing)
        labels = [label for label, category in enumerate(categories) if category.is_thing]
        self._places = {label: place for place, label in enumerate(labels)}

    def select(self, result: Result) -> _Found:
        """The instances that are things, in the host's memory."""
        found = result.instances
        assert found is not None
        places = np.array([self._places.get(label, -1) for label in found.labels.tolist()], dtype=np.int64)
        kept = np.flatnonzero(places >= 0)
        # A query that is an instance of several classes has one mask: the best hundred are often those of a dozen.
        of_queries: Tensor | None = getattr(found, "queries", None)
        queries = kept if of_queries is None else of_queries.cpu().numpy()[kept]
        _, first, mask_of = np.unique(queries, return_index=True, return_inverse=True)
        chosen = torch.from_numpy(kept[first]).to(found.masks.device)
        return _Found(
            labels=places[kept],
            scores=found.scores.cpu().numpy()[kept],
            masks=found.masks[chosen].cpu().numpy(),
            boxes=found.boxes.cpu().numpy()[kept],
            mask_of=mask_of,
        )


_WITH_BOUNDARY: dict[str, type[PanopticTask | InstanceTask]] = {
    "panoptic": PanopticTask,
    "instance": InstanceTask,
    "lvis": LvisTask,
}
_OTHERS: dict[str, type[SemanticTask | CityscapesInstanceTask | CityscapesSemanticTask]] = {
    "semantic": SemanticTask,
    "cityscapes_instance": CityscapesInstanceTask,
    "cityscapes_semantic": CityscapesSemanticTask,
}
# Which of the model's results a task is about, where its name does not say.
_RESULT_OF = {"lvis": "instance", "cityscapes_instance": "instance", "cityscapes_semantic": "semantic"}
_THREE = ("panoptic", "instance", "semantic")
TASKS_OF_KIND: dict[str, tuple[str, ...]] = {
    "coco": ("instance",),
    "lvis": ("lvis",),
    "sem_seg": ("semantic",),
    "coco_panoptic_seg": _THREE,
    "ade20k_panoptic_seg": _THREE,
    "mapillary_vistas_panoptic_seg": _THREE,
    "cityscapes_instance": ("cityscapes_instance",),
    "cityscapes_sem_seg": ("cityscapes_semantic",),
    "cityscapes_panoptic_seg": ("panoptic", "cityscapes_instance", "cityscapes_semantic"),
}
"""The tasks of each ``evaluator_type``."""


def evaluated_tasks(name: str, metadata: DatasetMetadata, settings: Mapping[str, Any]) -> list[str]:
    """The tasks that data set and config have in common.

    A panoptic data set is evaluated for instances if it has annotations of such and any things, and for semantic
    segmentation if it has label maps; others have just their own task.

    Args:
        name: of the data set, for messages.
        metadata: of the data set.
        settings: from `mask2former.config.inference_arguments`.

    Raises:
        ValueError: if the type is unknown, or no result that is on fits the data set.
    """
    kind = metadata.evaluator_type
    if kind not in TASKS_OF_KIND:
        raise ValueError(f"evaluator_type of data set {name!r} must be one of {sorted(TASKS_OF_KIND)}, got {kind!r}")
    known = TASKS_OF_KIND[kind]
    tasks = [task for task in known if settings[f"{_RESULT_OF.get(task, task)}_on"] and _has_truth(metadata, task)]
    if not tasks:
        raise ValueError(
            f"data set {name!r} can be evaluated for {known}, but of these MODEL.MASK_FORMER.TEST switches none on"
        )
    return tasks


def make_tasks(
    name: str, metadata: DatasetMetadata, settings: Mapping[str, Any], *, with_boundary: bool = False
) -> list[Task]:
    """The tasks of a data set, which have seen nothing yet.

    Args:
        name, metadata, settings: as in `evaluated_tasks`.
        with_boundary: boundary AP and boundary PQ as well.

    Raises:
        ValueError: as `evaluated_tasks`, or if metadata and annotation file do not fit.
        FileNotFoundError: if the annotation file does not exist.
    """
    return [
        _WITH_BOUNDARY[task](metadata, with_boundary=with_boundary)
        if task in _WITH_BOUNDARY
        else _OTHERS[task](metadata)
        for task in evaluated_tasks(name, metadata, settings)
    ]


def merged_results(tasks: Sequence[Task], gather: Callable[[Any], Sequence[Any]]) -> Results | None:
    """Joins the metrics of all processes, each of which must call it, in the first one.

    Args:
        tasks: of this process.
        gather: brings an object of each process, in order, to the first one, and nothing to the others.

    Returns:
        The results on the first process, None on the others.
    """
    parts = gather([task.metrics for task in tasks])
    if not parts:
        return None
    results: Results = {}
    for place, task in enumerate(tasks):
        task.merge(part[place] for part in parts[1:])
        results |= task.results()
    return results


def _has_truth(metadata: DatasetMetadata, task: str) -> bool:
    if not metadata.evaluator_type.endswith("panoptic_seg"):
        return True
    if task == "instance":
        return metadata.instances_json is not None and any(c.is_thing for c in metadata.categories)
    if task == "semantic":
        return metadata.sem_seg_root is not None
    return True


def _names(categories: Sequence[Category]) -> list[str]:
    return distinct_names([c.name for c in categories], [c.id for c in categories])


def _labels(result: Result) -> npt.NDArray[np.integer]:
    """(H, W) labels, those with the best scores."""
    assert result.semantic is not None
    labels = result.semantic if result.semantic.ndim == 2 else result.semantic.argmax(0)
    return labels.cpu().numpy()
