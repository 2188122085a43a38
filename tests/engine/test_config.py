"""Config files without Detectron2: inheritance, overrides, types, and messages that name key, rule and value."""

import re

import pytest
import yaml

from mask2former import config
from mask2former.engine.config import ALL_DEFAULTS, Config, ConfigError, get_config
from mask2former.engine.defaults import ONLY_DEFAULT
from tests.configs import CONFIGS, FILES, name_of, published_sizes, value_of, write_published_style


def write(path, text):
    path.write_text(text)
    return path


def refused(path, *overrides):
    """The message with which a config is refused."""
    with pytest.raises(ConfigError) as caught:
        get_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_loads_and_its_dump_gives_the_same(path, tmp_path):
    cfg = get_config(path)
    assert get_config(write(tmp_path / "dump.yaml", cfg.dump())) == cfg


def test_without_a_file_there_are_the_defaults():
    cfg = get_config(None)
    assert cfg.SOLVER.STEPS == (30000,)
    assert cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON is True
    assert cfg.MODEL.SWIN.QK_SCALE is None


def test_nearer_files_win(tmp_path):
    write(tmp_path / "a.yaml", "SOLVER: {BASE_LR: 0.1, MAX_ITER: 1, STEPS: [1]}\n")
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/b.yaml", "_BASE_: ../a.yaml\nSOLVER: {MAX_ITER: 2}\n")
    write(tmp_path / "c.yaml", "SOLVER: {MAX_ITER: 3}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: [sub/b.yaml, c.yaml]\nSEED: 5\n")
    cfg = get_config(leaf)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SEED) == (0.1, 3, (1,), 5)
    assert get_config(leaf, ["SOLVER.MAX_ITER", "4"]).SOLVER.MAX_ITER == 4


@pytest.mark.parametrize("shortest", [512, 640, 1024, 2048])
def test_published_style_file(shortest, tmp_path):
    cfg = get_config(write_published_style(tmp_path, shortest))
    assert tuple(published_sizes(shortest)) == cfg.INPUT.MIN_SIZE_TRAIN
    assert cfg.DATASETS.TRAIN == ("made_up_train",)
    assert cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR"


def test_numbers_that_yaml_takes_for_texts(tmp_path):
    assert get_config(write(tmp_path / "x.yaml", "SOLVER: {BASE_LR: 1e-4}\n")).SOLVER.BASE_LR == 1e-4


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("DATASETS.TEST", "['a']", ("a",)),
        ("MODEL.PIXEL_STD", "(1.0, 2.0, 3.0)", [1.0, 2.0, 3.0]),
        ("MODEL.SWIN.QK_SCALE", "0.5", 0.5),
        ("MODEL.WEIGHTS", "a/b.pkl", "a/b.pkl"),
        ("SOLVER.AMP.ENABLED", "True", True),
    ],
)
def test_overrides_get_the_type_of_the_default(key, text, value):
    found = value_of(get_config(None, [key, text]), key)
    assert (type(found), found) == (type(value), value)


def test_config_is_frozen():
    cfg = get_config(None)
    with pytest.raises(AttributeError, match="frozen"):
        cfg.SEED = 3
    with pytest.raises(AttributeError):
        _ = cfg.SOLVER.NO_SUCH_KEY
    assert ALL_DEFAULTS["SEED"] == -1


def test_defaults_are_not_shared():
    get_config(None).MODEL.SWIN.DEPTHS.append(99)
    assert get_config(None).MODEL.SWIN.DEPTHS == [2, 2, 6, 2]


def test_unknown_keys_are_refused_with_the_nearest(tmp_path):
    path = write(tmp_path / "x.yaml", "SOLVER: {BASE_LRR: 1.0}\n")
    assert re.search(r"x\.yaml: there is no key SOLVER\.BASE_LRR; the nearest is SOLVER\.BASE_LR$", refused(path))
    assert "nearest is MODEL.MASK_FORMER.NHEADS" in refused(None, "MODEL.MASK_FORMER.HEADS", "8")
    assert "command line" in refused(None, "MODEL.MASK_FORMER.HEADS", "8")
    assert "there is no key LEARNING" in refused(write(tmp_path / "y.yaml", "LEARNING: {RATE: 1}\n"))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("SOLVER.MAX_ITER", "2.5"),
        ("SOLVER.MAX_ITER", "many"),
        ("SOLVER.MAX_ITER", "True"),
        ("SOLVER.AMP.ENABLED", "1"),
        ("SOLVER.BASE_LR", "True"),
        ("MODEL.WEIGHTS", "5"),
        ("DATASETS.TRAIN", "coco_2017_train"),
        ("MODEL.MASK_FORMER.TEST", "True"),
    ],
)
def test_wrong_types_are_refused_with_key_and_value(key, text):
    message = refused(None, key, text)
    assert key in message
    assert text in message


@pytest.mark.parametrize("key", ONLY_DEFAULT)
def test_what_cannot_be_done_is_refused(key):
    other = {bool: "True", int: "1", str: "Other"}[type(ALL_DEFAULTS[key])]
    assert re.match(rf"{re.escape(key)} must be .* with the embedded engine, got ", refused(None, key, other))


def test_odd_overrides_and_files_that_cannot_be_read(tmp_path):
    assert "pairs of key and value" in refused(None, "SEED")
    assert "No such file" in refused(tmp_path / "none.yaml")
    assert "mapping" in refused(write(tmp_path / "list.yaml", "[1]"))
    assert "YAML" in refused(write(tmp_path / "bad.yaml", "a: [1"))
    assert "must be a value" in refused(
        write(tmp_path / "s.yaml", f"_BASE_: {write(tmp_path / 't.yaml', 'SEED: 1').name}\nSEED: {{A: 1}}\n")
    )
    assert "_BASE_ must be" in refused(write(tmp_path / "n.yaml", "_BASE_: 5\n"))


def test_a_file_must_not_inherit_from_itself(tmp_path):
    write(tmp_path / "a.yaml", "_BASE_: b.yaml\n")
    message = refused(write(tmp_path / "b.yaml", "_BASE_: [a.yaml]\n"))
    assert "b.yaml -> a.yaml -> b.yaml" in message


@pytest.mark.parametrize(
    "tag",
    [
        '!!python/object/apply:os.system ["touch {}"]',
        "!!python/object/apply:eval [\"__import__('os').system('touch {}')\"]",
        '!!python/object/apply:eval ["1", "{}"]',
        "!!python/name:os.system",
        '!!python/object/new:subprocess.Popen [["touch", "{}"]]',
        "!!python/module:os",
    ],
)
def test_nothing_in_a_file_runs(tag, tmp_path):
    proof = tmp_path / "proof"
    path = write(tmp_path / "x.yaml", f"SEED: {tag.format(proof)}\n")
    assert "x.yaml" in refused(path)
    assert not proof.exists()


def test_every_translation_reads_the_defaults_of_the_reference():
    cfg = get_config(CONFIGS / "quick_schedules/coco_mini16_panoptic_tiny.yaml")
    assert config.schedule_arguments(cfg)["max_iter"] == 600
    assert config.architecture_arguments(cfg)["transformer_decoder"]["num_queries"] == 50
    assert isinstance(cfg.SOLVER, Config)
    assert yaml.safe_load(cfg.dump())["SEED"] == 1


def test_a_changed_copy() -> None:
    cfg = get_config(CONFIGS / "quick_schedules/smoke.yaml")
    other = cfg.changed({"SOLVER.MAX_ITER": 77, "SOLVER.STEPS": (1, 2)})
    assert (other.SOLVER.MAX_ITER, other.SOLVER.STEPS) == (77, (1, 2))
    assert cfg.SOLVER.MAX_ITER != 77
    assert other != cfg
    assert other.changed({"SOLVER.MAX_ITER": cfg.SOLVER.MAX_ITER, "SOLVER.STEPS": cfg.SOLVER.STEPS}) == cfg
