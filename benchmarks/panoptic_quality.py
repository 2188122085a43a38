"""Panoptic quality: this project against panopticapi, in one run.

    DETECTRON2_DATASETS=... python benchmarks/panoptic_quality.py                  coco_mini_val, 50 images
    python benchmarks/panoptic_quality.py --dataset coco_sample_val_panoptic_with_sem_seg

Predictions are the ground truth moved, split, merged, dropped and relabelled. Prints a Markdown table of CPU
milliseconds an image, medians of whole passes in turns, in two cases:

- from a model: segments are in memory, as after a forward pass. panopticapi reads files, so that they are written as
  PNG first, as Detectron2's evaluator does; here they are counted at once.
- from files: both sides read predictions as PNG.

In both cases both sides read the ground truth as PNG, and each runs in this one process on one core. The program fails
if the two do not give the same PQ. Without panopticapi only this project is timed.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from mask2former.data import catalog, read_panoptic_ids
from mask2former.data.catalog import DatasetMetadata
from mask2former.evaluation import PanopticQuality

Segments = list[dict[str, Any]]


@dataclass
class Prediction:
    """Segments of one image, with contiguous categories."""

    record: dict[str, Any]
    ids: npt.NDArray[np.int32]
    segments: Segments


def noisy_prediction(record: dict[str, Any], rng: np.random.Generator) -> Prediction:
    """The ground truth as a mediocre model would predict it."""
    truth = read_panoptic_ids(record["pan_seg_file_name"])
    moved = np.roll(truth, rng.integers(-8, 9, 2), (0, 1))
    categories = {s["id"]: s["category_id"] for s in record["segments_info"]}
    pool = sorted(set(categories.values()))
    ids, segments = np.zeros_like(moved), []
    for segment_id, category in categories.items():
        mask, fate = moved == segment_id, rng.random()
        if fate < 0.1 or not mask.any():
            continue  # dropped
        is_merged = fate < 0.15 and segments
        number = segments[-1]["id"] if is_merged else len(segments) + 1
        if not is_merged:
            label = category if rng.random() < 0.9 else int(rng.choice(pool))
            segments.append({"id": number, "category_id": label})
        ids[mask] = number
    return Prediction(record, ids, segments)


def write(prediction: Prediction, folder: Path) -> None:
    """A prediction as COCO's panoptic PNG."""
    ids = prediction.ids
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
    Image.fromarray(colors).save(folder / Path(prediction.record["pan_seg_file_name"]).name)


def ours(predictions: list[Prediction], metadata: DatasetMetadata, folder: Path | None) -> float:
    """PQ; predictions come from files in the folder, if there is one."""
    metric = PanopticQuality(is_thing=[c.is_thing for c in metadata.categories])
    for p in predictions:
        ids = p.ids
        if folder is not None:
            ids = read_panoptic_ids(folder / Path(p.record["pan_seg_file_name"]).name)
        target = read_panoptic_ids(p.record["pan_seg_file_name"])
        metric.update(ids, p.segments, target, p.record["segments_info"])
    return metric.compute()["PQ"]


def theirs(predictions: list[Prediction], metadata: DatasetMetadata, folder: Path, *, writes: bool) -> float:
    """PQ by panopticapi; predictions are written into the folder first, or are there."""
    from panopticapi.evaluation import pq_compute_single_core

    categories = {i: {"id": i, "isthing": int(c.is_thing)} for i, c in enumerate(metadata.categories)}
    pairs = []
    for p in predictions:
        if writes:
            write(p, folder)
        entry = {"image_id": p.record["image_id"], "file_name": Path(p.record["pan_seg_file_name"]).name}
        truth = entry | {"segments_info": p.record["segments_info"]}
        pairs.append((truth, entry | {"segments_info": copy.deepcopy(p.segments)}))
    if writes:
        (folder / "predictions.json").write_text(json.dumps([predicted for _, predicted in pairs]))
    truth_folder = str(Path(predictions[0].record["pan_seg_file_name"]).parent)
    with contextlib.redirect_stdout(io.StringIO()):
        stat = pq_compute_single_core(0, pairs, truth_folder, str(folder), categories)
    return 100 * float(stat.pq_average(categories, isthing=None)[0]["pq"])


def decoded(predictions: list[Prediction], folder: Path | None) -> float:
    """Decodes the PNGs that `ours` reads, and does nothing with them."""
    for p in predictions:
        truth = Path(p.record["pan_seg_file_name"])
        for path in (truth,) if folder is None else (truth, folder / truth.name):
            with Image.open(path) as image:
                image.load()
    return 0.0


def timed(runs: dict[str, Callable[[], float]], repeats: int, images: int) -> dict[str, float]:
    """CPU milliseconds an image, medians; "peer" must give the same number as "here"."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    values = {name: run() for name, run in runs.items()}  # warm-up
    if abs(values.get("peer", values["here"]) - values["here"]) > 1e-9:
        sys.exit(f"the results differ: {values}")
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append((time.process_time() - start) / images * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="coco_mini_val_panoptic_with_sem_seg")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    entry = catalog.get(args.dataset)
    rng = np.random.default_rng(0)
    predictions = [noisy_prediction(record, rng) for record in entry.load()]
    has_peer = find_spec("panopticapi") is not None
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"Pillow {PIL.__version__}; {args.dataset}, {len(predictions)} images, "
        f"PQ {ours(predictions, entry.metadata, None):.4f}\n"
    )
    print("| case | panopticapi ms | here ms | of which PNG decoding | times faster |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for prediction in predictions:
            write(prediction, folder)
        for case, own_folder in (("from a model", None), ("from files", folder)):
            runs = {
                "here": lambda own=own_folder: ours(predictions, entry.metadata, own),
                "decoding": lambda own=own_folder: decoded(predictions, own),
            }
            if has_peer:
                writes = own_folder is None
                runs["peer"] = lambda w=writes: theirs(predictions, entry.metadata, folder, writes=w)
            found = timed(runs, args.repeats, len(predictions))
            peer = f"{found['peer']:.2f}" if has_peer else "not installed"
            ratio = f"{found['peer'] / found['here']:.1f}" if has_peer else ""
            print(f"| {case} | {peer} | {found['here']:.2f} | {found['decoding']:.2f} | {ratio} |")


if __name__ == "__main__":
    main()
