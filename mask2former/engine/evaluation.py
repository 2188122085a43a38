"""Evaluation on all processes with the core's metrics; results have the names that Detectron2 gives them."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mask2former import config
from mask2former.data import CatalogEntry
from mask2former.engine.data import TestSample, build_test_loader, dataset_entries, is_thing_of
from mask2former.evaluation.background import BackgroundUpdates
from mask2former.evaluation.progress import with_progress
from mask2former.evaluation.reporting import report
from mask2former.evaluation.tasks import evaluated_tasks, make_tasks, merged_results
from mask2former.inference import ImageResult, image_result, predict_image
from mask2former.modeling.mask2former import Mask2Former
from mask2former.tta import TestAugmentation, augmented_result

logger = logging.getLogger(__name__)

Results = dict[str, Any]
Watcher = Callable[[TestSample, ImageResult], None]


def check_evaluation(cfg: Any) -> None:
    """Raise ConfigError or ValueError now if an evaluation of the config's test sets would fail for its settings."""
    config.tta_arguments(cfg)
    for entry in dataset_entries(cfg, "DATASETS.TEST"):
        evaluated_tasks(entry.name, entry.metadata, config.inference_arguments(cfg))


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
    augmentation = TestAugmentation.from_config(cfg) if with_tta else None
    results = _evaluate_all(cfg, model, watch, None)
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


@torch.inference_mode()
def _evaluate(
    cfg: Any,
    model: Mask2Former,
    entry: CatalogEntry,
    watch: Watcher | None,
    augmentation: TestAugmentation | None,
) -> Results:
    settings = config.inference_arguments(cfg)
    tasks = make_tasks(entry.name, entry.metadata, settings, **config.evaluation_arguments(cfg))
    records = entry.load()
    loader = build_test_loader(cfg, records, rank=rank(), world_size=world_size())
    is_thing = torch.tensor(is_thing_of(cfg))
    count = {"here": len(loader), "overall": len(records)}
    with BackgroundUpdates(tasks) as counting:
        for sample in with_progress(loader, entry.name, **count, is_shown=rank() == 0):
            result = predict(model, sample, settings, is_thing, augmentation)
            counting.update(sample.record, result)
            if watch is not None:
                watch(sample, result)
    results = merged_results(tasks, _gather)
    if results is None:
        return {}
    folder = "inference" if augmentation is None else "inference_TTA"
    report(entry.name, results, Path(cfg.OUTPUT_DIR) / folder / entry.name, tasks)
    _log_for_copying(results)
    return dict(results)


def predict(
    model: Mask2Former,
    sample: TestSample,
    settings: Mapping[str, Any],
    is_thing: Tensor,
    augmentation: TestAugmentation | None = None,
) -> ImageResult:
    """The results of one image at the size of its file; semantic ones may be labels alone."""
    if augmentation is None:
        prediction = predict_image(model, sample.image, sample.size)
        return image_result(*prediction, settings, lambda: is_thing, with_scores=False)
    return augmented_result(model, sample.image, sample.size, settings, lambda: is_thing, augmentation)


def _gather(part: Any) -> list[Any]:
    """What each process has, on the first one; nothing on the others."""
    if world_size() == 1:
        return [part]
    gathered: list[Any] | None = [None] * world_size() if rank() == 0 else None
    with torch.inference_mode(False):  # PyTorch 2.4 refuses to fill tensors of that mode
        dist.gather_object(part, gathered)
    return gathered or []


def rank() -> int:
    """Of this process, 0 without others."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _log_for_copying(results: Mapping[str, Mapping[str, float]]) -> None:
    """Detectron2's lines, without the results of single classes."""
    for task, values in results.items():
        kept = {name: value for name, value in values.items() if "-" not in name}
        logger.info("copypaste: Task: %s", task)
        logger.info("copypaste: %s", ",".join(kept))
        logger.info("copypaste: %s", ",".join(f"{value:.4f}" for value in kept.values()))
