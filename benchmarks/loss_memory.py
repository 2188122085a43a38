"""Memory of losses and matching on points against whole masks, at 1024 x 1024 (paper section 3.3 and Table 5).

    python benchmarks/loss_memory.py                        CPU; `--device cuda` on a GPU
    python benchmarks/loss_memory.py --parts loss --targets 10 20 --limit-gib 8

- `loss` is the criterion alone, forward and backward, on leaf tensors as R50's decoder gives them for an image: classes
  and mask embeddings of 100 queries from 10 predictions, mask features of 256 channels at a quarter of the size; 12544
  points. `logits` is the same with mask logits instead of embeddings and features, as other decoders give them. Peaks
  are on top of these tensors and the targets.
- `tiny` and `r50` are the training step of a model, forward, loss and backward, on one image; peak on top of weights,
  image and targets. `tiny` is the model of configs/quick_schedules with 12544 points, whose own memory is small.

Each case runs once, in a process of its own. On a CPU the peak is exact: the largest "Total Allocated" that
`torch.profiler` records, which sees every allocation of PyTorch. On CUDA it is `max_memory_allocated`. A case that
would take more than `--limit-gib` of a CPU's memory is stopped by the system and said to be above it.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mask2former import config
from mask2former.build import build_model
from mask2former.engine.config import get_config
from mask2former.modeling.criterion import MASK_PARTS, SetCriterion
from mask2former.modeling.structures import MaskPrediction, MaskTarget, QueryPrediction
from mask2former.ops import _extension

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {
    "tiny": CONFIGS / "quick_schedules/Base-tiny.yaml",
    "r50": CONFIGS / "coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml",
}
CLASSES, QUERIES, CHANNELS, PREDICTIONS, POINTS = 133, 100, 256, 10, 12544
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One measurement; `part` is "loss", "logits" or a name of `MODELS`."""

    part: str
    targets: int
    size: int
    match_on: str
    loss_on: str
    device: str


def target(case: Case) -> MaskTarget:
    """Masks of the whole image; their content changes no memory."""
    labels = torch.randint(CLASSES, (case.targets,))
    masks = torch.rand(case.targets, case.size, case.size) > 0.5
    return MaskTarget(labels.to(case.device), masks.to(case.device))


def leaf_predictions(case: Case) -> list[MaskPrediction] | list[QueryPrediction]:
    """Random predictions of one image that want gradients."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(1, *shape, device=case.device, requires_grad=True)

    edge = case.size // 4
    if case.part == "logits":
        return [MaskPrediction(leaf(QUERIES, CLASSES + 1), leaf(QUERIES, edge, edge)) for _ in range(PREDICTIONS)]
    features = leaf(CHANNELS, edge, edge)
    return [QueryPrediction(leaf(QUERIES, CLASSES + 1), leaf(QUERIES, CHANNELS), features) for _ in range(PREDICTIONS)]


def loss_call(case: Case) -> Callable[[], None]:
    """Forward and backward of the criterion alone."""
    criterion = SetCriterion(num_classes=CLASSES, num_points=POINTS, match_on=case.match_on, loss_on=case.loss_on).to(
        case.device
    )
    predictions = leaf_predictions(case)
    targets = [target(case)]

    def call() -> None:
        losses = criterion.weighted(criterion(predictions, targets, (case.size, case.size)))
        torch.stack(list(losses.values())).sum().backward()

    return call


def step_call(case: Case) -> Callable[[], None]:
    """Forward, loss and backward of a model."""
    keys = {"MATCH_ON": case.match_on, "LOSS_ON": case.loss_on, "TRAIN_NUM_POINTS": POINTS}
    overrides = [word for key, value in keys.items() for word in (f"MODEL.MASK_FORMER.{key}", str(value))]
    cfg = get_config(MODELS[case.part], [*overrides, "MODEL.WEIGHTS", ""])
    model = build_model(config.architecture_arguments(cfg)).to(case.device).train()
    image = torch.randint(0, 256, (3, case.size, case.size), dtype=torch.uint8, device=case.device)
    targets = [target(case)]

    def call() -> None:
        torch.stack(list(model.losses([image], targets).values())).sum().backward()

    return call


def peak_bytes(call: Callable[[], None], device: str) -> int:
    """The most that PyTorch holds during a call, on top of what it holds before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def run_case(case: Case, limit_gib: float) -> None:
    """Measure in this process and print the bytes; allocations fail above the limit."""
    torch.manual_seed(0)
    call = step_call(case) if case.part in MODELS else loss_call(case)
    if case.device == "cpu":
        limit = int(limit_gib * (1 << 30))
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        print(peak_bytes(call, case.device))
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        print("none")


def measure(case: Case, limit_gib: float) -> int | None:
    """The peak of a case in bytes, from a process of its own; None if it is above the limit."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--limit-gib", str(limit_gib)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    word = done.stdout.split()[-1]
    return None if word == "none" else int(word)


def rows(part: str, targets: int, args: argparse.Namespace) -> None:
    """Print the lines of one part."""
    reference = None
    for match_on, loss_on in (combination.split("/") for combination in args.combinations):
        peak = measure(Case(part, targets, args.size, match_on, loss_on, args.device), args.limit_gib)
        reference = peak if (match_on, loss_on) == ("points", "points") else reference
        ratio = f"{peak / reference:.1f}" if peak and reference else ""
        text = f"{peak / MIB:.0f}" if peak else f"above the limit of {args.limit_gib:g} GiB"
        print(f"| {part} | {targets} | {match_on} | {loss_on} | {text} | {ratio} |", flush=True)


def main() -> None:
    """Run the cases and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ("loss", "logits", *MODELS)
    parser.add_argument("--parts", nargs="+", choices=known, default=list(known))
    parser.add_argument("--targets", nargs="+", type=int, default=[20, 40], metavar="N", help="in the image")
    combinations = [f"{match_on}/{loss_on}" for match_on, loss_on in itertools.product(MASK_PARTS, MASK_PARTS)]
    parser.add_argument(
        "--combinations", nargs="+", choices=combinations, default=combinations, help="what matching/losses look at"
    )
    parser.add_argument("--size", type=int, default=1024, help="of the image, a multiple of 32; default 1024")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-gib", type=float, default=16.0, help="of memory of a CPU case, default 16")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        arguments: dict[str, Any] = json.loads(args.case)
        run_case(Case(**arguments), args.limit_gib)
        return
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{where}, PyTorch {torch.__version__}, one image of {args.size} x {args.size}, float32")
    print(_extension.describe() + "\n")
    print("| what | targets | match on | loss on | peak MiB | times points |\n|---|---|---|---|---|---|", flush=True)
    for part, targets in itertools.product(args.parts, args.targets):
        rows(part, targets, args)


if __name__ == "__main__":
    main()
