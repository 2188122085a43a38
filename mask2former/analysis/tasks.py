"""The tasks of ``python -m mask2former analyze``: each gives plain values, which JSON can store."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args

import torch

from mask2former import config
from mask2former.analysis.images import AnalysedImage, padded
from mask2former.analysis.operations import Kind, OperationCounter, count_operations
from mask2former.analysis.parts import OTHER, PARTS, PartSize, part_sizes
from mask2former.analysis.speed import measure_speed
from mask2former.build import build_model
from mask2former.checkpoint import load_weights
from mask2former.modeling.mask2former import Mask2Former
from mask2former.ops._extension import describe

Progress = Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]]
"""Hands out the sizes that are counted, and may show how far that is."""


def shape_model(cfg: Any) -> Mask2Former:
    """The model of a config in evaluation mode on the meta device, where it takes neither memory nor time.

    Raises:
        ValueError: if the config describes no model.
    """
    with torch.device("meta"):
        return build_model(config.architecture_arguments(cfg)).eval()


def analyse_parameters(model: Mask2Former) -> dict[str, Any]:
    """Numbers of parameters and constants, of each part and in all."""
    sizes = part_sizes(model)
    total = PartSize(*(sum(numbers) for numbers in zip(*sizes.values(), strict=True)))
    return {"total": total._asdict(), "parts": {part: size._asdict() for part, size in sizes.items()}}


def analyse_operations(
    model: Mask2Former, images: Sequence[AnalysedImage], *, all_layers: bool, progress: Progress = iter
) -> dict[str, dict[str, Any]]:
    """Multiply-adds and activations of an image, "flop" and "activation": means over the images.

    Args:
        model: on the meta device.
        images: at least one.
        all_layers: as in `count_operations`.
        progress: see `Progress`.
    """
    counts = Counter(padded(image.size, model.size_divisibility) for image in images)
    counters = [(count_operations(model, size, all_layers=all_layers), counts[size]) for size in progress(list(counts))]
    flops = [(counter.flops[""].total(), number) for counter, number in counters]
    activations = [(counter.activations[""], number) for counter, number in counters]
    kinds = {kind: _mean((counter.flops[""][kind], n) for counter, n in counters) for kind in get_args(Kind)}
    return {
        "flop": {
            **_statistics(flops),
            "all_layers": all_layers,
            "parts": _by_part(counters, lambda counter, part: counter.flops[part].total()),
            "kinds": {kind: mean for kind, mean in kinds.items() if mean},
        },
        "activation": {
            **_statistics(activations),
            "all_layers": all_layers,
            "parts": _by_part(counters, lambda counter, part: counter.activations[part]),
        },
    }


def analyse_throughput(
    cfg: Any, images: Sequence[AnalysedImage], *, device: str, repeats: int, weights: str | None
) -> dict[str, Any]:
    """Seconds an image, measured.

    Args:
        cfg: config.
        images: so many as there are repeats are used.
        device: where to compute.
        repeats: see `measure_speed`.
        weights: file of the whole model; None: random weights.

    Raises:
        ValueError: if the weights do not fit.
        OSError: if a file cannot be read.
    """
    torch.manual_seed(0)
    precision = config.precision_arguments(cfg)["precision"]
    model = build_model(config.architecture_arguments(cfg), precision).eval()
    if weights is not None:
        load_weights(model, weights)
    taken = [(image.pixels(cfg), image.own_size) for image in images[:repeats]]
    speed = measure_speed(model.to(device), cfg, taken, repeats)
    return {
        "images_per_second": speed.images_per_second,
        **speed._asdict(),
        "pictures": len(taken),
        "precision": precision,
        "weights": weights,
        "operators": describe(),
    }


def describe_images(source: str, images: Sequence[AnalysedImage], divisibility: int) -> dict[str, Any]:
    """Where the images come from and how large they are, as the model takes them."""
    sizes = [padded(image.size, divisibility) for image in images]
    return {
        "source": source,
        "images": len(images),
        "sizes": len(set(sizes)),
        "mean_pixels": statistics.fmean(height * width for height, width in sizes),
        "padded_size": list(sizes[0]) if len(set(sizes)) == 1 else None,
    }


def _by_part(
    counters: Sequence[tuple[OperationCounter, int]], value: Callable[[OperationCounter, str], int]
) -> dict[str, float]:
    """Means of the parts that have any, and of what is outside of them."""

    def outside(counter: OperationCounter) -> int:
        return value(counter, "") - sum(value(counter, part) for part in PARTS)

    means = {part: _mean((value(counter, part), number) for counter, number in counters) for part in PARTS}
    means[OTHER] = _mean((outside(counter), number) for counter, number in counters)
    return {part: mean for part, mean in means.items() if mean}


def _statistics(values: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Of values and how often each occurs."""
    return {"mean": _mean(values), "standard_deviation": statistics.pstdev(_repeated(values))}


def _mean(values: Iterable[tuple[int, int]]) -> float:
    return statistics.fmean(_repeated(values))


def _repeated(values: Iterable[tuple[int, int]]) -> Iterator[int]:
    for value, number in values:
        yield from [value] * number
