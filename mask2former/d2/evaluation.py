"""The core's evaluation as Detectron2 evaluators: same names of results, gathered over all processes."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from mask2former.config import evaluation_arguments, inference_arguments
from mask2former.d2.data import dataset_metadata, is_thing_of
from mask2former.data.catalog import Category, DatasetMetadata
from mask2former.evaluation.background import BackgroundUpdates
from mask2former.evaluation.progress import with_progress
from mask2former.evaluation.reporting import report
from mask2former.evaluation.tasks import (
    InstanceTask,
    PanopticTask,
    SemanticTask,
    Task,
    evaluated_tasks,
    make_tasks,
    merged_results,
)
from mask2former.inference import ImageResult
from mask2former.modeling.postprocessing import InstanceResult, PanopticResult


class TaskEvaluator(DatasetEvaluator):
    """Some tasks of the core as a Detectron2 evaluator; ``make`` gives fresh ones."""

    def __init__(self, name: str, make: Callable[[], Sequence[Task]], output_dir: str | None = None) -> None:
        """Set up.

        Args:
            name: of the data set.
            make: gives tasks that have seen nothing.
            output_dir: where results and detections are written; None: nowhere.
        """
        self._name = name
        self._make = make
        self._folder = None if output_dir is None else Path(output_dir)
        self._tasks = make()
        self._counting = BackgroundUpdates(self._tasks)

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks, which have counted all images so far."""
        self._counting.finish()
        return self._tasks

    def reset(self) -> None:
        """Forget all images."""
        self._counting.cancel()
        self._tasks = self._make()
        self._counting = BackgroundUpdates(self._tasks)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Take the results of some images, which are counted while the model predicts the next ones."""
        for record, output in zip(inputs, outputs, strict=True):
            self._counting.update(record, _result_of(output))

    def evaluate(self) -> dict[str, Any] | None:
        """The results of all processes on the main one, which reports them; None on the others."""
        tasks = self.tasks
        comm.synchronize()
        results = merged_results(tasks, comm.gather)
        if results is None:
            return None
        report(self._name, results, self._folder, tasks)
        return OrderedDict(results)


class PanopticEvaluator(TaskEvaluator):
    """Panoptic quality, from the record's panoptic PNG and segments -> "panoptic_seg"."""

    def __init__(self, dataset_name: str, num_classes: int) -> None:
        metadata = core_metadata(dataset_name, num_classes)
        super().__init__(dataset_name, lambda: [PanopticTask(metadata)])


class SemanticEvaluator(TaskEvaluator):
    """mIoU and its relatives, from the record's label map -> "sem_seg"."""

    def __init__(self, dataset_name: str) -> None:
        metadata = core_metadata(dataset_name)
        super().__init__(dataset_name, lambda: [SemanticTask(metadata)])


class InstanceEvaluator(TaskEvaluator):
    """COCO average precision of masks and boxes -> "segm" and "bbox"; writes the detections as COCO JSON."""

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        metadata = core_metadata(dataset_name)
        super().__init__(dataset_name, lambda: [InstanceTask(metadata)], output_dir)


# the published name
InstanceSegEvaluator = InstanceEvaluator


def build_evaluator(cfg: Any, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator for a data set's ``evaluator_type`` and the results that the config asks for.

    Raises:
        ValueError: if the type is unknown, or no result that is on fits the data set.
    """
    settings = inference_arguments(cfg)
    metadata = core_metadata(dataset_name)
    if "panoptic" in evaluated_tasks(dataset_name, metadata, settings):
        metadata = core_metadata(dataset_name, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    make = lambda: make_tasks(dataset_name, metadata, settings, **evaluation_arguments(cfg))  # noqa: E731
    return TaskEvaluator(dataset_name, make, output_dir)


def core_metadata(dataset_name: str, num_classes: int | None = None) -> DatasetMetadata:
    """What the core must know of a data set that is registered with Detectron2, by whomever.

    Args:
        dataset_name: its name.
        num_classes: of the model, where it must be known of each whether it is things; None: those of the metadata.

    Raises:
        ValueError: if the metadata do not say which classes there are, or which of the model's are things.
    """
    known = dataset_metadata(dataset_name)
    names = list(getattr(known, "stuff_classes", None) or getattr(known, "thing_classes", []))
    things = getattr(known, "thing_dataset_id_to_contiguous_id", None)
    if num_classes is not None:
        is_thing_of(known, num_classes)  # says what is missing
    if things is None and getattr(known, "evaluator_type", None) == "lvis":
        things = {label + 1: label for label in range(len(names))}  # Detectron2's convention for LVIS
    thing_ids = {label: category_id for category_id, label in (things or {}).items()}
    stuff = getattr(known, "stuff_dataset_id_to_contiguous_id", None) or {}
    ids = {label: category_id for category_id, label in stuff.items()} | thing_ids
    if not hasattr(known, "stuff_classes"):
        names = _spread(names, sorted(thing_ids))
    count = max(len(names), num_classes or 0, 1 + max(thing_ids, default=-1))
    names += [f"class {label}" for label in range(len(names), count)]
    return DatasetMetadata(
        categories=tuple(Category(ids.get(i, i), names[i], i in thing_ids, (0, 0, 0)) for i in range(count)),
        evaluator_type=getattr(known, "evaluator_type", ""),
        ignore_label=getattr(known, "ignore_label", 255),
        instances_json=_path(known, "json_file"),
        panoptic_json=_path(known, "panoptic_json"),
        sem_seg_root=_path(known, "sem_seg_root"),
    )


class LoaderWithProgress:
    """A test loader whose progress and speed are shown while Detectron2 goes through it."""

    def __init__(self, loader: Any, name: str) -> None:
        """Set up.

        Args:
            loader: of `mask2former.d2.data.build_test_loader`, gives lists of one image.
            name: of the data set.
        """
        self.loader = loader
        self.name = name

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return with_progress(
            self.loader,
            self.name,
            here=len(self.loader),
            overall=len(self.loader.dataset),
            is_shown=comm.is_main_process(),
        )


def _result_of(output: dict[str, Any]) -> ImageResult:
    """The core's form of what a model has given for an image."""
    panoptic = instances = None
    if "panoptic_seg" in output:
        panoptic = PanopticResult(*output["panoptic_seg"])
    if "instances" in output:
        found = output["instances"]
        queries = found.pred_queries if found.has("pred_queries") else None
        boxes = found.pred_boxes.tensor
        instances = InstanceResult(found.pred_classes, found.scores, found.pred_masks, boxes, queries)
    return ImageResult(output.get("sem_seg"), panoptic, instances)


def _spread(thing_classes: list[str], labels: list[int]) -> list[str]:
    """Names by label, where only those of things are known."""
    names = dict(zip(labels, thing_classes, strict=False))
    return [names.get(label, f"class {label}") for label in range(1 + max(labels, default=-1))]


def _path(metadata: Any, field: str) -> Path | None:
    value = getattr(metadata, field, None)
    return None if value is None else Path(value)
