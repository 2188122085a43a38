"""Which tasks a data set is evaluated for."""

from collections.abc import Callable, Mapping
from typing import Any

TASKS_OF_KIND: dict[str, tuple[str, ...]] = {
    "coco": ("instance",),
    "coco_panoptic_seg": ("panoptic", "instance", "semantic"),
    "sem_seg": ("semantic",),
}


def evaluated_tasks(
    name: str, kind: str | None, settings: Mapping[str, Any], has_ground_truth: Callable[[str], bool]
) -> list[str]:
    """The tasks that data set and config have in common, of "panoptic", "instance" and "semantic".

    Args:
        name: of the data set, for messages.
        kind: its ``evaluator_type``.
        settings: from `mask2former.config.inference_arguments`.
        has_ground_truth: whether a panoptic data set comes with the files of a task; others have just their own.

    Raises:
        ValueError: if the type is unknown, or no result that is on fits the data set.
    """
    if kind not in TASKS_OF_KIND:
        raise ValueError(f"evaluator_type of data set {name!r} must be one of {sorted(TASKS_OF_KIND)}, got {kind!r}")
    known = TASKS_OF_KIND[kind]
    is_panoptic = kind == "coco_panoptic_seg"
    tasks = [task for task in known if settings[f"{task}_on"] and (not is_panoptic or has_ground_truth(task))]
    if not tasks:
        raise ValueError(
            f"data set {name!r} can be evaluated for {known}, but of these MODEL.MASK_FORMER.TEST switches none on"
        )
    return tasks
