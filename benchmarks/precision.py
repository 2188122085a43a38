"""Numerical modes: what they change and how fast they are, each against `strict` in the same run.

    python benchmarks/precision.py                                 bundled model, the 26 photos that it knows
    DETECTRON2_DATASETS=... python benchmarks/precision.py --dataset coco_mini_val_panoptic_with_sem_seg
    python benchmarks/precision.py --preset r50 --size 512x512     a published architecture, random weights

Prints a Markdown table. All modes see each picture in turn, in another order each time; a time is the median over
pictures of the ratio to `strict`, of forward passes alone. Differences are of the last prediction's logits, and of
pixels with another panoptic category or semantic class. On a CPU `tf32` is `strict`; only a GPU can show it.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mask2former.build import PRESETS, build_model, preset
from mask2former.checkpoint import load_model_file
from mask2former.data import catalog
from mask2former.data.augmentations import ResizeShortestEdge
from mask2former.data.images import read_image
from mask2former.evaluation.tasks import make_tasks, merged_results
from mask2former.inference import ImageResult, image_result
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import MaskGeometry
from mask2former.modeling.structures import MaskPrediction

BUNDLED = Path(__file__).resolve().parents[1] / "demo/models/panoptic.safetensors"
PUBLISHED = "dtype bfloat16"  # autocast as published: the pixel decoder stays float32
MODES = ("strict", "tf32", PUBLISHED, "fast")


@contextmanager
def mode_of(model: Mask2Former, mode: str, device: torch.device) -> Iterator[None]:
    """What a forward pass runs in."""
    model.precision = None if mode == PUBLISHED else mode  # type: ignore[assignment]
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=mode == PUBLISHED, cache_enabled=False),
    ):
        yield


def timed(model: Mask2Former, batch: Tensor, mode: str) -> tuple[MaskPrediction, float]:
    """The final prediction in float32, and the seconds that it took: of the processor, or, with a GPU, of the clock."""
    is_cpu = batch.device.type == "cpu"
    clock = time.process_time if is_cpu else time.perf_counter
    with mode_of(model, mode, batch.device):
        if not is_cpu:
            torch.cuda.synchronize()
        start = clock()
        prediction = model.predict(batch, all_layers=False)[-1]
        if not is_cpu:
            torch.cuda.synchronize()
        seconds = clock() - start
    return MaskPrediction(*(logits[0].float() for logits in prediction)), seconds


@dataclass
class Record:
    """What was seen of one mode, a number a picture each."""

    ratios: list[float] = field(default_factory=list)
    differences: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))


def in_turns(number: int) -> tuple[str, ...]:
    """The modes, in another order for each picture."""
    first = number % len(MODES)
    return MODES[first:] + MODES[:first]


def compare(
    model: Mask2Former, batch: Tensor, number: int, results_of: Callable[[MaskPrediction], ImageResult | None]
) -> tuple[dict[str, ImageResult | None], dict[str, dict[str, float]], dict[str, float]]:
    """All modes on one picture: results, differences to `strict`, ratios of time to `strict`."""
    predictions, seconds = {}, {}
    for mode in in_turns(number):
        predictions[mode], seconds[mode] = timed(model, batch, mode)
    results = {mode: results_of(prediction) for mode, prediction in predictions.items()}
    differences = {
        mode: differences_of(predictions[mode], results[mode], predictions["strict"], results["strict"])
        for mode in MODES
    }
    return results, differences, {mode: seconds[mode] / seconds["strict"] for mode in MODES}


def differences_of(
    prediction: MaskPrediction, result: ImageResult | None, other: MaskPrediction, expected: ImageResult | None
) -> dict[str, float]:
    """Largest differences of logits, and percentages of pixels that changed."""
    class_logits, mask_logits = ((a - b).abs().max().item() for a, b in zip(prediction, other, strict=True))
    found = {"class logit": class_logits, "mask logit": mask_logits}
    if result is not None and expected is not None:
        labels, wanted = category_map(result), category_map(expected)
        found["panoptic pixels %"] = 100 * float(np.mean(labels != wanted))
        assert result.semantic is not None
        assert expected.semantic is not None
        found["semantic pixels %"] = (
            100 * (result.semantic.argmax(0) != expected.semantic.argmax(0)).float().mean().item()
        )
    return found


def category_map(result: ImageResult) -> Any:
    """(H, W): contiguous category of each pixel, -1 for none."""
    assert result.panoptic is not None
    lookup = np.full(len(result.panoptic.segments) + 1, -1)
    for segment in result.panoptic.segments:
        lookup[segment.id] = segment.category_id
    return lookup[result.panoptic.ids.cpu().numpy()]


def on_pictures(args: argparse.Namespace, device: torch.device) -> None:
    """A model file on a data set: differences, metrics and times."""
    model, description = load_model_file(args.model, device)
    entry = catalog.get(args.dataset)
    settings = postprocessing_of(description.settings)
    tasks = {mode: make_tasks(entry.name, entry.metadata, settings) for mode in MODES}
    is_thing = torch.tensor([category.is_thing for category in description.categories])
    resize = ResizeShortestEdge(shortest=description.settings.shortest, longest=description.settings.longest)
    seen = {mode: Record() for mode in MODES}
    for number, record in enumerate(entry.load()[: args.pictures]):
        pixels = read_image(record["file_name"])
        image = torch.from_numpy(resize(pixels).transpose(2, 0, 1).copy())
        batch = model.batch_images([image if description.image_format == "RGB" else image.flip(0)])
        geometry = MaskGeometry(tuple(batch.shape[2:]), tuple(image.shape[1:]), pixels.shape[:2])  # type: ignore[arg-type]
        results, differences, ratios = compare(
            model,
            batch,
            number,
            lambda p, g=geometry: image_result(p, g, settings, lambda: is_thing),  # type: ignore[misc]
        )
        for mode in MODES:
            for task in tasks[mode]:
                task.update(record, results[mode])  # type: ignore[arg-type]
            add(seen[mode], differences[mode], ratios[mode])
    metrics = {mode: merged_results(tasks[mode], lambda part: [part]) or {} for mode in MODES}
    print_table(seen, {mode: main_metrics(metrics[mode]) for mode in MODES})


def postprocessing_of(settings: Any) -> dict[str, Any]:
    """What `image_result` takes, of the settings of a model file; all three tasks."""
    names = ("object_mask_threshold", "overlap_threshold", "top_k", "score_threshold", "matrix_nms_sigma")
    return {
        **{f"{task}_on": True for task in ("panoptic", "instance", "semantic")},
        **{name: getattr(settings, name) for name in names},
        "sem_seg_postprocessing_before_inference": settings.semantic_resize_first,
    }


def main_metrics(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """PQ, mask AP and mIoU of those that there are."""
    places = {"PQ": ("panoptic_seg", "PQ"), "mask AP": ("segm", "AP"), "mIoU": ("sem_seg", "mIoU")}
    return {name: results[task][key] for name, (task, key) in places.items() if task in results}


def on_noise(args: argparse.Namespace, device: torch.device) -> None:
    """A published architecture with random weights on random pictures: times, and differences of logits."""
    torch.manual_seed(0)
    model = build_model(preset(args.preset, num_classes=133)).to(device).eval()
    seen = {mode: Record() for mode in MODES}
    for number in range(-1, args.pictures or 9):  # the first time is left out
        batch = torch.randn(1, 3, *args.size, device=device)
        _, differences, ratios = compare(model, batch, number + 1, lambda prediction: None)
        if number >= 0:
            for mode in MODES:
                add(seen[mode], differences[mode], ratios[mode])
    print_table(seen, {mode: {} for mode in MODES})


def add(record: Record, differences: Mapping[str, float], ratio: float) -> None:
    """One more picture."""
    record.ratios.append(ratio)
    for name, value in differences.items():
        record.differences[name].append(value)


def print_table(seen: Mapping[str, Record], metrics: Mapping[str, Mapping[str, float]]) -> None:
    """A row a mode; of differences mean (largest)."""
    names, scores = list(seen["strict"].differences), list(metrics["strict"])
    print("| mode | " + " | ".join([*scores, *names, "time / strict"]) + " |")
    print("|---|" + "---|" * (len(scores) + len(names) + 1))
    for mode in MODES:
        cells = [f"{metrics[mode][name]:.2f}" for name in scores]
        values = seen[mode].differences
        cells += [f"{statistics.mean(values[name]):.3g} ({max(values[name]):.3g})" for name in names]
        print(f"| {mode} | " + " | ".join([*cells, f"{statistics.median(seen[mode].ratios):.2f}"]) + " |")


def size(text: str) -> tuple[int, int]:
    """HxW."""
    height, width = text.split("x")
    return int(height), int(width)


def main() -> None:
    """Print what it runs on, and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BUNDLED, metavar="FILE", help="model file")
    parser.add_argument("--dataset", default="coco_sample_train_panoptic_with_sem_seg", metavar="NAME")
    parser.add_argument("--preset", choices=PRESETS, help="random weights instead of a model file")
    parser.add_argument("--size", type=size, default=(512, 512), metavar="HxW", help="with --preset")
    parser.add_argument("--pictures", type=int, metavar="N", help="the first N; default: all, or 9 with --preset")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"PyTorch {torch.__version__}, {device.type} ({name}), {args.threads} threads\n")
    (on_noise if args.preset else on_pictures)(args, device)


if __name__ == "__main__":
    main()
