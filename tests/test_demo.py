"""The demo as users run it: a process of its own where that matters, its main function otherwise."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mask2former import predictor as predictor_module
from mask2former.checkpoint import ModelDescription, PredictionSettings, save_model_file
from tests.tiny import architecture, categories, lively_model, picture

pytest.importorskip("cv2")

DEMO = Path(__file__).resolve().parent.parent / "demo"


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_under_test", DEMO / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_demo()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    settings = PredictionSettings(shortest=64, longest=160, object_mask_threshold=0.3, overlap_threshold=0.2)
    description = ModelDescription(architecture=architecture(), categories=categories(), settings=settings)
    save_model_file(path, lively_model(), description)
    return path


def save(path: Path, seed: int = 0, pixels: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed=seed) if pixels is None else pixels).save(path)
    return path


@pytest.fixture
def run(model_file: Path, tmp_path: Path) -> Callable[..., int]:
    """Run in this process, with the tiny model and output to `out`."""

    def call(*arguments: object) -> int:
        words = [str(a) for a in arguments]
        if "--model" not in words and "--config-file" not in words:
            words += ["--model", str(model_file)]
        if "--output" not in words:
            words += ["--output", str(tmp_path / "out")]
        return demo.main(words)

    return call


def process(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run as a process of its own, as from a checkout that is not installed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(DEMO / "demo.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- as processes


def test_files_folders_patterns_and_what_goes_wrong(tmp_path: Path, model_file: Path) -> None:
    save(tmp_path / "single.jpg", 0)
    save(tmp_path / "folder" / "b.png", 1)
    save(tmp_path / "folder" / "a.JPG", 2)
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    save(tmp_path / "globbed" / "x1.png", 3)
    save(tmp_path / "globbed" / "x2.png", 4)
    save(tmp_path / "globbed" / "y.png", 5)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "single.jpg").read_bytes()[:200])
    inputs = ["single.jpg", "folder", "globbed/x*.png", "missing.jpg", "broken.jpg"]
    done = process("--input", *inputs, "--output", "new/out", "--model", model_file, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert names(tmp_path / "new" / "out") == ["a.png", "b.png", "single.png", "x1.png", "x2.png"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("demo: ")]
    assert len(errors) == 2
    assert errors[0] == "demo: no such file: missing.jpg"
    assert errors[1].startswith("demo: skipped broken.jpg: cannot read the image broken.jpg")
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Results are in new/out"
    assert [line.split(":")[0] for line in lines[1:]] == ["single.jpg", "a.JPG", "b.png", "x1.png", "x2.png"]
    assert " segments: class " in lines[1]
    with Image.open(tmp_path / "new" / "out" / "single.png") as drawn:
        assert drawn.size == (70, 50)
        assert drawn.mode == "RGB"
        assert not np.array_equal(np.asarray(drawn), picture())


def test_unknown_model_file(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    done = process("--input", "a.png", "--output", "out", "--model", "none.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "demo: --model cannot be used: there is no file none.safetensors"


def test_help_needs_no_torch(tmp_path: Path) -> None:
    code = f"""
import runpy, sys
sys.argv = ["demo.py", "--help"]
try:
    runpy.run_path({str(DEMO / "demo.py")!r}, run_name="__main__")
except SystemExit as stop:
    print("code", stop.code, "torch", "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "code 0 torch False"
    for option in ("--input", "--output", "--model", "--config-file", "--task", "--confidence-threshold", "--device"):
        assert option in done.stdout


# ---- results


def test_all_done_is_exit_code_0(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input", save(tmp_path / "a.png")) == 0
    captured = capsys.readouterr()
    assert f"Results are in {tmp_path / 'out'}" in captured.out
    assert "demo:" not in captured.err


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_output_is_what_the_predictor_draws(
    run: Callable[..., int], tmp_path: Path, model_file: Path, task: str
) -> None:
    assert run("--input", save(tmp_path / "a.png"), "--task", task) == 0
    predictor = predictor_module.Predictor.from_file(model_file)
    result = predictor(picture(), task, threshold=0.5 if task == "instance" else None)  # type: ignore[arg-type]
    with Image.open(tmp_path / "out" / "a.png") as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), predictor.draw(picture(), result))


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_confidence_threshold_works(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    path, found, drawings = save(tmp_path / "a.png"), {}, {}
    for threshold in (0, 0.7, 1):
        assert run("--input", path, "--task", task, "--confidence-threshold", threshold) == 0
        line = capsys.readouterr().out.splitlines()[1]
        count = line.removeprefix("a.png: ").split()[0]
        found[threshold] = 0 if count == "no" else int(count)
        drawings[threshold] = (tmp_path / "out" / "a.png").read_bytes()
    assert found[0] > found[0.7] > found[1] == 0
    with Image.open(tmp_path / "out" / "a.png") as drawn:
        np.testing.assert_array_equal(np.asarray(drawn), picture())  # nothing found, nothing drawn
    assert len(set(drawings.values())) == 3


def test_grey_and_sixteen_bit_and_alpha(run: Callable[..., int], tmp_path: Path) -> None:
    grey = picture()[..., 0]
    save(tmp_path / "in" / "grey.png", pixels=grey)
    save(tmp_path / "in" / "deep.png", pixels=grey.astype(np.uint16) * 257)
    save(tmp_path / "in" / "alpha.png", pixels=np.dstack([grey, grey, grey, grey // 2]))
    save(tmp_path / "in" / "tiny.png", pixels=grey[:1, :1])
    assert run("--input", tmp_path / "in") == 0
    out = tmp_path / "out"
    assert names(out) == ["alpha.png", "deep.png", "grey.png", "tiny.png"]
    assert (out / "grey.png").read_bytes() == (out / "deep.png").read_bytes() == (out / "alpha.png").read_bytes()


def test_stems_that_collide(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = save(tmp_path / "x" / "a.png", 0), save(tmp_path / "y" / "a.jpg", 1)
    third = save(tmp_path / "y" / "a_2.png", 2)
    assert run("--input", first, second, third) == 0
    assert names(tmp_path / "out") == ["a.png", "a_2.png", "a_2_2.png"]
    out = capsys.readouterr().out
    assert "a.jpg -> a_2.png: " in out
    assert "a_2.png -> a_2_2.png: " in out
    assert len({p.read_bytes() for p in (tmp_path / "out").iterdir()}) == 3


def test_names_that_differ_in_case_only(tmp_path: Path) -> None:
    pictures = [tmp_path / "x" / "a.png", tmp_path / "x" / "A.png"]
    assert [p.name for p in demo.output_paths(pictures, tmp_path).values()] == ["a.png", "A_2.png"]


def test_inputs_are_never_overwritten(run: Callable[..., int], tmp_path: Path) -> None:
    path, other = save(tmp_path / "a.png"), save(tmp_path / "a.jpg", 1)
    before = path.read_bytes(), other.read_bytes()
    for _ in range(2):
        assert run("--input", path, other, "--output", tmp_path) == 0
        assert (path.read_bytes(), other.read_bytes()) == before
        assert names(tmp_path) == ["a.jpg", "a.png", "a_2.png", "a_3.png"]


def test_output_into_the_input_folder_is_refused(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    assert run("--input", tmp_path / "in", "--output", tmp_path / "in" / ".." / "in") == 2
    assert "--output must be another folder" in capsys.readouterr().err
    assert names(tmp_path / "in") == ["a.png"]


def test_the_same_file_twice_is_done_once(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "in" / "a.png")
    assert run("--input", path, path.parent, str(path.parent / "*")) == 0
    assert names(tmp_path / "out") == ["a.png"]
    assert capsys.readouterr().out.count("a.png: ") == 1


def test_brackets_in_a_file_name_are_no_pattern(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--input", save(tmp_path / "a[1].png")) == 0
    assert names(tmp_path / "out") == ["a[1].png"]


def test_semantic_summary(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--input", save(tmp_path / "a.png"), "--task", "semantic") == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "classes: class " in line
    shares = [int(word[:-1]) for word in line.split() if word.endswith("%")]
    assert shares == sorted(shares, reverse=True)
    assert 97 <= sum(shares) <= 103


# ---- what goes wrong


def test_inputs_without_pictures(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run("--input", tmp_path / "empty", tmp_path / "*.gif", tmp_path / "no.png") == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"demo: no pictures in the folder {tmp_path / 'empty'}",
        f"demo: no file matches {tmp_path / '*.gif'}",
        f"demo: no such file: {tmp_path / 'no.png'}",
    ]
    assert not (tmp_path / "out").exists()


def test_one_missing_picture_is_exit_code_1(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("--input", save(tmp_path / "a.png"), tmp_path / "missing.png") == 1
    assert names(tmp_path / "out") == ["a.png"]


@pytest.mark.parametrize("content", [b"", b"junk" * 99])
def test_broken_model_file(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    assert run("--input", save(tmp_path / "a.png"), "--model", tmp_path / "m.safetensors") == 2
    error = capsys.readouterr().err
    assert error.startswith("demo: --model cannot be used: ")
    assert "m.safetensors is no safetensors file" in error


@pytest.mark.parametrize("below", ["file", "file/sub"])
def test_output_that_cannot_be_written(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], below: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run("--input", save(tmp_path / "a.png"), "--output", tmp_path / below) == 2
    assert f"cannot make the folder --output {tmp_path / below}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    path = save(tmp_path / "a.png")
    monkeypatch.setattr("os.fsync", fail)
    assert run("--input", path) == 1
    captured = capsys.readouterr()
    assert "demo: skipped" in captured.err
    assert "No space left" in captured.err
    assert names(tmp_path / "out") == []
    assert captured.out == ""


def test_interrupt(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(tmp_path / "in" / "a.png", 0)
    save(tmp_path / "in" / "b.png", 1)
    real, calls = os.fsync, []

    def interrupt_second(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr("os.fsync", interrupt_second)
    assert run("--input", tmp_path / "in") == 130
    assert "demo: interrupted" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["a.png"]
    Image.open(tmp_path / "out" / "a.png").load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--confidence-threshold", "1.5"], "--confidence-threshold must be in [0, 1], got 1.5"),
        (["--confidence-threshold", "nan"], "--confidence-threshold must be in [0, 1], got nan"),
        (["--confidence-threshold", "high"], "invalid float value"),
        (["--confidence-threshold", "0.5", "--task", "semantic"], "no meaning for --task semantic"),
        (["--task", "depth"], "invalid choice"),
        (["--opts", "MODEL.WEIGHTS", "x"], "--opts changes a config, so it needs --config-file"),
        (["--config-file", "x.yaml", "--model", "y"], "not allowed with argument"),
    ],
)
def test_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(["--input", "a.png", "--output", str(tmp_path / "out"), *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_task_that_the_model_does_not_have(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "semantic.safetensors"
    settings = PredictionSettings(tasks=("semantic",), shortest=64)
    description = ModelDescription(architecture=architecture(), categories=categories(), settings=settings)
    save_model_file(path, lively_model(), description)
    image = save(tmp_path / "a.png")
    assert run("--input", image, "--model", path, "--task", "panoptic") == 2
    assert "--task must be one of semantic with this model, got panoptic" in capsys.readouterr().err
    assert run("--input", image, "--model", path, "--confidence-threshold", "0.5") == 2
    assert "no meaning for semantic segmentation" in capsys.readouterr().err
    assert run("--input", image, "--model", path) == 0
    assert "of the area" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["warp-drive", "cuda:99"])
def test_device_that_is_not_there(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    assert run("--input", save(tmp_path / "a.png"), "--device", device) == 2
    assert f"demo: --device {device} cannot be used: " in capsys.readouterr().err


def test_config_file_without_any_reader(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "yaml", None)  # type: ignore[arg-type]
    config = tmp_path / "c.yaml"
    config.write_text("MODEL: {}")
    image = save(tmp_path / "a.png")
    assert run("--input", image, "--config-file", config) == 2
    error = capsys.readouterr().err
    assert "needs PyYAML or Detectron2, and neither is installed" in error
    assert "--model" in error
    assert run("--input", image, "--config-file", tmp_path / "none.yaml") == 2
    assert "there is no file" in capsys.readouterr().err


def test_config_file_reaches_detectron2(
    run: Callable[..., int], tmp_path: Path, model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins for Detectron2 and `mask2former.d2`: what the demo asks of them."""
    asked = []
    package, config_module = ModuleType("mask2former.d2"), ModuleType("mask2former.d2.config")
    detectron2 = ModuleType("detectron2")
    detectron2.__spec__ = importlib.util.spec_from_loader("detectron2", None)
    config_module.get_config = lambda *a: asked.append(a)  # type: ignore[attr-defined]
    package.predictor_from_config = lambda _: predictor_module.Predictor.from_file(model_file)  # type: ignore[attr-defined]
    for name, module in (
        ("detectron2", detectron2),
        ("mask2former.d2", package),
        ("mask2former.d2.config", config_module),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    config = tmp_path / "c.yaml"
    config.write_text("MODEL: {}")
    image = save(tmp_path / "a.png")
    words = ["--input", image, "--output", tmp_path / "out", "--device", "cpu", "--config-file", config]
    assert run(*words, "--opts", "MODEL.WEIGHTS", "w.pkl") == 0
    assert asked == [(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "w.pkl"])]
    assert names(tmp_path / "out") == ["a.png"]


# ---- the sample pictures


def test_sample_pictures_have_credits_and_are_small() -> None:
    import csv

    folder = DEMO / "pictures"
    with (folder / "CREDITS.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    found, problems = demo.find_pictures([str(folder)])
    assert not problems
    assert {p.name for p in found} == rows.keys()
    assert len(found) >= 5
    assert sum(p.stat().st_size for p in found) < 2_000_000
    assert all(row["licence"] and row["source"].startswith("https://") for row in rows.values())
