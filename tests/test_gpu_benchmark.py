"""Each part of benchmarks/gpu.py runs, here on a CPU, and prints its table."""

import math

import pytest
import torch

from benchmarks import gpu

SMALL = ["--size=64", "--picture=64x64", "--batch=1", "--objects=2", "--repeats=1", "--precision", "strict"]


def table(text: str) -> list[list[str]]:
    """Cells of all rows, without the lines below headers."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    gpu.main(["--device", "cpu", *SMALL, *arguments])
    text = capsys.readouterr().out
    assert f"PyTorch {torch.__version__}" in text
    return text


@pytest.mark.parametrize("part", ["training", "inference"])
def test_speed_is_measured(capsys: pytest.CaptureFixture[str], part: str) -> None:
    header, row = table(run(capsys, "--part", part))
    values = dict(zip(header, row, strict=True))
    assert values["precision"] == "strict"
    rate = {"training": "images a second", "inference": "pictures a second"}[part]
    milliseconds = float(values["ms a step" if part == "training" else "ms"])
    assert float(values[rate]) == pytest.approx(1e3 / milliseconds, abs=0.06, rel=0.01)
    if part == "training":
        assert 0.01 < float(values["GB"]) < 1
    else:
        assert int(values["segments"]) > 1
        assert values["ids"] == "100.0%"


def test_the_profile_has_ten_kernels_and_the_waits(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--part", "profile")
    assert "a training step, strict: the host waits 1 times" in text
    assert "a picture, panoptic, strict: the host waits 2 times" in text
    rows = table(text)
    assert len(rows) == 2 * (1 + gpu.KERNELS)
    for start in (0, 1 + gpu.KERNELS):
        times = [float(row[2]) for row in rows[start + 1 : start + 1 + gpu.KERNELS]]
        assert times == sorted(times, reverse=True)
        assert times[0] > 0


def test_the_kernel_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "--part", "kernel")
    rows = table(text)[1:]
    if not rows:
        assert "not measured, there is no kernel for this device" in text
        pytest.skip(text.splitlines()[-1])
    assert [row[:2] for row in rows] == [
        [dtype, name] for dtype in ("float32", "bfloat16") for name in ("forward", "forward + backward")
    ]
    limits = [1e-4, 1e-4, 0.02, 0.02]
    assert all(float(row[-1]) < limit for row, limit in zip(rows, limits, strict=True))


def test_differences_are_parts_of_the_largest_number() -> None:
    expected = [torch.tensor([1.0, -4.0]), torch.tensor([10.0])]
    assert math.isclose(gpu.largest_difference([torch.tensor([2.0, -4.0]), torch.tensor([10.5])], expected), 0.25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cuda: " in capsys.readouterr().err
