"""Reading windows of files, and what is written: complete, in bounded memory, or not at all."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mask2former.tiling import segment_large
from mask2former.tiling.grid import Window
from mask2former.tiling.maps import BLOCK, ArrayMap, RowBuffer
from mask2former.tiling.runs import coco_counts, joined, runs_of
from tests.tiling.painted import (
    CAR,
    CATEGORIES,
    CELL,
    GRASS,
    ForgetfulPredictor,
    PaintedPredictor,
    canvas,
    scene,
)

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"tile": 50, "overlap": 10}


@pytest.fixture
def rasterio():
    return pytest.importorskip("rasterio", reason="rasterio is not installed (requirements-large.txt)")


def _write_tiff(rasterio, path, picture, **profile):
    from rasterio.transform import from_origin

    height, width, count = picture.shape
    profile = {"crs": "EPSG:32632", "transform": from_origin(500_000, 5_000_000, 0.5, 0.5), **profile}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype=picture.dtype.name, **profile
    ) as file:
        file.write(picture.transpose(2, 0, 1))
    return path


def _read(rasterio, path):
    with rasterio.open(path) as file:
        assert file.count == 1
        return file.read(1), file.crs, file.transform, file.profile


def test_panoptic_of_a_file(rasterio, tmp_path):
    source = _write_tiff(rasterio, tmp_path / "in.tif", scene(), tiled=True, blockxsize=32, blockysize=32)
    whole = segment_large(PaintedPredictor(), scene(), **OPTIONS)
    result = segment_large(PaintedPredictor(), source, output=tmp_path / "out.tif", **OPTIONS)
    assert result.ids is None
    assert result.segments == whole.segments
    ids, crs, transform, profile = _read(rasterio, tmp_path / "out.tif")
    assert np.array_equal(ids, whole.ids)
    assert (profile["tiled"], profile["compress"], ids.dtype) == (True, "deflate", np.uint32)
    assert crs.to_epsg() == 32632
    assert (transform.a, transform.c, transform.f) == (0.5, 500_000, 5_000_000)
    document = json.loads((tmp_path / "out.json").read_text("utf-8"))
    assert document["images"] == [{"id": 1, "file_name": "in.tif", "height": 120, "width": 150}]
    assert [entry["id"] for entry in document["categories"]] == [7, 9, 21, 22]
    (annotation,) = document["annotations"]
    assert annotation["file_name"] == "out.tif"
    infos = annotation["segments_info"]
    assert [info["id"] for info in infos] == [segment.id for segment in whole.segments]
    for info, segment in zip(infos, whole.segments, strict=True):
        x0, y0, x1, y1 = segment.box
        assert info["bbox"] == [x0, y0, x1 - x0, y1 - y0]
        assert info["category_id"] == CATEGORIES[segment.category_id].id
        assert info["area"] == int((ids == info["id"]).sum())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.tif", "out.json", "out.tif"]


def test_semantic_of_a_16_bit_file_without_georeference(rasterio, tmp_path, recwarn):
    picture = scene().astype(np.uint16)
    picture = np.concatenate([picture[..., 2:], picture[..., :2]], axis=2)  # nothing, class, object
    source = _write_tiff(rasterio, tmp_path / "in.tif", picture, crs=None, transform=None)
    recwarn.clear()  # those of writing it
    segment_large(PaintedPredictor(), source, "semantic", output=tmp_path / "out.tif", bands=(2, 3, 1), **OPTIONS)
    assert not [w for w in recwarn if "geotransform" in str(w.message)]
    labels, crs, transform, _ = _read(rasterio, tmp_path / "out.tif")
    assert np.array_equal(labels, PaintedPredictor()(scene(), "semantic").labels)
    assert labels.dtype == np.uint8
    assert crs is None
    assert transform.is_identity
    document = json.loads((tmp_path / "out.json").read_text("utf-8"))
    areas = {entry["name"]: (entry["label"], entry["area"]) for entry in document["labels"]}
    assert areas["grass"] == (3, int((labels == 3).sum()))
    assert len(areas) == 4


def test_instances_to_a_coco_file(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    whole = segment_large(PaintedPredictor(), scene(), "instance", **OPTIONS)
    result = segment_large(PaintedPredictor(), scene(), "instance", output=tmp_path / "out.json", **OPTIONS)
    assert result.instances is None
    assert result.count == len(whole.instances)
    annotations = coco.COCO(tmp_path / "out.json")
    found = {}
    for annotation in annotations.loadAnns(annotations.getAnnIds()):
        mask = annotations.annToMask(annotation)
        assert annotation["area"] == mask.sum()
        found[annotation["segmentation"]["counts"]] = annotation["category_id"]
    assert found == {i.counts: CATEGORIES[i.category_id].id for i in whole.instances}
    assert annotations.loadCats([9])[0]["name"] == "car"


def test_a_file_without_instances(tmp_path):
    result = segment_large(PaintedPredictor(), canvas(20, 20), "instance", output=tmp_path / "out.json")
    assert result.count == 0
    assert json.loads((tmp_path / "out.json").read_text("utf-8"))["annotations"] == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_an_interruption_leaves_the_old_files(task, error, tmp_path, request):
    if task != "instance":
        request.getfixturevalue("rasterio")
    output = tmp_path / ("out.json" if task == "instance" else "out.tif")
    output.write_text("old")

    def stop(done, count):
        if done == 5:
            raise error

    with pytest.raises(error):
        segment_large(PaintedPredictor(), scene(), task, output=output, progress=stop, **OPTIONS)
    assert output.read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("task", "output", "message"),
    [
        ("panoptic", "out.png", "output must end with .tif or .tiff for the panoptic task"),
        ("instance", "out.tif", "output must end with .json for the instance task"),
    ],
)
def test_outputs_of_other_kinds_are_refused(task, output, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        segment_large(PaintedPredictor(), scene(), task, output=tmp_path / output)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        segment_large(PaintedPredictor(), scene(), output=tmp_path / "nowhere" / "out.tif")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        segment_large(PaintedPredictor(), tmp_path / "in.tif")


def test_a_file_that_is_no_raster_is_named(rasterio, tmp_path):
    (tmp_path / "in.tif").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read the raster"):
        segment_large(PaintedPredictor(), tmp_path / "in.tif")


def test_without_rasterio_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (tmp_path / "in.tif").write_text("a picture")
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        segment_large(PaintedPredictor(), tmp_path / "in.tif")


# ------------------------------------------------------------------------------------------------ the command



def _tile_command(monkeypatch, *arguments, predictor=None):
    from types import SimpleNamespace

    import mask2former
    from mask2former.__main__ import main

    painted = predictor or PaintedPredictor()
    painted.settings = SimpleNamespace(tasks=("panoptic", "instance"))
    monkeypatch.setattr(mask2former, "load", lambda name, device: painted)
    code = main(["tile", "--model", "m.safetensors", *map(str, arguments)])
    return code, painted


def test_command(rasterio, tmp_path, monkeypatch, capsys):
    source, output = _write_tiff(rasterio, tmp_path / "in.tif", scene()), tmp_path / "out.tif"
    sizes = ("--tile", 50, "--overlap", 10)
    code, painted = _tile_command(monkeypatch, "--input", source, "--output", output, *sizes)
    assert code == 0
    assert painted.thresholds[0] is None
    whole = segment_large(PaintedPredictor(), scene(), **OPTIONS)
    assert capsys.readouterr().out == f"{output}: {len(whole.segments)} segments\n"
    assert np.array_equal(_read(rasterio, output)[0], whole.ids)
    code, painted = _tile_command(
        monkeypatch, "--input", source, "--output", tmp_path / "i.json", "--task", "instance", *sizes
    )
    assert code == 0
    assert painted.thresholds[0] == 0.5
    assert capsys.readouterr().out.endswith(" instances\n")


def test_command_names_a_missing_model(tmp_path, capsys):
    from mask2former.__main__ import main

    model, files = str(tmp_path / "m.safetensors"), ["--input", "in.tif", "--output", "out.tif"]
    assert main(["tile", "--model", model, *files]) == 2
    assert capsys.readouterr().err.startswith(f"error: there is no file {model}")


def test_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    code, _ = _tile_command(monkeypatch, "--input", tmp_path / "in.tif", "--output", tmp_path / "out.tif")
    assert code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: there is no file {tmp_path / 'in.tif'}"


def test_command_can_be_interrupted(rasterio, tmp_path, monkeypatch, capsys):
    class Interrupted(PaintedPredictor):
        def __call__(self, *arguments, **options):
            raise KeyboardInterrupt

    source = _write_tiff(rasterio, tmp_path / "in.tif", scene())
    arguments = ("--input", source, "--output", tmp_path / "out.tif")
    assert _tile_command(monkeypatch, *arguments, predictor=Interrupted())[0] == 130
    assert capsys.readouterr().err.endswith("interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == [source]


# ------------------------------------------------------------------------------------------------ parts


def test_run_lengths_are_cocos():
    mask_tools = pytest.importorskip("pycocotools.mask")
    random = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        mask = random.random((40, 70)) < share
        mask[:20, 10:60] = mask.any()  # long runs have several characters
        parts = [
            runs_of(mask[y : y + 13, x : x + 9], y, x, 40) for y in range(0, 40, 13) for x in range(0, 70, 9)
        ]
        expected = mask_tools.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert coco_counts(joined(parts), mask.size) == expected


def test_rows_are_written_in_whole_blocks():
    class Recorder(ArrayMap):
        def write(self, top, rows):
            written.append((top, len(rows)))
            super().write(top, rows)

    written, pixels = [], np.random.default_rng(0).integers(0, 9, (700, 8), np.uint8)
    target = Recorder((700, 8), np.uint8)
    buffer = RowBuffer(target, 8, np.uint8)
    for top in range(0, 700, 100):
        for left in (0, 3):
            window = Window(top, left, 100, 3 if left == 0 else 5)
            buffer.put(window, pixels[window.slices])
        buffer.flush()
    buffer.flush(all_rows=True)
    assert written == [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, 700 - 2 * BLOCK)]
    assert np.array_equal(target.array, pixels)


class _Repeated:
    """A raster of any size that is made where it is read: every 128 pixels a cell, and cars from top to bottom."""

    def __init__(self, height, width):
        self.shape = (height, width, 3)

    def read(self, window):
        y, x = (np.arange(start, start + length) for start, length in (window[::2], window[1::2]))
        y = y[:, None]
        is_car = (x % 128 >= 70) & (x % 128 < 80) & (y >= 0)
        is_cell = (x % 128 >= 20) & (x % 128 < 60) & (y % 128 >= 10) & (y % 128 < 50)
        picture = canvas(window.height, window.width, GRASS)
        picture[is_car, 0], picture[is_cell, 0] = 1 + CAR, 1 + CELL
        picture[..., 1] = np.where(is_car, 0, y // 128 % 15 * 15) + x // 128 % 15  # those of a tile differ
        return picture


def _extra_bytes(height, task, output):
    tracemalloc.start()
    result = segment_large(ForgetfulPredictor(), _Repeated(height, 512), task, output=output, tile=256, overlap=32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return result, peak


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_memory_does_not_grow_with_the_raster(task, tmp_path, request):
    """Ten times as high. There are ten times as many cells; they may take a few hundred bytes each."""
    if task != "instance":
        request.getfixturevalue("rasterio")
    output = tmp_path / ("out.json" if task == "instance" else "out.tif")
    _extra_bytes(300, task, output)  # what is imported on first use
    small = _extra_bytes(600, task, output)[1]
    result, large = _extra_bytes(6000, task, output)
    assert large < small + 400_000  # the map alone has 3 million pixels
    if task == "panoptic":
        assert len(result.segments) == 1 + 47 * 4 + 4
    if task == "instance":
        assert result.count == 47 * 4 + 4


HUGE = """
import sys
from pathlib import Path
from tests.tiling.painted import ForgetfulPredictor
from tests.tiling.test_files import _Repeated
from mask2former.tiling import segment_large

def megabytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1000

output, task = sys.argv[1:]
segment_large(ForgetfulPredictor(), _Repeated(300, 300), task, output=output, tile=256)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = megabytes("VmRSS")
segment_large(ForgetfulPredictor(), _Repeated(20_000, 20_000), task, output=output, tile=1024)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_memory_of_a_raster_of_400_million_pixels(rasterio, task, tmp_path):
    """It has 1200 MB, and its ids 1600 MB; a row of tiles of ids has 80 MB, and GDAL may keep 64 MB."""
    command = [sys.executable, "-c", HUGE, str(tmp_path / "out.tif"), task]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400
