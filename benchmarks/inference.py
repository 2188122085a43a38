"""Inference on a CPU: this project against transformers' Mask2Former and against plain operations, in one run.

    python benchmarks/inference.py                                   both models, both sizes, panoptic
    python benchmarks/inference.py --tasks all                       and what the other two tasks cost on top
    python benchmarks/inference.py --model r50 --size 512x512 --threads 1

All three get the same weights and the same normalised picture, in float32, and give a panoptic segmentation of the
picture's size; before anything is measured their results are compared. Runs take turns; times are medians. "MiB" is the
highest resident memory of a process of its own, weights included, on top of what it has when all is imported.

The weights are random but for the last layers of the heads, which are set so that queries differ, masks cover a part of
the picture, and 20 of the 100 queries have a class, most of them surely, as in real pictures.

`--keep-memory` lets malloc keep what is freed, for all of them, as demo/demo.py and train_net.py do on a CPU: getting
pages from the system takes a part of the time that depends on the machine.

On a machine with other work use `--threads 1 --clock cpu`, which counts the processor's time and not that on the clock.
"""

import argparse
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain import PlainMask2Former, plain_panoptic
from mask2former import training
from mask2former.build import Architecture, build_model, preset
from mask2former.inference import Forward
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.postprocessing import (
    MaskGeometry,
    instance_segmentation,
    panoptic_segmentation,
    semantic_labels,
)
from mask2former.modeling.structures import MaskPrediction
from mask2former.ops import _extension

CLASSES, THINGS = 133, 80
# masks of random weights overlap more than a trained model's: with 0.8, the default, hardly a segment would be left
THRESHOLDS = {"object_mask_threshold": 0.8, "overlap_threshold": 0.0}
SURE_QUERIES = 20
FAR = 0.01  # for logits
MOST_MOVED = 3  # of the 100 queries; transformers and plain operations differ in one at 800x1200 themselves
SIGMAS_BELOW_ZERO = 1  # of a mask logit's mean, in its standard deviations
MASK_LOGITS_STD, CLASS_LOGITS_STD = 8.0, 10.0
OURS, PLAIN, TRANSFORMERS = "mask2former", "plain operations", "transformers"
ALL_TASKS = "mask2former, all tasks"
CONTESTANTS = (OURS, ALL_TASKS, PLAIN, TRANSFORMERS)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Contestant = Callable[[], tuple[MaskPrediction, Any]]


class Difference(NamedTuple):
    """How far predictions are apart.

    Attributes:
        median: of the absolute difference.
        moved: queries with more than a hundredth of their mask logits, or a class logit, further apart than `FAR`.
        share: of the other queries' numbers that are further apart than `FAR`.
    """

    median: float
    moved: int
    share: float


def size_of(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH as numbers."""
    height, width = (int(part) for part in text.split("x"))
    return height, width


# ---- model and picture


def make_batch(model: Mask2Former, size: tuple[int, int]) -> Tensor:
    """A smooth random picture, normalised and padded: (1, 3, H, W)."""
    coarse = torch.rand(1, 3, 12, 18, generator=torch.Generator().manual_seed(1)) * 255
    picture = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 255)
    return model.batch_images([picture[0]])


def make_model(name: str, size: tuple[int, int]) -> Mask2Former:
    """A model in evaluation mode whose predictions are like those of a trained one, see `model_of`."""
    return model_of(preset(name, num_classes=CLASSES), size)


@torch.no_grad()
def model_of(architecture: Architecture, size: tuple[int, int]) -> Mask2Former:
    """A model in evaluation mode whose predictions are like those of a trained one, the same for the same arguments.

    Args:
        architecture: has `CLASSES` classes.
        size: (height, width) of the picture of `make_batch`, in which `SURE_QUERIES` queries find objects.
    """
    torch.manual_seed(0)
    model = build_model(architecture).eval()
    for layer in model.sem_seg_head.pixel_decoder.transformer.encoder.layers:
        # an untrained model's offsets are the same for all queries; a trained one's are not
        for projection in (layer.self_attn.sampling_offsets, layer.self_attn.attention_weights):
            torch.nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    head, batch = model.sem_seg_head, make_batch(model, size)
    pixels = head.pixel_features(model.backbone(batch))
    # the queries of an untrained model are all alike; what tells them apart is made large
    queries = head.predictor.predict_with_queries(pixels)[1][0]  # (Q, C)
    hidden, last = queries, head.predictor.mask_embed.layers[-1]
    for layer in head.predictor.mask_embed.layers[:-1]:
        hidden = layer(hidden).relu()
    features = pixels.mask_features[0].flatten(1)  # (C, H/4 * W/4)
    _spread(last, hidden, std=MASK_LOGITS_STD / (last(hidden) - last(hidden).mean(0)).matmul(features).std())
    _lower_masks(head, last(hidden) @ features)
    queries = head.predictor.predict_with_queries(head.pixel_features(model.backbone(batch)))[1][0]
    classify = head.predictor.class_embed
    _spread(classify, queries, std=CLASS_LOGITS_STD / (classify(queries) - classify(queries).mean(0)).std())
    logits = classify(queries)
    margin = (logits[:, :-1].amax(1) - logits[:, -1]).sort(descending=True).values
    classify.bias[-1] += margin[SURE_QUERIES - 1 : SURE_QUERIES + 1].mean()
    return model


def _spread(linear: torch.nn.Linear, inputs: Tensor, std: Tensor) -> None:
    """Let a linear map's outputs have the mean 0 over its inputs (N, C), and multiply them by a number."""
    linear.bias.sub_(linear(inputs).mean(0))
    linear.weight.mul_(std)
    linear.bias.mul_(std)


def _lower_masks(head: Any, mask_logits: Tensor) -> None:
    """Add opposite constants to both factors of the mask logits."""
    direction = torch.nn.functional.normalize(torch.randn(head.pixel_decoder.mask_features.out_channels), dim=0)
    constant = (SIGMAS_BELOW_ZERO * mask_logits.std() + mask_logits.mean()).clamp(min=0).sqrt()
    head.predictor.mask_embed.layers[-1].bias.add_(constant * direction)
    head.pixel_decoder.mask_features.bias.sub_(constant * direction)


# ---- contestants


def make_contestant(which: str, name: str, size: tuple[int, int], model: Mask2Former) -> Contestant:
    """A function that predicts and post-processes, and gives the prediction without batch axis and its result."""
    batch = make_batch(model, size)
    if which == PLAIN:
        return _plain(PlainMask2Former(model), batch, size)
    if which == TRANSFORMERS:
        return _transformers(name, model, batch, size)
    return ours(model, batch, size, has_all_tasks=which == ALL_TASKS)


def ours(model: Forward, batch: Tensor, size: tuple[int, int], *, has_all_tasks: bool = False) -> Contestant:
    """This project's: prediction and panoptic segmentation of one picture (height, width) large."""
    geometry = MaskGeometry((batch.shape[2], batch.shape[3]), size, size)
    is_thing = torch.arange(CLASSES) < THINGS

    def run() -> tuple[MaskPrediction, Any]:
        final = model.predict(batch)[-1]
        prediction = MaskPrediction(final.class_logits[0], final.mask_logits[0])
        result = panoptic_segmentation(*prediction, geometry, is_thing=is_thing, **THRESHOLDS)
        if has_all_tasks:
            semantic_labels(*prediction, geometry)
            instance_segmentation(*prediction, geometry, top_k=100, is_thing=is_thing)
        return prediction, result.ids

    return run


def _plain(model: PlainMask2Former, batch: Tensor, size: tuple[int, int]) -> Contestant:
    is_thing = torch.arange(CLASSES) < THINGS
    canvas = (batch.shape[2], batch.shape[3])

    def run() -> tuple[MaskPrediction, Any]:
        final = model.predict(batch)[-1]
        prediction = MaskPrediction(final.class_logits[0], final.mask_logits[0])
        return prediction, plain_panoptic(prediction, canvas, size, is_thing, **THRESHOLDS)[0]

    return run


def _transformers(name: str, model: Mask2Former, batch: Tensor, size: tuple[int, int]) -> Contestant:
    import transformers

    from benchmarks.peers import transformers_model

    theirs = transformers_model(preset(name, num_classes=CLASSES), model)
    processor = transformers.Mask2FormerImageProcessor()
    stuff = set(range(THINGS, CLASSES))

    def run() -> tuple[MaskPrediction, Any]:
        output = theirs(pixel_values=batch)
        result = processor.post_process_panoptic_segmentation(
            output,
            threshold=THRESHOLDS["object_mask_threshold"],
            overlap_mask_area_threshold=THRESHOLDS["overlap_threshold"],
            label_ids_to_fuse=stuff,
            target_sizes=[size],
        )
        prediction = MaskPrediction(output.class_queries_logits[0], output.masks_queries_logits[0])
        return prediction, result[0]["segmentation"]

    return run


# ---- measuring


def difference(found: MaskPrediction, expected: MaskPrediction) -> Difference:
    """A mask bit near zero may fall the other way, whatever computes it, and move a query."""
    apart = [(a - b).abs().flatten(1) for a, b in zip(found, expected, strict=True)]  # (Q, numbers)
    far = [(part > FAR).float().mean(1) for part in apart]  # (Q,)
    moved = (far[0] > 0) | (far[1] > 1e-2)
    share = max(part[~moved].mean().item() for part in far)
    return Difference(max(part.median().item() for part in apart), int(moved.sum()), share)


def agreement(contestants: dict[str, Contestant]) -> str:
    """How far the results are from this project's, in words.

    Raises:
        SystemExit: if that is more than rounding and a few mask bits explain.
    """
    prediction, ids = contestants[OURS]()
    found = [f"{ids.unique().count_nonzero()} segments"]
    for which, run in contestants.items():
        if which in (OURS, ALL_TASKS):
            continue
        other, other_ids = run()
        far = difference(other, prediction)
        words = f"{which}: logits {far.median:.1e} apart (median), {far.moved} queries moved"
        found.append(f"{words}, {far.share:.3%} of the others' numbers more than {FAR} apart")
        if which == PLAIN:  # transformers numbers segments in another way, and its masks go through 384 x 384
            found[-1] += f", {(other_ids == ids).float().mean():.3%} of the ids equal"
        if far.median > 1e-3 or far.share > 1e-3 or far.moved > MOST_MOVED:
            raise SystemExit(f"{which} does not compute the same: {found[-1]}")
    return "; ".join(found)


def take_turns(contestants: dict[str, Contestant], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, after one turn that does not count."""
    seconds: dict[str, list[float]] = {which: [] for which in contestants}
    for turn in range(repeats + 1):
        for which, run in contestants.items():
            start = clock()
            run()
            if turn:
                seconds[which].append(clock() - start)
    return {which: statistics.median(times) for which, times in seconds.items()}


def peak_bytes(which: str, name: str, size: str, arguments: argparse.Namespace) -> int | None:
    """Highest resident memory of a new process that runs one contestant; None where Linux does not tell."""
    if sys.platform != "linux":
        return None
    words = ["--model", name, "--size", size, "--threads", str(arguments.threads), "--only-memory-of", which]
    words += ["--keep-memory"] if arguments.keep_memory else []
    command = [sys.executable, str(Path(__file__)), *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def print_own_peak(which: str, name: str, size: tuple[int, int]) -> None:
    """What `peak_bytes` runs."""
    if which == TRANSFORMERS:
        import transformers

        import benchmarks.peers  # noqa: F401

        transformers.Mask2FormerForUniversalSegmentation  # noqa: B018  imports lazily
    before = _resident("VmRSS")
    with torch.inference_mode():
        model = make_model(name, size)
        run = make_contestant(which, name, size, model)
        if which == TRANSFORMERS:
            del model
        ctypes.CDLL(None).malloc_trim(0)  # what making the model has freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        for _ in range(2):
            run()
    print(_resident("VmHWM") - before)


def _resident(line: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(text.split()[1]) * 1024 for text in lines if text.startswith(f"{line}:"))


def measure(name: str, size: str, arguments: argparse.Namespace) -> None:
    """Print the rows of the table for one model and size."""
    model = make_model(name, size_of(size))
    kinds = [OURS, PLAIN, TRANSFORMERS] if arguments.tasks == "panoptic" else [OURS, ALL_TASKS]
    contestants = {which: make_contestant(which, name, size_of(size), model) for which in kinds}
    print(f"{name}, {size}: {agreement(contestants)}", file=sys.stderr, flush=True)
    seconds = take_turns(contestants, arguments.repeats, CLOCKS[arguments.clock])
    peaks = {
        which: None if arguments.without_memory else peak_bytes(which, name, size, arguments) for which in kinds
    }
    for which in kinds:
        peak = peaks[which]
        megabytes = "" if peak is None else f"{peak / 2**20:.0f}"
        ratio = seconds[which] / seconds[OURS]
        print(f"| {name} | {size} | {which} | {seconds[which] * 1e3:.0f} | {ratio:.2f} | {megabytes} |", flush=True)


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["swin_tiny", "r50"], choices=("swin_tiny", "r50"))
    parser.add_argument("--size", nargs="+", default=["512x512", "800x1200"], help="HEIGHTxWIDTH of the picture")
    parser.add_argument("--tasks", default="panoptic", choices=("panoptic", "all"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--clock", default="wall", choices=sorted(CLOCKS))
    parser.add_argument("--keep-memory", action="store_true", help="malloc keeps what is freed")
    parser.add_argument("--without-memory", action="store_true", help="no processes of their own for memory")
    parser.add_argument("--only-memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.keep_memory and not training.keep_freed_memory():
        sys.exit("--keep-memory needs glibc, without settings of malloc in the environment")
    if arguments.only_memory_of:
        print_own_peak(arguments.only_memory_of, arguments.model[0], size_of(arguments.size[0]))
        return
    kept = ", freed memory kept" if arguments.keep_memory else ""
    conditions = f"{arguments.threads} threads, {arguments.repeats} turns, {arguments.clock} time{kept}"
    print(f"{_extension.describe()} {conditions}.")
    print("\n| model | picture | what | ms | times mask2former's | MiB |\n|---|---|---|---|---|---|", flush=True)
    with torch.inference_mode():
        for name in arguments.model:
            for size in arguments.size:
                measure(name, size, arguments)


if __name__ == "__main__":
    main()
