"""Deformable attention: compiled kernel against PyTorch reference, in one run.

    python benchmarks/ms_deform_attn.py                          CPU and, where there is one, CUDA
    python benchmarks/ms_deform_attn.py --device cuda --dtype bfloat16 --batch 1 8
    python benchmarks/ms_deform_attn.py --pixel-decoder          the whole R50 pixel decoder as well

Prints a Markdown table: median times in ms, how many times faster the kernel is, and the memory that a call takes on
top of its inputs. The op is `ms_deform_attn_fused` at the encoder's real sizes: 8 heads, 32 channels, 3 levels, 4
points, a query a cell; offsets are those of an untrained model (up to 4 pixels) plus noise. On CUDA the last column is
the share of the copy bandwidth, measured in the same run, that the forward pass reaches, counting each tensor once.
"""

import argparse
import contextlib
import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mask2former.modeling.pixel_decoders import DeformablePixelDecoder
from mask2former.ops import _extension, ms_deform_attn_fused

HEADS, CHANNELS, POINTS, STRIDES = 8, 32, 4, (32, 16, 8)


@dataclass
class Timing:
    """Seconds of each call, and bytes on top of what was there."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median_ms(self) -> float:
        """Median in ms."""
        return statistics.median(self.seconds) * 1e3


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """The encoder's levels for an image."""
    return [(-(-height // s), -(-width // s)) for s in STRIDES]


def op_inputs(batch: int, shapes: list[tuple[int, int]], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Value, offsets and logits that want gradients."""
    generator = torch.Generator().manual_seed(0)
    S, L = sum(h * w for h, w in shapes), len(shapes)
    sums = torch.promote_types(dtype, torch.float32)
    angle = torch.arange(HEADS) * (2 * torch.pi / HEADS)
    direction = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None]  # (M, 1, 1, 2)
    lengths = torch.arange(1, POINTS + 1)[:, None]
    noise = torch.randn(batch, S, HEADS, L, POINTS, 2, generator=generator)
    offsets = direction * lengths + noise
    logits = torch.randn(batch, S, HEADS, L, POINTS, generator=generator)
    value = torch.randn(batch, S, HEADS, CHANNELS, generator=generator)
    return [value.to(device, dtype).requires_grad_(), *(x.to(device, sums).requires_grad_() for x in (offsets, logits))]


def op_calls(
    batch: int, shapes: list[tuple[int, int]], device: str, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """Forward, and forward and backward, of the op."""
    inputs = op_inputs(batch, shapes, device, dtype)
    grad_output = torch.randn(batch, inputs[0].shape[1], HEADS * CHANNELS, device=device).to(dtype)

    def forward() -> Tensor:
        with torch.no_grad():
            return ms_deform_attn_fused(inputs[0], shapes, *inputs[1:])

    def both() -> Any:
        return torch.autograd.grad(ms_deform_attn_fused(inputs[0], shapes, *inputs[1:]), inputs, grad_output)

    return {"forward": forward, "forward + backward": both}


def decoder_calls(batch: int, height: int, width: int, device: str) -> dict[str, Callable[[], Any]]:
    """Forward of the whole R50 pixel decoder, float32 as published."""
    torch.manual_seed(0)
    channels, strides = (256, 512, 1024, 2048), (4, 8, 16, 32)
    names = ("res2", "res3", "res4", "res5")
    decoder = DeformablePixelDecoder(
        in_channels=dict(zip(names, channels, strict=True)), in_strides=dict(zip(names, strides, strict=True))
    )
    for layer in decoder.transformer.encoder.layers:
        # an untrained model's offsets are the same for all queries; a trained one's are not,
        # and neither are the op's above
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=channels[0] ** -0.5)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=channels[0] ** -0.5)
    decoder = decoder.to(device).eval()
    features = {
        name: torch.randn(batch, c, -(-height // s), -(-width // s), device=device)
        for name, c, s in zip(names, channels, strides, strict=True)
    }

    def forward() -> Any:
        with torch.no_grad():
            return decoder(features)

    return {"pixel decoder, forward": forward}


def measure(call: Callable[[], Any], device: str, repeats: int) -> Timing:
    """Time of each of `repeats` calls after one to warm up, and the peak memory of one more."""
    timing = Timing()
    call()
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        timing.seconds.append(time.perf_counter() - start)
    with peak_memory(device, timing):
        call()
        synchronize(device)
    return timing


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def peak_memory(device: str, timing: Timing) -> Iterator[None]:
    """Highest memory inside minus the memory before: CUDA's own count, or Linux's resident set."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        timing.peak_bytes = torch.cuda.max_memory_allocated() - before
        return
    if sys.platform != "linux":
        yield
        return
    ctypes.CDLL(None).malloc_trim(0)  # else the call finds its memory in what earlier ones have freed
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    yield
    timing.peak_bytes = max(0, resident_bytes("VmHWM") - before)


def resident_bytes(name: str) -> int:
    """A line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def copy_bandwidth() -> float:
    """Bytes a second of a device-to-device copy, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), "cuda", 20)
    return 2 * source.numel() / statistics.median(timing.seconds)


def op_bytes(batch: int, shapes: list[tuple[int, int]], dtype: torch.dtype) -> int:
    """Bytes of value, offsets, logits and output, each once."""
    S, L = sum(h * w for h, w in shapes), len(shapes)
    element = torch.empty((), dtype=dtype).element_size()
    sums = torch.empty((), dtype=torch.promote_types(dtype, torch.float32)).element_size()
    return batch * S * HEADS * (2 * CHANNELS * element + 3 * L * POINTS * sums)


def compare(
    title: str, calls: dict[str, Callable[[], Any]], device: str, repeats: int, ideal_ms: float | None = None
) -> None:
    """Print a row for each call: reference first, then kernel, in this order for both."""
    for name, call in calls.items():
        with _extension.reference_only():
            reference = measure(call, device, max(3, repeats // 3))
        kernel = measure(call, device, repeats)
        of_copy = f"{ideal_ms / kernel.median_ms:.0%}" if ideal_ms is not None and name == "forward" else ""
        print(
            f"| {title} | {name} | {reference.median_ms:.2f} | {kernel.median_ms:.2f} | "
            f"{reference.median_ms / kernel.median_ms:.1f} | {reference.peak_bytes / 2**20:.0f} | "
            f"{kernel.peak_bytes / 2**20:.0f} | {of_copy} |",
            flush=True,
        )


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", nargs="+", choices=("cpu", "cuda"))
    types = ("float32", "float64", "bfloat16", "float16")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=types)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--size", nargs="+", default=["800x1200", "1024x1024"], help="HEIGHTxWIDTH of the image")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pixel-decoder", action="store_true")
    arguments = parser.parse_args()
    if _extension.extension.module is None:
        parser.error(_extension.describe())
    torch.set_num_threads(arguments.threads)
    devices = arguments.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    print(f"{_extension.describe()} {arguments.threads} threads.\n")
    print("| what | pass | reference ms | kernel ms | times faster | reference MiB | kernel MiB | of copy bandwidth |")
    print("|---|---|---|---|---|---|---|---|")
    for device in devices:
        bandwidth = copy_bandwidth() if device == "cuda" else None
        for size in arguments.size:
            height, width = (int(x) for x in size.split("x"))
            shapes = level_shapes(height, width)
            for batch in arguments.batch:
                for name in arguments.dtype:
                    dtype = getattr(torch, name)
                    # the time that one copy of the op's bytes would take
                    ideal_ms = op_bytes(batch, shapes, dtype) / bandwidth * 1e3 if bandwidth else None
                    calls = op_calls(batch, shapes, device, dtype)
                    compare(f"{device}, {name}, {size}, batch {batch}", calls, device, arguments.repeats, ideal_ms)
            if arguments.pixel_decoder:
                title = f"{device}, float32, {size}, batch 1"
                compare(title, decoder_calls(1, height, width, device), device, arguments.repeats)


if __name__ == "__main__":
    main()
