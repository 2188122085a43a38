"""Evaluation on all processes with the core's metrics; results have the names that Detectron2 gives them."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mask2former import config
from mask2former.data import CatalogEntry, Record, read_label_map, read_panoptic_colors
from mask2former.data.targets import panoptic_ids
from mask2former.engine.data import TestSample, build_test_loader, dataset_entries, is_thing_of
from mask2former.evaluation import InstanceAP, PanopticQuality, SemanticIoU
from mask2former.evaluation.tasks import evaluated_tasks
from mask2former.inference import ImageResult, image_result, predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.tta import TestAugmentation, augmented_result

logger = logging.getLogger(__name__)

Results = dict[str, Any]
Watcher = Callable[[TestSample, ImageResult], None]


class _Task(Protocol):
    """A metric of one task: takes images, gives its results by Detectron2's names."""

    metric: Any

    def update(self, record: Record, result: ImageResult) -> None: ...
    def results(self) -> Results: ...


class _Panoptic:
    def __init__(self, entry: CatalogEntry, folder: Path) -> None:
        self.metric = PanopticQuality(is_thing=[c.is_thing for c in entry.metadata.categories])

    def update(self, record: Record, result: ImageResult) -> None:
        assert result.panoptic is not None
        target_ids = panoptic_ids(read_panoptic_colors(record["pan_seg_file_name"]))
        ids = result.panoptic.ids.cpu().numpy()
        self.metric.update(ids, result.panoptic.segments, target_ids, record["segments_info"])

    def results(self) -> Results:
        return {"panoptic_seg": self.metric.compute()}


class _Instance:
    def __init__(self, entry: CatalogEntry, folder: Path) -> None:
        things = [(label, c.id) for label, c in enumerate(entry.metadata.categories) if c.is_thing]
        self._places = {label: place for place, (label, _) in enumerate(things)}
        self._folder = folder
        coco_json = entry.metadata.instances_json
        assert coco_json is not None
        self.metric = InstanceAP(coco_json=coco_json, category_ids=[category for _, category in things])

    def update(self, record: Record, result: ImageResult) -> None:
        found = result.instances
        assert found is not None
        labels = found.labels.tolist()
        keep = torch.tensor([label in self._places for label in labels], dtype=torch.bool)  # no stuff
        arrays = (t.cpu()[keep].numpy() for t in (found.scores, found.masks, found.boxes))
        self.metric.update(record["image_id"], [self._places[x] for x in labels if x in self._places], *arrays)

    def results(self) -> Results:
        self.metric.save(self._folder / "coco_instances_results.json")
        return dict(self.metric.compute())


class _Semantic:
    def __init__(self, entry: CatalogEntry, folder: Path) -> None:
        metadata = entry.metadata
        self.metric = SemanticIoU(class_names=[c.name for c in metadata.categories], ignore_label=metadata.ignore_label)

    def update(self, record: Record, result: ImageResult) -> None:
        assert result.semantic is not None
        labels = result.semantic.argmax(0).cpu().numpy()
        self.metric.update(labels, read_label_map(record["sem_seg_file_name"]))

    def results(self) -> Results:
        return {"sem_seg": self.metric.compute()}


_TASKS: dict[str, Callable[[CatalogEntry, Path], _Task]] = {
    "panoptic": _Panoptic,
    "instance": _Instance,
    "semantic": _Semantic,
}


def check_evaluation(cfg: Any) -> None:
    """Raise ConfigError or ValueError now if an evaluation of the config's test sets would fail for its settings."""
    for entry in dataset_entries(cfg, "DATASETS.TEST"):
        _tasks_of(cfg, entry)


def evaluate(cfg: Any, model: Mask2Former, *, watch: Watcher | None = None, with_tta: bool = False) -> Results | None:
    """Evaluate a model on DATASETS.TEST; every process must call it.

    Args:
        cfg: config.
        model: on its device; is in training mode again afterwards if it was before.
        watch: sees the samples and results of this process.
        with_tta: if TEST.AUG is on, evaluate a second time with test-time augmentation. The outermost names of these
            results end in "_TTA".

    Returns:
        On the first process {"panoptic_seg": {"PQ": ...}, ...}, one level deeper by name for several data sets;
        None on the others.
    """
    was_training = model.training
    model.eval()
    results = _evaluate_all(cfg, model, watch, None)
    augmentation = TestAugmentation.from_config(cfg) if with_tta else None
    if augmentation is not None:
        logger.info("Evaluating once more, with test-time augmentation")
        augmented = _evaluate_all(cfg, model, None, augmentation)
        results |= {f"{name}_TTA": values for name, values in augmented.items()}
    model.train(was_training)
    return results if rank() == 0 else None


def _evaluate_all(
    cfg: Any, model: Mask2Former, watch: Watcher | None, augmentation: TestAugmentation | None
) -> Results:
    entries = dataset_entries(cfg, "DATASETS.TEST")
    results: Results = {entry.name: _evaluate(cfg, model, entry, watch, augmentation) for entry in entries}
    return next(iter(results.values())) if len(results) == 1 else results


def _tasks_of(cfg: Any, entry: CatalogEntry) -> list[str]:
    metadata, settings = entry.metadata, config.inference_arguments(cfg)
    truth = {
        "panoptic": metadata.panoptic_json,
        "instance": metadata.instances_json,
        "semantic": metadata.sem_seg_root,
    }
    return evaluated_tasks(entry.name, metadata.evaluator_type, settings, lambda task: truth[task] is not None)


@torch.inference_mode()
def _evaluate(
    cfg: Any,
    model: Mask2Former,
    entry: CatalogEntry,
    watch: Watcher | None,
    augmentation: TestAugmentation | None,
) -> Results:
    folder = Path(cfg.OUTPUT_DIR) / ("inference" if augmentation is None else "inference_TTA") / entry.name
    tasks = [_TASKS[name](entry, folder) for name in _tasks_of(cfg, entry)]
    records = entry.load()
    loader = build_test_loader(cfg, records, rank=rank(), world_size=world_size())
    settings = config.inference_arguments(cfg)
    is_thing = torch.tensor(is_thing_of(cfg))
    start = time.perf_counter()
    for sample in tqdm(loader, desc=f"evaluating {entry.name}", disable=None if rank() == 0 else True, leave=False):
        result = predict(model, sample, settings, is_thing, augmentation)
        for task in tasks:
            task.update(sample.record, result)
        if watch is not None:
            watch(sample, result)
    results: Results = {}
    for task in tasks:
        if _merge_on_first(task):
            results.update(task.results())
    seconds = time.perf_counter() - start
    rate = len(records) / seconds
    logger.info("Evaluated %d images of %s in %.0f s, %.1f images/s", len(records), entry.name, seconds, rate)
    return results


def predict(
    model: Mask2Former,
    sample: TestSample,
    settings: Mapping[str, Any],
    is_thing: Tensor,
    augmentation: TestAugmentation | None = None,
) -> ImageResult:
    """The results of one image at the size of its file."""
    if augmentation is None:
        return image_result(*predict_image(model, sample.image, sample.size), settings, lambda: is_thing)
    return augmented_result(model, sample.image, sample.size, settings, lambda: is_thing, augmentation)


def _merge_on_first(task: _Task) -> bool:
    """Joins the metrics of all processes in the first one; whether this is it."""
    if world_size() == 1:
        return True
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(task.metric, gathered)
    for other in (gathered or [])[1:]:
        task.metric.merge(other)
    return rank() == 0


def rank() -> int:
    """Of this process, 0 without others."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def flat(results: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """{"segm": {"AP": 1.0}} -> {"segm/AP": 1.0}."""
    numbers: dict[str, float] = {}
    for name, value in results.items():
        numbers.update(flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value})
    return numbers


def main_metric(results: Mapping[str, Any]) -> tuple[str, float] | None:
    """The number by which checkpoints are compared: PQ, else mask AP, else mIoU, of the first data set."""
    numbers = flat(results)
    for wanted in ("panoptic_seg/PQ", "segm/AP", "sem_seg/mIoU"):
        for name, value in numbers.items():
            if name.endswith(wanted) and value == value:  # not nan
                return name, value
    return None


def report(results: Mapping[str, Any]) -> None:
    """Log the results in Detectron2's lines for copying, without those of single classes."""
    for task, values in results.items():
        if values and all(isinstance(value, Mapping) for value in values.values()):
            logger.info("Results of %s", task)
            report(values)
            continue
        kept = {name: value for name, value in values.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(kept))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in kept.values()))


def save_results(results: Mapping[str, Any], path: Path) -> None:
    """Write results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1), encoding="utf-8")
