"""`data config`: each rule in closed form, and configs that both engines read and one trains."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from mask2former.__main__ import main
from mask2former.own_data import choices
from mask2former.own_data.findings import ImageScan, ObjectSize
from mask2former.own_data.recipes import CPU, GPU, RECIPES
from tests.own_data.changes import annotation
from tests.own_data.small import KINDS
from tests.own_data.test_commands import flags

ROOT = Path(__file__).parents[2]
# Round numbers, so that the rules can be done by hand whatever the recipes are.
RECIPE = replace(
    CPU,
    learning_rate=1.6e-3,
    images_per_process=4,
    object_side_px=30.0,
    shortest_side_px=400,
    largest_side_px=512,
    train_scales=(0.5, 1.0, 2.0),
    crop_px=256,
    min_queries=20,
    max_queries=100,
    epochs=10,
    min_images_seen=1000,
    evaluations=4,
)


def scan(size, *objects):
    return ImageScan(file="x", size=size, objects=[ObjectSize(0, *each) for each in objects])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))


# ---- scale


def test_large_objects_leave_the_images_at_their_size():
    scans = [scan((300, 500), (10_000, 100, 100))] * 3 + [scan((360, 480), (10_000, 100, 100))]
    assert choices.test_side(scans, [True], RECIPE) == 300  # the median


def test_large_images_are_reduced():
    scans = [scan((900, 1200), (90_000, 300, 300))]
    assert choices.test_side(scans, [True], RECIPE) == 400


def test_small_objects_enlarge_the_images():
    # a side of 20 in 256 must become 30: 384, which is a multiple of 32
    assert choices.test_side([scan((256, 300), (400, 20, 20))], [True], RECIPE) == 384
    # a side of 21 in 256: 365.7, nearest multiple of 32 is 352
    assert choices.test_side([scan((256, 300), (441, 21, 21))], [True], RECIPE) == 352
    # a side of 4 would need 1920
    assert choices.test_side([scan((256, 300), (16, 4, 4))], [True], RECIPE) == 512


def test_the_median_is_over_images_not_objects():
    few = [scan((256, 256), (10_000, 100, 100))] * 2
    many = [scan((256, 256), *[(400, 20, 20)] * 50)]
    assert choices.test_side(few + many, [True], RECIPE) == 256
    assert choices.test_side(few + many * 3, [True], RECIPE) == 384


def test_label_maps_and_images_without_objects_keep_their_size():
    assert choices.test_side([scan((256, 300), (16, 4, 4))], [False], RECIPE) == 256
    assert choices.test_side([scan((256, 300)), ImageScan(file="broken")], [True], RECIPE) == 256


def test_sides_in_training_and_the_crop():
    assert choices.train_sides(350, RECIPE) == [175, 350, 700]
    assert choices.crop_side(384, RECIPE) == 256
    assert choices.crop_side(200, RECIPE) == 224
    assert choices.crop_side(10, RECIPE) == 32


# ---- queries


def test_objects_in_a_crop_by_counting_all_positions():
    """The rule is the mean over all positions of a crop of the objects that it touches, away from the edges."""
    height, width, crop, (top, left, h, w) = 60, 80, 20, (25, 30, 6, 9)
    positions = [(y, x) for y in range(-crop, height) for x in range(-crop, width)]
    touched = sum(y < top + h and top < y + crop and x < left + w and left < x + crop for y, x in positions)
    item = scan((height, width), (h * w, h, w))
    expected = (crop + h) / height * (crop + w) / width
    assert choices.objects_in_crop(item, 60, crop) == pytest.approx(expected)
    assert touched == (crop + h - 1) * (crop + w - 1)  # whole pixels, of height * width positions


def test_a_crop_as_large_as_the_image_shows_all_objects():
    item = scan((50, 100), *[(4, 2, 2)] * 7)
    assert choices.objects_in_crop(item, 50, 100) == 7
    assert choices.objects_in_crop(item, 100, 100) == pytest.approx(7 * (100 + 4) / 200)  # scale 2: 100 x 200


def test_queries_follow_the_larger_of_image_and_crop():
    many = scan((512, 512), *[(100, 10, 10)] * 64)
    # at scale 1 a crop of 256 touches 64 * (266 / 512)**2 = 17.3; twice that is less than the 64 of the image
    assert choices.num_queries([many], 512, 256, RECIPE) == 70
    few = scan((256, 256), *[(100, 10, 10)] * 12)
    assert choices.num_queries([few], 256, 256, RECIPE) == 30  # twice the 12 that each crop shows, rounded up


def test_queries_stay_within_the_bounds_and_ignore_the_densest_images():
    assert choices.num_queries([scan((64, 64))], 64, 64, RECIPE) == 20
    assert choices.num_queries([scan((64, 64), *[(4, 2, 2)] * 300)], 64, 64, RECIPE) == 100
    images = [scan((64, 64), *[(4, 2, 2)] * 11)] * 99 + [scan((64, 64), *[(4, 2, 2)] * 300)]
    assert choices.num_queries(images, 64, 64, RECIPE) == 30
    assert choices.num_queries([ImageScan(file="broken")], 64, 64, RECIPE) == 20


# ---- schedule


@pytest.mark.parametrize(
    ("processes", "batch", "rate"),
    [(1, 4, 4e-4), (2, 8, 8e-4), (3, 12, 1.2e-3), (4, 16, 1.6e-3), (5, 15, 1.5e-3), (8, 16, 1.6e-3), (32, 32, 3.2e-3)],
)
def test_the_learning_rate_is_scaled_from_batch_16(processes, batch, rate):
    plan = choices.schedule(100, processes, RECIPE)
    assert plan.batch == batch
    assert plan.learning_rate == pytest.approx(rate)
    assert plan.batch % processes == 0


def test_the_published_rate_at_the_published_batch():
    assert choices.schedule(118_287, 8, GPU).learning_rate == pytest.approx(1e-4)
    assert choices.schedule(118_287, 8, GPU).batch == 16


def test_iterations_by_epochs_or_by_images_in_all():
    assert choices.schedule(500, 1, RECIPE).iterations == 1250  # 10 epochs of 500 at 4
    assert choices.schedule(501, 1, RECIPE).iterations == 1253  # 1252.5
    assert choices.schedule(50, 1, RECIPE).iterations == 250  # 1000 images
    assert choices.schedule(50, 1, RECIPE).period == 63
    assert choices.schedule(50, 1, RECIPE, iterations=10) == choices.Schedule(
        batch=4, learning_rate=pytest.approx(4e-4), iterations=10, period=3
    )


def test_iterations_in_a_time_limit():
    assert choices.iterations_in(10, 0.5, 40) == 1000  # 540 seconds, less 40
    assert choices.iterations_in(0.01, 5, 40) == 1


# ---- the file


def write(tmp_path, source, *words, name="mine.yaml", val=True):
    file = tmp_path / name
    data = ["--train", *flags(source), *(["--val", *flags(source)] if val else [])]
    return main(["data", "config", "--to", str(file), *words, *data]), file


CLASSES = {"instance": 2, "object_masks": 2, "panoptic": 3, "semantic": 3}


@pytest.mark.parametrize("device", RECIPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_config_describes_the_data(kind, device, tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed, see requirements-train.txt")
    from mask2former import config
    from mask2former.engine.config import get_config

    name = f"{kind}_{device}.yaml"
    code, file = write(tmp_path, KINDS[kind](tmp_path / "data"), "--device", device, name=name)
    assert code == 0
    cfg = get_config(file)
    names = (f"{kind}_{device}_train", f"{kind}_{device}_val")
    described = (cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.DEVICE, *cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    assert described == (CLASSES[kind], device, *names)
    results = config.inference_arguments(cfg)
    on = [task for task in ("semantic", "instance", "panoptic") if results[f"{task}_on"]]
    task = "instance" if kind == "object_masks" else kind
    assert on == [task]
    recipe, mapper = RECIPES[device], config.mapper_arguments(cfg)
    assert mapper["source"] == task
    side = 48
    if kind != "semantic":  # median of the images' medians: in a of 8.94 and 17.89, in b 12, in c 34.6
        side = max(round(recipe.object_side_px / (13.417 / 48) / 32) * 32, 48)
    crop = math.ceil(side / 32) * 32
    assert config.test_resize_arguments(cfg) == {"shortest": side, "longest": 4 * side}
    assert mapper["augmentation"]["crop_size"] == [crop, crop]
    assert mapper["size_divisibility"] == crop
    assert mapper["augmentation"]["min_sizes"] == [round(side * scale) for scale in recipe.train_scales]
    assert config.transformer_decoder_arguments(cfg)["num_queries"] == recipe.min_queries
    batch = min(recipe.images_per_process, 16)
    iterations = math.ceil(max(recipe.epochs * 3, recipe.min_images_seen) / batch)
    schedule = (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER)
    assert schedule == (batch, pytest.approx(recipe.learning_rate * batch / 16), iterations)
    config.architecture_arguments(cfg)
    config.schedule_arguments(cfg)


@pytest.mark.parametrize("kind", KINDS)
def test_the_config_trains(kind, tmp_path):
    pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed, see requirements-train.txt")
    from mask2former.engine.config import get_config
    from mask2former.engine.launch import train_or_evaluate

    name = f"trained_{kind}.yaml"
    _, file = write(tmp_path, KINDS[kind](tmp_path / "data"), "--device", "cpu", name=name)
    few = ["SOLVER.MAX_ITER", "1", "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1"]
    results = train_or_evaluate(get_config(file, [*few, "OUTPUT_DIR", str(tmp_path / "output")]))
    assert {"instance": "segm", "object_masks": "segm", "panoptic": "panoptic_seg"}.get(kind, "sem_seg") in results


def test_the_ignored_label_goes_into_training_too(tmp_path):
    pytest.importorskip("yaml", reason="PyYAML is not installed, see requirements-train.txt")
    from mask2former.engine.config import get_config

    source = replace(KINDS["semantic"](tmp_path), ignore_label=7, classes=("a", "b", "c", *map(str, range(300))))
    code, file = write(tmp_path, source, "--device", "cpu", name="ignored.yaml")
    assert code == 0
    assert get_config(file).MODEL.SEM_SEG_HEAD.IGNORE_VALUE == 7


def test_a_time_limit_decides_the_number_of_iterations(tmp_path):
    source = KINDS["semantic"](tmp_path)
    _, file = write(tmp_path, source, "--device", "cpu", "--budget-minutes", "2", "--seconds-per-iteration", "0.5")
    test_seconds = 3 * CPU.seconds_per_test_image
    assert f"MAX_ITER: {int((108 - test_seconds) / 0.5)} " in file.read_text()
    seconds = CPU.seconds_per_iteration + CPU.seconds_per_megapixel * 4 * 64 * 64 / 1e6
    _, file = write(tmp_path, source, "--device", "cpu", "--budget-minutes", "2", name="other.yaml")
    assert f"MAX_ITER: {int((108 - test_seconds) / seconds)} " in file.read_text()


def test_gpus_and_weights(tmp_path, capsys):
    source = KINDS["instance"](tmp_path)
    _, file = write(tmp_path, source, "--device", "cuda", "--gpus", "4", "--weights", "model.pth", val=False)
    text = file.read_text()
    for line in ("IMS_PER_BATCH: 16", "BASE_LR: 0.0001  #", "WEIGHTS: model.pth", "EVAL_PERIOD: 0", "TEST: []"):
        assert line in text
    assert f"train_net.py --config-file {file} --num-gpus 4" in capsys.readouterr().out


def test_a_base_is_named_from_where_the_file_lies(tmp_path):
    source = KINDS["instance"](tmp_path / "data")
    (tmp_path / "checkout/configs/quick_schedules").mkdir(parents=True)
    (tmp_path / "checkout/configs/quick_schedules/Base-tiny.yaml").write_text("SEED: 1\n")
    words = ["--device", "cpu", "--configs", str(tmp_path / "checkout/configs")]
    _, inside = write(tmp_path, source, *words, name="checkout/my/own.yaml")
    assert "_BASE_: ../configs/quick_schedules/Base-tiny.yaml\n" in inside.read_text()
    _, outside = write(tmp_path, source, *words)
    assert f"_BASE_: {tmp_path}/checkout/configs/quick_schedules/Base-tiny.yaml\n" in outside.read_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", RECIPES)
def test_every_base_exists(kind, device):
    assert (ROOT / "configs" / RECIPES[device].bases[kind]).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu", "--gpus", "2"], "--gpus must be 1 with --device cpu, got 2"),
        (["--device", "cuda", "--budget-minutes", "30"], "--budget-minutes needs --seconds-per-iteration"),
        (["--device", "cpu", "--configs", "nowhere"], "--configs must name the folder `configs`"),
    ],
)
def test_what_cannot_be_written_is_said(words, message, tmp_path, capsys):
    code, file = write(tmp_path, KINDS["instance"](tmp_path), *words)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


def test_faulty_data_give_no_config(tmp_path, capsys):
    source = KINDS["instance"](tmp_path)
    annotation(tmp_path, area=0)
    code, file = write(tmp_path, source, "--device", "cpu")
    assert (code, file.exists()) == (1, False)
    assert "fault bad-area (2)" in capsys.readouterr().err


def test_sets_of_other_classes_give_no_config(tmp_path, capsys):
    source = KINDS["semantic"](tmp_path)
    val = flags(replace(source, classes=("a", "b", "c")))
    words = ["--device", "cpu", "--train", *flags(source), "--val", *val]
    assert main(["data", "config", "--to", str(tmp_path / "c.yaml"), *words]) == 1
    assert "classes-differ" in capsys.readouterr().err


def test_a_changed_config_is_not_overwritten(tmp_path, capsys):
    source = KINDS["instance"](tmp_path)
    _, file = write(tmp_path, source, "--device", "cpu")
    text = file.read_text()
    assert write(tmp_path, source, "--device", "cpu")[0] == 0  # the same again
    file.write_text(text + "# mine\n")
    assert write(tmp_path, source, "--device", "cpu")[0] == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert write(tmp_path, source, "--device", "cpu", "--overwrite")[0] == 0
    assert file.read_text() == text
