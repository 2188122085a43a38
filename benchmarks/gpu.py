"""What a GPU does with this project: training, inference, profile and kernel; the other benchmarks compare on a CPU.

    python benchmarks/gpu.py                                            all parts, R50
    python benchmarks/gpu.py --part inference --precision fast --compile
    python benchmarks/gpu.py --device cpu                               the same with a tiny model, to try it out

- training: steps of `Mask2Former.losses`, backward pass, clipping of the whole gradient and fused AdamW, with 16 images
  of 1024x1024 and 20 objects each, which are on the GPU already; and the most memory that PyTorch held.
- inference: one picture of 800x1333 at a time from the padded batch to its panoptic segmentation, with and without
  CUDA graphs and, with --compile, PyTorch's compiler. "ids" is the share of pixels with the id of the first row.
- profile: the ten kernels that take most of the time, and how often the host waits for the GPU: on a GPU as PyTorch
  warns of it, on a CPU as `benchmarks/host_waits.py` counts it.
- kernel: deformable attention of one image at the encoder's sizes, compiled kernel against PyTorch reference;
  benchmarks/ms_deform_attn.py has more sizes, memory and bandwidth.

Times are of the clock around work that is waited for at the end, after a warm-up. Weights are random, see
benchmarks/inference.py and benchmarks/training_step.py.
"""

import argparse
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ms_deform_attn, training_step
from benchmarks.host_waits import PretendedGPU
from benchmarks.inference import make_batch, model_of, ours, size_of
from mask2former import training
from mask2former.build import build_model
from mask2former.cuda_graphs import GraphedModel
from mask2former.devices import device_problem
from mask2former.inference import Forward
from mask2former.modeling.mask2former import Mask2Former
from mask2former.modeling.precision import PRECISIONS, Precision, float32_products
from mask2former.modeling.structures import MaskTarget
from mask2former.ops import _extension

PARTS = ("training", "inference", "profile", "kernel")
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "preset": "r50", "size": 1024, "picture": "800x1333", "batch": 16, "objects": 20,
        "precision": ["fast", "tf32", "strict"], "warm_up": 5, "repeats": 20,
    },
    "cpu": {  # many CPUs take minutes for bfloat16
        "preset": "tiny", "size": 128, "picture": "96x160", "batch": 2, "objects": 5,
        "precision": ["tf32", "strict"], "warm_up": 1, "repeats": 2,
    },
}
KERNELS = 10  # rows of the profile
KERNEL_TYPES = (torch.float32, torch.bfloat16)
SYNCHRONISING = "called a synchronizing CUDA operation"


class Variant(NamedTuple):
    """A way to run inference."""

    precision: Precision
    is_compiled: bool
    has_graphs: bool


# ---- what is run


def make_step(args: argparse.Namespace, precision: Precision, device: str) -> training_step.Step:
    """A training step whose images and targets are on the device."""
    torch.manual_seed(2)
    model = build_model(training_step.architecture(args.preset), precision).to(device)
    generator = torch.Generator().manual_seed(1)
    shape = (args.batch, 3, args.size, args.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device).unbind(0)
    targets = [
        MaskTarget(labels.to(device), masks.to(device))
        for labels, masks in training_step.make_targets(args.batch, args.objects, args.size)
    ]
    return training_step.Step(
        model, lambda: training.sum_of(model.losses(images, targets)), partial(float32_products, precision)
    )


def make_inference(args: argparse.Namespace, variant: Variant, device: str) -> Callable[[], Tensor]:
    """A function that segments a picture and gives the ids of its pixels."""
    size = size_of(args.picture)
    model: Mask2Former = model_of(training_step.architecture(args.preset), size).to(device)
    model.precision = variant.precision
    if variant.is_compiled:
        model.compile(dynamic=True)
    forward: Forward = GraphedModel(model, 1) if variant.has_graphs else model
    run = ours(forward, make_batch(model, size), size)
    return lambda: run()[1]


# ---- measuring


def synchronise(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], args: argparse.Namespace) -> float:
    """Mean seconds of one of many runs, one after the other, after the warm-up; waited for once."""
    for _ in range(args.warm_up):
        run()
    synchronise(args.device)
    start = time.perf_counter()
    for _ in range(args.repeats):
        run()
    synchronise(args.device)
    return (time.perf_counter() - start) / args.repeats


def peak_bytes(step: training_step.Step, device: str) -> int:
    """The most memory of tensors in one more step, what stays included."""
    if device != "cuda":
        return training_step.peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    step.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def waits_on_gpu(run: Callable[[], Any]) -> int:
    """How often PyTorch warns that a run makes the host wait."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNCHRONISING in str(warning.message) for warning in found)


def waits_on_pretended_gpu(make: Callable[[str], Callable[[], Any]]) -> int:
    """The same, of what is made for a GPU where there is none; without autocast, which PyTorch has only where it is."""
    with PretendedGPU() as gpu:
        run = make("cuda")
        run()
        gpu.clear()
        run()
    return gpu.waits.total()


def largest_kernels(run: Callable[[], Any], device: str) -> list[tuple[str, int, float, float]]:
    """Name, calls, ms and share of the kernels (on a CPU operators) that take most of the time of a run."""
    run()
    synchronise(device)
    is_cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]) as profiler:
        run()
        synchronise(device)
    # on a GPU operators, and names that programs give to spans, have their kernels' time as well: only kernels count
    kernel = torch.autograd.DeviceType.CUDA if is_cuda else torch.autograd.DeviceType.CPU
    events = profiler.key_averages()
    rows = [event for event in events if event.device_type == kernel and not event.is_user_annotation]
    times = {row.key: row.self_device_time_total if is_cuda else row.self_cpu_time_total for row in rows}
    whole = sum(times.values()) or 1
    rows.sort(key=lambda row: -times[row.key])
    return [(row.key, row.count, times[row.key] / 1e3, times[row.key] / whole) for row in rows[:KERNELS]]


# ---- parts


def print_training(args: argparse.Namespace) -> None:
    """Images a second and memory."""
    print(f"\n{args.batch} images of {args.size}x{args.size} with {args.objects} objects each\n")
    print("| precision | ms a step | images a second | GB |\n|---|---|---|---|")
    for precision in args.precision:
        step = make_step(args, precision, args.device)
        seconds = seconds_of(step.run, args)
        step.check()
        memory = peak_bytes(step, args.device) / 1e9
        print(f"| {precision} | {seconds * 1e3:.1f} | {args.batch / seconds:.1f} | {memory:.2f} |", flush=True)


@torch.inference_mode()
def print_inference(args: argparse.Namespace) -> None:
    """Pictures a second."""
    print(f"\none picture of {args.picture} at a time, panoptic\n")
    print("| precision | compiled | CUDA graph | ms | pictures a second | segments | ids |")
    print("|---|---|---|---|---|---|---|")
    first: Tensor | None = None
    graphs = (False, True) if args.device == "cuda" else (False,)
    for precision in args.precision:
        for variant in [Variant(precision, c, g) for c in (False, True)[: 1 + args.compile] for g in graphs]:
            run = make_inference(args, variant, args.device)
            seconds = seconds_of(run, args)
            ids = run()
            first = ids if first is None else first
            segments, equal = len(ids.unique()), (ids == first).float().mean().item()
            words = " | ".join(("no", "yes")[flag] for flag in variant[1:])
            numbers = f"{seconds * 1e3:.2f} | {1 / seconds:.1f} | {segments} | {equal:.1%}"
            print(f"| {precision} | {words} | {numbers} |", flush=True)
            del run
            torch.compiler.reset()


def print_profile(args: argparse.Namespace) -> None:
    """Kernels and waits of a training step and of a picture."""

    def step(precision: Precision, device: str) -> Callable[[], Any]:
        return make_step(args, precision, device).run

    def picture(precision: Precision, device: str) -> Callable[[], Any]:
        return torch.inference_mode()(make_inference(args, Variant(precision, False, False), device))

    for title, make in (("a training step", step), ("a picture, panoptic", picture)):
        run = make(args.precision[0], args.device)
        rows = largest_kernels(run, args.device)
        waits = waits_on_gpu(run) if args.device == "cuda" else waits_on_pretended_gpu(partial(make, "tf32"))
        print(f"\n{title}, {args.precision[0]}: the host waits {waits} times\n")
        print("| kernel | calls | ms | share |\n|---|---|---|---|")
        for name, calls, ms, share in rows:
            print(f"| {name[:80].replace('|', ' ')} | {calls} | {ms:.2f} | {share:.1%} |", flush=True)
        del run


def print_kernel(args: argparse.Namespace) -> None:
    """Deformable attention, kernel against reference."""
    shapes = ms_deform_attn.level_shapes(*size_of(args.picture))
    print(f"\ndeformable attention, one image of {args.picture}\n")
    if not all(_extension.kernel_applies(torch.device(args.device, 0), dtype) for dtype in KERNEL_TYPES):
        print(f"not measured, there is no kernel for this device: {_extension.describe()}")
        return
    print("| type | pass | reference ms | kernel ms | times faster | largest difference |\n|---|---|---|---|---|---|")
    for dtype in KERNEL_TYPES:
        for name, call in ms_deform_attn.op_calls(1, shapes, args.device, dtype).items():
            with _extension.reference_only():
                expected, reference = call(), ms_deform_attn.measure(call, args.device, args.repeats)
            found, kernel = call(), ms_deform_attn.measure(call, args.device, args.repeats)
            times = f"{reference.median_ms:.3f} | {kernel.median_ms:.3f} | {reference.median_ms / kernel.median_ms:.1f}"
            print(f"| {str(dtype)[6:]} | {name} | {times} | {largest_difference(found, expected):.1e} |", flush=True)


def largest_difference(found: Tensor | Sequence[Tensor], expected: Tensor | Sequence[Tensor]) -> float:
    """Of any number, as a part of the largest number of its tensor."""
    pairs = zip(found, expected, strict=True) if isinstance(found, list | tuple) else [(found, expected)]
    return max(((a.float() - b.float()).abs().max() / b.float().abs().max()).item() for a, b in pairs)


def header(device: str) -> str:
    """What it runs on."""
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return f"{date.today().isoformat()}, {where}, {versions}. {_extension.describe()}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says, with the defaults of the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", choices=("tiny", "r50", "swin_t"))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS)
    parser.add_argument("--size", type=int, help="height and width of training images, a multiple of 32")
    parser.add_argument("--picture", help="HEIGHTxWIDTH of the picture")
    parser.add_argument("--batch", type=int, help="training images")
    parser.add_argument("--objects", type=int, help="of each training image")
    parser.add_argument("--warm-up", type=int, help="runs that do not count")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--compile", action="store_true", help="inference with PyTorch's compiler, too")
    args = parser.parse_args(argv)
    if problem := device_problem(args.device):
        parser.error(f"--device {args.device}: {problem}")
    for name, value in DEFAULTS[args.device].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the parts."""
    args = arguments(argv)
    print(header(args.device))
    run = {"training": print_training, "inference": print_inference, "profile": print_profile, "kernel": print_kernel}
    for part in args.part:
        print(f"\n## {part}, {args.preset}")
        run[part](args)


if __name__ == "__main__":
    main()
