"""How fast a model predicts, measured."""

import statistics
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mask2former import config
from mask2former.data import catalog
from mask2former.inference import image_result, predict_image
from mask2former.modeling.mask2former import Mask2Former

_WARM_UP = 2


class Speed(NamedTuple):
    """Of one image after the other, from the resized image on the CPU to the results of all tasks.

    Attributes:
        seconds: median of the repeats.
        repeats: how many.
        device: what it ran on, and with how many threads.
        peak_bytes: of memory: on a GPU what PyTorch held at most; on Linux, otherwise, the process; None: not known.
    """

    seconds: float
    repeats: int
    device: str
    peak_bytes: int | None

    @property
    def images_per_second(self) -> float:
        return 1 / self.seconds


def measure_speed(
    model: Mask2Former, cfg: Any, images: Sequence[tuple[Tensor, tuple[int, int]]], repeats: int
) -> Speed:
    """Predict some images in turns, and the results that MODEL.MASK_FORMER.TEST asks for.

    Args:
        model: in evaluation mode.
        cfg: config.
        images: (3, h, w) uint8 as large as the model is to see it, and (height, width) of its results.
        repeats: timed predictions, at least 1, after two that are not timed.
    """
    settings = config.inference_arguments(cfg)
    flags = _is_thing(cfg)
    is_cuda = model.device.type == "cuda"

    def run(image: Tensor, size: tuple[int, int]) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            image_result(*predict_image(model, image, size), settings, lambda: flags)
        if is_cuda:
            torch.cuda.synchronize(model.device)
        return time.perf_counter() - start

    for image, size in islice(cycle(images), _WARM_UP):
        run(image, size)
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    seconds = [run(image, size) for image, size in islice(cycle(images), repeats)]
    return Speed(statistics.median(seconds), repeats, _device_text(model.device), _peak_bytes(model.device))


def _is_thing(cfg: Any) -> Tensor:
    """(K,) bool, as a data set of the config says; without one that fits, all classes are things."""
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name in catalog.names() and catalog.get(name).metadata.num_classes == classes:
            return torch.tensor([category.is_thing for category in catalog.get(name).metadata.categories])
    return torch.ones(classes, dtype=torch.bool)


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} threads"


def _peak_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
