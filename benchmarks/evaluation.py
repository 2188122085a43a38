"""Instances from masks in memory to AP: this project against pycocotools, faster-coco-eval and Detectron2, in one run.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py                     20 images of 480x640, 100 instances each
    python benchmarks/evaluation.py --images 100 --queries 100            every instance has a mask of its own

Predictions are synthetic: ellipses with rough edges. As of a trained model, several instances come from one query and
have one mask (the bundled model: 11 to 24 queries for 100 instances). Prints three Markdown tables:

- run lengths: milliseconds an image of the instances' masks as COCO's RLE;
- evaluation: the same from masks to AP of masks and boxes, split into what is done for each image and what at the end;
- overlap: seconds of an evaluation whose counting is done after each prediction, or in the background while the next
  one is made. The model is a pause, as a host sees an accelerator, or work on the host.

Who is not installed is left out. First all must agree: the same bytes of RLE, the same AP. Contestants take turns;
times are medians, of CPU time unless ``--clock wall`` says that the machine is all yours; the overlap is always on the
clock. "MiB" is the most that Python and NumPy held at once on top of the masks (tracemalloc), in a pass of its own.

Panoptic quality has a script of its own, panoptic_quality.py.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pycocotools import mask as mask_api

from mask2former.data.catalog import Category, DatasetMetadata
from mask2former.evaluation.average_precision import encode_masks
from mask2former.evaluation.background import BackgroundUpdates
from mask2former.evaluation.tasks import InstanceTask, Task
from mask2former.modeling.postprocessing import masks_to_boxes

HEIGHT, WIDTH, CLASSES, OBJECTS = 480, 640, 80, 7
SWITCH = "MASK2FORMER_FASTER_COCO_EVAL"
Numbers = list[float]


class Problem(NamedTuple):
    """Predictions of all images, `mask2former.inference.ImageResult`-like, and the annotation file."""

    results: list[SimpleNamespace]
    file: Path
    metadata: DatasetMetadata


class Run(NamedTuple):
    """What a contestant found, AP of masks and boxes, and seconds for all images and at the end."""

    ap: Numbers
    images: float
    end: float


def rough_ellipse(rng: np.random.Generator, center: npt.NDArray[Any], axes: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """(H, W) mask with a wavy outline."""
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    dy, dx = (y - center[0]) / axes[0], (x - center[1]) / axes[1]
    waves = 1 + 0.1 * np.sin(rng.integers(5, 20) * np.arctan2(dy, dx) + rng.uniform(0, 6))
    return dy**2 + dx**2 < waves**2


def make_problem(images: int, instances: int, queries: int, folder: Path) -> Problem:
    """Truth is some of the predicted ellipses, moved and stretched."""
    rng = np.random.default_rng(0)
    results, annotations = [], []
    for image_id in range(images):
        centers, axes = rng.random((queries, 2)) * (HEIGHT, WIDTH), rng.uniform(10, 120, (queries, 2))
        masks = np.stack([rough_ellipse(rng, c, a) for c, a in zip(centers, axes, strict=True)])
        of_query, labels = rng.permutation(np.arange(instances) % queries), rng.integers(0, CLASSES, instances)
        for n in range(min(OBJECTS, instances)):
            query = of_query[n]
            moved = centers[query] + rng.normal(0, 4, 2), axes[query] * rng.uniform(0.9, 1.1, 2)
            mask = rough_ellipse(rng, *moved)
            if mask.any():
                (x, y, right, bottom), area = masks_to_boxes(torch.from_numpy(mask[None]))[0].tolist(), int(mask.sum())
                annotations.append({
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": int(labels[n]) + 1, "iscrowd": 0,
                    "area": area, "bbox": [x, y, right - x, bottom - y], "segmentation": encode_masks(mask[None])[0],
                })  # fmt: skip
        found = torch.from_numpy(masks[of_query])
        results.append(SimpleNamespace(instances=SimpleNamespace(
            labels=torch.from_numpy(labels), scores=torch.from_numpy(np.sort(rng.random(instances))[::-1].copy()),
            masks=found, boxes=masks_to_boxes(found), queries=torch.from_numpy(of_query),
        )))  # fmt: skip
    categories = tuple(Category(n + 1, f"class {n}", True, (0, 0, 0)) for n in range(CLASSES))
    file = folder / "instances.json"
    file.write_text(json.dumps({
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH, "file_name": f"{i}.jpg"} for i in range(images)],
        "annotations": annotations, "categories": [{"id": c.id, "name": c.name} for c in categories],
    }))  # fmt: skip
    return Problem(results, file, DatasetMetadata(categories=categories, evaluator_type="coco", instances_json=file))


def ours(problem: Problem, clock: Callable[[], float], *, faster: bool) -> Run:
    """This project, with or without faster-coco-eval."""
    os.environ[SWITCH] = str(int(faster))
    task = InstanceTask(problem.metadata)
    start = clock()
    for image_id, result in enumerate(problem.results):
        task.update({"image_id": image_id}, result)
    middle = clock()
    results = task.results()
    return Run([results[kind]["AP"] for kind in ("segm", "bbox")], middle - start, clock() - middle)


def encode_one_by_one(masks: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """The way of Detectron2's evaluator."""
    encoded = [mask_api.encode(np.array(mask[:, :, None], order="F", dtype=np.uint8))[0] for mask in masks]
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]


def encode_at_once(masks: npt.NDArray[np.bool_]) -> list[dict[str, Any]]:
    """One call for a copy of all masks."""
    encoded = mask_api.encode(np.asfortranarray(masks.view(np.uint8).transpose(1, 2, 0)))
    return [{"size": rle["size"], "counts": rle["counts"].decode()} for rle in encoded]


def encode_each_query_once(masks: npt.NDArray[np.bool_], queries: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    """What this project's evaluation does."""
    _, first, place = np.unique(queries, return_index=True, return_inverse=True)
    encoded = encode_masks(masks[first])
    return [encoded[i] for i in place]


def plain(problem: Problem, clock: Callable[[], float], *, library: str) -> Run:
    """pycocotools or faster-coco-eval as their manuals have it: results as a list of dicts, each mask encoded."""
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    found: list[dict[str, Any]] = []
    start = clock()
    for image_id, result in enumerate(problem.results):
        one = result.instances
        boxes = one.boxes.clone()
        boxes[:, 2:] -= boxes[:, :2]
        columns = one.labels.tolist(), one.scores.tolist(), encode_one_by_one(one.masks.numpy()), boxes.tolist()
        found += [
            {"image_id": image_id, "category_id": label + 1, "score": score, "segmentation": rle, "bbox": box}
            for label, score, rle, box in zip(*columns, strict=True)
        ]
    middle, ap = clock(), []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(problem.file))
        for kind in ("segm", "bbox"):
            dropped = "bbox" if kind == "segm" else "segmentation"  # the area is that of a box where there is one
            own = [{key: copy.copy(value) for key, value in one.items() if key != dropped} for one in found]
            evaluation = COCOeval(truth, truth.loadRes(own), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            ap.append(100 * float(evaluation.stats[0]))
    return Run(ap, middle - start, clock() - middle)


def detectron2(problem: Problem, clock: Callable[[], float]) -> Run:
    """Detectron2's COCOEvaluator, with its compiled COCOeval where that was built."""
    catalog, evaluation, structures = (  # a peer, not a dependency: the linter lets only mask2former/d2 import it
        importlib.import_module(f"detectron2.{name}") for name in ("data", "evaluation", "structures")
    )
    name = f"benchmark_{time.monotonic_ns()}"
    ids = {n + 1: n for n in range(CLASSES)}
    catalog.MetadataCatalog.get(name).set(json_file=str(problem.file), thing_dataset_id_to_contiguous_id=ids)
    with contextlib.redirect_stdout(io.StringIO()):
        is_compiled = importlib.util.find_spec("detectron2._C") is not None
        evaluator = evaluation.COCOEvaluator(name, ("segm", "bbox"), distributed=False, use_fast_impl=is_compiled)
        evaluator.reset()
        outputs = [
            structures.Instances(
                (HEIGHT, WIDTH), pred_classes=r.instances.labels, scores=r.instances.scores,
                pred_masks=r.instances.masks, pred_boxes=structures.Boxes(r.instances.boxes),
            ) for r in problem.results
        ]  # fmt: skip
        start = clock()
        for image_id, output in enumerate(outputs):
            evaluator.process([{"image_id": image_id}], [{"instances": output}])
        middle = clock()
        results = evaluator.evaluate()
    return Run([results[kind]["AP"] for kind in ("segm", "bbox")], middle - start, clock() - middle)


def installed(package: str) -> str:
    """Its version, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def contestants() -> dict[str, Callable[[Problem, Callable[[], float]], Run]]:
    """Who is here, the reference first."""
    found: dict[str, Callable[[Problem, Callable[[], float]], Run]] = {
        "pycocotools": lambda p, c: plain(p, c, library="pycocotools"),
        "this project, pycocotools": lambda p, c: ours(p, c, faster=False),
    }
    if installed("faster-coco-eval"):
        found["faster-coco-eval"] = lambda p, c: plain(p, c, library="faster-coco-eval")
        found["this project, faster-coco-eval"] = lambda p, c: ours(p, c, faster=True)
    if installed("detectron2"):
        found["Detectron2's COCOEvaluator"] = detectron2
    return found


def peak_mib(call: Callable[[], object]) -> float:
    """The most that a call held at once."""
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def compare_run_lengths(problem: Problem, repeats: int, clock: Callable[[], float]) -> None:
    """First table."""
    inputs = [(r.instances.masks.numpy(), r.instances.queries.numpy()) for r in problem.results[:5]]
    runs: dict[str, Callable[[Any, Any], list[dict[str, Any]]]] = {
        "pycocotools, mask by mask": lambda masks, _: encode_one_by_one(masks),
        "pycocotools, all at once": lambda masks, _: encode_at_once(masks),
        "this project": lambda masks, _: encode_masks(masks),
        "this project, each query once": encode_each_query_once,
    }
    expected = [encode_one_by_one(masks) for masks, _ in inputs]
    for name, run in runs.items():
        if [run(*one) for one in inputs] != expected:
            sys.exit(f"run lengths of {name} differ from pycocotools'")
    times: dict[str, Numbers] = {name: [] for name in runs}
    for _ in range(repeats):
        for one in inputs:
            for name, run in runs.items():
                start = clock()
                run(*one)
                times[name].append(1e3 * (clock() - start))
    first = statistics.median(times["pycocotools, mask by mask"])
    print("| run lengths | ms an image | times faster | MiB |\n|---|---|---|---|")
    for name, run in runs.items():
        median, peak = statistics.median(times[name]), peak_mib(lambda run=run: run(*inputs[0]))
        print(f"| {name} | {median:.1f} | {first / median:.1f} | {peak:.1f} |")


def compare_evaluations(problem: Problem, repeats: int, clock: Callable[[], float]) -> None:
    """Second table."""
    runs, count = contestants(), len(problem.results)
    found = {name: run(problem, clock) for name, run in runs.items()}  # warm-up
    expected = found["pycocotools"].ap
    for name, one in found.items():
        if not np.allclose(one.ap, expected, rtol=0, atol=1e-10):
            sys.exit(f"AP of {name} differs: {one.ap}, not {expected}")
    timed: dict[str, list[Run]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            timed[name].append(run(problem, clock))
    print(f"\nAP of masks {expected[0]!r}, of boxes {expected[1]!r}, the same of all to 1e-10.\n")
    print("| evaluation | ms an image | of which at the end | times faster | MiB |\n|---|---|---|---|---|")
    first = statistics.median(run.images + run.end for run in timed["pycocotools"])
    for name, many in timed.items():
        whole = statistics.median(run.images + run.end for run in many)
        end = statistics.median(run.end for run in many)
        peak = peak_mib(lambda name=name: runs[name](problem, clock))
        times = f"{1e3 * whole / count:.1f} | {1e3 * end / count:.1f}"
        print(f"| {name} | {times} | {first / whole:.1f} | {peak:.0f} |")


def compare_overlap(problem: Problem, repeats: int, pause: float) -> None:
    """Third table: counting after each prediction and in the background."""

    def on_the_host(seconds: float) -> None:
        matrix, end = torch.ones(256, 256), time.thread_time() + seconds
        while time.thread_time() < end:
            matrix @ matrix

    def evaluate(model: Callable[[float], None], *, is_background: bool) -> list[dict[str, Any]]:
        task = InstanceTask(problem.metadata)
        with _updates(task, is_background) as update:
            for image_id, result in enumerate(problem.results):
                model(pause)
                update({"image_id": image_id}, result)
        return task.metrics["instances"].results

    print("\n| model | counting after each image, s | in the background, s | times faster |\n|---|---|---|---|")
    models = {f"{1e3 * pause:.0f} ms elsewhere": time.sleep, f"{1e3 * pause:.0f} ms of this CPU": on_the_host}
    for name, model in models.items():
        seconds: dict[bool, Numbers] = {False: [], True: []}
        found = [evaluate(model, is_background=is_background) for is_background in (False, True)]
        if found[0] != found[1]:
            sys.exit("counting in the background has changed the results")
        for _ in range(repeats):
            for is_background, times in seconds.items():
                start = time.perf_counter()
                evaluate(model, is_background=is_background)
                times.append(time.perf_counter() - start)
        after, background = statistics.median(seconds[False]), statistics.median(seconds[True])
        print(f"| {name} | {after:.2f} | {background:.2f} | {after / background:.2f} |")


@contextlib.contextmanager
def _updates(task: Task, is_background: bool) -> Iterator[Callable[[dict[str, Any], Any], None]]:
    if not is_background:
        yield task.update
        return
    with BackgroundUpdates([task]) as counting:
        yield counting.update


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--instances", type=int, default=100)
    parser.add_argument("--queries", type=int, default=25, help="that the instances of an image come from")
    parser.add_argument("--pause", type=float, default=0.02, help="seconds that the model takes, for the overlap")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    packages = ("numpy", "pycocotools", "faster-coco-eval", "opencv-python-headless", "detectron2")
    versions = ", ".join(f"{name} {installed(name) or 'not installed'}" for name in packages)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}; "
        f"{args.images} images of {HEIGHT}x{WIDTH}, {args.instances} instances of {args.queries} queries each; "
        f"clock: {args.clock}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        problem = make_problem(args.images, args.instances, args.queries, Path(folder))
        compare_run_lengths(problem, args.repeats, clock)
        compare_evaluations(problem, args.repeats, clock)
        compare_overlap(problem, args.repeats, args.pause)


if __name__ == "__main__":
    main()
