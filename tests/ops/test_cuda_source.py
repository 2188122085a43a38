"""The CUDA sources without a GPU: nvcc compiles them, and their arithmetic, run on a CPU, equals the reference."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mask2former.ops.ms_deform_attn import ms_deform_attn_fused_reference, ms_deform_attn_reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ with C++20 on Linux")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "emulator.so"
    source = Path(__file__).with_name("cuda_on_cpu.cpp")
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def _run(
    emulator: ctypes.CDLL, value: Tensor, shapes: list[tuple[int, int]], points: Tensor, scores: Tensor,
    grad_output: Tensor, *, vector: int, fused: bool, blocks: int,
) -> list[Tensor]:  # fmt: skip
    B, S, M, D = value.shape
    Q, L, P = points.shape[1], points.shape[3], points.shape[4]
    group = 1
    while group < 32 and group * vector < D:
        group *= 2
    heights, widths = [h for h, _ in shapes], [w for _, w in shapes]
    starts = [sum(h * w for h, w in shapes[:level]) for level in range(L)]
    results = [torch.full((B, Q, M * D), 9.0).double(), torch.zeros_like(value)]
    results += [torch.full_like(points, 9), torch.full_like(scores, 9)]
    tensors = [value, points, scores, results[0], grad_output, *results[1:]]
    assert all(x.is_contiguous() and x.dtype == torch.float64 for x in tensors)
    emulator.forward_and_backward(
        (ctypes.c_int64 * 8)(B, Q, M, S, D, L, P, group),
        (ctypes.c_int * (3 * L))(*heights, *widths, *starts),
        (ctypes.c_void_p * 8)(*(x.data_ptr() for x in tensors)),
        ctypes.c_uint(blocks), ctypes.c_int(vector), ctypes.c_bool(fused),
    )  # fmt: skip
    return results


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("B", "M", "D", "P", "shapes", "vector"),
    [
        (2, 2, 8, 4, [(3, 4), (2, 2), (1, 3)], 2),  # three levels and four points have their own kernel
        (1, 3, 6, 2, [(3, 4), (1, 1)], 2),  # idle lanes
        (1, 2, 3, 1, [(4, 3)], 1),
        (1, 1, 40, 5, [(2, 3), (1, 2)], 1),  # more channels than lanes
        (1, 2, 1, 3, [(2, 2), (5, 1), (1, 1), (2, 1)], 1),
    ],
)
def test_arithmetic(
    emulator: ctypes.CDLL, B: int, M: int, D: int, P: int, shapes: list[tuple[int, int]], vector: int, fused: bool
) -> None:
    S, L = sum(h * w for h, w in shapes), len(shapes)
    value = torch.randn(B, S, M, D, dtype=torch.float64, requires_grad=True)
    if fused:
        points, scores = torch.randn(B, S, M, L, P, 2).double() * 2, torch.randn(B, S, M, L, P).double() * 3
    else:
        points, scores = torch.rand(B, S, M, L, P, 2).double() * 1.6 - 0.3, torch.rand(B, S, M, L, P).double()
    grad_output = torch.randn(B, S, M * D).double()
    inputs = (value, points.requires_grad_(), scores.requires_grad_())
    reference = ms_deform_attn_fused_reference if fused else ms_deform_attn_reference
    output = reference(value, shapes, points, scores)
    expected = [output, *torch.autograd.grad(output, inputs, grad_output)]
    for blocks in (1, 3):  # one block has to loop
        found = _run(
            emulator, *(x.detach() for x in inputs[:1]), shapes, points.detach(), scores.detach(), grad_output,
            vector=vector, fused=fused, blocks=blocks,
        )  # fmt: skip
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_nvcc_compiles_the_sources(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is no nvcc")
    if torch.version.cuda is None:
        pytest.skip("this PyTorch has no CUDA")
    environment = os.environ | {"MASK2FORMER_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0+PTX"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib")]
    command += ["--build-temp", str(tmp_path / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (tmp_path / "lib").rglob("_C*.so")
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("_C", {str(built)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.cuda_archs == "900" and module.cuda_ptx == 1, (module.cuda_archs, module.cuda_ptx)
assert module.cuda_version.split(".")[0] == torch.version.cuda.split(".")[0]
op = "mask2former::ms_deform_attn_fused_backward"
assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
