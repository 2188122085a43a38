"""The demo as users run it: a process of its own where that matters, its main function otherwise."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from mask2former import predictor as predictor_module
from mask2former.checkpoint import ModelDescription, PredictionSettings, save_model_file
from tests.tiny import architecture, categories, lively_model, picture

cv2 = pytest.importorskip("cv2")

from mask2former.video import VideoSegmenter  # noqa: E402
from mask2former.video_files import VideoWriter, read_video  # noqa: E402
from mask2former.visualizer import Visualizer  # noqa: E402

DEMO = Path(__file__).resolve().parent.parent / "demo"


def load_demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_under_test", DEMO / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo = load_demo()  # which finds the modules beside it

import demo_models  # noqa: E402
import demo_video  # noqa: E402
import demo_window  # noqa: E402
from demo_inputs import CommandError, FreeNames, find_inputs, output_paths  # noqa: E402
from demo_sheet import ContactSheet  # noqa: E402
from demo_video import FrameRate  # noqa: E402

SHEET = "contact_sheet.png"


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
    assert names(tmp_path / "new" / "out") == ["a.png", "b.png", SHEET, "single.png", "x1.png", "x2.png"]
    errors = [line for line in done.stderr.splitlines() if line.startswith("demo: ")]
    assert len(errors) == 2
    assert errors[0] == "demo: no such file: missing.jpg"
    assert errors[1].startswith("demo: skipped broken.jpg: cannot read the image broken.jpg")
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == ["single.jpg", "a.JPG", "b.png", "x1.png", "x2.png"]
    assert " segments: class " in lines[0]
    assert re.fullmatch(r".* \[\d+\.\d\d s\]", lines[0])
    assert re.fullmatch(r"Time: [\d.]+ s to load the model, [\d.]+ s a picture, [\d.]+ s in all", lines[5])
    assert lines[6:] == ["Results are in new/out; all of them together: new/out/contact_sheet.png"]
    with Image.open(tmp_path / "new" / "out" / "single.png") as drawn:
        assert drawn.size == (70, 50)
        assert drawn.mode == "RGB"
        assert not np.array_equal(np.asarray(drawn), picture())


def test_unknown_model_file(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    done = process("--input", "a.png", "--output", "out", "--model", "none.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "demo: --model cannot be used: there is no file none.safetensors, and no published model of that name; "
        "`python -m mask2former models` lists those"
    )


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
    options = "--input --video-input --webcam --output --model --config-file --task --confidence-threshold --device"
    for option in options.split():
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
        line = capsys.readouterr().out.splitlines()[0]
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
    assert names(out) == ["alpha.png", SHEET, "deep.png", "grey.png", "tiny.png"]
    assert (out / "grey.png").read_bytes() == (out / "deep.png").read_bytes() == (out / "alpha.png").read_bytes()


def test_stems_that_collide(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = save(tmp_path / "x" / "a.png", 0), save(tmp_path / "y" / "a.jpg", 1)
    third = save(tmp_path / "y" / "a_2.png", 2)
    assert run("--input", first, second, third) == 0
    assert names(tmp_path / "out") == ["a.png", "a_2.png", "a_2_2.png", SHEET]
    out = capsys.readouterr().out
    assert "a.jpg -> a_2.png: " in out
    assert "a_2.png -> a_2_2.png: " in out
    assert len({p.read_bytes() for p in (tmp_path / "out").iterdir()}) == 4


def test_names_that_differ_in_case_only(tmp_path: Path) -> None:
    pictures = [tmp_path / "x" / "a.png", tmp_path / "x" / "A.png"]
    assert [p.name for p in output_paths(FreeNames(tmp_path, pictures), pictures).values()] == ["a.png", "A_2.png"]


def test_inputs_are_never_overwritten(run: Callable[..., int], tmp_path: Path) -> None:
    path, other = save(tmp_path / "a.png"), save(tmp_path / "a.jpg", 1)
    before = path.read_bytes(), other.read_bytes()
    for _ in range(2):
        assert run("--input", path, other, "--output", tmp_path) == 0
        assert (path.read_bytes(), other.read_bytes()) == before
        assert names(tmp_path) == ["a.jpg", "a.png", "a_2.png", "a_3.png", SHEET]


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
    line = capsys.readouterr().out.splitlines()[0]
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
        f"demo: no pictures or videos in the folder {tmp_path / 'empty'}",
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


# ---- one file as output


@pytest.mark.parametrize("name", ["one.png", "new/folder/one.jpg", "one.WEBP"])
def test_one_picture_into_a_file(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run("--input", save(tmp_path / "a.png"), "--output", tmp_path / name) == 0
    with Image.open(tmp_path / name) as drawn:
        assert drawn.format == {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[Path(name).suffix.lower()]
        assert drawn.size == (70, 50)
    assert f"The result is {tmp_path / name}" in capsys.readouterr().out
    assert names((tmp_path / name).parent) == sorted({Path(name).name, "a.png"} if "/" not in name else {"one.jpg"})


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        (["a.png", "b.png"], "x.png", "x.png is one picture, but there are 2 inputs; name a folder"),
        (["a.png", "clip.avi"], "x.mp4", "x.mp4 is one video, but there are 2 inputs; name a folder"),
        (["a.png"], "x.mp4", "x.mp4 is a video, the input is not; name another file, or a folder"),
        (["clip.avi"], "x.png", "x.png is a picture, the input is not; name another file, or a folder"),
        (["a.png"], "a.png", "a.png is the input itself, which is never overwritten"),
        (["clip.avi"], "./clip.avi", "clip.avi is the input itself, which is never overwritten"),
    ],
)
def test_output_files_that_do_not_fit(
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    inputs: list[str],
    output: str,
    message: str,
) -> None:
    save(tmp_path / "a.png"), save(tmp_path / "b.png")
    (tmp_path / "clip.avi").write_bytes(b"never read")
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    assert run("--input", *[tmp_path / name for name in inputs], "--output", tmp_path / output) == 2
    assert message in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_folder_may_be_called_like_a_file(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "results.png").mkdir()
    assert run("--input", save(tmp_path / "a.png"), "--output", tmp_path / "results.png") == 0
    assert names(tmp_path / "results.png") == ["a.png"]


def test_a_file_that_cannot_be_written_leaves_nothing(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    image = save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "replace", refuse)
    assert run("--input", image, "--output", tmp_path / "x.png") == 1
    assert "Read-only file system" in capsys.readouterr().err
    assert names(tmp_path) == ["a.png"]


# ---- contact sheets


def test_sheet_pages_and_names_that_are_taken(tmp_path: Path) -> None:
    (tmp_path / SHEET).write_bytes(b"an input of this name")
    free = FreeNames(tmp_path, [tmp_path / SHEET])
    sheet = ContactSheet("Heading", lambda: free.take("contact_sheet", ".png"), per_page=4)
    for i in range(9):
        sheet.add(np.full((30 + 200 * i, 40, 3), 10 * i, np.uint8), "name " * (1 + 20 * i), "a caption, " * 30)
    pages = sheet.close()
    assert [p.name for p in pages] == ["contact_sheet_2.png", "contact_sheet_3.png", "contact_sheet_4.png"]
    assert names(tmp_path) == sorted([SHEET, *(p.name for p in pages)])
    sizes = []
    for page in pages:
        with Image.open(page) as image:
            image.load()
            sizes.append(image.size)
    assert sizes[0][0] == sizes[1][0] == sizes[2][0]
    assert sizes[1][1] > sizes[2][1]  # two rows and one
    assert (tmp_path / SHEET).read_bytes() == b"an input of this name"


def test_sheet_shows_every_picture_whole(tmp_path: Path) -> None:
    sheet = ContactSheet("Heading", lambda: tmp_path / "s.png")
    colors = [(255, 0, 0), (0, 160, 0), (0, 0, 255)]
    for color, shape in zip(colors, [(100, 100), (30, 300), (900, 90)], strict=True):
        sheet.add(np.full((*shape, 3), color, np.uint8), "ä 図", "")
    with Image.open(sheet.close()[0]) as image:
        page = np.asarray(image)
    for color, ratio in zip(colors, [1, 0.1, 10], strict=True):
        rows, columns = np.nonzero((page == color).all(-1))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # a full rectangle
        assert height / width == pytest.approx(ratio, rel=0.05)


def test_one_picture_needs_no_sheet(tmp_path: Path) -> None:
    sheet = ContactSheet("Heading", lambda: tmp_path / "s.png")
    sheet.add(picture(), "a", "b")
    assert sheet.close() == []
    assert names(tmp_path) == []


def test_sheet_that_cannot_be_written(tmp_path: Path) -> None:
    sheet = ContactSheet("Heading", lambda: tmp_path / "none" / "s.png")
    sheet.add(picture(), "a", "b")
    sheet.add(picture(), "a", "b")
    with pytest.raises(CommandError, match=r"cannot write the contact sheet .*s\.png: No such file"):
        sheet.close()


# ---- bundled models


def test_the_default_model_says_which_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--input", str(save(tmp_path / "a.png")), "--output", str(tmp_path / "out")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Model: panoptic, bundled (demo/models/panoptic.safetensors): the 133 COCO classes")
    assert "26 photos" in first


def test_a_bundled_model_whose_file_is_missing(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models" / "nuclei.safetensors"
    monkeypatch.setitem(demo_models.BUNDLED, "nuclei", demo_models.BundledModel(file, "nuclei"))
    assert run("--input", save(tmp_path / "a.png"), "--model", "nuclei") == 2
    assert f"--model nuclei: this copy of the repository lacks its file {file}" in capsys.readouterr().err


def test_a_name_that_is_no_model(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--input", save(tmp_path / "a.png"), "--model", "nonsense") == 2
    error = capsys.readouterr().err
    assert "--model cannot be used: there is no file nonsense" in error
    assert error.endswith("; bundled are panoptic and nuclei\n")


# ---- videos and cameras


def shapes(count: int = 6) -> list[np.ndarray]:
    """A bright square that moves over a picture, (48, 64, 3) each."""
    frames = [picture(48, 64) // 2 for _ in range(count)]
    for i, frame in enumerate(frames):
        frame[10:26, 4 + 5 * i : 20 + 5 * i] = (250, 220, 60)
    return frames


def save_video(path: Path, count: int = 6, fps: float = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps, (48, 64)) as writer:
        for frame in shapes(count):
            writer.write(frame)
    return path


def read_frames(path: Path) -> tuple[float, list[np.ndarray]]:
    with read_video(path) as reader:
        return reader.fps, list(reader)


class FakeCamera:
    """What `cv2.VideoCapture` gives for a camera that is unplugged after some frames."""

    def __init__(self, frames: list[np.ndarray]) -> None:
        self.frames, self.is_released = list(frames), False

    def isOpened(self) -> bool:  # noqa: N802
        return True

    def get(self, _: int) -> float:
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        return (True, self.frames.pop(0)) if self.frames else (False, None)

    def release(self) -> None:
        self.is_released = True


@pytest.fixture
def camera(monkeypatch: pytest.MonkeyPatch) -> FakeCamera:
    """In the place of camera 3."""
    fake, real = FakeCamera(shapes()), cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: fake if source == 3 else real(source))
    return fake


def test_videos_and_pictures_together(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "in" / "a.png")
    save_video(tmp_path / "in" / "clip.avi")
    assert run("--input", tmp_path / "in", "--task", "instance", "--confidence-threshold", "0.3") == 0
    out = capsys.readouterr().out
    assert names(tmp_path / "out") == ["a.png", "clip.mp4"]
    assert re.search(r"^clip.avi -> clip.mp4: 6 frames, \d+\.\d frames a second$", out, re.M)
    fps, frames = read_frames(tmp_path / "out" / "clip.mp4")
    assert (fps, len(frames)) == (10, 6)
    assert np.abs(frames[0].astype(int) - shapes()[0]).mean() > 3  # something is drawn


@pytest.mark.parametrize("option", ["--input", "--video-input"])
def test_a_video_into_a_file_of_any_kind(run: Callable[..., int], tmp_path: Path, option: str) -> None:
    clip = save_video(tmp_path / "clip.mp4")
    assert run(option, clip, "--output", tmp_path / "result.avi", "--task", "semantic") == 0
    assert len(read_frames(tmp_path / "result.avi")[1]) == 6
    if option == "--video-input":
        odd = clip.rename(tmp_path / "recording.0001")
        assert run(option, odd, "--output", tmp_path / "result.mp4", "--task", "semantic") == 0
        assert len(read_frames(tmp_path / "result.mp4")[1]) == 6


@pytest.mark.parametrize(("task", "threshold"), [("panoptic", None), ("panoptic", 0.6), ("instance", 0.3)])
def test_videos_are_tracked(
    run: Callable[..., int],
    tmp_path: Path,
    model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: Literal["panoptic", "instance"],
    threshold: float | None,
) -> None:
    """Every frame goes through one tracker, and is drawn as tracked."""
    drawn, real = [], Visualizer.draw_panoptic

    def draw(self: Visualizer, *arguments: object, **more: object) -> np.ndarray:
        drawn.append(real(self, *arguments, **more))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(Visualizer, "draw_panoptic", draw)
    more = [] if threshold is None else ["--confidence-threshold", threshold]
    assert run("--video-input", save_video(tmp_path / "clip.mp4"), "--task", task, *more) == 0
    assert len(read_frames(tmp_path / "out" / "clip.mp4")[1]) == 6
    track = VideoSegmenter(predictor_module.Predictor.from_file(model_file), task=task, threshold=threshold)
    visualizer = Visualizer(categories())
    for frame, drawing in zip(read_frames(tmp_path / "clip.mp4")[1], drawn, strict=True):
        result = track(frame)
        assert result.segments
        np.testing.assert_array_equal(
            drawing, real(visualizer, frame, result.ids, result.segments, tracked=True)
        )


def test_a_truncated_video(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = save_video(tmp_path / "clip.avi", count=60)
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) * 3 // 4])
    assert run("--input", clip, "--task", "semantic") == 1
    captured = capsys.readouterr()
    count = len(read_frames(tmp_path / "out" / "clip.mp4")[1])
    assert 5 < count < 50
    assert f"clip.avi breaks off after {count} of 60 frames" in captured.err
    assert f"; {tmp_path / 'out' / 'clip.mp4'} has the frames before" in captured.err


@pytest.mark.parametrize("content", [b"", b"junk" * 500])
def test_a_file_that_is_no_video(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    assert run("--input", tmp_path / "clip.mp4", save(tmp_path / "a.png")) == 1
    assert f"demo: skipped {tmp_path / 'clip.mp4'}: " in capsys.readouterr().err
    assert names(tmp_path / "out") == ["a.png"]
    assert run("--video-input", tmp_path / "none.mp4") == 1
    assert f"no such file: {tmp_path / 'none.mp4'}" in capsys.readouterr().err


def test_an_interrupted_video_is_complete_until_then(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], Visualizer.draw_semantic

    def interrupt_fourth(self: Visualizer, *arguments: object, **more: object) -> np.ndarray:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Visualizer, "draw_semantic", interrupt_fourth)
    assert run("--input", save_video(tmp_path / "clip.mp4"), "--task", "semantic") == 130
    assert len(read_frames(tmp_path / "out" / "clip.mp4")[1]) == 3
    captured = capsys.readouterr()
    assert "clip.mp4: 3 frames" in captured.out
    assert "demo: interrupted" in captured.err


def test_a_camera_that_is_not_there(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--webcam", "97") == 2
    assert "demo: --webcam cannot be used: camera 97 cannot be opened" in capsys.readouterr().err
    assert names(tmp_path / "out") == []


def test_a_camera_is_recorded_and_no_recording_lost(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], camera: FakeCamera
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "webcam.mp4").write_bytes(b"of yesterday")
    assert run("--webcam", "3", "--task", "semantic") == 1  # it was unplugged
    captured = capsys.readouterr()
    assert "camera 3 -> webcam_2.mp4: 6 frames" in captured.out
    assert "camera 3 gives no more frames" in captured.err
    assert read_frames(tmp_path / "out" / "webcam_2.mp4")[1]  # how many, the next test says: it depends on the clock
    assert (tmp_path / "out" / "webcam.mp4").read_bytes() == b"of yesterday"
    assert camera.is_released


def test_a_recording_has_the_speed_of_life(tmp_path: Path, model_file: Path, camera: FakeCamera) -> None:
    """0.1 seconds a frame are three of the camera's thirty frames a second."""
    segmenter = demo_models.Segmenter(predictor_module.Predictor.from_file(model_file), "tiny", "semantic", None)
    seconds = iter(range(10**6))
    now = [0.0]

    def clock() -> float:
        return now[0]

    def read() -> tuple[bool, np.ndarray | None]:
        now[0] += 0.1 if next(seconds) else 0.0
        return FakeCamera.read(camera)

    camera.read = read  # type: ignore[method-assign]
    demo_video.video_to_file(segmenter, 3, tmp_path / "w.mp4", clock)
    assert len(read_frames(tmp_path / "w.mp4")[1]) == 1 + 3 * 5


def test_frame_rate() -> None:
    times = iter([0.0, *(float(t) for t in range(1, 41)), 50.0])
    rate = FrameRate(lambda: next(times))
    for _ in range(40):
        rate.tick()
    assert (rate.frames, rate.mean, rate.recent, rate.elapsed) == (40, 1.0, 1.0, 50.0)


# ---- the window


class FakeGui:
    """OpenCV's functions for windows; the keys are pressed one after the other, then none."""

    def __init__(self, keys: Sequence[int] = (), visible: int = 10**6) -> None:
        self.keys, self.visible = list(keys), visible
        self.shown: list[np.ndarray] = []
        self.titles: list[str] = []
        self.sizes: list[tuple[int, int]] = []
        self.waits: list[int] = []
        self.is_open = False

    def namedWindow(self, name: str, flags: int) -> None:  # noqa: N802
        assert flags == cv2.WINDOW_NORMAL
        self.is_open = True

    def resizeWindow(self, name: str, width: int, height: int) -> None:  # noqa: N802
        self.sizes.append((width, height))

    def setWindowTitle(self, name: str, title: str) -> None:  # noqa: N802
        self.titles.append(title)

    def imshow(self, name: str, pixels: np.ndarray) -> None:
        self.shown.append(pixels.copy())

    def waitKey(self, milliseconds: int) -> int:  # noqa: N802
        assert milliseconds >= 1  # 0 would wait for ever
        self.waits.append(milliseconds)
        return self.keys.pop(0) if self.keys else -1

    def getWindowProperty(self, name: str, number: int) -> float:  # noqa: N802
        assert number == cv2.WND_PROP_VISIBLE
        self.visible -= 1
        return float(self.visible >= 0)

    def destroyAllWindows(self) -> None:  # noqa: N802
        self.is_open = False


def test_pictures_in_a_window(tmp_path: Path, model_file: Path) -> None:
    inputs = [str(save(tmp_path / f"{i}.png", i)) for i in range(3)]
    gui = FakeGui(keys=[-1, -1, ord("x"), -1, 13, 27])
    assert demo.main(["--model", str(model_file), "--input", *inputs], gui=gui) == 0
    assert len(gui.shown) == 3
    assert [title.split(":")[0] for title in gui.titles] == ["0.png", "1.png", "2.png"]
    assert gui.sizes == [(70, 50)]
    assert not gui.is_open
    predictor = predictor_module.Predictor.from_file(model_file)
    expected = predictor.draw(picture(), predictor(picture(), "panoptic"))
    np.testing.assert_array_equal(gui.shown[0], expected[..., ::-1])  # OpenCV shows BGR


@pytest.mark.parametrize(("keys", "visible"), [([27], 9), ([ord("q")], 9), ([ord("Q") + 0x100000], 9), ([], 0)])
def test_closing_the_window_ends_the_program(
    tmp_path: Path, model_file: Path, keys: list[int], visible: int
) -> None:
    inputs = [str(save(tmp_path / f"{i}.png", i)) for i in range(3)]
    gui = FakeGui(keys, visible)
    assert demo.main(["--model", str(model_file), "--input", *inputs], gui=gui) == 0
    assert len(gui.shown) == 1
    assert not gui.is_open


def test_a_video_in_a_window(tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = save_video(tmp_path / "clip.mp4", fps=0.5)
    gui = FakeGui(keys=[-1, -1, -1, ord("q")])
    assert demo.main(["--model", str(model_file), "--video-input", str(clip)], gui=gui) == 0
    assert len(gui.shown) == 4
    assert re.fullmatch(r".*clip.mp4 - \d+\.\d frames a second", gui.titles[-1])
    assert gui.waits[0] > 1000  # two seconds a frame
    assert re.search(r"^clip.mp4: \d frames, ", capsys.readouterr().out, re.M)


def test_a_camera_in_a_window(model_file: Path, camera: FakeCamera) -> None:
    gui = FakeGui()
    words = ["--model", str(model_file), "--webcam", "3", "--task", "semantic"]
    assert demo.main(words, gui=gui) == 1
    assert len(gui.shown) == 6
    assert set(gui.waits) == {1}


def test_large_pictures_get_a_smaller_window() -> None:
    gui = FakeGui()
    window = demo_window.Window(gui)
    window.show(np.zeros((8000, 4000, 3), np.uint8), "large", 1)
    window.show(np.zeros((1, 4000, 3), np.uint8), "wide", 1)
    assert gui.sizes == [(400, 800), (1280, 1)]


def test_no_display(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    image = str(save(tmp_path / "a.png"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert demo.main(["--input", image]) == 2
    assert capsys.readouterr().err == (
        "demo: there is no display to show results on; name a folder for them: --output DIR\n"
    )
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "\n  GUI:                           NONE\n\n")
    assert demo.main(["--input", image]) == 2
    assert "pip uninstall opencv-python-headless, then pip install opencv-python" in capsys.readouterr().err
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: "\n  GUI:                           QT5\n\n")
    assert demo_window.system_gui() is cv2


def test_opencv_that_finds_out_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(FakeGui):
        def namedWindow(self, name: str, flags: int) -> None:  # noqa: N802
            raise cv2.error("The function is not implemented")

    assert demo.main(["--input", str(save(tmp_path / "a.png"))], gui=Broken()) == 2
    assert "OpenCV cannot open a window (The function is not implemented)" in capsys.readouterr().err


# ---- the sample pictures


def test_sample_pictures_have_credits_and_are_small() -> None:
    import csv

    folder = DEMO / "pictures"
    with (folder / "CREDITS.csv").open(newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    found, problems = find_inputs([str(folder), str(folder / "microscope")])
    assert not problems
    assert {str(p.relative_to(folder)) for p in found} == rows.keys()
    assert len(found) == 12
    assert sum(p.stat().st_size for p in found) < 2_500_000
    assert all(row["licence"] and row["source"].startswith("https://") for row in rows.values())


def test_sample_photos_are_those_the_panoptic_model_learned() -> None:
    train = {p.read_bytes() for p in (DEMO.parent / "datasets/sample/train2017").iterdir()}
    assert all(p.read_bytes() in train for p in (DEMO / "pictures").glob("*.jpg"))
