"""Own data train from a config file with Detectron2's engine."""

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")

from detectron2.data import MetadataCatalog

from mask2former.d2 import Trainer, get_config
from tests.own_data.small import KINDS
from tests.own_data.training import EXPECTED, write_config


@pytest.mark.parametrize("kind", KINDS)
def test_two_iterations_and_an_evaluation(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("MASK2FORMER_CACHE", str(tmp_path / "cache"))
    name = f"detectron2_{kind}"
    file = write_config(tmp_path, name, kind, KINDS[kind](tmp_path / "data"))
    cfg = get_config(file)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    trainer = Trainer(cfg)
    trainer.train()
    task, metric = EXPECTED[kind][3]
    assert 0 <= trainer._last_eval_results[task][metric] <= 100
    stuff = {"semantic": ["background", "apple", "pear"], "panoptic": ["apple", "pear", "sky"]}
    assert MetadataCatalog.get(name).stuff_classes == stuff.get(kind, ["apple", "pear"])
    things = [] if kind == "semantic" else ["apple", "pear"]
    assert MetadataCatalog.get(name).thing_classes == things
    assert get_config(file).DATASETS.CUSTOM == cfg.DATASETS.CUSTOM  # reading it again registers nothing twice


def test_a_config_that_was_not_read_by_get_config_is_registered_by_the_trainer(tmp_path):
    source = KINDS["instance"](tmp_path)
    cfg = get_config(write_config(tmp_path, "detectron2_other", "instance", source))
    cfg.DATASETS.CUSTOM = [{"NAME": "detectron2_late", **source.to_mapping()}]
    cfg.DATASETS.TRAIN = ("detectron2_late",)
    Trainer.build_model(cfg)
    assert MetadataCatalog.get("detectron2_late").thing_classes == ["apple", "pear"]
