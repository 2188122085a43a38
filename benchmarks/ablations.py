"""The variants of the paper's Tables 4 and 5, side by side on a few images that a tiny model can learn on a CPU.

    DETECTRON2_DATASETS=... python benchmarks/ablations.py                             600 iterations each
    DETECTRON2_DATASETS=... python benchmarks/ablations.py --only published,plain --iterations 200

Each variant is trained from scratch on the first images of `coco_panoptic_mini` with the config of the training
reference (configs/quick_schedules), the same seed and the same number of iterations, and evaluated on the same images.
What is compared is how well and how fast a variant fits them; it is no estimate of the paper's numbers.

Prints a Markdown table. `final loss` is the mean over the last tenth of the iterations of what is minimised, over all
predictions; `last layer` is the part of it that belongs to the final prediction, since zero queries have a prediction
fewer. Losses on points, most of which lie where a mask is uncertain, and on whole masks are no measure of each other.
Finished variants are kept in the output folder and not run again; delete it to start anew.
"""

import argparse
import json
import os
import platform
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mask2former.checkpoint import write_atomically
from mask2former.data import catalog
from mask2former.data.coco_datasets import CocoSplit
from mask2former.data.layouts import below_root
from mask2former.engine.config import get_config
from mask2former.engine.step import StepResult
from mask2former.engine.trainer import Trainer

CONFIG = Path(__file__).resolve().parents[1] / "configs/quick_schedules/coco_mini16_panoptic_tiny.yaml"
DATASET = "ablations_train_panoptic_with_sem_seg"

# Table -> name -> keys under MODEL that differ from the published model.
TABLES: dict[str, dict[str, dict[str, Any]]] = {
    "": {"published": {}},
    "4b": {
        "zero_queries": {"MASK_FORMER.LEARNABLE_QUERIES": False},
        "self_first": {"MASK_FORMER.SELF_ATTENTION_FIRST": True},
        "dropout": {"MASK_FORMER.DECODER_DROPOUT": 0.1},
    },
    "4c": {name: {"MASK_FORMER.CROSS_ATTENTION": name} for name in ("plain", "smca", "mask_pooling")},
    "4d": {name: {"MASK_FORMER.FEATURE_SCALES": name} for name in ("stride_32", "stride_16", "stride_8", "all")},
    "4e": {
        "fpn": {"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BasePixelDecoder"},
        "semantic_fpn": {"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "SemanticFPNPixelDecoder"},
        "fapn": {"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "FaPNPixelDecoder"},
        "bifpn": {"SEM_SEG_HEAD.PIXEL_DECODER_NAME": "BiFPNPixelDecoder"},
    },
    "5": {
        "match_and_loss_on_masks": {"MASK_FORMER.MATCH_ON": "masks", "MASK_FORMER.LOSS_ON": "masks"},
        "loss_on_masks": {"MASK_FORMER.LOSS_ON": "masks"},
        "match_on_masks": {"MASK_FORMER.MATCH_ON": "masks"},
    },
}
VARIANTS = {name: keys for table in TABLES.values() for name, keys in table.items()}


def register_images(number: int) -> None:
    """The first images of the mini set, under a name of their own."""
    part = CocoSplit(root=partial(below_root, "coco_panoptic_mini"), split="train", first=number)
    catalog.register_lazily(DATASET, partial(part.panoptic, DATASET, with_semantic=True))


def run(name: str, *, iterations: int, batch: int, seed: int, folder: Path) -> dict[str, float]:
    """Train and evaluate one variant; its numbers."""
    overrides: dict[str, Any] = {
        "OUTPUT_DIR": folder / name,
        "DATASETS.TRAIN": f"('{DATASET}',)",
        "DATASETS.TEST": f"('{DATASET}',)",
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": f"({max(1, iterations * 9 // 10)},)",
        "SEED": seed,
        **{f"MODEL.{key}": value for key, value in VARIANTS[name].items()},
    }
    cfg = get_config(CONFIG, [str(word) for pair in overrides.items() for word in pair])
    totals: list[float] = []
    last_layer: list[float] = []

    def on_step(_: int, result: StepResult) -> None:
        totals.append(sum(result.losses.values()))
        last_layer.append(sum(result.losses[key] for key in ("loss_ce", "loss_mask", "loss_dice")))
        ends.append(time.perf_counter())

    ends = [time.perf_counter()]
    results = Trainer(cfg, on_step=on_step).train()
    assert results is not None  # there is one process
    tail = max(1, iterations // 10)
    return {
        "final_loss": sum(totals[-tail:]) / tail,
        "last_layer": sum(last_layer[-tail:]) / tail,
        "PQ": results["panoptic_seg"]["PQ"],
        "seconds": (ends[-1] - ends[0]) / iterations,
    }


def row(table: str, name: str, found: dict[str, float]) -> str:
    """A line of the Markdown table."""
    numbers = f"{found['final_loss']:.2f} | {found['last_layer']:.2f} | {found['PQ']:.1f} | {found['seconds']:.2f}"
    return f"| {table} | {name} | {numbers} |"


def main() -> None:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(VARIANTS), help="names, separated by commas")
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4, help="images an iteration")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("results/ablations"), help="numbers of each variant")
    args = parser.parse_args()
    chosen = args.only.split(",")
    unknown = sorted(set(chosen) - VARIANTS.keys())
    if unknown or min(args.iterations, args.images, args.batch) < 1:
        parser.error(f"--only takes some of {', '.join(VARIANTS)}; numbers are at least 1; got {args}")
    register_images(args.images)
    folder = args.folder / f"{args.images}_images_{args.iterations}_iterations_of_{args.batch}_seed_{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, PyTorch {torch.__version__};"
        f" {args.images} images, {args.iterations} iterations of {args.batch}, seed {args.seed}\n"
    )
    print("| Table | variant | final loss | last layer | PQ | s an iteration |\n|---|---|---|---|---|---|", flush=True)
    for table, variants in TABLES.items():
        for name in (name for name in variants if name in chosen):
            path = folder / f"{name}.json"
            if not path.exists():
                found = run(name, iterations=args.iterations, batch=args.batch, seed=args.seed, folder=folder)
                write_atomically(path, json.dumps(found).encode())
                shutil.rmtree(folder / name)  # checkpoints, which nothing needs any more
            print(row(table, name, json.loads(path.read_text())), flush=True)


if __name__ == "__main__":
    main()
